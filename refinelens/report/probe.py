"""A linear probe of the gold position: what a layer's state at the token before the answer says of where it stands.

After Lu et al. 2024 (arXiv 2406.14673), who fit a linear classifier per layer to the state of the last prompt token: a
model may know where the answer stands and yet not tell it. Here it is ridge regression, held out over questions
(`report.ridge`), beside the accuracy of the lens at the same layer and of the model.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from ..config import STATES
from ..placement import ORACLE, condition_name
from ..stats import SHARE, Estimate, groups, mean_estimates
from ..store.results import Run
from ..store.trajectory import list_matrix
from .further_rows import ProbeRow
from .ridge import FOLDS, fold_of_questions, held_out_predictions
from .rows import EVERY_POSITION, Report, format_estimate

FEWEST = 2 * FOLDS  # questions: two or more in every fold
FILE = "probe.csv"
ESTIMATES = ("accuracy", "lens_accuracy", "output_accuracy")
COLUMNS = ["question_id", "documents", "gold_position", "answer_id", "argmax", STATES]
HEAD = ["documents", "gold_position", "layer", "questions", "chance"]
HEAD += [f"{name}{end}" for name in ESTIMATES for end in ("", "_low", "_high")]


def probe_rows(run: Run) -> list[ProbeRow] | None:
    """The probes of every context size with two or more gold positions and `FEWEST` questions.

    They take a minute of a large run, so that those of its file are taken where it is there; a run that goes on removes
    it. None of a run that was not asked for states.
    """
    if STATES not in run.extras:
        return None
    found = _of_file(run)
    if found is None:
        seed = run.manifest["seed"]
        found = [row for documents, size in sizes_of_states(run) for row in rows_of_size(documents, size, seed)]
    return found


def sizes_of_states(run: Run) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
    """Columns of every context size with several gold positions, ``[questions, contexts of each, ...]``."""
    held: dict[str, list[np.ndarray]] = {name: [] for name in COLUMNS}
    for part in run.parts(COLUMNS):
        part = part.filter(pc.is_valid(part[STATES]))
        for name in COLUMNS:
            held[name].append(list_matrix(part[name]) if name in ("argmax", STATES) else part[name].to_numpy())
    if not any(map(len, held["documents"])):
        return
    whole = {name: np.concatenate([one for one in held.pop(name) if len(one)]) for name in COLUMNS}
    for documents, inside in groups(whole["documents"]):
        order = np.flatnonzero(inside)[np.lexsort([whole["gold_position"][inside], whole["question_id"][inside]])]
        questions = len(np.unique(whole["question_id"][inside]))
        if documents > ORACLE and len(np.unique(whole["gold_position"][inside])) > 1:
            yield documents, {name: v[order].reshape(questions, -1, *v.shape[1:]) for name, v in whole.items()}


def rows_of_size(documents: int, size: dict[str, np.ndarray], seed: int) -> Iterator[ProbeRow]:
    """The probes of one context size, none with fewer than `FEWEST` questions.

    Args:
        documents: In a context.
        size: `COLUMNS` by name, ``[questions, contexts]`` each; ``argmax`` also ``[..., n_layers + 1]``, states
            ``[..., (n_layers + 1) * d_model]``.
        seed: Of folds and intervals.
    """
    right = size["argmax"] == size["answer_id"][..., None]  # [questions, contexts, n_layers + 1]
    n, n_contexts, n_points = right.shape
    if n < FEWEST:
        return
    positions, chance = np.unique(size["gold_position"]), chance_of(size)
    hits = held_out_hits(size, seed)
    both = np.concatenate([hits, right], axis=-1).astype(float)
    for position in (EVERY_POSITION, *positions.tolist()):
        inside = np.full((n, n_contexts), True) if position is EVERY_POSITION else size["gold_position"] == position
        counts = np.broadcast_to(inside.sum(1)[:, None].astype(float), (n, both.shape[-1]))
        own = mean_estimates((both * inside[..., None]).sum(1), counts, seed, [SHARE] * both.shape[-1])
        for layer in range(n_points):
            estimates = (own[layer], own[n_points + layer], own[-1])
            yield ProbeRow(documents, position, layer, n, chance, *estimates)


def chance_of(size: dict[str, np.ndarray]) -> float:
    """Accuracy of guessing: the share of the most frequent gold position of a size as of `sizes_of_states`."""
    counts = np.unique(size["gold_position"], return_counts=True)[1]
    return float(counts.max() / counts.sum())


def held_out_hits(size: dict[str, np.ndarray], seed: int) -> np.ndarray:
    """Whether a probe of other questions finds the gold position, bool ``[questions, contexts, n_layers + 1]``.

    Args:
        size: Of `sizes_of_states`.
        seed: Of the folds.
    """
    n, n_contexts, n_points = size["argmax"].shape
    classes = np.unique(size["gold_position"], return_inverse=True)[1].reshape(n, n_contexts)
    folds, states = fold_of_questions(n, seed), size[STATES].reshape(n, n_contexts, n_points, -1)
    found = [held_out_predictions(states[:, :, layer], classes, folds) == classes for layer in range(n_points)]
    return np.stack(found, axis=-1)


def _of_file(run: Run) -> list[ProbeRow] | None:
    """The rows that were written, None where there are none that can be read."""
    try:
        with (run.path / FILE).open(encoding="utf-8", newline="") as file:
            head, *lines = csv.reader(file)
        if head != HEAD:
            return None
        return [_row(line) for line in lines]
    except (OSError, ValueError):
        return None


def _row(line: list[str]) -> ProbeRow:
    documents, position, layer, questions, chance, *numbers = line
    values = [float(number) if number else math.nan for number in numbers]
    estimates = [Estimate(*values[start : start + 3]) for start in range(0, len(values), 3)]
    gold = int(position) if position else EVERY_POSITION
    return ProbeRow(int(documents), gold, int(layer), int(questions), float(chance), *estimates)


def probe_lines(report: Report) -> list[str]:
    """A line per context size: the best layer of the probe, or why there is none."""
    if report.probe is None:
        return []
    lines = []
    positions: dict[int, dict[int, int]] = {}  # questions by gold position
    for row in report.rows:
        positions.setdefault(row.documents, {})[row.gold_position] = row.n
    for documents, of_size in positions.items():
        rows = [row for row in report.probe if (row.documents, row.gold_position) == (documents, EVERY_POSITION)]
        where = f"Probe of the gold position, {condition_name(documents)}"
        if rows:
            best = max(rows, key=lambda row: row.accuracy.value)
            lines.append(
                f"{where}: found in {format_estimate(best.accuracy, 2, interval=True)} of the contexts from the state "
                f"before the answer at layer {best.layer}, the best of all (chance {best.chance:.2f}); the answer is "
                f"right in {format_estimate(best.lens_accuracy, 2)} by the lens there, in "
                f"{format_estimate(best.output_accuracy, 2)} at the output. {best.questions} questions, held out in "
                f"{FOLDS} folds; {FILE} has all layers."
            )
        elif documents > ORACLE and len(of_size) > 1:
            lines.append(
                f"{where}: none; expected at least {FEWEST} questions, two in each of {FOLDS} folds, got "
                f"{max(of_size.values())}."
            )
    return lines
