"""Asks one question again: interventions at every block in each of its contexts, and patches between them.

One intervention is put at every block in turn, each run replayed from the stored state of its block; the lens reads
the clean run and the states downstream of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from ..config import PATCH, LayersConfig
from ..data.prompts import Context
from ..data.questions import Question
from ..lens.attribution import contributions
from ..lens.blocks import ActivationCache, BlockReplay, mid_state
from ..lens.files import Lens
from ..lens.logit_lens import LogitLens
from ..lens.runner import MemoryLimit, Proof, blamed_on, in_batches
from ..model.hooks import difference
from ..store.layers import ATTRIBUTION, CONTROL, DESTROY, HALVES, KEYS, LAYER_ROWS, RESTORE, rows_schema
from ..store.trajectory import NONE, trajectories
from ..sweeping.contexts import ContextBuilder
from .interventions import EVERY, LAST, Intervention, MeanContributions, patched


@dataclass(frozen=True)
class Reading:
    """Target of one context at every layer, ``[1 + runs, n_layers + 1]``: the clean run, then one per ablated block."""

    ranks: np.ndarray  # int64, 0-based
    logprobs: np.ndarray  # fp32, nats

    def __post_init__(self):
        if self.ranks.shape != self.logprobs.shape:
            raise ValueError(f"expected equal shapes, got {list(self.ranks.shape)} and {list(self.logprobs.shape)}")


def read_scan(logit_lens: LogitLens, lens: Lens, clean: Tensor, downstream: list[Tensor], target: int) -> Reading:
    """Read every layer of a scan in one call of the op, so that clean and ablated runs are read alike.

    Args:
        logit_lens: Of the model.
        lens: What the layers are read with.
        clean: ``[n_layers + 1, d_model]``.
        downstream: As `scan` gives them: of block ``i`` layers ``i + 1 .. n_layers``.
        target: Token id.
    """
    n_layers = len(clean) - 1
    by_layer = [torch.stack([clean[j], *(downstream[i][j - i - 1] for i in range(j))]) for j in range(n_layers + 1)]
    tables = []
    for found in _read(logit_lens, lens, by_layer, target):
        values = np.repeat(np.array([[of_layer[0] for of_layer in found]]), n_layers + 1, 0)  # the clean run's
        for layer in range(1, n_layers + 1):
            values[1 : layer + 1, layer] = found[layer][1:]
        tables.append(values)
    return Reading(*tables)


def read_output(logit_lens: LogitLens, lens: Lens, clean: Tensor, ends: Tensor, target: int) -> Reading:
    """The same at the output alone: ``[1 + runs, 1]``, of states ``[runs, d_model]`` of the last layer."""
    read = _read(logit_lens, lens, [clean[:0]] * (len(clean) - 1) + [torch.cat([clean[-1:], ends])], target)
    return Reading(*(found[-1][:, None] for found in read))


def _read(logit_lens: LogitLens, lens: Lens, by_layer: list[Tensor], target: int) -> tuple[list, list]:
    """Ranks and log-probabilities, a row of each layer's states."""
    if lens.translators is not None:
        lower = [lens.translators.one(layer, states) for layer, states in enumerate(by_layer[:-1])]
        by_layer = [*lower, by_layer[-1]]
    stats = logit_lens.stats(torch.cat(by_layer), target)
    sizes = np.cumsum([len(states) for states in by_layer])[:-1]
    return tuple(np.split(values.cpu().numpy(), sizes) for values in (stats.target_rank, stats.target_logprob))


