"""How many contexts run together."""

from __future__ import annotations

from collections.abc import Iterator

from ..options import SweepOptions
from ..prompts.context import Context

TOKENS_PER_BATCH = 16384  # of one forward pass on a GPU, padding included


class Batching:
    """Splits contexts into batches, and into smaller ones from the moment memory ran out."""

    def __init__(self, options: SweepOptions, device_type: str):
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
