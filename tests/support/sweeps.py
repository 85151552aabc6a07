"""What tests do with runs: read their rows, and stop a sweep under way."""

import pyarrow.parquet as pq

from refinelens.store.results import open_run


def predictions(run):
    """All rows, dicts."""
    return pq.read_table(run.path / "predictions").to_pylist()


def assert_same_run(path, whole):
    """Every byte that tells of predictions, and every sum."""
    run = open_run(path)
    assert run.manifest["status"] == "finished"
    assert run.manifest["parts"] == whole.manifest["parts"] and run.manifest["counts"] == whole.manifest["counts"]
    for name in ("trajectories.parquet", "summary.csv", "paired.csv", "inverted_u.csv"):
        assert (run.path / name).read_bytes() == (whole.path / name).read_bytes()
    return run


def stop_after(questions):
    """What a sweep takes as ``progress`` to be interrupted once so many questions are finished."""

    def stop(what, done, *rest):
        if done == questions:
            raise KeyboardInterrupt

    return stop
