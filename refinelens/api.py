"""What the command line runs, as functions: a sweep, its contexts, the fit of a lens, the analysis of layers, a recipe.

Options are keywords and named as the fields of the configs in `refinelens.config`; they take Python's values and the
command line's words alike. Lines that the command line says on the way are warnings here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from .claims.conduct import run_recipe
from .config import EngineConfig, FitConfig, LayersConfig, RecipeConfig, SweepConfig, check_objective
from .errors import InputError
from .fitting.fit import Fitted, fit_lens
from .fitting.merge import merge_lenses as _merge_lenses
from .layers.analysis import run_layers
from .model_drift import Drift, run_drift
from .options import Config, options_of
from .progress import progress_bar
from .run_page import write_report_page
from .store.frames import LoadedLayers, LoadedRun
from .store.results import PAGE
from .sweeping.prompt_file import Prompts, write_prompts
from .sweeping.shards import merge_runs as _merge_runs
from .sweeping.sweep import resume_sweep, run_sweep
from .view_config import DriftConfig


def sweep(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    resume: str | Path | None = None,
    workers: int = 1,
    shard: str | None = None,
    progress: bool = False,
    **options: Any,
) -> LoadedRun:
    """Move the gold document through the context of every question and read every layer; ``refinelens sweep``.

    Args:
        model: ``smollm2`` (the default), ``tiny``, a hub name, a folder or a ``.gguf`` file.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.
        resume: Folder of an interrupted run to go on with instead, with its own options.
        workers: Processes that ask, a model in each; ``engine="ray"``, ``address`` and ``gpus_per_worker`` of
            `refinelens.config.EngineConfig` say who starts them.
        shard: ``"I/N"``: a part of the run, of N that several machines make side by side, for `merge_runs`.
        progress: Show a bar on a terminal or in a notebook.
        **options: Fields of `refinelens.config.SweepConfig`, such as ``documents=(5, 10)``, ``examples=8``,
            ``task="nq"``, ``lens=["plain", "lenses/mine"]``, ``top=(1, 5)``, ``dtype="bfloat16"``.

    Returns:
        LoadedRun: ``summary``, ``trajectories``, ``predictions`` and more as data frames.

    Raises:
        InputError: Input that does not fit, or an option that there is not.
        FaultError: Something broke; what was written stays, and ``resume`` goes on with it.
        KeyboardInterrupt: SIGINT or SIGTERM, once the current question is written.
    """
    engine, options = _engine(workers, options)
    with progress_bar(progress) as bar:
        if resume is not None:
            others = {"model": model, "out": out, "overwrite": overwrite or None, "shard": shard, **options}
            given = [name for name, value in others.items() if value is not None]
            if given:
                allowed = ", ".join(f"``{field.name}``" for field in fields(EngineConfig))
                raise InputError(
                    f"``resume``: expected no other option but {allowed}: the run has its own, got {', '.join(given)}"
                )
            return LoadedRun(resume_sweep(resume, engine=engine, progress=bar, warn=_warn))
        config = _config(SweepConfig, model=model, **options)
        return LoadedRun(run_sweep(config, _out(out), overwrite, None, engine, bar, warn=_warn, shard=shard))


def merge_runs(shards: Sequence[str | Path], *, out: str | Path | None = None, overwrite: bool = False) -> LoadedRun:
    """Make one run of all its shards, byte for byte the one that a single process makes; ``refinelens merge``.

    Args:
        shards: Folders that ``sweep(shard="I/N")`` made, every one of the N, in any order; they stay as they are.
        out: Folder of the run, made here.
        overwrite: Replace a run that is there.

    Raises:
        InputError: Shards that are missing, doubled, unfinished, damaged or of another run; names them.
    """
    shards = [shards] if isinstance(shards, str | Path) else shards
    return LoadedRun(_merge_runs(shards, _out(out), overwrite, None, _warn))


def prompts(model: str | Path | None = None, *, out: str | Path | None = None, **options: Any) -> Prompts:
    """Write the contexts of a sweep as token ids, for another engine to run; ``refinelens prompts``.

    What the engine writes is read by `sweep` with the same options and ``states``, the folder of its files.

    Args:
        model: As in `sweep`; its weights are not loaded.
        out: A new file, a JSON object a line, packed with gzip if its name ends in ``.gz``.
        **options: As of `sweep`; with ``states`` contexts that have a file there are left out.

    Returns:
        Prompts: how many ``contexts`` and ``tokens`` there are, and the ``longest``.

    Raises:
        InputError: Input that does not fit, an option that there is not, or an ``out`` that cannot be written.
        FaultError: No free disk.
    """
    return write_prompts(_config(SweepConfig, model=model, **options), _out(out, "file"))


def fit(
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> Fitted:
    """Fit a lens that sees what the plain logit lens cannot; ``refinelens fit``. A fit that was stopped goes on.

    Args:
        model: As in `sweep`.
        out: Folder of the lens, made here.
        overwrite: Replace a lens or a stopped fit that is there.
        progress: Show a bar on a terminal or in a notebook.
        **options: Fields of `refinelens.config.FitConfig`, such as ``text="notes.txt"``, ``tokens=20_000``,
            ``objective="kl"`` or ``"jacobian"``, ``prompts=100``.

    Returns:
        Fitted: its ``lens`` goes into `LogitLens.with_lens`, its ``path`` into ``sweep(lens=...)``.

    Raises:
        InputError: Input that does not fit, or an option that there is not.
        FaultError: No free disk or no memory; the same call goes on from the last checkpoint.
        KeyboardInterrupt: SIGINT or SIGTERM, after a checkpoint.
    """
    config = _config(FitConfig, model=model, **options)
    check_objective(options, config.objective)
    with progress_bar(progress) as bar:
        return fit_lens(config, _out(out), overwrite, None, bar)


def merge_lenses(lenses: Sequence[str | Path], *, out: str | Path | None = None, overwrite: bool = False) -> Fitted:
    """Average Jacobian lenses of one model, fitted to prompts of which none is in two; ``refinelens merge-lenses``.

    Args:
        lenses: Folders that `fit` made with ``objective="jacobian"``, two or more.
        out: Folder of the lens, made here.
        overwrite: Replace a lens that is there.

    Raises:
        InputError: Other lenses, another model or other layers, or prompts that two have in common.
    """
    return _merge_lenses([str(lens) for lens in lenses], _out(out), overwrite)


def essential_layers(
    run: LoadedRun | str | Path,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: bool = False,
    **options: Any,
) -> LoadedLayers:
    """Which layers are essential: by the lens, and by taking each of them away; ``refinelens layers``.

    Args:
        run: A finished run, or its folder. An analysis that was stopped goes on.
        out: Folder of the analysis, by default ``layers`` in the run's.
        overwrite: Replace an analysis that is there.
        progress: Show a bar on a terminal or in a notebook.
        **options: Fields of `refinelens.config.LayersConfig`, such as ``interventions=("skip", "attn")``,
            ``examples=10``.

    Raises:
        InputError: Input that does not fit, a model that is not the run's or cannot be intervened on.
        FaultError: Something broke; what was finished stays, and the same call goes on with it.
        KeyboardInterrupt: SIGINT or SIGTERM, once the current question is written.
    """
    path = run.run.path if isinstance(run, LoadedRun) else Path(run)
    config = _config(LayersConfig, **options)
    with progress_bar(progress) as bar:
        folder, _ = run_layers(path, config, out, overwrite, None, bar, _warn)
    return LoadedLayers(folder)


def recipe(
    name: str | Path,
    model: str | Path | None = None,
    *,
    out: str | Path | None = None,
    resume: bool = False,
    workers: int = 1,
    progress: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Test the claim of a paper by a recipe: fits, a sweep, a verdict; ``refinelens recipe``.

    Args:
        name: A recipe of the package, such as ``"inverted-u"``, or a TOML file.
        model: As in `sweep`.
        out: Folder of all that is made.
        resume: Go on with a recipe that was stopped there.
        workers: Processes of the sweep; ``engine="ray"`` and the like as in `sweep`.
        progress: Show a bar on a terminal or in a notebook.
        **options: Fields of `refinelens.config.RecipeConfig`, such as ``budget="30m"``.

    Returns:
        What ``claim.json`` holds: ``verdict``, ``estimate``, ``p``, ``n``, ``detectable``, ``sides``, ``secondary`` and
        what they rest on. ``load_run(out / "run")`` is the run.

    Raises:
        InputError: No such recipe, one that is not right, or a folder with something else in it.
        FaultError: Something broke; with ``resume`` it goes on.
        KeyboardInterrupt: SIGINT or SIGTERM, once the current step has written what it has.
    """
    engine, options = _engine(workers, options)
    config = _config(RecipeConfig, model=model, **options)
    with progress_bar(progress) as bar:
        claim, run = run_recipe(config, str(name), _out(out), resume, None, engine, bar, _warn)
    write_report_page([run], Path(_out(out)) / PAGE, claim)
    return claim


