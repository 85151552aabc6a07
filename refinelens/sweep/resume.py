"""What a run that is gone on with has, and what must be as it was. No torch, no model."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import InputError
from ..machine import working_folder
from ..options import SweepOptions
from ..prompts.chat import Chat
from ..runs.results import Part, Run, open_run, parts_of
from ..tasks.formats import QA

WORDS = {"tiny", "smollm2", "builtin", "nq", "kv", "plain", *QA.templates}  # of options, which name no file


@dataclass(frozen=True)
class Terms:
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
        return Chat(**self.manifest["chat"])


@dataclass(frozen=True)
class Unfinished:
    """A run as it lies on the disk; damaged parts are as good as absent."""

    run: Run
    manifest: dict
    parts: tuple[Part, ...]  # as they were written
    damaged: tuple[str, ...]  # one line per other part

    @classmethod
    def read(cls, path: str | Path) -> Unfinished:
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
    def terms(self) -> Terms:
        """What the run was made of."""
        return Terms(self.run.path, self.manifest, "--resume")

    @property
    def has_rows(self) -> bool:
        """Whether a whole part has any."""
        return any(part.rows for part in self.parts)

    def goes_on(self, entry: dict) -> dict:
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
