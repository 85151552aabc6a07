"""`fused_lens`: the public op. Checks, dispatch, registration as a torch operator."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Optional

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..kernels.reference import LensHead, LensStats, Norm, fused_lens_reference, kind_of, norm_from
from .backends import backend_function, checked_operands, choose_backend, choose_precision


@torch.no_grad()
def fused_lens(
    hidden: Tensor,
    unembedding: Tensor | nn.Linear | LensHead,
    norm: Norm | nn.Module = None,
    targets: Tensor | int | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    backend: str = "auto",
    precision: str = "auto",
    check_values: bool = True,
) -> LensStats:
    """Norm and unembedding of every hidden row, reduced over the vocabulary without storing the logits.

    The logits are ``softcap * tanh(z / softcap)`` (``z`` itself without a softcap) of
    ``z = logit_scale * (norm(hidden) @ unembedding.T + bias)``, accumulated in fp32. This is the logit
    lens (nostalgebraist 2020, "interpreting GPT: the logit lens") when ``hidden`` is the residual stream.

    Args:
        hidden: ``[..., d_model]``, fp32, fp16 or bf16, CPU or CUDA: states between blocks. The last of the
            ``hidden_states`` that Transformers returns is behind the final norm already: to read it too, take
            `LogitLens`, or that one state without a norm.
        unembedding: ``[vocab_size, d_model]``, dtype and device of ``hidden``; an ``nn.Linear`` with such a weight, and
            its bias; or a `LensHead`, which has norm, bias, softcap and scale too.
        norm: ``LayerNorm`` or ``RMSNorm``, of refinelens or of ``torch.nn``, or None; applied in fp32.
        targets: Integer ids in ``[0, vocab_size)``, broadcastable to ``hidden.shape[:-1]``, or None.
        bias: ``[vocab_size]`` floating, or None.
        softcap: Positive cap of the logits, or None. On a GPU the cap's absolute error is up to a few 2^-23 times the
            cap, which is little under those of models, 15 to 50; on a CPU it is relative to the logit.
        logit_scale: Positive factor of the logits.
        backend: ``"auto"``, ``"triton"`` (CUDA), ``"cpp"`` (CPU) or ``"reference"`` (plain torch).
        precision: ``"fp32"``; ``"certified"`` (CPU, ``"cpp"``) for argmax and ranks that no rounding has touched,
            with a bound on the error of ``logsumexp`` and an index of 2 or 3 bytes a weight that lives as long as
            the unembedding (`refinelens.op.cpu`); or ``"auto"``, the former but where the latter is never slower
            and, but for the last places of the entropy, more exact: processors with AMX, from 2048 rows and a width of
            512 on (`refinelens.op.backends`). So the last bits may differ between fewer rows and more.
        check_values: False spares a call by Triton the wait for its own result: an id outside the vocabulary then has
            a logit of NaN and a rank without meaning, and a row that is not finite a logsumexp that is not. Other
            backends check anyway.

    Returns:
        LensStats: ``target_rank`` counts the tokens that beat the target, by a larger logit or by an equal one
        and a lower id; so it is 0 exactly when ``argmax`` is the target. Ranks and argmax are decided
        before the softcap, which is strictly increasing but saturates in fp32.

    Raises:
        InputError: Shapes, dtypes or devices that do not fit (both values are shown), a target outside
            the vocabulary, or NaN or infinity in a hidden row (its index is shown).

    Not differentiable.
    """
    states, head = checked_operands(hidden, unembedding, norm, bias, softcap, logit_scale)
    shape = states.shape[:-1]
    flat_targets = None if targets is None else flatten_targets(targets, states)
    norm = head.norm
    weight, norm_bias, eps, offset = (norm.weight, norm.bias, norm.eps, norm.offset) if norm else (None, None, 0.0, 0.0)
    ids, floats = torch.ops.refinelens.fused_lens.default(
        states.reshape(-1, states.shape[-1]),
        head.weight,
        kind_of(norm),
        weight,
        norm_bias,
        eps,
        offset,
        flat_targets,
        head.bias,
        head.softcap,
        head.scale,
        backend,
        precision,
        check_values,
    )
    argmax, *rank = ids.view(ids.shape[0], *shape).unbind()
    logsumexp, entropy, max_logit, *others = floats.view(floats.shape[0], *shape).unbind()
    fell_back, bound = (others.pop().bool(), others.pop()) if precision == "certified" else (None, None)
    target_logit, target_rank = (others[0], rank[0]) if rank else (None, None)
    return LensStats(argmax, max_logit, logsumexp, entropy, target_logit, target_rank, bound, fell_back)


def flatten_targets(targets: Tensor | int, hidden: Tensor) -> Tensor:
    """Targets broadcast to every row of ``hidden``, ``[N]`` int64.

    Raises:
        InputError: No integers, or a shape that does not broadcast.
    """
    shape = hidden.shape[:-1]
    if isinstance(targets, Tensor) and targets.shape == shape and targets.dtype == torch.int64:
        if targets.device == hidden.device:  # as most come, and the checks cost as much as a launch
            return targets.reshape(-1)
    return broadcast_ids("targets", integer_ids("targets", targets, hidden.device), shape).reshape(-1)


def integer_ids(name: str, ids: object, device: torch.device) -> Tensor:
    """As int64 on a device.

    Raises:
        InputError: No integers.
    """
    try:
        found = torch.as_tensor(ids, device=device)
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}: expected integer ids, got {ids!r} ({error})") from None
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise InputError(f"{name}: expected integer ids, got {found.dtype}")
    return found.to(torch.int64)


def broadcast_ids(name: str, ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Expanded, not copied.

    Raises:
        InputError: A shape that does not broadcast.
    """
    try:
        return ids.expand(tuple(shape))
    except RuntimeError:
        raise InputError(f"{name}: expected a shape that broadcasts to {list(shape)}, got {list(ids.shape)}") from None


