"""A folder of results of any kind: what lies in it, how it begins, grows, goes on and is held to what it was made of.

A kind is a subclass of `Folder` that names its files and what its manifest must hold; `store.layers` is a short one.
One process at a time writes a folder (`store.process`), with a `FolderWriter`.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import FaultError, InputError
from ..machine import __version__, now, packages
from .files import check_entries, disk_error, sha256_of, sync_folder, temporary_of, write_whole

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Folder:
    """A manifest, parts that are only ever added, and files that are made of them.

    The manifest names parts by their checksums, and so it does the files of ``NAMED``; a file is there whole before
    the manifest names it, and is not written to any more from then on.
    """

    path: Path

    NAME: ClassVar[str]  # of the kind, with its article
    MAKE: ClassVar[str]  # what makes such a folder
    REMAKE: ClassVar[str]  # what helps where a manifest cannot be used
    REPAIR: ClassVar[str]  # what computes a damaged part again, of {path}
    VERSION: ClassVar[int]  # of the schema
    KEYS: ClassVar[dict]  # what a manifest of any version of the schema holds
    SHAPE: ClassVar[dict]  # what is read of a manifest of this version, see `check_entries`
    PART: ClassVar[type]  # a part as the manifest names it: with ``file``, ``sha256``, and ``first`` to order them by
    PARTS: ClassVar[str | None] = None  # folder of the parts
    NAMED: ClassVar[dict[str, str]] = {}  # files, and the entries of the manifest with their checksums
    DERIVED: ClassVar[tuple[str, ...]] = ()  # files that can be written from the others at any time
    BESIDE: ClassVar[tuple[str, ...]] = ()  # what else may lie there
    MARKS: ClassVar[tuple[str, ...]] = (MANIFEST,)  # files by one of which such a folder is known

    @property
    def exists(self) -> bool:
        """Whether there is a manifest."""
        return (self.path / MANIFEST).exists()

    @property
    def manifest(self) -> dict:
        """The manifest as written last."""
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))

    @property
    def parts_path(self) -> Path:
        """Folder of the parts."""
        return self.path / self.PARTS

    def part_path(self, index: int) -> Path:
        """File of one part."""
        return self.parts_path / f"part-{index:05d}.parquet"

    def any_manifest(self) -> dict:
        """The manifest, also one of another version of the schema.

        Raises:
            InputError: The folder does not hold such results.
        """
        try:
            manifest = self.manifest
            if not isinstance(manifest, dict):
                raise ValueError
            check_entries(manifest, self.KEYS, MANIFEST)
        except FileNotFoundError:
            got = f"got none; {self.MAKE}"
            raise InputError(f"{self.path}: expected {self.NAME} folder with {MANIFEST}, {got}") from None
        except OSError as error:
            raise InputError(f"{self.path}/{MANIFEST}: expected a readable file, got: {error.strerror}") from None
        except (ValueError, RecursionError):
            raise self._not_a_manifest("something else") from None
        return manifest

    def checked_manifest(self) -> dict:
        """The manifest, with everything that is read of it.

        Raises:
            InputError: The folder does not hold such results, or those of another version of the schema.
        """
        manifest = self.any_manifest()
        if manifest["schema_version"] != self.VERSION:
            version, written = manifest["schema_version"], manifest.get("refinelens_version", "another version")
            raise InputError(
                f"{self.path}: expected schema version {self.VERSION}, got {version}; {self.REMAKE}, or read it with "
                f"the refinelens that wrote it ({written})"
            )
        try:
            check_entries(manifest, self.SHAPE, f"{self.path}/{MANIFEST}")
            self.parts_of(manifest)
        except InputError as error:
            raise InputError(f"{error}; bring it back, or {self.REMAKE}") from None
        except (KeyError, TypeError):
            raise self._not_a_manifest("one without its parts") from None
        return manifest

    def _not_a_manifest(self, got: str) -> InputError:
        return InputError(
            f"{self.path}/{MANIFEST}: expected the manifest of {self.NAME}, got {got}; bring it back, or {self.REMAKE}"
        )

    def write_manifest(self, manifest: dict) -> None:
        """Replace the manifest. Parts stand in a line each: there can be thousands."""
        text = json.dumps(manifest | ({"parts": []} if "parts" in manifest else {}), indent=2, ensure_ascii=False)
        if parts := ",\n".join(f"    {json.dumps(part, ensure_ascii=False)}" for part in manifest.get("parts", [])):
            text = text.replace('\n  "parts": []', f'\n  "parts": [\n{parts}\n  ]')
        write_whole(self.path / MANIFEST, lambda path: path.write_text(text + "\n", encoding="utf-8"))

    @classmethod
    def parts_of(cls, manifest: dict) -> list:
        """The parts that a manifest names, in order."""
        return cls.in_order(cls.PART(**entry) for entry in manifest["parts"])

    @staticmethod
    def in_order(parts: Iterable) -> list:
        """Parts in the order that a manifest has them in, whenever they were written."""
        return sorted(parts, key=lambda part: part.first)

    def whole_parts(self, manifest: dict, warn: Callable[[str], None] = lambda line: None) -> list:
        """The parts that are as they were written; any other is as good as absent, and ``warn`` hears of it."""
        whole = []
        for part in self.parts_of(manifest):
            try:
                if part.file is not None:
                    self._bytes_of(part)
                whole.append(part)
            except InputError as error:
                warn(str(error))
        return whole

    def read_part(self, part, columns: list[str] | None = None) -> pa.Table:
        """A few columns of one part, its checksum compared first.

        Raises:
            InputError: Names a part that is not there or not as it was written, and how it comes back.
        """
        return pq.read_table(pa.BufferReader(self._bytes_of(part)), columns=columns)

    def _bytes_of(self, part) -> bytes:
        path, repair = self.parts_path / part.file, self.REPAIR.format(path=self.path)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise InputError(
                f"{path}: expected a file that can be read, got: {error.strerror or error}; {repair}"
            ) from None
        sha256 = hashlib.sha256(data).hexdigest()
        if sha256 != part.sha256:
            got = f"{sha256[:12]} ({len(data)} bytes)"
            raise InputError(f"{path}: expected sha256 {str(part.sha256)[:12]}, got {got}; {repair}")
        return data

    def is_whole(self, name: str, manifest: dict) -> bool:
        """Whether one of ``NAMED`` is there as the manifest names it."""
        return (self.path / name).exists() and sha256_of(self.path / name) == manifest.get(self.NAMED[name])

    def check_foreign(self) -> None:
        """Refuse to write where anything lies that is no such folder's; what is hidden is nobody's business.

        Raises:
            InputError: Names a file that such a folder does not have, or has beside others by which it is known.
        """
        try:
            names = sorted(path.name for path in self.path.iterdir()) if self.path.exists() else []
        except OSError as error:
            raise disk_error(self.path, error, begun=False) from None
        names = [name for name in names if not name.startswith(".")]
        foreign = [name for name in names if name not in self._own_names()]
        if foreign or (names and not set(names) & set(self.MARKS)):
            other = (foreign + names)[0]
            raise InputError(
                f"``out`` {self.path}: expected a new folder or {self.NAME}, got other files, such as {other}"
            )

    def _own_names(self) -> tuple[str, ...]:
        parts = [self.PARTS] if self.PARTS else []
        return (MANIFEST, *parts, *self.NAMED, *self.DERIVED, *self.BESIDE)

    def _part_files(self, pattern: str) -> list[Path]:
        return list(self.parts_path.glob(pattern)) if self.PARTS else []

    def remove_temporary(self) -> None:
        """Remove what a process that was killed had not given its name yet."""
        for name in self._own_names():
            temporary_of(self.path / name).unlink(missing_ok=True)
        for path in self._part_files(".part-*.parquet.tmp"):
            path.unlink()

    def remove_derived(self) -> None:
        """Remove what can be written from the rest."""
        for name in self.DERIVED:
            (self.path / name).unlink(missing_ok=True)

    def remove_unnamed(self, manifest: dict) -> None:
        """Remove what another manifest named, or a killed process had not named yet, and what was derived from it."""
        self.remove_derived()
        for name in (name for name, entry in self.NAMED.items() if not manifest.get(entry)):
            (self.path / name).unlink(missing_ok=True)
        named = {part.file for part in self.parts_of(manifest)}
        for path in self._part_files("part-*.parquet"):
            if path.name not in named:
                path.unlink()

    def remove(self) -> None:
        """Remove all that is the folder's own, the manifest last: what is left by a kill can be told."""
        self.remove_temporary()
        self.remove_unnamed({"parts": []} | dict.fromkeys(self.NAMED.values()))
        with suppress(OSError):  # there is none, or somebody keeps something in it
            self.parts_path.rmdir()
        (self.path / MANIFEST).unlink(missing_ok=True)


