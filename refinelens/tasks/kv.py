"""Key-value retrieval (Liu et al. 2023, arXiv 2307.03172): its questions, and a seeded generator of any size."""

from __future__ import annotations

import json
import random
import uuid

from .formats import KV
from .question import Document, Question
from .task import Task, generated_task
from .task_lines import kv_question


def generate_task(count: int | None, n_pairs: int, seed: int) -> Task:
    """Questions of random version-4 UUIDs; the SHA-256 of the task is that of its lines, gold pair first.

    A question depends on the seed and its number alone: of fewer pairs or questions it has the first ones.

    Args:
        count: Questions, at least 1; 100 when None.
        n_pairs: Pairs of a question, the gold one included.
        seed: Of the UUIDs.

    Raises:
        InputError: Fewer than one question, or more than a million.
    """
    return generated_task(KV, count, lambda number: _generate(number, n_pairs, seed), _line)


def _generate(number: int, n_pairs: int, seed: int) -> Question:
    source = random.Random(f"{seed}/{number}")
    pairs = [Document(_random_uuid(source), _random_uuid(source)) for _ in range(max(1, n_pairs))]
    return kv_question(number, pairs[0], pairs[1:])


def _random_uuid(source: random.Random) -> str:
    return str(uuid.UUID(int=source.getrandbits(128), version=4))


def _line(question: Question) -> str:
    """A question as the paper's files have it."""
    pairs = [[pair.title, pair.text] for pair in (question.gold, *question.distractors)]
    record = {"ordered_kv_records": pairs, "key": question.question, "value": question.answers[0]}
    return json.dumps(record) + "\n"