def _fused_lens_op(
    hidden: Tensor,
    unembedding: Tensor,
    norm: str,
    norm_weight: Optional[Tensor],  # noqa: UP045 - the schema is inferred from these
    norm_bias: Optional[Tensor],  # noqa: UP045
    norm_eps: float,
    norm_offset: float,
    targets: Optional[Tensor],  # noqa: UP045
    bias: Optional[Tensor],  # noqa: UP045
    softcap: Optional[float],  # noqa: UP045
    logit_scale: float,
    backend: str,
    precision: str = "auto",
    check_values: bool = True,
) -> tuple[Tensor, Tensor]:
    """Argmax and, of targets, rank, int64 ``[1 or 2, N]``; logsumexp, entropy, max_logit, of targets target_logit and,
    asked to be certified, logsumexp_bound and fell_back, fp32 ``[3 to 6, N]``.

    Few tensors, as each costs time of its own, and an operator may not return several that share memory.
    """
    chosen = choose_backend(hidden.device.type, backend)[0]
    chosen_precision = choose_precision(chosen, hidden.device.type, precision, *hidden.shape)[0]
    head = LensHead(
        unembedding, norm_from(norm, norm_weight, norm_bias, norm_eps, norm_offset), bias, softcap, logit_scale
    )
    if chosen == "triton" and hidden.shape[0]:
        return _by_triton(hidden, head, targets, check_values)
    check_targets(targets, head.vocab_size)
    run = fused_lens_reference
    if hidden.shape[0]:
        run = backend_function(chosen, chosen_precision, asked=precision == "certified")
    with torch.no_grad():
        out = run(hidden, head, targets)
    check_result(out, hidden, targets, head.vocab_size, _saturates(head))
    ids, floats = [out.argmax], [out.logsumexp, out.entropy, out.max_logit]
    if out.target_logit is not None and out.target_rank is not None:
        ids, floats = [*ids, out.target_rank], [*floats, out.target_logit]
    if precision == "certified":
        bound, fell_back = out.logsumexp_bound, out.fell_back
        if bound is None or fell_back is None:  # of no rows, which are the reference's
            bound, fell_back = out.logsumexp, out.entropy
        floats = [*floats, bound, fell_back.float()]
    return torch.stack(ids), torch.stack(floats)


def _by_triton(hidden: Tensor, head: LensHead, targets: Tensor | None, check_values: bool) -> tuple[Tensor, Tensor]:
    """Triton reads no id outside the vocabulary, so that one wait for the device tells of ids and results."""
    from ..kernels.fused_lens import packed_lens

    ids, floats = packed_lens(hidden, head, targets)
    if check_values and (_saturates(head) or _is_capturing(hidden) or not _have_finite_sum(floats)):
        argmax, *rank = ids
        logsumexp, entropy, max_logit, *target_logit = floats
        out = LensStats(argmax, max_logit, logsumexp, entropy, *target_logit, *rank)
        check_result(out, hidden, targets, head.vocab_size, _saturates(head))
    return ids, floats


def _saturates(head: LensHead) -> bool:
    """Whether an infinity in a row may leave no trace in its statistics: the cap makes finite what no norm made NaN."""
    return head.norm is None and head.softcap is not None


def _have_finite_sum(floats: Tensor) -> bool:
    """A NaN or an infinity stays one in any sum, so that this is one small kernel and one wait for it.

    Finite numbers can have an infinite sum, and a maximum may be -inf: then it takes a closer look.
    """
    return math.isfinite(floats.sum())


