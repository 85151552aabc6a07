"""What the driver of a sweep by Ray holds and takes while many questions stream through it: ``ray_scale.py [N]``.

A stub answers each question with a table of the size of a real one, and no model, so that all that is measured is
Ray's and ours. Memory and time per question should be as they were a thousand questions before. With 8 questions a
part, 8,000 of them are a run of 1,000 parts.
"""

from __future__ import annotations

import pickle
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa

from refinelens.config import EngineConfig, SweepConfig
from refinelens.store.results import QuestionResult
from refinelens.sweeping.ray_engine import RayWorkers
from refinelens.sweeping.ray_worker import RayWorker

STEP = 1000


class Stub(RayWorker):
    """Answers with 64 KB of noise."""

    def _load(self, options, spec, threads):
        table = pa.table({"rank": np.random.default_rng(0).integers(0, 1 << 40, 8192)})
        self._answer = pickle.dumps(QuestionResult(table, {}, {}, {}, ()))

    def _answers(self, places):
        return [(place, self._answer) for place in places]


def resident_mb() -> float:
    """What this process holds now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    """Print a line for every thousand questions."""
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 8000
    spec = SimpleNamespace(manifest={"model": {"device": "cpu"}})
    workers = RayWorkers(SweepConfig("tiny", device="cpu"), spec, EngineConfig(2, engine="ray"), print)
    workers.worker = Stub
    start = last = time.perf_counter()
    print("questions  ms per question  driver MB")
    for done, (place, _) in enumerate(workers.ask(list(range(n)), lambda: False), 1):
        assert place == done - 1
        if done == 1:
            now = time.perf_counter()
            print(f"{done:9}  first after {now - start:.1f} s  {resident_mb():9.0f}")
            last = now
        elif done % STEP == 0:
            now = time.perf_counter()
            print(f"{done:9}  {1e3 * (now - last) / STEP:15.1f}  {resident_mb():9.0f}", flush=True)
            last = now


if __name__ == "__main__":
    import ray_scale  # by its name, so that actors import it too

    ray_scale.main()