def reading_rows(
    asked: dict, intervention: str, at: str, reading: Reading, top: int, source_position: int | None = None
) -> pa.Table:
    """Rows of `LAYER_ROWS`: one per ablated block, with the trajectory of its downstream states, or per patched layer.

    Args:
        asked: What all rows have alike: the context, the lens and the target.
        intervention: Its name.
        at: Tokens that were struck.
        reading: Of the clean run and of every other, at every layer or, of patches, at the output.
        top: Correct means rank 1 to this.
        source_position: Of patches, the gold position of the run that the state is from.
    """
    ranks, logprobs = reading.ranks[:, -1], reading.logprobs[:, -1]
    correct = ranks < top
    columns = {
        "layer": np.arange(1, len(ranks)),
        "target_logprob": logprobs[1:],
        "target_rank": ranks[1:],
        "correct": correct[1:],
        "logprob_change": logprobs[1:] - logprobs[0],
        "rank_change": ranks[1:] - ranks[0],
        "correct_change": correct[1:].astype(int) - int(correct[0]),
    }
    if source_position is None:
        found = trajectories(reading.ranks, top, axis=-1)
        for name in ("first_correct", "settle", "depth"):
            values = getattr(found, name)
            missing = values == NONE
            columns[name] = pa.array(values[1:], mask=missing[1:])
            columns[f"{name}_change"] = pa.array(values[1:] - values[0], mask=missing[1:] | missing[0])
    constants = asked | {"intervention": intervention, "at": at, "source_position": source_position}
    for field in LAYER_ROWS:
        if field.name not in columns:
            columns[field.name] = pa.array([constants.get(field.name)] * (len(ranks) - 1), field.type)
    return pa.table([columns[name] for name in LAYER_ROWS.names], LAYER_ROWS.names).cast(LAYER_ROWS)


def scan(
    run: ActivationCache, start: Callable[[int], Tensor], at_a_time: int, limit: MemoryLimit | None = None
) -> list[Tensor]:
    """Downstream states of a context when each block in turn is intervened on.

    A run that is ablated at block i needs blocks ``i + 1 .. n_layers - 1`` alone, so that the whole scan takes
    ``(n_layers - 1) / 2`` forward passes. All runs that are under way go through a block together. One that the
    intervention left as it was, bit for bit, is not run: it is the clean run.

    Args:
        run: The context.
        start: Gives the output ``[1, token, d_model]`` of block ``index`` (0-based) under the intervention.
        at_a_time: Runs that go through a block in one call, if there is memory for them.
        limit: Kept from scan to scan, to remember what there was no memory for.

    Returns:
        For each block ``i`` the states ``[n_layers - i, d_model]`` of layers ``i + 1 .. n_layers`` at the last token.
    """
    under_way: dict[int, Tensor] = {}  # ablated block: state
    kept: list[list[Tensor]] = [[] for _ in run.blocks]
    limit = limit or MemoryLimit()

    def through_block(ablated: list[int]) -> Iterable[tuple[int, Tensor]]:
        return zip(ablated, run.block(index, torch.cat([under_way[i] for i in ablated])).split(1), strict=True)

    for index in range(run.n_layers):
        sizes = (lambda left: limit.of(at_a_time), lambda batch: limit.lower(len(batch)))
        for found in in_batches(list(under_way), through_block, *sizes):
            under_way.update(found)
        clean, started = run.states[index + 1], start(index)
        if not torch.equal(started, clean):
            under_way[index] = started
        for i in range(index + 1):
            kept[i].append(under_way.get(i, clean)[0, -1].clone())  # a view would hold all tokens
    return [torch.stack(states) for states in kept]


@dataclass(frozen=True)
class Answered:
    """A context that was asked, where other contexts can take states from it."""

    context: Context
    states: Tensor  # [n_layers + 1, d_model], at the token that the answer follows
    correct: bool


