"""The examples of a finished sweep: what one of its lenses read at every layer. No torch, no model."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import InputError, resume_call
from ..report.rows import lens_names
from ..store.layers import KEYS
from ..store.process import is_held
from ..store.results import Run, status_words
from ..store.trajectory import choose_tokens, list_matrix

SCALARS = (*KEYS, "answer_id", "target_id")
LISTS = ("argmax", "target_rank", "target_logprob", "entropy")


@dataclass(frozen=True)
class RunExamples:
    """First answer tokens of some questions of a run under one lens, in the run's order."""

    manifest: dict  # of the run
    lens: str
    columns: dict[str, np.ndarray]  # of SCALARS [n] int64, of LISTS [n, n_layers + 1]

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
            remedy = "wait for it" if held else f"{resume_call(run.path)} goes on with it"
            raise InputError(
                f"{run.path}: expected a finished run, got one that is {status_words(manifest, held)}; {remedy}"
            )
        if run.n_decoys:
            raise InputError(f"{run.path}: expected a run without ``decoys``, got one with {run.n_decoys}; sweep again")
        names = lens_names(manifest)
        lens = names[-1] if lens is None else lens
        if lens not in names:
            raise InputError(f"``lens``: expected one of the run's, {', '.join(names)}, got {lens}")
        parts = (choose_tokens(part, "first") for part in run.parts([*SCALARS, *LISTS, "lens", "answer_token"]))
        table = pa.concat_tables(part.filter(pc.equal(part["lens"], lens)) for part in parts)
        ids = np.unique(table["question_id"].to_numpy()).tolist()
        if examples is not None and examples > len(ids):
            raise InputError(f"``examples``: expected 1 to {len(ids)}, the questions of {run.path}, got {examples}")
        drawn = ids if examples is None else random.Random(manifest["seed"]).sample(ids, examples)
        table = table.filter(pc.is_in(table["question_id"], pa.array(drawn)))
        columns = {name: table[name].to_numpy().astype(np.int64) for name in SCALARS}
        return cls(manifest, lens, columns | {name: list_matrix(table[name]) for name in LISTS})

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
        return np.unique(self.columns["question_id"]).tolist()

    def of_questions(self, ids: list[int]) -> RunExamples:
        """The examples of some of the questions."""
        inside = np.isin(self.columns["question_id"], ids)
        return replace(self, columns={name: values[inside] for name, values in self.columns.items()})

    def by_key(self, values: np.ndarray) -> dict[tuple[int, int, int], object]:
        """One of ``values`` per example, by question, documents and gold position."""
        keys = zip(*(self.columns[name].tolist() for name in KEYS), strict=True)
        return dict(zip(keys, values.tolist(), strict=True))
