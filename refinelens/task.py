"""Questions, their documents and their distractors, read from files in the Lost in the Middle format."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from .errors import InputError
from .scoring import contains_answer, normalise_answer

BUILTIN = Path(__file__).parent / "data" / "builtin.jsonl"
NQ_VARIABLE = "REFINELENS_NQ"


@dataclass(frozen=True)
class Document:
    """One passage of a context."""

    title: str
    text: str


@dataclass(frozen=True)
class Question:
    """One line of a task file."""

    id: int  # 0-based line number in the file
    question: str
    answers: tuple[str, ...]  # at least one; the first is the target
    answer_prefix: str  # appended to the prompt, so that the answer is what comes next; may be empty
    group: str  # questions of one group make each other's distractors first; may be empty
    gold: Document
    distractors: tuple[Document, ...]  # the question's own non-gold passages, in file order


@dataclass(frozen=True)
class Task:
    """A task file: its questions in file order, and what identifies it."""

    name: str
    path: Path
    sha256: str  # of the file as stored
    questions: tuple[Question, ...]


def resolve_task(name: str) -> Path:
    """The file of ``builtin``, ``nq`` (named by the variable REFINELENS_NQ) or a path.

    Raises:
        InputError: No such file, or the variable is not set.
    """
    if name == "builtin":
        return BUILTIN
    path = name
    if name == "nq":
        path = os.environ.get(NQ_VARIABLE, "")
        if not path:
            raise InputError(f"--task nq: expected the path of a question file in ${NQ_VARIABLE}, got nothing; set it")
    if not os.path.isfile(path):
        raise InputError(f"--task {name}: expected builtin, nq or a .jsonl[.gz] file, got no file at {path}")
    return Path(path)


def load_task(name: str) -> Task:
    """Read and check a whole task file.

    Each line is a JSON object with ``question``, ``answers`` and ``ctxs`` (objects with ``title``, ``text``
    and ``isgold``; one is gold), as in Lost in the Middle (Liu et al. 2023, arXiv 2307.03172); optionally
    ``answer_prefix`` and ``group``.

    Raises:
        InputError: The file is missing, empty or malformed; file and line are named.
    """
    path = resolve_task(name)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    lines = _lines(path, raw)
    questions = tuple(_parse_line(path, number, line) for number, line in lines)
    if not questions:
        raise InputError(f"{path}: expected at least one question, got an empty file")
    return Task(name, path, hashlib.sha256(raw).hexdigest(), questions)


def _lines(path: Path, raw: bytes) -> Iterator[tuple[int, str]]:
    try:
        text = (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise InputError(f"{path}: expected UTF-8 lines of JSON (gzip if it ends in .gz), got {error}") from None
    return ((number, line) for number, line in enumerate(text.split("\n")) if line.strip())


def _parse_line(path: Path, number: int, line: str) -> Question:
    where = f"{path}, line {number + 1}"
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected a JSON object of valid text, got {error}") from None
    if not isinstance(record, dict):
        raise InputError(f"{where}: expected a JSON object, got {type(record).__name__}")
    question, answers = record.get("question"), record.get("answers")
    if not isinstance(question, str) or not question.strip():
        raise InputError(f"{where}: expected a non-empty string 'question', got {question!r}")
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise InputError(f"{where}: expected a non-empty list of strings 'answers', got {answers!r}")
    ctxs = record.get("ctxs")
    if not isinstance(ctxs, list) or not all(_is_passage(c) for c in ctxs):
        raise InputError(f"{where}: expected a list 'ctxs' of objects with strings 'title' and 'text'")
    gold = [c for c in ctxs if c.get("isgold") is True]
    if len(gold) != 1:
        raise InputError(f"{where}: expected one passage with isgold true, got {len(gold)}")
    for field in ("answer_prefix", "group"):
        if not isinstance(record.get(field, ""), str):
            raise InputError(f"{where}: expected a string {field!r}, got {record[field]!r}")
    return Question(
        id=number,
        question=question.strip(),
        answers=tuple(a.strip() for a in answers),
        answer_prefix=record.get("answer_prefix", ""),
        group=record.get("group", ""),
        gold=_document(gold[0]),
        distractors=tuple(_document(c) for c in ctxs if c is not gold[0] and c.get("hasanswer") is not True),
    )


def _is_passage(ctx: object) -> bool:
    return isinstance(ctx, dict) and isinstance(ctx.get("title"), str) and isinstance(ctx.get("text"), str)


def _document(ctx: dict) -> Document:
    return Document(ctx["title"].strip(), ctx["text"].strip())


class DistractorSource:
    """Chooses distractors that never contain an answer, always the same ones for one seed."""

    def __init__(self, task: Task, seed: int):
        self._task = task
        self._seed = seed
        self._normalised: dict[Document, str] = {}

    def choose(self, question: Question, count: int) -> list[Document] | None:
        """The first ``count`` distractors of a question, or None if the task has too few.

        The question's own passages come first, in file order; then other questions' passages, those of its
        group before the rest, in an order fixed by the seed and the question. Fewer distractors are a prefix
        of more, so that context sizes are nested.
        """
        chosen: list[Document] = []
        for document in self._candidates(question):
            if len(chosen) == count:
                break
            if document not in chosen and document != question.gold and not self._has_answer(document, question):
                chosen.append(document)
        return chosen if len(chosen) == count else None

    def _candidates(self, question: Question) -> Iterator[Document]:
        yield from question.distractors
        others = [q for q in self._task.questions if q.id != question.id]
        random.Random(f"{self._seed}/{question.id}").shuffle(others)
        others.sort(key=lambda q: not (question.group and q.group == question.group))
        for other in others:
            yield other.gold
        for other in others:
            yield from other.distractors

    def _has_answer(self, document: Document, question: Question) -> bool:
        whole = f"{document.title} {document.text}"
        text = self._normalised.get(document)
        if text is None:
            text = self._normalised[document] = normalise_answer(whole)
        return any(contains_answer(whole, text, answer) for answer in question.answers)


def choose_questions(task: Task, count: int | None, seed: int) -> list[Question]:
    """``count`` questions drawn by the seed (all when None), in file order.

    Raises:
        InputError: More questions were asked for than the file has.
    """
    if count is None:
        return list(task.questions)
    if not 1 <= count <= len(task.questions):
        raise InputError(f"--examples: expected 1 to {len(task.questions)} (questions in {task.path}), got {count}")
    return sorted(random.Random(seed).sample(task.questions, count), key=lambda q: q.id)
