"""How far two runs agree on the order of their rows, layer by layer."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from ..errors import InputError
from ..op.ranks import kendall_tau_b
from ..store.results import KEYS, Run, open_run
from ..store.trajectory import choose_tokens, list_matrix

NAMES = [*(name for name, _ in KEYS), "alias"]


@dataclass(frozen=True)
class RunAgreement:
    """Agreement of two runs at every layer, fp64 ``[n_layers + 1]``, over so many shared rows."""

    rows: int
    unpaired: tuple[int, int]  # rows of each run that the other has not
    layers: np.ndarray


def compare_runs(
    run_a: Run | str | Path,
    run_b: Run | str | Path,
    compare: Callable[[np.ndarray, np.ndarray], np.ndarray] = kendall_tau_b,
) -> RunAgreement:
    """Agreement of the target ranks of two runs over the rows both have, layer by layer.

    Args:
        run_a: One run, or its folder.
        run_b: Another over the same task, for instance of another model with as many layers.
        compare: `kendall_tau_b`, `spearman`, or for instance ``functools.partial(top_k_overlap, k=10)``.

    Raises:
        InputError: Different numbers of layers, or what `paired_ranks` or ``compare`` refuses.
    """
    run_a, run_b = _opened(run_a), _opened(run_b)
    ranks_a, ranks_b, unpaired = _paired(run_a, run_b)
    if ranks_a.shape[1] != ranks_b.shape[1]:
        raise InputError(
            f"{run_a.path} and {run_b.path}: expected models with the same number of layers, got "
            f"{ranks_a.shape[1] - 1} and {ranks_b.shape[1] - 1}; choose layers from the arrays of paired_ranks instead"
        )
    return RunAgreement(len(ranks_a), unpaired, compare(ranks_a.T, ranks_b.T))


def paired_ranks(run_a: Run | str | Path, run_b: Run | str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Target ranks of the rows that two runs share, int64 ``[rows, n_layers + 1]`` each, in the order of ``run_a``.

    Rows, one per answer token, are the same if all of `refinelens.store.results.KEYS` and the alias are equal: with
    ``alias='best'`` two models may have another answer of a question as their target. Of a generated task one may
    have more questions, or more documents, than the other: with one seed both have the same first ones.

    Args:
        run_a: One run, or its folder.
        run_b: Another.

    Raises:
        InputError: No run in a folder; runs of different tasks, seeds, targets, templates, aliases or chats, or without
            a shared row.
    """
    return _paired(_opened(run_a), _opened(run_b))[:2]


def _paired(run_a: Run, run_b: Run) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """`paired_ranks`, and how many rows of each run have no partner."""
    if not share_questions(run_a, run_b):
        raise InputError(
            f"{run_a.path} and {run_b.path}: expected runs of one task, got {_task(run_a)} and {_task(run_b)}; "
            "sweep both over one file, or over a generated task with one version of refinelens"
        )
    for name in ("seed", "target", "template", "alias", "chat", "golds", "decoys"):
        (asked_a, words_a), (asked_b, words_b) = _asked(run_a, name), _asked(run_b, name)
        if asked_a != asked_b:
            raise InputError(
                f"{run_a.path} and {run_b.path}: expected runs with the same ``{name}``, got {words_a} and {words_b}: "
                "their rows ask different things"
            )
    names = [*NAMES, "decoy_position"] if run_a.n_decoys else NAMES
    (keys_a, ranks_a), (keys_b, ranks_b) = _read(run_a, "row_a", names), _read(run_b, "row_b", names)
    shared = keys_a.join(keys_b, keys=names, join_type="inner").sort_by("row_a")
    if not len(shared):
        raise InputError(
            f"{run_a.path} and {run_b.path}: expected rows with equal {', '.join(names)}, got none among "
            f"{len(keys_a)} and {len(keys_b)} rows; sweep both with the same ``documents`` and ``gold_positions``"
        )
    unpaired = (len(keys_a) - len(shared), len(keys_b) - len(shared))
    return ranks_a[shared["row_a"].to_numpy()], ranks_b[shared["row_b"].to_numpy()], unpaired


def share_questions(run_a: Run, run_b: Run) -> bool:
    """Whether questions of one number are the same; with one seed they are, where one refinelens generated both."""
    a, b = run_a.manifest, run_b.manifest
    if a["task"].get("sha256") == b["task"].get("sha256"):
        return True
    generated = all(manifest["task"].get("path", "") is None for manifest in (a, b))
    made_by = [(manifest["task"].get("name"), manifest.get("refinelens_version")) for manifest in (a, b)]
    return generated and made_by[0] == made_by[1]


def _opened(run: Run | str | Path) -> Run:
    return run if isinstance(run, Run) else open_run(run)


def _asked(run: Run, option: str) -> tuple[object, str]:
    """What a run was told by an option, and in a few words; of a template the text, whatever file it stood in."""
    own = {"golds": run.manifest["arguments"].get("golds", 1), "decoys": run.n_decoys}
    given, template = {**run.manifest["arguments"], **own}.get(option), run.manifest["template"]
    if option != "template":
        return given, str(given)
    return template, f"{given} ({hashlib.sha256(template.encode()).hexdigest()[:8]})"


def _read(run: Run, number: str, names: list[str]) -> tuple[pa.Table, np.ndarray]:
    """Keys with a column of row numbers, because lists cannot be joined, and target ranks by layer."""
    parts = [choose_tokens(part, "all") for part in run.parts([*names, "target_rank"])]
    if not sum(map(len, parts)):
        raise InputError(f"{run.path}: expected a run with rows, got none; finish its sweep first")
    table = pa.concat_tables(parts)
    keys = table.select(names).append_column(number, pa.array(np.arange(len(table))))
    return keys, list_matrix(table["target_rank"])


def _task(run: Run) -> str:
    task = run.manifest["task"]
    return f"{task.get('name')} ({str(task.get('sha256'))[:8]})"
