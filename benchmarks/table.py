"""Print the tables of a benchmark run, and the goals: `python benchmarks/table.py FILE.json`."""

import json
import sys
from pathlib import Path

from goals import CPU_GOALS, Reports, goal_row

from refinelens.bench.table import markdown_rows, markdown_table, report_from_json


def read_reports(path: str) -> Reports:
    """The reports that pytest-benchmark wrote to ``path``, by case."""
    runs = json.loads(Path(path).read_text())["benchmarks"]
    return {run["param"]: report_from_json(run["extra_info"]["report"]) for run in runs}


def tables(reports: Reports) -> str:
    """Markdown: one table per case; on a CPU the goals under them."""
    parts = [f"### {case}\n\n{markdown_table(report)}" for case, report in reports.items()]
    if any(report.device_type == "cpu" for report in reports.values()):
        rows = [["goal", "bound", "measured", ""], *(goal_row(goal, reports) for goal in CPU_GOALS)]
        parts.append(f"### Goals\n\n{markdown_rows(rows)}")
    return "\n\n".join(parts)


if __name__ == "__main__":
    print(tables(read_reports(sys.argv[1])))
