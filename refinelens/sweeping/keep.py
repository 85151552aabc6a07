"""Which questions a sweep keeps, by what the model says with the gold document alone and without any.

The first answer token is predicted where it is the model's own prediction, rank 1 at the output. Each question is
decided by contexts of its own, so that what comes of it does not depend on others.
"""

from __future__ import annotations

import torch

from ..config import ANSWERED, EVERY_QUESTION, NEEDS_DOCUMENT
from ..data.prompts import Context
from ..lens.stored_states import Runner
from ..placement import CLOSED_BOOK, ORACLE
from ..report.scope import KNOWN, NOT_ANSWERED

ANSWERED_WITH_GOLD = (ORACLE, True, NOT_ANSWERED)
# By ``keep``: context sizes in order, whether the first answer token has to be predicted there, and the reason to leave
# a question out where that is not so.
CONDITIONS = {
    EVERY_QUESTION: (),
    ANSWERED: (ANSWERED_WITH_GOLD,),
    NEEDS_DOCUMENT: (ANSWERED_WITH_GOLD, (CLOSED_BOOK, False, KNOWN)),
}


def is_predicted(runner: Runner, context: Context) -> bool:
    """Whether the first answer token of a context has rank 1 at the output of the model.

    The context runs with its whole answer, as the sweep runs it.

    Raises:
        FaultError: Names the context at fault.
    """
    states = runner.states(context.input_ids, [context.prompt_length - 1], context.where)
    target = torch.tensor(context.answer_ids[:1], device=states.device)
    return int(runner.lens.stats(states[-1], target).target_rank) == 0
