"""Launches that come again: what the kernels of a call are handed is recorded once, then handed on as it is.

Triton looks at every argument of every launch, to find the kernel that was compiled for its types, alignments and
values of 1. In calls of one kind all of that is the same and addresses alone differ: a `Plan` keeps the compiled
kernels, their grids and numbers, and for every pointer in which buffer it lies. A replayed launch is a sum for every
pointer and a call of the launcher that Triton made.

That launcher is no public interface: it is used with the versions of Triton that it was read in, and only while nobody
listens to launches, as profilers do; else, and in the interpreter, every launch is an ordinary one.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from threading import Lock

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.runtime import driver

from .config import is_proven

# Sums of products are fused where the kernels' instructions are counted; Triton 3.10 will not unless it is asked to.
OPTIONS = dict(enable_fp_fusion=True)
MAX_PLANS = 256  # each is some kilobytes of numbers
BUFFER_BYTES = 256  # what buffers between kernels are multiples of, more than any kernel is compiled for
POINTER_BYTES = 16  # for pointers to multiples of it Triton compiles kernels of their own

Operands = Sequence[Tensor | None]
_recorder: contextvars.ContextVar[Recorder | None] = contextvars.ContextVar("recorder", default=None)


def launch(
    kernel: triton.JITFunction, programs: int, args: tuple, flags: dict, allocator: Callable | None = None
) -> None:
    """``kernel[(programs,)](*args, **flags)`` with `OPTIONS`, and a part of the plan that is being recorded.

    Args:
        kernel: What `triton.jit` made.
        programs: Of the launch, whose grid has one dimension.
        args: Tensors, numbers and None, by position.
        flags: Compile-time arguments, and options of the launch.
        allocator: As of `triton.set_allocator`, for a kernel that needs memory of its own while it runs.
    """

    def run():
        if allocator is not None:
            triton.set_allocator(allocator)
        return kernel[(programs,)](*args, **flags, **OPTIONS)

    # In a context of its own: the allocator of the caller's other kernels stays theirs.
    compiled = run() if allocator is None else contextvars.copy_context().run(run)
    if (recorder := _recorder.get()) is not None and not recorder.stopped:
        compile_time = (flags[name] for name in kernel.arg_names[len(args) :])
        recorder.launches.append(_Launch(compiled, programs, [*args, *compile_time], allocator))


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As `torch.empty`, for a buffer between kernels; those of a plan share one allocation."""
    buffer = torch.empty(tuple(shape), dtype=dtype, device=device)
    if (recorder := _recorder.get()) is not None and not recorder.stopped:
        recorder.buffers.append(buffer)
    return buffer


def stop_recording() -> None:
    """No plan is made of the call under way, and nothing of it is kept that a plan would need."""
    if (recorder := _recorder.get()) is not None:
        recorder.stop()


class _Launch:
    """A launch as it was made, with every argument of the kernel by position, as launchers take them."""

    def __init__(self, compiled, programs: int, args: list, allocator: Callable | None):
        self.compiled, self.programs, self.args, self.allocator = compiled, programs, args, allocator
        self.pointers: list[tuple[int, int, int]] = []  # position, number of the buffer, bytes from its beginning

    def replay(self, addresses: list[int], stream: int) -> None:
        args, compiled = self.args.copy(), self.compiled
        for position, buffer, offset in self.pointers:
            args[position] = addresses[buffer] + offset
        compiled.run(self.programs, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None, *args)


class Plan:
    """The launches of a call, to be made again for others of its kind.

    Args:
        launches: In their order.
        workspace: Bytes of all buffers between the kernels.
    """

    def __init__(self, launches: list[_Launch], workspace: int):
        self.launches, self._workspace = launches, workspace
        self._allocator = next((made.allocator for made in launches if made.allocator is not None), None)

    def replay(self, operands: Operands, results: Sequence[Tensor]) -> bool:
        """Make the launches with other tensors of the same kind; False if none was made."""
        if _someone_listens():
            return False
        workspace = torch.empty(self._workspace, dtype=torch.uint8, device=results[0].device)
        own = [tensor.data_ptr() for tensor in (*results, workspace)]
        if any(address % POINTER_BYTES for address in own):
            return False
        addresses = [0 if tensor is None else tensor.data_ptr() for tensor in operands] + own
        if self._allocator is None:
            self._replay(addresses)
        else:
            contextvars.copy_context().run(self._replay, addresses)
        return True

    def _replay(self, addresses: list[int]) -> None:
        if self._allocator is not None:
            triton.set_allocator(self._allocator)
        stream = driver.active.get_current_stream(driver.active.get_current_device())
        for made in self.launches:
            made.replay(addresses, stream)


