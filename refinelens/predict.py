"""Prediction rows of a question: contexts, one forward pass per batch, every layer through every lens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache

import pyarrow as pa
import torch
from transformers import Cache, DynamicCache

from .contexts import ContextBuilder
from .errors import FaultError, InputError
from .generate import Generation, Generator, check_cache
from .lens_files import Lens
from .logit_lens import LayerReading, LogitLens
from .models import LoadedModel, is_out_of_memory
from .options import SweepOptions
from .prefix import Branches, branch_order, choose_reuse, compare
from .prompts import Context
from .question import Question
from .results import PREDICTIONS, Outcome
from .scoring import best_subspan_em

COUNTS = ("contexts", "lens_rows", "tokens_computed", "tokens_saved", "tokens_generated")
TOKENS_PER_BATCH = 16384  # of one forward pass on a GPU, padding included


class Predictor:
    """Asks questions and turns the answers into rows; counts what it did and what it had to leave out."""

    def __init__(
        self,
        options: SweepOptions,
        builder: ContextBuilder,
        loaded: LoadedModel,
        logit_lens: LogitLens,
        lenses: list[Lens],
    ):
        self.options = options
        self.counts: Counter[str] = Counter()  # of the question that is asked
        self.reuse = choose_reuse(options, logit_lens)
        self.left_out: dict[str, list[int]] = {}  # reason: question ids, of the question that is asked
        self._loaded = loaded
        self._logit_lens = logit_lens
        self._lenses = lenses
        self._branches: Branches | None = None  # of the question that is asked, while its contexts branch off
        self._generator = Generator.from_model(loaded, logit_lens, options.generate) if options.generate else None
        # Whether the pass that the lens reads keeps a cache for generation to go on from.
        self._cached = bool(options.generate) and (self.reuse.used or check_cache(logit_lens).used)
        self._proven = False  # a real context that branched off was compared with itself run whole
        self._builder = builder
        self._text = cache(lambda token_id: loaded.tokenizer.decode([token_id]))

    def ask(self, question: Question) -> Outcome:
        """All that comes of one question, at every context size and gold position it can be asked at.

        Raises:
            FaultError: Names the question, whatever went wrong.
            OSError: A file could not be used.
        """
        self.counts = Counter(dict.fromkeys(COUNTS, 0))
        try:
            rows = pa.Table.from_pylist(self.rows(question), schema=PREDICTIONS)
        except (InputError, FaultError, OSError):
            raise
        except Exception as error:
            raise FaultError(f"question {question.id}: {type(error).__name__}: {error}") from error
        return Outcome(rows, dict(self.counts), self.left_out, {"prefix_reuse": asdict(self.reuse)})

    def rows(self, question: Question) -> list[dict]:
        """Prediction rows of one question."""
        found = self._builder.build(question)
        self.counts.update(contexts=len(found.contexts), tokens_computed=found.n_tokens)
        self.left_out = found.left_out
        alias = {"alias": found.alias.index, "alias_why": found.alias.why}
        return [row | alias for row in self._ask(found.contexts)]

    def _ask(self, contexts: list[Context]) -> list[dict]:
        """Rows of contexts of one question, in their order."""
        if not self.reuse.used:
            return [row for batch in self._batches(contexts) for row in self._run(batch)]
        self._branches = Branches(self._logit_lens)  # nothing of other questions: each gives the same rows by itself
        rows = {index: self._run([contexts[index]]) for index in branch_order([c.input_ids for c in contexts])}
        return [row for index in sorted(rows) for row in rows[index]]

    def _batches(self, contexts: list[Context]) -> Iterator[list[Context]]:
        if not contexts:
            return
        if self.options.batch_size != "auto":
            size = int(self.options.batch_size)
        elif self._loaded.model.device.type == "cpu":
            size = 1  # several contexts at a time bring nothing on a CPU
        else:
            size = max(1, TOKENS_PER_BATCH // max(len(c.input_ids) for c in contexts))
        for start in range(0, len(contexts), size):
            yield contexts[start : start + size]

    def _run(self, batch: list[Context]) -> list[dict]:
        try:
            readings, targets, generations = self._read(batch)
        except (InputError, MemoryError, RuntimeError) as error:
            if not isinstance(error, InputError) and not is_out_of_memory(error):
                raise
            torch.cuda.empty_cache()
            if self._branches is not None and not isinstance(error, InputError):
                self._branches = None  # without a cache it may fit
                return self._run(batch)
            if len(batch) == 1:
                raise _name_context(batch[0], error) from None
            # Half of the batch may fit; and of several contexts the one at fault is found and named.
            half = len(batch) // 2
            return self._run(batch[:half]) + self._run(batch[half:])
        saved = 0 if self._branches is None else self._branches.shared
        self.counts["tokens_computed"] += sum(len(context.input_ids) for context in batch) - saved
        self.counts["tokens_saved"] += saved
        self.counts["lens_rows"] += sum(reading.kl.numel() for reading in readings.values())
        self.counts["tokens_generated"] += sum(text.n_tokens for text in generations if text)
        return [
            row
            for index, (context, generation) in enumerate(zip(batch, generations, strict=True))
            for name, reading in readings.items()
            for row in self._rows(context, index, name, reading, targets, generation)
        ]

    def _read(
        self, batch: list[Context]
    ) -> tuple[dict[str, LayerReading], torch.Tensor, list[Generation] | list[None]]:
        """Per lens ``[n_layers + 1, batch, answer tokens]``, targets ``[batch, answer tokens]``, on the CPU; texts.

        Contexts are padded on the right, and answers by repeating their last token; padded rows are not used.
        """
        device = self._loaded.model.device
        n_tokens = max(len(c.input_ids) for c in batch)
        n_answers = max(len(c.answer_ids) for c in batch)
        ids = torch.tensor([_pad(c.input_ids, n_tokens, c.input_ids[-1]) for c in batch])
        mask = torch.tensor([_pad([1] * len(c.input_ids), n_tokens, 0) for c in batch])
        positions = torch.tensor([_pad(c.positions, n_answers, c.positions[-1]) for c in batch])
        answers = torch.tensor([_pad(c.answer_ids, n_answers, c.answer_ids[-1]) for c in batch], device=device)
        hidden, cache = self._hidden(ids, positions, mask)
        targets = answers if self.options.target == "answer" else self._logit_lens.stats(hidden[-1]).argmax
        read = self._logit_lens.read
        readings = {lens.name: read(hidden, targets, lens.translators).to("cpu") for lens in self._lenses}
        return readings, targets.cpu(), self._generate(batch, readings, cache)

    def _generate(
        self, batch: list[Context], readings: dict[str, LayerReading], cache: Cache | None
    ) -> list[Generation] | list[None]:
        """A text per context, whose first token is read already: at the output every lens is the model's own."""
        if self._generator is None:
            return [None] * len(batch)
        first_ids = next(iter(readings.values())).stats.argmax[-1, :, 0].tolist()
        return self._generator.generate([c.input_ids[: c.prompt_length] for c in batch], first_ids, cache)

    def _hidden(
        self, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, Cache | None]:
        """``[n_layers + 1, batch, answer tokens, d_model]``, and a cache for generation to go on from, if there is one.

        The first context that branches off also runs whole.

        The gate has seen a few tokens; a real context is longer, than a sliding window say. That one run is not
        counted.
        """
        if self._branches is None:
            cache = DynamicCache() if self._cached else None
            return self._logit_lens.hidden(ids, positions, mask, cache), cache
        branched = self._branches.hidden(ids, positions)
        if self._branches.shared == 0 or self._proven:
            return branched, self._branches.cache
        whole = self._logit_lens.hidden(ids, positions, mask)
        self.reuse, self._proven = compare(self._logit_lens, [(branched, whole)]), True
        if self.reuse.used:
            return branched, self._branches.cache
        self._branches, self._cached = None, False
        return whole, None

    def _rows(
        self,
        context: Context,
        index: int,
        lens: str,
        reading: LayerReading,
        targets: torch.Tensor,
        generation: Generation | None,
    ) -> Iterator[dict]:
        start, end = context.gold_span or (None, None)
        text = generation and generation.text
        generated = {
            "generated": text,
            "generated_correct": None if text is None else best_subspan_em(text, context.question.answers),
        }
        for token, answer_id in enumerate(context.answer_ids):
            layers = {
                name: getattr(reading.stats, name)[:, index, token].tolist()
                for name in ("argmax", "target_rank", "target_logprob", "max_logprob", "entropy")
            }
            target_id = int(targets[index, token])
            yield {
                "question_id": context.question.id,
                "documents": context.n_documents,
                "gold_position": context.gold_position,
                "answer_token": token,
                "lens": lens,
                "n_tokens": len(context.input_ids),
                "gold_start": start,
                "gold_end": end,
                "answer_id": answer_id,
                "answer_text": self._text(answer_id),
                "target_id": target_id,
                "target_text": self._text(target_id),
                "argmax_text": [self._text(token_id) for token_id in layers["argmax"]],
                **generated,
                **layers,
                "kl": reading.kl[:, index, token].tolist(),
            }


def _name_context(context: Context, error: Exception) -> FaultError:
    what = str(error)
    if not isinstance(error, InputError):
        what = (
            f"--device: expected memory for one context of {len(context.input_ids)} tokens, got out of memory; use "
            "fewer documents, a smaller model or --dtype bfloat16"
        )
    return FaultError(f"{context.where}: {what}")


def _pad(values, length: int, value: int) -> list[int]:
    return [*values, *[value] * (length - len(values))]
