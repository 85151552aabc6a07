"""The manifest of a run: everything needed to repeat it."""

from __future__ import annotations

import platform
import uuid
from dataclasses import asdict

from .. import __version__
from ..lenses.lens_files import Lens
from ..lenses.logit_lens import LogitLens
from ..machine import device_name, now, packages, working_folder
from ..model.loading import LoadedModel
from ..op.backends import choose_backend
from ..prompts.context import Template
from ..runs.results import SCHEMA_VERSION
from ..tasks.task import Task


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
    remarks: list[str],
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
        "folder": working_folder(),  # that relative paths among the arguments start from
        "remarks": remarks,
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
            "end_ids": sorted(loaded.end_ids) if arguments["generate"] else None,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": device.type,
            "device_name": device_name(device.type),
            "backend": choose_backend(device.type, logit_lens.backend)[0],
            "norm": None if logit_lens.parts.norm is None else type(logit_lens.parts.norm).__name__,
            "projection": None if logit_lens.parts.projection is None else list(logit_lens.parts.projection.shape),
            "softcap": logit_lens.parts.softcap,
            "logit_scale": logit_lens.parts.logit_scale,
            "parity": asdict(logit_lens.parity),
            "one_at_a_time": logit_lens.independence.one_at_a_time,
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
