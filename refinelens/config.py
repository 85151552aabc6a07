"""Every option of everything that runs, stated once: its default, what it may be and its help.

A config is a frozen dataclass of such options, checked before anything heavy is loaded. Python passes values to its
fields; the parser of the command line is made from the same fields (`refinelens.parser`) and passes what was typed.
"""

from __future__ import annotations

import os
from collections.abc import Container
from dataclasses import dataclass, fields
from typing import Any

from .options import NAMES, SHARE, TYPED, Config, Kind, check_idle, choice, expect, number_of, option, parts_of
from .placement import MOST_DOCUMENTS, WORDS, Placement, placements

DTYPE_NAMES = ("auto", "float32", "float16", "bfloat16")
QUANTIZE = ("int8", "llm-int8", "nf4", "fp4")
OBJECTIVES = ("linear", "kl", "jacobian")
OF_OBJECTIVE = {"kl": ("steps", "seed"), "jacobian": ("prompts", "prompts_from", "from_layer")}  # options of it alone
SHORTEST = 16  # tokens of a sequence
SEQUENCES = 10  # at least: eight to fit, one to choose the ridge strength, one to report on
PATCH = "patch"
INTERVENTIONS = ("skip", "mean", "attn", "mlp", PATCH)
PLAIN = "plain"  # the lens that has no translators
DATA_SETS = ("squad", "hotpotqa", "triviaqa")  # data sets that a task can be made of
KEEP = EVERY_QUESTION, ANSWERED, NEEDS_DOCUMENT = ("all", "answered", "needs-document")
# Stored beside what always is: of every layer, but for the states before an answer.
MEASURES = JSD, TOP5, SUBLAYERS, PREDICTION, FREQUENCY, STATES = (
    *("jsd", "top5", "sublayers", "prediction", "frequency", "states"),
)
GENERATED_SETTLE = "generated_settle_jsd"  # of the tokens that are generated, where ``jsd`` is measured
PROCESSES, RAY = ("processes", "ray")  # who starts workers
CUES = ("cues", "tiny-cues")  # tasks whose documents disagree
DECOYS = "decoys"  # what their rows have more
ASKED, READ, RUNS = "what is asked", "what is read", "how it runs"  # groups of options


def _sizes(value: object) -> tuple[int, ...]:
    return tuple(sorted({WORDS[part] if part in WORDS else number_of(part) for part in parts_of(value)}))


def _measures(value: object) -> tuple[str, ...]:
    """In their own order, so that runs of the same ones are alike."""
    names = parts_of(value)
    if len(set(names)) != len(names) or not set(names) <= set(MEASURES):
        raise ValueError
    return tuple(name for name in MEASURES if name in names)


def _address(value: object) -> str:
    host, _, port = os.fspath(value).rpartition(":")
    if value != "auto" and not (host and "/" not in host and port.isdecimal()):
        raise ValueError
    return value


ADDRESS = Kind(_address, "auto or HOST:PORT")
SIZES = Kind(_sizes, "closed-book, oracle or sizes such as 5,10")
EDITS = Kind(lambda value: () if value == "none" else NAMES.read(value), f"none or some of {','.join(INTERVENTIONS)}")
MEASURED = Kind(_measures, f"some of {','.join(MEASURES)}, each once")


def device_option(help: str = "(default: CUDA if there is one)", group: str | None = None):
    return choice(help, group, "auto", "cpu", "cuda")


def dtype_option(help: str = "(default: float32 on a CPU, the checkpoint's own on CUDA)", group: str | None = None):
    return choice(help, group, *DTYPE_NAMES)


LOADED = "how the model is loaded"  # a group of options


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """How a model is loaded."""

    device: str = device_option(group=LOADED)
    dtype: str = dtype_option(group=LOADED)
    device_map: str | None = option(
        None,
        "put a model that fits no single device on several: auto, or a JSON file that names a GPU, cpu or disk by "
        "module (default: one device)",
        LOADED,
        metavar="auto|FILE",
    )
    max_memory: str | None = option(
        None, "by device, beside a device map of auto (default: all of it)", LOADED, metavar="0=20GiB,cpu=60GiB"
    )
    quantize: str | None = option(
        None,
        "int8, weights by torchao; llm-int8, nf4 or fp4, by bitsandbytes (default: as the checkpoint is)",
        LOADED,
        choices=QUANTIZE,
    )
    revision: str | None = option(
        None, "branch, tag or commit on the hub (default: its main one)", LOADED, metavar="NAME"
    )
    subfolder: str | None = option(None, "that the model lies in, of a folder or on the hub", LOADED, metavar="NAME")
    trust_remote_code: bool = option(False, "run the code that a model brings (default: refuse it)", LOADED)

    def __post_init__(self):
        super().__post_init__()
        if self.device_map is not None:
            expect(self.device == "auto", "device", "auto beside ``device_map``, which says where it lies", self.device)

    @property
    def loading(self) -> dict[str, Any]:
        """What `model.loading.load_model` takes beside the name."""
        return {option.name: getattr(self, option.name) for option in fields(ModelConfig)}


