"""The options of a sweep, checked before anything heavy is loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from .conditions import MOST_DOCUMENTS, gold_positions
from .errors import InputError
from .tasks.formats import DEFAULT

CHOICES = {  # words that options take
    "target": ("answer", "prediction"),
    "positions": ("answer", "all"),
    "answer_tokens": ("first", "all"),
    "alias": ("first", "best"),
    "reuse_prefix": ("auto", "on", "off"),
    "dtype": ("auto", "float32", "float16", "bfloat16"),
}


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
    template: str = DEFAULT  # a word, or the path of a file
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
