"""The page of a run, or of several: what was found, layers, questions, tokens, in one file that needs no network.

What the page shows is what the tables have: every statistic comes from `summary`, every sentence from `tables`. Of a
large run the page holds a sample of questions, which it says; findings and layers are of all of them.
"""

from __future__ import annotations

import csv
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .data.page_documents import texts_of
from .errors import InputError
from .pages.html import smallest, write_page
from .placement import NO_POSITION, ORACLE, condition_name
from .report.agreement import compare_runs, share_questions
from .report.checks import parity_lines
from .report.effective_depth import effective_depth_lines
from .report.frequency import frequency_curves
from .report.measures import cells_of
from .report.rows import EVERY_POSITION, Report, SummaryRow, counted, format_estimate, lens_names, title
from .report.scope import scope_lines
from .report.summary import caution_lines, read_report
from .report.tables import cue_lines, inverted_u_lines, notes, paired_lines
from .stats import MEAN, SHARE_CHANGE, Estimate, mean_estimates, ratio, sums_and_counts
from .store.files import write_output
from .store.process import RunLock
from .store.results import LAYERS, PAGE, Run
from .store.trajectory import choose_tokens, list_matrix, read_trajectories, trajectories

MOST_CONTEXTS = 2000  # of the levels of questions and tokens
COLUMNS = [
    *("question_id", "documents", "gold_position", "answer_token", "lens"),
    *("alias_why", "answer_id", "target_text", "generated", "generated_correct"),
    *("argmax", "argmax_text", "target_rank", "entropy", "kl"),
]
ESTIMATES = ("accuracy", "accuracy_all", "accuracy_generated", "mean_depth", "mean_first_correct", "mean_settle")
TABLES = {  # of an analysis of layers
    "layers.csv": "by layer",
    "agreement.csv": "agreement",
    "essential.csv": "essential layers",
    "early_exit.csv": "early exit",
}


