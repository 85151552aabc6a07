"""Writes the parts of a run while its questions are asked, and keeps the manifest true after each."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyarrow as pa

from ..machine import now
from ..store.folder import FolderWriter
from ..store.layers import LayersFolder
from ..store.results import LAYERS, Part, QuestionResult, Run, write_rows


@dataclass
class _Open:
    """The part that is being filled."""

    first: int  # 0-based place of its first question among those drawn
    written: int  # place behind its last question that an earlier file holds
    done: int  # place behind its last question so far
    end: int  # place behind its last question once it is whole
    rows: list[pa.Table]
    counts: Counter[str]
    left_out: dict[str, list[int]]


class RunWriter(FolderWriter):
    """Writes one run, which it has the lock of.

    A part that an interrupt cut short has a name of its own, and gives way to the whole one after the manifest names
    that.

    A new folder gets its manifest at once, so that it can be resumed from then on. A run that is to be overwritten
    stays until the first part with rows lies beside it: whatever fails before leaves everything as it was.
    """

    def __init__(self, run: Run, manifest: dict, resumed: bool = False):
        super().__init__(run, manifest)
        self.run = run
        self._parts = {part.first: part for part in run.parts_of(manifest)}  # by their first question
        self._sums = Counter(done=0, rows=0)  # of the counts of all parts
        for part in self._parts.values():
            self._sums.update(_counts(part))
        self._open: _Open | None = None
        self._resumed = resumed
        self._replaced: list[Path] = []  # files that the next manifest no longer names
        if resumed or not run.exists:
            self.place()

    @property
    def has_rows(self) -> bool:
        """Whether a part with rows is written."""
        return self._sums["rows"] > 0

    @property
    def done(self) -> int:
        """Questions in the parts, the one that is being filled included."""
        return self._sums["done"] + (self._open.done - self._open.written if self._open else 0)

    @property
    def left_out(self) -> dict[str, list[int]]:
        """Questions of the parts that could not be asked, as reason: ids."""
        left_out: dict[str, list[int]] = {}
        for part in self._in_order:
            for reason, ids in part.left_out.items():
                left_out.setdefault(reason, []).extend(ids)
        return left_out

    @property
    def _in_order(self) -> list[Part]:
        return [self._parts[first] for first in sorted(self._parts)]

    def missing(self) -> list[int]:
        """Places of the questions that no part holds, in order."""
        size, n = self.manifest["questions_per_part"], self.manifest["counts"]["questions"]
        places: list[int] = []
        for first in range(0, n, size):
            part = self._parts.get(first)
            places += range(part.questions[1] if part else first, min(first + size, n))
        return places

    def add(self, place: int, outcome: QuestionResult) -> None:
        """Take all that came of the question at the next of the missing places."""
        begun = self._open or self._begun(place)
        if place != begun.done:
            raise ValueError(f"expected the question at place {begun.done}, got {place}")
        self._open = begun
        begun.rows.append(outcome.rows)
        begun.counts.update(outcome.counts)
        for reason, ids in outcome.left_out.items():
            begun.left_out.setdefault(reason, []).extend(ids)
        self.manifest |= outcome.notes
        begun.done += 1
        if begun.done == begun.end:
            self._write_part()
            self._save("running")

    def close(self, status: str) -> None:
        """Write what is left and the status; a new run without rows goes, and a failed one replaces no other."""
        if self._open and (self.is_placed or status != "failed"):
            self._write_part()
        self._open = None
        if self.has_rows or (self._resumed and status != "finished"):
            self._save(status)
        elif self.is_placed:
            self.withdraw()

    def give_up(self) -> None:
        """After a failed write: let go of what was not written and, if there is room, close the rest."""
        self._open = None
        with suppress(OSError):
            self.close("failed")

    def place(self) -> None:
        """As `FolderWriter.place`; an analysis of the run that this one replaces goes with it."""
        if not self.is_placed:
            super().place()
            if not any(part.file for part in self._parts.values()):
                LayersFolder(self.run.path / LAYERS).remove_unless_of(self.manifest["run_id"])

    def _begun(self, place: int) -> _Open:
        """The part that a question belongs to: a new one, or one that an interrupt cut short, to be filled further."""
        size, n = self.manifest["questions_per_part"], self.manifest["counts"]["questions"]
        first = place - place % size
        part = self._parts.get(first) or Part(None, (first, first), 0, None)
        rows, done = [self.run.read_part(part)] if part.file else [], part.questions[1]
        left_out = {reason: list(ids) for reason, ids in part.left_out.items()}
        return _Open(first, done, done, min(first + size, n), rows, Counter(part.counts), left_out)

    def _write_part(self) -> None:
        begun, self._open = self._open, None
        path, file, sha256 = self.run.part_path(begun.first // self.manifest["questions_per_part"]), None, None
        if begun.done < begun.end:
            path = path.with_stem(f"{path.stem}-first-{begun.done - begun.first}")
        n_rows = sum(map(len, begun.rows))
        if n_rows:
            file, sha256 = path.name, self.write(path, partial(write_rows, begun.rows))
        part = Part(file, (begun.first, begun.done), n_rows, sha256, dict(begun.counts), begun.left_out)
        shorter = self._parts.get(begun.first)
        if shorter:
            self._sums.subtract(_counts(shorter))
            self._replaced += [self.run.parts_path / shorter.file] if shorter.file else []
        self._parts[begun.first] = part
        self._sums.update(_counts(part))

    def _save(self, status: str) -> None:
        if self.is_placed:
            counts = self.manifest["counts"] | {**self._sums, "left_out": self.left_out}
            parts = [vars(part) for part in self._in_order]
            finished = None if status == "running" else now()
            self.save(status=status, finished=finished, parts=parts, counts=counts)
            while self._replaced:
                self._replaced.pop().unlink(missing_ok=True)


def _counts(part: Part) -> dict[str, int]:
    """What the manifest adds up over the parts."""
    return part.counts | {"done": part.questions[1] - part.first, "rows": part.rows}