def check_objective(given: Container[str], objective: str) -> None:
    """Refuse what was given of the options that belong to another objective of a fit.

    Raises:
        InputError: See `check_idle`.
    """
    for owner, names in OF_OBJECTIVE.items():
        if owner != objective:
            check_idle(given, names, f"objective='{owner}'", objective)


@dataclass(frozen=True)
class SweepConfig(ModelConfig):
    """Everything that decides the numbers of a run, except what the machine decides."""

    model: str = option("smollm2", "smollm2, tiny, a hub name, a folder or a .gguf file", ASKED)
    task: str = option(
        None,
        "builtin, cues (the same with documents that disagree), nq (the file in $REFINELENS_NQ), kv (random pairs of "
        "keys and values), tiny, tiny-cues, tiny-friends, tiny-hops or FILE.jsonl[.gz] in a format of Lost in the "
        "Middle (default: builtin; tiny for the model tiny)",
        ASKED,
    )
    documents: tuple[int, ...] = option(
        (5, 10),
        "context sizes, the gold document included; also closed-book (no document) and oracle (the gold one alone)",
        ASKED,
        SIZES,
        "N[,N]",
    )
    gold_positions: str = option("all", "of the gold document, from 0", ASKED, TYPED, "all|ends-middle|quarters|P[,P]")
    golds: int = option(1, "gold documents of a context, side by side, of tasks that have more than one", ASKED)
    decoys: int | None = option(
        None,
        "documents of a context, side by side, that state another answer, of tasks that have such (default: 1 of cues "
        "and tiny-cues, else 0)",
        ASKED,
    )
    decoy_positions: str = option(
        "all",
        "of the first decoy, from 0; where gold documents stand it does not",
        ASKED,
        TYPED,
        "all|ends-middle|quarters|P[,P]",
    )
    examples: int | None = option(None, "questions drawn by the seed (default: all; of kv and tiny 100)", ASKED)
    target: str = choice(
        "whose rank at every layer: the answer's token, or the model's own prediction", READ, "answer", "prediction"
    )
    positions: str = choice(
        "where it is read: before each answer token, or at every token of the context, with the next one as target",
        READ,
        "answer",
        "all",
    )
    answer_tokens: str = choice("that tables and figures are about; the data have all", READ, "first", "all")
    generate: int = option(
        0,
        "also write up to N tokens after each prompt, greedily, and score them by best_subspan_em (default: none)",
        READ,
    )
    measures: tuple[str, ...] = option(
        (),
        "also store of every layer: jsd, the Jensen-Shannon divergence from the output; top5, the share of its five "
        "likeliest tokens that are the output's; sublayers, what attention and feed-forward part of every block add to "
        "the target's logit, in which direction and how much; prediction, the rank of the model's own prediction; "
        "frequency, how frequent its best token is in a text; "
        "states, the residual stream before each answer, and from it a probe of the gold position (default: none)",
        READ,
        MEASURED,
        "NAME[,NAME]",
    )
    frequencies: str | None = option(
        None,
        "text that tokens are counted in, for the measure frequency: builtin (Python's own reference), tiny, text or "
        ".jsonl[.gz] (default: builtin; tiny for the model tiny)",
        READ,
        metavar="TEXT",
    )
    top: tuple[int, ...] = option((1,), "correct means rank 1 to K, for each K", READ, metavar="K[,K]")
    lens: tuple[str, ...] = option(
        (PLAIN,),
        "plain, folders of lenses, .pt files of Jacobian lenses, or hub:OWNER/NAME/PATH",
        READ,
        metavar="LENS[,LENS]",
    )
    template: str = option(
        "default",
        "Lost in the Middle's prompt; the one with the question also before the documents; or a text file with "
        "{documents} and {question}",
        ASKED,
        metavar="default|query-aware|FILE",
    )
    chat: bool = option(False, "put the prompt into the tokenizer's chat template, as the user's turn", ASKED)
    keep: str = choice(
        "questions, by the first answer token: answered, the model's own prediction with the gold document alone; "
        "needs-document, of these the ones that it does not predict closed-book",
        ASKED,
        *KEEP,
    )
    shots: int = option(
        0, "worked examples before the question: others of the task, with their answers (default: none)", ASKED
    )
    shot_documents: int = option(1, "of a worked example, its gold one included", ASKED)
    alias: str = choice(
        "which of several answers is the target; best: the likeliest after the oracle context", ASKED, "first", "best"
    )
    batch_size: str = option("auto", "contexts per forward pass", RUNS, TYPED, "auto|N")
    states: str | None = option(
        None,
        "folder of files with the hidden states of every context, of another engine that ran what refinelens prompts "
        "writes; of the model the head alone is loaded (default: run the model)",
        RUNS,
        metavar="FOLDER",
    )
    reuse_prefix: str = choice(
        "run documents that contexts share once; auto: on a CPU in float32, if proven", RUNS, "auto", "on", "off"
    )
    seed: int = option(0, "of questions, distractors, intervals", ASKED)

    def __post_init__(self):
        super().__post_init__()
        if self.task is None:
            object.__setattr__(self, "task", default_task(self.model))
        sizes, lenses, batch = ",".join(map(str, self.documents)), self.lens, self.batch_size
        expect(self.documents and min(self.documents) >= 0, "documents", SIZES.expected, repr(sizes))
        expect(max(self.documents) <= MOST_DOCUMENTS, "documents", f"sizes up to {MOST_DOCUMENTS}", sizes)
        for name, least in (("golds", 1), ("decoys", 0)):
            value = getattr(self, name)
            expect(value is None or value >= least, name, f"{least} or more", value)
        for size in self.documents:
            self.placements(size)
        idle = self.n_decoys or self.decoy_positions == "all"
        expect(idle, "decoy_positions", "``decoys``, which it places, beside it", "none")
        if self.n_decoys:
            beside = "answer beside ``decoys``, whose answer is compared with it"
            expect(self.target == "answer", "target", beside, self.target)
        expect(self.seed >= 0, "seed", "0 or more", self.seed)
        expect(self.shots >= 0, "shots", "a number of worked examples, 0 for none", self.shots)
        most = MOST_DOCUMENTS if self.shots else 1
        expect(
            1 <= self.shot_documents <= most,
            "shot_documents",
            f"1 to {most} with ``shots`` {self.shots}",
            self.shot_documents,
        )
        expect(self.generate >= 0, "generate", "a number of tokens, 0 for none", self.generate)
        if FREQUENCY not in self.measures:
            check_idle(["frequencies"] if self.frequencies else [], ["frequencies"], "measures='frequency'", "none")
        elif self.frequencies is None:
            object.__setattr__(self, "frequencies", default_task(self.model))
        check_top(self.top)
        distinct = lenses and all(lenses) and len(set(lenses)) == len(lenses)
        expect(distinct, "lens", "plain or folders, each once", repr(",".join(lenses)))
        fits = batch == "auto" or (batch.isdecimal() and int(batch) > 0)
        expect(fits, "batch_size", "auto or a positive number", repr(batch))
        if self.states is not None:
            beside = "beside ``states``, where no model runs"
            expect(not self.generate, "generate", f"0 {beside}", self.generate)
            for name in ("device_map", "quantize"):
                expect(getattr(self, name) is None, name, f"none {beside}", getattr(self, name))
            expect(SUBLAYERS not in self.measures, "measures", f"others than {SUBLAYERS} {beside}", SUBLAYERS)
            expect(self.reuse_prefix != "on", "reuse_prefix", f"auto or off {beside}", "on")
        if self.reuse_prefix == "on":
            on = "reuse_prefix='on'"
            expect(self.positions == "answer", on, "``positions='answer'``", "all, which runs every token")
            expect(batch in ("auto", "1"), on, "``batch_size`` auto or 1", batch)

    @property
    def extras(self) -> tuple[str, ...]:
        """What rows have beside what every run's have, names of `store.results.EXTRAS`."""
        settle = [GENERATED_SETTLE] if self.generate and JSD in self.measures else []
        return (*self.measures, *settle, *([DECOYS] if self.n_decoys else []))

    @property
    def n_decoys(self) -> int:
        """Documents of a context that state another answer."""
        return int(self.task in CUES) if self.decoys is None else self.decoys

    def placements(self, size: int) -> list[Placement]:
        """Where gold documents and decoys stand in the contexts of a size, in order."""
        return placements(size, self.gold_positions, self.golds, self.decoy_positions, self.n_decoys)


