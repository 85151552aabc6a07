"""A recipe is run: lenses, a sweep, perhaps an analysis of layers, then the verdict; stopped at any point, and gone on.

Each step is a folder of its own kind in the recipe's, which goes on as it would by itself. How many questions are asked
is written down before the sweep begins, so that a recipe that goes on comes to the same end.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..config import ONE_PROCESS, PLAIN, EngineConfig, FitConfig, LayersConfig, RecipeConfig, SweepConfig
from ..data.generated import GENERATORS
from ..data.tasks import load_task
from ..errors import InputError
from ..fitting.fit import LensFolder, fit_lens
from ..layers.analysis import run_layers
from ..machine import packages
from ..model.loading import load_model
from ..progress import Progress, unseen
from ..report.rows import lens_names
from ..store.files import write_whole
from ..store.layers import LayersFolder
from ..store.results import LAYERS, RECIPE, RECIPE_RUN, Run
from ..sweeping.inputs import SweepInputs
from ..sweeping.predict import questions_together
from ..sweeping.sweep import check_one_process, resume_sweep, run_sweep
from .analyses import analyse, read_evidence, secondary
from .recipe import ANALYSES, Recipe, load_recipe

CLAIM = "claim.json"  # of a recipe's folder, beside its plan and its run
TIMED = 3  # questions of a timed start
SHARE = 0.9  # of what is left of a budget that the sweep is planned to take
DECIDING = ("quantize", "revision", "subfolder")  # how a model is loaded, beside device and dtype
UNITS = {"s": 1, "m": 60, "h": 3600}


@dataclass(frozen=True)
class Plan:
    """What a recipe's folder was begun with, and how many questions its sweep asks."""

    recipe: str
    sha256: str  # of the recipe's file
    model: str
    device: str
    dtype: str
    examples: int | None  # questions, None for all; chosen once the lenses are there
    chosen: bool = False  # whether that is decided
    quantize: str | None = None
    revision: str | None = None
    subfolder: str | None = None

    def write(self, folder: Path) -> None:
        """Into a recipe's folder."""
        write_whole(folder / RECIPE, lambda path: path.write_text(json.dumps(asdict(self), indent=1) + "\n"))


