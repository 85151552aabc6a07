"""Hidden states that another engine computed, in safetensors files, in the place of forward passes.

A file holds one context: ``token_ids`` ``[token]`` and ``hidden_states`` ``[row, n_layers + 1, d_model]``, layer 0 the
embedding output, layer i the output of block i, the last one before the final norm. Rows are the tokens in their order,
or those at ``positions`` ``[row]`` where a file has these. ``token_logprobs`` ``[token]``, if there, are the engine's
own log-probabilities (nats) of each token given those before; what stands first is not read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import Cache

from ..errors import InputError
from ..model.head_only import count_blocks
from ..model.hooks import difference
from ..model.loading import LoadedModel
from ..model.resid_mid import Sublayers
from .logit_lens import LogitLens
from .parity import FP32_PARITY, ROUNDINGS, looks_normed
from .prefix import PrefixReuse
from .runner import ForwardRunner, MemoryLimit, ModelInput, ModelStates

TOKENS, STATES, POSITIONS, LOGPROBS = "token_ids", "hidden_states", "positions", "token_logprobs"
NEEDED = (TOKENS, STATES)
LOOKED_AT_FILES, LOOKED_AT_ROWS = 16, 64  # of which the last layer is looked at, whether it is normed
COMPARED_ROWS = 8  # of a context, with the engine's log-probabilities: all logits of so many rows are held


def context_id(token_ids: Sequence[int]) -> str:
    """What a context is known by: the first 16 hex digits of the SHA-256 of its token ids, as text with spaces."""
    return hashlib.sha256(" ".join(map(str, token_ids)).encode()).hexdigest()[:16]


class HeadLens(LogitLens):
    """The lens of a model of which embedding, first block and head are there: it reads states, and runs no context."""

    def __init__(self, loaded: LoadedModel):
        super().__init__(loaded.model)
        if loaded.whole is None or len(self.blocks) != 1:
            raise ValueError(f"expected a model that was cut to one block, got {len(self.blocks)}")
        self._n_layers, self._config_sha256, self._name = count_blocks(loaded.whole), loaded.config_sha256, loaded.name

    @property
    def n_layers(self) -> int:
        """Number of transformer blocks of the whole model."""
        return self._n_layers

    @cached_property
    def entry(self) -> dict[str, Any]:
        """As that of the whole model, but for its weights, which are not there."""
        return super().entry | {"config_sha256": self._config_sha256, "weights_sample_sha256": None}

    def hidden(
        self,
        input_ids: Tensor,
        positions: Tensor,
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
        sublayers: Sequence[Sublayers] | None = None,
    ) -> Tensor:
        """There is none.

        Raises:
            InputError: Always.
        """
        raise InputError(
            f"``model`` {self._name}: expected one that can run, got its head alone, as of a run with ``states``; make "
            "a run without them for that"
        )

    def embedded(self, token_ids: Sequence[int], positions: Sequence[int]) -> Tensor:
        """Layer 0 of a context at some positions, ``[n_positions, d_model]``, as the checkpoint has it."""
        ids = torch.tensor([[*token_ids][: max(positions) + 1]])
        return super().hidden(ids, torch.tensor([*positions]))[0, 0]


@dataclass(frozen=True)
class _Entry:
    """What an index keeps of a file."""

    path: Path
    compared: bool  # it has log-probabilities to compare with


class StoredStates:
    """The states of a folder, read as `ForwardRunner` runs contexts: a file is found by its name or its token ids.

    A file named by the `context_id` of a context may hold further tokens behind it; any other file is that of the
    tokens it holds. The index keeps names alone.

    Args:
        folder: With the files; those in folders within are not read.
        lens: Of the model that the engine ran.

    Raises:
        InputError: No folder, a file that is none of these, has other layers or another width, or states behind the
            final norm; names the file.
    """

    def __init__(self, folder: str | Path, lens: HeadLens):
        self.lens, self.folder = lens, Path(folder)
        self.reuse, self.limit = PrefixReuse(False, "states were read from files"), MemoryLimit()
        self.chunks = None
        if not self.folder.is_dir():
            raise InputError(f"``states`` {folder}: expected a folder of safetensors files, got no folder there")
        self._named: dict[str, _Entry] = {}
        self._by_tokens: dict[str, _Entry] = {}
        self.dtypes: set[str] = set()
        last = []
        for path in sorted(self.folder.glob("*.safetensors")):
            with _opened(path) as file:
                self._check(path, file)
                tokens = file.get_tensor(TOKENS).tolist()
                entry = _Entry(path, bool(_compared_rows(file, tokens)))
                if len(last) < LOOKED_AT_FILES:
                    last.append(file.get_slice(STATES)[:LOOKED_AT_ROWS, lens.n_layers :][:, 0].float())
            self._named[path.stem] = entry
            self._by_tokens.setdefault(context_id(tokens), entry)
        if last and looks_normed(torch.cat(last).to(lens.head.weight.device), lens.head, exactly=True):
            raise self._refused("the last layer as the last block puts it out", "one that is behind the final norm")
        self._is_proven = False

    def entry(self) -> dict[str, Any]:
        """What a manifest says of the files."""
        found = list(self._named.values())
        compared = sum(one.compared for one in found)
        return {"files": len(found), "with_logprobs": compared, "dtypes": sorted(self.dtypes)}

    def has(self, token_ids: Sequence[int]) -> bool:
        """Whether there is a file for a context."""
        return self._entry(token_ids) is not None

    def run(
        self,
        inputs: Sequence[ModelInput],
        then: Callable[[list[ModelInput], Cache | None], list] = lambda batch, cache: [None] * len(batch),
        warn: Callable[[str], None] = lambda line: None,
    ) -> Iterator[ModelStates]:
        """States of contexts, in their order; see `ForwardRunner.run`.

        Raises:
            InputError: No file for a context, or one that is not of its tokens, lacks its positions, or holds
                log-probabilities that its last layer does not give; names the context.
        """
        for index, one in enumerate(inputs):
            hidden = self.states(one.ids, one.positions, one.name)
            yield ModelStates(one, index, hidden, None, 0, then([one], None)[0])

    def states(self, ids: Sequence[int], positions: Sequence[int], name: str = "") -> Tensor:
        """``[n_layers + 1, n_positions, d_model]`` of a single context, see `run`."""
        entry = self._entry(ids)
        if entry is None:
            raise self._refused(f"a file for {name or 'a context'} ({context_id(ids)})", "none")
        where = f"{name or 'a context'} ({entry.path.name})"
        with _opened(entry.path) as file:
            tokens = file.get_tensor(TOKENS).tolist()
            if tokens[: len(ids)] != list(ids):
                place = next((i for i, pair in enumerate(zip(ids, tokens, strict=False)) if len({*pair}) > 1), None)
                got = f"{len(tokens)} of them" if place is None else f"others from token {place} on"
                raise self._refused(f"the {len(ids)} token ids of {where}", got)
            places = _places(file, tokens)
            rows = {place: row for row, place in enumerate(places)}
            absent = [position for position in positions if position not in rows]
            if absent:
                raise self._refused(f"states at position {absent[0]} of {where}", f"those at {len(places)} others")
            hidden = self._rows(file, [rows[position] for position in positions]).transpose(0, 1)
            if not hidden.isfinite().all():
                raise self._refused(f"finite states of {where}", "NaN or infinity")
            if entry.compared:
                self._compare(file, tokens, where)
        if not self._is_proven:
            self._prove_embedding(hidden[0], ids, positions, where)
        return hidden.to(self.lens.head.weight).contiguous()

    def _entry(self, token_ids: Sequence[int]) -> _Entry | None:
        id = context_id(token_ids)
        return self._named.get(id) or self._by_tokens.get(id)

    def _check(self, path: Path, file: Any) -> None:
        """Refuse a file without the tensors that are read, or with others of that name."""
        names, n_layers, d_model = set(file.keys()), self.lens.n_layers, self.lens.d_model
        if not names.issuperset(NEEDED):
            raise self._refused(f"{' and '.join(NEEDED)} in {path.name}", ", ".join(sorted(names)) or "nothing")
        shape, n_tokens = file.get_slice(STATES).get_shape(), file.get_slice(TOKENS).get_shape()
        if len(shape) == 3 and shape[2] == d_model and shape[1] != n_layers + 1:
            raise self._refused(
                f"{n_layers + 1} layers in {path.name}, the embedding output and that of {n_layers} blocks",
                f"{shape[1]}; extract layers 0 to {n_layers}",
            )
        n_rows = file.get_slice(POSITIONS).get_shape() if POSITIONS in names else n_tokens
        for name in (TOKENS, POSITIONS):
            if name in names and (len(file.get_slice(name).get_shape()) != 1 or not _holds_whole_numbers(file, name)):
                raise self._refused(f"{name} in {path.name} as a row of whole numbers", "others")
        if len(n_tokens) != 1 or shape != [*n_rows, n_layers + 1, d_model]:
            wanted = [*n_rows, n_layers + 1, d_model]
            raise self._refused(f"{STATES} {wanted} in {path.name}", f"{shape} of {TOKENS} {n_tokens}")
        own, dtype = self.lens.head.weight.dtype, file.get_slice(STATES)[:0].dtype
        if not dtype.is_floating_point or (own != torch.float32 and own != dtype):
            raise self._refused(
                f"states in {path.name} that fit {own}, in which the head is", f"{dtype}; use ``dtype='float32'``"
            )
        self.dtypes.add(str(dtype).removeprefix("torch."))
        self._check_further(path, file, n_tokens[0])

    def _check_further(self, path: Path, file: Any, n_tokens: int) -> None:
        """Refuse tensors that need not be there, of another shape or with other values than they may have."""
        names = set(file.keys())
        places = file.get_tensor(POSITIONS).tolist() if POSITIONS in names else []
        if places and not 0 <= min(places) <= max(places) < n_tokens:
            got = f"{min(places)} to {max(places)}"
            raise self._refused(f"{POSITIONS} from 0 to {n_tokens - 1} in {path.name}", got)
        if len({*places}) != len(places):
            raise self._refused(f"each of {POSITIONS} once in {path.name}", "some twice")
        if LOGPROBS in names and file.get_slice(LOGPROBS).get_shape() != [n_tokens]:
            got = file.get_slice(LOGPROBS).get_shape()
            raise self._refused(f"{LOGPROBS} [{n_tokens}] in {path.name}, a number a token", got)

    def _rows(self, file: Any, rows: Sequence[int]) -> Tensor:
        """``[n_rows, n_layers + 1, d_model]`` in the dtype of the file, which is read between them alone."""
        first, end = min(rows), max(rows) + 1
        return file.get_slice(STATES)[first:end][[row - first for row in rows]]

    def _prove_embedding(self, states: Tensor, ids: Sequence[int], positions: Sequence[int], where: str) -> None:
        """Hold layer 0 of the first context that is read against the checkpoint's own embedding.

        Raises:
            InputError: They differ by more than `_tolerance` of the largest number.
        """
        own = self.lens.embedded(ids, positions).cpu().float()
        found, allowed = difference(states[None].float(), own[None]), _tolerance(states.dtype)
        if found > allowed:
            raise self._refused(
                f"layer 0 of {where} to be the embedding that ``model`` has of its tokens",
                f"a difference of {found:.2g} of the largest number, allowed {allowed:.2g}; extract layers 0 to "
                f"{self.lens.n_layers}, in order, of that model, and keep the dtype that it ran in",
            )
        self._is_proven = True

    def _compare(self, file: Any, tokens: list[int], where: str) -> None:
        """Hold what the last layer gives to tokens of a context against the engine's own log-probabilities.

        The engine rounds normed state and logits in its dtype. A log-probability is the difference of two logits, each
        rounded by half an epsilon of its size: of both together, an epsilon of the logit range. As much is left for the
        rounding of the normed state, which makes `_tolerance` of the range, as for the parity gate.

        Raises:
            InputError: They differ by more.
        """
        places, device = _places(file, tokens), self.lens.head.weight.device
        rows = _compared_rows(file, tokens)
        following = torch.tensor([places[row] + 1 for row in rows])
        last = file.get_slice(STATES)[min(rows) : max(rows) + 1, self.lens.n_layers :][[r - min(rows) for r in rows], 0]
        dtype = last.dtype
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            logits = self.lens.head.logits(last.to(self.lens.head.weight)).cpu()
        own = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[following, None])[:, 0]
        found = (own - file.get_tensor(LOGPROBS)[following].float()).abs()
        allowed = _tolerance(dtype) * (logits.amax(-1) - logits.amin(-1))
        worst = int((found - allowed).nan_to_num(torch.inf).argmax())
        if not bool((found <= allowed).all()):
            raise self._refused(
                f"the last layer of {where} to give token {int(following[worst])} the engine's log-probability within "
                f"{float(allowed[worst]):.2g} nats",
                f"a difference of {float(found[worst]):.3g}; extract layer {self.lens.n_layers} before the final norm, "
                "of the model that ``model`` names",
            )

    def _refused(self, expected: str, got: object) -> InputError:
        return InputError(f"``states`` {self.folder}: expected {expected}, got {got}")


Runner = ForwardRunner | StoredStates  # what gives the states of contexts


def _opened(path: Path) -> Any:
    """The file, whose tensors are read when they are asked for.

    Raises:
        InputError: It is no safetensors file, or not a whole one.
    """
    try:
        return safe_open(path, "pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"``states`` {path}: expected a whole safetensors file, got: {error}") from None


def _holds_whole_numbers(file: Any, name: str) -> bool:
    dtype = file.get_slice(name)[:0].dtype
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def _places(file: Any, tokens: list[int]) -> Sequence[int]:
    """The position of each row."""
    return file.get_tensor(POSITIONS).tolist() if POSITIONS in file.keys() else range(len(tokens))  # noqa: SIM118


def _compared_rows(file: Any, tokens: list[int]) -> list[int]:
    """The last rows whose next token the engine gives a log-probability, ascending; none where it gives none."""
    if LOGPROBS not in file.keys():  # noqa: SIM118 - no mapping
        return []
    given, places = file.get_tensor(LOGPROBS), _places(file, tokens)
    last_first = range(len(places) - 1, -1, -1)
    fits = (r for r in last_first if places[r] + 1 < len(tokens) and given[places[r] + 1].isfinite())
    return sorted(islice(fits, COMPARED_ROWS))


def _tolerance(dtype: torch.dtype) -> float:
    """As of the parity gate: what states of this dtype may be off by, as a share of the largest, by rounding alone."""
    return FP32_PARITY if dtype == torch.float32 else ROUNDINGS * torch.finfo(dtype).eps