@dataclass
class AblationRunner:
    """Turns questions of a run into rows; one context is held at a time."""

    options: LayersConfig
    builder: ContextBuilder  # of the run's contexts
    logit_lens: LogitLens
    lens: Lens  # what the layers are read with
    replay: BlockReplay
    targets: dict[tuple[int, int, int], int]  # token ids by question, documents and gold position
    top: int  # correct means rank 1 to this
    means: MeanContributions | None = None  # for the intervention of that name

    def __post_init__(self):
        self._cached, self._tokens = self.replay.cached, EVERY if self.options.at == "all" else LAST
        self._proof, self._limit = Proof(), MemoryLimit()  # of held keys; of runs that go through a block together

    def contexts(self, question: Question) -> list[Context]:
        """All contexts that the run asked a question in."""
        return self.builder.build(question).contexts

    @property
    def device(self) -> torch.device:
        """Of the model."""
        return self.logit_lens.device

    def begin_means(self, n_tokens: int) -> None:
        """Start the mean contributions of contexts of up to ``n_tokens``."""
        lens, n_tokens = self.logit_lens, n_tokens if self.options.at == "all" else 1
        self.means = MeanContributions.of_nothing(lens.n_layers, n_tokens, lens.d_model, self.device)

    def add_to_means(self, context: Context) -> None:
        """Take a context into the mean contributions."""
        self.means.add(self._record(context, self._ablation_cached), self._tokens)

    def rows(self, question: Question) -> pa.Table:
        """Rows of one question.

        Raises:
            FaultError: Names the question, whatever went wrong.
        """
        tables, answered = [], []
        with blamed_on(f"question {question.id}"):
            for context in self.contexts(question):
                found, one = self._ablate(context, control=not answered)
                tables += found
                answered.append(one)
            if PATCH in self.options.interventions:
                tables += self._patch(answered)
            schema = rows_schema(self.options.interventions)
            return pa.concat_tables([schema.empty_table(), *tables], promote_options="default")

    @property
    def _ablation_cached(self) -> bool:
        """Whether the last token alone is run: nothing else changes where nothing else is ablated."""
        return self.options.at == "answer" and self._cached

    def _record(self, context: Context, cached: bool) -> ActivationCache:
        ids = torch.tensor([context.input_ids[: context.prompt_length]])
        run = ActivationCache.record(self.logit_lens, ids, cached)
        if not cached or not self._proof.is_due(context.prompt_length):
            return run
        whole = ActivationCache.record(self.logit_lens, ids)
        found = difference(run.answer_states(), whole.answer_states())
        self._cached = found <= self.logit_lens.parity.tolerance
        return run if self._cached else whole

    def _ablate(self, context: Context, control: bool) -> tuple[list[pa.Table], Answered]:
        run = self._record(context, self._ablation_cached)
        names = [*self.options.ablations, *([CONTROL] if control and self.options.ablations else [])]
        tables, clean, asked = [], run.answer_states(), self._asked(context)
        attributed = self._attributions(run, clean, asked["target_id"]) if set(HALVES) & set(names) else {}
        for name in names:
            way = Intervention(name, self._tokens, self.replay.sublayers, self.means)
            downstream = self._scan(run, context, way.of_context(run))
            reading = read_scan(self.logit_lens, self.lens, clean, downstream, asked["target_id"])
            table = reading_rows(asked, name, self.options.at, reading, self.top)
            tables.append(table.append_column(ATTRIBUTION, [attributed[name]]) if name in HALVES else table)
        if not names:
            reading = read_output(self.logit_lens, self.lens, clean, clean[:0], asked["target_id"])
        return tables, Answered(context, clean, bool(reading.ranks[0, -1] < self.top))

    def _attributions(self, run: ActivationCache, clean: Tensor, target: int) -> dict[str, pa.Array]:
        """What the parts of every block add to the target's logit in the clean run, nats, ``[n_layers]`` each."""
        own = self.replay.sublayers
        mid = torch.stack([mid_state(run, index, own[index])[0, -1] for index in range(run.n_layers)])
        targets = torch.tensor([target], device=clean.device)
        found = contributions(self.logit_lens, clean[:, None], mid[:, None], targets)
        return {half: pa.array(getattr(found, half)[:, 0].cpu().numpy()) for half in HALVES}

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
                downstream = self._scan(run, one.context, patched(run, source.states))
                ends = torch.stack([states[-1] for states in downstream])
                reading = read_output(self.logit_lens, self.lens, run.answer_states(), ends, asked["target_id"])
                name, position = RESTORE if source.correct else DESTROY, source.context.gold_position
                tables.append(reading_rows(asked, name, "answer", reading, self.top, position))
        return tables

    def _asked(self, context: Context) -> dict:
        key = (context.question.id, context.n_documents, context.gold_position)
        return dict(zip(KEYS, key, strict=True)) | {"lens": self.lens.name, "target_id": self.targets[key]}

    def _scan(self, run: ActivationCache, context: Context, start: Callable[[int], Tensor]) -> list[Tensor]:
        on_cpu, cached = run.states[0].device.type == "cpu", run.states[0].shape[1] == 1
        return scan(run, start, self.replay.at_a_time(context.prompt_length, cached, on_cpu), self._limit)
