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
from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import CLOSED_BOOK, ORACLE, condition_name
from ..errors import InputError
from ..stats import (
    MEAN,
    SHARE,
    PairedTest,
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
from .rows import Caution, InvertedU, LayerProfile, PairedDifference, Report, SummaryRow, lens_names

SHARES = ("accuracy", "share")  # what the names of shares begin with
VOID = "void: this lens cannot resolve refinement depth on this model"
Cell = dict[str, np.ndarray]


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
            f"{run.path}: expected a run with rows, got none yet; refinelens sweep --resume {run.path} goes on with it"
        )
    table = choose_tokens(table, manifest["arguments"]["answer_tokens"])
    cautions = find_cautions(table, lenses, tops, n_layers)
    blind = {(caution.lens, caution.top) for caution in cautions}
    tests = inverted_u_tests(table, lenses, tops, blind, seed)
    rows = summarise(table, lenses, tops, n_layers, seed, manifest["counts"]["left_out"])
    return Report(manifest, rows, paired_differences(table, lenses, tops, seed), tests, cautions)


def reading_cells(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...]
) -> Iterator[tuple[str, int, int, Cell]]:
    """Columns of trajectories by lens, threshold and context size, in that order.

    Args:
        table: Trajectories without lists, of the examples that the run's tables are about; a column with nulls becomes
            floating, with NaN.
        lenses: Names of the lenses, in the order wanted, here and below.
        tops: Thresholds, in the order wanted, here and below.
    """
    names = [name for name in table.column_names if name != "lens"]
    columns = {name: _column(table[name]) for name in names}
    encoded = table["lens"].combine_chunks().dictionary_encode()
    codes, known = encoded.indices.to_numpy(), encoded.dictionary.to_pylist()
    for lens in (name for name in lenses if name in known):
        of_lens = codes == known.index(lens)
        for top in tops:
            of_reading = np.flatnonzero(of_lens & (columns["top"] == top))
            reading = {name: column[of_reading] for name, column in columns.items()}
            for documents in np.unique(reading["documents"]).tolist():
                yield lens, top, documents, _only(reading, reading["documents"] == documents)


def summarise(
    table: pa.Table,
    lenses: tuple[str, ...],
    tops: tuple[int, ...],
    n_layers: int,
    seed: int = 0,
    left_out: dict[str, list[int]] | None = None,
) -> list[SummaryRow]:
    """Statistics per lens, threshold, context size and gold position, with intervals over questions.

    Args:
        table: As for `reading_cells`; where a question has several answer tokens, they are resampled together.
        lenses: Names.
        tops: Thresholds.
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
        for lens, top, documents, cell in reading_cells(table, lenses, tops)
        for position in np.unique(cell["gold_position"]).tolist()
        for inside in [cell["gold_position"] == position]
    ]


def _column(column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count and pa.types.is_boolean(column.type):
        column = column.cast(pa.int8())  # or else numpy holds Python objects
    return column.to_numpy(zero_copy_only=False)


def _only(cell: Cell, inside: np.ndarray) -> Cell:
    return {name: column[inside] for name, column in cell.items()}


def _accuracies(cell: Cell) -> dict[str, np.ndarray]:
    """What is said of a whole context counts once, not for each of its tokens."""
    once, columns = cell["answer_token"] == 0, {"": "answer", "_all": "all", "_generated": "generated"}
    return {f"accuracy{end}": np.where(once, cell[f"{of}_correct"], np.nan) for end, of in columns.items()}


def _statistics(cell: Cell, n_layers: int, seed: int) -> dict:
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


def paired_differences(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], seed: int
) -> list[PairedDifference]:
    """Every pair of gold positions of every lens, threshold and context size; the seed is of the bootstrap of depth."""
    return [
        PairedDifference(lens, top, documents, *values)
        for lens, top, documents, cell in reading_cells(table, lenses, tops)
        if documents > ORACLE
        for values in _pairs(cell, seed)
    ]


def _pairs(cell: Cell, seed: int) -> Iterator[tuple]:
    positions = np.unique(cell["gold_position"]).tolist()
    ids, row = np.unique(cell["question_id"], return_inverse=True)
    pairs = list(combinations(range(len(positions)), 2))
    if not pairs:
        return
    depth = np.where(cell["final_correct"], cell["depth"].astype(float), np.nan)
    place = row * len(positions) + np.searchsorted(positions, cell["gold_position"])
    stacked = np.stack([*_accuracies(cell).values(), depth], 1)
    means = ratio(*sums_and_counts(stacked, place, len(ids) * len(positions)))
    means = means.reshape(len(ids), len(positions), -1)  # [questions, positions, statistics]
    earlier, later = np.array(pairs).T
    *accuracies, depths = np.moveaxis(means[:, later] - means[:, earlier], -1, 0)  # [questions, pairs] each
    exists = ~np.isnan(depths)
    estimates = mean_estimates(np.where(exists, depths, 0.0), exists.astype(float), seed)
    for index, (a, b) in enumerate(pairs):
        shares = [paired_estimate(differences[:, index]) for differences in accuracies]
        questions = int((~np.isnan(accuracies[0][:, index])).sum())
        yield positions[b], positions[a], questions, *shares, int(exists[:, index].sum()), estimates[index]


def middle_positions(documents: int) -> list[int]:
    """Gold positions in the middle third of a context."""
    return [p for p in range(documents) if 3 * abs(2 * p - (documents - 1)) <= documents - 1 and documents > 1]


def inverted_u_tests(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], blind: set[tuple[str, int]], seed: int
) -> list[InvertedU]:
    """A test for every lens, threshold and context size that was asked at both ends and in the middle.

    Args:
        table: As for `reading_cells`.
        lenses: Names.
        tops: Thresholds.
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
    every = [differences_to_end(cell, middle, position) for position in ends.values()]
    sides = [d[~np.isnan(d)] for d in every]
    reason = VOID if blind else _no_test(dict(zip(ends, sides, strict=True)))
    flips = [(math.nan, "") if reason else sign_flip(d, seed) for d in sides]
    tests = [PairedTest.of(d, p, seed) for d, (p, _) in zip(sides, flips, strict=True)]
    method = " and ".join(dict.fromkeys(method for _, method in flips if method))
    p = max(p for p, _ in flips)
    return InvertedU(lens, top, documents, tuple(middle), len(every[0]), *tests, p, math.nan, method, reason)