def seconds_of(budget: str) -> float:
    """Of ``90s``, ``30m``, ``2h``.

    Raises:
        InputError: Something else.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", budget.strip())
    if not found or not float(found[1]):
        raise InputError(f"``budget``: expected a time such as 90s, 30m or 2h, got {budget!r}")
    return float(found[1]) * UNITS[found[2]]


def run_recipe(
    options: RecipeConfig,
    name: str,
    out: str | Path,
    resume: bool = False,
    argv: list[str] | None = None,
    engine: EngineConfig = ONE_PROCESS,
    progress: Progress = unseen,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[dict[str, Any], Run]:
    """Run a recipe, or go on with one that was stopped, and write ``claim.json`` into its folder.

    Args:
        options: Model, device and budget.
        name: A built-in recipe, or a TOML file.
        out: Folder, made here.
        resume: Whether to go on with what is there.
        argv: Command line, for the manifests.
        engine: Who asks the questions of the sweep.
        progress: Of each step.
        say: Called with a line when a step begins.

    Returns:
        The claim as `claim_of` gives it, and the run.

    Raises:
        InputError: A recipe that is not right, or a folder with something else in it.
        FaultError: Something broke; with ``resume`` the recipe goes on.
        Interrupted: As of the step under way.
    """
    check_one_process(options, engine)
    recipe, folder, begun = load_recipe(name), Path(out), time.monotonic()
    budget = None if options.budget is None else seconds_of(options.budget)
    if not resume:
        _check_inputs(recipe, options)
    plan = _plan(recipe, options, folder, resume)
    lenses = [PLAIN]
    common = {"model": options.model, **options.loading}  # what decides of it is the plan's
    for lens, given in recipe.lenses.items():
        path = folder / lens
        lenses.append(str(path))
        if not LensFolder(path).exists:
            say(f"lens {lens}")
            fit_lens(FitConfig(**common, **given), str(path), False, argv, progress)
    config = SweepConfig(**common, **recipe.sweep, lens=lenses)
    if not plan.chosen:
        if budget is not None:
            say("a timed start")
            left = budget - (time.monotonic() - begun)
            config = replace(config, examples=_affordable(config, left, say))
        plan = replace(plan, examples=config.examples, chosen=True)
        plan.write(folder)
    config = replace(config, examples=plan.examples)
    run = Run(folder / RECIPE_RUN)
    if not run.exists:
        say("sweep")
        run_sweep(config, run.path, False, argv, engine, progress, warn=say)
    elif not run.is_finished:
        say("sweep, gone on with")
        resume_sweep(run.path, argv=argv, engine=engine, progress=progress, warn=say)
    if recipe.layers is not None and not _is_finished(LayersFolder(run.path / LAYERS)):
        say("layers")
        layers = LayersConfig(**recipe.layers, lens=recipe.primary.reading.lens)
        run_layers(run.path, layers, None, False, argv, progress, say)
    say("verdict")
    claim = claim_of(recipe, run, progress)
    text = json.dumps(claim, indent=1, ensure_ascii=False) + "\n"
    write_whole(folder / CLAIM, lambda path: path.write_text(text, encoding="utf-8"))
    return claim, run


def _check_inputs(recipe: Recipe, options: RecipeConfig) -> None:
    """Refuse a task or a model that is not there before anything is written.

    Raises:
        InputError: Which, and what was expected.
    """
    config = SweepConfig(options.model, **recipe.sweep)
    if config.task not in GENERATORS:
        load_task(config.task)
    load_model(options.model, **options.loading)


def _plan(recipe: Recipe, options: RecipeConfig, folder: Path, resume: bool) -> Plan:
    """What is there, held to what is asked for, or a new plan, written."""
    asked = Plan(
        *(recipe.name, recipe.sha256, options.model, options.device, options.dtype, recipe.sweep.get("examples")),
        **{name: options.loading[name] for name in DECIDING},
    )
    path = folder / RECIPE
    if not path.exists():
        if resume:
            raise InputError(f"``resume``: expected the folder of a recipe, got {folder} without {RECIPE}")
        if folder.exists() and any(folder.iterdir()):
            raise InputError(f"``out`` {folder}: expected a new folder, got one that holds something; choose another")
        folder.mkdir(parents=True, exist_ok=True)
        asked.write(folder)
        return asked
    if not resume:
        raise InputError(
            f"``out`` {folder}: expected a new folder, got one with a recipe; choose another or pass ``resume=True``"
        )
    try:
        there = Plan(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        raise InputError(f"{path}: expected what a recipe wrote there, got something else; bring it back") from None
    for field in ("recipe", "sha256", "model", "device", "dtype", *DECIDING):
        wanted, got = getattr(there, field), getattr(asked, field)
        if wanted != got:
            raise InputError(f"``out`` {folder}: expected a recipe begun with {field} {got}, got {wanted}")
    return there


def _affordable(config: SweepConfig, seconds: float, say: Callable[[str], None]) -> int | None:
    """How many questions a sweep can ask in so many seconds, at most those of the recipe; from a timed start.

    Raises:
        InputError: Not one.
    """
    inputs = SweepInputs.load(config)
    together = questions_together(config, inputs.loaded.model.device.type)
    places = list(range(min(len(inputs.questions), max(TIMED, together))))
    begun = time.monotonic()
    for _ in inputs.ask(places, lambda: False):
        pass
    each = (time.monotonic() - begun) / len(places)
    most = len(inputs.questions)
    found = min(most, int(SHARE * (seconds - each * len(places)) / each))
    if found < 1:
        raise InputError(
            f"``budget``: expected time for one question or more, which takes {each:.0f} s, got "
            f"{max(0.0, seconds):.0f} s after the lenses; allow more"
        )
    say(f"{each:.1f} s a question: {found} of {most}")
    return found


def _is_finished(folder: LayersFolder) -> bool:
    return folder.exists and folder.manifest["status"] == "finished"


def claim_of(recipe: Recipe, run: Run, progress: Progress = unseen) -> dict[str, Any]:
    """The verdict on a recipe's claim from a finished run, as JSON holds it; nothing in it depends on when it was made.

    Args:
        recipe: The recipe.
        run: Of its sweep.
        progress: Told of the secondary readings.
    """
    manifest, primary = run.manifest, recipe.primary
    evidence = read_evidence(run)
    finding = analyse(evidence, primary, primary.reading)
    others = secondary(evidence, primary, recipe.readings, progress)
    kind, left_out = ANALYSES[primary.analysis], manifest["counts"]["left_out"]
    unit_read = "share" if primary.reading.statistic.startswith("accuracy") else "layers"
    return {
        "recipe": recipe.name,
        "recipe_sha256": recipe.sha256,
        "claim": recipe.claim,
        "source": recipe.source,
        "fixed": recipe.fixed,
        "note": recipe.note,
        "analysis": primary.analysis,
        "reading": asdict(primary.reading),
        "rule": asdict(primary.rule) | primary.options,
        **finding.entry(),
        "unit": unit_read if kind.unit is None else kind.unit,
        "positions": evidence.curve(primary.reading) if kind.by_position else [],
        "secondary": others,
        "questions_asked": manifest["counts"]["questions"],
        "left_out": {reason: len(ids) for reason, ids in left_out.items()},
        "model": {name: manifest["model"][name] for name in ("name", "weights_sha256", "dtype", "n_layers")},
        "task": {name: manifest["task"][name] for name in ("name", "sha256")},
        "lenses": list(lens_names(manifest)),
        "sweep": {name: value for name, value in manifest["arguments"].items() if name not in ("lens", "model")},
        "versions": packages(),
    }
