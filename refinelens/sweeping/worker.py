"""A process that asks questions for another one: ``python -m refinelens.sweeping.worker FD``, which `Workers` starts.

Over the connection it is given it takes options and manifest, loads everything, says that it is ready, and then answers
the places of questions with a `QuestionResult` each, told meanwhile which come next, whose contexts a thread builds. An
exception is the answer to whatever went wrong, and the last one.
"""

from __future__ import annotations

import signal
import sys
from contextlib import closing, suppress
from multiprocessing.connection import Connection

from ..machine import calm_libraries


def main() -> None:
    """Answer until the other process closes the connection or ends."""
    # Both are the business of the process that started this one, which lets the current question finish.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)
    calm_libraries()
    connection = Connection(int(sys.argv[1]))
    try:
        _answer(connection)
    except (EOFError, BrokenPipeError, ConnectionResetError):  # nobody is there to be answered
        return
    except Exception as error:
        with suppress(OSError):
            connection.send(error)


def _answer(connection: Connection) -> None:
    options, spec = connection.recv()
    from .inputs import SweepInputs

    inputs = SweepInputs.load(options, spec)
    with closing(inputs.predictor()) as predictor:
        connection.send(None)  # ready
        while True:
            places, soon = connection.recv()
            for some in filter(None, (places, soon)):
                predictor.prepare(inputs.questions, some)
            for result in predictor.ask(inputs.questions, places):
                connection.send(result)


if __name__ == "__main__":
    main()
