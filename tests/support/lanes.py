"""Which tests `make test-fast` runs: those without a mark, whose bodies take half a second of processor time at most.

The rule stands in CONTRIBUTING.md. Processor time, also of processes that a test starts, hardly depends on what else
the machine does.
"""

import os

import pytest

LIMIT = 0.5  # seconds
MARKS = ("medium", "slow")
MEASURED = "processor_seconds"


def _processor_seconds() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    before = _processor_seconds()
    result = yield
    took = _processor_seconds() - before
    item.user_properties.append((MEASURED, took))
    return result


def pytest_terminal_summary(terminalreporter):
    """Lists what is above the limit; no test fails by the time it took, which machines decide."""
    above = {}
    for report in terminalreporter.getreports("passed"):
        took = dict(report.user_properties).get(MEASURED, 0.0)
        if took > LIMIT and not any(mark in report.keywords for mark in MARKS):
            above[report.nodeid] = took
    if above:
        terminalreporter.section("without a mark, and above half a second of processor time: mark them medium")
        for name, took in sorted(above.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{took:5.1f} s  {name}")
