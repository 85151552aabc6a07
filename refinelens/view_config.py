"""Options of what is looked at and measured, and of no results that are kept: see `refinelens.config`."""

from __future__ import annotations

from dataclasses import InitVar, dataclass

from .config import ModelConfig, default_task, device_option, dtype_option
from .errors import InputError
from .options import TYPED, Config, Kind, choice, expect, number_of, option

MOST_THREADS = 4096
POINTS = POST, MID, ALL = ("post", "mid", "all")  # of a block


def _every(value: object) -> int:
    """One layer of how many, of ``all``, ``4`` or ``every 4``."""
    return 1 if value == "all" else number_of(value.removeprefix("every").strip() if isinstance(value, str) else value)


LAYERS = Kind(_every, "all, or N for one layer of N")


@dataclass(frozen=True)
class ShowConfig(Config):
    """How a run is shown."""

    top: tuple[int, ...] | None = option(
        None, "the table at other thresholds, from the ranks the run has", metavar="K[,K]"
    )


@dataclass(frozen=True)
class WidgetConfig(Config):
    """Which context of a run a widget shows, through which lens, and how much of it."""

    question: int | None = option(
        None,
        "line of the task file, from 0 (default: the first that could be asked with so many documents)",
        metavar="ID",
    )
    documents: int | None = option(
        None,
        "context size; 0 closed-book, 1 oracle (default: the run's smallest of 2 or more, else oracle, else 0)",
        metavar="N",
    )
    gold_position: int | None = option(None, "0-based (default: the run's first)", metavar="P")
    decoy_position: int | None = option(None, "0-based, of a run with decoys (default: its first)", metavar="P")
    lens: str | None = option(None, "plain, or the name of a lens (default: the run's first)", metavar="NAME")
    tokens: int = option(32, "at most, the last ones of the context")
    k: int = option(5, "most likely tokens of every layer", metavar="K")

    def __post_init__(self):
        super().__post_init__()
        for name in ("tokens", "k"):
            expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))


@dataclass(frozen=True)
class ReadConfig(ModelConfig):
    """How one text, or one context of a run, is read and shown."""

    model: str = option("smollm2", "as in sweep; of a run its own")
    lens: tuple[str, ...] = option(("plain",), "as in sweep; of a run its own", metavar="LENS[,LENS]")
    target: str = option(
        "prediction",
        "whose rank is shown: prediction, the model's own; next, the token that follows; or a token's text, such as "
        "' Paris'",
        metavar="prediction|next|TEXT",
    )
    top_k: int = option(10, "likeliest tokens of every cell")
    layers: int = option(1, "all, or every N", kind=LAYERS, metavar="all|N")
    points: str = choice(
        "post: the stream behind every block; mid: behind its attention; all: both. With mid and all a page also has "
        "what attention and feed-forward part add to the target's logit",
        None,
        *POINTS,
    )
    tokens: int | None = option(None, "the last N are read (default: all; a terminal shows the last 24)")
    generate: int = option(0, "write up to N tokens after the text, greedily, and show them too (default: none)")
    measure: str = choice("that a terminal and a picture colour by", None, "probability", "rank")
    question: int | None = option(None, "of a run: line of the task file, from 0 (default: the first)", metavar="ID")
    documents: int | None = option(None, "of a run: context size (default: its smallest of 2 or more)", metavar="N")
    gold_position: int | None = option(None, "of a run: 0-based (default: its first)", metavar="P")
    decoy_position: int | None = option(None, "of a run with decoys: 0-based (default: its first)", metavar="P")

    def __post_init__(self):
        super().__post_init__()
        for name in ("top_k", "layers"):
            expect(getattr(self, name) >= 1, name, "1 or more", getattr(self, name))
        expect(self.tokens is None or self.tokens >= 1, "tokens", "1 or more", self.tokens)
        expect(self.generate >= 0, "generate", "a number of tokens, 0 for none", self.generate)


@dataclass(frozen=True)
class DoctorConfig(ModelConfig):
    """The model that is looked at, if there is one."""

    model: str | None = option(
        None, "find the parts of its lens and prove them, as sweep does (default: no model)", metavar="NAME"
    )


@dataclass(frozen=True)
class DriftConfig(ModelConfig):
    """Two models that are compared, and the text that both read."""

    model: str = option("smollm2", "as in sweep; the one that may differ, such as a quantised one")
    against: str | None = option(
        None, "the original, in one piece and not quantised (default: the same, not quantised)", metavar="NAME"
    )
    text: str = option(
        None, "builtin (Python's own reference), tiny, text or .jsonl[.gz] (default: builtin; tiny for the model tiny)"
    )
    tokens: int = option(2048, "read at most")

    def __post_init__(self):
        super().__post_init__()
        if self.text is None:
            object.__setattr__(self, "text", default_task(self.model))
        expect(self.tokens >= 1, "tokens", "1 or more", self.tokens)


@dataclass(frozen=True)
class BenchConfig(Config):
    """What is measured; None means the device's default, or what the model has."""

    device: str = device_option()
    rows: int | None = option(None, "layers x positions (default: 416, on CUDA 13312)")
    d_model: int | None = option(None, "(default: 768)")
    vocab: int | None = option(None, "(default: 50257)")
    model: str | None = option(
        None, "its states, norm and unembedding, as in sweep (default: random numbers)", metavar="NAME"
    )
    dtype: str = dtype_option("(default: float32, on CUDA bfloat16)")
    baselines: str = option("all", "all, none or names such as compiled,row-chunks", kind=TYPED)
    rounds: int = option(7, "how often all take turns")
    threads: int = option(1, "on a CPU; 1 is timed by CPU time")
    trust_remote_code: bool = option(False, "run the code that a model brings (default: refuse it)")
    peers: InitVar[object] = None  # an older name of ``baselines``

    def __post_init__(self, peers: object):
        if peers is not None:
            object.__setattr__(self, "baselines", peers)
        super().__post_init__()
        for name in ("rows", "d_model", "vocab", "rounds", "threads"):
            value = getattr(self, name)
            expect(value is None or value >= 1, name, "at least 1", value)
            if self.model is not None and value is not None and name in ("d_model", "vocab"):
                raise InputError(f"``{name}``: expected none beside ``model``, whose own sizes are used; leave it out")
        expect(self.threads <= MOST_THREADS, "threads", f"1 to {MOST_THREADS}", self.threads)