def drift(model: str | Path | None = None, *, progress: bool = False, **options: Any) -> Drift:
    """Compare two models layer by layer on a text, a quantised one with its original; ``refinelens drift``.

    Args:
        model: As in `sweep`: the one that may differ.
        progress: Show a bar on a terminal or in a notebook.
        **options: Fields of `refinelens.view_config.DriftConfig`, such as ``quantize="int8"`` or
            ``against="./original"``.

    Returns:
        Drift: Its ``layers`` by number, each by name, with ``to_frame``, ``to_csv`` and ``to_html``.

    Raises:
        InputError: Models that cannot be compared, or too short a text.
        FaultError: No memory for both.
    """
    config = _config(DriftConfig, model=model, **options)
    with progress_bar(progress) as bar:
        return run_drift(config, bar)


def _engine(workers: int, options: dict[str, Any]) -> tuple[EngineConfig, dict[str, Any]]:
    """Who asks, and the options that are left."""
    names = [field.name for field in fields(EngineConfig)]
    own = {name: value for name, value in options.items() if name in names}
    return EngineConfig(workers, **own), {name: value for name, value in options.items() if name not in own}


def _config(kind: type[Config], **options: Any) -> Any:
    known = [option.name for option in options_of(kind)]
    for name in options:
        if name not in known:
            raise InputError(f"``{name}``: expected one of {', '.join(known)}, got another option")
    return kind(**options)


def _out(out: str | Path | None, kind: str = "folder") -> str:
    if out is None:
        raise InputError(f"``out``: expected the {kind} to write, got none")
    return str(out)


def _warn(line: str) -> None:
    warnings.warn(line, stacklevel=2)
