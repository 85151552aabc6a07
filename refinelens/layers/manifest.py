"""The manifest of an analysis: what it is of, how it was made, and what is finished. No torch, no model."""

from __future__ import annotations

from collections.abc import Callable

from .. import __version__
from ..errors import InputError
from ..machine import now, packages
from ..runs.layers_folder import SCHEMA_VERSION, LayersFolder, entries_of, parts_of
from .examples import RunExamples
from .options import LayerOptions


def begin(
    folder: LayersFolder,
    examples: RunExamples,
    options: LayerOptions,
    overwrite: bool,
    argv: list[str] | None,
    warn: Callable[[str], None],
) -> tuple[dict, bool]:
    """The manifest to work with: a new one, or that of an analysis that goes on, without its damaged parts.

    Nothing is written: what is there stays until model and task are known to fit.

    Returns:
        The manifest, and whether the analysis goes on.

    Raises:
        InputError: An analysis of another run or with other options is there, and ``overwrite`` is not set.
    """
    new = _new(examples, options, argv)
    folder.check_foreign()
    there = None if overwrite else folder.manifest()
    if there is None:
        return new, False
    for (name, wanted), found in zip(_identity(new).items(), _identity(there).values(), strict=True):
        if found != wanted:
            raise InputError(
                f"{folder.path}: expected an analysis with {name} {wanted}, got one with {found}; choose another "
                "--out or pass --overwrite"
            )
    whole = []
    for part in parts_of(there):
        if folder.read_part(part) is None:
            warn(f"{folder.path / 'parts' / part.file}: expected the part as it was written; it is computed again")
        else:
            whole.append(part)
    if len(whole) == len(there["questions"]) or not options.interventions:
        return there, True
    entry = {"started": now(), "argv": argv, "refinelens_version": __version__, "packages": packages()}
    return there | {"status": "running", "parts": entries_of(whole), "resumed": [*there["resumed"], entry]}, True


def _new(examples: RunExamples, options: LayerOptions, argv: list[str] | None) -> dict:
    run = examples.manifest
    return {
        "schema_version": SCHEMA_VERSION,
        "refinelens_version": __version__,
        "run_id": run["run_id"],
        "status": "running",
        "arguments": options.arguments(),
        "argv": argv,
        "lens": examples.lens,
        "model": run["model"]["name"],
        "task": run["task"]["name"],
        "packages": packages(),
        "started": now(),
        "seconds": 0.0,
        "resumed": [],
        "questions": examples.questions,
        "means_sha256": None,
        "parts": [],
    }


def _identity(manifest: dict) -> dict[str, object]:
    """What an analysis that goes on was begun with, as it is asked for; run and number determine the questions."""
    return {
        "run_id": manifest["run_id"],
        "--lens": manifest["lens"],
        "--interventions": ",".join(manifest["arguments"]["interventions"]) or "none",
        "--at": manifest["arguments"]["at"],
        "--examples": len(manifest["questions"]),
    }
