"""A run on disk: its files, the schema of its parts and tables, and what may be replaced where it is written."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..config import (
    CUES,
    DECOYS,
    FREQUENCY,
    GENERATED_SETTLE,
    JSD,
    MEASURES,
    PREDICTION,
    STATES,
    SUBLAYERS,
    TOP5,
    SweepConfig,
)
from ..errors import InputError, resume_call
from .files import write_whole
from .folder import Folder

SCHEMA_VERSION = 6
TABLES = ("trajectories.parquet", "summary.csv", "paired.csv", "inverted_u.csv")
CUE_TABLES = ("cues.csv", "cues_layers.csv", "cues_paired.csv")  # of runs with decoys
MEASURE_TABLES = {  # of runs that were asked for one of some measures
    "measures.csv": MEASURES,
    "settling.csv": (JSD,),
    "effective_depth.csv": (TOP5, SUBLAYERS),
    "frequency.csv": (FREQUENCY,),
    "frequency_depth.csv": (FREQUENCY,),
    "probe.csv": (STATES,),
}
FIGURES = ("depth.png", "accuracy.png", "layers.png")
DERIVED = (*TABLES, *FIGURES)  # written from the predictions
PAGE = "report.html"  # the page, which is made on request
MERGING = "merging"  # of a manifest, while the parts of shards are brought together
RECIPE, RECIPE_RUN = "recipe.json", "run"  # what a recipe's folder is known by, and its run there
LAYERS = "layers"  # folder of what `refinelens layers` makes of the run
# What tables and figures read of a manifest: types, objects with entries, lists of one thing or more.
SHAPE = {
    "status": str,
    "seed": int,
    "lenses": [{"name": str, "kind": str}],
    "arguments": {"model": str, "target": str, "positions": str, "answer_tokens": str, "generate": int, "top": [int]},
    "model": {
        "name": str,
        "n_layers": int,
        "backend": str,
        "dtype": str,
        "device": str,
        "parity": {"max_difference": float, "tolerance": float, "logit_range": float},
    },
    "task": {"name": str},
    "counts": {"questions": int, "left_out": dict},
}

NO_ANSWER_TOKEN = -1  # of a token of the prompt that another one follows
KEYS = [
    ("question_id", pa.int64()),  # 0-based line of the task file
    ("documents", pa.int32()),  # documents in the context, the gold one included; 0 closed-book
    ("gold_position", pa.int32()),  # 0-based; -1 closed-book
    ("answer_token", pa.int32()),  # 0-based token of the answer that follows; NO_ANSWER_TOKEN before the answer
    ("lens", pa.string()),  # plain, or the name of a lens
]
# One row per question x context size x gold position x lens x token: of the answer or, with positions='all', of the
# whole context. The tokens of a context stand together, in order. Lists run over layers 0 .. n_layers.
PREDICTIONS = pa.schema(
    [
        *KEYS,
        ("source_id", pa.string()),  # what the task file calls the question; null if it does not
        ("position", pa.int32()),  # 0-based place in the context of the token that is read
        ("n_tokens", pa.int32()),  # tokens of the context, answer tokens but the last included
        ("gold_start", pa.int32()),  # tokens of the gold document, end exclusive; null if unknown or there is none
        ("gold_end", pa.int32()),
        ("alias", pa.int32()),  # 0-based place of the answer among the question's answers
        ("alias_why", pa.string()),  # why it was taken
        ("answer_id", pa.int64()),
        ("answer_text", pa.string()),
        ("covers_before", pa.string()),  # of the answer's first token: what it covers of the text before the answer
        ("target_id", pa.int64()),  # the answer token, or the model's own prediction
        ("target_text", pa.string()),
        ("generated", pa.string()),  # first line of what the model writes after the prompt; null if not asked for
        ("generated_correct", pa.bool_()),  # it contains an answer (best_subspan_em)
        ("argmax", pa.list_(pa.int64())),
        ("argmax_text", pa.list_(pa.string())),
        ("target_rank", pa.list_(pa.int64())),  # 0-based
        ("target_logprob", pa.list_(pa.float32())),  # nats
        ("max_logprob", pa.list_(pa.float32())),  # nats
        ("entropy", pa.list_(pa.float32())),  # nats
        ("kl", pa.list_(pa.float32())),  # nats, KL(p_final || p_layer)
    ]
)
EXTRAS = {  # further columns, by what a run was asked for
    JSD: [(JSD, pa.list_(pa.float32()))],  # nats, Jensen-Shannon divergence from the output
    TOP5: [(TOP5, pa.list_(pa.float32()))],  # share of the five likeliest tokens that are the output's
    PREDICTION: [("prediction_rank", pa.list_(pa.int64()))],  # 0-based, of the model's own prediction
    SUBLAYERS: [  # entry i of block i; entry 0 is null, but for what the embedding adds to the target's logit
        ("attn_logit", pa.list_(pa.float32())),  # nats, direct logit attribution of attention; 0: of the embedding
        ("mlp_logit", pa.list_(pa.float32())),  # nats, of the feed-forward part
        ("attn_cosine", pa.list_(pa.float32())),  # of what attention adds and the stream before it
        ("mlp_cosine", pa.list_(pa.float32())),
        ("block_cosine", pa.list_(pa.float32())),  # of what the whole block adds and the stream before it
        ("attn_size", pa.list_(pa.float32())),  # norm of what attention adds / of the stream before it
        ("mlp_size", pa.list_(pa.float32())),
        ("mid_logprob", pa.list_(pa.float32())),  # nats, of the target, of resid_mid through the plain lens
        ("mid_rank", pa.list_(pa.int64())),  # 0-based
    ],
    FREQUENCY: [
        ("argmax_bucket", pa.list_(pa.int8())),  # 0-based bucket of the best token by its frequency, see BUCKET_ENDS
        ("target_bucket", pa.int8()),
    ],
    # The residual stream of all layers at the token before the answer, [n_layers + 1, d_model] one layer after the
    # other: in the row of the first answer token and the first lens, null in all others.
    STATES: [(STATES, pa.list_(pa.float16()))],
    # Over the tokens that the model wrote, the one that ended the text included: the layer at which each settles.
    GENERATED_SETTLE: [(GENERATED_SETTLE, pa.list_(pa.int32()))],
    DECOYS: [
        ("decoy_position", pa.int32()),  # 0-based, of the first decoy; -1 without one
        ("decoy_answer", pa.string()),  # what the decoys state
        ("decoy_id", pa.int64()),  # its first token, in the place of the answer's first
        ("decoy_rank", pa.list_(pa.int64())),  # 0-based
        ("decoy_logprob", pa.list_(pa.float32())),  # nats
    ],
}
NOT_OVER_LAYERS = (STATES, GENERATED_SETTLE)  # columns of lists over something else
BUCKET_ENDS = (10, 100, 1000)  # the last frequency rank of every bucket but the last one, counted from 1


def predictions_schema(extras: Iterable[str]) -> pa.Schema:
    """`PREDICTIONS`, and the columns of some of `EXTRAS`, in the order of these."""
    names = {*extras}
    return pa.schema([*PREDICTIONS, *(one for name, columns in EXTRAS.items() if name in names for one in columns)])


# One row per prediction and threshold.
TRAJECTORIES = pa.schema(
    [
        *KEYS,
        ("top", pa.int32()),  # correct means rank 1 to this
        ("first_correct", pa.int32()),
        ("settle", pa.int32()),  # null where censored
        ("depth", pa.int32()),  # null where censored
        ("flips", pa.int32()),
        ("final_correct", pa.bool_()),  # the target is correct at the output; false is censored
        ("answer_correct", pa.bool_()),  # the model's own prediction is the answer token
        ("all_correct", pa.bool_()),  # so it is for every token of this answer, after the true ones before it
        ("generated_correct", pa.bool_()),  # as in the predictions
        ("largest_gain", pa.int32()),  # layer whose rank improves most on the layer before; null if none improves
        ("logprob_gain", pa.list_(pa.float32())),  # nats, of layers 1 .. n_layers over the layer before
    ]
)


@dataclass(frozen=True)
class Part:
    """One file of predictions as the manifest names it: all rows of a range of the questions drawn."""

    file: str | None  # name in the folder of the parts; None where no question of the range could be asked
    questions: tuple[int, int]  # 0-based places among the questions drawn, end exclusive
    rows: int
    sha256: str | None  # of the file
    counts: dict[str, int] = field(default_factory=dict)  # of contexts and the like, for the sums in the manifest
    left_out: dict[str, list[int]] = field(default_factory=dict)  # reason: question ids

    def __post_init__(self):
        object.__setattr__(self, "questions", tuple(self.questions))  # a manifest holds a list

    @property
    def first(self) -> int:
        """0-based place of its first question."""
        return self.questions[0]


@dataclass(frozen=True)
class QuestionResult:
    """All that came of one question: the unit of work of a sweep, a function of the manifest and the question."""

    rows: pa.Table  # of PREDICTIONS
    counts: dict[str, int]  # see Part
    left_out: dict[str, list[int]]
    notes: dict[str, object]  # entries for the manifest, such as whether prefixes were shared and why
    warnings: tuple[str, ...]  # lines to be said: what went wrong and was put right


class Run(Folder):
    """The folder of a run."""

    NAME = "a run"
    MAKE = "make one with a sweep"
    REMAKE = "remove the folder and make the run again with a sweep"
    REPAIR = "``sweep(resume='{path}')`` computes it again"
    VERSION = SCHEMA_VERSION
    KEYS = {"schema_version": int, "status": str, "arguments": dict, "model": dict, "task": dict, "counts": dict}
    SHAPE = SHAPE
    PART = Part
    PARTS = "predictions"
    DERIVED = (*DERIVED, *MEASURE_TABLES, *CUE_TABLES, PAGE)
    BESIDE = (LAYERS,)

    @property
    def vocab_size(self) -> int | None:
        """Tokens of the model, None where the manifest does not say."""
        size = self.manifest["model"].get("vocab_size")
        return size if type(size) is int else None

    @property
    def extras(self) -> tuple[str, ...]:
        """What of `EXTRAS` it was asked for."""
        manifest = self.manifest
        measures = manifest["arguments"].get("measures", ())
        return tuple(manifest.get("extras", (*measures, *([DECOYS] if self.n_decoys else []))))

    @property
    def n_decoys(self) -> int:
        """Documents of its contexts that state another answer."""
        arguments = self.manifest["arguments"]
        given = arguments.get("decoys")
        return int(arguments.get("task") in CUES) if given is None else given

    @property
    def has_measures(self) -> bool:
        """Whether it was asked for any of `config.MEASURES`."""
        return bool({*self.extras} & {*MEASURES})

    @property
    def measures(self) -> tuple[str, ...]:
        """Columns of what was measured of every layer beside what always is, numbers over layers ``0 .. n_layers``."""
        columns = (column for name in self.extras if name != DECOYS for column in EXTRAS[name])
        return tuple(name for name, kind in columns if kind == pa.list_(pa.float32()))

    @property
    def derived(self) -> tuple[str, ...]:
        """Tables and figures that are written from its predictions."""
        extras, cues = self.extras, CUE_TABLES if self.n_decoys else ()
        return (*DERIVED, *cues, *(file for file, names in MEASURE_TABLES.items() if {*names}.intersection(extras)))

    @property
    def is_finished(self) -> bool:
        """Whether there is nothing left to ask; what a damaged part holds is asked again."""
        manifest = self.manifest
        return manifest["status"] == "finished" and len(self.whole_parts(manifest)) == len(manifest["parts"])

    def write_trajectories(self, tables: Iterable[pa.Table]) -> None:
        """Write the trajectories of the whole run, a table at a time."""

        def write(path: Path) -> None:
            with pq.ParquetWriter(path, TRAJECTORIES, compression="zstd") as writer:
                for table in tables:
                    writer.write_table(table)

        write_whole(self.path / "trajectories.parquet", write)

    def parts(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The parts that the manifest names in order, a few columns of each; for the errors see `read_part`."""
        for part in self.parts_of(self.manifest):
            if part.file is not None:
                yield self.read_part(part, columns)

    def check_replaceable(self) -> None:
        """Refuse a folder that holds anything but a run; one of another schema version may be overwritten too.

        Raises:
            InputError: Names what is not a run's.
        """
        self.check_foreign()
        if self.exists:
            self.any_manifest()

    def check_overwrite(self, overwrite: bool, arguments: dict) -> None:
        """Refuse to replace a run that is there, in a folder that is held here, unless that was asked for.

        Raises:
            InputError: A run is there and ``overwrite`` is not set; says how its arguments differ.
        """
        if overwrite or not self.exists:
            return
        manifest = self.any_manifest()
        old = manifest["arguments"]
        defaults = {option.name: option.default for option in fields(SweepConfig)}
        known = {k: v for k, v in arguments.items() if k in old or v != defaults.get(k, v)}  # an older run lacks some
        changed = [f"{k} {old.get(k)!r} there, {v!r} here" for k, v in known.items() if old.get(k) != v]
        finished, path = manifest["status"] == "finished", self.path
        command = f"see it with refinelens show {path}" if finished else f"go on with {resume_call(path)}"
        command = "" if changed else f"{command}, "
        what = f"other arguments ({'; '.join(changed)})" if changed else "the same arguments"
        raise InputError(
            f"``out`` {path}: expected a new folder, got a run of {what} that is {status_words(manifest, held=False)}; "
            f"{command}choose another folder or pass ``overwrite=True``"
        )