@dataclass(frozen=True)
class FitConfig(ModelConfig):
    """Everything that decides the numbers of a lens, except what the machine decides."""

    model: str = option("smollm2", "as in sweep")
    text: str = option(
        None, "builtin (Python's own reference), tiny, text or .jsonl[.gz] (default: builtin; tiny for the model tiny)"
    )
    tokens: int = option(200_000, "read at most, a fifth held out")
    objective: str = choice(
        "linear: ridge regression in closed form; kl: trained from there; jacobian: the mean derivative of the last "
        "layer's states",
        None,
        *OBJECTIVES,
    )
    steps: int = option(150, "of training, for kl alone")
    prompts: int = option(100, "of up to 128 tokens that a derivative is averaged over, for jacobian alone")
    prompts_from: int = option(0, "which sequence of the text is the first prompt, for jacobian alone", metavar="N")
    from_layer: int = option(0, "the lowest that is fitted; those below stay plain; for jacobian alone", metavar="L")
    seed: int = option(0, "of the training, for kl alone")

    def __post_init__(self):
        super().__post_init__()
        if self.text is None:
            object.__setattr__(self, "text", default_task(self.model))
        expect(self.tokens >= SEQUENCES * SHORTEST, "tokens", f"at least {SEQUENCES * SHORTEST}", self.tokens)
        for name in ("steps", "prompts"):
            expect(getattr(self, name) >= 1, name, "at least 1", getattr(self, name))
        for name in ("prompts_from", "from_layer"):
            expect(getattr(self, name) >= 0, name, "0 or more", getattr(self, name))
        expect(0 <= self.seed < 2**63, "seed", "0 to 2**63 - 1", self.seed)


