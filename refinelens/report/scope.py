"""What all numbers of a run are about: a model that is quantised or split, a shard, some questions alone."""

from __future__ import annotations

from ..config import ANSWERED, EVERY_QUESTION, NEEDS_DOCUMENT
from .rows import counted

# Reasons to leave a question out, as the manifest has them behind each context size.
NOT_ANSWERED = "an answer that the model does not give after the gold document alone"
KNOWN = "an answer that the model gives without a document"
IN_WORDS = {
    ANSWERED: "whose first answer token is the model's own prediction after the gold document alone",
    NEEDS_DOCUMENT: "whose first answer token is the model's own prediction after the gold document alone, and is not "
    "without documents",
}


def scope_lines(manifest: dict) -> list[str]:
    """What all numbers of a run are about: how its model was run, and which questions were left out for what reason."""
    keep, counts, shard = manifest["arguments"].get("keep", EVERY_QUESTION), manifest["counts"], manifest.get("shard")
    lines, model = [], manifest["model"]
    if model.get("quantization"):
        lines.append(f"The model is quantised ({model['quantization']}): what it does is not what its original does.")
    if model.get("places"):
        difference = model["whole_difference"]
        held = "it was not held against the whole model"
        if difference is not None:
            held = f"in one piece it has the same states, to {difference:.2g} of the largest of a layer"
        lines.append(f"The model was split over {', '.join(sorted({*model['places'].values()}))}; {held}.")
    if shard:
        lines.append(
            f"This is shard {shard['index']} of {shard['of']}: {counts['questions']} of "
            f"{counted(shard['questions'], 'question')}; refinelens merge makes one run of all of them."
        )
    if keep == EVERY_QUESTION:
        return lines
    ids = {reason: set() for reason in (NOT_ANSWERED, KNOWN)}
    for key, own in counts["left_out"].items():
        for reason, found in ids.items():
            found.update(own if key.endswith(f": {reason}") else ())
    reasons = ", ".join(f"{len(found)} with {reason}" for reason, found in ids.items() if found)
    return [
        *lines,
        f"All numbers are about the questions {IN_WORDS[keep]}, and not about the task: of "
        f"{counted(counts.get('done', 0), 'question')} {sum(map(len, ids.values()))} were left out for that"
        f"{f' ({reasons})' if reasons else ''}.",
    ]