def _someone_listens() -> bool:
    """Whether a hook wants to know of every launch."""
    hooks = (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook)
    return any(hook is not None and getattr(hook, "calls", True) for hook in hooks)


class Recorder:
    """What a call launches, and the buffers that it makes between its kernels."""

    def __init__(self, operands: Operands, results: Sequence[Tensor]):
        self._operands, self._results = operands, results
        self.buffers: list[Tensor] = []
        self.launches: list[_Launch] = []
        self.stopped = False

    def stop(self) -> None:
        """Let go of everything; there will be no plan."""
        self.stopped = True
        self.buffers.clear()
        self.launches.clear()

    def plan(self) -> Plan | None:
        """None where launches cannot be made again, or a pointer is neither clearly an operand nor made here."""
        if self.stopped:
            return None
        given = [id(tensor) for tensor in self._operands if tensor is not None]
        is_clear = len(set(given)) == len(given)  # one tensor may be two operands, which the next call has apart
        if not (is_clear and all(hasattr(made.compiled, "packed_metadata") for made in self.launches)):
            return None
        starts, workspace = [], 0
        for buffer in self.buffers:
            starts.append(workspace)
            workspace += -(-buffer.nbytes // BUFFER_BYTES) * BUFFER_BYTES
        for made in self.launches:
            for position, value in enumerate(made.args):
                if isinstance(value, Tensor):
                    place = self._place(value, starts)
                    if place is None:
                        return None
                    made.pointers.append((position, *place))
                    made.args[position] = 0
        return Plan(self.launches, workspace)

    def _place(self, tensor: Tensor, starts: list[int]) -> tuple[int, int] | None:
        """The number of the buffer that ``tensor`` lies in, and the bytes from its beginning."""
        for number, operand in enumerate(self._operands):
            if operand is tensor:
                return number, 0
        # All others were made for this call alone, so that their memory tells them apart.
        own = [*((result, 0) for result in self._results), *zip(self.buffers, starts, strict=True)]
        for number, (buffer, start) in enumerate(own):
            if buffer.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr():
                number = min(number, len(self._results)) + len(self._operands)
                return number, start + tensor.data_ptr() - buffer.data_ptr()
        return None


_plans: dict[tuple, Plan] = {}
_keeping = Lock()


def run_planned(kind: tuple, operands: Operands, results: Sequence[Tensor], run: Callable[[], None]) -> None:
    """``run()``, or the launches that it made for an earlier call of the same kind.

    Args:
        kind: All that decides which kernels are launched and what they are given, but for addresses.
        operands: What ``run`` passes to kernels as it is, or None.
        results: What it writes, and passes to kernels whole or in parts; made for this call.
        run: Makes the same launches for all calls of a kind, by `launch`, with buffers by `empty`.
    """
    plan = _plans.get(kind)
    if plan is not None and plan.replay(operands, results):
        return
    if not is_proven(triton.__version__) or knobs.runtime.interpret:
        return run()
    recorder = Recorder(operands, results)
    token = _recorder.set(recorder)
    try:
        run()
    finally:
        _recorder.reset(token)
    # In a captured graph some of what decides a launch cannot be tried.
    is_captured = results[0].is_cuda and torch.cuda.is_current_stream_capturing()
    if plan is None and not is_captured and (plan := recorder.plan()) is not None:
        keep(kind, plan)


def keep(kind: tuple, plan: Plan) -> None:
    """For later calls; beyond `MAX_PLANS` the oldest goes."""
    with _keeping:
        while len(_plans) >= MAX_PLANS:
            del _plans[next(iter(_plans))]
        _plans[kind] = plan


def forget_plans() -> None:
    """After a change of what decides how kernels are launched."""
    with _keeping:
        _plans.clear()
