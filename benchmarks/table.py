"""Print the table of a benchmark run: `python benchmarks/table.py FILE.json`."""

import json
import sys
from pathlib import Path


def table(path: str) -> str:
    """Markdown table of the results that pytest-benchmark wrote to ``path``."""
    runs = [b["extra_info"] for b in json.loads(Path(path).read_text())["benchmarks"]]
    lines = [f"{runs[0]['device']}, torch {runs[0]['torch']}; medians of 7 rounds, each beside a round of naive.", ""]
    head = "shape | competitor | ms | spread | naive / this | TFLOP/s | MB moved | extra MB | argmax, rank off fp64"
    lines += [f"| {head} |", "|" + " --- |" * (head.count("|") + 1)]
    for run in runs:
        wrong = run.get("mismatches")
        cells = [
            run["shape"],
            run["competitor"],
            f"{run['median_seconds'] * 1e3:.3g}",
            f"{run['spread']:.0%}",
            f"{run['naive_over_this']:.2f}",
            f"{run['flops'] / run['median_seconds'] / 1e12:.3g}",
            f"{run['bytes'] / 1e6:.0f}",
            f"{run['peak_memory'] / 1e6:.1f}",
            f"{wrong['argmax']}, {wrong['rank']} of {wrong['rows']}" if wrong else "-",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(sys.argv[1]))