class FolderWriter:
    """Writes one folder, which it has the lock of, so that the manifest is true after every step on the disk.

    Args:
        folder: What is written.
        manifest: What to begin or to go on with; nothing is there of it before `place`, which `write` calls too.
    """

    def __init__(self, folder: Folder, manifest: dict):
        self.folder = folder
        self.manifest = manifest
        self._signature: tuple | None = None  # what the file system says of the manifest once it is this one
        self._seconds, self._started = manifest["seconds"] or 0.0, time.monotonic()
        folder.remove_temporary()

    @property
    def is_placed(self) -> bool:
        """Whether the folder is this process's: it can be gone on with, and what was there before is gone."""
        return self._signature is not None

    def place(self) -> None:
        """Put the manifest in its place, after the tables of another one and before all else of it goes.

        Tables can be written again; those of another manifest must not be read with this one, if a kill comes between.
        """
        if not self.is_placed:
            goes_on = self.manifest["status"] != "finished"
            if goes_on:
                self.folder.remove_derived()
            self._write_manifest()
            sync_folder(self.folder.path.absolute().parent)
            if goes_on:
                self.folder.remove_unnamed(self.manifest)

    def write(self, path: Path, write: Callable[[Path], object]) -> str:
        """Write a file whole and return its checksum; another folder gives way once it lies on the disk."""
        sums = []

        def on_disk(temporary: Path) -> None:
            sums.append(sha256_of(temporary))
            self.place()

        self._check_own()
        path.parent.mkdir(exist_ok=True)
        write_whole(path, write, on_disk)
        return sums[0]

    def write_named(self, name: str, write: Callable[[Path], object]) -> None:
        """Write one of the folder's ``NAMED`` and name it."""
        self.save(**{self.folder.NAMED[name]: self.write(self.folder.path / name, write)})

    def append(self, part) -> None:
        """Name a part that was written."""
        parts = self.folder.in_order([*self.folder.parts_of(self.manifest), part])
        self.save(parts=[vars(part) for part in parts])

    def save(self, **entries) -> None:
        """Change entries of the manifest, and bring it and the time that was spent to the disk."""
        self._check_own()
        self.manifest |= entries
        self.manifest["seconds"] = round(self._seconds + time.monotonic() - self._started, 3)
        self._write_manifest()

    def withdraw(self) -> None:
        """Take the manifest of a folder that came to nothing away again."""
        (self.folder.path / MANIFEST).unlink()
        self._signature = None
        with suppress(OSError):  # no part was begun
            self.folder.parts_path.rmdir()

    def _write_manifest(self) -> None:
        self.folder.write_manifest(self.manifest)
        self._signature = _signature(self.folder.path / MANIFEST)

    def _check_own(self) -> None:
        """Refuse to go on in a folder that somebody else made theirs, against the lock."""
        if not self.is_placed or _signature(self.folder.path / MANIFEST) == self._signature:
            return
        there = self.folder.manifest
        if any(there.get(key) != self.manifest[key] for key in ("run_id", "started")):
            self._signature = None
            raise FaultError(f"``out`` {self.folder.path}: expected this process's own, got another that replaced it")


