"""What a run says, summarised once: differences between gold positions, and the test of the inverted U.

Is an answer refined over more layers where it stands in the middle? The test is
paired over questions, of one lens, threshold and context size of n documents. The middle are the gold positions in the
middle third, ``|p - (n - 1) / 2| <= (n - 1) / 6``. A question's difference to an end, position 0 or n - 1, is the mean
depth of its settled examples in the middle less that of its settled examples there. Censored examples have no depth: a
question without a settled example on either side is left out of that difference, and counted. Depth that merely grows
or falls from one end to the other is no inverted U: the middle has to be deeper than both ends, so that both tests are
one-sided and p is the larger one of the two (an intersection-union test, Berger 1982); of an upright U it is near 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations, groupby
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..config import ORACLE, condition_name
from ..errors import InputError, resume_call
from ..stats import NO_ESTIMATE, Estimate, mean_estimates, paired_estimate, ratio, sums_and_counts
from ..store.results import Run
from ..store.trajectory import choose_tokens, read_trajectories
from .summary import Caution, Cell, SummaryRow, find_cautions, reading_cells, summarise

EXACT_QUESTIONS = 16  # with a difference other than 0; up to here all 2**n sign patterns are counted
SIGN_RESAMPLES = 9999  # beyond
EQUAL = 1e-9  # as a share: differences of means that are the same but for rounding
FLIPPED_VALUES = 1 << 20  # held at a time
VOID = "void: this lens cannot resolve refinement depth on this model"


def format_estimate(estimate: Estimate, digits: int, interval: bool = False, sign: bool = False) -> str:
    """``0.83`` or ``0.83 [0.67,1.00]``; a dash where it does not exist, and no brackets without an interval."""
    if math.isnan(estimate.value):
        return "-"
    text = f"{estimate.value:{'+' if sign else ''}z.{digits}f}"
    with_interval = interval and not math.isnan(estimate.low)
    return f"{text} [{estimate.low:z.{digits}f},{estimate.high:z.{digits}f}]" if with_interval else text


def counted(n: int, noun: str) -> str:
    """``1 question``, ``12 questions``."""
    return f"{n} {noun}{'' if n == 1 else 's'}"


@dataclass(frozen=True)
class PairedDifference:
    """Statistics with the gold document at one position less those at an earlier one, means over questions.

    A question counts where it has the statistic at both positions. The accuracies are the model's own, the same for
    every lens and threshold; their intervals are those of paired shares, that of depth is a bootstrap over questions.
    """

    lens: str
    top: int
    documents: int
    gold_position: int
    less_position: int  # the earlier one, whose statistics are subtracted
    questions: int
    accuracy: Estimate
    accuracy_all: Estimate
    accuracy_generated: Estimate
    questions_settled: int  # that have a depth at both positions
    depth: Estimate  # layers


def paired_differences(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], seed: int
) -> list[PairedDifference]:
    """Every pair of gold positions of every lens, threshold and context size.

    Args:
        table: Trajectories without lists, of the examples that the run's tables are about.
        lenses: Names of the lenses, in the order wanted.
        tops: Thresholds, in the order wanted.
        seed: Seed of the bootstrap of depth over questions.
    """
    return [
        PairedDifference(lens, top, documents, *values)
        for lens, top, documents, cell in reading_cells(table, lenses, tops)
        if documents > ORACLE
        for values in _pairs(cell, seed)
    ]


def paired_line(differences: list[PairedDifference]) -> str:
    """The accuracies of one context size compared: gold in the middle and last against first, and each other."""
    documents = differences[0].documents
    wanted = {0, (documents - 1) // 2, documents - 1}
    pairs = [d for d in differences if {d.gold_position, d.less_position} <= wanted]
    words = [
        f"{d.gold_position} - {d.less_position}: {format_estimate(d.accuracy, 2, interval=True, sign=True)}"
        for d in pairs
    ]
    return f"Accuracy, gold at one position less at another, {condition_name(documents)}: {'; '.join(words)}."


def _pairs(cell: Cell, seed: int) -> Iterator[tuple]:
    positions = np.unique(cell["gold_position"]).tolist()
    ids, row = np.unique(cell["question_id"], return_inverse=True)
    pairs = list(combinations(range(len(positions)), 2))
    if not pairs:
        return
    first = cell["answer_token"] == 0  # what is said of a whole context counts once
    values = [np.where(first, cell[name], np.nan) for name in ("answer_correct", "all_correct", "generated_correct")]
    depth = np.where(cell["final_correct"], cell["depth"].astype(float), np.nan)
    place = row * len(positions) + np.searchsorted(positions, cell["gold_position"])
    sums, counts = sums_and_counts(np.stack([*values, depth], 1), place, len(ids) * len(positions))
    means = ratio(sums, counts).reshape(len(ids), len(positions), -1)  # [questions, positions, statistics]
    earlier, later = np.array(pairs).T
    *accuracies, depths = np.moveaxis(means[:, later] - means[:, earlier], -1, 0)  # [questions, pairs] each
    exists = ~np.isnan(depths)
    estimates = mean_estimates(np.where(exists, depths, 0.0), exists.astype(float), seed)
    for index, (a, b) in enumerate(pairs):
        shares = [paired_estimate(differences[:, index]) for differences in accuracies]
        questions = int((~np.isnan(accuracies[0][:, index])).sum())
        yield positions[b], positions[a], questions, *shares, int(exists[:, index].sum()), estimates[index]


@dataclass(frozen=True)
class InvertedU:
    """Depth in the middle less depth at each end; NaN where a number does not exist, with the reason in words.

    What begins with ``first_`` is about gold position 0, with ``last_`` about position n - 1.
    """

    lens: str
    top: int
    documents: int
    middle: tuple[int, ...]  # gold positions
    questions_asked: int
    first_questions: int  # with a settled example in the middle and one at this end
    first_differ: int  # of these, whose difference is not 0
    first_difference: Estimate  # layers, mean over questions
    first_d_z: float  # mean / standard deviation of the differences (Cohen 1988)
    first_p: float  # one-sided: that the middle is deeper
    last_questions: int
    last_differ: int
    last_difference: Estimate
    last_d_z: float
    last_p: float
    p: float  # the larger of both
    p_holm: float  # over the context sizes of this lens and threshold
    method: str  # exact sign-flip, or its resampled form; empty without a test
    reason: str  # why there is no test; empty with one

    def line(self) -> str:
        """The test in one line."""
        test = self.reason or f"p = {_p(self.p)} (Holm {_p(self.p_holm)}; {self.method}){self._shallower()}"
        sides = f"middle - first {self._side('first')}, middle - last {self._side('last')}"
        return f"Inverted U, {self.lens}, rank <= {self.top}, {self.documents} documents: {sides}; {test}."

    def _side(self, end: str) -> str:
        d, d_z = getattr(self, f"{end}_difference"), getattr(self, f"{end}_d_z")
        words = [format_estimate(d, 2, interval=True, sign=True), *([] if np.isnan(d.value) else ["layers"])]
        words += [] if np.isnan(d_z) else [f"d_z {d_z:z.2f}"]
        counts = f"{getattr(self, f'{end}_differ')} of {counted(getattr(self, f'{end}_questions'), 'question')}"
        return " ".join([*words, f"(differs in {counts})"])

    def _shallower(self) -> str:
        ends = [end for end in ("first", "last") if getattr(self, f"{end}_difference").value < 0]
        where = "both ends" if len(ends) == 2 else f"the {ends[0]} position" if ends else ""
        return f"; the middle is shallower than {where}" if where else ""


def middle_positions(documents: int) -> list[int]:
    """Gold positions in the middle third of a context."""
    return [p for p in range(documents) if 3 * abs(2 * p - (documents - 1)) <= documents - 1 and documents > 1]


def inverted_u_tests(
    table: pa.Table,
    lenses: tuple[str, ...],
    tops: tuple[int, ...],
    blind: set[tuple[str, int]],
    seed: int,
) -> list[InvertedU]:
    """A test for every lens, threshold and context size that was asked at both ends and in the middle.

    Args:
        table: Trajectories without lists, of the examples that the run's tables are about.
        lenses: Names of the lenses, in the order wanted.
        tops: Thresholds, in the order wanted.
        blind: Lenses and thresholds that cannot resolve depth; there the test is void.
        seed: Seed of the intervals and of resampled tests.
    """
    tests = []
    for reading, cells in groupby(reading_cells(table, lenses, tops), key=lambda item: item[:2]):
        found = [_test(lens, top, size, cell, reading in blind, seed) for lens, top, size, cell in cells]
        found = [test for test in found if test is not None]
        adjusted = holm([test.p for test in found])
        tests += [replace(test, p_holm=p) for test, p in zip(found, adjusted, strict=True)]
    return tests


def holm(p: list[float]) -> list[float]:
    """Adjusted p values (Holm 1979); NaN stays, and does not count as a test."""
    adjusted, largest = list(p), 0.0
    tested = sorted((i for i in range(len(p)) if not np.isnan(p[i])), key=lambda i: p[i])
    for step, i in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - step) * p[i]))
        adjusted[i] = largest
    return adjusted


def sign_flip(differences: np.ndarray, seed: int) -> tuple[float, str]:
    """One-sided p, of a mean above 0, under all changes of sign, and how it was found.

    Args:
        differences: ``[n]``, one per question; at least 2, not all 0.
        seed: Seed of the sign patterns drawn where more than `EXACT_QUESTIONS` differences are not 0.
    """
    from scipy.stats import permutation_test  # takes a second to import

    differences = differences[differences != 0]  # a zero is the same under either sign
    if len(differences) == 1:
        differences = np.append(differences, 0.0)  # scipy wants two values
    exact = len(differences) <= EXACT_QUESTIONS
    resamples = 2**EXACT_QUESTIONS if exact else SIGN_RESAMPLES
    result = permutation_test(
        (differences,),
        lambda values, axis: values.mean(axis=axis),
        permutation_type="samples",
        vectorized=True,
        alternative="greater",
        n_resamples=resamples,
        batch=max(1, FLIPPED_VALUES // len(differences)),
        random_state=np.random.default_rng(seed),
    )
    return float(result.pvalue), "exact sign-flip" if exact else f"sign-flip, {SIGN_RESAMPLES} patterns, seed {seed}"


def differences_to_end(cell: Cell, middle: list[int], end: int) -> np.ndarray:
    """Of every question asked: mean depth in the middle less at the end, NaN where either has no depth."""
    ids, owner = np.unique(cell["question_id"], return_inverse=True)
    inside = np.stack([np.isin(cell["gold_position"], positions) for positions in (middle, [end])], 1)
    depth = np.where(inside & cell["final_correct"][:, None], cell["depth"][:, None], np.nan)
    in_the_middle, at_the_end = ratio(*sums_and_counts(depth, owner, len(ids))).T
    return in_the_middle - at_the_end


def _test(lens: str, top: int, documents: int, cell: Cell, blind: bool, seed: int) -> InvertedU | None:
    asked = set(cell["gold_position"].tolist())
    ends = {"first": 0, "last": documents - 1}
    middle = [p for p in middle_positions(documents) if p in asked]
    if not middle or not asked.issuperset(ends.values()):
        return None
    every = {end: differences_to_end(cell, middle, position) for end, position in ends.items()}
    sides = {end: d[~np.isnan(d)] for end, d in every.items()}
    reason = VOID if blind else _no_test(sides)
    found, p, methods = {}, dict.fromkeys(ends, np.nan), []
    for end, d in sides.items():
        if not reason:
            p[end], method = sign_flip(d, seed)
            methods += [method] if method not in methods else []
        found |= {f"{end}_{name}": value for name, value in _effect(d, seed).items()} | {f"{end}_p": p[end]}
    return InvertedU(
        *(lens, top, documents, tuple(middle), len(every["first"])),
        **found,
        **{"p": max(p.values()), "p_holm": np.nan, "method": " and ".join(methods), "reason": reason},
    )


def _effect(d: np.ndarray, seed: int) -> dict:
    effect, d_z = NO_ESTIMATE, np.nan
    if len(d):
        effect = mean_estimates(d[:, None], np.ones((len(d), 1)), seed)[0]
    if len(d) > 1 and np.ptp(d) > EQUAL * np.abs(d).max():
        d_z = float(d.mean() / d.std(ddof=1))
    return {"questions": len(d), "differ": int(np.count_nonzero(d)), "difference": effect, "d_z": d_z}


def _no_test(sides: dict[str, np.ndarray]) -> str:
    for end, d in sides.items():
        if len(d) < 2:
            return f"no test: fewer than 2 questions have a depth in the middle and at the {end} position"
        if not d.any():
            return f"no test: depth in the middle nowhere differs from that at the {end} position"
    return ""


def _p(p: float) -> str:
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1g}"


@dataclass(frozen=True)
class Report:
    """What the tables and figures of a run say of its chosen answer tokens."""

    manifest: dict
    rows: list[SummaryRow]
    differences: list[PairedDifference]
    tests: list[InvertedU]
    cautions: list[Caution]

    @property
    def lenses(self) -> tuple[str, ...]:
        """Names of the lenses, in the order given."""
        return lens_names(self.manifest)

    @property
    def has_generations(self) -> bool:
        """Whether the model wrote texts that are scored."""
        return self.manifest["arguments"]["generate"] > 0

    @property
    def tops(self) -> tuple[int, ...]:
        """Thresholds, in the order given."""
        return tuple(self.manifest["arguments"]["top"])


def lens_names(manifest: dict) -> tuple[str, ...]:
    """Names of a run's lenses, in the order given."""
    return tuple(entry["name"] for entry in manifest["lenses"])


