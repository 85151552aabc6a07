"""The analyses that a recipe may name: each makes differences of questions of a run, and a verdict of them."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import FREQUENCY, PREDICTION, STATES, SUBLAYERS
from ..errors import InputError
from ..progress import Progress, unseen
from ..report.probe import FEWEST, chance_of, held_out_hits, sizes_of_states
from ..stats import NO_ESTIMATE, Estimate, estimate, holm, mean_estimates, ratio, resampled_means, sums_and_counts
from ..store.layers import LayersFolder
from ..store.results import LAYERS, Run
from ..store.trajectory import choose_tokens, list_matrix, trajectories
from .readings import Examples, Reading, by_position, contrasts, every_reading
from .recipe import Primary
from .verdict import NOTHING, Finding, Rule, judge, of_estimate, plain

EARLY = 3  # early layers: the first one in so many


@dataclass(frozen=True)
class Evidence:
    """A finished run, and its answers' rows once they are read."""

    run: Run

    @property
    def seed(self) -> int:
        """Of intervals and of resampled tests."""
        return self.run.manifest["seed"]

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return self.run.manifest["model"]["n_layers"]

    @cached_property
    def examples(self) -> Examples:
        """All rows of answers."""
        return Examples.read(self.run)

    def curve(self, reading: Reading) -> list[dict[str, Any]]:
        """Of every gold position the mean over questions that have a value there, with its interval."""
        found = []
        for position, means in by_position(self.examples, reading):
            entry = {"gold_position": position, "questions": len(means)}
            found.append(entry | plain(asdict(_mean(means, self.seed))))
        return found

    def needs(self, extra: str) -> None:
        """Refuse a run without a measure."""
        if extra not in self.run.extras:
            raise InputError(f"{self.run.path}: expected a run with ``measures`` {extra}, got one without; add it")

    def columns(self, reading: Reading, names: Sequence[str]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """Question ids and list columns of the first answer tokens of a lens and a context size."""
        parts = []
        for part in self.run.parts(["question_id", "documents", "answer_token", "lens", *names]):
            part = choose_tokens(part, "first")
            inside = pc.and_(pc.equal(part["lens"], reading.lens), pc.equal(part["documents"], reading.documents))
            parts.append(part.filter(inside))
        table = pa.concat_tables(parts)
        return table["question_id"].to_numpy(), {name: list_matrix(table[name]) for name in names}


def read_evidence(run: Run) -> Evidence:
    """What a verdict follows from.

    Raises:
        InputError: The run is not finished.
    """
    if not run.is_finished:
        raise InputError(f"{run.path}: expected a finished run, got one that is not; go on with it first")
    return Evidence(run)


def _middle(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    return _contrast(evidence, reading, rule, middle_above=True)


def _ends(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    return _contrast(evidence, reading, rule, middle_above=False)


def _contrast(evidence: Evidence, reading: Reading, rule: Rule, middle_above: bool) -> Finding:
    differences = contrasts(evidence.examples, reading, middle_above)
    largest = 1.0 if reading.statistic.startswith("accuracy") else float(evidence.n_layers)
    return judge(differences, rule, evidence.seed, largest) if differences else NOTHING


def _gain_and_cost(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    """Spearman of what a layer gains under the lens and what it costs to do without it, from an analysis of layers."""
    intervention, threshold = options.get("intervention", "skip"), options.get("threshold", 0.5)
    folder = LayersFolder(evidence.run.path / LAYERS)
    path = folder.path / "agreement.csv"
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except OSError:
        raise InputError(f"{path}: expected the table of an analysis of layers, got none; add [layers]") from None
    wanted = {
        "documents": str(reading.documents),
        "gold_position": "",
        "intervention": intervention,
        "lens_statistic": "logprob_gain",
        "coefficient": "spearman",
    }
    found = next((row for row in rows if all(row[name] == value for name, value in wanted.items())), None)
    if found is None:
        return NOTHING
    value = Estimate(*(float(found[f"value{end}"] or math.nan) for end in ("", "_low", "_high")))
    n, name = len(folder.manifest["questions"]), f"Spearman of gain and the cost of {intervention}"
    return of_estimate(name, value, n, threshold)


def _frequent_early(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    """Whether the ten most frequent tokens are the best token of early layers more often than of the output."""
    evidence.needs(FREQUENCY)
    ids, columns = evidence.columns(reading, ["argmax_bucket"])
    frequent = columns["argmax_bucket"] == 0  # [examples, n_layers + 1]
    early = max(1, (frequent.shape[1] - 1) // EARLY)
    d = _of_questions(ids, frequent[:, :early].mean(1) - frequent[:, -1])
    name = f"share of the 10 most frequent tokens, layers 0 to {early - 1} less the output"
    return judge({name: d}, rule, evidence.seed, 1.0)


def _later_half(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    """Whether blocks of the later half add less than half of what those of the first half add, of the stream's norm."""
    evidence.needs(SUBLAYERS)
    ids, columns = evidence.columns(reading, ["attn_size", "mlp_size"])
    size = (columns["attn_size"] + columns["mlp_size"])[:, 1:]  # of blocks
    half = size.shape[1] // 2
    d = _of_questions(ids, 0.5 * size[:, :half].mean(1) - size[:, half:].mean(1))
    name = "half of what blocks of the first half add less what those of the later half add"
    return judge({name: d}, rule, evidence.seed)


def _known_before_told(evidence: Evidence, reading: Reading, rule: Rule, options: dict[str, Any]) -> Finding:
    """How many layers before the answer settles a probe knows where the gold document stands.

    Known is the lowest layer from which the probe's accuracy over all contexts stays halfway or more between chance and
    its largest; told is the mean layer from which the answer stays correct. Both are taken anew of resampled questions.
    """
    evidence.needs(STATES)
    size = dict(sizes_of_states(evidence.run)).get(reading.documents)
    if size is None or len(size["argmax"]) < FEWEST:
        return NOTHING
    name = "layer from which the answer stays less layer from which the position is known"
    hits = held_out_hits(size, evidence.seed).astype(float)  # [questions, contexts, n_layers + 1]
    n, n_contexts, _ = hits.shape
    chance = chance_of(size)
    curves = resampled_means(hits.sum(1), np.full((n, hits.shape[2]), float(n_contexts)), evidence.seed)
    best = int(curves[0].argmax())
    if estimate(float(curves[0, best]), curves[1:, best], n).low <= chance:
        return of_estimate(f"{name}: the probe finds no position", NO_ESTIMATE, n, 0.0)
    halfway = chance + (curves.max(1, keepdims=True) - chance) / 2
    settle = trajectories((curves < halfway).astype(int), 1, axis=-1).settle
    known = np.where(settle < 0, np.nan, settle)
    ids, columns = evidence.columns(reading, ["target_rank"])
    told = trajectories(columns["target_rank"], reading.top, axis=-1)
    values = np.where(told.censored, np.nan, told.settle)[:, None].astype(float)
    sums, counts = sums_and_counts(values, np.unique(ids, return_inverse=True)[1], n)
    found = resampled_means(sums, counts, evidence.seed)[:, 0] - known
    settled = int((counts[:, 0] > 0).sum())
    return of_estimate(name, estimate(float(found[0]), found[1:], settled), settled, 0.0, rule.margin)


_BY_NAME: dict[str, Callable[[Evidence, Reading, Rule, dict[str, Any]], Finding]] = {  # each of `recipe.ANALYSES`
    "middle-above-ends": _middle,
    "ends-above-middle": _ends,
    "gain-and-cost": _gain_and_cost,
    "frequent-early": _frequent_early,
    "later-half": _later_half,
    "known-before-told": _known_before_told,
}


def analyse(evidence: Evidence, primary: Primary, reading: Reading) -> Finding:
    """The verdict of an analysis on one reading.

    Raises:
        InputError: A run that lacks what the analysis is about.
    """
    if reading.target == PREDICTION:
        evidence.needs(PREDICTION)
    return _BY_NAME[primary.analysis](evidence, reading, primary.rule, primary.options)


def secondary(
    evidence: Evidence, primary: Primary, dimensions: dict[str, list], progress: Progress = unseen
) -> list[dict[str, Any]]:
    """Every other reading with its differences; p values are corrected together (Holm), and verdicts follow from those.

    Args:
        evidence: The run.
        primary: The analysis, whose rule holds for the others too.
        dimensions: See `every_reading`.
        progress: Told of each.
    """
    if not dimensions:
        return []
    readings = every_reading(primary.reading, dimensions)
    findings = []
    for done, reading in enumerate(readings):
        findings.append(analyse(evidence, primary, reading))
        progress("readings", done + 1, len(readings))
    adjusted = holm([finding.p for finding in findings])
    found = []
    for reading, finding, p in zip(readings, findings, adjusted, strict=True):
        entry = finding.entry()
        sides = [{name: side[name] for name in ("name", "questions", "difference")} for side in entry["sides"]]
        numbers = {name: entry[name] for name in ("n", "estimate", "p")}
        supported = bool(p < primary.rule.alpha)
        found.append(asdict(reading) | numbers | {"p_holm": plain(p), "supported": supported, "sides": sides})
    return found


def _of_questions(ids: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Means of every question over its examples; NaN where it has none."""
    unique, owner = np.unique(ids, return_inverse=True)
    return ratio(*sums_and_counts(values.astype(float)[:, None], owner, len(unique)))[:, 0]


def _mean(values: np.ndarray, seed: int) -> Estimate:
    return mean_estimates(values[:, None], np.ones((len(values), 1)), seed)[0] if len(values) else NO_ESTIMATE
