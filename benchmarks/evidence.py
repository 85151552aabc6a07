"""The table, the figure and the CSV files of docs/evidence.md, from the claims of recipes.

    python benchmarks/evidence.py FOLDER... --out docs/evidence

Each FOLDER is that of a recipe. Prints a row for each claim, and writes of each ``NAME.csv``, every reading with its
smallest difference, and ``positions.csv``, the primary curve; and ``evidence.png``, a panel for each claim: the primary
reading by gold position, and all readings by their smallest difference.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

from matplotlib.figure import Figure

READING = ("statistic", "lens", "documents", "top", "target", "tokens", "censored")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    claims = {folder.name: json.loads((folder / "claim.json").read_text()) for folder in options.folders}
    print("| recipe | model, task | n | smallest difference | detectable | verdict | readings that support it |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, claim in claims.items():
        supporting = sum(one["supported"] for one in claim["secondary"])
        others = f"{supporting} of {len(claim['secondary'])}" if claim["secondary"] else "-"
        where = f"{claim['model']['name']}, {claim['task']['name']}"
        numbers = (str(claim["n"]), words(claim["estimate"]), number(claim["detectable"]))
        print(f"| {' | '.join((name, where, *numbers, claim['verdict'], others))} |")
        write_readings(options.out / f"{name}.csv", claim)
    write_positions(options.out / "positions.csv", claims)
    draw({name: claim for name, claim in claims.items() if claim["positions"]}, options.out / "evidence.png")


def words(estimate: dict) -> str:
    if estimate["value"] is None:
        return "-"
    interval = "" if estimate["low"] is None else f" [{estimate['low']:.2f}, {estimate['high']:.2f}]"
    return f"{estimate['value']:+.2f}{interval}"


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def write_readings(path: Path, claim: dict) -> None:
    """The primary reading first, then every other."""
    primary = claim["reading"] | {"n": claim["n"], "estimate": claim["estimate"], "p": claim["p"], "p_holm": None}
    primary |= {"supported": claim["verdict"] == "supported"}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*READING, "n", "difference", "low", "high", "p", "p_holm", "supported"])
        for one in (primary, *claim["secondary"]):
            values = [one["n"], *(one["estimate"][name] for name in ("value", "low", "high"))]
            writer.writerow([*(one[name] for name in READING), *values, one["p"], one["p_holm"], one["supported"]])


def write_positions(path: Path, claims: dict[str, dict]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["recipe", "gold_position", "questions", "value", "low", "high"])
        for name, claim in claims.items():
            writer.writerows([name, *one.values()] for one in claim["positions"])


def draw(claims: dict[str, dict], path: Path) -> None:
    figure = Figure(figsize=(4.2 * len(claims), 6.4), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.1)
    panels = figure.subplots(2, len(claims), squeeze=False)
    for (name, claim), above, below in zip(claims.items(), *panels, strict=True):
        points = [one for one in claim["positions"] if one["value"] is not None]
        x, y = ([one[key] for one in points] for key in ("gold_position", "value"))
        above.plot(x, y, color="#0072b2", marker="o")
        for one in points:
            if one["low"] is not None:
                above.plot([one["gold_position"]] * 2, [one["low"], one["high"]], color="#0072b2", linewidth=1.2)
        above.set_title(f"{name}: {claim['verdict']}\n{claim['model']['name']}, n = {claim['n']}", fontsize=10)
        unit = "share" if claim["reading"]["statistic"].startswith("accuracy") else "layers"
        above.set_xlabel(f"gold position of {claim['reading']['documents']} documents")
        above.set_ylabel(f"{claim['reading']['statistic'].replace('_', ' ')} ({unit})")
        readings = sorted((one for one in claim["secondary"] if one["estimate"]["value"] is not None), key=value_of)
        for supported, colour in ((False, "#0072b2"), (True, "#d55e00")):
            own = [(i, one["estimate"]) for i, one in enumerate(readings) if one["supported"] == supported]
            label = "supports the claim" if supported else "does not"
            below.scatter([i for i, _ in own], [one["value"] for _, one in own], s=8, color=colour, label=label)
            for i, one in own:
                if one["low"] is not None:
                    below.plot([i, i], [one["low"], one["high"]], color=colour, linewidth=0.7)
        below.axhline(0.0, color="0.6", linewidth=0.8)
        below.set_xlabel(f"{len(readings)} other readings, in order")
        below.set_ylabel(f"smallest difference ({unit})")
        below.legend(fontsize=8)
    figure.savefig(path, dpi=130)


def value_of(reading: dict) -> float:
    return reading["estimate"]["value"]


if __name__ == "__main__":
    main()
