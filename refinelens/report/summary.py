"""The summary of a run: statistics by reading and gold position, differences between positions, the inverted U.

A reading is a lens, a threshold and a context size. Is an answer refined over more layers where it stands in the
middle? The test is paired over questions. The middle are the gold positions in the middle third of n documents,
``|p - (n - 1) / 2| <= (n - 1) / 6``. A question's difference to an end, position 0 or n - 1, is the mean depth of its
settled examples in the middle less that of its settled examples there; a question without a settled example on either
side is left out of that difference, and counted. Depth that merely grows or falls from one end to the other is no
inverted U: the middle has to be deeper than both ends, so that both tests are one-sided and p is the larger one of the
two (an intersection-union test, Berger 1982); of an upright U it is near 1.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator
from dataclasses import replace
from itertools import combinations, groupby
from operator import itemgetter

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, resume_call
from ..placement import CLOSED_BOOK, ORACLE, condition_name
from ..stats import (
    MEAN,
    SHARE,
    Estimate,
    PairedTest,
    groups,
    holm,
    mean_estimates,
    median_estimate,
    paired_estimate,
    ratio,
    sign_flip,
    sums_and_counts,
)
from ..store.results import Run
from ..store.trajectory import choose_tokens, list_matrix, read_trajectories
from .cues import cue_rows
from .frequency import frequency_rows
from .measures import measured_rows
from .probe import probe_rows
from .rows import Cautions, InvertedU, LayerProfile, PairedDifference, Report, SummaryRow, lens_names

SHARES = ("accuracy", "share")  # what the names of shares begin with
VOID = "void: this lens cannot resolve refinement depth on this model"
Cell = dict[str, np.ndarray]  # columns of trajectories, [examples] each
Reading = tuple[str, int, int, Cell]  # lens, threshold and context size, and what they read
lens_and_top = itemgetter(0, 1)  # of a reading


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
    tops, n_layers, seed = tuple(manifest["arguments"]["top"]), manifest["model"]["n_layers"], manifest["seed"]
    table = read_trajectories(run, tops)
    if not len(table):
        if run.manifest["status"] == "finished":
            why = "no question of this shard could be asked"
            raise InputError(f"{run.path}: expected a run with rows, got none: {why}; look at the merged run")
        raise InputError(f"{run.path}: expected a run with rows, got none yet; {resume_call(run.path)} goes on with it")
    table = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    readings = list(read_cells(table, lens_names(manifest), tops))
    cautions = find_cautions(readings, n_layers)
    rows = summarise(readings, n_layers, seed, manifest["counts"]["left_out"])
    tests = inverted_u_tests(readings, cautions, seed)
    differences = paired_differences(readings, seed)
    further = (*measured_rows(run), *cue_rows(run, tops), *frequency_rows(run, tops), probe_rows(run))
    return Report(manifest, rows, differences, tests, cautions, *further)


def read_cells(table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...]) -> Iterator[Reading]:
    """Columns of trajectories by lens, threshold and context size, in that order.

    Args:
        table: Trajectories without lists, of the examples that the run's tables are about; a column with nulls becomes
            floating, with NaN.
        lenses: Names of the lenses, in the order wanted.
        tops: Thresholds, in the order wanted.
    """
    for lens in lenses:
        of_lens = table.filter(pc.equal(table["lens"], lens)).drop_columns("lens")
        columns = {name: _column(of_lens[name]) for name in of_lens.column_names}
        for top in tops:
            reading = _only(columns, columns["top"] == top)
            for documents, inside in groups(reading["documents"]):
                yield lens, top, documents, _only(reading, inside)


def _column(column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count and pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())  # or else numpy holds Python objects
    return column.to_numpy(zero_copy_only=False)


def _only(cell: Cell, inside: np.ndarray) -> Cell:
    return {name: column[inside] for name, column in cell.items()}


def summarise(
    readings: Iterable[Reading], n_layers: int, seed: int = 0, left_out: dict[str, list[int]] | None = None
) -> list[SummaryRow]:
    """Statistics of every reading and gold position, with intervals over questions.

    Args:
        readings: As `read_cells` gives them; several answer tokens of a question are resampled together.
        n_layers: The layer of the output.
        seed: Seed of the bootstrap.
        left_out: Of the manifest: ids of questions by context size and reason.
    """
    return [
        SummaryRow(
            *(lens, top, documents, position),
            **_statistics(_only(cell, inside), n_layers, seed),
            **_left_out(left_out or {}, documents),
        )
        for lens, top, documents, cell in readings
        for position, inside in groups(cell["gold_position"])
    ]


def _accuracies(cell: Cell) -> dict[str, np.ndarray]:
    """What is said of a whole context counts once, not for each of its tokens."""
    once, columns = cell["answer_token"] == 0, {"": "answer", "_all": "all", "_generated": "generated"}
    return {f"accuracy{end}": np.where(once, cell[f"{of}_correct"], np.nan) for end, of in columns.items()}


def _statistics(cell: Cell, n_layers: int, seed: int) -> dict:
    """Fields of a `SummaryRow`; a mean or share is that of its values ``[examples]``, NaN where it has none."""
    ids, owner = np.unique(cell["question_id"], return_inverse=True)
    settled = cell["final_correct"]
    depth, first, settle = (cell[name].astype(float) for name in ("depth", "first_correct", "settle"))
    values = {
        **_accuracies(cell),
        "share_censored": 1.0 - settled,
        "share_at_output": np.where(settled, settle == n_layers, np.nan),
        "share_unseen": np.where(settled, first == n_layers, np.nan),
        "mean_depth": depth,
        "mean_first_correct": np.where(settled, first, np.nan),
        "mean_first_correct_all": first,
        "mean_settle": settle,
        "mean_largest_gain": cell["largest_gain"].astype(float),
    }
    stacked = np.stack(list(values.values()), axis=1)  # [examples, statistics]
    kinds = [SHARE if name.startswith(SHARES) else MEAN for name in values]
    means = mean_estimates(*sums_and_counts(stacked, owner, len(ids)), seed, kinds)
    histogram = np.zeros((len(ids), n_layers + 1))
    np.add.at(histogram, (owner[settled], depth[settled].astype(int)), 1)
    return {
        "n": len(ids),
        "settled": int(settled.sum()),
        "settled_questions": int(histogram.any(1).sum()),
        **dict(zip(values, means, strict=True)),
        "median_depth": median_estimate(histogram, seed),
    }


def _left_out(left_out: dict[str, list[int]], documents: int) -> dict:
    size = f"{condition_name(documents)}: "
    reasons = {key.removeprefix(size): len(ids) for key, ids in left_out.items() if key.startswith(size)}
    words = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return {"left_out": sum(reasons.values()), "left_out_why": words}


def question_means(cell: Cell, values: list[np.ndarray], positions: list[list[int]]) -> np.ndarray:
    """Means of every question over its examples at some gold positions, ``[questions, sets of positions, statistics]``.

    Args:
        cell: What a reading holds.
        values: ``[examples]`` of each statistic; NaN is no value, and the mean of none is NaN.
        positions: Sets of gold positions.
    """
    ids, owner = np.unique(cell["question_id"], return_inverse=True)
    stacked, at = np.stack(values, axis=1), cell["gold_position"][:, None]
    inside = (np.where(np.isin(at, wanted), stacked, np.nan) for wanted in positions)
    return np.stack([ratio(*sums_and_counts(one, owner, len(ids))) for one in inside], axis=1)


def paired_differences(readings: Iterable[Reading], seed: int) -> list[PairedDifference]:
    """Every pair of gold positions of every reading; the seed is of the bootstrap of depth."""
    rows = []
    for lens, top, documents, cell in readings:
        positions = np.unique(cell["gold_position"]).tolist()
        if documents <= ORACLE or len(positions) < 2:
            continue
        values = [*_accuracies(cell).values(), cell["depth"].astype(float)]
        means = question_means(cell, values, [[position] for position in positions])
        pairs = list(combinations(range(len(positions)), 2))
        earlier, later = np.array(pairs).T
        *accuracies, depths = np.moveaxis(means[:, later] - means[:, earlier], -1, 0)  # [questions, pairs] each
        exists = ~np.isnan(depths)
        estimates = mean_estimates(np.where(exists, depths, 0.0), exists.astype(float), seed)
        for index, (a, b) in enumerate(pairs):
            shares = [_share_difference(differences[:, index], seed) for differences in accuracies]
            asked, settled = (int((~np.isnan(of[:, index])).sum()) for of in (accuracies[0], depths))
            where = (lens, top, documents, positions[b], positions[a])
            rows.append(PairedDifference(*where, asked, *shares, settled, estimates[index]))
    return rows


def _share_difference(differences: np.ndarray, seed: int) -> Estimate:
    """Of questions with one example at each position by counts, of those with several by a bootstrap."""
    exists = ~np.isnan(differences)
    if np.isin(differences[exists], (-1.0, 0.0, 1.0)).all():
        return paired_estimate(differences)
    return mean_estimates(np.where(exists, differences, 0.0)[:, None], exists[:, None].astype(float), seed)[0]


def middle_positions(documents: int) -> list[int]:
    """Gold positions in the middle third of a context."""
    return [p for p in range(documents) if 3 * abs(2 * p - (documents - 1)) <= documents - 1 and documents > 1]


def inverted_u_tests(readings: Iterable[Reading], blind: Container[tuple[str, int]], seed: int) -> list[InvertedU]:
    """A test for every reading that was asked at both ends and in the middle.

    Args:
        readings: As `read_cells` gives them.
        blind: Lenses and thresholds that cannot resolve depth; there the test is void.
        seed: Seed of the intervals and of resampled tests.
    """
    tests = []
    for reading, sizes in groupby(readings, lens_and_top):
        found = [_test(*of_size, reading in blind, seed) for of_size in sizes]
        found = [test for test in found if test is not None]
        adjusted = holm([test.p for test in found])
        tests += [replace(test, p_holm=p) for test, p in zip(found, adjusted, strict=True)]
    return tests


def _test(lens: str, top: int, documents: int, cell: Cell, blind: bool, seed: int) -> InvertedU | None:
    asked = set(cell["gold_position"].tolist())
    middle = [p for p in middle_positions(documents) if p in asked]
    if not middle or not asked.issuperset({0, documents - 1}):
        return None
    means = question_means(cell, [cell["depth"].astype(float)], [middle, [0], [documents - 1]])[..., 0]
    sides = [d[~np.isnan(d)] for d in (means[:, 0] - means[:, 1], means[:, 0] - means[:, 2])]
    reason = VOID if blind else _no_test(*sides)
    flips = [(math.nan, "") if reason else sign_flip(d, seed) for d in sides]
    tests = [PairedTest.of(d, p, seed) for d, (p, _) in zip(sides, flips, strict=True)]
    method = " and ".join(dict.fromkeys(method for _, method in flips if method))
    p = max(p for p, _ in flips)
    return InvertedU(lens, top, documents, tuple(middle), len(means), *tests, p, math.nan, method, reason)


def _no_test(first: np.ndarray, last: np.ndarray) -> str:
    for end, d in (("first", first), ("last", last)):
        if len(d) < 2:
            return f"no test: fewer than 2 questions have a depth in the middle and at the {end} position"
        if not d.any():
            return f"no test: depth in the middle nowhere differs from that at the {end} position"
    return ""


def find_cautions(readings: Iterable[Reading], n_layers: int) -> Cautions:
    """Every lens and threshold whose small depths speak of the lens, not of the model."""
    found = {}
    for reading, sizes in groupby(readings, lens_and_top):
        settle = np.concatenate([cell["settle"][cell["final_correct"]] for *_, cell in sizes])
        at_output = int((settle == n_layers).sum())
        if 2 * at_output > len(settle):
            found[reading] = (at_output, len(settle))
    return found


def caution_lines(cautions: Cautions, manifest: dict) -> list[str]:
    """One line per lens: what is so, what it means, and the remedy; the figure of depth has them too."""
    lines = []
    for lens, tops in groupby(cautions, itemgetter(0)):
        found = ", ".join("{} of {} (rank <= {})".format(*cautions[reading], reading[1]) for reading in tops)
        lines.append(
            f"Caution, lens {lens}: {found} settled examples settle only at the output: this lens cannot resolve "
            f"refinement depth on this model, and depth speaks of the lens. Remedy: {_remedy(lens, manifest)}."
        )
    return lines


def _remedy(lens: str, manifest: dict) -> str:
    kinds = {entry["name"]: entry["kind"] for entry in manifest["lenses"]}
    if kinds[lens] != "plain":
        return "a larger --top, or more tokens in the fit of the lens"
    model = manifest["arguments"]["model"]
    return f"refinelens fit --model {model} --out LENS, then sweep with --lens plain,LENS"


def layer_profiles(
    run: Run, lenses: tuple[str, ...], answer_tokens: str, closed_book: bool = False
) -> list[LayerProfile]:
    """Profiles of the lenses in their order, read part by part; only the ranks of a run are held whole.

    Args:
        run: The run.
        lenses: Names of the lenses.
        answer_tokens: ``first`` or ``all``.
        closed_book: Read the examples without documents, which otherwise are left out.
    """
    ranks: dict[str, list[np.ndarray]] = {}
    kl: dict[str, np.ndarray] = {}
    for part in run.parts(["documents", "lens", "answer_token", "target_rank", "kl"]):
        part = choose_tokens(part, answer_tokens)
        part = part.filter(pc.equal(pc.equal(part["documents"], CLOSED_BOOK), closed_book))
        for lens in lenses:
            of_lens = part.filter(pc.equal(part["lens"], lens))
            if len(of_lens):
                ranks.setdefault(lens, []).append(list_matrix(of_lens["target_rank"]))
                kl[lens] = kl.get(lens, 0.0) + list_matrix(of_lens["kl"]).sum(axis=0, dtype=float)
    whole = ((lens, np.concatenate(ranks[lens])) for lens in lenses if lens in ranks)
    return [
        LayerProfile(lens, len(of_lens), np.quantile(of_lens, [0.25, 0.5, 0.75], axis=0), kl[lens] / len(of_lens))
        for lens, of_lens in whole
    ]
