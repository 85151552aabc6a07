"""`LogitLens`: the fused lens with everything it needs of a model, proven against the model's own logits."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from threading import RLock
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InputError, UnsupportedModelError
from ..kernels.reference import LensHead, LensStats
from ..model.head import check_device, find_blocks, find_head
from ..model.hooks import hooks_on, input_device, keep_positions, modules_around, probe_ids, run_base
from ..model.identity import config_sha256, weights_sample_sha256
from ..model.loading import LoadedModel, memory_for
from ..model.positions import Independence, Rows, aligned, check_independence, checked_positions
from ..model.resid_mid import Sublayers, keep_mid
from ..op.backends import choose_backend
from ..op.fused_lens import fused_lens, values_fit
from .chunks import ChunkedPrefill, read_tokens
from .files import Lens, load_lens
from .inputs import spread_alternatives, spread_targets, states_of, targets_of, tokens_of
from .parity import ParityReport, check_logits, check_parity, looks_normed, returns_normed
from .reading import LayerReading
from .replays import Readout, Replays
from .translators import MODEL_KEYS, Translators, check_made_for, rows_at_a_time

_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()  # of models that only one thread may run at a time


class LogitLens:
    """A causal LM read layer by layer: the head of its lens is found, and proven against the model's own logits.

    For example:

        lens = LogitLens(model, tokenizer)
        reading = lens.read("The capital of France is", targets=" Paris")
        reading.rank[:, -1]                  # of the target at every layer, behind the last token
        lens.with_lens("lenses/mine").read("The capital of France is")  # the same through a fitted lens

    Several threads may use one lens.

    Args:
        model: A Hugging Face causal LM, on one device or split by ``device_map``; set to evaluation mode.
        tokenizer: For text; None where only token ids and states are read.
        backend: Backend of `fused_lens`.

    Raises:
        UnsupportedModelError: A part was not found, the states that are read are not those that the model's own forward
            pass computes, or the lens at the last layer is not the model's own prediction; the class and the difference
            are named.
        FaultError: No memory for that.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None, *, backend: str = "auto"
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"model: expected a causal LM of Transformers, got {type(model).__name__}")
        model.eval()
        check_device(model)
        with memory_for(type(model).__name__), torch.autocast(input_device(model).type, enabled=False):
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
        self.model: PreTrainedModel = model
        self.tokenizer, self.backend = tokenizer, backend
        self.head: LensHead = head
        self.blocks: nn.ModuleList = blocks
        self.parity: ParityReport = parity
        self.independence: Independence = independence
        self.hooks = hooks_on(modules_around(model))  # around the base model when it was proven
        self.proofs: dict[int, ChunkedPrefill] = {}  # by tokens of a chunk, found out since; copies share it
        self.replays = Replays()
        self.name = "plain"  # of the lens
        self.translators: Translators | None = None  # before the norm, None for the plain logit lens

    def __repr__(self) -> str:
        parity = self.parity
        return (
            f"LogitLens({type(self.model).__name__}, {self.n_layers} layers, {self.name} lens, "
            f"{self.head.weight.dtype} on {self.head.weight.device}; parity {parity.max_difference:.2g}, allowed "
            f"{parity.tolerance * parity.logit_range:.2g})".replace("torch.", "")
        )

    def with_lens(self, lens: Lens | Translators | str | Path) -> LogitLens:
        """This model through a fitted lens: a folder, what `load_lens` gives, or translators of one's own.

        Raises:
            InputError: No lens there, or one that was made for another model or revision, or does not fit the dtype.
        """
        if isinstance(lens, str | Path):
            lens = load_lens(lens)
        elif isinstance(lens, Translators):
            lens = Lens("own", lens)
        other = copy(self)
        other.name, other.translators = lens.name, lens.translators and self.adapted(lens.translators)
        if lens.manifest and other.translators is not None:
            unknown = [note for known, note in self._accepted if known is other.translators.made_for]
            for note in filter(None, [*unknown, other.translators.plain_layers(), lens.made_otherwise()]):
                warnings.warn(f"lens {lens.name}: {note}", stacklevel=2)
        return other

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks; layers run from 0 (embedding output) to this."""
        return len(self.blocks)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.model)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.head.d_model

    @cached_property
    def entry(self) -> dict[str, Any]:
        """What identifies the model to a lens that was made for it, by `translators.MODEL_KEYS`."""
        name = getattr(self.model.config, "_name_or_path", "") or type(self.model).__name__
        hashes = (config_sha256(self.model.config), weights_sample_sha256(self.model))
        values = (name, type(self.model).__name__, *hashes, self.n_layers, self.d_model)
        return dict(zip(MODEL_KEYS, values, strict=True))

    @cached_property
    def _modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.model.modules())

    @cached_property
    def _around(self) -> tuple[nn.Module, ...]:
        return modules_around(self.model)

    @cached_property
    def _returns_normed(self) -> bool:
        """Whether Transformers returns the last state of this model normed."""
        with self.undisturbed():
            return returns_normed(self.model, self.head, self.blocks)

    @cached_property
    def _accepted(self) -> list[tuple[dict[str, Any], str | None]]:
        """Models of lenses that were held against this one and found to be it, and what could not be compared."""
        return []

    def adapted(self, translators: Translators) -> Translators:
        """Translators on this model's device and in its dtype.

        Raises:
            InputError: They come from a lens that was made for another model or revision, or do not fit the dtype.
        """
        made_for = translators.made_for
        if made_for is not None and not any(made_for is known for known, _ in self._accepted):
            self._accepted.append((made_for, check_made_for(made_for, self.entry, self.head.weight)))
        if made_for is not None and "source_layers" in made_for and translators.n_layers < self.n_layers:
            translators = translators.up_to(self.n_layers)
        device, dtype = self.head.weight.device, self.head.weight.dtype
        if (translators.weight.device, translators.weight.dtype) == (device, dtype):
            return translators
        try:
            return translators.to(device, dtype)
        except InputError as error:
            raise InputError(f"{error} once in {str(dtype).removeprefix('torch.')}; use ``dtype='float32'``") from None

    def translated(self, states: Tensor, translators: Translators, check_values: bool = True) -> Tensor:
        """States ``[n_layers + 1, N, d_model]`` behind the `adapted` translators.

        Raises:
            InputError: They do not fit each other, or what comes out does not fit the dtype.
        """
        with self.in_own_dtype():
            translated = translators(states)
        if check_values and not torch.isfinite(translated).all():
            raise InputError(f"lens: expected translated states that fit {states.dtype}; use ``dtype='float32'``")
        return translated

    def in_own_dtype(self) -> torch.autocast:
        """Switches autocast off: a model is read, as it is proven, in its own dtype."""
        return torch.autocast(self.head.weight.device.type, enabled=False)

    def stats(self, hidden: Tensor, targets: Tensor | int | None = None, check_values: bool = True) -> LensStats:
        """`fused_lens` of residual-stream states ``[..., d_model]`` with this model's head."""
        hidden = hidden.to(self.head.weight.device)
        with self.in_own_dtype():
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
        sublayers: Sequence[Sublayers] | None = None,
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
            sublayers: Of every block, see `blocks.sublayers_of`: ``resid_mid`` of every block then stands behind the
                layers, ``[2 * n_layers + 1, ...]``. None for the layers alone.

        Raises:
            InputError: Shapes that do not fit, or a position or token id out of range (both are shown).
            UnsupportedModelError: Blocks that did not run once each.
        """
        rows = aligned(
            input_ids,
            checked_positions(input_ids, positions, len(self.model.get_input_embeddings().weight)),
            attention_mask,
        )
        if self.independence.one_at_a_time is None or not len(input_ids):
            return self._states(rows, cache, sublayers)
        if cache is not None:
            raise InputError(f"cache: expected none, got one; {self.independence.one_at_a_time}")
        return torch.cat([self._states(rows.alone(row), None, sublayers) for row in range(len(input_ids))], 1)

    def _states(self, rows: Rows, cache: Cache | None, sublayers: Sequence[Sublayers] | None) -> Tensor:
        """One pass."""
        n_tokens = rows.input_ids.shape[1]
        device = self.device
        mask = None if rows.mask is None else rows.mask.to(device)
        with (
            self.undisturbed(),
            keep_positions(self.model, self.blocks, rows.positions, n_tokens) as kept,
            keep_mid(self.blocks, sublayers, rows.positions) as mid,
        ):
            run_base(self.model, rows.input_ids.to(device), mask, cache)
        return torch.stack([state.to(self.head.weight.device) for state in (*kept, *mid)])

    def read(
        self,
        text: object,
        targets: object = None,
        positions: object = None,
        *,
        attention_mask: object = None,
        alternatives: object = None,
        top_k: int = 5,
        kl: bool = True,
    ) -> LayerReading:
        """Run the model once and read every layer; a long text that is read throughout runs in chunks, if proven.

        Args:
            text: A string or several, token ids ``[token]`` or ``[batch, token]``, or what a tokenizer returns. A
                tokenizer puts its special tokens around a string as it does by default.
            targets: Token ids or strings of one token each, broadcastable to ``[position]`` or ``[batch, position]``,
                the same for every layer; None for none.
            positions: That are read: None for all, an integer, integers (of a batch also ``[batch, position]``), a
                slice or a range; negative ones count from the last token of each text. Position p predicts token p + 1.
            attention_mask: ``[batch, token]``, 1 for real tokens, or None; padding stands on one side.
            alternatives: Up to 8 further targets of every position, such as competing answers, as ids or strings that
                broadcast to ``[position, T]`` or ``[batch, position, T]``; None for none.
            top_k: How many of the likeliest tokens to list; 0 for none.
            kl: Whether to compute KL(final || layer).

        Returns:
            LayerReading with fields ``[n_layers + 1, position]``, or ``[n_layers + 1, batch, position]`` of a batch.

        Raises:
            InputError: Input that is none of these, positions, token ids or targets that do not fit.
        """
        tokens = tokens_of(text, positions, attention_mask, self.tokenizer)
        ids, others = targets_of(targets, self.tokenizer), targets_of(alternatives, self.tokenizer, "alternatives")
        return read_tokens(self, tokens, ids, others, kl, top_k)

    def read_states(
        self,
        states: Tensor | Sequence[Tensor],
        targets: object = None,
        translators: Translators | None = None,
        *,
        alternatives: object = None,
        kl: bool = True,
        top_k: int = 0,
        logits: Tensor | None = None,
        check_last: bool = True,
    ) -> LayerReading:
        """Read states that are there: of `hidden`, or the ``hidden_states`` that Transformers returns.

        The last of Transformers' states is behind the final norm already, in most models. Norming it again is the
        classic error of a logit lens. Of a tuple the last state is read as this model returns it, which is found out by
        running it once; a tensor is the residual stream, and refused if its last layer looks normed.

        Translated states are held for as many rows as one layer has, or `rows_at_a_time` if that is more.

        Args:
            states: ``[n_layers + 1, ..., d_model]``, the residual stream, or a tuple or list of its layers.
            targets: Ids, or strings of one token each, broadcastable to ``states.shape[1:-1]``, or None.
            translators: Applied before the norm, of this model, in place of the lens's own.
            alternatives: As of `read`, broadcastable to ``[*states.shape[1:-1], T]``; `fused_lens_targets` gives them.
            kl: Whether to compute the divergence: two more products over the rows of the last layer.
            top_k: How many of the likeliest tokens to list; 0 for none.
            logits: The model's own logits ``[..., vocab_size]`` of these states, to be held against the last layer.
            check_last: False spares states of `hidden` the look whether the last ones are normed.

        Raises:
            InputError: As `fused_lens`, states of another number of layers, translators that do not fit or are those of
                another model, or logits that are not those of the last layer.
        """
        hidden, normed = self._states_given(states, check_last)
        translators = self.translators if translators is None else self.adapted(translators)
        # [n_layers + 1, N, d_model]
        states = hidden.reshape(len(hidden), -1, hidden.shape[-1]).to(self.head.weight.device)
        place = (hidden.shape[1:-1], states.device)
        targets, flat = spread_targets(targets, self.tokenizer, *place)
        readout = Readout(self.head, kl, top_k, normed, self.backend)
        given = (states, flat, spread_alternatives(alternatives, self.tokenizer, *place), translators)
        at_once = not normed and self._checks_at_once(states)  # without a norm an infinity could leave no trace
        reading = self._read_blocks(readout, *given, check_values=not at_once)
        if at_once and not values_fit(reading.stats, states, flat, self.head.vocab_size, saturates=False):
            self._read_blocks(readout, *given, check_values=True)  # says what is wrong
        shape = hidden.shape[:-1]
        reading = reading.map(lambda value: value.view(*shape, *value.shape[2:]))
        if logits is not None:
            last = reading.stats.map(lambda value: value[-1])
            check_logits(logits, last, self.head.vocab_size, self.parity.tolerance)
        n_vocab = self.head.vocab_size
        return replace(reading, targets=targets, lens=self.name, tokenizer=self.tokenizer, vocab_size=n_vocab)

    def _states_given(self, states: Tensor | Sequence[Tensor], check_last: bool) -> tuple[Tensor, bool]:
        """The states as one tensor, and whether those of the last layer are normed already."""
        returned = isinstance(states, tuple | list)
        states = states_of(states, self.n_layers, self.d_model)
        if not returned:
            if check_last and looks_normed(states[-1], self.head, exactly=True) and self._returns_normed:
                raise InputError(
                    "states: expected the residual stream, got a last layer that looks normed already, as Transformers "
                    "returns it; pass hidden_states as the tuple that it is, or check_last=False"
                )
            return states, False
        if not self._returns_normed:
            return states, False
        if self.head.projection is not None or not looks_normed(states[-1], self.head):
            raise InputError(
                "states: expected hidden_states as this model returns them, the last one normed, got others; pass the "
                "residual stream as one tensor"
            )
        return states, True

    def _checks_at_once(self, states: Tensor) -> bool:
        """Triton is waited for once, not after every block, unless an infinity could leave no trace in the results."""
        leaves_trace = self.head.norm is not None or self.head.softcap is None
        return leaves_trace and choose_backend(states.device.type, self.backend)[0] == "triton"

    def _read_blocks(
        self,
        readout: Readout,
        states: Tensor,
        targets: Tensor | None,
        alternatives: Tensor | None,
        translators: Translators | None,
        check_values: bool,
    ) -> LayerReading:
        """`read_states` of states ``[n_layers + 1, N, d_model]``, block by block; targets ``[N]`` and ``[N, T]``."""
        n = states.shape[1]
        step = n if translators is None else rows_at_a_time(states)
        blocks = []
        for start in range(0, max(1, n), max(1, step)):
            rows = slice(start, start + step)
            block = states[:, rows]
            with self.in_own_dtype():
                block = block if translators is None else self.translated(block, translators, check_values)
                own, others = (None if ids is None else ids[rows] for ids in (targets, alternatives))
                blocks.append(self.replays(readout, block, own, others, check_values))
        return LayerReading.cat(blocks, 1)


def model_entry(loaded: LoadedModel, logit_lens: LogitLens) -> dict[str, Any]:
    """What the manifest of a lens says of its model."""
    return logit_lens.entry | {"name": loaded.name}


def fit_to_model(lens: Lens, loaded: LoadedModel, logit_lens: LogitLens) -> Lens:
    """The lens with its translators on the model's device and in its dtype.

    Raises:
        InputError: It was made for another model, or another revision of this one.
        FaultError: No memory for it.
    """
    if lens.translators is None:
        return lens
    try:
        unknown = check_made_for(lens.manifest["model"], model_entry(loaded, logit_lens), logit_lens.head.weight)
        with memory_for(f"``lens`` {lens.name}"):
            translators = logit_lens.adapted(lens.translators)
            notes = [unknown, translators.plain_layers(), lens.made_otherwise()]
            fitted: dict[str, Any] = {"translators": translators, "note": "; ".join(filter(None, notes)) or None}
            return replace(lens, **fitted)
    except InputError as error:
        raise InputError(f"``lens`` {lens.name}: {error}") from None
