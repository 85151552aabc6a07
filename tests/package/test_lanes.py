"""The rule of what is a fast test, held against tests that were made to break it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).resolve().parents[1] / "support"
TESTS = """
import subprocess, sys, time
import lanes, pytest

lanes.LIMIT = 0.05
SPIN = "import time\\nstart = time.process_time()\\nwhile time.process_time() < start + 0.3: pass"

def test_short(): pass
def test_long(): exec(SPIN, {})
def test_long_in_a_child(): subprocess.run([sys.executable, "-c", SPIN])
@pytest.mark.medium
def test_marked(): test_long()
"""
LONG = ["test_them.py::test_long", "test_them.py::test_long_in_a_child"]


def run(folder):
    (folder / "test_them.py").write_text(TESTS)
    options = ["-p", "lanes", "--noconftest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir", folder, "-rf"]
    command = [sys.executable, "-m", "pytest", *options, folder]
    environment = os.environ | {"PYTHONPATH": str(SUPPORT), "COLUMNS": "200", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder).stdout


@pytest.mark.medium
def test_what_is_above_a_second_is_listed(tmp_path):
    output = run(tmp_path)
    assert "4 passed" in output and "mark them medium" in output
    assert sorted(line.split()[-1] for line in output.splitlines() if " s  test_them" in line) == LONG
