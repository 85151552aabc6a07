"""A recipe: the claim of a paper, what is run to test it, and what is concluded, in one TOML file.

The primary analysis and its rule stand in the file before anything is run; every other reading is secondary, and
corrected together with the others.
"""

from __future__ import annotations

import hashlib
import math
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from ..config import FREQUENCY, PLAIN, PREDICTION, STATES, SUBLAYERS, FitConfig, LayersConfig, SweepConfig
from ..errors import InputError
from ..options import Config
from ..store.results import RECIPE_RUN
from .readings import CENSORED, STATISTICS, TARGETS, TOKENS, Reading
from .verdict import Rule

FOLDER = Path(__file__).parent / "recipes"
SECTIONS = ("claim", "source", "fixed", "note", "sweep", "lenses", "layers", "primary", "readings")
OF_THE_CALL = ("model", "device", "dtype", "trust_remote_code", "lens", "seed")  # options that no section has


@dataclass(frozen=True)
class Analysis:
    """What an analysis takes and gives; `claims.analyses` has what it does."""

    options: tuple[str, ...] = ()  # beside a reading and a rule
    measure: str | None = None  # that its sweep must have
    unit: str | None = None  # of its differences; None for that of the reading's statistic
    by_position: bool = False  # of gold positions, so that a curve over them says more
    tested: bool = True  # by a test; else its verdict follows from an interval, and there is no p to be corrected


ANALYSES = {
    "middle-above-ends": Analysis(by_position=True),
    "ends-above-middle": Analysis(by_position=True),
    "gain-and-cost": Analysis(options=("intervention", "threshold"), unit="", tested=False),
    "frequent-early": Analysis(measure=FREQUENCY, unit="share"),
    "later-half": Analysis(measure=SUBLAYERS, unit="share"),
    "known-before-told": Analysis(measure=STATES, unit="layers", tested=False),
}
CHOICES: dict[str, Sequence[str]] = {
    "statistic": STATISTICS,
    "target": TARGETS,
    "tokens": TOKENS,
    "censored": CENSORED,
}


@dataclass(frozen=True)
class Primary:
    """The one analysis that a verdict follows from."""

    analysis: str  # of `ANALYSES`
    reading: Reading
    rule: Rule
    options: dict[str, Any] = field(default_factory=dict)  # of the analysis alone


@dataclass(frozen=True)
class Recipe:
    """A recipe as its file has it, checked."""

    name: str
    text: str  # of the file
    claim: str
    source: str
    fixed: str  # the day on which the primary analysis was written down
    note: str
    sweep: dict[str, Any]  # fields of `SweepConfig`
    lenses: dict[str, dict[str, Any]]  # fields of `FitConfig` by the names of lenses
    layers: dict[str, Any] | None  # fields of `LayersConfig`; None for no analysis of layers
    primary: Primary
    readings: dict[str, list]  # dimensions of the secondary readings

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.text.encode()).hexdigest()


