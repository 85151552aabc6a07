"""The memory a competitor needs on a CPU, measured in a fresh process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from ..processes import module_command, module_path
from .competitors import COMPETITORS
from .memory import peak_growth
from .problem import Problem

MINUTES = 10  # after which a process is given up


class DoesNotRun(Exception):
    """A competitor that failed; says why in a few words."""


def extra_memory(problem_file: Path, competitor: str, rows: int, threads: int) -> int:
    """Growth of the peak resident set in the first call of a competitor on the first ``rows`` rows, bytes.

    The process is fresh because pages that an earlier call freed are used again unseen, and because one
    that is killed for its memory takes nothing else with it.

    Args:
        problem_file: A `Problem`, saved by torch.

    Raises:
        DoesNotRun: The process failed, was killed or took longer than ``MINUTES``.
    """
    command = module_command(__name__, problem_file, competitor, rows, threads)
    environment = os.environ | module_path() | {"OMP_WAIT_POLICY": "passive"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired:
        raise DoesNotRun(f"took longer than {MINUTES} minutes") from None
    if done.returncode == -9:
        raise DoesNotRun("does not fit into memory")
    if done.returncode != 0:
        raise DoesNotRun((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return int(done.stdout.split()[-1])


def _main(problem_file: str, name: str, rows: str, threads: str) -> None:
    torch.set_num_threads(int(threads))
    problem: Problem = torch.load(problem_file, weights_only=False).first(int(rows))
    competitor = COMPETITORS[name]
    # What is compiled for one shape is compiled before. The others need only their libraries then: what
    # they build once for an unembedding counts.
    competitor.run(problem if competitor.compiles else problem.tiny())
    print(peak_growth(lambda: competitor.run(problem)))


if __name__ == "__main__":
    _main(*sys.argv[1:])
