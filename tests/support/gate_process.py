"""The compile-only gate in a process of its own: ahead-of-time compilation fails in an interpreting one."""

import os
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from refinelens.machine import module_path

SCRIPT = """
import pickle, sys
from gate import inspect_variant
variants = pickle.load(sys.stdin.buffer)
pickle.dump({name: inspect_variant(variant) for name, variant in variants.items()}, sys.stdout.buffer)
"""


def inspect_all(variants):
    """Reports of all ``variants``, by their names; every core of the machine compiles a share of them.

    A process for fewer than eight would take longer to start than to compile them.
    """
    names = list(variants)
    cores = min(os.cpu_count(), -(-len(names) // 8))
    shares = [{name: variants[name] for name in names[core::cores]} for core in range(cores)]
    with ThreadPoolExecutor(cores) as pool:
        return {name: report for reports in pool.map(_inspect, shares) for name, report in reports.items()}


def own_environment():
    """For a process that compiles, and imports what tests and benchmarks do."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | module_path()
    folders = (os.path.dirname(__file__), *(path for path in sys.path if path.endswith("benchmarks")))
    return environment | {"PYTHONPATH": os.pathsep.join((*folders, environment["PYTHONPATH"]))}


def _inspect(variants):
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=pickle.dumps(variants), capture_output=True, env=own_environment()
    )
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    return pickle.loads(run.stdout)
