"""What befalls a disk, a model that runs, and sweeps in processes of their own that can be killed.

Such processes, which draw no figures, are forked from one that has done such a sweep already. `ForkServer` starts that
process. It reads a request per line, JSON, and answers each with a number: ``{"start": {...}}`` with the pid of a new
child, which runs the command line as `_child` says, and ``{"wait": pid}`` with its exit status, negative for a signal.
"""

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from pathlib import Path

from refinelens.machine import module_path

STEPS = ("fsync", "replace", "unlink")  # all that a write does to the disk once the bytes are handed over


class ForkServer:
    """The process that forks; a context manager. Its own sweep is that of ``arguments``: its children run warm."""

    def __init__(self, *arguments):
        self._command = [sys.executable, __file__, *map(str, arguments)]

    def __enter__(self):
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ | module_path()
        )
        assert self._process.stdout.readline(), "it is ready"
        return self

    def __exit__(self, *error):
        self._process.communicate()

    def start(self, *arguments, log, **fault):
        """Run ``refinelens`` with these arguments and, see `_child`, this fault; returns the pid."""
        return self._ask(start={"arguments": list(map(str, arguments)), "log": str(log), **fault})

    def wait(self, pid):
        """The exit status of a child; ``-9`` where SIGKILL ended it."""
        return self._ask(wait=pid)

    def run(self, *arguments, log, **fault):
        """Start a child and wait for it."""
        return self.wait(self.start(*arguments, log=log, **fault))

    def _ask(self, **request):
        print(json.dumps(request), file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())


@contextmanager
def faulty_disk(act):
    """Within the block ``act(number, path)`` comes before each of the `STEPS`, counted from 1; it may raise instead.

    The path is of the file that gets its name or goes; of a flush it is None.
    """
    taken, own = [0], {name: getattr(os, name) for name in STEPS}

    def wrap(name):
        def wrapped(*arguments, **keywords):
            if name != "unlink" or os.path.exists(arguments[0]):
                taken[0] += 1
                act(taken[0], None if name == "fsync" else os.fspath(arguments[-1]))
            return own[name](*arguments, **keywords)

        return wrapped

    try:
        for name in STEPS:
            setattr(os, name, wrap(name))
        yield
    finally:
        for name, step in own.items():
            setattr(os, name, step)


def full_disk_at(step):
    """`faulty_disk` that is full at one step, and has room again for the next."""

    def act(number, path):
        if number == step:
            raise OSError(errno.ENOSPC, "No space left on device")

    return faulty_disk(act)