def write_report_page(runs: list[Run], path: Path, claim: dict | None = None) -> str:
    """Write the page of runs, with the verdict on a claim if there is one, and say in words what is on it.

    Raises:
        InputError: A damaged run, or one without rows; a file that cannot be written.
    """
    text, words = report_page(runs, claim=claim)
    write_output(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
    return words


def write_run_page(run: Run) -> str:
    """Write the page of a run into its folder, while no sweep is at it; says where it lies and what is on it.

    Raises:
        InputError: A damaged run, one without rows, or one that a sweep writes to.
        FaultError: No free disk.
    """
    path = run.path / PAGE
    with RunLock(run.path):
        return f"{path}: {write_report_page([run], path)}"


def report_page(
    runs: list[Run], most_contexts: int = MOST_CONTEXTS, claim: dict | None = None
) -> tuple[str, str]:
    """The text of the page, and in words what it holds.

    Args:
        runs: What it is about; of several it shows the first, and what differs over the questions they share.
        most_contexts: Of each run, in the levels of questions and tokens.
        claim: As ``claim.json`` of a recipe has it, which the page then begins with.
    """
    heads, arrays, words = [], {}, []
    top = min(runs[0].manifest["arguments"]["top"])
    sample = None
    for number, run in enumerate(runs):
        chosen = _Chosen.of(run, most_contexts, sample)
        sample = sample or (chosen if chosen.is_sample else None)
        head, own, said = _run(run, chosen, top)
        head |= _compared(runs[0], run, top) if number else {}
        heads.append(head)
        arrays |= {f"{number}.{name}": array for name, array in own.items()}
        words.append(said)
    return write_page("run", heads[0]["title"], {"runs": heads, "claim": claim}, arrays), "; ".join(words)


def _run(run: Run, chosen: _Chosen, top: int) -> tuple[dict, dict[str, np.ndarray], str]:
    """Head, arrays and words of one run; its levels of questions and tokens say correct of rank 1 to ``top``."""
    report = read_report(run)
    found = _Rows(report.lenses, top)
    profiles = _Profiles(report.lenses, run.measures)
    for part in run.parts([*COLUMNS, *run.measures, *(["decoy_position", "decoy_rank"] if run.n_decoys else [])]):
        part = choose_tokens(part, "all")
        profiles.add(choose_tokens(part, report.manifest["arguments"]["answer_tokens"]))
        found.add(part.filter(pc.is_in(part["question_id"], pa.array(sorted(chosen.questions), pa.int64()))))
    manifest = report.manifest
    questions, documents, why = texts_of(manifest, chosen.questions)
    head = {
        "title": title(manifest),
        "name": run.path.name,
        "n_layers": manifest["model"]["n_layers"],
        "vocab_size": manifest["model"].get("vocab_size") or 0,
        "lenses": list(report.lenses),
        "top": top,
        "tops": list(report.tops),
        "target": manifest["arguments"]["target"],
        "finding": _finding(report),
        "cautions": [*_unfinished(manifest), *caution_lines(report.cautions, manifest)],
        "notes": [*_notes(report), *manifest.get("remarks", [])],
        "summary": [_summary(row) for row in report.rows],
        "profiles": profiles.rows(),
        "cues": _cues(report),
        "golds": manifest["arguments"].get("golds", 1),
        "decoys": run.n_decoys,
        "measures": list(run.measures),
        "settling": [_with_triples(vars(row)) for row in report.settling],
        "effective": [_with_triples(vars(row)) for row in report.effective],
        "frequency": [_with_triples(curve) for curve in frequency_curves(report)],
        "probe": [_with_triples(vars(row)) for row in report.probe or [] if row.gold_position is EVERY_POSITION],
        "analysis": _analysis(run.path / LAYERS),
        "questions": questions,
        "documents_why": why,
        "contexts": found.contexts,
        "texts": list(found.texts),
        "sample": chosen.words,
        "folder": shlex.quote(str(run.path)),
        "facts": _facts(report),
    }
    return head, found.arrays() | {"documents": np.frombuffer(documents, np.uint8)}, chosen.words


def _notes(report: Report) -> list[str]:
    parts = (cue_lines, inverted_u_lines, paired_lines, effective_depth_lines, notes)
    return [line for part in parts for line in part(report)]


def _compared(a: Run, b: Run, top: int) -> dict:
    """What differs between two runs over the contexts that both have: sentences, and agreement of ranks by layer.

    Accuracy and depth are those of the first answer token at one threshold, through a lens that both have, or else
    through the first one of each.
    """
    (names_a, target), (names_b, other_target) = (
        (lens_names(run.manifest), run.manifest["arguments"]["target"]) for run in (a, b)
    )
    both = next((name for name in names_a if name in names_b), None)
    lenses = (both or names_a[0], both or names_b[0])
    found = {"agreement": [], "shared": False, "lenses": [names_a.index(lenses[0]), names_b.index(lenses[1])]}
    if not share_questions(a, b):
        return found | {"compared": ["The runs are of different tasks: they share no question."]}
    if a.n_decoys or b.n_decoys:
        return found | {"compared": ["Contexts with decoys are not compared one by one; see each run's cues.csv."]}
    if target != other_target:
        return found | {"compared": [f"Ranks are of {target} in the one run and of {other_target} in the other."]}
    own, other = (_examples(run, lens, top) for run, lens in zip((a, b), lenses, strict=True))
    shared = [key for key in own if key in other]
    if not shared:
        return found | {"compared": ["The runs share no context."]}
    changes = np.asarray([np.subtract(other[key], own[key]) for key in shared])  # [contexts, right and depth]
    ids, owner = np.unique([key[0] for key in shared], return_inverse=True)
    sums, counts = sums_and_counts(changes, owner, len(ids))
    right, depth = mean_estimates(sums, counts, a.manifest["seed"], [SHARE_CHANGE, MEAN])
    n, settled = counted(len(ids), "question"), int((counts[:, 1] > 0).sum())
    lines = [
        f"Over {n} in {counted(len(shared), 'context')} that both have: accuracy "
        f"{format_estimate(right, 3, interval=True, sign=True)}, refinement depth "
        f"{format_estimate(depth, 2, interval=True, sign=True)} layers (rank <= {top}; {settled} of them settle in "
        f"both), through {_lenses_in_words(*lenses)}. Brackets: 95 % intervals over questions."
    ]
    try:
        agreement = [_or_null(value) for value in compare_runs(a, b).layers.tolist()]
    except InputError as error:
        return found | {"compared": [*lines, f"No agreement by layer: {error}."], "shared": True}
    return found | {"compared": lines, "agreement": agreement, "shared": True}


def _lenses_in_words(first: str, second: str) -> str:
    return f"lens {first}" if first == second else f"lens {second} less lens {first}"


def _examples(run: Run, lens: str, top: int) -> dict[tuple, tuple[float, float]]:
    """Whether the first answer token is right, and depth (NaN where censored), by context."""
    table = choose_tokens(read_trajectories(run, (top,)), "first")
    table = table.filter(pc.equal(table["lens"], lens))
    keys = zip(*(table[name].to_pylist() for name in ("question_id", "documents", "gold_position")), strict=True)
    depth = table["depth"].cast(pa.float64()).fill_null(math.nan).to_pylist()
    right = table["answer_correct"].to_pylist()
    return dict(zip(keys, zip(map(float, right), depth, strict=True), strict=True))


@dataclass(frozen=True)
class _Chosen:
    """The questions whose contexts the page holds."""

    questions: set[int]
    words: str
    is_sample: bool = False

    @classmethod
    def of(cls, run: Run, most: int, others: _Chosen | None = None) -> _Chosen:
        """All of a run, or a sample; of another run's sample what this one has of it, so that they can be compared."""
        lenses, sizes = lens_names(run.manifest), dict[int, int]()
        for part in run.parts(["question_id", "answer_token", "lens"]):
            first = part.filter(pc.and_(pc.equal(part["answer_token"], 0), pc.equal(part["lens"], lenses[0])))
            for id, count in zip(*np.unique(first["question_id"].to_numpy(), return_counts=True), strict=True):
                sizes[int(id)] = sizes.get(int(id), 0) + int(count)
        n_contexts, ids = sum(sizes.values()), sorted(sizes)
        if n_contexts <= most:
            words = f"all {counted(len(ids), 'question')} in {counted(n_contexts, 'context')}"
            return cls(set(ids), words)
        each = max(1, math.ceil(n_contexts / len(ids)))
        places = np.linspace(0, len(ids) - 1, max(1, most // each)).round().astype(int)
        kept = {ids[place] for place in places} if others is None else others.questions & set(ids)
        shown = sum(sizes[id] for id in kept)
        words = f"a sample of {counted(len(kept), 'question')} of {len(ids)}, {shown} of {n_contexts} contexts"
        return cls(kept, words, is_sample=True)


class _Rows:
    """A row per context, lens and answer token: ranks, best tokens and trajectory."""

    def __init__(self, lenses: tuple[str, ...], top: int):
        self.texts: dict[str, int] = {}  # that come again and again, by their places
        self.contexts: list[dict] = []
        self._lenses, self._top = list(lenses), top
        self._places: dict[tuple[int, ...], int] = {}
        self._columns: dict[str, list[np.ndarray]] = {}

    def add(self, part: pa.Table) -> None:
        if not len(part):
            return
        columns = [part[name].to_pylist() for name in ("question_id", "documents", "gold_position")]
        has_decoys = "decoy_position" in part.column_names
        decoys = part["decoy_position"].to_pylist() if has_decoys else [NO_POSITION] * len(part)
        keys = zip(*columns, decoys, strict=True)
        context = [self._context(key, part, row) for row, key in enumerate(keys)]
        ranks = list_matrix(part["target_rank"])
        found = trajectories(ranks, self._top, axis=-1)
        names = part["argmax_text"].combine_chunks().flatten().to_pylist()
        values = {
            "context": np.asarray(context),
            "lens": np.asarray([self._lenses.index(name) for name in part["lens"].to_pylist()]),
            "token": part["answer_token"].to_numpy(),
            "target": np.asarray(self._texts(part["target_text"].to_pylist())),
            "correct": list_matrix(part["argmax"])[:, -1] == part["answer_id"].to_numpy(),
            "rank": ranks,
            "argmax": np.asarray(self._texts(names)).reshape(ranks.shape),
            "first": found.first_correct,
            "settle": found.settle,
            "flips": found.flips,
        }
        if "decoy_rank" in part.column_names:
            values["decoy_rank"] = list_matrix(part["decoy_rank"])
        for name, value in values.items():
            self._columns.setdefault(name, []).append(value)

    def _texts(self, texts: list[str]) -> list[int]:
        return [self.texts.setdefault(text, len(self.texts)) for text in texts]

    def _context(self, key: tuple[int, ...], part: pa.Table, row: int) -> int:
        if key not in self._places:
            self._places[key] = len(self.contexts)
            names = ("alias_why", "generated", "generated_correct")
            own = {name: part[name][row].as_py() for name in names}
            self.contexts.append(dict(zip(("question", "documents", "gold", "decoy"), key, strict=True)) | own)
        return self._places[key]

    def arrays(self) -> dict[str, np.ndarray]:
        signed = ("first", "settle", "flips")
        whole = {name: np.concatenate(values) for name, values in self._columns.items()}
        return {name: v.astype(np.int32) if name in signed else smallest(v) for name, v in whole.items()}


class _Profiles:
    """By lens, context size and gold position: median rank, and means of KL, entropy and measures, of every layer."""

    def __init__(self, lenses: tuple[str, ...], measures: tuple[str, ...]):
        self._lenses, self._means = lenses, ("kl", "entropy", *measures)
        self._ranks: dict[tuple, list[np.ndarray]] = {}
        self._sums: dict[tuple, np.ndarray] = {}  # of values, and how many there are, [2, means, n_layers + 1]

    def add(self, part: pa.Table) -> None:
        for key, _, values in cells_of(part, self._lenses, ("target_rank", *self._means)):
            self._ranks.setdefault(key, []).append(values["target_rank"].astype(np.int32))
            own = [values[name] for name in self._means]
            sums = [np.nansum(one, 0, dtype=float) for one in own], [(~np.isnan(one)).sum(0) for one in own]
            self._sums[key] = self._sums.get(key, 0.0) + np.array(sums)

    def rows(self) -> list[dict]:
        rows = []
        for key in sorted(self._ranks, key=lambda key: key[1:]):
            ranks = np.concatenate(self._ranks[key])
            means = zip(self._means, map(_rounded, ratio(*self._sums[key])), strict=True)
            numbers = {"rank": (np.median(ranks, axis=0) + 1).tolist(), **dict(means)}
            rows.append({"lens": self._lenses[key[0]], "documents": key[1], "gold": key[2], "n": len(ranks), **numbers})
        return rows


def _rounded(values: np.ndarray) -> list[float | None]:
    return [None if math.isnan(value) else float(f"{value:.4g}") for value in values]


def _summary(row: SummaryRow) -> dict:
    """One gold position: estimates as value, low and high, null where they do not exist."""
    numbers = {name: _triple(getattr(row, name)) for name in ESTIMATES}
    keys = ("lens", "top", "documents", "gold_position", "n", "settled", "left_out")
    return {name: getattr(row, name) for name in keys} | {"condition": condition_name(row.documents)} | numbers


def _cues(report: Report) -> dict[str, list[dict]] | None:
    """Tables of two answers by the name of what the page makes of them; None of a run without decoys."""
    if not report.cues:
        return None
    tables: dict[str, list[Any]] = {"rows": report.cues, "layers": report.cue_layers}
    return {name: [_with_triples(vars(row)) for row in table] for name, table in tables.items()}


def _triple(estimate: Estimate) -> list[float | None]:
    return [_or_null(value) for value in vars(estimate).values()]


def _with_triples(values: dict) -> dict:
    """The same with its estimates, and lists of them, as the page has them."""
    made = {k: _triple(v) for k, v in values.items() if isinstance(v, Estimate)}
    made |= {k: list(map(_triple, v)) for k, v in values.items() if isinstance(v, list)}
    return values | made


def _or_null(value: float) -> float | None:
    return None if math.isnan(value) else round(value, 6)


def _finding(report: Report) -> list[str]:
    """In sentences: what was asked, how often it was right, and whether depth has an inverted U."""
    manifest = report.manifest
    counts, parity = manifest["counts"], manifest["model"]["parity"]
    lines = [
        f"{manifest['model']['name']} was asked {counted(counts.get('done', 0), 'question')} of the task "
        f"{manifest['task']['name']}, {_conditions(report)}; {manifest['model']['n_layers']} layers were read through "
        f"{' and '.join(f'the {lens} lens' for lens in report.lenses)}.",
        *scope_lines(manifest),
    ]
    for test in report.tests:
        where = f"Lens {test.lens}, {test.documents} documents, rank <= {test.top}"
        sides = [side.difference.value for side in (test.first, test.last)]
        n = min(test.first.questions, test.last.questions)
        if test.reason:
            lines.append(f"{where}: {test.reason[0].upper()}{test.reason[1:]} ({counted(n, 'question')}).")
            continue
        how = (
            f"with the document in the middle answers take {sides[0]:+.2f} layers beside first and {sides[1]:+.2f} "
            f"beside last (p = {test.p:.2g}, {test.p_holm:.2g} after Holm, n = {n})"
        )
        verdict = "this supports an inverted U" if test.p_holm < 0.05 else "this shows no inverted U"
        lines.append(f"{where}: {how}; {verdict}.")
    allowed = parity["tolerance"] * parity["logit_range"]
    if "states" in manifest:
        return [*lines, *parity_lines(manifest), "Ranks are exact."]
    lines.append(
        f"Checked before anything was read: at the last layer the lens is the model's own prediction (largest "
        f"difference of logits {parity['max_difference']:.2g}, allowed {allowed:.2g}). Ranks are exact."
    )
    return lines


def _conditions(report: Report) -> str:
    """What contexts there were, in words."""
    sizes = dict.fromkeys(row.documents for row in report.rows)
    words = []
    for size in sizes:
        at = [str(row.gold_position) for row in report.rows if row.documents == size]
        positions = list(dict.fromkeys(at))
        where = "every gold position" if len(positions) == size else f"gold position {', '.join(positions)}"
        words.append(condition_name(size) + (f" with {where}" if size > ORACLE else ""))
    return " and ".join(words)


def _unfinished(manifest: dict) -> list[str]:
    if manifest["status"] == "finished":
        return []
    counts = manifest["counts"]
    done = f"{counts.get('done', 0)} of {counted(counts['questions'], 'question')}"
    return [f"This run is not finished: {done}. All numbers are of those."]


def _facts(report: Report) -> dict[str, str]:
    manifest = report.manifest
    model, arguments = manifest["model"], manifest["arguments"]
    argv = manifest.get("argv")
    return {
        "command": shlex.join(argv) if argv else "refinelens.sweep, from Python",
        "model": f"{model['name']}, {model['dtype']} on {model.get('device_name') or model['device']}, weights "
        f"{str(model.get('weights_sha256'))[:12]}",
        "task": f"{manifest['task']['name']}, sha256 {str(manifest['task'].get('sha256'))[:12]}",
        "seed": str(manifest["seed"]),
        "target": f"{arguments['target']}, tables of the {arguments['answer_tokens']} answer token(s)",
        "made by": f"refinelens {manifest.get('refinelens_version')}, {manifest.get('started')}",
        "status": manifest["status"],
    }


def _analysis(folder: Path) -> dict[str, list[list[str]]]:
    """Tables of an analysis of layers, if one was made, as they stand in its files."""
    tables = {}
    for file, name in TABLES.items():
        if (folder / file).exists():
            with (folder / file).open(encoding="utf-8", newline="") as lines:
                tables[name] = list(csv.reader(lines))
    return tables
