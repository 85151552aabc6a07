"""Writes the parts of a run while its questions are asked, and keeps the manifest true after each."""

from __future__ import annotations

import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pyarrow as pa

from ..errors import FaultError
from ..machine import now
from ..store.folder import sha256_of, sync_folder, temporary_of, write_temporary
from ..store.layers import LayersFolder
from ..store.results import DERIVED, LAYERS, MANIFEST, OUTPUTS, Part, QuestionResult, Run, parts_of, write_rows


@dataclass
class _Open:
    """The part that is being filled."""

    index: int
    first: int  # 0-based place of its first question among those drawn
    written: int  # place behind its last question that an earlier file holds
    done: int  # place behind its last question so far
    end: int  # place behind its last question once it is whole
    rows: list[pa.Table] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    left_out: dict[str, list[int]] = field(default_factory=dict)


class RunWriter:
    """Writes one run, which it has the lock of.

    A part is written and flushed under a temporary name, renamed, and only then named by the manifest; no file that
    the manifest names is ever written to. A part that an interrupt cut short has a name of its own, and gives way to
    the whole one after the manifest names that.

    A new folder gets its manifest at once, so that it can be resumed from then on. A run that is to be overwritten
    stays until the first part with rows lies beside it: whatever fails before leaves everything as it was.
    """

    def __init__(self, run: Run, manifest: dict, resumed: bool = False):
        self.run = run
        self._manifest = manifest
        self._parts = {part.questions[0]: part for part in parts_of(manifest)}  # by their first question
        self._sums = Counter(done=0, rows=0)  # of the counts of all parts
        for part in self._parts.values():
            self._sums.update(_counts(part))
        self._open: _Open | None = None
        self._resumed = resumed
        self._replaced: list[Path] = []  # files that the next manifest no longer names
        self._written: tuple | None = None  # what the file system says of the manifest once it is this run's
        self._seconds, self._started = manifest["seconds"] or 0.0, time.monotonic()
        self._remove_temporary()
        if resumed or not (run.path / MANIFEST).exists():
            self._place()

    @property
    def can_be_resumed(self) -> bool:
        """Whether the folder is this run."""
        return self._written is not None

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
        size, n = self._manifest["questions_per_part"], self._manifest["counts"]["questions"]
        places: list[int] = []
        for first in range(0, n, size):
            part = self._parts.get(first)
            places += range(part.questions[1] if part else first, min(first + size, n))
        return places

    def add(self, place: int, outcome: QuestionResult) -> None:
        """Take all that came of the question at the next of the missing places."""
        begun = self._open = self._open or self._begun(place)
        if place != begun.done:
            raise ValueError(f"expected the question at place {begun.done}, got {place}")
        begun.rows.append(outcome.rows)
        begun.counts.update(outcome.counts)
        for reason, ids in outcome.left_out.items():
            begun.left_out.setdefault(reason, []).extend(ids)
        self._manifest |= outcome.notes
        begun.done += 1
        if begun.done == begun.end:
            self._write_part()
            self._write_manifest("running")

    def close(self, status: str) -> None:
        """Write what is left and the status; a new run without rows goes, and a failed one replaces no other."""
        if self._open and (self.can_be_resumed or status != "failed"):
            self._write_part()
        self._open = None
        if self.has_rows or (self._resumed and status != "finished"):
            self._write_manifest(status)
        elif self.can_be_resumed:
            (self.run.path / MANIFEST).unlink()
            self._written = None
            with suppress(OSError):  # no part was begun
                self.run.parts_path.rmdir()

    def give_up(self) -> None:
        """After a failed write: let go of what was not written and, if there is room, close the rest."""
        self._open = None
        with suppress(OSError):
            self.close("failed")

    def _begun(self, place: int) -> _Open:
        """The part that a question belongs to: a new one, or one that an interrupt cut short, to be filled further."""
        size, n = self._manifest["questions_per_part"], self._manifest["counts"]["questions"]
        index = place // size
        first, end = index * size, min((index + 1) * size, n)
        part = self._parts.get(first)
        if part is None:
            return _Open(index, first, first, first, end)
        rows = [self.run.read_part(part)] if part.file else []
        left_out = {reason: list(ids) for reason, ids in part.left_out.items()}
        done = part.questions[1]
        return _Open(index, first, done, done, end, rows, Counter(part.counts), left_out)

    def _write_part(self) -> None:
        begun, self._open = self._open, None
        if begun.done == begun.written:
            return
        path, file, sha256 = self.run.part_path(begun.index), None, None
        if begun.done < begun.end:
            path = path.with_stem(f"{path.stem}-first-{begun.done - begun.first}")
        n_rows = sum(map(len, begun.rows))
        if n_rows:
            file, sha256 = path.name, self._write_rows(begun.rows, path)
        part = Part(file, (begun.first, begun.done), n_rows, sha256, dict(begun.counts), begun.left_out)
        shorter = self._parts.get(begun.first)
        if shorter:
            self._sums.subtract(_counts(shorter))
            self._replaced += [self.run.parts_path / shorter.file] if shorter.file else []
        self._parts[begun.first] = part
        self._sums.update(_counts(part))

    def _write_rows(self, rows: list[pa.Table], path: Path) -> str:
        """Write a file of rows and return its checksum; a run that it replaces goes once the rows are on the disk."""
        self._check_own()
        path.parent.mkdir(exist_ok=True)
        temporary = write_temporary(path, partial(write_rows, rows))
        try:
            sha256 = sha256_of(temporary)
            self._place()
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_folder(path.parent)
        return sha256

    def _place(self) -> None:
        """Put the manifest in its place; from then on the folder is this run, and what another one left goes."""
        if not self.can_be_resumed:
            self._write()
            sync_folder(self.run.path.absolute().parent)
            for name in DERIVED:
                (self.run.path / name).unlink(missing_ok=True)
            named = {part.file for part in self._parts.values() if part.file}
            for path in self.run.parts_path.glob("part-*.parquet"):
                if path.name not in named:
                    path.unlink()
            if not named:  # it has just begun: an analysis is that of the run it replaces
                LayersFolder(self.run.path / LAYERS).clear_unless_of(self._manifest["run_id"])

    def _write_manifest(self, status: str) -> None:
        if not self.can_be_resumed:
            return
        self._check_own()
        finished = None if status == "running" else now()
        self._manifest |= {"status": status, "finished": finished, "parts": [vars(part) for part in self._in_order]}
        self._manifest["seconds"] = round(self._seconds + time.monotonic() - self._started, 3)
        self._manifest["counts"] |= {**self._sums, "left_out": self.left_out}
        self._write()
        while self._replaced:
            self._replaced.pop().unlink(missing_ok=True)

    def _write(self) -> None:
        self.run.write_manifest(self._manifest)
        self._written = _signature(self.run.path / MANIFEST)

    def _check_own(self) -> None:
        """Refuse to go on in a folder that somebody else made theirs, against the lock."""
        if not self.can_be_resumed or _signature(self.run.path / MANIFEST) == self._written:
            return
        if self.run.manifest["run_id"] != self._manifest["run_id"]:
            self._written = None
            raise FaultError(f"``out`` {self.run.path}: expected this sweep's own run, got another that replaced it")

    def _remove_temporary(self) -> None:
        """Remove what a process that was killed had not given its name yet."""
        for path in (self.run.path / name for name in OUTPUTS):
            temporary_of(path).unlink(missing_ok=True)
        for path in self.run.parts_path.glob(".part-*.parquet.tmp"):
            path.unlink()


def _signature(path: Path) -> tuple:
    """Changes when a file is replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def _counts(part: Part) -> dict[str, int]:
    """What the manifest adds up over the parts."""
    return part.counts | {"done": part.questions[1] - part.questions[0], "rows": part.rows}
