"""What an option is: a field of a config, with its help, and how its value is read of a command line or of Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Iterable
from dataclasses import Field, dataclass, field, fields
from math import inf
from operator import index
from typing import Any

from .errors import InputError


@dataclass(frozen=True)
class Kind:
    """What an option takes: how a value is read, of the command line or of Python, and what errors call it."""

    read: Callable[[Any], Any]
    expected: str


def _flag(value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def number_of(value: object) -> int:
    return int(value) if isinstance(value, str) else index(value)


def _share(value: object) -> float:
    share = float(value)
    if not 0 <= share < inf or isinstance(value, bool):
        raise ValueError
    return share


def parts_of(value: object) -> list:
    """Of ``5,10``, of several values, or of a single one."""
    if isinstance(value, str):
        return value.split(",")
    return list(value) if isinstance(value, Iterable) else [value]


def _typed(value: object) -> str:
    """As the command line has it, which is how a manifest holds it."""
    return value if isinstance(value, str) else ",".join(map(str, parts_of(value)))


FLAG = Kind(_flag, "True or False")
NUMBER = Kind(index, "a whole number")
SHARE = Kind(_share, "a number of 0 or more")
NAME = Kind(os.fspath, "a name or a path")
NUMBERS = Kind(lambda value: tuple(map(number_of, parts_of(value))), "numbers such as 1,5,10")
NAMES = Kind(lambda value: tuple(map(os.fspath, parts_of(value))), "names or paths")
TYPED = Kind(_typed, "a word or a list")
KINDS = {"bool": FLAG, "int": NUMBER, "str": NAME, "tuple[int, ...]": NUMBERS, "tuple[str, ...]": NAMES}


def option(default, help: str, group: str | None = None, kind: Kind | None = None, metavar=None, choices=None):
    """A field of a config.

    Args:
        default: None where it depends on something else.
        help: For the command line; the default is added to it, unless it speaks of a default itself.
        group: Heading that it stands under in the command line's help.
        kind: What it takes, by default what its annotation says.
        metavar: Its value in the command line's help.
        choices: The only values, if they are few.
    """
    metadata = {"help": help, "group": group, "kind": kind, "metavar": metavar, "choices": choices}
    return field(default=default, metadata=metadata)


def kind_of(option: Field) -> Kind:
    """What a field of a config takes."""
    return option.metadata["kind"] or KINDS[option.type.removesuffix(" | None")]


def options_of(kind: type[Config] | Config) -> list[Field]:
    """The fields of a config: its own, then those that several have."""
    return sorted(fields(kind), key=lambda option: bool(option.kw_only))


def choice(help: str, group: str | None, *words: str):
    """One of a few words, by default the first."""
    return option(words[0], help, group, choices=words)


@dataclass(frozen=True)
class Config:
    """Options of one command: what is given is read by the kind of its field, and None stands for the default."""

    def __post_init__(self):
        for option in fields(self):
            name, kind, choices = option.name, kind_of(option), option.metadata["choices"]
            value = getattr(self, name)
            value = option.default if value is None else value
            try:
                read = None if value is None else kind.read(value)
            except (TypeError, ValueError):
                raise InputError(f"``{name}``: expected {kind.expected}, got {value!r}") from None
            expect(choices is None or read is None or read in choices, name, ", ".join(choices or ()), repr(value))
            object.__setattr__(self, name, read)

    def arguments(self) -> dict:
        """The options as a manifest holds them."""
        values = {option.name: getattr(self, option.name) for option in fields(self)}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def check_idle(given: Container[str], names: Iterable[str], owner: str, got: str) -> None:
    """Refuse what was given of the options ``names`` that ``owner``, such as ``objective='kl'``, alone has.

    Raises:
        InputError: Names the first, whose it is, and what was chosen instead.
    """
    for name in names:
        if name in given:
            raise InputError(f"``{name}``: expected ``{owner}``, which alone has this option, got {got}")


def expect(fits: object, name: str, expected: str, got: object) -> None:
    if not fits:
        raise InputError(f"``{name}``: expected {expected}, got {got}")


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
