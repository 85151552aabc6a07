"""The summary of a run: statistics per lens, threshold, context size and gold position, with intervals.

With it, what each lens sees at each layer over all examples, and cautions: where a lens cannot resolve refinement
depth, and what would.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..config import CLOSED_BOOK, condition_name
from ..stats import Estimate, mean_estimates, median_estimate, share_estimate, sums_and_counts
from ..store.results import Run
from ..store.trajectory import choose_tokens, list_matrix

SHARES = ("accuracy", "share")  # what the names of shares begin with


@dataclass(frozen=True)
class SummaryRow:
    """One lens, threshold, context size and gold position.

    The accuracies are the model's own, the same for every lens and threshold and whichever answer tokens are chosen.
    What stands below ``share_censored`` is over the settled examples, but for the mean layers of the first correct
    prediction of all and of the largest rank improvement. A share of questions with one example each has Wilson's
    interval, all else a bootstrap over the questions that have it.
    """

    lens: str
    top: int
    documents: int
    gold_position: int
    n: int  # questions
    settled: int  # examples correct at the output
    settled_questions: int  # with one or more of them
    accuracy: Estimate  # the first answer token is predicted
    accuracy_all: Estimate  # every answer token is, after the true ones before it
    accuracy_generated: Estimate  # what the model writes contains an answer; none where it writes nothing
    share_censored: Estimate  # not correct at the output
    share_at_output: Estimate  # settle is the output
    share_unseen: Estimate  # not correct at any layer before the output
    mean_depth: Estimate
    median_depth: Estimate
    mean_first_correct: Estimate
    mean_first_correct_all: Estimate  # also over censored examples that are correct on the way
    mean_settle: Estimate
    mean_largest_gain: Estimate  # layer of the largest rank improvement
    left_out: int  # questions that could not be asked at this context size
    left_out_why: str  # how many of them for each reason


Cell = dict[str, np.ndarray]


def reading_cells(
    table: pa.Table, lenses: tuple[str, ...], tops: tuple[int, ...]
) -> Iterator[tuple[str, int, int, Cell]]:
    """Columns of trajectories by lens, threshold and context size, in that order.

    Args:
        table: Trajectories without lists; a column with nulls becomes floating, with NaN.
        lenses: Names of the lenses, in the order wanted.
        tops: Thresholds, in the order wanted.
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
        table: Trajectories without lists; where a question has several answer tokens, they are resampled together.
        lenses: Names of the lenses, in the order of the rows.
        tops: Thresholds, in the order of the rows.
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


def _statistics(cell: Cell, n_layers: int, seed: int) -> dict:
    ids, owner = np.unique(cell["question_id"], return_inverse=True)
    settled = cell["final_correct"]
    depth, first, settle = (cell[name].astype(float) for name in ("depth", "first_correct", "settle"))
    once = cell["answer_token"] == 0  # what is said of a whole context counts once, not for each of its tokens
    values = {
        "accuracy": np.where(once, cell["answer_correct"], np.nan),
        "accuracy_all": np.where(once, cell["all_correct"], np.nan),
        "accuracy_generated": np.where(once, cell["generated_correct"], np.nan),
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
    sums, counts = sums_and_counts(stacked, owner, len(ids))
    means = dict(zip(values, mean_estimates(sums, counts, seed), strict=True))
    for name, hits, n in zip(values, sums.T, counts.T, strict=True):
        if name.startswith(SHARES) and n.max() <= 1:
            means[name] = share_estimate(hits.sum(), n.sum())
    histogram = np.zeros((len(ids), n_layers + 1))
    np.add.at(histogram, (owner[settled], depth[settled].astype(int)), 1)
    return {
        "n": len(ids),
        "settled": int(settled.sum()),
        "settled_questions": int(histogram.any(1).sum()),
        **means,
        "median_depth": median_estimate(histogram, seed),
    }


def _left_out(left_out: dict[str, list[int]], documents: int) -> dict:
    size = f"{condition_name(documents)}: "
    reasons = {key.removeprefix(size): len(ids) for key, ids in left_out.items() if key.startswith(size)}
    words = "; ".join(f"{count} {reason}" for reason, count in reasons.items())
    return {"left_out": sum(reasons.values()), "left_out_why": words}


@dataclass(frozen=True)
class LayerProfile:
    """One lens; arrays over layers ``0 .. n_layers``."""

    lens: str
    examples: int
    rank_quartiles: np.ndarray  # [3, n_layers + 1], 0-based ranks: lower quartile, median, upper quartile
    mean_kl: np.ndarray  # [n_layers + 1] nats

    def __post_init__(self):
        if self.rank_quartiles.shape != (3, *self.mean_kl.shape):
            raise ValueError(
                f"rank_quartiles: expected shape [3, {len(self.mean_kl)}], got {list(self.rank_quartiles.shape)}"
            )


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


@dataclass(frozen=True)
class Caution:
    """A lens and threshold with which more than half of the settled examples settle at the output."""

    lens: str
    top: int
    at_output: int  # examples
    settled: int  # examples


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