def built_in() -> list[str]:
    """Names of the recipes that come with the package."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def load_recipe(name: str) -> Recipe:
    """Read and check a recipe: one of `built_in`, or a file.

    Raises:
        InputError: No such recipe or file, or an entry that is missing, unknown or not as expected; file, key and what
            was expected are named.
    """
    path = FOLDER / f"{name}.toml" if name in built_in() else Path(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        words = ", ".join(built_in())
        raise InputError(f"{name}: expected a recipe, one of {words}, or a TOML file, got {error}") from None
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: expected TOML, got: {error}") from None
    return _Reader(path, table).recipe(text)


@dataclass(frozen=True)
class _Reader:
    """What checks the tables of one file."""

    path: Path
    table: dict[str, Any]

    def recipe(self, text: str) -> Recipe:
        for name in self.table:
            self.expect(name in SECTIONS, name, f"one of {', '.join(SECTIONS)}", "another entry")
        words = {name: self.entry(self.table, name, str, "a string") for name in ("claim", "source")}
        lenses = {name: self.options("lenses", FitConfig, own, name) for name, own in self.section("lenses").items()}
        for name in lenses:
            fits = re.fullmatch(r"[\w-]+", name) and name not in (PLAIN, RECIPE_RUN)
            expected = f"a name of letters, digits and -, not {PLAIN} or {RECIPE_RUN}"
            self.expect(fits, f"lenses.{name}", expected, repr(name))
        sweep = self.options("sweep", SweepConfig, self.section("sweep"))
        layers = self.options("layers", LayersConfig, self.section("layers")) if "layers" in self.table else None
        names = [PLAIN, *lenses]
        primary = self.primary(names)
        readings = self.readings(names)
        self.check_whole(sweep, layers, primary, readings)
        return Recipe(
            name=self.path.stem,
            text=text,
            **words,
            fixed=str(self.table.get("fixed", "")),
            note=str(self.table.get("note", "")),
            sweep=sweep,
            lenses=lenses,
            layers=layers,
            primary=primary,
            readings=readings,
        )

    def primary(self, lenses: list[str]) -> Primary:
        given = dict(self.section("primary"))
        analysis = given.pop("analysis", None)
        known = isinstance(analysis, str) and analysis in ANALYSES
        self.expect(known, "primary.analysis", f"one of {', '.join(ANALYSES)}", repr(analysis))
        rule = {name: self.number("primary", given, name) for name in ("alpha", "margin") if name in given}
        for name in rule:
            del given[name]
        self.expect(0 < rule.get("alpha", 0.05) < 1, "primary.alpha", "a number between 0 and 1", rule.get("alpha"))
        own = {name: given.pop(name) for name in ANALYSES[analysis].options if name in given}
        if "threshold" in own:
            own["threshold"] = self.number("primary", own, "threshold")
        known = [one.name for one in fields(Reading)]
        for name, value in given.items():
            kinds = (*known, "alpha", "margin", *ANALYSES[analysis].options)
            self.expect(name in known, f"primary.{name}", f"one of {', '.join(kinds)}", "another entry")
            self.of_reading(f"primary.{name}", name, value, lenses)
        return Primary(analysis, Reading(**given), Rule(**rule), own)

    def readings(self, lenses: list[str]) -> dict[str, list]:
        known = [one.name for one in fields(Reading)]
        found = self.section("readings")
        for name, values in found.items():
            key = f"readings.{name}"
            self.expect(name in known, key, f"one of {', '.join(known)}", "another entry")
            self.expect(isinstance(values, list) and values, key, "a list of values", repr(values))
            for value in values:
                self.of_reading(key, name, value, lenses)
        return found

    def check_whole(self, sweep: dict, layers: dict | None, primary: Primary, readings: dict[str, list]) -> None:
        """Refuse a recipe whose sweep has not what its analysis is about: before it is run, not hours later."""
        config, asked = SweepConfig(**sweep), {name: [value] for name, value in vars(primary.reading).items()}
        for section, values in (("primary", asked), ("readings", readings)):
            for size in values.get("documents", ()):
                sizes = ", ".join(map(str, config.documents))
                self.expect(size in config.documents, f"{section}.documents", f"one of the sweep's, {sizes}", size)
            if PREDICTION in values.get("target", ()):
                expected = f"{PREDICTION}, of which readings are"
                self.expect(PREDICTION in config.measures, "sweep.measures", expected, "none such")
            if "accuracy_generated" in values.get("statistic", ()):
                self.expect(config.generate, "sweep.generate", "a number of tokens, which are scored", config.generate)
        odd = layers is not None or primary.analysis == "known-before-told"
        self.expect(not (odd and config.n_decoys), "sweep.decoys", "none beside this analysis", config.n_decoys)
        kind = ANALYSES[primary.analysis]
        fits = kind.measure is None or kind.measure in config.measures
        self.expect(fits, "sweep.measures", f"{kind.measure}, which {primary.analysis} is about", "none such")
        if primary.analysis == "gain-and-cost":
            done = LayersConfig(**layers).ablations if layers is not None else ()
            wanted = primary.options.get("intervention", "skip")
            names = ", ".join(done) or "none"
            self.expect(wanted in done, "layers.interventions", f"{wanted}, whose cost is compared", names)
        none = f"none beside {primary.analysis}, whose verdict follows from an interval and has no p to be corrected"
        self.expect(kind.tested or not readings, "readings", none, "some")

    def of_reading(self, key: str, name: str, value: Any, lenses: list[str]) -> None:
        if name in ("documents", "top"):
            self.expect(type(value) is int and value >= 1, key, "a number of 1 or more", repr(value))
        else:
            choices = lenses if name == "lens" else CHOICES[name]
            self.expect(value in choices, key, f"one of {', '.join(choices)}", repr(value))

    def options(self, section: str, kind: type[Config], given: Any, name: str = "") -> dict[str, Any]:
        """Fields of a config, read once so that they are known to fit; those of the call are not among them."""
        where = f"{section}.{name}" if name else section
        self.expect(isinstance(given, dict), where, "a table", repr(given))
        known = [one.name for one in fields(kind) if one.name not in OF_THE_CALL]
        for option in given:
            self.expect(option in known, f"{where}.{option}", f"one of {', '.join(known)}", "another entry")
        try:
            kind(**given)
        except InputError as error:
            raise InputError(f"{self.path}: [{where}] {error}") from None
        return given

    def section(self, name: str) -> dict[str, Any]:
        found = self.table.get(name, {})
        self.expect(isinstance(found, dict), name, "a table", repr(found))
        return found

    def entry(self, table: dict[str, Any], name: str, kind: type, expected: str) -> Any:
        self.expect(isinstance(table.get(name), kind), name, expected, repr(table.get(name)))
        return table[name]

    def number(self, section: str, table: dict[str, Any], name: str) -> float:
        value = table[name]
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        self.expect(fits and (name != "margin" or value >= 0), f"{section}.{name}", "a number", repr(value))
        return float(value)

    def expect(self, fits: object, key: str, expected: str, got: object) -> None:
        if not fits:
            raise InputError(f"{self.path}: [{key}] expected {expected}, got {got}")
