"""The rule of what is a fast test, held against tests that were made to break it."""

import os
import subprocess
import sys
from pathlib import Path

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TESTS = """
import subprocess, sys, time
import lanes, pytest

lanes.LIMIT, lanes.FAILS = 0.05, {fails}
SPIN = "import time\\nstart = time.process_time()\\nwhile time.process_time() < start + 0.3: pass"

def test_short(): pass
def test_long(): exec(SPIN, {{}})
def test_long_in_a_child(): subprocess.run([sys.executable, "-c", SPIN])
@pytest.mark.medium
def test_marked(): test_long()
"""
LONG = ["test_them.py::test_long", "test_them.py::test_long_in_a_child"]


def run(folder, fails):
    (folder / "test_them.py").write_text(TESTS.format(fails=fails))
    options = ["-p", "lanes", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, "-rf"]
    command = [sys.executable, "-m", "pytest", *options, folder]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder).stdout


def test_a_long_test_without_a_mark_fails(tmp_path):
    output = run(tmp_path, fails=1)
    assert "2 failed, 2 passed" in output
    for name in LONG:
        assert f"FAILED {name} - Failed: expected at most 0.05 s of processor time of a test without a mark" in output


def test_one_a_little_above_is_listed(tmp_path):
    output = run(tmp_path, fails=1e9)
    assert "4 passed" in output and "mark them medium" in output
    assert sorted(line.split()[-1] for line in output.splitlines() if " s  test_them" in line) == LONG