def read_report(run: Run, tops: tuple[int, ...] | None = None) -> Report:
    """Summarise the predictions that a run has.

    Args:
        run: The run.
        tops: Thresholds in place of the run's own.

    Raises:
        InputError: A part that is not as it was written, or none yet.
    """
    manifest = run.manifest
    if tops is not None:
        manifest["arguments"]["top"] = list(tops)
    lenses, tops = lens_names(manifest), tuple(manifest["arguments"]["top"])
    n_layers, seed = manifest["model"]["n_layers"], manifest["seed"]
    table = read_trajectories(run, tops)
    if not len(table):
        raise InputError(
            f"{run.path}: expected a run with rows, got none yet; {resume_call(run.path)} goes on with it"
        )
    table = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    cautions = find_cautions(table, lenses, tops, n_layers)
    blind = {(caution.lens, caution.top) for caution in cautions}
    tests = inverted_u_tests(table, lenses, tops, blind, seed)
    rows = summarise(table, lenses, tops, n_layers, seed, manifest["counts"]["left_out"])
    return Report(manifest, rows, paired_differences(table, lenses, tops, seed), tests, cautions)


def title(manifest: dict) -> str:
    """Model and task in words; of a path the last part."""
    names = [manifest[what]["name"] for what in ("model", "task")]
    return " on ".join(name if name.count("/") == 1 and name[0] not in "./" else Path(name).name for name in names)
