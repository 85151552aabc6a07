"""The options of everything that runs, checked before anything heavy is loaded.

Conditions of a question are how many documents its context has and where the gold one may stand among them.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from .errors import InputError

CLOSED_BOOK, ORACLE = 0, 1  # no document; the gold document alone
MOST_DOCUMENTS = 100_000  # of a context; no model reads so many
NO_POSITION = -1  # of the gold document, where there is none
WORDS = {"closed-book": CLOSED_BOOK, "oracle": ORACLE}
CHOICES = {  # words that options take
    "target": ("answer", "prediction"),
    "positions": ("answer", "all"),
    "answer_tokens": ("first", "all"),
    "alias": ("first", "best"),
    "reuse_prefix": ("auto", "on", "off"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
}
OBJECTIVES = ("linear", "kl")
TRAINING = ("steps", "seed")  # options of the objective kl alone
SHORTEST = 16  # tokens of a sequence
SEQUENCES = 10  # at least: eight to fit, one to choose the ridge strength, one to report on
ABLATIONS = ("skip", "mean", "attn", "mlp")
PATCH = "patch"
INTERVENTIONS = (*ABLATIONS, PATCH)
AT = ("all", "answer")
SIZES = {"rows": "--rows", "d_model": "--d-model", "vocab": "--vocab", "rounds": "--rounds", "threads": "--threads"}
MOST_THREADS = 4096


def parse_documents(text: str) -> tuple[int, ...]:
    """Context sizes such as ``closed-book,oracle,5,10`` in ascending order, each once.

    Raises:
        InputError: Neither a word nor a number.
    """
    try:
        return tuple(sorted({WORDS[part] if part in WORDS else int(part) for part in text.split(",")}))
    except ValueError:
        raise InputError(f"--documents: expected closed-book, oracle or sizes such as 5,10, got {text!r}") from None


def condition_name(n_documents: int) -> str:
    """``closed-book``, ``oracle`` or ``5 documents``."""
    names = {number: word for word, number in WORDS.items()}
    return names.get(n_documents, f"{n_documents} documents")


def gold_positions(choice: str, n_documents: int) -> list[int]:
    """0-based gold positions of a context size: ``all``, ``ends-middle`` or a list such as ``0,4,9``.

    Without documents it is `NO_POSITION`, and of one document 0, whatever the list.

    Raises:
        InputError: Not one of these, or a position outside the context.
    """
    listed = [] if choice in ("all", "ends-middle") else _positions(choice)
    if n_documents == CLOSED_BOOK:
        return [NO_POSITION]
    if choice == "all":
        return list(range(n_documents))
    if choice == "ends-middle" or n_documents == ORACLE:
        return sorted({0, (n_documents - 1) // 2, n_documents - 1})
    for position in listed:
        if not 0 <= position < n_documents:
            raise InputError(
                f"--gold-positions: expected 0 to {n_documents - 1} with {n_documents} documents, got {position}"
            )
    return sorted(set(listed))


def _positions(choice: str) -> list[int]:
    try:
        return [int(part) for part in choice.split(",")]
    except ValueError:
        raise InputError(f"--gold-positions: expected all, ends-middle or a list like 0,4,9, got {choice!r}") from None


@dataclass(frozen=True)
class SweepOptions:
    """Everything that decides the numbers of a run, except what the machine decides."""

    model: str = "smollm2"
    task: str = "builtin"
    documents: tuple[int, ...] = (5, 10)  # context sizes, the gold document included; 0 is closed-book, 1 oracle
    gold_positions: str = "all"
    examples: int | None = None  # questions drawn; None for all
    target: str = "answer"
    positions: str = "answer"  # that are read: those that an answer token follows, or all of the context
    answer_tokens: str = "first"  # that tables are about
    generate: int = 0  # tokens at most; 0 for none
    top: tuple[int, ...] = (1,)  # correct means rank 1 to k, for each of these
    lens: tuple[str, ...] = ("plain",)  # plain or folders of lenses, all read from the same forward passes
    template: str = "default"  # a word, or the path of a file
    chat: bool = False  # the prompt is the user's turn of the tokenizer's chat template
    alias: str = "first"  # which of several answers is the target
    device: str = "auto"
    dtype: str = "auto"
    batch_size: str = "auto"
    reuse_prefix: str = "auto"
    seed: int = 0
    trust_remote_code: bool = False

    def __post_init__(self):
        if not self.documents or min(self.documents) < 0 or max(self.documents) > MOST_DOCUMENTS:
            sizes = ",".join(map(str, self.documents))
            if self.documents and min(self.documents) >= 0:
                raise InputError(f"--documents: expected sizes up to {MOST_DOCUMENTS}, got {sizes}")
            raise InputError(f"--documents: expected closed-book, oracle or sizes such as 5,10, got {sizes!r}")
        for size in self.documents:
            gold_positions(self.gold_positions, size)
        if self.seed < 0:
            raise InputError(f"--seed: expected 0 or more, got {self.seed}")
        if self.generate < 0:
            raise InputError(f"--generate: expected a number of tokens, 0 for none, got {self.generate}")
        check_top(self.top)
        for name, words in CHOICES.items():
            if getattr(self, name) not in words:
                option = name.replace("_", "-")
                raise InputError(f"--{option}: expected {', '.join(words)}, got {getattr(self, name)!r}")
        if not self.lens or not all(self.lens) or len(set(self.lens)) < len(self.lens):
            raise InputError(f"--lens: expected plain or folders, each once, got {','.join(self.lens)!r}")
        if self.batch_size != "auto" and not (self.batch_size.isdecimal() and int(self.batch_size) > 0):
            raise InputError(f"--batch-size: expected auto or a positive number, got {self.batch_size!r}")
        if self.reuse_prefix == "on" and self.positions == "all":
            raise InputError("--reuse-prefix on: expected --positions answer, got all, which runs every token")
        if self.reuse_prefix == "on" and self.batch_size not in ("auto", "1"):
            raise InputError(f"--reuse-prefix on: expected --batch-size auto or 1, got {self.batch_size}")

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return {**asdict(self), "documents": list(self.documents), "top": list(self.top), "lens": list(self.lens)}


def default_task(model: str) -> str:
    """The task of a model for which none is named, and the text that a lens of it is fitted to."""
    return "tiny" if model == "tiny" else "builtin"  # that model knows no words but those of its own task


def check_utf8(what: str, text: str) -> None:
    """Refuse a text that no manifest can hold: the name of a file need not be UTF-8.

    Args:
        what: Where it was given.
        text: What was given.

    Raises:
        InputError: It has bytes that are not UTF-8, as Python keeps them.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError(f"{what}: expected UTF-8, got {text!r}; rename the file or folder") from None


