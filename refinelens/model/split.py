"""Models that lie in several places: over GPUs, in the memory of the CPU, on disk; accelerate moves what is needed.

Its hooks run around every module. A weight that is not in memory is on the meta device, and is read here from where it
is kept; whether a model that is split computes what it computes in one piece is found out where that fits.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import os
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import InputError, UnsupportedModelError
from .hooks import difference, input_device, keep_positions, probe_ids, run_base

AUTO = "auto"
MEMORY = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B)")
OF_ACCELERATE = ("_hf_hook", "_old_forward", "forward")  # what it puts upon a module
TOLERANCE = {torch.float32: 1e-3}  # difference from the whole model, as a share of the token's largest number
ROUNDINGS = 16  # of half precision, whose rounding differs between devices and adds up over layers


def check_split(device_map: str | None, max_memory: str | None) -> tuple[Any, dict | None]:
    """What Transformers takes for these options: the map, ``auto`` or by module, and the memory by device.

    Raises:
        InputError: No such file or map, memory that is none, or no accelerate.
    """
    if device_map is None:
        if max_memory is not None:
            raise InputError("``max_memory``: expected ``device_map``, which it limits, beside it, got none")
        return None, None
    if importlib.util.find_spec("accelerate") is None:
        raise InputError("``device_map``: expected the package accelerate, got none; pip install accelerate")
    if device_map != AUTO:
        if max_memory is not None:
            raise InputError("``max_memory``: expected ``device_map='auto'``, which it limits, got a map of your own")
        return _map_of(device_map), None
    if max_memory is None:
        return AUTO, None
    limits: dict[int | str, int] = {}
    given: set[str] = set()
    for entry in max_memory.split(","):
        place, _, size = (word.strip() for word in entry.partition("="))
        if not (place.isdecimal() or place == "cpu") or not MEMORY.fullmatch(size):
            raise InputError(f"``max_memory``: expected DEVICE=SIZE such as 0=20GiB,cpu=60GiB, got {entry!r}")
        if place.isdecimal() and int(place) >= torch.cuda.device_count():
            raise InputError(f"``max_memory``: expected cpu or a GPU that is there, got {entry!r}")
        if place in given:
            raise InputError(f"``max_memory``: expected each device once, got {place} twice")
        given.add(place)
        limits[int(place) if place.isdecimal() else place] = n_bytes_of(size)
    return AUTO, limits


def n_bytes_of(size: str) -> int:
    """Bytes of a size such as ``20GiB`` or ``1.5 GB``."""
    number, unit = MEMORY.fullmatch(size).groups()  # type: ignore[union-attr]
    return int(float(number) * (1024 if "i" in unit else 1000) ** (1 + "KMGT".index(unit[0])))


def _map_of(file: str) -> dict[str, int | str]:
    expected = f"``device_map`` {file}: expected auto or a JSON file of devices by module, such as "
    example = '{"model.layers.0": 0, "lm_head": "cpu"}'
    try:
        found = json.loads(Path(file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{expected}{example}, got: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{expected}{example}, got: {error}") from None
    if not isinstance(found, dict) or not found:
        raise InputError(f"{expected}{example}, got {found!r:.80}")
    for name, place in found.items():
        number = re.fullmatch(r"(?:cuda:)?(\d+)", str(place))
        if place not in ("cpu", "disk") and (number is None or int(number[1]) >= torch.cuda.device_count()):
            words = f"expected cpu, disk or a GPU that is there for {name or 'all'}, got {place!r}"
            raise InputError(f"``device_map`` {file}: {words}")
        found[name] = place if number is None else int(number[1])
    return found


def check_names(device_map: dict, model: nn.Module, file: str | None) -> None:
    """Refuse a map that names what the model does not have, or leaves out what it has.

    Args:
        device_map: Devices by module.
        model: Without weights, say.
        file: That holds the map, for errors.

    Raises:
        InputError: Names the first module.
    """
    names = {name for name, _ in model.named_modules()} | {name for name, _ in model.named_parameters()}
    unknown = next((name for name in device_map if name not in names), None)
    if unknown is not None:
        some = ", ".join(name for name, module in model.named_children())
        raise InputError(f"``device_map`` {file}: expected modules of {type(model).__name__} ({some}), got {unknown}")
    tied: dict[int, tuple[str, object]] = {}  # the first name of a weight, and where it goes
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parts = [part for part in device_map if part in ("", name) or name.startswith(f"{part}.")]
        if not parts:
            raise InputError(f"``device_map`` {file}: expected a device for every module, got none for {name}")
        place = device_map[max(parts, key=len)]
        first, other = tied.setdefault(id(parameter), (name, place))
        if place != other:
            raise InputError(
                f"``device_map`` {file}: expected one device for {name} and {first}, which are one weight, got {place} "
                f"and {other}"
            )


def is_split(model: nn.Module) -> bool:
    """Whether accelerate moves its states or weights from place to place."""
    places = getattr(model, "hf_device_map", None)
    return bool(places) and (len({*places.values()}) > 1 or is_offloaded(model))


def is_offloaded(model: nn.Module) -> bool:
    """Whether weights are loaded when they are needed."""
    return any(weight.is_meta for weight in model.parameters())


def stored(module: nn.Module, name: str) -> Tensor | None:
    """A parameter or buffer of a module, read from where it is kept if it is not in memory.

    Raises:
        UnsupportedModelError: It is nowhere.
    """
    value = getattr(module, name)
    if value is None or not value.is_meta:
        return value
    hook: Any = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", [hook]):
        if getattr(one, "weights_map", None) is not None:
            device = one.execution_device if one.execution_device is not None else "cpu"
            return one.weights_map[name].to(device=device, dtype=value.dtype)
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected weights that accelerate has put away, got {name} without any; load the "
        "model with its weights"
    )


def in_memory(module: nn.Module) -> nn.Module:
    """A module without children as it is by itself: no hook of accelerate, its tensors where it computes."""
    if not hasattr(module, "_hf_hook"):
        return module
    own = copy.copy(module)
    own.__dict__ = {name: value for name, value in module.__dict__.items() if name not in OF_ACCELERATE}
    for kind in ("_parameters", "_buffers"):
        names = [name for name, value in getattr(module, kind).items() if value is not None]
        tensors: dict[str, Any] = {name: stored(module, name) for name in names}
        if kind == "_parameters":
            tensors = {name: nn.Parameter(value, requires_grad=False) for name, value in tensors.items()}
        own.__dict__[kind] = tensors | {name: None for name in getattr(module, kind) if name not in tensors}
    return own


def places(model: PreTrainedModel) -> dict[str, str] | None:
    """Where the parts of a split model lie, by module; None of a whole one."""
    if not is_split(model):
        return None
    return {name: str(place) for name, place in model.hf_device_map.items()}


def n_bytes(model: nn.Module) -> int:
    """Of all weights, wherever they lie."""
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def memory_left(limit: dict | None) -> int:
    """Bytes of the CPU's memory that are free, at most what ``max_memory`` allows."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    return min(free, limit["cpu"]) if limit and "cpu" in limit else free


