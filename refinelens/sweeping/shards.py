"""Shards: the parts of one run that several machines make, and the run that they are together.

A shard of index I of N makes every N-th part of the run, from the I-th on. A part is a function of manifest and
questions, whoever makes it, so that the merged run has the bytes of one that a single process made. Needs no torch.
"""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import InputError, resume_call
from ..report.rows import counted
from ..report.summary import read_report
from ..report.tables import write_outputs
from ..store.files import check_disk
from ..store.folder import process_entry, short
from ..store.process import working_on
from ..store.results import MERGING, Part, Run, open_run, status_words
from .recorder import RunWriter, totals

SHARD = re.compile(r"([1-9]\d*)/([1-9]\d*)")
# Arguments that name files or say where it runs: of these the manifest has checksums, or what was found there.
MAY_DIFFER = (
    *("model", "subfolder", "task", "template", "frequencies", "lens", "states"),
    *("device", "dtype", "device_map", "max_memory", "trust_remote_code"),
)
# Entries of a manifest that all shards of a run have alike.
MUST_AGREE = (
    *("schema_version", "extras", "seed", "questions_per_part", "chunk_tokens"),
    *("template", "closed_book_template", "chat", "shots"),
    *("task.format", "task.sha256", "frequencies.sha256", "states.dtypes", "shard.of", "shard.questions"),
    *("model.config_sha256", "model.weights_sha256", "model.tokenizer_sha256", "model.device", "model.dtype"),
    *("model.backend", "model.end_ids", "model.one_at_a_time"),
)
KEPT = ("run_id", "started", "finished", "seconds", "workers", "resumed", "platform")  # kept in the merged manifest


def index_and_count(text: str) -> tuple[int, int]:
    """Of ``I/N``, I from 1 to N.

    Raises:
        InputError: Anything else.
    """
    found = SHARD.fullmatch(text)
    index, of = map(int, found.groups()) if found else (0, 0)
    if not 1 <= index <= of:
        raise InputError(f"``shard``: expected I/N such as 2/7, with I from 1 to N, got {text!r}")
    return index, of


def shard_entry(text: str, manifest: dict) -> dict:
    """The entries that make the manifest of a run that of one of its shards.

    Args:
        text: See `index_and_count`.
        manifest: Of the whole run.

    Raises:
        InputError: As there, or more shards than the run has parts.
    """
    index, of = index_and_count(text)
    n, size = manifest["counts"]["questions"], manifest["questions_per_part"]
    firsts = range(0, n, size)
    if of > len(firsts):
        raise InputError(
            f"``shard``: expected up to {counted(len(firsts), 'shard')}, as {counted(n, 'question')} are written in "
            f"parts of {size}, got {of}"
        )
    own = sum(min(size, n - first) for first in firsts[index - 1 :: of])
    shard = {"index": index, "of": of, "questions": n}
    return {"shard": shard, "counts": manifest["counts"] | {"questions": own}}


@dataclass(frozen=True)
class _Shard:
    run: Run
    manifest: dict

    @property
    def name(self) -> str:
        shard = self.manifest["shard"]
        return f"{shard['index']}/{shard['of']}"

    @property
    def entry(self) -> dict[str, Any]:
        """What the merged manifest says of it."""
        kept = {name: self.manifest.get(name) for name in (*process_entry(None), *KEPT)}
        model = {name: self.manifest["model"].get(name) for name in ("device_name", "places", "whole_difference")}
        return {"shard": self.name, **kept, **model}


