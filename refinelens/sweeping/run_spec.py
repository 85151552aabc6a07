"""What a run was made of, as its manifest says: whoever goes on with it, or reads it, is held to that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import GENERATED_SETTLE, SweepConfig
from ..data.generated import GENERATORS
from ..data.questions import QA
from ..data.tasks import CUES
from ..data.texts import load_text
from ..machine import working_folder
from ..store.folder import MadeOf

# Of options, which name no file.
WORDS = {"tiny", "smollm2", "builtin", CUES, "nq", *GENERATORS, "plain", "auto", *QA.templates}


@dataclass(frozen=True)
class RunSpec(MadeOf):
    """What a run was made of, its options among it."""

    @property
    def options(self) -> SweepConfig:
        """The options that the run was made with; files and folders are found from any folder."""
        values = dict(self.manifest["arguments"])
        for name in ("model", "task", "template", "frequencies", "device_map", "states"):
            values[name] = values.get(name) and self._from_here(values[name])
        return SweepConfig(**values | {"lens": list(map(self._from_here, values["lens"]))})

    @property
    def chunk_tokens(self) -> int:
        """Of a chunk, in which its long contexts ran; 0 where all ran in one pass, as before there were chunks."""
        refused = self.manifest.get("chunked_prefill", {}).get("used") is False
        return 0 if refused else self.manifest.get("chunk_tokens", 0)

    def _from_here(self, name: str) -> str:
        """A relative path of the run as it is from here; anything else, and what is not there, as it was given."""
        folder = self.manifest.get("folder")
        if folder in (None, working_folder()) or name in WORDS or Path(name).is_absolute():
            return name
        there = Path(folder) / name
        return str(there) if there.exists() else name

    def check_columns(self) -> None:
        """Refuse to go on where further columns would be others from here on.

        Raises:
            InputError: Another text that tokens are counted in, or a run of before, which lacks a column.
        """
        options = self.options
        if GENERATED_SETTLE in options.extras:
            self.require("extras", list(options.extras))
        if options.frequencies is not None:
            self.require("frequencies.sha256", load_text(options.frequencies, "frequencies").sha256)
