"""Jacobian lenses of disjoint prompts, fitted on several machines say, as the one of all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..errors import InputError
from ..lens.files import FORMAT_VERSION, TENSORS, Lens, load_lens, save_lens
from ..lens.published import JACOBIAN
from ..lens.translators import MODEL_KEYS, Translators
from ..machine import __version__, now, packages
from ..store.files import check_disk
from ..store.process import working_on
from .fit import Fitted, lens_folder
from .jacobian import relative_errors

SAME = ("prompt_tokens", "sequence_tokens", "positions_skipped", "from_layer")  # of all estimates


def merge_lenses(
    folders: Sequence[str], out: str, overwrite: bool = False, argv: list[str] | None = None
) -> Fitted:
    """Average Jacobian lenses by their numbers of prompts, and write the folder of the result.

    Args:
        folders: Two lenses or more that ``fit`` made, of one model, of prompts that none shares with another.
        out: Folder of the lens, made here.
        overwrite: Replace a lens that is there.
        argv: Command line, for the manifest.

    Raises:
        InputError: Fewer than two, other lenses, other models or layers, or prompts that two have in common.
    """
    if len(folders) < 2:
        raise InputError(f"lenses: expected two or more, got {len(folders)}")
    lenses = [load_lens(folder) for folder in folders]
    for lens, path in zip(lenses, folders, strict=True):
        _check(lenses[0], lens, path)
    _check_disjoint(lenses, folders)
    folder = lens_folder(out)
    check_disk(out, 2 * lenses[0].translators.weight.nbytes)  # type: ignore[union-attr]
    with working_on(folder.path, "the lens", lambda: "the same command begins again"):
        folder.remove_temporary()
        there = [name for name in folder.MARKS if (folder.path / name).exists()]
        if there and not overwrite:
            raise InputError(
                f"``out`` {out}: expected a new folder, got one with {there[0]}; choose another or pass "
                "``overwrite=True``"
            )
        counts = [lens.manifest[JACOBIAN]["prompts"] for lens in lenses]
        weights = [lens.translators.weight.double() for lens in lenses]  # type: ignore[union-attr]
        mean = sum(count * weight for count, weight in zip(counts, weights, strict=True)) / sum(counts)
        from_layer = lenses[0].manifest[JACOBIAN]["from_layer"]
        identity = torch.eye(mean.shape[-1], dtype=torch.float64)
        errors = relative_errors([weight[from_layer:] + identity for weight in weights], counts)
        first = lenses[0].manifest
        manifest = {
            "format_version": FORMAT_VERSION,
            "kind": JACOBIAN,
            "refinelens_version": __version__,
            "model": first["model"],
            "dtype": first["dtype"],
            "argv": argv,
            "packages": first.get("packages") or packages(),
            "finished": now(),
            "merged": [part for lens in lenses for part in _parts(lens)],
            JACOBIAN: first[JACOBIAN] | {"prompts": sum(counts), "prompts_from": None, "errors": errors},
        }
        manifest = save_lens(folder.path, Translators(mean.float(), torch.zeros(mean.shape[:2])), manifest)
        for name in folder.DERIVED:  # of the lens or the stopped fit that was there
            if name != TENSORS:
                (folder.path / name).unlink(missing_ok=True)
        return Fitted(folder.path, manifest)


def _check(first: Lens, lens: Lens, path: str) -> None:
    """Every lens is a Jacobian one of our own, of the first one's model, layers and length of prompts."""
    own = lens.manifest.get(JACOBIAN) or {}
    if lens.kind != JACOBIAN or "prompt_tokens" not in own:
        raise InputError(
            f"lenses {path}: expected one fitted with ``objective='jacobian'``, got a {lens.kind} lens"
            + ("" if lens.kind != JACOBIAN else " as published, which does not say what its prompts were")
        )
    pairs = [(key, first.manifest["model"][key], lens.manifest["model"][key]) for key in MODEL_KEYS if key != "name"]
    pairs += [(key, first.manifest[JACOBIAN][key], own[key]) for key in SAME]
    for key, wanted, got in pairs:
        if wanted != got:
            raise InputError(f"lenses {path}: expected {key} {wanted} as the first has it, got {got}")


def _parts(lens: Lens) -> list[dict]:
    """The fits that a lens is made of, with text and prompts."""
    own = {"name": lens.name, "sha256": lens.sha256, "text": lens.manifest.get("text")}
    return lens.manifest.get("merged") or [own | lens.manifest[JACOBIAN]]


def _check_disjoint(lenses: list[Lens], folders: Sequence[str]) -> None:
    """No prompt counts twice: of one text, the prompts of two lenses do not meet."""
    spans = []
    for lens, path in zip(lenses, folders, strict=True):
        for part in _parts(lens):
            start = part["prompts_from"]
            spans.append((part["text"]["sha256"], range(start, start + part["prompts"]), path))
    for i, (text, prompts, path) in enumerate(spans):
        for other, others, place in spans[:i]:
            if text == other and prompts.start < others.stop and others.start < prompts.stop:
                shared = range(max(prompts.start, others.start), min(prompts.stop, others.stop))
                raise InputError(
                    f"lenses {path}: expected prompts that {place} does not have, got {len(shared)} in common, "
                    f"from number {shared.start} of the text on; fit them with another ``prompts_from``"
                )
