"""Worked examples before the question (shots): other questions of the task, each with its answer.

All contexts of a run begin with the same ones, drawn by its seed; the manifest keeps them. A question one of whose
answers stands in them is not asked: it could be copied from there.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from ..config import SweepConfig
from ..errors import InputError
from ..placement import NO_POSITION
from .answer_tokens import joint
from .generated import GENERATORS, generate_questions
from .prompts import Shot, Shots, Template
from .questions import Document, Question
from .tasks import DistractorSource, Task


def draw_shots(options: SweepConfig, task: Task, asked: Sequence[Question], template: Template) -> Shots:
    """Draw the worked examples of a run that begins.

    Of a file they are questions that are not asked; where all of them would be, they are taken from these. Of a
    generated task they are those with the numbers after the ones that are asked.

    Args:
        options: How many, of how many documents, and the seed.
        task: What questions and distractors are from.
        asked: Its questions that were drawn to be asked; with ``examples`` of None these are all.
        template: Of the prompts, without chat and shots.

    Raises:
        InputError: The task has too few other questions with an answer and so many documents.
    """
    wanted, size = options.shots, options.shot_documents
    if options.task in GENERATORS:
        numbers = range(len(task.questions), len(task.questions) + wanted)
        pool = generate_questions(options.task, numbers, size, options.seed)
    else:
        taken = set() if options.examples is None else {question.id for question in asked}
        pool = [question for question in task.questions if question.id not in taken]
        pool = random.Random(f"{options.seed}/shots").sample(pool, len(pool))
    source, found = DistractorSource(task, options.seed), []
    for question in pool:
        distractors = source.choose(question, size - 1) if question.answers and len(found) < wanted else None
        if distractors is not None:
            place = random.Random(f"{options.seed}/shots/{question.id}").randrange(size)
            documents = [*distractors[:place], question.gold, *distractors[place:]]
            found.append(_shot(question, documents, place, template, options.chat))
    spare = len(pool) - (options.task not in GENERATORS and options.examples is None)  # one has to be asked
    if len(found) < wanted or spare < wanted:
        there = min(len(found), spare)
        raise InputError(
            f"``shots``: expected {wanted} questions that are not asked, each with an answer and {size} documents, got "
            f"{there}; use fewer ``shots``, ``shot_documents`` or ``examples``"
        )
    return Shots(tuple(found))


def _shot(question: Question, documents: list[Document], place: int, template: Template, is_chat: bool) -> Shot:
    texts = [text for document in documents for text in (document.title, document.text)]
    content = "\n".join([*texts, question.question, question.answer_prefix, question.answers[0]])
    turns = _turns(question, template.fill(question, documents, place)[0], is_chat)
    if template.format.closed_book is not None:
        turns += _turns(question, template.fill(question, [], NO_POSITION)[0], is_chat)
    return Shot(question.id, question.source_id, content, *turns)


def _turns(question: Question, prompt: str, is_chat: bool) -> tuple[str, str]:
    """A prompt and what follows it; a quote that the answer's prefix opens is closed."""
    prefix = question.answer_prefix
    if is_chat:
        prompt, prefix = prompt.strip(), prefix.lstrip()
    closing = '"' if prefix.endswith('"') else ""
    return prompt, f"{prefix}{joint(prefix if is_chat else prompt + prefix)}{question.answers[0]}{closing}"
