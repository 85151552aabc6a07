"""From ordinary text, streamed, to the residual stream of its tokens, and the roles that sequences play."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..config import SEQUENCES, SHORTEST, FitConfig
from ..data.generated import TINY, training_texts
from ..errors import InputError
from ..lens.logit_lens import LogitLens
from ..lens.runner import ForwardRunner
from ..model.loading import LoadedModel

BUILTIN = "builtin"
PIECE = 1 << 14  # characters that are tokenized at a time
LONGEST = 512  # tokens of a sequence


@dataclass(frozen=True)
class Text:
    """A text that can be read again and again, a piece at a time."""

    name: str
    path: Path | None  # None for a text of `OWN`
    sha256: str  # of the file, or of the text

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
                    yield from _distinct(_json_documents(self.path, file))
                else:
                    yield from _plain_pieces(file)
        except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
            raise InputError(f"``text`` {self.path}: expected readable UTF-8 text, got: {error}") from None


def load_text(name: str) -> Text:
    """The text that ``text`` names.

    Args:
        name: ``builtin`` (the language reference in the ``pydoc_data`` of this Python), ``tiny`` (what the model
            of that name was trained on) or a file: plain text, or ``.jsonl`` with ``text`` or the ``ctxs`` of a task
            in every line; gzip or not.

    Raises:
        InputError: No such file.
    """
    if name in OWN:
        return Text(name, None, hashlib.sha256("\n".join(OWN[name]()).encode()).hexdigest())
    path = Path(name)
    if not path.is_file():
        raise InputError(f"``text``: expected builtin, tiny or a file of text, got no file at {name}")
    with path.open("rb") as file:
        return Text(name, path, hashlib.file_digest(file, "sha256").hexdigest())


def sequences(text: Text, tokenizer: PreTrainedTokenizerBase, length: int, limit: int) -> Iterator[list[int]]:
    """At most ``limit`` sequences of ``length`` token ids; documents follow each other, a rest is left.

    A sequence begins with the token that the tokenizer puts before a context, if it puts one there.
    """

    def ids() -> Iterator[int]:
        for piece in text.pieces():
            yield from tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]

    begin = tokenizer("a")["input_ids"][:1]
    begin = begin if begin == [tokenizer.bos_token_id] else []
    stream = ids()
    for _ in range(limit):
        sequence = begin + list(islice(stream, length - len(begin)))
        if len(sequence) < length:
            return
        yield sequence


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


def _json_documents(path: Path, file: IO[str]) -> Iterator[str]:
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
                f"``text`` {path}: expected a JSON object with text or ctxs in every line, got another in line {number}"
            ) from None
        yield from documents


@dataclass(frozen=True)
class Split:
    """Sequences in the order of the text: the first are fitted on, the next choose, the last are reported on."""

    length: int  # tokens of a sequence
    fit: range
    choose: range
    report: range

    def tokens(self, sequences: range) -> int:
        """Tokens of some sequences; the first of each is nobody's."""
        return len(sequences) * (self.length - 1)


class States:
    """The residual stream of a text's sequences, one at a time.

    The first token of a sequence is left out: models park attention there, and its states lie so far from all
    others that they would rule a regression.
    """

    def __init__(self, options: FitConfig, text: Text, loaded: LoadedModel, logit_lens: LogitLens):
        self.text, self.loaded, self.lens = text, loaded, logit_lens
        self._runner = ForwardRunner(logit_lens)
        length = max(SHORTEST, min(LONGEST, options.tokens // (2 * SEQUENCES)))
        self._length = min(length, loaded.max_tokens or length)
        self._limit = options.tokens // self._length
        self.split = self._split()

    def _split(self) -> Split:
        count = sum(1 for _ in self._sequences(self._limit))
        if count < SEQUENCES:
            remedy = "give more text or a smaller ``tokens``" if count else "give more text"
            raise InputError(
                f"``text`` {self.text.name}: expected at least {SEQUENCES} sequences of {self._length} tokens, got "
                f"{count}; {remedy}"
            )
        tenth = round(count / 10)
        choose, report = count - 2 * tenth, count - tenth
        return Split(self._length, range(choose), range(choose, report), range(report, count))

    def _sequences(self, limit: int) -> Iterator[list[int]]:
        for ids in sequences(self.text, self.loaded.tokenizer, self._length, limit):
            self.loaded.check_ids(ids, f"``text`` {self.text.name}")
            yield ids

    def of(self, which: range) -> Iterator[Tensor]:
        """States ``[n_layers + 1, tokens, d_model]`` of some sequences, one after the other."""
        for ids in self.some(which):
            yield self._runner.states(ids, range(1, self._length))

    def sample(self, which: range, limit: int) -> Iterator[Tensor]:
        """The same of tokens drawn evenly from some sequences, ``limit`` of them at most, the same ones every time."""
        per_sequence = self._length - 1
        total = self.split.tokens(which)
        drawn = torch.tensor(sorted(random.Random(0).sample(range(total), min(limit, total))))
        for index, ids in enumerate(self.some(which)):
            positions = drawn[drawn // per_sequence == index] % per_sequence + 1
            if len(positions):
                yield self._runner.states(ids, positions.tolist())

    def some(self, which: range) -> Iterator[list[int]]:
        """Token ids of some sequences."""
        return islice(self._sequences(which.stop), which.start, None)
