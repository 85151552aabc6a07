"""How states are read by the op, and short readings that come again, on a GPU replayed as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..kernels.lists_reference import MOST_LISTED
from ..kernels.reference import LensHead
from ..op.divergences import kl_to_final
from ..op.vocabulary import fused_lens_with
from .reading import LayerReading

MOST_ROWS = 1024  # of all layers; of more the device is busy for longer than their launches take
ORDINARY = 2  # calls of a kind before it is recorded
MOST_RECORDED = 8  # kinds, each of which keeps its buffers
MOST_COUNTED = 256
ALIGNED = 16  # bytes, of which kernels are compiled for multiples


@dataclass(frozen=True)
class Readout:
    """What is read of states, and by what."""

    head: LensHead
    kl: bool
    top_k: int
    normed: bool  # the last layer's states are behind the final norm
    backend: str

    def __call__(
        self, block: Tensor, targets: Tensor | None, alternatives: Tensor | None, check_values: bool
    ) -> LayerReading:
        """Of states ``[n_layers + 1, N, d_model]``, with targets ``[N]`` and further ones ``[N, T]``, or None."""
        heads = [(block, self.head)]
        if self.normed:  # the last layer has no norm before it any more
            heads = [(block[:-1], self.head), (block[-1:], replace(self.head, norm=None))]
        parts = []
        for states, head in heads:
            given = (states, head, targets, alternatives, self.top_k, self.backend, check_values)
            stats, several, top = fused_lens_with(*given)
            parts.append(LayerReading(stats, top=top, alternatives=several))
        reading = LayerReading.cat(parts, 0)
        if not self.kl:
            return reading
        kl = kl_to_final(block, reading.stats, self.head, last_is_normed=self.normed, backend=self.backend)
        return replace(reading, kl=kl)


class Replays:
    """Makes readouts; short ones of a kind that comes again as one launch instead of some ten and their checks.

    Of a kind are those of the same shapes, layouts, weights and numbers to be read, on the same stream. The third is
    recorded, of the first `MOST_RECORDED` kinds. A recording must give the bits that the ordinary launches give then,
    for two sets of random states; if it does not, calls of its kind stay ordinary for good, and if one cannot be made,
    all calls do. Weights may change where they lie. Several threads may share one of these; one of them replays at a
    time. What recordings hold, tens of megabytes beside their results, is shared by those of a stream.

    Args:
        record: What makes a recording of a call, such as `kernels.graphs.Recording`, which is the default.
        device_type: On which readouts are recorded; another one in tests.
    """

    def __init__(self, record: Callable | None = None, device_type: str = "cuda"):
        self.enabled = True  # set it to False to have every launch made
        self._record, self._device_type = record, device_type
        self._lock = Lock()
        self._calls = Counter[tuple]()
        self._heads: list[LensHead] = []  # what was recorded of stays where it is, or its address would tell nothing
        self._recorded: dict[tuple, Any] = {}  # None: stays ordinary
        self._pools: dict[Any, Any] = {}  # of each stream

    def __reduce__(self) -> tuple:
        """Graphs are of one process and one place in its memory; a copy records its own."""
        return Replays, (self._record, self._device_type), {"enabled": self.enabled}

    def __call__(
        self, readout: Readout, block: Tensor, targets: Tensor | None, alternatives: Tensor | None, check_values: bool
    ) -> LayerReading:
        """As ``readout`` of these, whose results are the caller's own."""
        may_wait = check_values or alternatives is not None  # for what is wrong with values or ids
        if may_wait or not self._is_short(readout, block) or not self._lock.acquire(blocking=False):
            return readout(block, targets, alternatives, check_values)
        try:
            kind = self._kind(readout, block, targets)
            if kind not in self._recorded and self._is_due(kind):
                self._recorded[kind] = self._proven(readout, block, targets)
                self._heads.append(readout.head)
            recording = self._recorded.get(kind)
            if recording is not None:
                with torch.inference_mode(False), torch.no_grad():
                    return recording.replay(block, targets)
        finally:
            self._lock.release()
        return readout(block, targets, None, check_values)

    def _is_short(self, readout: Readout, block: Tensor) -> bool:
        if not self.enabled or block.device.type != self._device_type or readout.top_k > MOST_LISTED:
            return False
        if readout.head.projection is not None:  # a product of torch's, whose precision is a setting
            return False
        if not 0 < block[..., 0].numel() <= MOST_ROWS or torch.compiler.is_compiling():
            return False
        return not (block.is_cuda and torch.cuda.is_current_stream_capturing())

    def _kind(self, readout: Readout, block: Tensor, targets: Tensor | None) -> tuple:
        head, norm = readout.head, readout.head.norm
        weights = (head.weight, head.bias, norm and norm.weight, norm and norm.bias)
        numbers = (head.softcap, head.scale, norm and (type(norm), norm.eps, norm.offset))
        is_aligned = block.data_ptr() % ALIGNED == 0
        return (
            *(block.device, block.dtype, block.shape, block.stride(), is_aligned, targets is None),
            *(None if one is None else (one.data_ptr(), one.dtype, one.shape, one.stride()) for one in weights),
            *(numbers, _stream_of(block)),
            *(readout.kl, readout.top_k, readout.normed, readout.backend),
        )

    def _is_due(self, kind: tuple) -> bool:
        if sum(recording is not None for recording in self._recorded.values()) >= MOST_RECORDED:
            return False
        if len(self._calls) >= MOST_COUNTED:
            self._calls.clear()
        self._calls[kind] += 1
        return self._calls[kind] > ORDINARY

    def _proven(self, readout: Readout, block: Tensor, targets: Tensor | None) -> Any:
        """A recording that gives the bits of the ordinary launches, None if there is none."""
        generator = torch.Generator().manual_seed(0)

        def run(states: Tensor, own: Tensor | None) -> LayerReading:
            return readout(states, own, None, False)

        def drawn() -> tuple[Tensor, Tensor | None]:
            states = torch.randn(block.shape, generator=generator).to(block)
            if targets is None:
                return states, None
            return states, torch.randint(readout.head.vocab_size, targets.shape, generator=generator).to(targets)

        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(block):
                recording = self._make(_stream_of(block), run, block, targets)
                given = drawn(), drawn()
                expected = [run(*one) for one in given]
                if expected[0] == expected[1]:  # nothing could be told from them
                    return None
                is_proven = all(recording.replay(*one) == own for one, own in zip(given, expected, strict=True))
                return recording if is_proven else None
        except Exception:  # whatever a driver or an allocator has against it: the ordinary launches remain
            self.enabled = False
            return None

    def _make(self, stream: Any, *call: Any) -> Any:
        if self._record is not None:
            return self._record(*call)
        from ..kernels.graphs import Recording

        if stream not in self._pools:
            self._pools[stream] = torch.cuda.graph_pool_handle()
        return Recording(*call, pool=self._pools[stream])


def _stream_of(block: Tensor) -> Any:
    return torch.cuda.current_stream(block.device) if block.is_cuda else None
