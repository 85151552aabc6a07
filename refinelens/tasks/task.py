"""Tasks: questions and their distractors, read from files in the formats of Lost in the Middle."""

from __future__ import annotations

import hashlib
import os
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from ..errors import InputError
from ..options import check_utf8
from .formats import Format
from .question import Document, Question
from .scoring import has_answer, word_forms
from .task_lines import parse_lines

BUILTIN = Path(__file__).parents[1] / "data" / "builtin.jsonl"
NQ_VARIABLE = "REFINELENS_NQ"
GENERATED = 100  # questions, where none are counted
MOST_GENERATED = 1_000_000  # questions, all held in memory


@dataclass(frozen=True)
class Task:
    """Questions in file order, how their contexts are written, and what identifies them."""

    name: str
    path: Path | None  # None where the questions were generated
    sha256: str  # of the file as stored, or of what was generated
    questions: tuple[Question, ...]
    format: Format


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
        check_utf8(f"${NQ_VARIABLE}", path)
    if not os.path.isfile(path):
        raise InputError(f"--task {name}: expected builtin, nq, kv, tiny or a .jsonl[.gz] file, got no file at {path}")
    return Path(path)


def load_task(name: str) -> Task:
    """Read and check a whole task file.

    Each line is a JSON object as in Lost in the Middle (Liu et al. 2023, arXiv 2307.03172), and the first one tells
    which: ``question``, ``answers`` and ``ctxs`` (objects with ``title``, ``text`` and ``isgold``; one is gold),
    optionally ``answer_prefix`` and ``group``; or ``ordered_kv_records`` (pairs), ``key`` and ``value``.

    Raises:
        InputError: The file is missing, empty or malformed; file and line are named.
    """
    path = resolve_task(name)
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: expected a readable file, got: {error.strerror}") from None
    format, questions = parse_lines(path, raw)
    if not questions:
        raise InputError(f"{path}: expected at least one question, got an empty file")
    return Task(name, path, hashlib.sha256(raw).hexdigest(), questions, format)


def generated_task(
    format: Format, count: int | None, question: Callable[[int], Question], line: Callable[[Question], str]
) -> Task:
    """A task of generated questions; its SHA-256 is that of their lines.

    Args:
        format: How contexts are written; its name is the task's.
        count: Questions, at least 1; `GENERATED` when None.
        question: Makes the question of a number, from 0.
        line: A question as a file would have it.

    Raises:
        InputError: Fewer than one question, or more than `MOST_GENERATED`.
    """
    count = GENERATED if count is None else count
    if not 1 <= count <= MOST_GENERATED:
        raise InputError(f"--examples: expected 1 to {MOST_GENERATED} questions of --task {format.name}, got {count}")
    questions = tuple(map(question, range(count)))
    sha256 = hashlib.sha256("".join(map(line, questions)).encode())
    return Task(format.name, None, sha256.hexdigest(), questions, format)


class DistractorSource:
    """Chooses distractors that never contain an answer, always the same ones for one seed."""

    def __init__(self, task: Task, seed: int):
        self._task = task
        self._seed = seed

    def choose(self, question: Question, count: int) -> list[Document] | None:
        """The first ``count`` distractors of a question, or None if the task has too few.

        The question's own passages come first, in file order; then, unless the format has a question's own
        alone, other questions' passages, those of its group before the rest, in an order fixed by the seed and
        the question. Fewer distractors are a prefix of more, so that context sizes are nested.
        """
        chosen: dict[Document, None] = {}
        for document in self._candidates(question):
            if len(chosen) == count:
                break
            if document not in chosen and self._fits(document, question):
                chosen[document] = None
        return list(chosen) if len(chosen) == count else None

    def replaced(self, question: Question, count: int) -> int:
        """How many of the first ``count`` of a question's own passages others stand for."""
        return sum(not self._fits(document, question) for document in question.distractors[:count])

    def _fits(self, document: Document, question: Question) -> bool:
        """Whether it is another document than the gold one, without an answer."""
        if document == question.gold:
            return False
        if self._task.format.pairs:
            return document.text not in question.answers
        forms = _forms(document)
        return not any(has_answer(forms, answer) for answer in question.answers)

    def _candidates(self, question: Question) -> Iterator[Document]:
        yield from question.distractors
        if self._task.format.own_documents:
            return
        others = [q for q in self._task.questions if q.id != question.id]
        random.Random(f"{self._seed}/{question.id}").shuffle(others)
        others.sort(key=lambda q: not (question.group and q.group == question.group))
        for other in others:
            yield other.gold
        for other in others:
            yield from other.distractors


@lru_cache(maxsize=4096)  # questions share distractors; a large task has more than should be held
def _forms(document: Document) -> tuple[str, ...]:
    return word_forms(f"{document.title} {document.text}")


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