def compare_with_whole(
    model: PreTrainedModel, blocks: nn.ModuleList, whole: PreTrainedModel, whole_blocks: nn.ModuleList
) -> float:
    """The largest difference of any state from that of the same model in one piece, on a CPU.

    Of every layer and token by itself: one token may be a thousand times as large as all others.

    Args:
        model: That is split.
        blocks: Its own.
        whole: The same in one piece.
        whole_blocks: Its own.

    Raises:
        UnsupportedModelError: Names the first layer that differs by more than rounding.
    """
    kept = []
    for one, parts in ((model, blocks), (whole, whole_blocks)):
        ids = probe_ids(one)
        with keep_positions(one, parts, torch.arange(ids.shape[1])[None], ids.shape[1]) as states:
            run_base(one, ids.to(input_device(one)))
        kept.append([state.cpu() for state in states])
    allowed = TOLERANCE.get(kept[0][0].dtype, ROUNDINGS * torch.finfo(kept[0][0].dtype).eps)
    found = [difference(a[0], b[0]) for a, b in zip(*kept, strict=True)]  # the rows of a layer are its tokens
    for layer, share in enumerate(found):
        if share > allowed:
            raise UnsupportedModelError(
                f"{type(model).__name__}: expected the states of the whole model from its parts in several places, got "
                f"others from layer {layer} on, by {share:.2g} of a token's state, where {allowed:.2g} is allowed; use "
                "another ``device_map``"
            )
    return max(found)
