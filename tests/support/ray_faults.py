"""The command line with actors of Ray that something befalls, as files in ``faults`` beside the run's folder say.

Actors import this module by its name, as they do `refinelens.sweeping.ray_worker`. What the files are called stands in
`faulty_worker`.
"""

import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

from refinelens.machine import module_path
from refinelens.sweeping.ray_worker import RayWorker


class FaultyRayWorker(RayWorker):
    """An actor that leaves its pid, and the number of its threads, among the faults."""

    def _load(self, options, spec, threads):
        import torch

        from faulty_worker import meet_faults

        folder = spec.path.parent / "faults"
        meet_faults(folder)
        super()._load(options, spec, threads)
        (folder / f"threads-{os.getpid()}").write_text(str(torch.get_num_threads()))


def environment():
    """Of a process that finds the modules of these tests, and so do the nodes of a cluster that it starts."""
    paths = [str(Path(__file__).parent), module_path()["PYTHONPATH"]]
    offline = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    return os.environ | offline | {"PYTHONPATH": os.pathsep.join(paths)}


def start(*arguments, log, **variables):
    """Start ``refinelens`` with these arguments; a `subprocess.Popen`."""
    with open(log, "w") as file:
        return subprocess.Popen(
            [sys.executable, "-c", "import ray_faults; ray_faults.main()", *map(str, arguments)],
            stdout=file,
            stderr=file,
            env=environment() | variables,
        )


def main():
    """As `refinelens.cli.main`, with four questions a part; a signal that is noted it tells by ``faults/heard``."""
    from matplotlib.figure import Figure

    from faults import panels_stand_in, save_stand_in
    from refinelens import cli
    from refinelens.store.process import StopSignals
    from refinelens.sweeping import ray_engine, sweep

    signal.signal(signal.SIGINT, signal.default_int_handler)
    Figure.savefig, Figure.subplots = save_stand_in, panels_stand_in(Figure.subplots)
    sweep.run_sweep = partial(sweep.run_sweep, questions_per_part=4)
    ray_engine.RayWorkers.worker = FaultyRayWorker
    take = StopSignals._take

    def take_and_tell(self, signum, frame):
        take(self, signum, frame)
        (Path(os.environ["FAULTS"]) / "heard").touch()

    StopSignals._take = take_and_tell
    sys.exit(cli.main(sys.argv[1:]))
