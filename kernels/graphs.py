"""The lens of repeated shapes as CUDA graphs: one launch a call instead of five and their checks."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from .fused_lens import fused_lens_triton
from .reference import LensHead, LensStats

_capturing = Lock()
WARM_UPS = 3  # compile, settle what is tried once per device, fill the allocator's pools


class GraphedLens:
    """A lens whose launches are recorded once per shape and replayed after that.

    Worth it where a call is short, tens of rows, and its shape comes again. Every recorded shape keeps its buffers;
    beyond ``max_shapes`` shapes calls run without a graph. The weights must stay where they are in memory. Not for
    several threads at once.

    Args:
        head: As for `fused_lens_triton`, the same for all calls.
        max_shapes: Shapes to record.
        record: What makes a recording of a call; another one in tests.

    Example::

        lens = GraphedLens(LensHead(unembedding, norm))
        out = lens(hidden, targets)
    """

    def __init__(self, head: LensHead, *, max_shapes: int = 8, record: Callable[..., Recording] | None = None):
        self._head = head
        self._max_shapes = max_shapes
        self._record = record or Recording
        self._recorded: dict[tuple, Recording] = {}

    def __call__(self, hidden: Tensor, targets: Tensor | None = None) -> LensStats:
        """Lens statistics of ``hidden`` ``[R, d_model]``, as `fused_lens_triton` returns them; unchecked.

        Those of one call share memory.
        """
        hidden = hidden.detach()
        key = (hidden.shape, hidden.dtype, targets is not None)
        with torch.cuda.device_of(hidden):
            if key not in self._recorded:
                if hidden.shape[0] == 0 or len(self._recorded) == self._max_shapes:
                    return self._run(hidden, targets)
                self._recorded[key] = self._record(self._run, hidden, targets)
            return self._recorded[key].replay(hidden, targets)

    def _run(self, hidden: Tensor, targets: Tensor | None) -> LensStats:
        return fused_lens_triton(hidden, self._head, targets)


class Recording:
    """One captured call with the buffers that its launches read and write.

    Args:
        run: Of tensors on one GPU, or None; what it returns has a ``map`` over its tensors, as `LensStats` has. It must
            not wait for the device.
        inputs: Of the call, in their place.
        pool: Memory that recordings share which are replayed on one stream and whose results are copies, see
            `torch.cuda.graph_pool_handle`; by default one of its own.

    Raises:
        RuntimeError: CUDA cannot record the call, or no memory for it.
    """

    def __init__(self, run: Callable, *inputs: Tensor | None, pool: Any = None):
        self._inputs = [None if one is None else one.clone(memory_format=torch.contiguous_format) for one in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(*self._inputs)
        own = torch.cuda.current_stream()
        own.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        # A process captures one call at a time; what other threads allocate meanwhile is none of this capture's.
        with _capturing:
            try:
                with torch.cuda.graph(self._graph, pool, stream, capture_error_mode="thread_local"):
                    self._out = run(*self._inputs)
                    self._packed, self._fields = packed(self._out)
            finally:
                torch.cuda.set_stream(own)  # which torch does not where a capture fails

    def replay(self, *inputs: Tensor | None) -> Any:
        """Run the captured launches on new values; the result is the caller's own copy."""
        for own, given in zip(self._inputs, inputs, strict=True):
            if own is not None:
                own.copy_(given)
        self._graph.replay()
        return unpacked(self._out, self._packed.clone(), self._fields)


def packed(out: Any) -> tuple[Tensor, list[tuple]]:
    """The bytes of all tensors in one, so that a copy of them is one launch, and where in it each of them lies."""
    values: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        values.append(value)
        return value

    out.map(keep)
    places: list[tuple] = [()] * len(values)
    parts, start = [], 0
    for index in sorted(range(len(values)), key=lambda index: -values[index].element_size()):  # so that all are aligned
        value = values[index]
        parts.append(value.flatten().view(torch.uint8))
        places[index] = (start, start + value.nbytes, value.dtype, value.shape)
        start += value.nbytes
    return torch.cat(parts), places


def unpacked(like: Any, data: Tensor, places: list[tuple]) -> Any:
    """As ``like``, with what `packed` put into these bytes."""
    each = iter(places)

    def take(_: Tensor) -> Tensor:
        start, end, dtype, shape = next(each)
        return data[start:end].view(dtype).view(shape)

    return like.map(take)