def check_top(top: tuple[int, ...], vocab_size: int | None = None) -> None:
    """Refuse thresholds that no rank can be held against, or that every rank is below.

    Args:
        top: Correct means rank 1 to k, for each of these.
        vocab_size: Tokens of the model, None where they are not known.

    Raises:
        InputError: None at all, one twice, one outside ``1 .. 2**31 - 1``, or one of ``vocab_size`` or more.
    """
    if not top or len(set(top)) < len(top) or not all(1 <= k < 2**31 for k in top):
        raise InputError(
            f"--top: expected numbers from 1 to {2**31 - 1} such as 1,5,10, each once, got {','.join(map(str, top))!r}"
        )
    if vocab_size is not None and max(top) >= vocab_size:
        raise InputError(f"--top: expected less than the {vocab_size} tokens of the vocabulary, got {max(top)}")


@dataclass(frozen=True)
class FitOptions:
    """Everything that decides the numbers of a lens, except what the machine decides."""

    model: str = "smollm2"
    text: str = "builtin"
    tokens: int = 200_000
    objective: str = "linear"
    steps: int = 150  # of training, for the objective kl
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0  # of training
    trust_remote_code: bool = False

    def __post_init__(self):
        if self.tokens < SEQUENCES * SHORTEST:
            raise InputError(f"--tokens: expected at least {SEQUENCES * SHORTEST}, got {self.tokens}")
        if self.objective not in OBJECTIVES:
            raise InputError(f"--objective: expected {' or '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.steps < 1:
            raise InputError(f"--steps: expected at least 1, got {self.steps}")
        if not 0 <= self.seed < 2**63:
            raise InputError(f"--seed: expected 0 to 2**63 - 1, got {self.seed}")

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return asdict(self)


@dataclass(frozen=True)
class LayerOptions:
    """What is done to the layers of a run."""

    interventions: tuple[str, ...] = INTERVENTIONS  # none: the lens alone, without the model
    at: str = "all"  # positions that an ablation strikes; patches are at the answer always
    examples: int | None = None  # questions drawn among those of the run; None for all
    lens: str | None = None  # name of one of the run's; None for the last, a fitted one where there is one

    def __post_init__(self):
        if not set(self.interventions) <= set(INTERVENTIONS) or len(set(self.interventions)) < len(self.interventions):
            raise InputError(
                f"--interventions: expected none or some of {','.join(INTERVENTIONS)}, each once, got "
                f"{','.join(self.interventions)!r}"
            )
        if self.at not in AT:
            raise InputError(f"--at: expected {' or '.join(AT)}, got {self.at!r}")
        if self.examples is not None and self.examples < 1:
            raise InputError(f"--examples: expected 1 or more, got {self.examples}")

    @property
    def ablations(self) -> tuple[str, ...]:
        """The interventions that strike every block in turn."""
        return tuple(name for name in self.interventions if name != PATCH)

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        return {**asdict(self), "interventions": list(self.interventions)}


def parse_interventions(text: str) -> tuple[str, ...]:
    """``skip,mean`` as words; ``none`` is no word."""
    return () if text == "none" else tuple(text.split(","))


@dataclass(frozen=True)
class BenchOptions:
    """What is measured; None means the device's default, or what the model has."""

    device: str = "auto"
    rows: int | None = None  # layers x positions
    d_model: int | None = None
    vocab: int | None = None
    model: str | None = None  # whose states, norm and unembedding; None for random ones
    dtype: str = "auto"
    peers: str = "all"  # all, none, or names separated by commas
    rounds: int = 7
    threads: int = 1  # on a CPU; more than one is measured by wall clock
    trust_remote_code: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in SIZES and value is not None and value < 1:
                raise InputError(f"{SIZES[field.name]}: expected at least 1, got {value}")
        if self.threads > MOST_THREADS:
            raise InputError(f"--threads: expected 1 to {MOST_THREADS}, got {self.threads}")
        given = [SIZES[name] for name in ("d_model", "vocab") if getattr(self, name) is not None]
        if self.model is not None and given:
            raise InputError(f"{given[0]}: expected none beside --model, whose own sizes are used; leave it out")
