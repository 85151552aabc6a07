"""The fit of a lens: text -> residual stream -> statistics -> translators -> quality; stopped, and gone on with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import __version__
from ..config import FitOptions
from ..errors import FaultError, InputError
from ..lens.files import FORMAT_VERSION, MANIFEST, PLAIN, TENSORS, model_entry, save_lens
from ..lens.logit_lens import LogitLens
from ..lens.translators import Translators
from ..machine import now, packages
from ..model.loading import LoadedModel, is_out_of_memory, load_model
from ..store.folder import RunLock, disk_error, write_whole
from ..store.results import check_disk
from . import objectives
from .objectives import Statistics, train
from .quality import FIGURE, TABLE, draw_figure, measure, write_csv
from .text import Split, States, Text, load_text

NAME = "statistics.safetensors"
CHECKPOINT_SECONDS = 60.0
REPORT_TOKENS = 2048  # at most; all layers are read at each, by both lenses
OUTPUTS = {MANIFEST, TENSORS, TABLE, FIGURE, NAME}

Progress = Callable[[str, int, int], None]  # stage, done, total


def save(folder: Path, identity: dict, done: int, fit: Statistics, choose: Statistics) -> None:
    """Write the statistics of the first ``done`` sequences."""
    tensors = fit.tensors("fit") | choose.tensors("choose")
    metadata = {"identity": json.dumps(identity), "done": str(done)}
    write_whole(folder / NAME, lambda path: save_file(tensors, path, metadata))


def load(
    folder: Path, identity: dict, device: torch.device, overwrite: bool = False
) -> tuple[int, Statistics, Statistics] | None:
    """(sequences done, statistics to fit, statistics to choose), or None if there is nothing to go on from.

    Raises:
        InputError: The file is of another fit (the first difference is named), or damaged, and must not be
            overwritten.
    """
    if not (folder / NAME).exists():
        return None
    try:
        return _read(folder, identity, device)
    except InputError:
        if overwrite:
            return None
        raise


def _read(folder: Path, identity: dict, device: torch.device) -> tuple[int, Statistics, Statistics]:
    path = folder / NAME
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        there = json.loads(metadata["identity"])
        state = [Statistics.from_tensors(tensors, prefix, device) for prefix in ("fit", "choose")]
        done = int(metadata["done"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"--out {folder}: expected a whole {NAME}, got: {error}; pass --overwrite to begin again"
        ) from None
    for key, value in identity.items():
        if there.get(key) != value:
            raise InputError(
                f"--out {folder}: expected to go on with {key} {there.get(key)}, got {value}; pass --overwrite to "
                "begin again"
            )
    return done, *state


@dataclass(frozen=True)
class Fitted:
    """A lens that was fitted: its folder and manifest."""

    path: Path
    manifest: dict


def fit_lens(
    options: FitOptions,
    out: str,
    overwrite: bool = False,
    argv: list[str] | None = None,
    report: Progress = lambda stage, done, total: None,
) -> Fitted:
    """Fit a lens to a model and write its folder; a fit that was stopped goes on from its last checkpoint.

    Memory: ``32 * n_layers * d_model**2`` bytes of statistics, whatever the amount of text, and a third of that
    while the lens is made of them; as much on disk until it is written.

    Args:
        options: What to fit.
        out: Folder of the lens, made here.
        overwrite: Replace a lens or a stopped fit that is there.
        argv: Command line, for the manifest.
        report: Called with a stage, and how much of it is done.

    Raises:
        InputError: Input that does not fit, or another process that writes to the folder.
        FaultError: No free disk or no memory; the same call goes on from the last checkpoint.
    """
    folder = Path(out)
    _check_folder(out, folder)
    with RunLock(folder):
        if (folder / MANIFEST).exists() and not overwrite:
            raise InputError(f"--out {out}: expected a new folder, got a lens; choose another or pass --overwrite")
        text = load_text(options.text)
        loaded = load_model(options.model, options.device, options.dtype, options.trust_remote_code)
        logit_lens = LogitLens(loaded.model)
        check_disk(out, 2 * _statistics_bytes(logit_lens))
        try:
            return Fitted(folder, _fit(options, folder, overwrite, argv, text, loaded, logit_lens, report))
        except OSError as error:
            fault = disk_error(out, error)
            raise type(fault)(f"{fault}; the same command goes on from the last checkpoint") from None
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            raise FaultError(
                f"--model {options.model}: expected memory for {_statistics_bytes(logit_lens) / 1e9:.1f} GB of "
                "statistics beside the model, got out of memory; use a larger machine or a smaller model"
            ) from None


def _fit(
    options: FitOptions,
    folder: Path,
    overwrite: bool,
    argv: list[str] | None,
    text: Text,
    loaded: LoadedModel,
    logit_lens: LogitLens,
    report: Progress,
) -> dict:
    """Fit and write everything; the manifest."""
    started = time.monotonic()
    states = States(options, text, loaded, logit_lens)
    identity = _identity(options, text.sha256, loaded, states.split)
    gathered = _gather(folder, identity, overwrite, states, logit_lens, report)
    lenses, strengths = _solve(options, *gathered, states, logit_lens, report)
    quality = measure(logit_lens, _with_progress(states, states.split.report, report), {"plain": None, **lenses})
    manifest = {
        **_manifest(options, argv, text, loaded, logit_lens),
        "tokens": {
            "fit": states.split.tokens(states.split.fit),
            "choose": states.split.tokens(states.split.choose),
            "report": quality["plain"].tokens,
        },
        "ridge": strengths,
        "quality": {name: asdict(of_lens) for name, of_lens in quality.items()},
        "seconds": round(time.monotonic() - started, 3),
    }
    write_csv(folder, manifest)
    draw_figure(folder, manifest)
    manifest = save_lens(folder, lenses[options.objective], manifest)
    (folder / NAME).unlink(missing_ok=True)
    return manifest


def _manifest(
    options: FitOptions, argv: list[str] | None, text: Text, loaded: LoadedModel, logit_lens: LogitLens
) -> dict:
    """What is known of a lens without its numbers."""
    return {
        "format_version": FORMAT_VERSION,
        "kind": options.objective,
        "refinelens_version": __version__,
        "model": model_entry(loaded, logit_lens),
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "text": {"name": text.name, "sha256": text.sha256},
        "arguments": options.arguments(),
        "argv": argv,
        "packages": packages(),
        "finished": now(),
    }


def _gather(
    folder: Path, identity: dict, overwrite: bool, states: States, logit_lens: LogitLens, report: Progress
) -> tuple[Statistics, Statistics]:
    """Statistics of the sequences to fit on and to choose by, kept on disk from time to time and when all are read."""
    device = logit_lens.model.device
    begun = load(folder, identity, device, overwrite)
    done, fit, choose = begun or (0, *(Statistics.empty(logit_lens.n_layers, logit_lens.d_model, device) for _ in "12"))
    end, saved, adding = states.split.choose.stop, time.monotonic(), False
    report("reading", done, end)
    try:
        for hidden in states.of(range(done, end)):
            adding = True
            (fit if done in states.split.fit else choose).add(hidden)
            done, adding = done + 1, False
            report("reading", done, end)
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                save(folder, identity, done, fit, choose)
                saved = time.monotonic()
    except KeyboardInterrupt:
        if not adding:  # a sequence that was added by half is in no state to go on from
            save(folder, identity, done, fit, choose)
        raise
    save(folder, identity, done, fit, choose)
    return fit, choose


def _solve(
    options: FitOptions, fit: Statistics, choose: Statistics, states: States, logit_lens: LogitLens, report: Progress
) -> tuple[dict[str, Translators], list[float]]:
    """The translators of every objective up to the one asked for, as the model needs them, and the ridge strengths."""
    report("solving", 0, 1)
    translators, strengths = objectives.solve(fit, choose)
    lenses = {"linear": translators}
    if options.objective == "kl":
        lenses["kl"] = _train(options, logit_lens, translators, fit, states, report)
    try:
        return {name: logit_lens.adapted(lens) for name, lens in lenses.items()}, strengths
    except InputError as error:
        raise InputError(f"--dtype: {error}") from None


def _train(
    options: FitOptions,
    logit_lens: LogitLens,
    start: Translators,
    statistics: Statistics,
    states: States,
    report: Progress,
) -> Translators:
    """The trained translators, but at layers where ``start`` reads the sequences to choose by better."""

    def on_step(done: int, total: int) -> None:
        report("training", done, total)

    trained = train(
        logit_lens, start, statistics, lambda: states.of(states.split.fit), options.steps, options.seed, on_step
    )
    both = {"start": logit_lens.adapted(start), "trained": logit_lens.adapted(trained)}
    quality = measure(logit_lens, _with_progress(states, states.split.choose, report), both)
    pairs = zip(quality["trained"].kl[:-1], quality["start"].kl[:-1], strict=True)
    better = torch.tensor([trained_kl < start_kl for trained_kl, start_kl in pairs], device=trained.bias.device)
    return Translators(
        torch.where(better[:, None, None], trained.weight, start.weight),
        torch.where(better[:, None], trained.bias, start.bias),
    )


def _with_progress(states: States, sequences: range, report: Progress) -> Iterator[Tensor]:
    """The states of a sample of some sequences."""
    for index, hidden in enumerate(states.sample(sequences, REPORT_TOKENS)):
        report("measuring", index, len(sequences))
        yield hidden


def _identity(options: FitOptions, text_sha256: str, loaded: LoadedModel, split: Split) -> dict:
    """What two fits must share for one to go on where the other stopped."""
    return {
        "tokens": options.tokens,
        "text_sha256": text_sha256,
        "config_sha256": loaded.config_sha256,
        "weights_sha256": loaded.weights_sha256,
        "tokenizer_sha256": loaded.tokenizer_sha256,
        "device": loaded.model.device.type,
        "sequences": [len(split.fit), len(split.choose), len(split.report)],
    }


def _statistics_bytes(logit_lens: LogitLens) -> int:
    """Two sums of squares for each of two roles, fp64."""
    return 2 * 2 * 8 * logit_lens.n_layers * logit_lens.d_model**2


def _check_folder(out: str, folder: Path) -> None:
    """Refuse a folder that no lens can have, or that holds anything that is not a lens's."""
    if folder.resolve().name in ("", PLAIN) or "," in folder.name or not out.strip():
        raise InputError(f"--out: expected a folder that --lens can name, without a comma and not {PLAIN}, got {out!r}")
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    foreign = [name for name in names if name not in OUTPUTS and not name.startswith(".")]
    if foreign or (folder.exists() and not folder.is_dir()):
        got = f"other files, such as {foreign[0]}" if foreign else "a file"
        raise InputError(f"--out {folder}: expected a new folder or that of a lens, got {got}")
