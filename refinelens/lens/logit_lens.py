"""`LogitLens`: the fused lens with everything it needs of a model, proven against the model's own logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial, wraps
from threading import RLock
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from ..kernels.reference import LensHead, LensStats
from ..model.head import check_device, check_widths, find_blocks, find_head
from ..model.hooks import difference, hooks_on, keep_positions, modules_around, probe_ids, run_base
from ..model.identity import config_sha256, weights_sample_sha256
from ..model.loading import memory_for
from ..model.positions import Independence, Rows, aligned, check_independence
from ..op.backends import choose_backend
from ..op.fused_lens import fused_lens, values_fit
from ..op.vocabulary import kl_to_final
from .translators import MODEL_KEYS, Translators, check_made_for

# Largest difference between lens and model that counts as rounding, as a share of the logit range. A model
# in half precision rounds its normed states and its logits, so there the share is a multiple of epsilon.
FP32_PARITY = 1e-4
ROUNDINGS = 2
TRANSLATED_BYTES = 12 * 2**20  # of states held at a time, where those of one layer are fewer
TRANSLATED_BYTES_CUDA = 32 * 2**20  # a GPU needs more to be busy


@dataclass(frozen=True)
class ParityReport:
    """How well the lens at the last layer reproduces the model's own logits."""

    max_difference: float  # largest absolute difference of a logit
    logit_range: float  # largest minus smallest logit
    tolerance: float  # allowed share of the range
    argmax_equal: bool  # same prediction at every position, or one that rounding cannot tell apart
    op_agrees: bool  # the op's argmax, maximum and logsumexp agree with the model's logits

    @property
    def passed(self) -> bool:
        """Whether the lens may be used."""
        within = self.max_difference <= self.tolerance * self.logit_range
        return within and self.argmax_equal and self.op_agrees


@dataclass(frozen=True)
class LayerReading:
    """What a lens reads at every layer, fields of shape ``[n_layers + 1, batch, n_positions]``."""

    stats: LensStats
    kl: Tensor | None  # fp32, nats, KL(p_final || p_layer); None if it was not asked for

    def of(self, start: int, end: int) -> LayerReading:
        """Positions ``start`` to ``end`` of the first context of a batch, fields ``[n_layers + 1, end - start]``."""
        return self._map(lambda value: value[:, 0, start:end])

    def view(self, shape: torch.Size) -> LayerReading:
        """The same reading in another shape."""
        return self._map(lambda value: value.view(shape))

    def to(self, device: torch.device | str) -> LayerReading:
        """The same reading on another device."""
        return self._map(lambda value: value.to(device))

    def _map(self, function: Callable[[Tensor], Tensor]) -> LayerReading:
        return LayerReading(self.stats.map(function), None if self.kl is None else function(self.kl))


def _in_own_dtype(method: Callable) -> Callable:
    """Switches autocast off: a model is read, as it is proven, in its own dtype."""

    @wraps(method)
    def run(self: LogitLens, *arguments, **options):
        with torch.autocast(self.head.weight.device.type, enabled=False):
            return method(self, *arguments, **options)

    return run


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # of models that only one thread may run at a time


