"""The manifest of a run: everything needed to repeat it, and what must be as it was when a run goes on."""

from __future__ import annotations

import hashlib
import platform
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from .. import __version__
from ..config import SweepOptions
from ..data.questions import QA
from ..errors import InputError
from ..machine import device_name, now, packages, working_folder
from ..store.results import SCHEMA_VERSION, Part, Run, open_run, parts_of

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


@dataclass(frozen=True)
class RunSpec:
    """What a run was made of: whoever goes on with it is held to that."""

    path: Path  # of the run
    manifest: dict
    command: str  # that holds to it, as its errors begin

    def require(self, field: str, here: object) -> None:
        """Refuse what is no longer as the manifest says.

        Args:
            field: Its place in the manifest, such as ``model.weights_sha256``.
            here: What was found now.

        Raises:
            InputError: Names the field and both values.
        """
        there = self.manifest
        for key in field.split("."):
            there = there[int(key) if isinstance(there, list) else key]
        if there != here:
            raise InputError(
                f"{self.command} {self.path}: expected {field} {_short(there)}, as the run has it, got {_short(here)}; "
                "bring that back, or make another run"
            )

    @property
    def options(self) -> SweepOptions:
        """The options that the run was made with; files and folders are found from any folder."""
        values = {n: tuple(v) if isinstance(v, list) else v for n, v in self.manifest["arguments"].items()}
        for name in ("model", "task", "template"):
            values[name] = self._from_here(values[name])
        return SweepOptions(**values | {"lens": tuple(map(self._from_here, values["lens"]))})

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


@dataclass(frozen=True)
class RunState:
    """A run as it lies on the disk; damaged parts are as good as absent."""

    run: Run
    manifest: dict
    parts: tuple[Part, ...]  # as they were written
    damaged: tuple[str, ...]  # one line per other part

    @classmethod
    def read(cls, path: str | Path) -> RunState:
        """Read a run and compare every checksum.

        Raises:
            InputError: The folder does not hold a run, or one of another schema version.
        """
        run = open_run(path)
        manifest, whole, damaged = run.manifest, [], []
        for part in parts_of(manifest):
            try:
                if part.file is not None:
                    run.read_part(part, ["question_id"])
                whole.append(part)
            except InputError as error:
                damaged.append(str(error))
        return cls(run, manifest, tuple(whole), tuple(damaged))

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to ask."""
        return self.manifest["status"] == "finished" and not self.damaged

    @property
    def spec(self) -> RunSpec:
        """What the run was made of."""
        return RunSpec(self.run.path, self.manifest, "--resume")

    @property
    def has_rows(self) -> bool:
        """Whether a whole part has any."""
        return any(part.rows for part in self.parts)

    def resume_manifest(self, entry: dict) -> dict:
        """The manifest to go on with: the whole parts, and ``entry`` for the process that does."""
        parts = [asdict(part) for part in self.parts]
        resumed = [*self.manifest["resumed"], entry]
        return self.manifest | {"status": "running", "finished": None, "parts": parts, "resumed": resumed}


def _short(value: object) -> str:
    """A value on one line; of a longer text its hash."""
    text = str(value)
    if len(text) > 64 or "\n" in text:
        return f"with sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text[:12] if len(text) == 64 else text
