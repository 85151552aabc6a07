"""The manifest of a run: everything needed to repeat it, and what must be as it was when a run goes on."""

from __future__ import annotations

import platform
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..config import SweepConfig
from ..data.questions import QA
from ..machine import device_name, working_folder
from ..store.folder import MadeOf, process_entry
from ..store.results import SCHEMA_VERSION

if TYPE_CHECKING:
    from ..data.prompts import Chat, Template
    from ..data.tasks import Task
    from ..lens.files import Lens
    from ..lens.logit_lens import LogitLens
    from ..model.loading import LoadedModel

WORDS = {"tiny", "smollm2", "builtin", "nq", "kv", "plain", *QA.templates}  # of options, which name no file


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
    from ..op.backends import choose_backend

    device = loaded.model.device
    return {
        "schema_version": SCHEMA_VERSION,
        **process_entry(argv),
        "run_id": uuid.uuid4().hex,  # tells two runs in one folder apart
        "status": "running",
        "arguments": arguments,
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
            "vocab_size": logit_lens.head.vocab_size,
            "max_tokens": loaded.max_tokens,
            "end_ids": sorted(loaded.end_ids) if arguments["generate"] else None,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "device": device.type,
            "device_name": device_name(device.type),
            "backend": choose_backend(device.type, logit_lens.backend)[0],
            "norm": None if logit_lens.head.norm is None else type(logit_lens.head.norm).__name__,
            "projection": None if logit_lens.head.projection is None else list(logit_lens.head.projection.shape),
            "softcap": logit_lens.head.softcap,
            "logit_scale": logit_lens.head.scale,
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
        "platform": platform.platform(),
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
    return process_entry(argv) | {"workers": workers, "device_name": device_name(device_type)}


@dataclass(frozen=True)
class RunSpec(MadeOf):
    """What a run was made of, its options among it."""

    @property
    def options(self) -> SweepConfig:
        """The options that the run was made with; files and folders are found from any folder."""
        values = dict(self.manifest["arguments"])
        for name in ("model", "task", "template"):
            values[name] = self._from_here(values[name])
        return SweepConfig(**values | {"lens": list(map(self._from_here, values["lens"]))})

    def _from_here(self, name: str) -> str:
        """A relative path of the run as it is from here; anything else, and what is not there, as it was given."""
        folder = self.manifest.get("folder")
        if folder in (None, working_folder()) or name in WORDS or Path(name).is_absolute():
            return name
        there = Path(folder) / name
        return str(there) if there.exists() else name

    @property
    def chat(self) -> Chat:
        """The text around the prompts of a run that has one."""
        from ..data.prompts import Chat

        return Chat(**self.manifest["chat"])