@dataclass(frozen=True)
class LogitLens:
    """A model with the head of its logit lens; make one with `LogitLens.from_model`.

    Several threads may use one lens.
    """

    model: PreTrainedModel
    head: LensHead
    blocks: nn.ModuleList
    backend: str
    parity: ParityReport
    independence: Independence = Independence(None, False)
    hooks: frozenset[int] = frozenset()  # around the base model when it was proven

    @classmethod
    def from_model(cls, model: PreTrainedModel, backend: str = "auto") -> LogitLens:
        """Find the parts of a Hugging Face causal LM and prove them by the parity gate.

        Args:
            model: A causal LM on one device; set to evaluation mode.
            backend: Backend of `fused_lens`.

        Raises:
            UnsupportedModelError: A part was not found, the states that are read are not those that the model's own
                forward pass computes, or the lens at the last layer is not the model's own prediction; the class and
                the difference are named.
            FaultError: No memory for that.
        """
        model.eval()
        check_device(model)
        with memory_for(type(model).__name__), torch.autocast(model.device.type, enabled=False):
            head, blocks = find_head(model), find_blocks(model)
            parity = check_parity(model, head, blocks, backend)
            if not parity.passed:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: expected the lens at the last layer to equal the model's logits within "
                    f"{parity.tolerance:.1e} of their range {parity.logit_range:.4g}, got a maximum difference of "
                    f"{parity.max_difference:.4g}, argmax {'equal' if parity.argmax_equal else 'different'}, "
                    f"op {'in agreement' if parity.op_agrees else 'in disagreement'}"
                )
            independence = check_independence(model, blocks)
        return cls(model, head, blocks, backend, parity, independence, hooks_on(modules_around(model)))

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks; layers run from 0 (embedding output) to this."""
        return len(self.blocks)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.head.d_model

    @cached_property
    def entry(self) -> dict:
        """What identifies the model to a lens that was made for it, by `translators.MODEL_KEYS`."""
        name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        hashes = (config_sha256(self.model), weights_sample_sha256(self.model))
        values = (name, type(self.model).__name__, *hashes, self.n_layers, self.d_model)
        return dict(zip(MODEL_KEYS, values, strict=True))

    @cached_property
    def _modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())

    @cached_property
    def _around(self) -> tuple[nn.Module, ...]:
        return modules_around(self.model)

    @cached_property
    def _accepted(self) -> list[dict]:
        """Models of lenses that were held against this one and found to be it."""
        return []

    def adapted(self, translators: Translators) -> Translators:
        """Translators on this model's device and in its dtype.

        Raises:
            InputError: They come from a lens that was made for another model or revision, or do not fit the dtype.
        """
        made_for = translators.made_for
        if made_for is not None and not any(made_for is known for known in self._accepted):
            check_made_for(made_for, self.entry, self.head.weight)
            self._accepted.append(made_for)
        device, dtype = self.head.weight.device, self.head.weight.dtype
        if (translators.weight.device, translators.weight.dtype) == (device, dtype):
            return translators
        try:
            return translators.to(device, dtype)
        except InputError as error:
            raise InputError(f"{error} once in {str(dtype).removeprefix('torch.')}; use ``dtype='float32'``") from None

    @_in_own_dtype
    def stats(self, hidden: Tensor, targets: Tensor | int | None = None, check_values: bool = True) -> LensStats:
        """`fused_lens` of residual-stream states ``[..., d_model]`` with this model's head."""
        hidden = hidden.to(self.head.weight.device)
        return fused_lens(hidden, self.head, targets=targets, backend=self.backend, check_values=check_values)

    @contextmanager
    def undisturbed(self) -> Iterator[None]:
        """Within the block the model may run a context: no other one, before or at the same time, changes its states.

        Raises:
            InputError: The model was put into training mode, or hooks around its base model or taken away, since it was
                proven.
        """
        if any(module.training for module in self._modules):
            raise InputError(
                f"{type(self.model).__name__}: expected evaluation mode, in which its lens was made, got training "
                "mode, which drops states at random; call eval() on it"
            )
        if hooks_on(self._around) != self.hooks:
            raise InputError(
                f"{type(self.model).__name__}: expected the hooks that it had when its lens was made, got others on "
                "the model as a whole, which the lens would pass by; make the lens again"
            )
        if self.independence.one_at_a_time is None:
            yield
            return
        with _LOCKS.setdefault(self.model, RLock()):
            if self.independence.remembers:
                run_base(self.model, probe_ids(self.model, 1))
            yield

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Residual stream at chosen positions, ``[n_layers + 1, batch, n_positions, d_model]``.

        The states of a context are those that it has by itself, whatever else is in the batch: where a model does not
        give that, contexts run one at a time.

        Args:
            input_ids: ``[batch, token]`` int64. Shorter contexts of a batch are padded, on the right or on the left.
            positions: ``[n_positions]`` or ``[batch, n_positions]`` int64, in ``[0, token)``, not of padding.
            attention_mask: ``[batch, token]``, 1 for real tokens, or None for all ones.
            cache: Keys and values of the tokens before ``input_ids``, which are added to it, or None. Positions
                count from the first of ``input_ids``.

        Raises:
            InputError: Shapes that do not fit, or a position or token id out of range (both are shown).
            UnsupportedModelError: Blocks that did not run once each.
        """
        rows = aligned(input_ids, self._check_inputs(input_ids, positions), attention_mask)
        if self.independence.one_at_a_time is None or not len(input_ids):
            return self._states(rows, cache)
        if cache is not None:
            raise InputError(f"cache: expected none, got one; {self.independence.one_at_a_time}")
        return torch.cat([self._states(rows.alone(row), None) for row in range(len(input_ids))], 1)

    def _states(self, rows: Rows, cache: Cache | None) -> Tensor:
        """One pass."""
        n_tokens = rows.input_ids.shape[1]
        device = self.model.device
        mask = None if rows.mask is None else rows.mask.to(device)
        with self.undisturbed(), keep_positions(self.model, self.blocks, rows.positions, n_tokens) as kept:
            run_base(self.model, rows.input_ids.to(device), mask, cache)
        return torch.stack(kept)

    def trajectory(
        self,
        input_ids: Tensor,
        positions: Tensor,
        targets: Tensor | None = None,
        attention_mask: Tensor | None = None,
        translators: Translators | None = None,
    ) -> LensStats:
        """Run the model once and read every layer at the chosen positions.

        Args:
            input_ids: ``[batch, token]`` int64.
            positions: ``[n_positions]`` or ``[batch, n_positions]`` int64. Position p predicts token p + 1.
            targets: Ids broadcastable to ``[batch, n_positions]``, the same for every layer, or None.
            attention_mask: ``[batch, token]``, or None.
            translators: Applied before the norm, or None for the plain logit lens.

        Returns:
            LensStats with fields ``[n_layers + 1, batch, n_positions]``. Layer 0 is the embedding output,
            layer i the output of block i, layer ``n_layers`` the model's own prediction.

        Raises:
            InputError: Shapes, positions, token ids or targets that do not fit.
        """
        return self.read(self.hidden(input_ids, positions, attention_mask), targets, translators, kl=False).stats

    @_in_own_dtype
    def read(
        self,
        hidden: Tensor,
        targets: Tensor | int | None = None,
        translators: Translators | None = None,
        kl: bool = True,
    ) -> LayerReading:
        """Statistics of every layer and its KL divergence to the last one.

        Translated states are held for as many rows as one layer has, or `TRANSLATED_BYTES` (on a GPU
        `TRANSLATED_BYTES_CUDA`) if those are fewer.

        Args:
            hidden: ``[n_layers + 1, batch, n_positions, d_model]``, the residual stream.
            targets: Ids broadcastable to ``[batch, n_positions]``, or None.
            translators: Applied before the norm, of this model, or None for the plain logit lens.
            kl: Whether to compute the divergence: two more products over the rows of the last layer.

        Raises:
            InputError: As `fused_lens`, and translators that do not fit, or are those of another model.
        """
        translators = None if translators is None else self.adapted(translators)
        if hidden.dim() < 3:
            raise InputError(f"hidden: expected [n_layers + 1, batch, n_positions, d_model], got {list(hidden.shape)}")
        states = hidden.flatten(1, -2).to(self.head.weight.device)  # [n_layers + 1, N, d_model]
        if targets is not None:
            targets = _spread(torch.as_tensor(targets, device=states.device), hidden.shape[1:-1])
        at_once = self._checks_at_once(states)
        reading = self._read_blocks(states, targets, translators, kl, check_values=not at_once)
        if at_once and not values_fit(reading.stats, states, targets, self.head.vocab_size, saturates=False):
            self._read_blocks(states, targets, translators, kl, check_values=True)  # says what is wrong
        return reading.view(hidden.shape[:-1])

    def _checks_at_once(self, states: Tensor) -> bool:
        """Triton is waited for once, not after every block, unless an infinity could leave no trace in the results."""
        leaves_trace = self.head.norm is not None or self.head.softcap is None
        return leaves_trace and choose_backend(states.device.type, self.backend)[0] == "triton"

    def _read_blocks(
        self, states: Tensor, targets: Tensor | None, translators: Translators | None, kl: bool, check_values: bool
    ) -> LayerReading:
        """`read` of states ``[n_layers + 1, N, d_model]``, block by block."""
        n = states.shape[1]
        step = n if translators is None else _rows_at_a_time(states)
        blocks = []
        for start in range(0, max(1, n), max(1, step)):
            block = states[:, start : start + step]
            block = block if translators is None else translators(block)
            if check_values and translators is not None and not torch.isfinite(block).all():
                raise InputError(f"lens: expected translated states that fit {block.dtype}; use ``dtype='float32'``")
            stats = self.stats(block, None if targets is None else targets[start : start + step], check_values)
            blocks.append(LayerReading(stats, kl_to_final(block, stats, self.head) if kl else None))
        return _joined(blocks)

    def _check_inputs(self, input_ids: Tensor, positions: Tensor) -> Tensor:
        if input_ids.dim() != 2 or input_ids.is_floating_point():
            raise InputError(
                f"input_ids: expected integer ids of shape [batch, token], got {input_ids.dtype} "
                f"{list(input_ids.shape)}"
            )
        n_vocab = self.model.get_input_embeddings().weight.shape[0]
        if input_ids.numel() and not 0 <= int(input_ids.min()) <= int(input_ids.max()) < n_vocab:
            raise InputError(
                f"input_ids: expected ids from 0 to {n_vocab - 1}, got {int(input_ids.min())} to {int(input_ids.max())}"
            )
        positions = torch.as_tensor(positions)
        if positions.dim() == 1:
            positions = positions.expand(len(input_ids), -1)
        n_tokens = input_ids.shape[1]
        if positions.dim() != 2 or len(positions) != len(input_ids):
            raise InputError(
                f"positions: expected shape [n_positions] or [{len(input_ids)}, n_positions], got "
                f"{list(positions.shape)}"
            )
        if positions.numel() and not 0 <= int(positions.min()) <= int(positions.max()) < n_tokens:
            raise InputError(
                f"positions: expected 0 to {n_tokens - 1}, got {int(positions.min())} to {int(positions.max())}"
            )
        return positions


def _spread(targets: Tensor, shape: torch.Size) -> Tensor:
    """Targets broadcast to every position, ``[N]``."""
    try:
        return targets.expand(shape).flatten()
    except RuntimeError:
        raise InputError(f"targets: expected ids broadcastable to {list(shape)}, got {list(targets.shape)}") from None


def _rows_at_a_time(states: Tensor) -> int:
    """Positions whose translated states are held at a time."""
    n_layers, n, d_model = states.shape
    most = TRANSLATED_BYTES_CUDA if states.is_cuda else TRANSLATED_BYTES
    rows = max(n, most // (d_model * states.element_size()))
    return max(1, rows // n_layers)


def _joined(blocks: list[LayerReading]) -> LayerReading:
    """Readings of neighbouring rows as one."""
    if len(blocks) == 1:
        return blocks[0]

    kl = None if blocks[0].kl is None else torch.cat([block.kl for block in blocks], 1)
    return LayerReading(LensStats.cat([block.stats for block in blocks], 1), kl)


def check_parity(
    model: PreTrainedModel, head: LensHead, blocks: nn.ModuleList, backend: str = "auto"
) -> ParityReport:
    """Compare the states that a lens reads, and the lens at the last layer, with the model's own forward pass.

    States come from the base model alone; those of every layer must be the ones that ``model(...)`` computes on its
    way to its logits. Of the logits both the formula (every logit) and the op (argmax, maximum, logsumexp) are
    compared; the only place beside `find_head` where logits of all tokens are held, for 8 positions.

    Raises:
        UnsupportedModelError: States of another forward pass, another width or dtype.
    """
    ids = probe_ids(model)
    keep = partial(keep_positions, model, blocks, torch.arange(ids.shape[1])[None], ids.shape[1])
    with torch.no_grad(), torch.autocast(model.device.type, enabled=False):
        with keep() as of_model:
            own = model(input_ids=ids, use_cache=False).logits[0].float()
        with keep() as kept:
            run_base(model, ids)
    last = kept[-1][0]
    check_widths(model, head, last, own)
    eps = torch.finfo(head.weight.dtype).eps
    tolerance = FP32_PARITY if head.weight.dtype == torch.float32 else ROUNDINGS * eps
    for layer, pair in enumerate(zip(kept, of_model, strict=True)):
        if (found := difference(*(states[None] for states in pair))) > tolerance:
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected its base model to compute the states that the model itself does, "
                f"got others from layer {layer} on (difference {found:.2g} of the largest, allowed {tolerance:.2g}): "
                "it changes what goes in, as prompts of virtual tokens, scaled embeddings or hooks do; undo that"
            )
    lens = head.logits(last).to(own.device)
    logit_range = float(own.max() - own.min())
    allowed, tie = tolerance * logit_range, ROUNDINGS * eps * logit_range
    stats = fused_lens(last.to(head.weight.device), head, backend=backend).to(own.device)
    close = [
        (stats.max_logit - own.amax(-1)).abs().max() <= allowed,
        (stats.logsumexp - own.logsumexp(-1)).abs().max() <= allowed,
    ]
    return ParityReport(
        max_difference=float((lens - own).abs().max()),
        logit_range=logit_range,
        tolerance=tolerance,
        argmax_equal=_same_argmax(own, lens.argmax(-1), tie),
        op_agrees=all(close) and _same_argmax(own, stats.argmax, tie),
    )


def _same_argmax(own: Tensor, predicted: Tensor, tie: float) -> bool:
    margin = own.amax(-1) - own.gather(1, predicted[:, None])[:, 0]
    return bool((margin <= tie).all())
