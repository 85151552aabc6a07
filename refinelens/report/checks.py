"""What was checked before a run read anything, and where its states come from, in words."""

from __future__ import annotations

from .rows import counted


def parity_lines(manifest: dict) -> list[str]:
    """The lens at the last layer, held against the model; of a run that read files, what these were held against."""
    parity, n_layers = manifest["model"]["parity"], manifest["model"]["n_layers"]
    allowed = parity["tolerance"] * parity["logit_range"]
    found = f"largest difference {parity['max_difference']:.2g}, allowed {allowed:.2g}"
    if "states" not in manifest:
        return [f"Parity: the lens at layer {n_layers} equals the model's own logits: {found}, same predictions."]
    return [f"Parity: behind the first block the head gives the model's own logits: {found}.", states_line(manifest)]


def states_line(manifest: dict) -> str:
    """Whose states a run read, and whether they were held against the engine's own numbers."""
    entry, folder = manifest["states"], manifest["arguments"]["states"]
    files, own = counted(entry["files"], "file"), entry["with_logprobs"]
    held = (
        "they hold none of its log-probabilities, so that the last layer was not held against the engine"
        if not own
        else f"{own} with its log-probabilities, which the last layer was held against in every context that has them"
    )
    return f"States: of another engine, {', '.join(entry['dtypes'])}, {files} in {folder} when the run began; {held}."
