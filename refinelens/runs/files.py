"""Reading what somebody else wrote: a JSON object with the entries that are needed, and the hash of a file."""

from __future__ import annotations

import hashlib
import json
import reprlib
from pathlib import Path

from ..errors import InputError

LARGEST_JSON = 16 * 2**20  # bytes
SHAPE_WORDS = {str: "a text", int: "a whole number", float: "a number", dict: "an object", list: "a list"}
WORDS = {str: "a text", int: "a positive whole number", bool: "true or false", dict: "an object"}


def read_json_object(path: Path) -> dict:
    """The JSON object in a file of at most `LARGEST_JSON` bytes.

    Raises:
        InputError: No such file, a larger one, or something else in it.
        OSError: It cannot be read.
    """
    if not path.is_file():
        raise InputError(f"expected the file {path.name}, got none")
    if path.stat().st_size > LARGEST_JSON:
        raise InputError(f"expected at most {LARGEST_JSON} bytes in {path.name}, got {path.stat().st_size}")
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"expected a JSON object in {path.name}, got: {error}") from None
    if not isinstance(entries, dict):
        raise InputError(f"expected a JSON object in {path.name}, got {reprlib.repr(entries)}")
    return entries


def check_entries(entries: dict, types: dict[str, type], name: str) -> None:
    """Refuse an object without the entries that are needed, or with some of another type.

    Args:
        entries: As JSON was read.
        types: ``str``, ``int`` (at least 1), ``bool`` or ``dict`` of every entry that must be there.
        name: Of the object, for the message.

    Raises:
        InputError: Names the first entry that does not fit.
    """
    for key, kind in types.items():
        if key not in entries:
            raise InputError(f"expected {key} in {name}, got none")
        value = entries[key]
        if type(value) is not kind or (kind is int and value < 1):
            raise InputError(f"expected {key} in {name} to be {WORDS[kind]}, got {reprlib.repr(value)}")


def check_shape(value, shape, name: str) -> None:
    """Refuse JSON of another shape than expected.

    Args:
        value: As JSON was read.
        shape: A type (``int`` from 0 on; ``float`` takes whole numbers too), an object with the entries that must be
            there, or a list with the shape of each of its entries, of which there must be one.
        name: Of the value, for the message.

    Raises:
        InputError: Names the first place that does not fit.
    """
    if isinstance(shape, dict) and isinstance(value, dict):
        for key, inner in shape.items():
            check_shape(value.get(key), inner, f"{key} of {name}")
    elif isinstance(shape, list) and isinstance(value, list) and value:
        for entry in value:
            check_shape(entry, shape[0], f"an entry of {name}")
    elif not _is(value, shape):
        kind = {dict: "an object", list: "a list of one entry or more"}.get(type(shape)) or SHAPE_WORDS[shape]
        raise InputError(f"expected {kind} as {name}, got {reprlib.repr(value)}")


def _is(value, kind) -> bool:
    if kind is int:
        return type(value) is int and value >= 0
    return type(value) in ((int, float) if kind is float else (kind,))


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