def _no_test(sides: dict[str, np.ndarray]) -> str:
    for end, d in sides.items():
        if len(d) < 2:
            return f"no test: fewer than 2 questions have a depth in the middle and at the {end} position"
        if not d.any():
            return f"no test: depth in the middle nowhere differs from that at the {end} position"
    return ""


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
    ranks: dict[str, list[np.ndarray]] = {lens: [] for lens in lenses}
    kl: dict[str, list[np.ndarray]] = {lens: [] for lens in lenses}
    for part in run.parts(["documents", "lens", "answer_token", "target_rank", "kl"]):
        part = choose_tokens(part, answer_tokens)
        part = part.filter(pc.equal(pc.equal(part["documents"], CLOSED_BOOK), closed_book))
        names = part["lens"].to_numpy(zero_copy_only=False)
        rank, divergence = list_matrix(part["target_rank"]), list_matrix(part["kl"])
        for lens in set(names.tolist()) & ranks.keys():
            ranks[lens].append(rank[names == lens])
            kl[lens].append(divergence[names == lens].sum(axis=0, dtype=float))
    return [_profile(lens, np.concatenate(ranks[lens]), sum(kl[lens])) for lens in lenses if ranks[lens]]


def _profile(lens: str, ranks: np.ndarray, kl: np.ndarray) -> LayerProfile:
    return LayerProfile(lens, len(ranks), np.quantile(ranks, [0.25, 0.5, 0.75], axis=0), kl / len(ranks))


def find_cautions(table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...], n_layers: int) -> list[Caution]:
    """Every lens and threshold whose small depths speak of the lens, not of the model."""
    found = []
    for (lens, top), cells in groupby(reading_cells(table, lenses, tops), key=lambda item: item[:2]):
        settle = np.concatenate([cell["settle"][cell["final_correct"]] for *_, cell in cells])
        at_output = int((settle == n_layers).sum())
        if 2 * at_output > len(settle):
            found.append(Caution(lens, top, at_output, len(settle)))
    return found


def caution_lines(cautions: list[Caution], manifest: dict) -> list[str]:
    """One line per lens: what is so, what it means, and the remedy."""
    lines = []
    for lens, group in groupby(cautions, key=lambda caution: caution.lens):
        found = ", ".join(f"{c.at_output} of {c.settled} (rank <= {c.top})" for c in group)
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
