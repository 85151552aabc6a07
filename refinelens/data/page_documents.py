"""Texts of a run's questions and documents for its page, from the task if it is still what was asked."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from ..errors import InputError
from ..placement import CLOSED_BOOK
from .generated import GENERATORS, generate_task
from .questions import Document, Question
from .tasks import CUES, DistractorSource, Task, load_task


def texts_of(manifest: dict, wanted: set[int]) -> tuple[dict[str, dict], bytes, str]:
    """Texts of questions, documents as JSON in UTF-8, and why there are none of them.

    A context has the first distractors of its question with gold documents and decoys among them, so that a question's
    largest size says all of it.
    """
    try:
        task = _task(manifest)
    except (InputError, OSError) as error:
        return {}, b"[]", " ".join(str(error).split())
    sizes = [size for size in manifest["arguments"].get("documents", []) if size != CLOSED_BOOK]
    source = DistractorSource(task, manifest["seed"])
    places: dict[Document, int] = {}
    questions = {}
    for question in (q for q in task.questions if q.id in wanted):
        documents = {
            "golds": [question.gold, *question.golds],
            "decoys": question.decoys,
            "distractors": next(_distractors(source, question, sizes), []),
        }
        questions[str(question.id)] = {
            "question": question.question,
            "answers": list(question.answers),
            "decoy_answer": question.decoy_answer,
            **{kind: [places.setdefault(one, len(places)) for one in own] for kind, own in documents.items()},
        }
    texts = [[document.title, document.text] for document in places]
    return questions, json.dumps(texts, ensure_ascii=False).encode(), ""


def _distractors(source: DistractorSource, question: Question, sizes: list[int]) -> Iterator[list[Document]]:
    """Of the largest size that the question could be asked with, or fewer: as many as there are."""
    for size in sorted(sizes, reverse=True):
        found = source.choose(question, size - 1)
        if found is not None:
            yield found


def _task(manifest: dict) -> Task:
    """The task of a run, if it is still there as it was."""
    arguments, entry = manifest["arguments"], manifest["task"]
    name = arguments["task"]
    if name in GENERATORS:
        task = generate_task(name, arguments["examples"], max(arguments["documents"]), manifest["seed"])
    else:
        path = entry.get("path")
        task = load_task(path if path and name != CUES and Path(path).exists() else name)
    if task.sha256 != entry.get("sha256"):
        raise InputError(f"documents are not shown: the task {name} is no longer the one that was asked")
    return task