@dataclass(frozen=True)
class LayersConfig(Config):
    """What is done to the layers of a run."""

    interventions: tuple[str, ...] = option(
        INTERVENTIONS,
        "skip a block, replace what it adds by its mean, silence its attn or mlp, patch the state before the answer "
        "between gold positions; or none, which needs no model",
        kind=EDITS,
        metavar="NAME[,NAME]",
    )
    at: str = choice("tokens that are struck", None, "all", "answer")
    examples: int | None = option(None, "questions drawn by the run's seed (default: all of the run)")
    lens: str | None = option(None, "one of the run's (default: its last)", metavar="NAME")

    def __post_init__(self):
        super().__post_init__()
        names = self.interventions
        known = set(names) <= set(INTERVENTIONS) and len(set(names)) == len(names)
        expect(known, "interventions", f"{EDITS.expected}, each once", repr(",".join(names)))
        expect(self.examples is None or self.examples >= 1, "examples", "1 or more", self.examples)

    @property
    def ablations(self) -> tuple[str, ...]:
        """The interventions that strike every block in turn."""
        return tuple(name for name in self.interventions if name != PATCH)


@dataclass(frozen=True)
class EngineConfig(Config):
    """Who asks the questions of a sweep; nothing of it changes a number, and a run can go on with another."""

    workers: int = option(1, "processes, a model in each", RUNS)
    engine: str = choice(
        "who starts them: processes of this machine, or Ray, also on others (the extra ray)", RUNS, PROCESSES, RAY
    )
    address: str | None = option(
        None,
        "of a Ray that runs, with this machine as a node, for ray alone (default: one is started here, for this sweep)",
        RUNS,
        ADDRESS,
        "auto|HOST:PORT",
    )
    gpus_per_worker: float | None = option(
        None, "GPUs of a worker, such as 0.5, for ray alone (default: 1 on CUDA)", RUNS, SHARE, "G"
    )

    def __post_init__(self):
        super().__post_init__()
        expect(self.workers >= 1, "workers", "1 or more processes", self.workers)
        if self.engine != RAY:
            given = [name for name in ("address", "gpus_per_worker") if getattr(self, name) is not None]
            check_idle(given, given, f"engine='{RAY}'", self.engine)


ONE_PROCESS = EngineConfig()


@dataclass(frozen=True)
class RecipeConfig(ModelConfig):
    """What a recipe does not say itself."""

    model: str = option("smollm2", "as in sweep")
    budget: str | None = option(
        None,
        "time for all of it, such as 90s, 30m or 2h: fewer questions, by a timed start (default: as many as the "
        "recipe asks)",
        metavar="TIME",
    )


def default_task(model: str) -> str:
    """The task of a model for which none is named, and the text that a lens of it is fitted to."""
    return "tiny" if model == "tiny" else "builtin"  # that model knows no words but those of its own task


def check_top(top: tuple[int, ...], vocab_size: int | None = None) -> None:
    """Refuse thresholds that no rank can be held against, or that every rank is below.

    Args:
        top: Correct means rank 1 to k, for each of these.
        vocab_size: Tokens of the model, None where they are not known.

    Raises:
        InputError: None at all, one twice, one outside ``1 .. 2**31 - 1``, or one of ``vocab_size`` or more.
    """
    fits = top and len(set(top)) == len(top) and all(1 <= k < 2**31 for k in top)
    shown = repr(",".join(map(str, top)))
    expect(fits, "top", f"numbers from 1 to {2**31 - 1} such as 1,5,10, each once", shown)
    if vocab_size is not None:
        expect(max(top) < vocab_size, "top", f"less than the {vocab_size} tokens of the vocabulary", max(top))
