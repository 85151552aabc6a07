"""The manifest of a run: everything needed to repeat it."""

from __future__ import annotations

import platform
import sys
import uuid
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from .. import __version__
from ..lenses.lens_files import Lens
from ..lenses.logit_lens import LogitLens
from ..model.loading import LoadedModel
from ..op.backends import choose_backend
from ..prompts.context import Template
from ..runs.results import SCHEMA_VERSION
from ..tasks.task import Task

PACKAGES = ("torch", "transformers", "triton", "tokenizers", "numpy", "scipy", "pyarrow", "matplotlib", "gguf")


def now() -> str:
    """Current time, UTC, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def device_name(device_type: str) -> str:
    """The name of the GPU or of the processor."""
    if device_type == "cuda":
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_manifest(
    arguments: dict,
    argv: list[str] | None,
    task: Task,
    template: Template,
    loaded: LoadedModel,
    logit_lens: LogitLens,
    lenses: list[Lens],
    n_questions: int,
    questions_per_part: int,
    workers: int,
) -> dict:
    """The manifest of a run that starts now; parts, counts, status and times follow while it goes on."""
    device = loaded.model.device
    return {
        "schema_version": SCHEMA_VERSION,
        "refinelens_version": __version__,
        "run_id": uuid.uuid4().hex,  # tells two runs in one folder apart
        "status": "running",
        "arguments": arguments,
        "argv": argv,
        "seed": arguments["seed"],
        "model": {
            "name": loaded.name,
            "class": type(loaded.model).__name__,
            "config_sha256": loaded.config_sha256,
            "weights_sha256": loaded.weights_sha256,
            "weights_sample_sha256": loaded.weights_sample_sha256,
            "tokenizer_sha256": loaded.tokenizer_sha256,
            "unused_weights": list(loaded.unused_weights),
            "n_layers": logit_lens.n_layers,
            "d_model": logit_lens.d_model,
            "vocab_size": logit_lens.parts.unembedding.shape[0],
            "max_tokens": loaded.max_tokens,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": device.type,
            "device_name": device_name(device.type),
            "backend": choose_backend(device.type, logit_lens.backend)[0],
            "norm": None if logit_lens.parts.norm is None else type(logit_lens.parts.norm).__name__,
            "projection": None if logit_lens.parts.projection is None else list(logit_lens.parts.projection.shape),
            "softcap": logit_lens.parts.softcap,
            "logit_scale": logit_lens.parts.logit_scale,
            "parity": asdict(logit_lens.parity),
        },
        "task": {
            "name": task.name,
            "path": None if task.path is None else str(task.path),
            "format": task.format.name,
            "sha256": task.sha256,
            "questions": len(task.questions),
        },
        "lenses": [lens.entry() for lens in lenses],
        "template": template.text,
        "closed_book_template": template.format.closed_book,
        "chat": None if template.chat is None else asdict(template.chat),
        "packages": packages(),
        "platform": platform.platform(),
        "started": now(),
        "finished": None,
        "seconds": None,
        "workers": workers,
        "resumed": [],
        "counts": {"questions": n_questions, "done": 0, "left_out": {}},
        "questions_per_part": questions_per_part,
        "parts": [],
    }


def resumed_entry(argv: list[str] | None, device_type: str, workers: int) -> dict:
    """What the manifest of a run says of a process that goes on with it."""
    return {
        "started": now(),
        "argv": argv,
        "workers": workers,
        "refinelens_version": __version__,
        "packages": packages(),
        "device_name": device_name(device_type),
    }


@cache
def packages() -> dict[str, str | None]:
    """Versions of Python and of what the numbers of a run depend on."""
    return {"python": sys.version.split()[0]} | {package: package_version(package) for package in PACKAGES}


def package_version(package: str) -> str | None:
    """Of an installed package; None if there is none of that name, also where another one brings the module."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