def _signature(path: Path) -> tuple:
    """Changes when a file is replaced."""
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


def process_entry(argv: list[str] | None) -> dict:
    """What a manifest says of a process that begins a folder or goes on with it."""
    return {"started": now(), "argv": argv, "refinelens_version": __version__, "packages": packages()}


def go_on(manifest: dict, parts: list, entry: dict) -> dict:
    """The manifest of a folder that goes on with these of its parts; ``entry`` is of the process that does."""
    resumed = [*manifest["resumed"], entry]
    return manifest | {"status": "running", "parts": [vars(part) for part in parts], "resumed": resumed}


@dataclass(frozen=True)
class MadeOf:
    """What a folder was made of: whoever goes on with it is held to that."""

    path: Path
    manifest: dict  # or other entries that say it
    command: str  # that holds to it, as its errors begin
    name: str = "the run"
    remedy: str = "bring that back, or make another run"

    def require(self, field: str, here: object) -> None:
        """Refuse what is no longer as it was.

        Args:
            field: Its place in the manifest, such as ``model.weights_sha256``.
            here: What was found now.

        Raises:
            InputError: Names the field and both values.
        """
        there = self.manifest
        for key in field.split("."):
            there = there[int(key)] if isinstance(there, list) else there.get(key)
        if there != here:
            raise InputError(
                f"{self.command} {self.path}: expected {field} {short(there)}, as {self.name} has it, got "
                f"{short(here)}; {self.remedy}"
            )


def short(value: object) -> str:
    """A value on one line; of a longer text its hash."""
    text = str(value)
    if len(text) > 64 or "\n" in text:
        return f"with sha256 {hashlib.sha256(text.encode()).hexdigest()[:12]}"
    return text[:12] if len(text) == 64 else text