def merge_runs(
    folders: Sequence[str | Path],
    out: str | Path,
    overwrite: bool = False,
    argv: list[str] | None = None,
    warn: Callable[[str], None] = lambda line: None,
) -> Run:
    """Make the run that shards are together, in a new folder; the shards stay as they are.

    Args:
        folders: Every shard of one run, finished, in any order.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        argv: Command line, for the manifest.
        warn: Called with a line about shards that other versions made.

    Raises:
        InputError: Shards that are missing, doubled, unfinished, damaged or of another run; names them.
        FaultError: No free disk.
    """
    shards = _in_order([_opened(folder) for folder in folders])
    run, manifest = Run(Path(out)), _merged([shard.manifest for shard in shards], argv)
    if not manifest["counts"]["rows"]:
        raise InputError("runs: expected one question or more that could be asked in one of the shards, got none")
    for line in _other_versions(shards):
        warn(line)
    run.check_replaceable()
    for shard in shards:
        if run.path.resolve() == shard.run.path.resolve():
            raise InputError(f"``out`` {out}: expected a folder of its own, got that of shard {shard.name}")
    with working_on(run.path, "the run", lambda: "the shards are as they were; the same command begins again"):
        begun = run.exists and bool(run.any_manifest().get(MERGING))
        run.check_overwrite(overwrite or begun, manifest["arguments"])
        files = [(s.run, part) for s in shards for part in s.run.parts_of(s.manifest) if part.file is not None]
        check_disk(run.path, sum((source.parts_path / part.file).stat().st_size for source, part in files))
        nothing = {"questions": manifest["counts"]["questions"], **totals([])}
        writer = RunWriter(run, manifest | {"status": "running", MERGING: True, "parts": [], "counts": nothing})
        for source, part in files:
            _copy(writer, source, part)
        del writer.manifest[MERGING]
        merged = [shard.entry for shard in shards]
        writer.save(status="finished", parts=manifest["parts"], counts=manifest["counts"], merged=merged)
        write_outputs(run, read_report(run))
    return run


def _opened(folder: str | Path) -> _Shard:
    """A finished shard that lies on the disk as it was written.

    Raises:
        InputError: Anything else.
    """
    run = open_run(folder)
    manifest = run.manifest
    if not manifest.get("shard"):
        raise InputError(f"{folder}: expected a shard, made with ``shard='I/N'``, got a whole run")
    if manifest["status"] != "finished":
        raise InputError(
            f"{folder}: expected a finished shard, got one that is {status_words(manifest, held=False)}; "
            f"{resume_call(folder)} goes on with it"
        )
    damaged: list[str] = []
    run.whole_parts(manifest, damaged.append)
    if damaged:
        raise InputError(damaged[0])
    return _Shard(run, manifest)


def _in_order(shards: list[_Shard]) -> list[_Shard]:
    """Every shard of one run, each once, by index."""
    if not shards:
        raise InputError("runs: expected the shards of a run, got none")
    first, by_index = shards[0], {}
    for shard in shards:
        for field, wanted, got in _differences(first.manifest, shard.manifest):
            raise InputError(
                f"{shard.run.path}: expected {field} {short(wanted)}, as {first.run.path} has it, got {short(got)}; it "
                "is a shard of another run"
            )
        other_place = by_index.setdefault(shard.manifest["shard"]["index"], shard)
        if other_place is not shard:
            raise InputError(
                f"{shard.run.path}: expected each shard once, got {shard.name} here and in {other_place.run.path}"
            )
    of = first.manifest["shard"]["of"]
    missing = [f"{index}/{of}" for index in range(1, of + 1) if index not in by_index]
    if missing:
        shown = ", ".join(missing[:10]) + (" and others" if len(missing) > 10 else "")
        raise InputError(f"runs: expected {counted(of, 'shard')}, got {len(shards)}; missing: {shown}")
    return [by_index[index] for index in sorted(by_index)]


