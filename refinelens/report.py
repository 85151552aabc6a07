"""The table, the CSV and the figures of a run. Reads results only; no torch, no model."""

from __future__ import annotations

import csv
import math
import textwrap
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from .errors import InputError
from .results import OUTPUTS, Run, write_whole
from .summary import ESTIMATES, Estimate, SummaryRow, choose_tokens, summarise, trajectory_table


@dataclass(frozen=True)
class Report:
    """What a run says: read and summarised once, then written, drawn or printed."""

    manifest: dict
    trajectories: pa.Table  # of all answer tokens
    rows: list[SummaryRow]  # of the answer tokens that the run's tables are about
    cautions: list[str]


def read_report(run: Run) -> Report:
    """Summarise the predictions that a run has.

    Raises:
        InputError: The parts hold fewer rows than the manifest says (a run that was killed may hold more).
    """
    manifest = run.manifest
    table = trajectory_table(run, manifest["arguments"]["top"])
    expected = manifest["counts"].get("rows", 0)
    if len(table) < expected:
        raise InputError(f"{run.parts_path}: expected {expected} rows, got {len(table)}; parts are missing")
    chosen = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    return Report(manifest, table, summarise(chosen, manifest["seed"]), caution(manifest, chosen))


def write_outputs(run: Run, report: Report) -> None:
    """Write trajectories, summary and figures."""
    run.write_trajectories(report.trajectories)
    write_csv(run, report.rows)
    draw_figures(run, report)


def show_run(run: Run, console: Console) -> None:
    """Print the table of a run from its predictions; files that are missing are written if they can be."""
    report = read_report(run)
    if not all((run.path / name).exists() for name in OUTPUTS):
        with suppress(OSError):
            write_outputs(run, report)
    print_table(console, report)


def caution(manifest: dict, table: pa.Table) -> list[str]:
    """A line where most examples settle at the output: then a small depth speaks of the lens, not the model."""
    settle = table["settle"].drop_null().to_numpy()
    at_output = int((settle == manifest["model"]["n_layers"]).sum())
    if 2 * at_output <= len(settle):
        return []
    return [
        f"Caution: {at_output} of {len(settle)} settled examples settle only at the output: the plain logit lens "
        "cannot resolve refinement depth on this model, and a depth near 0 speaks of the lens."
    ]


def write_csv(run: Run, rows: list[SummaryRow]) -> None:
    """Write ``summary.csv``: one line per context size and gold position, each estimate with its interval."""
    names = [f"{name}{suffix}" for name in ESTIMATES for suffix in ("", "_low", "_high")]

    def write(path: Path) -> None:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["documents", "gold_position", "n", *names])
            for row in rows:
                estimates = [getattr(row, name) for name in ESTIMATES]
                numbers = [x for e in estimates for x in (e.value, e.low, e.high)]
                cells = ["" if math.isnan(x) else f"{x:.6g}" for x in numbers]
                writer.writerow([row.documents, row.gold_position, row.n, *cells])

    write_whole(run.path / "summary.csv", write)


def print_table(console: Console, report: Report) -> None:
    """Print the summary and, under it, what a reader needs to trust it."""
    manifest, rows = report.manifest, report.rows
    console.print(f"{title(manifest)}: refinement by gold position\n", highlight=False, markup=False)
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_edge=False)
    for heading in ("docs", "gold", "n", "accuracy", "cens.", "depth", "median", "first", "settle"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            str(row.documents),
            str(row.gold_position),
            str(row.n),
            format_estimate(row.accuracy, 2, interval=True),
            format_estimate(row.share_censored, 2),
            format_estimate(row.mean_depth, 1, interval=True),
            format_estimate(row.median_depth, 1),
            format_estimate(row.mean_first_correct, 1),
            format_estimate(row.mean_settle, 1),
            end_section=row.gold_position == max(r.gold_position for r in rows if r.documents == row.documents),
        )
    console.print(table)
    for line in [*notes(manifest), *report.cautions]:
        console.print(line, style="dim", highlight=False, markup=False, soft_wrap=True)


def title(manifest: dict) -> str:
    """Model and task in words; of a path the last part."""
    names = [manifest[what]["name"] for what in ("model", "task")]
    return " on ".join(name if name.count("/") == 1 and name[0] not in "./" else Path(name).name for name in names)


