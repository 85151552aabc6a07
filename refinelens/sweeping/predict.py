"""Prediction rows of a question: contexts, one forward pass per batch, every layer through every lens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..config import SweepConfig
from ..data.prompts import Context, Span
from ..data.questions import Alias, Question
from ..data.scoring import best_subspan_em
from ..errors import FaultError, InputError
from ..lens.files import Lens
from ..lens.logit_lens import LogitLens
from ..lens.prefix import Branches, branch_order, choose_reuse, compare
from ..lens.reading import LayerReading
from ..model.identity import text_of
from ..model.loading import LoadedModel, is_out_of_memory
from ..store.results import NO_ANSWER_TOKEN, PREDICTIONS, QuestionResult
from .contexts import ContextBuilder
from .generate import Generation, Generator, check_cache

TOKENS_PER_BATCH = 16384  # of one forward pass on a GPU, padding included
STATISTICS = ("argmax", "target_rank", "target_logprob", "max_logprob", "entropy")
COUNTS = (
    *("contexts", "passages_replaced", "positions_read", "lens_rows"),
    *("tokens_computed", "tokens_saved", "tokens_generated"),
)
ROWS_AT_A_TIME = 4096  # of one call of a lens, layers times positions, unless one context has more
SPANS = {"answer": "answer_span", "all": "whole_span"}


class Batching:
    """Splits contexts into batches, and into smaller ones from the moment memory ran out."""

    def __init__(self, options: SweepConfig, device_type: str):
        self.at_most: int | None = None  # contexts, once memory ran out
        self._options = options
        self._on_cpu = device_type == "cpu"

    def split(self, contexts: list[Context]) -> Iterator[list[Context]]:
        """Batches in order; how large the next one is depends on how the last one went."""
        while contexts:
            size = self._size(contexts)
            yield contexts[:size]
            contexts = contexts[size:]

    def shrink(self, batch: list[Context]) -> str:
        """Take note that there was no memory for a batch, and say so in one line."""
        self.at_most = max(1, len(batch) // 2)
        return (
            f"out of memory with {len(batch)} contexts of {len(batch[0].input_ids)} tokens; from here on at most "
            f"{self.at_most} at a time"
        )

    def _size(self, contexts: list[Context]) -> int:
        if self._options.batch_size != "auto":
            size = int(self._options.batch_size)
        elif self._on_cpu or self._options.positions == "all":
            size = 1  # several at a time bring nothing on a CPU; all states of a context are much to hold
        else:
            size = max(1, TOKENS_PER_BATCH // max(len(context.input_ids) for context in contexts))
        return size if self.at_most is None else min(size, self.at_most)


@dataclass(frozen=True)
class ContextStates:
    """A context that was run: its residual stream where it is to be read, and the text it goes on with, if any."""

    context: Context
    span: Span
    hidden: Tensor  # [n_layers + 1, n_positions, d_model]
    generation: Generation | None

    @property
    def n_rows(self) -> int:
        """Rows that a lens reads: layers times positions."""
        return self.hidden.shape[0] * self.hidden.shape[1]


@dataclass(frozen=True)
class ContextReading:
    """What was read of one context, on the CPU."""

    context: Context
    span: Span
    target_ids: Tensor  # [n_positions] int64
    readings: dict[str, LayerReading]  # by lens, fields [n_layers + 1, n_positions]
    generation: Generation | None


def read_contexts(
    ran: Sequence[ContextStates], logit_lens: LogitLens, lenses: Sequence[Lens], target: str
) -> list[ContextReading]:
    """Read every layer of several contexts through every lens.

    The unembedding is fetched once for all of them: with a context at a time, that would be most of the work.

    Args:
        ran: Contexts, at least one.
        logit_lens: Of their model.
        lenses: What to read them through.
        target: ``answer``, the token that follows, or ``prediction``, the model's own.

    Raises:
        InputError: States that are not finite, of any of them.
    """
    hidden = torch.cat([one.hidden for one in ran], 1)[:, None]  # [n_layers + 1, 1, positions of all, d_model]
    if target == "prediction":
        targets = logit_lens.stats(hidden[-1]).argmax
    else:
        targets = torch.tensor([[id for one in ran for id in one.span.next_ids]], device=hidden.device)
    read = partial(logit_lens.read_states, hidden, targets, check_last=False)
    readings = {lens.name: read(lens.translators).to("cpu") for lens in lenses}
    targets, found, start = targets[0].cpu(), [], 0
    for one in ran:
        end = start + len(one.span.next_ids)
        own = {name: reading.of(start, end) for name, reading in readings.items()}
        found.append(ContextReading(one.context, one.span, targets[start:end], own, one.generation))
        start = end
    return found


def prediction_table(read: ContextReading, alias: Alias, text: Callable[[int], str]) -> pa.Table:
    """Rows of `PREDICTIONS`, lens by lens, one per position.

    Args:
        read: A context.
        alias: The answer of its question that is the target.
        text: The text of a token id.
    """
    shared = _shared_columns(read, alias, text)
    tables = [_table(shared, lens, reading, text) for lens, reading in read.readings.items()]
    return pa.concat_tables(tables)


def _table(shared: dict, lens: str, reading: LayerReading, text: Callable[[int], str]) -> pa.Table:
    lists = {name: getattr(reading.stats, name).T.numpy() for name in STATISTICS} | {"kl": reading.kl.T.numpy()}
    lists["argmax_text"] = _texts(lists["argmax"], text)
    n = len(lists["kl"])
    columns = shared | {"lens": pa.array([lens] * n)} | {name: _lists(values) for name, values in lists.items()}
    return pa.table([columns[name] for name in PREDICTIONS.names], PREDICTIONS.names).cast(PREDICTIONS)


def _shared_columns(read: ContextReading, alias: Alias, text: Callable[[int], str]) -> dict:
    """Columns that all lenses have alike."""
    context, n = read.context, len(read.span.next_ids)
    start, end = context.gold_span or (None, None)
    written = None if read.generation is None else read.generation.text
    target_ids, next_ids = read.target_ids.numpy(), np.array(read.span.next_ids)
    constants = {
        "question_id": context.question.id,
        "source_id": context.question.source_id,
        "documents": context.n_documents,
        "gold_position": context.gold_position,
        "n_tokens": len(context.input_ids),
        "gold_start": start,
        "gold_end": end,
        "alias": alias.index,
        "alias_why": alias.why,
        "generated": written,
        "generated_correct": None if written is None else best_subspan_em(written, context.question.answers),
    }
    positions = np.array(read.span.positions)
    answer_token = np.maximum(positions - (context.prompt_length - 1), NO_ANSWER_TOKEN)
    return {name: pa.array([value] * n, PREDICTIONS.field(name).type) for name, value in constants.items()} | {
        "position": positions,
        "answer_token": answer_token,
        "covers_before": pa.array([context.covers_before if place == 0 else None for place in answer_token]),
        "answer_id": next_ids,
        "answer_text": _texts(next_ids, text),
        "target_id": target_ids,
        "target_text": _texts(target_ids, text),
    }


def _texts(ids: np.ndarray, text: Callable[[int], str]) -> np.ndarray:
    """Texts of ids of any shape."""
    unique, inverse = np.unique(ids, return_inverse=True)
    return np.array([text(id) for id in unique.tolist()], dtype=object)[inverse].reshape(ids.shape)


def _lists(values: np.ndarray) -> pa.ListArray:
    """A list of every row ``[n, length]``."""
    offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(values.ravel()))


class Predictor:
    """Asks questions and turns the answers into rows; counts what it did and what it had to leave out."""

    def __init__(
        self,
        options: SweepConfig,
        builder: ContextBuilder,
        loaded: LoadedModel,
        logit_lens: LogitLens,
        lenses: list[Lens],
    ):
        self.options = options
        self.counts: Counter[str] = Counter()  # of the question that is asked
        self.warnings: list[str] = []
        self.reuse = choose_reuse(options, logit_lens)
        self.left_out: dict[str, list[int]] = {}  # reason: question ids, of the question that is asked
        self._loaded = loaded
        self._logit_lens = logit_lens
        self._lenses = lenses
        self._branches: Branches | None = None  # of the question that is asked, while its contexts branch off
        self._generator = Generator.from_model(loaded, logit_lens, options.generate) if options.generate else None
        # Whether the pass that the lens reads keeps a cache for generation to go on from.
        self._cached = bool(options.generate) and (self.reuse.used or check_cache(logit_lens).used)
        self._proven = 0  # tokens of the longest context that branched off and was compared with itself run whole
        self._builder = builder
        self._batching = Batching(options, loaded.model.device.type)
        self._text = cache(lambda token_id: text_of(loaded.tokenizer, token_id))

    def ask(self, question: Question) -> QuestionResult:
        """All that comes of one question, at every context size and gold position it can be asked at.

        Raises:
            FaultError: Names the question, whatever went wrong.
        """
        self.counts, self.warnings = Counter(dict.fromkeys(COUNTS, 0)), []
        try:
            rows = self.rows(question)
        except (InputError, FaultError):
            raise
        except Exception as error:
            raise FaultError(f"question {question.id}: {type(error).__name__}: {error}") from error
        notes = {"prefix_reuse": asdict(self.reuse), "contexts_at_a_time_at_most": self._batching.at_most}
        return QuestionResult(rows, dict(self.counts), self.left_out, notes, tuple(self.warnings))

    def rows(self, question: Question) -> pa.Table:
        """Prediction rows of one question."""
        found = self._builder.build(question)
        self.counts.update(
            contexts=len(found.contexts), passages_replaced=found.n_replaced, tokens_computed=found.n_tokens
        )
        self.left_out = found.left_out
        read = self._ask(found.contexts)
        tables = {reading.context: prediction_table(reading, found.alias, self._text) for reading in read}
        return pa.concat_tables([PREDICTIONS.empty_table(), *(tables[context] for context in found.contexts)])

    def _ask(self, contexts: list[Context]) -> Iterator[ContextReading]:
        """Run all contexts of a question and read them, as many at a time as `ROWS_AT_A_TIME` allows, in any order."""
        batches = self._batching.split(contexts)
        if self.reuse.used:
            self._branches = Branches(self._logit_lens)  # nothing of other questions: each gives the same by itself
            batches = ([contexts[index]] for index in branch_order([c.input_ids for c in contexts]))
        ran: list[ContextStates] = []
        for batch in batches:
            ran += self._run(batch)
            if sum(one.n_rows for one in ran) >= ROWS_AT_A_TIME:
                yield from self._read(ran)
                ran = []
        yield from self._read(ran)

    def _run(self, batch: list[Context]) -> list[ContextStates]:
        try:
            ran = self._states(batch)
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)  # or its frames would hold the tensors that there was no room for
        else:
            saved = 0 if self._branches is None else self._branches.shared
            self.counts["tokens_computed"] += sum(len(context.input_ids) for context in batch) - saved
            self.counts["tokens_saved"] += saved
            self.counts["tokens_generated"] += sum(one.generation.n_tokens for one in ran if one.generation)
            return ran
        return [one for part in self._after(failure, batch) for one in self._run(part)]

    def _after(self, failure: Exception, batch: list[Context]) -> Iterable[list[Context]]:
        """What to run in place of a batch that failed: smaller ones, or the same without a cache.

        Raises:
            FaultError: Names the context at fault.
        """
        torch.cuda.empty_cache()
        out_of_memory = not isinstance(failure, InputError)
        if out_of_memory and self._branches is not None:
            self._branches = None  # without a cache it may fit
            return [batch]
        if len(batch) == 1:
            raise _name_context(batch[0], failure)
        if out_of_memory:
            self.warnings.append(self._batching.shrink(batch))
            return self._batching.split(batch)
        return [batch[: len(batch) // 2], batch[len(batch) // 2 :]]  # the one at fault is found and named

    def _states(self, batch: list[Context]) -> list[ContextStates]:
        """Run contexts together, padded on the right, their spans by repeating the last token; padding is not kept."""
        spans = [getattr(context, SPANS[self.options.positions]) for context in batch]
        n_tokens = max(len(c.input_ids) for c in batch)
        n_read = max(len(span.next_ids) for span in spans)
        ids = torch.tensor([_pad(c.input_ids, n_tokens, c.input_ids[-1]) for c in batch])
        mask = torch.tensor([_pad([1] * len(c.input_ids), n_tokens, 0) for c in batch])
        positions = torch.tensor([_pad(span.positions, n_read, span.positions[-1]) for span in spans])
        hidden, cache = self._hidden(ids, positions, mask)
        generations = self._generate(batch, cache)
        return [
            ContextStates(context, span, hidden[:, index, : len(span.next_ids)], generation)
            for index, (context, span, generation) in enumerate(zip(batch, spans, generations, strict=True))
        ]

    def _generate(self, batch: list[Context], cache: Cache | None) -> list[Generation] | list[None]:
        """A text per context, which goes on from its prompt by itself."""
        if self._generator is None:
            return [None] * len(batch)
        return self._generator.generate([c.prompt_ids for c in batch], [c.n_shared for c in batch], cache)

    def _read(self, ran: list[ContextStates]) -> Iterator[ContextReading]:
        """Read contexts that were run, together unless something is wrong with one of them."""
        if not ran:
            return
        try:
            read = read_contexts(ran, self._logit_lens, self._lenses, self.options.target)
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not is_out_of_memory(error):
                raise
            failure = error.with_traceback(None)
        else:
            self.counts["positions_read"] += sum(len(one.span.positions) for one in ran)
            self.counts["lens_rows"] += sum(one.n_rows for one in ran) * len(self._lenses)
            yield from read
            return
        if len(ran) == 1:
            raise _name_context(ran[0].context, failure)
        torch.cuda.empty_cache()
        for half in (ran[: len(ran) // 2], ran[len(ran) // 2 :]):
            yield from self._read(half)

    def _hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Cache | None]:
        """``[n_layers + 1, batch, answer tokens, d_model]``, and a cache for generation to go on from, if there is one.

        The first context that branches off also runs whole, and then every one more than twice as long as all that did.

        The gate has seen a few tokens; a real context is longer, than a sliding window say. Those runs are not counted.
        """
        if self._branches is None:
            cache = DynamicCache() if self._cached else None
            return self._logit_lens.hidden(ids, positions, mask, cache), cache
        branched = self._branches.hidden(ids, positions)
        if self._branches.shared == 0 or ids.shape[1] <= 2 * self._proven:
            return branched, self._branches.cache
        whole = self._logit_lens.hidden(ids, positions, mask)
        self.reuse, self._proven = compare(self._logit_lens, [(branched, whole)]), ids.shape[1]
        if self.reuse.used:
            return branched, self._branches.cache
        self._branches, self._cached = None, False
        return whole, None


def _name_context(context: Context, error: Exception) -> FaultError:
    what = str(error)
    if not isinstance(error, InputError):
        what = (
            f"``device``: expected memory for one context of {len(context.input_ids)} tokens, got out of memory; use "
            "fewer documents, a smaller model or ``dtype='bfloat16'``"
        )
    return FaultError(f"{context.where}: {what}")


def _pad(values, length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]
