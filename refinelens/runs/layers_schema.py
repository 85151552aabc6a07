"""The rows of an analysis: one per example, layer and intervention."""

from __future__ import annotations

import pyarrow as pa

CONTROL = "control"  # an intervention that has no effect but rounding
RESTORE, DESTROY = "restore", "destroy"  # patches, from where the model succeeds and from where it fails
# Layer i is struck at its block, the i-th, counted from 1. Changes are the value under the intervention less the clean
# one. First-correct, settle and depth are of what remains: layers below the struck one are those of the clean run.
LAYER_ROWS = pa.schema(
    [
        ("question_id", pa.int64()),
        ("documents", pa.int32()),
        ("gold_position", pa.int32()),
        ("intervention", pa.string()),  # skip, mean, attn, mlp, restore, destroy, control
        ("at", pa.string()),  # all, or answer: the token that the answer follows
        ("layer", pa.int32()),  # 1 .. n_layers
        ("source_position", pa.int32()),  # of patches: gold position of the run that the state is from
        ("lens", pa.string()),
        ("target_id", pa.int64()),
        ("target_logprob", pa.float32()),  # nats, at the output
        ("target_rank", pa.int64()),  # 0-based, at the output
        ("correct", pa.bool_()),
        ("first_correct", pa.int32()),  # null where there is none, and of patches
        ("settle", pa.int32()),
        ("depth", pa.int32()),
        ("logprob_change", pa.float32()),
        ("rank_change", pa.int64()),
        ("correct_change", pa.int32()),  # -1, 0 or 1
        ("first_correct_change", pa.int32()),  # null where either does not exist
        ("settle_change", pa.int32()),
        ("depth_change", pa.int32()),
    ]
)
KEYS = ("question_id", "documents", "gold_position")