def format_estimate(estimate: Estimate, digits: int, interval: bool = False) -> str:
    """``0.83`` or ``0.83 [0.67,1.00]``; a dash where it does not exist."""
    if math.isnan(estimate.value):
        return "-"
    text = f"{estimate.value:.{digits}f}"
    return f"{text} [{estimate.low:.{digits}f},{estimate.high:.{digits}f}]" if interval else text


def notes(manifest: dict) -> list[str]:
    """The lines under the table: what the numbers are, and the checks behind them."""
    model, counts, arguments = manifest["model"], manifest["counts"], manifest["arguments"]
    parity = model["parity"]
    reasons = ", ".join(f"{len(ids)} at {reason}" for reason, ids in counts["left_out"].items())
    lines = [
        "gold: 0-based position of the gold document. accuracy: the model's own prediction. cens.: the target is not "
        f"correct at the output. first, settle: mean layers, 0 (embedding) to {model['n_layers']} (output); depth = "
        "settle - first. Brackets: 95 % bootstrap intervals over questions, all of them in summary.csv.",
        f"Parity: the lens at layer {model['n_layers']} equals the model's own logits: largest difference "
        f"{parity['max_difference']:.2g}, allowed {parity['tolerance'] * parity['logit_range']:.2g}, same predictions.",
        f"Left out: {reasons or 'no question'} (of {counts['questions']}). Target: {arguments['target']}, "
        f"rank <= {arguments['top']}, answer tokens: {arguments['answer_tokens']}. Lens: plain logit lens, backend "
        f"{model['backend']}, {model['dtype']} on {model['device']}.",
    ]
    if model["unused_weights"]:
        first, count = model["unused_weights"][0], len(model["unused_weights"])
        lines.append(f"Caution: {count} tensors of the checkpoint have no place in this model, such as {first}.")
    if manifest["seconds"]:
        lines.append(
            f"{counts['done']} questions, {counts['contexts']} contexts, {counts['lens_rows']} rows of the lens "
            f"in {manifest['seconds']:.0f} s."
        )
    if manifest["status"] != "finished":
        status = "not finished" if manifest["status"] == "running" else manifest["status"]
        lines.append(f"This run is {status}: {counts['done']} of {counts['questions']} questions.")
    return lines


def draw_figures(run: Run, report: Report) -> None:
    """Write ``depth.png`` and ``accuracy.png``: by gold position, one line per context size."""
    import matplotlib

    matplotlib.use("agg")
    _draw(run, report, "mean_depth", "depth.png", "mean refinement depth (layers)", report.cautions)
    _draw(run, report, "accuracy", "accuracy.png", "accuracy of the next token", [])


def _draw(run: Run, report: Report, name: str, file: str, label: str, cautions: list[str]) -> None:
    from matplotlib import pyplot as plt
    from matplotlib.ticker import MaxNLocator

    manifest, rows = report.manifest, report.rows
    figure, axes = plt.subplots(figsize=(6.4, 4.0), layout="constrained")
    sizes = sorted({row.documents for row in rows})
    for index, size in enumerate(sizes):
        line = [row for row in rows if row.documents == size and not math.isnan(getattr(row, name).value)]
        estimates = [getattr(row, name) for row in line]
        x, colour = [row.gold_position for row in line], f"C{index}"
        axes.plot(x, [e.value for e in estimates], marker="o", color=colour, label=f"{size} documents")
        axes.fill_between(x, [e.low for e in estimates], [e.high for e in estimates], color=colour, alpha=0.15, lw=0)
    questions = max((row.n for row in rows), default=0)
    axes.set_title(f"{title(manifest)}, {questions} questions", fontsize=10, parse_math=False)
    axes.set_xlabel("gold position (0-based); shaded: 95 % bootstrap interval")
    if cautions:
        figure.supxlabel("\n".join(textwrap.fill(line, 95) for line in cautions), fontsize=8)
    axes.set_ylabel(label)
    axes.set_ylim(0, 1.02 if name == "accuracy" else max(1.0, axes.get_ylim()[1]))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    if sizes:
        axes.legend(frameon=False)
    write_whole(run.path / file, lambda path: figure.savefig(path, dpi=150, format="png"))
    plt.close(figure)
