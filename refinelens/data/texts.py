"""Ordinary text, streamed: what lenses are fitted to, and what the frequencies of tokens are counted in."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ..errors import InputError
from .generated import TINY, training_texts

BUILTIN = "builtin"
PIECE = 1 << 14  # characters that are tokenized at a time


@dataclass(frozen=True)
class Text:
    """A text that can be read again and again, a piece at a time."""

    name: str
    path: Path | None  # None for a text of `OWN`
    sha256: str  # of the file, or of the text
    parameter: str = "text"  # that names it, for errors

    def pieces(self) -> Iterator[str]:
        """Documents, each once however often it stands there, or pieces of about `PIECE` characters of a plain text.

        Passages of a task are those of many questions: what is held out would else be among what is fitted on.

        Raises:
            InputError: A file that is not text, or lines of JSON without text; the line is named.
        """
        if self.path is None:
            yield from _distinct(OWN[self.name]())
            return
        try:
            with _open(self.path) as file:
                if ".jsonl" in self.path.suffixes:
                    yield from _distinct(self._json_documents(file))
                else:
                    yield from _plain_pieces(file)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise InputError(f"``{self.parameter}`` {self.path}: expected readable UTF-8 text, got: {error}") from None

    def _json_documents(self, file: IO[str]) -> Iterator[str]:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                texts = [entry["text"]] if "text" in entry else [f"{c['title']}\n{c['text']}" for c in entry["ctxs"]]
                documents = [f"{text.strip()}\n\n" for text in texts]
                "".join(documents).encode()  # half a surrogate pair is no text
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise InputError(
                    f"``{self.parameter}`` {self.path}: expected a JSON object with text or ctxs in every line, got "
                    f"another in line {number}"
                ) from None
            yield from documents


def load_text(name: str, parameter: str = "text") -> Text:
    """The text that an option names.

    Args:
        name: ``builtin`` (the language reference in the ``pydoc_data`` of this Python), ``tiny`` (what the model
            of that name was trained on) or a file: plain text, or ``.jsonl`` with ``text`` or the ``ctxs`` of a task
            in every line; gzip or not.
        parameter: Name of the option, for errors.

    Raises:
        InputError: No such file.
    """
    if name in OWN:
        sha256 = hashlib.sha256("\n".join(OWN[name]()).encode()).hexdigest()
        return Text(name, None, sha256, parameter)
    path = Path(name)
    if not path.is_file():
        raise InputError(f"``{parameter}``: expected builtin, tiny or a file of text, got no file at {name}")
    with path.open("rb") as file:
        return Text(name, path, hashlib.file_digest(file, "sha256").hexdigest(), parameter)


def _builtin_documents() -> list[str]:
    from pydoc_data.topics import topics

    documents = [f"{topics[name].strip()}\n\n" for name in sorted(topics)]
    random.Random(0).shuffle(documents)  # its alphabet puts one subject beside another
    return documents


OWN: dict[str, Callable[[], Iterable[str]]] = {BUILTIN: _builtin_documents, TINY.name: training_texts}


def _open(path: Path) -> IO[str]:
    reader = gzip.open if path.suffix == ".gz" else open
    return reader(path, "rt", encoding="utf-8-sig")


def _distinct(documents: Iterable[str]) -> Iterator[str]:
    """The first of equal ones."""
    seen: set[bytes] = set()
    for document in documents:
        digest = hashlib.sha256(document.encode()).digest()
        if digest not in seen:
            seen.add(digest)
            yield document


def _plain_pieces(file: IO[str]) -> Iterator[str]:
    while piece := file.read(PIECE):
        yield piece + file.readline(PIECE)  # to the end of a line, so that no word is cut
