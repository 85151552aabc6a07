"""A worker that something befalls: ``faulty_worker.py FOLDER FD``.

Files in the folder say what and in which question, by its id: ``kill-9`` ends the worker that is asked question 9 and
goes with it, ``always-kill-9`` stays; ``raise-9`` raises; ``hold-9`` waits until that file is gone, and tells by
``holds-9``. Every worker leaves its pid there.
"""

import os
import signal
import sys
import time
from pathlib import Path

from refinelens.predict import Predictor
from refinelens.worker import main

folder = Path(sys.argv.pop(1))
(folder / f"pid-{os.getpid()}").touch()
rows = Predictor.rows


def faulty_rows(self, question):
    kill, hold = folder / f"kill-{question.id}", folder / f"hold-{question.id}"
    if kill.exists() or (folder / f"always-kill-{question.id}").exists():
        kill.unlink(missing_ok=True)
        os.kill(os.getpid(), signal.SIGKILL)
    if (folder / f"raise-{question.id}").exists():
        raise RuntimeError("a fault in\na driver")
    while hold.exists():
        (folder / f"holds-{question.id}").touch()
        time.sleep(0.01)
    return rows(self, question)


Predictor.rows = faulty_rows
main()
