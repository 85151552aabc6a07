"""Files of other data sets as tasks of ours: read record by record, written whole or not at all.

Lines of JSON are read one at a time. A file that is one JSON value, as SQuAD's own, is read whole: plainly done up to
some hundred megabytes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from io import TextIOWrapper
from pathlib import Path
from typing import IO

from ..errors import InputError
from ..store.files import write_output
from ..store.frames import check_new_file
from .sources import DATA_SETS, Converted, Source
from .tasks import SNIFFED, name_of_record, name_of_shape

GZIP = b"\x1f\x8b"  # what such a file begins with
NOT_TEXT = "text that is not valid Unicode"


@dataclass(frozen=True)
class Conversion:
    """What became of a file."""

    path: Path  # of the task
    n_questions: int  # written
    left_out: dict[str, int]  # questions by reason, most frequent first
    n_passages_left_out: int  # that hold an answer and are not gold

    def __str__(self) -> str:
        total = self.n_questions + sum(self.left_out.values())
        lines = [f"{self.path}: {self.n_questions} of {total} questions"]
        lines += [f"left out: {count}, {reason}" for reason, count in self.left_out.items()]
        if self.n_passages_left_out:
            lines.append(f"passages left out: {self.n_passages_left_out}, an answer beside the gold document")
        return "\n".join(lines)


def convert(file: str | Path, *, from_: str, out: str | Path) -> Conversion:
    """Write a task of the questions of another data set; ``refinelens convert``.

    Args:
        file: A file of that data set, gzip or not: as its authors publish it, or lines or an array of JSON as the
            package datasets exports it.
        from_: ``squad`` (1.1 or 2), ``hotpotqa`` (distractor setting) or ``triviaqa`` (rc or unfiltered).
        out: The task, a new file, packed with gzip if its name ends in ``.gz``.

    Returns:
        Conversion: how many questions were written, and how many were left out, by reason.

    Raises:
        InputError: A file of another shape, which is named, or without a question that can be asked; or an ``out`` that
            is there or cannot be written.
        FaultError: No free disk.
    """
    if from_ not in DATA_SETS:
        raise InputError(f"``from_``: expected {', '.join(DATA_SETS)}, got {from_!r}")
    file, out, source = Path(file), Path(out), DATA_SETS[from_]
    if not file.is_file():
        raise InputError(f"{file}: expected a file of {source.name}, got no file there")
    check_new_file(out)
    counts, left_out = Counter(), Counter()

    def write(temporary: Path) -> None:
        with temporary.open("wb") as raw, _packed(raw, out.suffix == ".gz") as lines:
            for one in _converted(file, source):
                line, reason = _line_of(one)
                left_out.update([reason] if reason else [])
                counts.update(questions=int(not reason), passages=0 if reason else one.n_left_out)
                lines.write(line)
        if not counts["questions"]:
            reasons = "; ".join(f"{count}, {reason}" for reason, count in left_out.items())
            raise InputError(f"{file}: expected a question that can be asked, got none ({reasons or 'it is empty'})")

    write_output(out, write)
    return Conversion(out, counts["questions"], dict(left_out.most_common()), counts["passages"])


def _packed(raw: IO[bytes], is_packed: bool) -> IO[bytes]:
    """What lines are written to; packed without name and time, so that one task has the same bytes always."""
    return gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if is_packed else raw


def _line_of(one: Converted) -> tuple[bytes, str]:
    """A line, or nothing and the reason."""
    if one.line is None:
        return b"", one.reason
    try:
        return (json.dumps(one.line, ensure_ascii=False) + "\n").encode(), ""
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can hold
        return b"", NOT_TEXT


def _converted(file: Path, source: Source) -> Iterator[Converted]:
    """All questions of a file in their order.

    Raises:
        InputError: Names the first record that is none of the source, and what it is.
    """
    with closing(_records(file, source)) as records:
        for where, record in records:
            try:
                if not isinstance(record, dict):
                    raise InputError(f"expected an object, got {type(record).__name__}")
                yield from source.questions(record, file.absolute().parent)
            except InputError as error:
                raise InputError(f"{file}, {where}: {_misfit(record, source, error)}") from None


def _misfit(record: object, source: Source, error: InputError) -> str:
    """What was expected in place of a record, and what it is."""
    expected, other = f"expected a question of {source.name} ({source.fields})", None
    if isinstance(record, dict):
        own = "a question in our form already; pass the file as ``task``"
        other = own if "ctxs" in record else name_of_record(record)
    is_other = other is not None and f" of {source.name};" not in other
    return f"{expected}, got {other}" if is_other else f"{expected}: {error}"


def _records(file: Path, source: Source) -> Iterator[tuple[str, object]]:
    """Where each record stands and what it is: a line, an entry of an array, or of ``data``."""
    try:
        with file.open("rb") as raw:
            is_packed = raw.read(len(GZIP)) == GZIP
            raw.seek(0)
            text = TextIOWrapper(gzip.GzipFile(fileobj=raw) if is_packed else raw, encoding="utf-8-sig")
            yield from _records_of(file, source, text)
    except UnicodeDecodeError as error:
        raise InputError(_not_json(file, source, str(error))) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file}: expected a whole gzip file, got: {error}") from None
    except OSError as error:
        raise InputError(f"{file}: expected a readable file, got: {error.strerror or error}") from None


def _records_of(file: Path, source: Source, text: TextIOWrapper) -> Iterator[tuple[str, object]]:
    lines = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    number, first = next(lines, (1, "[]"))
    try:
        value = json.loads(first)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and _entries(value) is None:
        yield f"line {number}", value
        for number, line in lines:
            yield f"line {number}", _parsed(file, source, line, f", line {number}")
        return
    if value is None:
        value = _parsed(file, source, first + text.read())
    entries = _entries(value) if isinstance(value, dict) else value
    entries = entries if isinstance(entries, list) else [value]
    yield from ((f"entry {number}", entry) for number, entry in enumerate(entries, 1))


def _entries(value: dict) -> object:
    """The records of a file that is one object: SQuAD's ``data``, TriviaQA's ``Data``; None of another object."""
    return next((value[name] for name in ("data", "Data") if isinstance(value.get(name), list)), None)


def _parsed(file: Path, source: Source, text: str, where: str = "") -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(_not_json(file, source, str(error), where)) from None


def _not_json(file: Path, source: Source, got: str, where: str = "") -> str:
    """What is said of a file, or of one of its lines, that is no JSON; of a table or Parquet what it is."""
    with file.open("rb") as raw:
        shape = None if where else name_of_shape(file.suffix.lower(), raw.read(SNIFFED))
    return f"{file}{where}: expected JSON of {source.name}, got {shape or got}"
