"""A worker that something befalls, which files in a folder say, with the id of the question in which it does.

``kill-9`` ends the worker that is asked question 9 and goes with it, ``always-kill-9`` stays; ``raise-9`` raises;
``hold-9`` waits until that file is gone, and tells by ``holds-9``, which has its pid; ``hold-start`` before anything is
loaded. Every worker leaves its pid there.
"""

import os
import signal
import sys
import time

from refinelens.sweeping import worker
from refinelens.sweeping.contexts import ContextBuilder


def run_worker(folder, descriptor):
    """What ``python -m refinelens.sweeping.worker`` runs, with faults; its exit code."""
    meet_faults(folder)
    sys.argv = ["worker", str(descriptor)]
    worker.main()
    return 0


def meet_faults(folder):
    """Let this process, a worker, meet what files in the folder say."""
    (folder / f"pid-{os.getpid()}").touch()
    build = ContextBuilder.build

    def hold(where):
        while (folder / f"hold-{where}").exists():
            (folder / f"holds-{where}").write_text(str(os.getpid()))
            time.sleep(0.01)

    def faulty_build(self, question):
        kill = folder / f"kill-{question.id}"
        if kill.exists() or (folder / f"always-kill-{question.id}").exists():
            kill.unlink(missing_ok=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if (folder / f"raise-{question.id}").exists():
            raise RuntimeError("a fault in\na driver")
        hold(question.id)
        return build(self, question)

    ContextBuilder.build = faulty_build
    hold("start")
