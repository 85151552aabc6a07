"""How states are read by the op, and short readings that come again, on a GPU replayed as CUDA graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from ..kernels.reference import LensHead
from ..op.divergences import kl_to_final
from ..op.vocabulary import fused_lens_with
from .reading import LayerReading

MOST_ROWS = 1024  # of all layers; of more the device is busy for longer than their launches take
MOST_LISTED = 32  # tokens of a list that a kernel keeps
ORDINARY = 2  # calls of a kind before it is recorded
MOST_RECORDED = 8  # kinds, each of which keeps its buffers
MOST_COUNTED = 256


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

    Of a kind are those of the same shapes, weights and numbers to be read, on the same stream. The third is recorded.
    A recording must give the bits of the ordinary launches, for the states of that call and for others; if it does not,
    or cannot be made, calls of its kind stay ordinary for good. Weights may change where they lie. Several threads may
    share one of these; only one of them replays at a time.

    Args:
        record: What makes a recording of a call, such as `kernels.graphs.Recording`, which is the default.
        device_type: On which readouts are recorded; another one in tests.
    """

    def __init__(self, record: Callable | None = None, device_type: str = "cuda"):
        self.enabled = True  # set it to False to have every launch made
        self._record, self._device_type = record, device_type
        self._lock = Lock()
        self._calls = Counter[tuple]()
        self._recorded: dict[tuple, Any] = {}  # None: stays ordinary

    def __reduce__(self) -> tuple:
        """Graphs are of one process and one place in its memory; a copy records its own."""
        return Replays, (self._record, self._device_type)

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
        if not 0 < block[..., 0].numel() <= MOST_ROWS or torch.compiler.is_compiling():
            return False
        return not (block.is_cuda and torch.cuda.is_current_stream_capturing())

    def _kind(self, readout: Readout, block: Tensor, targets: Tensor | None) -> tuple:
        head, norm = readout.head, readout.head.norm
        weights = (head.weight, head.bias, head.projection, norm and norm.weight, norm and norm.bias)
        numbers = (head.softcap, head.scale, norm and (type(norm), norm.eps, norm.offset))
        stream = torch.cuda.current_stream(block.device) if block.is_cuda else None
        return (
            *(block.device, block.dtype, block.shape, targets is None, stream, numbers),
            *(None if weight is None else (weight.data_ptr(), weight.dtype) for weight in weights),
            *(readout.kl, readout.top_k, readout.normed, readout.backend),
        )

    def _is_due(self, kind: tuple) -> bool:
        if len(self._recorded) >= MOST_RECORDED:
            return False
        if len(self._calls) >= MOST_COUNTED:
            self._calls.clear()
        self._calls[kind] += 1
        return self._calls[kind] > ORDINARY

    def _proven(self, readout: Readout, block: Tensor, targets: Tensor | None) -> Any:
        """A recording that gives the bits of the ordinary launches, None if there is none."""

        def run(states: Tensor, own: Tensor | None) -> LayerReading:
            return readout(states, own, None, False)

        others = block.flip(-1), None if targets is None else readout.head.vocab_size - 1 - targets
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.device_of(block):
                recording = self._make(run, block, targets)
                is_proven = all(recording.replay(*given) == run(*given) for given in ((block, targets), others))
                return recording if is_proven else None
        except Exception:  # whatever a driver or an allocator has against it: the ordinary launches remain
            return None

    def _make(self, *call: Any) -> Any:
        if self._record is not None:
            return self._record(*call)
        from ..kernels.graphs import Recording

        return Recording(*call)