@contextmanager
def largest_file(size):
    """Within the block no file of this process may grow beyond ``size`` bytes, which the system takes care of."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def at_pass(act):
    """Within the block ``act(ids, states)`` comes with every pass of a GPT-2, as it embeds; it may raise instead.

    Of ``ids`` ``[batch, tokens]``, int64; ``states`` ``[batch, tokens, d_model]`` are what goes on, and may be changed.
    The gates run models too, on `PROBE_TOKENS` at most.
    """
    from torch import nn
    from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
    from transformers import GPT2Model

    embeddings = []  # that have run in this pass: first that of the tokens, then that of the positions

    def begin(module, inputs):
        if isinstance(module, GPT2Model):
            embeddings.clear()

    def see(module, inputs, output):
        if isinstance(module, nn.Embedding):
            embeddings.append(module)
            if len(embeddings) == 1:
                act(inputs[0], output)

    hooks = register_module_forward_pre_hook(begin), register_module_forward_hook(see)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def save_stand_in(figure, path, **options):
    """In place of `Figure.savefig`, which takes as long as all the rest of a tiny sweep."""
    Path(path).write_bytes(b"figure")


class NoPanel:
    """In place of the axes of matplotlib: takes whatever is plotted, and has nothing."""

    lines = ()

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *given, **options):
        return self

    def __getitem__(self, key):
        return self

    def __iter__(self):
        return iter(())

    def get_ylim(self):
        return 0.0, 1.0

    def get_legend_handles_labels(self):
        return [], []


def panels_stand_in(own):
    """In place of `Figure.subplots`, which is ``own`` and takes a third of a tiny sweep.

    A figure of a report gets `NoPanel` ``[rows, columns]``; others, which few tests make, get what they ask for.
    """
    import numpy as np

    def subplots(figure, *shape, **options):
        if sys._getframe(1).f_globals["__name__"] != "refinelens.report.figures":
            return own(figure, *shape, **options)
        panels = np.empty(shape, dtype=object)
        for place in np.ndindex(shape):
            panels[place] = NoPanel()
        return panels

    return subplots


def errors_in(log):
    """The lines in which a child of the fork_server said what went wrong."""
    return [line for line in log.read_text().splitlines() if line.startswith("refinelens: ")]


def wait_for(condition):
    """Until it holds; a minute at most."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def _child(
    arguments,
    log,
    part=8,
    kill_at_step=None,
    kill_after=(),
    signal_at=(),
    hold_at=None,
    workers_meet=None,
):
    """Run the command line with a fault and exit with its code; a signal that it has noted it tells by ``LOG.heard``.

    Args:
        arguments: Of the command line.
        log: File for stdout and stderr.
        part: Questions per part.
        kill_at_step: Number of the step on the disk before which the process kills itself.
        kill_after: ``(question, seconds)``: the process ends so long after that question, counted from 1, was asked
            (0: after the start), wherever it is then: by SIGALRM, whose default is SIGKILL's.
        signal_at: ``(question, signal)`` pairs: signals that arrive while a question, counted from 1, is asked.
        hold_at: Question, counted from 1, that is not asked before the file ``LOG.go`` is there.
        workers_meet: Folder of `faulty_worker` for the workers of the sweep, which are forked too.
    """
    from refinelens import cli
    from refinelens.store.process import StopSignals
    from refinelens.sweeping import sweep, workers
    from refinelens.sweeping.contexts import ContextBuilder

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sweep.run_sweep = partial(sweep.run_sweep, questions_per_part=part)
    if workers_meet:
        workers.start_process = partial(_fork_worker, Path(workers_meet))
    build, asked, take = ContextBuilder.build, [0], StopSignals._take

    def take_and_tell(self, signum, frame):
        take(self, signum, frame)
        Path(f"{log}.heard").touch()

    def arm():
        if kill_after and kill_after[0] == asked[0]:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.setitimer(signal.ITIMER_REAL, kill_after[1])

    def faulty_build(self, question):
        asked[0] += 1
        arm()
        for place, signum in signal_at:
            if asked[0] == place:
                os.kill(os.getpid(), signum)
        while asked[0] == hold_at and not Path(f"{log}.go").exists():
            Path(f"{log}.holds").touch()
            time.sleep(0.01)
        return build(self, question)

    ContextBuilder.build, StopSignals._take = faulty_build, take_and_tell
    arm()
    with faulty_disk(lambda number, path: number == kill_at_step and os.kill(os.getpid(), signal.SIGKILL)):
        return cli.main(arguments)


class _Forked:
    """What `Workers` asks of a process."""

    def __init__(self, pid):
        self.pid = pid

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)

    def wait(self):
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _fork_worker(folder, environment, descriptor):
    """In place of `start_process`, whose processes take seconds to import what they need."""
    from faulty_worker import run_worker

    def work():
        os.setsid()
        os.environ.update(environment)
        os.closerange(3, descriptor)  # above all the other ends of connections, whose closing could not be seen
        os.closerange(descriptor + 1, 1024)
        return run_worker(folder, descriptor)

    return _Forked(_fork(work))


def _fork(work):
    """The pid of a new process that ends with what ``work()`` returns."""
    pid = os.fork()
    if pid == 0:
        code = 70
        try:
            code = work()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pid


def _serve(*arguments):
    import torch
    from matplotlib.figure import Figure

    from refinelens import cli
    from refinelens.sweeping import inputs

    Figure.savefig, Figure.subplots = save_stand_in, panels_stand_in(Figure.subplots)
    torch.set_num_threads(1)  # threads do not survive a fork
    load, loaded = inputs.load_model, {}
    inputs.load_model = lambda name, **how: loaded.setdefault((name, *how.items()), load(name, **how))
    with redirect_stdout(StringIO()):
        assert cli.main(list(arguments)) == 0
    # Children need not load that one again.
    inputs.load_model = lambda name, **how: loaded.get((name, *how.items())) or load(name, **how)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            answer = _Forked(request["wait"]).wait()
        else:
            answer = _fork(partial(_child, **request["start"]))
        print(answer, flush=True)


if __name__ == "__main__":
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    _serve(*sys.argv[1:])
