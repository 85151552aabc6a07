"""The compile-only gate in a process of its own: ahead-of-time compilation fails in an interpreting one."""

import os
import pickle
import subprocess
import sys

SCRIPT = """
import pickle, sys
from refinelens.kernels.gate import inspect_variant
variants = pickle.load(sys.stdin.buffer)
pickle.dump({name: inspect_variant(variant) for name, variant in variants.items()}, sys.stdout.buffer)
"""


def inspect_all(variants):
    """Reports of all ``variants``, by their names."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT], input=pickle.dumps(variants), capture_output=True, env=environment
    )
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    return pickle.loads(run.stdout)
