"""The verdict on a claim in words, from ``claim.json`` of a recipe."""

from __future__ import annotations

from typing import Any

from .rows import counted


def claim_lines(claim: dict[str, Any]) -> list[str]:
    """What was asked, the verdict, what it rests on, and how many other readings agree."""
    lines = [
        f"Claim: {claim['claim']} ({claim['source']})",
        f"Verdict: {claim['verdict'].upper()}. {claim['reason'][:1].upper()}{claim['reason'][1:]}.",
    ]
    for side in claim["sides"]:
        p = "" if side["p"] is None else f"; p = {side['p']:.3f}"
        power = "" if side["detectable"] is None else f"; with 80 % power {side['detectable']:.2f} would have shown"
        lines.append(
            f"  {side['name']}: {_estimate(side['difference'])} ({counted(side['questions'], 'question')}{p}{power})"
        )
    others = claim["secondary"]
    if others:
        supporting = sum(other["supported"] for other in others)
        lines.append(f"Other readings: {supporting} of {len(others)} support it after correction (Holm).")
    left_out = sum(claim["left_out"].values())
    lines.append(
        f"{claim['model']['name']} on {claim['task']['name']}, {counted(claim['questions_asked'], 'question')} drawn"
        f"{f', {left_out} left out, by context size' if left_out else ''}; primary analysis fixed {claim['fixed']}."
    )
    return lines


def _estimate(entry: dict[str, float | None]) -> str:
    if entry["value"] is None:
        return "-"
    interval = "" if entry["low"] is None else f" [{entry['low']:.2f}, {entry['high']:.2f}]"
    return f"{entry['value']:+.2f}{interval}"
