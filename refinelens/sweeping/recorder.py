"""Writes the parts of a run while its questions are asked, and keeps the manifest true after each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..machine import now
from ..placement import ORACLE
from ..store.folder import FolderWriter
from ..store.layers import LayersFolder
from ..store.process import Interrupted
from ..store.results import LAYERS, Part, QuestionResult, Run, write_rows
from ..store.trajectory import list_matrix


@dataclass
class _Open:
    """The part that is being filled."""

    first: int  # 0-based place of its first question among those drawn
    done: int  # place behind its last question so far
    rows: list[pa.Table]
    counts: Counter[str]
    left_out: dict[str, list[int]]


class AccuracySoFar:
    """How often the first answer token was the model's own prediction, by gold position, of one process.

    Of contexts with other documents, all sizes together.
    """

    def __init__(self):
        self._right: dict[int, list[int]] = {}  # of contexts with documents: right ones and all

    def add(self, rows: pa.Table) -> None:
        """Count the contexts of a question."""
        first = rows.filter(pc.and_(pc.equal(rows["answer_token"], 0), pc.greater(rows["documents"], ORACLE)))
        if not len(first):
            return
        first = first.filter(pc.equal(first["lens"], first["lens"][0]))
        own = list_matrix(first["argmax"])[:, -1] == first["answer_id"].to_numpy()
        for position, right in zip(first["gold_position"].to_pylist(), own.tolist(), strict=True):
            counts = self._right.setdefault(position, [0, 0])
            counts[0], counts[1] = counts[0] + right, counts[1] + 1

    def __str__(self) -> str:
        """``right 0: 0.92, 5: 0.75, 9: 0.83``: the first, a middle and the last position."""
        positions = sorted(self._right)
        if not positions:
            return ""
        shown = dict.fromkeys((positions[0], positions[len(positions) // 2], positions[-1]))
        shares = (f"{position}: {self._right[position][0] / self._right[position][1]:.2f}" for position in shown)
        return f"right {', '.join(shares)}"


class RunWriter(FolderWriter):
    """Writes one run, which it has the lock of.

    A part that an interrupt cut short has a name of its own, and gives way to the whole one after the manifest names
    that.

    A new folder gets its manifest at once, so that it can be resumed from then on. A run that is to be overwritten
    stays until the first part with rows lies beside it: whatever fails before leaves everything as it was.

    A whole part is written by a thread of its own while the next questions are asked, one at a time and in order: from
    `add` on it has ``manifest`` and the parts to itself until `settle`. What goes wrong there is raised by the next
    call.
    """

    def __init__(self, run: Run, manifest: dict, resumed: bool = False):
        super().__init__(run, manifest)
        self.run = run
        self._parts = {part.first: part for part in run.parts_of(manifest)}  # by their first question
        self._open: _Open | None = None
        self._shard: dict[str, int] | None = manifest.get("shard")
        self._resumed = resumed
        self._replaced: list[Path] = []  # files that the next manifest no longer names
        self._thread = ThreadPoolExecutor(1, "writer")
        self._writing: Future | None = None  # of a whole part
        self._notes: dict[str, object] = {}  # of the questions since the last part, for the manifest
        self._n_done = sum(part.questions[1] - part.first for part in self._parts.values())
        if resumed or not run.exists:
            self.place()

    @property
    def has_rows(self) -> bool:
        """Whether a part with rows is written."""
        return any(part.rows for part in self._parts.values())

    @property
    def done(self) -> int:
        """Questions in the parts, those included that are being filled or written."""
        return self._n_done

    @property
    def left_out(self) -> dict[str, list[int]]:
        """Questions of the parts that could not be asked, as reason: ids."""
        return totals(self._in_order)["left_out"]

    @property
    def _in_order(self) -> list[Part]:
        return [self._parts[first] for first in sorted(self._parts)]

    @property
    def _n_places(self) -> int:
        """Questions drawn, of a shard those of the whole run."""
        return (self._shard or self.manifest["counts"])["questions"]

    @property
    def _firsts(self) -> range:
        """First places of the parts that this run is to have."""
        firsts = range(0, self._n_places, self.manifest["questions_per_part"])
        return firsts[self._shard["index"] - 1 :: self._shard["of"]] if self._shard else firsts

    def _end(self, first: int) -> int:
        """Place behind the last question of a part once it is whole."""
        return min(first + self.manifest["questions_per_part"], self._n_places)

    def missing(self) -> list[int]:
        """Places of the questions that no part holds, in order."""
        places: list[int] = []
        for first in self._firsts:
            part = self._parts.get(first)
            places += range(part.questions[1] if part else first, self._end(first))
        return places

    def add(self, place: int, result: QuestionResult) -> None:
        """Take all that came of the question at the next of the missing places.

        Raises:
            OSError: The part before could not be written.
        """
        if self._writing is not None and self._writing.done():
            self.settle()
        begun = self._open or self._begun(place)
        if place != begun.done:
            raise ValueError(f"expected the question at place {begun.done}, got {place}")
        self._open = begun
        begun.rows.append(result.rows)
        begun.counts.update(result.counts)
        _add_to(begun.left_out, result.left_out)
        self._notes |= result.notes
        begun.done, self._n_done = begun.done + 1, self._n_done + 1
        if begun.done == self._end(begun.first):
            self.settle()
            self._open = None
            self._writing = self._thread.submit(self._finish_part, begun, self._taken_notes())

    def settle(self) -> None:
        """Wait until no part is being written; an interrupt leaves it to the thread.

        Raises:
            OSError: It could not be.
        """
        if self._writing is not None:
            wait([self._writing])
            done, self._writing = self._writing, None
            done.result()

    def release(self) -> None:
        """Wait for the thread, whatever it met, and however often a signal comes: nothing is written behind this."""
        signal = None
        while True:
            try:
                self._thread.shutdown()
                break
            except Interrupted as another:
                signal = another
        if signal is not None:
            raise signal

    def _taken_notes(self) -> dict[str, object]:
        notes, self._notes = self._notes, {}
        return notes

    def _finish_part(self, part: _Open, notes: dict[str, object]) -> None:
        self.manifest |= notes
        self._write_part(part)
        self._save("running")

    def close(self, status: str) -> None:
        """Write what is left and the status; a new run without rows goes, and a failed one replaces no other.

        A shard without rows stays: it says why its questions were left out.

        Raises:
            OSError: A part could not be written.
        """
        self.settle()
        begun, self._open = self._open, None
        self.manifest |= self._taken_notes()
        if begun and (self.is_placed or status != "failed"):
            self._write_part(begun)
        is_whole_shard = self._shard is not None and status == "finished"
        if is_whole_shard:
            self.place()
        if self.has_rows or is_whole_shard or (self._resumed and status != "finished"):
            self._save(status)
        elif self.is_placed:
            self.withdraw()

    def give_up(self) -> None:
        """After a failed write: let go of what was not written and, if there is room, close the rest."""
        self._open = None
        with suppress(OSError):
            self.settle()
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
        first = place - place % self.manifest["questions_per_part"]
        part = self._parts.get(first) or Part(None, (first, first), 0, None)
        rows, done = [self.run.read_part(part)] if part.file else [], part.questions[1]
        left_out: dict[str, list[int]] = {}
        _add_to(left_out, part.left_out)
        return _Open(first, done, rows, Counter(part.counts), left_out)

    def _write_part(self, begun: _Open) -> None:
        path, file, sha256 = self.run.part_path(begun.first // self.manifest["questions_per_part"]), None, None
        if begun.done < self._end(begun.first):
            path = path.with_stem(f"{path.stem}-first-{begun.done - begun.first}")
        n_rows = sum(map(len, begun.rows))
        if n_rows:
            file, sha256 = path.name, self.write(path, partial(write_rows, begun.rows))
        shorter = self._parts.get(begun.first)
        if shorter and shorter.file:
            self._replaced.append(self.run.parts_path / shorter.file)
        questions = (begun.first, begun.done)
        self._parts[begun.first] = Part(file, questions, n_rows, sha256, dict(begun.counts), begun.left_out)

    def _save(self, status: str) -> None:
        if self.is_placed:
            counts = self.manifest["counts"] | totals(self._in_order)
            finished = None if status == "running" else now()
            self.save(status=status, finished=finished, parts=list(map(vars, self._in_order)), counts=counts)
            while self._replaced:
                self._replaced.pop().unlink(missing_ok=True)


def totals(parts: Iterable[Part]) -> dict[str, Any]:
    """What a manifest counts of its parts: questions done, rows, contexts and the like, and what was left out."""
    sums, left_out = Counter(done=0, rows=0), {}  # type: ignore[var-annotated]
    for part in parts:
        sums.update(part.counts | {"done": part.questions[1] - part.first, "rows": part.rows})
        _add_to(left_out, part.left_out)
    return {**sums, "left_out": left_out}


def _add_to(left_out: dict[str, list[int]], more: dict[str, list[int]]) -> None:
    for reason, ids in more.items():
        left_out.setdefault(reason, []).extend(ids)
