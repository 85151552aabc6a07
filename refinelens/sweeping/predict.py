"""The questions of a sweep: their contexts, forward passes, every layer through every lens, rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import groupby, pairwise

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from transformers import Cache

from ..config import GENERATED_SETTLE, PREDICTION, STATES, SweepConfig
from ..data.prompts import Context
from ..data.questions import Alias, Question
from ..data.scoring import best_subspan_em
from ..lens.attribution import sublayer_measures
from ..lens.files import Lens
from ..lens.logit_lens import LogitLens
from ..lens.measures import measures_of, settling_layers
from ..lens.prefix import choose_reuse
from ..lens.reading import LayerReading
from ..lens.runner import ForwardRunner, ModelInput, ModelStates, blamed_on, blamed_on_context, in_batches
from ..lens.stored_states import StoredStates
from ..model.identity import text_of
from ..model.loading import LoadedModel
from ..model.resid_mid import Sublayers
from ..store.results import NO_ANSWER_TOKEN, QuestionResult, predictions_schema
from .columns import FurtherColumns
from .contexts import ContextBuilder
from .generate import Generation, Generator, check_cache

STATISTICS = ("argmax", "target_rank", "target_logprob", "max_logprob", "entropy")
COUNTS = (
    *("contexts", "passages_replaced", "positions_read", "lens_rows"),
    *("tokens_computed", "tokens_saved", "tokens_generated"),
)
ROWS_AT_A_TIME = 4096  # of one call of a lens, layers times positions, unless one context has more
CONTEXTS_AT_A_TIME = 64  # of questions that share batches
SPANS = {"answer": "answer_span", "all": "whole_span"}


def questions_together(options: SweepConfig, device_type: str) -> int:
    """How many neighbouring questions share their batches.

    It follows from the manifest, as does which: a run that is gone on with, or that several workers share, has the same
    batches, and so the same bits.
    """
    size = options.batch_size
    alone = options.positions == "all" or options.reuse_prefix == "on"  # much to hold; contexts that run one by one
    if alone or size == "1" or (size == "auto" and device_type == "cpu"):
        return 1
    n_contexts = sum(len(options.placements(n)) for n in options.documents)
    return max(1, max(CONTEXTS_AT_A_TIME, 0 if size == "auto" else int(size)) // n_contexts)


def groups_of(places: Sequence[int], together: int) -> list[tuple[int, ...]]:
    """Places of questions, in ascending order, with those that share batches side by side."""
    return [tuple(group) for _, group in groupby(places, lambda place: place // together)]


@dataclass(frozen=True, kw_only=True)
class AskedContext(ModelInput):
    """A context as it is run, and what is looked for in it."""

    context: Context
    alias: Alias
    next_ids: tuple[int, ...]  # the token that follows each position

    def part(self, here: slice) -> AskedContext:
        """The same context, of which some of the positions are read."""
        return replace(self, positions=self.positions[here], next_ids=self.next_ids[here])


@dataclass(frozen=True)
class Read:
    """What one lens reads of a context, fields ``[n_layers + 1, n_positions]`` on the CPU."""

    reading: LayerReading
    measures: dict[str, Tensor]  # by name

    @staticmethod
    def cat(parts: Sequence[Read]) -> Read:
        """Of neighbouring positions as one."""
        measures = {name: torch.cat([one.measures[name] for one in parts], 1) for name in parts[0].measures}
        return Read(LayerReading.cat([one.reading for one in parts], 1), measures)


@dataclass(frozen=True)
class ReadContext:
    """A context that was read, or some of its positions: all that its rows are made of, and no states."""

    input: AskedContext
    target_ids: Tensor  # [n_positions] int64
    read: dict[str, Read]  # by the names of the lenses
    written: Generation | None  # of several parts the last one has it
    before_answer: Tensor | None  # [n_layers + 1, d_model], the state that the answer follows; None if it is not kept

    @staticmethod
    def cat(parts: Sequence[ReadContext], whole: AskedContext) -> ReadContext:
        """The parts of a context, in order."""
        if len(parts) == 1:
            return parts[0]
        targets = torch.cat([one.target_ids for one in parts])
        read = {name: Read.cat([one.read[name] for one in parts]) for name in parts[0].read}
        before = next((one.before_answer for one in parts if one.before_answer is not None), None)
        return ReadContext(whole, targets, read, parts[-1].written, before)


def read_contexts(
    ran: Sequence[ModelStates],
    logit_lens: LogitLens,
    lenses: Sequence[Lens],
    target: str,
    measures: Sequence[str] = (),
) -> Iterator[tuple[Tensor, dict[str, Read]]]:
    """Read every layer of several contexts through every lens.

    The unembedding is fetched once for all of them: with a context at a time, that would be most of the work.

    Args:
        ran: What came of each `AskedContext`, at least one.
        logit_lens: Of their model.
        lenses: What to read them through.
        target: ``answer``, the token that follows, or ``prediction``, the model's own.
        measures: Further ones, see `measures_of`; the streams within blocks are measured where they were kept, alike
            for every lens.

    Returns:
        Of each context, on the CPU: target ids ``[n_positions]`` int64, and by the name of each lens what it reads.

    Raises:
        InputError: States that are not finite, of any of them.
        UnsupportedModelError: Parts of blocks that do not sum up to the target's logit.
    """
    hidden = torch.cat([one.hidden for one in ran], 1)[:, None]  # [n_layers + 1, 1, positions of all, d_model]
    if target == "prediction":
        targets = logit_lens.stats(hidden[-1]).argmax
    else:
        targets = torch.tensor([[id for one in ran for id in one.input.next_ids]], device=hidden.device)
    others = {}  # further targets by the beginning of their columns' names
    if ran[0].input.context.decoy_id is not None:
        decoys = [one.input.context.decoy_id for one in ran for _ in one.input.next_ids]
        others["decoy"] = torch.tensor([decoys], device=hidden.device)
    if PREDICTION in measures:
        others["prediction"] = logit_lens.stats(hidden[-1]).argmax
    further = torch.stack([*others.values()], -1) if others else None
    inside, read = {}, {}
    if ran[0].mid is not None:
        found = sublayer_measures(logit_lens, hidden[:, 0], torch.cat([one.mid for one in ran], 1), targets[0])
        inside = {name: value[:, None] for name, value in found.items()}
    for lens in lenses:
        reading = logit_lens.read_states(hidden, targets, lens.translators, alternatives=further, check_last=False)
        measured = measures_of(logit_lens, hidden, reading, lens.translators, measures) | inside
        for place, name in enumerate(others):
            for of in ("rank", "logprob"):
                measured[f"{name}_{of}"] = getattr(reading.alternatives, of)[..., place].cpu()
        read[lens.name] = Read(reading.to("cpu"), measured)
    targets, ends = targets[0].cpu(), np.cumsum([0, *(one.hidden.shape[1] for one in ran)]).tolist()
    for start, end in pairwise(ends):
        yield (
            targets[start:end],
            {
                name: Read(whole.reading.of(start, end), {k: v[:, 0, start:end] for k, v in whole.measures.items()})
                for name, whole in read.items()
            },
        )


def prediction_table(
    context: ReadContext, text: Callable[[int], str], schema: pa.Schema, further: FurtherColumns
) -> pa.Table:
    """Predictions of one context, lens by lens, a row per position.

    Args:
        context: What was read of it.
        text: Gives the text of a token id.
        schema: Of the table, see `predictions_schema`.
        further: Makes columns of it that are no measures of every layer.
    """
    shared = _shared_columns(context, text, schema)
    tables = []
    for lens, own in context.read.items():
        argmax = own.reading.argmax.T.numpy()
        given = (argmax, shared["target_id"], shared["answer_token"])
        more = further.of(context.before_answer, context.written, lens, *given)
        tables.append(_table(shared | more, lens, own, text, schema))
    return pa.concat_tables(tables)


def _table(shared: dict, lens: str, read: Read, text: Callable[[int], str], schema: pa.Schema) -> pa.Table:
    tensors = {name: getattr(read.reading.stats, name) for name in STATISTICS} | {"kl": read.reading.kl}
    lists = {name: value.T.numpy() for name, value in (tensors | read.measures).items()}
    lists["argmax_text"] = _texts(lists["argmax"], text)
    own = {name: _lists(values) for name, values in lists.items()}
    columns = shared | own | {"lens": pa.array([lens] * len(own["kl"]))}
    return pa.table([columns[name] for name in schema.names], schema.names).cast(schema)


def _shared_columns(read: ReadContext, text: Callable[[int], str], schema: pa.Schema) -> dict:
    """Columns that all lenses have alike."""
    asked, context, next_ids = read.input, read.input.context, np.array(read.input.next_ids)
    target_ids = read.target_ids.numpy()
    start, end = context.gold_span or (None, None)
    written = None if read.written is None else read.written.text
    constants = {
        "question_id": context.question.id,
        "source_id": context.question.source_id,
        "documents": context.n_documents,
        "gold_position": context.gold_position,
        "decoy_position": context.placement.decoy_position,
        "decoy_answer": context.question.decoy_answer,
        "decoy_id": context.decoy_id,
        "n_tokens": len(context.input_ids),
        "gold_start": start,
        "gold_end": end,
        "alias": asked.alias.index,
        "alias_why": asked.alias.why,
        "generated": written,
        "generated_correct": None if written is None else best_subspan_em(written, context.question.answers),
    }
    positions = np.array(asked.positions)
    answer_token = np.maximum(positions - (context.prompt_length - 1), NO_ANSWER_TOKEN)
    return {
        name: pa.array([value] * len(next_ids), schema.field(name).type)
        for name, value in constants.items()
        if name in schema.names
    } | {
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
    """A list of every row ``[n, length]``; null where a value does not exist."""
    offsets, flat = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1], values.ravel()
    missing = flat.dtype.kind == "f" and np.isnan(flat)
    return pa.ListArray.from_arrays(offsets, pa.array(flat, mask=missing if np.any(missing) else None))


class Predictor:
    """Asks questions and turns the answers into rows; counts what it did and what it had to leave out."""

    def __init__(
        self,
        options: SweepConfig,
        builder: ContextBuilder,
        loaded: LoadedModel,
        logit_lens: LogitLens,
        lenses: list[Lens],
        rows_at_a_time: int = ROWS_AT_A_TIME,
        buckets: np.ndarray | None = None,
        sublayers: Sequence[Sublayers] | None = None,
        stored: StoredStates | None = None,
        chunk_tokens: int = 0,
    ):
        """
        Args:
            options: What is asked.
            builder: Builds its contexts.
            loaded: The model.
            logit_lens: Of the model.
            lenses: What every layer is read through.
            rows_at_a_time: See `ROWS_AT_A_TIME`.
            buckets: How frequent every token is, int8 ``[vocab_size]``, where that is measured.
            sublayers: Attention and feed-forward part of every block, where these are measured.
            stored: States of every context, where no model runs.
            chunk_tokens: See `ForwardRunner`.
        """
        self._rows_at_a_time = rows_at_a_time
        self._options, self._builder, self._logit_lens, self._lenses = options, builder, logit_lens, lenses
        self._schema = predictions_schema(options.extras)
        self._together = questions_together(options, loaded.device.type)
        self._text = cache(lambda token_id: text_of(loaded.tokenizer, token_id))
        self._further, self._generator = FurtherColumns(options.extras, [lens.name for lens in lenses], buckets), None
        self._runner = stored or self._forward_runner(loaded, sublayers, chunk_tokens)

    def _forward_runner(
        self, loaded: LoadedModel, sublayers: Sequence[Sublayers] | None, chunk_tokens: int
    ) -> ForwardRunner:
        """What runs contexts, and the generator that goes on from them."""
        options, logit_lens = self._options, self._logit_lens
        if options.generate:
            keeps_states = GENERATED_SETTLE in options.extras
            generator = Generator.from_model(loaded, logit_lens, options.generate, keeps_states=keeps_states)
            self._generator = generator
        reuse = choose_reuse(options, logit_lens)
        keeps_cache = bool(options.generate) and (reuse.used or check_cache(logit_lens).used)
        size = None if options.batch_size == "auto" else int(options.batch_size)
        size = 1 if size is None and options.positions == "all" else size  # all states of a context are much to hold
        return ForwardRunner(logit_lens, size, reuse, keeps_cache, sublayers, chunk_tokens)

    def prepare(self, questions: Sequence[Question], places: Sequence[int]) -> None:
        """Let a thread build the contexts that `ask` will take for the questions at some places."""
        self._builder.prepare(self._group(questions, places))

    def close(self) -> None:
        """Nothing more is asked."""
        self._builder.close()

    def _group(self, questions: Sequence[Question], places: Sequence[int]) -> Sequence[Question]:
        """The questions that share the batches of those at some places."""
        first = places[0] // self._together * self._together
        return questions[first : first + self._together]

    def ask(self, questions: Sequence[Question], places: Sequence[int]) -> list[QuestionResult]:
        """All that comes of the questions at some places, at every context size and gold position.

        Args:
            questions: All of the sweep.
            places: One of `groups_of`. The questions that share its batches run too, so that these are what they are.

        Raises:
            FaultError: Names the question or the context, whatever went wrong.
        """
        first = places[0] // self._together * self._together
        found, asked, warnings = [], [], []
        for question in self._group(questions, places):
            with blamed_on(f"question {question.id}"):
                found.append(self._builder.build(question))
            asked += [self._asked(context, found[-1].alias) for context in found[-1].contexts]
        rows = dict(self._rows(asked, warnings.append))
        notes = {"prefix_reuse": asdict(self._runner.reuse), "contexts_at_a_time_at_most": self._runner.limit.at_most}
        if self._runner.chunks is not None:
            notes["chunked_prefill"] = asdict(self._runner.chunks)
        results, index = [], iter(range(len(asked)))
        for place, one in enumerate(found, first):
            own = [rows[next(index)] for _ in one.contexts]
            if place in places:
                counts = Counter(dict.fromkeys(COUNTS, 0))
                counts.update(passages_replaced=one.n_replaced, tokens_computed=one.n_tokens)
                for _, of_context in own:
                    counts.update(of_context)
                table = pa.concat_tables([self._schema.empty_table(), *(table for table, _ in own)])
                results.append(QuestionResult(table, dict(counts), one.left_out, notes, tuple(warnings)))
                warnings = []
        return results

    def _asked(self, context: Context, alias: Alias) -> AskedContext:
        span = getattr(context, SPANS[self._options.positions])
        own = {"context": context, "alias": alias, "next_ids": span.next_ids}
        return AskedContext(context.input_ids, span.positions, context.where, **own)

    def _rows(
        self, asked: list[AskedContext], warn: Callable[[str], None]
    ) -> Iterator[tuple[int, tuple[pa.Table, dict[str, int]]]]:
        """Rows and counts of every context, by its index, in any order."""
        held: list[ModelStates] = []
        parts: dict[int, list[ReadContext]] = {}  # of contexts that are read part by part, by their index
        saved: dict[int, int] = {}

        def read() -> Iterator[tuple[int, tuple[pa.Table, dict[str, int]]]]:
            for states, one in zip(held, self._read(held), strict=True):
                parts.setdefault(states.index, []).append(one)
                saved[states.index] = states.n_saved
            held.clear()
            for index in list(parts):
                whole = asked[index]
                if sum(len(one.input.positions) for one in parts[index]) == len(whole.positions):
                    with blamed_on_context(whole):
                        yield index, self._table(ReadContext.cat(parts.pop(index), whole), saved[index])

        for states in self._runner.run(asked, self._write, warn):
            held.append(states)
            del states  # else it would be held while the next contexts run
            if sum(one.hidden[..., 0].numel() for one in held) >= self._rows_at_a_time:
                yield from read()
        yield from read()

    def _write(self, asked: list[AskedContext], cache: Cache | None) -> list[Generation | None]:
        """A text per context, which goes on from its prompt by itself."""
        if self._generator is None:
            return [None] * len(asked)
        contexts = [one.context for one in asked]
        found = self._generator.generate([c.prompt_ids for c in contexts], [c.n_shared for c in contexts], cache)
        return [one if one.hidden is None else self._settled(one) for one in found]

    def _settled(self, written: Generation) -> Generation:
        """A text with the layers at which its tokens settle, in place of their states."""
        lens, states = self._logit_lens, written.hidden
        settled = {one.name: settling_layers(lens, states, one.translators) for one in self._lenses}
        return replace(written, hidden=None, settled=settled)

    def _read(self, held: list[ModelStates]) -> list[ReadContext]:
        """Read contexts that were run, together unless something is wrong with one of them."""

        def read(ran: list[ModelStates]) -> list[ReadContext]:
            options = self._options
            found = read_contexts(ran, self._logit_lens, self._lenses, options.target, options.measures)
            return [
                ReadContext(one.input, *own, one.written, self._before_answer(one))
                for one, own in zip(ran, found, strict=True)
            ]

        return [one for part in in_batches(held, read, context=lambda one: one.input) for one in part]

    def _before_answer(self, ran: ModelStates) -> Tensor | None:
        """A copy, where states are kept in rows, of the state at the last token of the prompt, if it is among these."""
        place, positions = ran.input.context.prompt_length - 1, list(ran.input.positions)
        is_kept = STATES in self._options.extras and place in positions
        return ran.hidden[:, positions.index(place)].clone() if is_kept else None

    def _table(self, context: ReadContext, n_saved: int) -> tuple[pa.Table, dict[str, int]]:
        """Rows and counts of a context."""
        asked, n_positions = context.input, len(context.input.positions)
        table = prediction_table(context, self._text, self._schema, self._further)
        return table, {
            "contexts": 1,
            "positions_read": n_positions,
            "lens_rows": len(self._lenses) * (self._logit_lens.n_layers + 1) * n_positions,
            "tokens_computed": len(asked.ids) - n_saved,
            "tokens_saved": n_saved,
            "tokens_generated": len(context.written.ids) if context.written else 0,
        }
