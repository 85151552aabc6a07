"""What an actor of Ray holds: a model, which answers the places of questions for `refinelens.sweeping.ray_engine`.

It gets options and manifest, as the process of `refinelens.sweeping.worker` does, and loads everything by itself. Ray
pickles this class by its name, so that a node runs the code that is installed there.
"""

from __future__ import annotations

import os
import pickle
import signal
import socket
import threading
import time
from collections.abc import Sequence

import pyarrow as pa

from ..config import SweepConfig
from ..errors import FaultError
from ..store.folder import MadeOf

# A row of an answer: the place of a question, when it was begun, and its `QuestionResult` or an exception.
ANSWER = pa.schema([("place", pa.int64()), ("begun", pa.float64()), ("answer", pa.large_binary())])


class RayWorker:
    """Answers blocks of places; whatever goes wrong, also while it loads, is an answer.

    An exception that left an actor would be Ray's to retry and to print.
    """

    def __init__(self, options: SweepConfig, spec: MadeOf, threads: int):
        """
        Args:
            options: Of the run.
            spec: Of the run, which what is loaded is held to.
            threads: Of the node, for this actor alone.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the sweep's, which lets the question finish
        os.environ["OMP_NUM_THREADS"] = str(threads)  # before torch is imported
        self._error: Exception | None = None
        try:
            self._load(options, spec, threads)
        except Exception as error:
            self._error = error

    def _load(self, options: SweepConfig, spec: MadeOf, threads: int) -> None:
        import torch

        from .inputs import SweepInputs

        torch.set_num_threads(threads)  # where something else had imported it
        inputs = SweepInputs.load(options, spec)
        self._questions, self._predictor = inputs.questions, inputs.predictor()

    def __call__(self, block: pa.Table) -> pa.Table:
        """Answer every question of a block, whose rows are lists of ``places``."""
        begun = time.time()
        rows = [row for places in block["places"].to_pylist() for row in self._answers(places)]
        places, answers = zip(*rows, strict=True)
        return pa.table({"place": places, "begun": [begun] * len(rows), "answer": answers}, ANSWER)

    def _answers(self, places: Sequence[int]) -> list[tuple[int, bytes]]:
        try:
            if self._error:
                raise self._error
            results = self._predictor.ask(self._questions, places)
            return [(place, pickle.dumps(result)) for place, result in zip(places, results, strict=True)]
        except OSError as error:  # raised as it is in the sweep, it would look like one of the run's own files
            return [(places[0], pickle.dumps(FaultError(f"{_here()}: {type(error).__name__}: {error}")))]
        except Exception as error:
            return [(places[0], _pickled(error))]


def _pickled(error: Exception) -> bytes:
    """An exception, or what it says where it cannot be sent."""
    try:
        sent = pickle.dumps(error)
        pickle.loads(sent)
    except Exception:
        sent = pickle.dumps(FaultError(f"{_here()}: {type(error).__name__}: {error}"))
    return sent


def _here() -> str:
    return f"worker {os.getpid()} on {socket.gethostname()}"
