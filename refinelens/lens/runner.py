"""Contexts through a model: how many in one pass, fewer where memory runs out, and what they share run once.

Sweep, generation, layers, fit and export ask here, so that there is one way to fill a batch, to make it smaller and to
find the context that an error comes from.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

import torch
from torch import Tensor
from transformers import Cache, DynamicCache

from ..errors import FaultError, InputError
from ..model.loading import is_out_of_memory
from ..model.positions import padded
from ..model.resid_mid import Sublayers
from .chunks import ChunkedPrefill, holds_less, proven
from .logit_lens import LogitLens
from .prefix import Branches, PrefixReuse, branch_order, compare, in_chunks, roomy_cache

TOKENS_PER_BATCH = 16384  # of one forward pass on a GPU, padding included
NO_REUSE = PrefixReuse(False, "not asked for")

Item = TypeVar("Item")
Result = TypeVar("Result")


@dataclass(frozen=True)
class ModelInput:
    """A context to be run, and the positions that are read."""

    ids: Sequence[int]
    positions: Sequence[int]  # in ascending order
    name: str = ""  # for errors; "" leaves an exception as it is

    def part(self, here: slice) -> Self:
        """The same context, of which some of the positions are read."""
        return replace(self, positions=self.positions[here])


NAMELESS = ModelInput((), ())


class MemoryLimit:
    """How many things go through a model together: half as many from the moment memory ran out."""

    def __init__(self):
        self.at_most: int | None = None

    def of(self, size: int) -> int:
        """As many as asked for, or as there is memory for."""
        return size if self.at_most is None else min(size, self.at_most)

    def lower(self, size: int) -> bool:
        """There was no memory for ``size`` of them: half as many from now on; False where that was a single one."""
        if size > 1:
            self.at_most = size // 2
        return size > 1


class Proof:
    """Which contexts are run in both ways and compared: the first, then each more than twice as long as all those.

    A gate sees a few tokens; a real context is longer, than a sliding window say.
    """

    def __init__(self):
        self._n_tokens = 0  # of the longest that was compared

    def is_due(self, n_tokens: int) -> bool:
        """Whether a context of this length is to be compared; if so, shorter ones need not be from now on."""
        due = n_tokens > 2 * self._n_tokens
        self._n_tokens = n_tokens if due else self._n_tokens
        return due


@contextmanager
def blamed_on(what: str) -> Iterator[None]:
    """Within the block an exception that says nothing of its place becomes a FaultError that names it."""
    try:
        yield
    except (InputError, FaultError):
        raise
    except Exception as error:
        raise FaultError(f"{what}: {type(error).__name__}: {error}") from error


@contextmanager
def blamed_on_context(context: ModelInput) -> Iterator[None]:
    """Within the block any exception becomes a FaultError that names the context, if it has a name."""
    try:
        yield
    except FaultError:
        raise
    except Exception as error:
        if not context.name:
            raise
        what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        if is_out_of_memory(error):
            what = (
                f"``device``: expected memory for one context of {len(context.ids)} tokens, got out of memory; use "
                "fewer documents, a smaller model or ``dtype='bfloat16'``"
            )
        raise FaultError(f"{context.name}: {what}") from error


def in_batches(
    items: Sequence[Item],
    work: Callable[[list[Item]], Result],
    size: Callable[[list[Item]], int] = len,
    out_of_memory: Callable[[list[Item]], bool] = lambda batch: False,
    context: Callable[[Item], ModelInput] = lambda item: NAMELESS,
) -> Iterator[Result]:
    """What ``work`` makes of the items, a batch at a time; one that fails is tried again in halves.

    So there is memory for it, or the item at fault is alone and can be named.

    Args:
        items: In the order in which they are taken.
        work: Called with a batch.
        size: How large the next batch is, given the items that are left.
        out_of_memory: Told of a batch that there was no memory for; true where the next try is another one already.
        context: That an item is of.

    Raises:
        FaultError: Names the context at fault; without a name any exception stays as it is.
    """
    items, most = list(items), len(items)
    while items:
        batch, result = items[: min(size(items), most)], None
        try:
            result = work(batch)
        except Exception as error:
            if not (is_out_of_memory(error) and out_of_memory(batch)):
                if len(batch) == 1:
                    with blamed_on_context(context(batch[0])):
                        raise
                most = len(batch) // 2
            error.__traceback__ = None  # its frames hold the tensors that there was no room for
        if result is None:
            torch.cuda.empty_cache()
            continue
        items = items[len(batch) :]
        yield result
        result = None  # is not held while the next batch runs


@dataclass(frozen=True)
class ModelStates:
    """The residual stream of a context that was run, or of some of its positions, where it ran in chunks."""

    input: Any  # the `ModelInput` that was given, or its `part`
    index: int  # of the input among those that were given
    hidden: Tensor  # [n_layers + 1, n_positions, d_model]
    mid: Tensor | None  # [n_layers, n_positions, d_model], resid_mid of every block, where it was asked for
    n_saved: int  # tokens that another context had run
    written: Any  # what ``then`` made of the context; of several parts the last one has it


class ForwardRunner:
    """Runs contexts through one model.

    Whatever runs beside a context, its states are those that it has by itself, to the rounding of larger products.
    """

    def __init__(
        self,
        lens: LogitLens,
        batch_size: int | None = None,
        reuse: PrefixReuse = NO_REUSE,
        keeps_cache: bool = False,
        sublayers: Sequence[Sublayers] | None = None,
        chunk_tokens: int = 0,
    ):
        """
        Args:
            lens: Of the model.
            batch_size: Contexts in one pass; by default one on a CPU, on a GPU as many as `TOKENS_PER_BATCH` allows.
            reuse: Whether contexts branch off from what they share, see `choose_reuse`; then they run one by one.
            keeps_cache: Whether a pass keeps keys and values for ``then`` to go on from.
            sublayers: Of every block, where passes keep ``resid_mid`` too; None where they do not.
            chunk_tokens: Of a chunk, where contexts that hold less memory so run by themselves in chunks, if that is
                proven, see `chunks`; 0 where all run in one pass.
        """
        if batch_size is None and lens.device.type == "cpu":
            batch_size = 1  # several gain nothing there
        self.lens, self.reuse, self.limit = lens, reuse, MemoryLimit()
        self._batch_size, self._keeps_cache, self._sublayers = batch_size, keeps_cache, sublayers
        self._branches: Branches | None = None  # of the contexts that are run, while they branch off
        self._proof = Proof()
        self.chunks: ChunkedPrefill | None = None  # not known before a context is long enough
        self._chunk_tokens = chunk_tokens

    def states(self, ids: Sequence[int], positions: Sequence[int], name: str = "") -> Tensor:
        """``[n_layers + 1, n_positions, d_model]`` of a single context, see `ModelInput`."""
        (found,) = self.run([ModelInput(ids, positions, name)])
        return found.hidden

    def run(
        self,
        inputs: Sequence[ModelInput],
        then: Callable[[list[ModelInput], Cache | None], list] = lambda batch, cache: [None] * len(batch),
        warn: Callable[[str], None] = lambda line: None,
    ) -> Iterator[ModelStates]:
        """Run contexts: those of similar length together, or one after the other, along their shared prefixes.

        Nothing is shared between calls, so that what comes of these contexts is a function of them.

        Args:
            inputs: Contexts.
            then: Called after every pass with its contexts and their keys and values, if it kept any.
            warn: Called with a line about what there was no memory for.

        Raises:
            FaultError: Names the context at fault.
        """
        ids, branching = [one.ids for one in inputs], self.reuse.used
        self._branches = Branches(self.lens, self._sublayers) if branching else None
        order = branch_order(ids) if branching else list(range(len(ids)))
        if self._batch_size != 1 and not branching:
            order.sort(key=lambda index: -len(ids[index]))
        if self._chunk_tokens and not branching:
            long = [index for index in order if self._goes_in_chunks(inputs[index])]
            order = [index for index in order if index not in long]
            for index in long:
                yield from self._run_in_chunks(inputs[index], index, then)

        def work(batch: list[int]) -> list[ModelStates]:
            own = [inputs[index] for index in batch]
            hidden, cache, n_saved = self._pass(own)
            states = [self._states(hidden[:, row, : len(one.positions)]) for row, one in enumerate(own)]
            found = zip(own, batch, states, then(own, cache), strict=True)
            return [ModelStates(one, index, *both, n_saved, more) for one, index, both, more in found]

        def size(left: list[int]) -> int:
            by_tokens = max(1, TOKENS_PER_BATCH // len(ids[left[0]]))
            return 1 if branching else self.limit.of(self._batch_size or by_tokens)

        def out_of_memory(batch: list[int]) -> bool:
            if self._branches is not None:
                self._branches = None  # without a cache it may fit
                return True
            if not self.limit.lower(len(batch)):
                return False
            warn(
                f"out of memory with {len(batch)} contexts of {len(ids[batch[0]])} tokens; from here on at most "
                f"{self.limit.at_most} at a time"
            )
            return True

        for found in in_batches(order, work, size, out_of_memory, lambda index: inputs[index]):
            while found:
                yield found.pop()

    def _goes_in_chunks(self, one: ModelInput) -> bool:
        """Whether a context does: one that holds less so, of a model that is proven before the first of them."""
        if not holds_less(self.lens, len(one.ids), len(one.positions)):
            return False
        if self.chunks is None:
            with blamed_on_context(one):
                self.chunks = proven(self.lens, self._chunk_tokens)
        return self.chunks.used

    def _run_in_chunks(self, one: ModelInput, index: int, then: Callable) -> Iterator[ModelStates]:
        """States of one context: together if they are of one chunk's positions or fewer, else part by part."""
        cache, parts = roomy_cache(len(one.ids)), list[tuple[slice, Tensor]]()
        together, size = len(one.positions) <= self._chunk_tokens, self._chunk_tokens
        with blamed_on_context(one):
            ids, positions = torch.tensor([one.ids]), torch.tensor([one.positions])
            for here, states in in_chunks(self.lens, ids, positions, cache, size, self._sublayers):
                if not states.numel():
                    continue
                parts.append((here, states[:, 0]))
                del states
                if not together and len(parts) > 1:  # the last one waits for what ``then`` makes
                    yield self._part(one, index, parts.pop(0))
            (written,) = then([one], cache if self._keeps_cache else None)
        if together:
            whole = torch.cat([states for _, states in parts], 1)
            parts = [(slice(len(one.positions)), whole)]
        yield self._part(one, index, parts[0], written)

    def _part(self, one: ModelInput, index: int, part: tuple[slice, Tensor], written: Any = None) -> ModelStates:
        here, states = part
        return ModelStates(one.part(here), index, *self._states(states), 0, written)

    def _states(self, kept: Tensor) -> tuple[Tensor, Tensor | None]:
        """The layers of a context, and behind them the streams within the blocks, if they were kept."""
        if self._sublayers is None:
            return kept, None
        return kept[: self.lens.n_layers + 1], kept[self.lens.n_layers + 1 :]

    def _pass(self, batch: list[ModelInput]) -> tuple[Tensor, Cache | None, int]:
        """States as of `LogitLens.hidden`, a cache if one is kept, and tokens that had run before.

        Contexts are padded on the right, their positions by repeating the last. A run whole that a branched one is
        compared with is not counted.
        """
        ids, mask = padded([one.ids for one in batch])
        positions, _ = padded([one.positions for one in batch])
        if self._branches is None:
            cache = DynamicCache() if self._keeps_cache else None
            return self.lens.hidden(ids, positions, mask, cache, self._sublayers), cache, 0
        branched, n_saved = self._branches.hidden(ids, positions), self._branches.shared
        if n_saved and self._proof.is_due(ids.shape[1]):
            whole = self.lens.hidden(ids, positions, None, None, self._sublayers)
            self.reuse = compare(self.lens, [(branched, whole)])
            if not self.reuse.used:
                self._branches, self._keeps_cache = None, False
                return whole, None, 0
        return branched, self._branches.cache, n_saved
