"""How large the page of a run is, and how soon a browser has it: from opening the file to the first sorted table.

    python benchmarks/page.py RUN [--contexts 2000] [--rounds 5] [--chromium chromium]

Needs the package playwright and Chromium. Every round opens the page anew, with the network off; then sorts the table
and filters it by a word. Medians of wall time. Correctness first: the table must count as many contexts as the page
holds.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from harness import machine, options_of
from playwright.sync_api import sync_playwright

from refinelens.run_page import report_page
from refinelens.store.results import open_run

READY = "body[data-ready]"
GOALS = {"megabytes": 8.0, "ready": 1.0, "sort": 1.0, "filter": 1.0}


def main() -> None:
    """Measure and print."""
    options = options_of(__doc__, folder=True, contexts=2000, rounds=5, chromium="chromium")
    started = time.perf_counter()
    text, words = report_page([open_run(options.folder)], options.contexts)
    written = time.perf_counter() - started
    path = Path(tempfile.mkdtemp()) / "report.html"
    path.write_text(text, encoding="utf-8")
    found: dict[str, list[float]] = {"ready": [], "sort": [], "filter": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which(options.chromium), args=["--no-sandbox"])
        for _ in range(options.rounds):
            page = browser.new_context(offline=True).new_page()
            started = time.perf_counter()
            page.goto(path.as_uri())
            page.wait_for_selector(READY)
            found["ready"].append(time.perf_counter() - started)
            count = page.locator("#count").text_content()
            if count.split()[0] not in words:
                raise SystemExit(f"expected the contexts of the page, {words}, got a table of {count}")
            for name, act in {
                "sort": "() => document.querySelectorAll('.heads button')[5].click()",
                "filter": "() => { const i = document.querySelector('#filter'); i.value = 'what';"
                " i.dispatchEvent(new Event('input')); }",
            }.items():
                code = f"() => {{ const t = performance.now(); ({act})(); return performance.now() - t; }}"
                found[name].append(page.evaluate(code) / 1e3)
            page.close()
        browser.close()
    numbers = {"megabytes": len(text.encode()) / 1e6} | {name: median(seconds) for name, seconds in found.items()}
    print(f"{machine()}; {words}; written in {written:.1f} s")
    for name, value in numbers.items():
        unit = "MB" if name == "megabytes" else "s"
        print(f"{name}: {value:.3f} {unit} (goal: under {GOALS[name]:g} {unit})")


if __name__ == "__main__":
    sys.exit(main())