def open_run(path: str | Path) -> Run:
    """An existing run.

    Raises:
        InputError: The folder does not hold a run, or one of another schema version.
    """
    run = Run(Path(path))
    if (run.path / RECIPE).exists() and not run.exists:
        inside = run.path / RECIPE_RUN
        raise InputError(f"{path}: expected the folder of a run, got that of a recipe; its run is {inside}")
    run.checked_manifest()
    return run


def write_rows(rows: list[pa.Table], path: Path) -> None:
    """Write predictions as Parquet: the same bytes however the rows are divided, and whether or not they were read."""
    there = rows[0].column_names
    schema = predictions_schema(extra for extra, columns in EXTRAS.items() if columns[0][0] in there)
    whole = pa.concat_tables(table.cast(schema) for table in rows)  # Parquet renames the items of lists
    pq.write_table(whole.combine_chunks(), path, compression="zstd")


def status_words(manifest: dict, held: bool) -> str:
    """``finished``, or how far a run is: it is ``running`` only while a process holds its folder."""
    status, counts = manifest["status"], manifest["counts"]
    if status == "finished" or (status == "running" and held):
        return status
    word = "unfinished" if status == "running" else status  # whatever ended it left no time to say so
    return f"{word} ({counts.get('done', 0)} of {counts.get('questions', 0)} questions)"
