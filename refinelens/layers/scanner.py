"""Asks one question again: interventions at every block in each of its contexts, and patches between them."""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import torch
from torch import Tensor

from ..errors import FaultError, InputError
from ..lenses.lens_files import Lens
from ..lenses.logit_lens import LogitLens
from ..model.capture import difference
from ..model.loading import is_out_of_memory
from ..prompts.context import Context
from ..runs.layers_schema import CONTROL, DESTROY, LAYER_ROWS, RESTORE
from ..sweep.contexts import ContextBuilder
from ..tasks.question import Question
from .clean_run import CleanRun
from .interventions import EVERY, LAST, Intervention, carried
from .means import MeanContributions
from .options import PATCH, LayerOptions
from .reading import read_output, read_scan
from .restarts import Restarts
from .rows import Asked, ablation_rows, patch_rows
from .scan import scan


@dataclass(frozen=True)
class Answered:
    """A context that was asked, where other contexts can take states from it."""

    context: Context
    states: Tensor  # [n_layers + 1, d_model], at the token that the answer follows
    correct: bool


class Scanner:
    """Turns questions of a run into rows; one context is held at a time."""

    def __init__(
        self,
        options: LayerOptions,
        builder: ContextBuilder,
        logit_lens: LogitLens,
        lens: Lens,
        restarts: Restarts,
        targets: dict[tuple[int, int, int], int],
        top: int,
    ):
        self.means: MeanContributions | None = None
        self._options, self._builder, self._logit_lens, self._lens = options, builder, logit_lens, lens
        self._restarts, self._targets, self._top = restarts, targets, top
        self._cached = restarts.cached
        self._proven = 0  # tokens of the longest context that was run from held keys and compared with itself run whole
        self._at_most: int | None = None  # runs at a time, once memory ran out

    def contexts(self, question: Question) -> list[Context]:
        """All contexts that the run asked a question in."""
        return self._builder.build(question).contexts

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self._logit_lens.model.device

    def begin_means(self, n_tokens: int) -> None:
        """Start the mean contributions of contexts of up to ``n_tokens``."""
        lens, n_tokens = self._logit_lens, n_tokens if self._options.at == "all" else 1
        self.means = MeanContributions.of_nothing(lens.n_layers, n_tokens, lens.d_model, self.device)

    def add_to_means(self, context: Context) -> None:
        """Take a context into the mean contributions."""
        self.means.add(self._record(context, self._ablation_cached), self._tokens)

    def rows(self, question: Question) -> pa.Table:
        """Rows of one question.

        Raises:
            FaultError: Names the question, whatever went wrong.
        """
        try:
            tables, answered = [], []
            for context in self.contexts(question):
                found, one = self._ablate(context, control=not answered)
                tables += found
                answered.append(one)
            if PATCH in self._options.interventions:
                tables += self._patch(answered)
            return pa.concat_tables([LAYER_ROWS.empty_table(), *tables])
        except (InputError, FaultError):
            raise
        except Exception as error:
            raise FaultError(f"question {question.id}: {type(error).__name__}: {error}") from error

    @property
    def _tokens(self) -> slice:
        return EVERY if self._options.at == "all" else LAST

    @property
    def _ablation_cached(self) -> bool:
        """Whether the last token alone is run: nothing else changes where nothing else is struck."""
        return self._options.at == "answer" and self._cached

    def _record(self, context: Context, cached: bool) -> CleanRun:
        ids = torch.tensor([context.input_ids[: context.prompt_length]])
        run = CleanRun.record(self._logit_lens, ids, cached)
        if not cached or context.prompt_length <= 2 * self._proven:
            return run
        whole = CleanRun.record(self._logit_lens, ids)
        pair = (states.answer_states()[:, None, None] for states in (run, whole))
        # The gate has seen a few tokens; a real context is longer, than a sliding window say.
        self._proven, self._cached = context.prompt_length, difference(*pair) <= self._logit_lens.parity.tolerance
        return run if self._cached else whole

    def _ablate(self, context: Context, control: bool) -> tuple[list[pa.Table], Answered]:
        run = self._record(context, self._ablation_cached)
        names = [*self._options.ablations, *([CONTROL] if control and self._options.ablations else [])]
        tables, clean, asked = [], run.answer_states(), self._asked(context)
        for name in names:
            way = Intervention(name, self._tokens, self._restarts.sublayers, self.means)
            remains = self._scan(run, context, way.of_context(run))
            reading = read_scan(self._logit_lens, self._lens, clean, remains, asked.target)
            tables.append(ablation_rows(asked, name, self._options.at, reading, self._top))
        if not names:
            reading = read_output(self._logit_lens, self._lens, clean, clean[:0], asked.target)
        return tables, Answered(context, clean, bool(reading.ranks[0, -1] < self._top))

    def _patch(self, answered: list[Answered]) -> list[pa.Table]:
        """Every pair of gold positions of one size with success at one and failure at the other, both ways."""
        tables = []
        for one in answered:
            others = [a for a in answered if a.context.n_documents == one.context.n_documents]
            sources = [a for a in others if a.correct != one.correct]
            if not sources:
                continue
            run, asked = self._record(one.context, self._cached), self._asked(one.context)
            for source in sources:
                remains = self._scan(run, one.context, carried(run, source.states))
                ends = torch.stack([states[-1] for states in remains])
                reading = read_output(self._logit_lens, self._lens, run.answer_states(), ends, asked.target)
                name = RESTORE if source.correct else DESTROY
                tables.append(patch_rows(asked, name, source.context.gold_position, reading, self._top))
        return tables

    def _asked(self, context: Context) -> Asked:
        key = (context.question.id, context.n_documents, context.gold_position)
        return Asked(*key, self._targets[key], self._lens.name)

    def _scan(self, run: CleanRun, context: Context, start) -> list[Tensor]:
        """`scan`, fewer runs at a time from when memory ran out."""
        on_cpu, cached = run.states[0].device.type == "cpu", run.states[0].shape[1] == 1
        while True:
            size = self._restarts.at_a_time(context.prompt_length, cached, on_cpu)
            size = size if self._at_most is None else min(size, self._at_most)
            try:
                return scan(run, start, size)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error) or size == 1:
                    raise
                torch.cuda.empty_cache()
                self._at_most = size // 2