def _differences(first: dict, other: dict) -> list[tuple[str, object, object]]:
    """Fields in which two manifests are not those of one run, with both values."""
    pairs = [(field, _entry(first, field), _entry(other, field)) for field in MUST_AGREE]
    names = [name for name in {**first["arguments"], **other["arguments"]} if name not in MAY_DIFFER]
    pairs += [(name, first["arguments"].get(name), other["arguments"].get(name)) for name in names]
    lenses = ([(lens["name"], lens.get("sha256")) for lens in manifest["lenses"]] for manifest in (first, other))
    pairs.append(("lenses", *lenses))
    chunks = [_entry(manifest, "chunked_prefill.used") for manifest in (first, other)]
    if None not in chunks:  # one without long contexts has proven nothing
        pairs.append(("chunked_prefill.used", *chunks))
    return [(field, wanted, got) for field, wanted, got in pairs if wanted != got]


def _entry(manifest: dict, field: str) -> object:
    found: Any = manifest
    for key in field.split("."):
        found = found.get(key) if isinstance(found, dict) else None
    return found


def _merged(manifests: list[dict], argv: list[str] | None) -> dict:
    """The manifest of the whole run."""
    first = manifests[0]
    parts = Run.in_order(part for manifest in manifests for part in Run.parts_of(manifest))
    counts = {"questions": first["shard"]["questions"], **totals(parts)}
    reuse = [manifest["prefix_reuse"] for manifest in manifests if manifest.get("prefix_reuse")]
    chunks = [one for manifest in manifests if (one := manifest.get("chunked_prefill"))]
    limits = [one for manifest in manifests if (one := manifest.get("contexts_at_a_time_at_most"))]
    own = {key: value for key, value in first.items() if key != "shard"}
    if "states" in own:
        entries = [manifest["states"] for manifest in manifests]
        sums = {name: sum(entry[name] for entry in entries) for name in ("files", "with_logprobs")}
        own["states"] = own["states"] | sums
    own["model"] = own["model"] | _split_of([manifest["model"] for manifest in manifests])
    return own | {
        **process_entry(argv),
        "started": min(manifest["started"] for manifest in manifests),
        "finished": max(manifest["finished"] for manifest in manifests),
        "seconds": round(sum(manifest["seconds"] for manifest in manifests), 3),
        "run_id": uuid.uuid4().hex,
        "resumed": [],
        "counts": counts,
        "parts": [vars(part) for part in parts],
        **({"prefix_reuse": next((one for one in reuse if not one["used"]), reuse[-1])} if reuse else {}),
        **({"chunked_prefill": next((one for one in chunks if not one["used"]), chunks[-1])} if chunks else {}),
        **({"contexts_at_a_time_at_most": min(limits)} if limits else {}),
    }


def _split_of(models: list[dict]) -> dict[str, Any]:
    """Where a model that was split in some shards lay, and how far it was from the whole one in any, if all say so."""
    split = [model for model in models if model.get("places")]
    if not split:
        return {}
    found = [model.get("whole_difference") for model in split]
    return {"places": split[0]["places"], "whole_difference": None if None in found else max(found)}


def _other_versions(shards: list[_Shard]) -> list[str]:
    """A line for each package and device of which the shards had several: the last digits may tell."""
    processes = [one for shard in shards for one in (shard.manifest, *shard.manifest["resumed"])]
    used = [{"refinelens": one.get("refinelens_version"), **one.get("packages", {})} for one in processes]
    lines = []
    for name in used[0]:
        found = dict.fromkeys(str(version.get(name)) for version in used)
        if len(found) > 1:
            lines.append(f"shards were made with several versions of {name}: {', '.join(found)}")
    devices = dict.fromkeys(str(shard.manifest["model"].get("device_name")) for shard in shards)
    if len(devices) > 1:
        lines.append(f"shards were made on several devices: {', '.join(devices)}")
    return lines


def _copy(writer: RunWriter, source: Run, part: Part) -> None:
    """Bring one file over, held to its checksum once it lies on the disk."""
    there = source.parts_path / str(part.file)
    sha256 = writer.write(writer.run.parts_path / str(part.file), partial(shutil.copyfile, there))
    if sha256 != part.sha256:
        raise InputError(f"{there}: expected sha256 {str(part.sha256)[:12]}, got {sha256[:12]}; it changed meanwhile")
