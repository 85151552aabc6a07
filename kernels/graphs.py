"""The lens of repeated shapes as CUDA graphs: one launch a call instead of five and their checks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .fused_lens import fused_lens_triton
from .reference import LensHead, LensStats

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
    """One captured call with the buffers that its launches read and write."""

    def __init__(self, run, hidden: Tensor, targets: Tensor | None):
        self._hidden = hidden.clone(memory_format=torch.contiguous_format)
        self._targets = None if targets is None else targets.clone(memory_format=torch.contiguous_format)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                run(self._hidden, self._targets)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            out = run(self._hidden, self._targets)
            # One buffer, so that handing out a copy is one launch more and not one a statistic.
            self._packed = torch.cat([value.view(torch.uint8) for _, value in out.items()])
        self._fields = {name: (value.dtype, value.nbytes) for name, value in out.items()}

    def replay(self, hidden: Tensor, targets: Tensor | None) -> LensStats:
        """Run the captured launches on new values; the result is the caller's own copy."""
        self._hidden.copy_(hidden)
        if targets is not None:
            self._targets.copy_(targets)
        self._graph.replay()
        packed, values, start = self._packed.clone(), {}, 0
        for name, (dtype, size) in self._fields.items():
            values[name] = packed[start : start + size].view(dtype)
            start += size
        return LensStats(**values)