# As `torch.library.custom_op` would, but for its wrappers, which import torch._dynamo (a second) at the first call.
_LIBRARY = torch.library.Library("refinelens", "FRAGMENT")
_LIBRARY.define(f"fused_lens{torch.library.infer_schema(_fused_lens_op, mutates_args=())}")
_LIBRARY.impl("fused_lens", _fused_lens_op, "CompositeExplicitAutograd")


@torch.library.register_fake("refinelens::fused_lens")
def _(  # type: ignore[no-untyped-def]
    hidden, unembedding, norm, norm_weight, norm_bias, norm_eps, norm_offset, targets, bias, softcap, logit_scale,
    backend, precision="auto", check_values=True,
):  # fmt: skip
    rows, of_targets, certified = hidden.shape[0], targets is not None, precision == "certified"
    ids = hidden.new_empty((1 + of_targets, rows), dtype=torch.int64)
    return ids, hidden.new_empty((3 + of_targets + 2 * certified, rows), dtype=torch.float32)


def _is_capturing(tensor: Tensor) -> bool:
    """A CUDA graph cannot hold a check: it would wait for the device."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def check_result(out: LensStats, hidden: Tensor, targets: Tensor | None, n_vocab: int, saturates: bool) -> None:
    """Refuse what `values_fit` finds, in words.

    Raises:
        InputError: Names the first row.
    """
    if not values_fit(out, hidden, targets, n_vocab, saturates):
        check_targets(targets, n_vocab)
        raise _broken_row(out, hidden, saturates)


def values_fit(
    out: LensStats, hidden: Tensor, targets: Tensor | None, n_vocab: int, saturates: bool
) -> bool:
    """Whether no id lies outside the vocabulary and no row is broken; where all is well, in one wait for the device.

    Args:
        out: Of ``hidden`` and ``targets``.
        hidden: ``[..., d_model]``.
        targets: Integer ids or None.
        saturates: Whether an infinity may leave no trace in ``out``, see `_saturates`.
    """
    if out.logsumexp.numel() == 0 or _is_capturing(hidden):
        return True
    of_target = () if out.target_logit is None else (out.target_logit,)  # NaN where Triton was given no id of a token
    if not saturates and _have_finite_sum(torch.stack([out.logsumexp, out.entropy, *of_target])):
        return True
    wrong = _broken(out, hidden, saturates).any()
    if targets is not None:
        wrong |= _outside(targets, n_vocab).any()
    return not wrong


def _outside(targets: Tensor, n_vocab: int) -> Tensor:
    return (targets < 0) | (targets >= n_vocab)


def _broken(out: LensStats, hidden: Tensor, saturates: bool) -> Tensor:
    # A NaN or infinity anywhere in a row reaches its logsumexp, so the statistics are checked, not the
    # inputs; but for an infinity that no norm turns into NaN and that the softcap makes finite again.
    # An infinite weight may make a logit -inf, which the sums take; not every backend's entropy does.
    broken = ~out.logsumexp.isfinite() | out.entropy.isnan()
    return broken | ~hidden.isfinite().all(-1) if saturates else broken


def check_targets(targets: Tensor | None, n_vocab: int, name: str = "targets") -> None:
    """Refuse an id outside the vocabulary among ``[N]`` or ``[N, T]``.

    Raises:
        InputError: Names the first.
    """
    if targets is None or targets.numel() == 0 or _is_capturing(targets):
        return
    outside = _outside(targets, n_vocab)
    if outside.any():
        place = tuple(outside.nonzero()[0].tolist())
        raise InputError(f"{name}: expected ids from 0 to {n_vocab - 1}, got {int(targets[place])} at row {place[0]}")


def _broken_row(out: LensStats, hidden: Tensor, saturates: bool) -> InputError:
    """What is wrong with the first broken row, in words."""
    broken = _broken(out, hidden, saturates)
    row = int(broken.nonzero()[0])
    value = "NaN" if hidden[row].isnan().any() else "infinity"
    if hidden[row].isfinite().all():
        half = ", and normed rows that fit float16" if hidden.dtype == torch.float16 else ""
        return InputError(
            f"logits of hidden row {row} are not finite although the row is: expected finite weights of norm and "
            f"unembedding and a finite bias{half}, got logsumexp {float(out.logsumexp[row])} and entropy "
            f"{float(out.entropy[row])}"
        )
    return InputError(
        f"hidden: expected finite values, got {value} in row {row} of {len(hidden)} (hidden as [rows, d_model]); "
        f"{int(broken.sum())} rows are affected"
    )
