"""The examples of a finished sweep: what one of its lenses read at every layer. No torch, no model."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError
from ..report.rows import lens_names
from ..store.layers import KEYS
from ..store.process import is_held
from ..store.results import Run, status_words
from ..store.trajectory import choose_tokens, list_matrix

COLUMNS = (*KEYS, "lens", "answer_token", "answer_id", "target_id")
LISTS = ("argmax", "target_rank", "target_logprob", "entropy")


@dataclass(frozen=True)
class RunExamples:
    """First answer tokens of some questions of a run under one lens; arrays over examples, in the run's order."""

    manifest: dict  # of the run
    lens: str
    keys: dict[str, np.ndarray]  # by KEYS, [n] int64
    answer_id: np.ndarray  # [n] int64
    target_id: np.ndarray  # [n] int64
    layers: dict[str, np.ndarray]  # by LISTS, [n, n_layers + 1]

    @classmethod
    def read(cls, run: Run, lens: str | None, examples: int | None) -> RunExamples:
        """Read a finished run.

        Args:
            run: The run.
            lens: Name of one of its lenses, None for the last.
            examples: Questions drawn by the run's seed among those that could be asked, None for all.

        Raises:
            InputError: A run that is not finished or damaged, no such lens, or fewer questions.
        """
        manifest = run.manifest
        if manifest["status"] != "finished":
            held = is_held(run.path)
            remedy = "wait for it" if held else f"refinelens sweep --resume {run.path} goes on with it"
            raise InputError(
                f"{run.path}: expected a finished run, got one that is {status_words(manifest, held)}; {remedy}"
            )
        names = lens_names(manifest)
        lens = names[-1] if lens is None else lens
        if lens not in names:
            raise InputError(f"--lens: expected one of the run's, {', '.join(names)}, got {lens}")
        parts = (choose_tokens(part, "first") for part in run.parts([*COLUMNS, *LISTS]))
        table = pa.concat_tables(part.filter(pc.equal(part["lens"], lens)) for part in parts)
        ids = np.unique(table["question_id"].to_numpy()).tolist()
        if examples is not None and examples > len(ids):
            raise InputError(f"--examples: expected 1 to {len(ids)}, the questions of {run.path}, got {examples}")
        drawn = ids if examples is None else random.Random(manifest["seed"]).sample(ids, examples)
        return cls._of(manifest, lens, table.filter(pc.is_in(table["question_id"], pa.array(drawn))))

    @classmethod
    def _of(cls, manifest: dict, lens: str, table: pa.Table) -> RunExamples:
        columns = {name: table[name].to_numpy().astype(np.int64) for name in (*KEYS, "answer_id", "target_id")}
        lists = {name: list_matrix(table[name]) for name in LISTS}
        keys = {name: columns[name] for name in KEYS}
        return cls(manifest, lens, keys, columns["answer_id"], columns["target_id"], lists)

    @property
    def n_layers(self) -> int:
        """The layer of the output."""
        return self.manifest["model"]["n_layers"]

    @property
    def top(self) -> int:
        """Correct means rank 1 to this: the run's first threshold."""
        return self.manifest["arguments"]["top"][0]

    @property
    def questions(self) -> list[int]:
        """Ids in ascending order."""
        return np.unique(self.keys["question_id"]).tolist()

    def of_questions(self, ids: list[int]) -> RunExamples:
        """The examples of some of the questions."""
        inside = np.isin(self.keys["question_id"], ids)
        keys = {name: values[inside] for name, values in self.keys.items()}
        layers = {name: values[inside] for name, values in self.layers.items()}
        return RunExamples(self.manifest, self.lens, keys, self.answer_id[inside], self.target_id[inside], layers)

    def by_key(self, values: np.ndarray) -> dict[tuple[int, int, int], object]:
        """One of ``values`` per example, by question, documents and gold position."""
        return dict(zip(zip(*(self.keys[name].tolist() for name in KEYS), strict=True), values.tolist(), strict=True))
