"""Which of a question's answers is its target."""

from __future__ import annotations

import torch

from ..lenses.logit_lens import LogitLens
from ..prompts.context import Context
from ..tasks.question import Alias, Question

NO_ALIAS = Alias(0, "none")  # of a question that is not asked


def first_alias(question: Question) -> Alias:
    """The first answer."""
    return Alias(0, "first" if len(question.answers) > 1 else "only")


def best_alias(scores: dict[int, float]) -> Alias:
    """The answer of the highest score, of equal ones the first.

    Args:
        scores: By the place of every answer that can be asked for, in their order, see `alias_score`.
    """
    index = max(scores, key=scores.__getitem__)
    if len(scores) == 1:
        return Alias(index, "the only one that the model can be asked for")
    others = max(score for place, score in scores.items() if place != index)
    return Alias(index, f"best of {len(scores)}: {scores[index]:.2f} against {others:.2f} nats a token")


def alias_score(lens: LogitLens, context: Context) -> float:
    """Mean log-probability per token, nats, that the model gives all that follows the prompt by itself.

    That is the teacher-forced answer, with the space before it where that is a token: no answer gets one for nothing.
    """
    span = context.reply_span
    hidden = lens.hidden(torch.tensor([context.input_ids]), torch.tensor([list(span.positions)]))
    targets = torch.tensor([span.next_ids], device=hidden.device)
    return float(lens.stats(hidden[-1], targets).target_logprob.double().mean())
