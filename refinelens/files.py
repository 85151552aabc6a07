"""Reading what somebody else wrote: a JSON object with the entries that are needed, and the hash of a file."""

from __future__ import annotations

import hashlib
import json
import reprlib
from pathlib import Path

from .errors import InputError

LARGEST_JSON = 16 * 2**20  # bytes
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


def sha256_of(path: Path) -> str:
    """Of the bytes of a file, read piece by piece."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
