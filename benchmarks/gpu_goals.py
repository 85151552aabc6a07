"""Measurements on a GPU in the order in which they decide, then the goals: `python benchmarks/gpu_goals.py`.

Correctness first. Without a CUDA device every entry says "not measured" and the exit code is 0.
"""

import sys

import torch
from harness import NOT_MEASURED, Goal, goal_table

# By what `gpu_steps` calls the measurement.
GOALS = [
    Goal("llama-33x1024/B", "fused / B, D 4096, 33x1024", 1.12, 1.05),
    Goal("gpt2-13x1024/B", "fused / B, D 768, 13x1024", 1.05, 0.95),
    Goal("gpt2-13x16384/B", "fused / B, D 768, 13x16384", 1.05, 0.95),
    Goal("smollm2-31x1024/B", "fused / B, D 576, 31x1024", 1.15, 1.00),
    Goal("gpt2-13x1024/chunked", "chunked eager torch / fused, D 768", 3, 4, at_least=True),
    Goal("llama-33x1024/chunked", "chunked eager torch / fused, D 4096", 3, 4, at_least=True),
    Goal("gpt2-13x1024/naive", "naive torch / fused, D 768", 3, 5, at_least=True),
    Goal("llama-33x1024/naive", "naive torch / fused, D 4096", 1.5, 2, at_least=True),
    Goal("gpt2-13x1024/statistics", "rank + argmax + entropy / logsumexp only, D 768", 1.08, 1.03),
    Goal("llama-33x1024/statistics", "rank + argmax + entropy / logsumexp only, D 4096", 1.08, 1.03),
    Goal("memory", "extra memory at any row count", 64, 32, unit="MB"),
    Goal("gpt2-13x8/graphed", "GPT-2 13x8, graphed", 27, 22, unit="us"),
    Goal("llama-33x8", "Llama 33x8, graphed", 0.45, 0.40, unit="ms"),
    Goal("gpt2-13x1024/KL", "KL to the last layer / fused, D 768", 1.25, 0.40),
    Goal("gpt2-13x1024/KL, capped", "KL to the last layer with a softcap / fused, D 768", 2.30, 1.80),
    Goal("gpt2-13x1024/JSD", "Jensen-Shannon divergence / fused, D 768", 2.30, 2.00),
    Goal("gpt2-13x1024/list", "10 likeliest tokens alone / fused, D 768", 2.00, 1.50),
    Goal("gpt2-13x1024/with list", "fused with 10 likeliest tokens / fused, D 768", 2.00, 1.60),
    Goal("gpt2-13x1024/8 targets", "8 targets a row / fused, D 768", 1.10, None),
    Goal("llama-33x1024/KL", "KL to the last layer / fused, D 4096", 1.25, 0.20),
    Goal("llama-33x1024/with list", "fused with 10 likeliest tokens / fused, D 4096", 2.00, 1.30),
    Goal("llama-33x1024/8 targets", "8 targets a row / fused, D 4096", 1.10, None),
    Goal("places", "tokens of lists whose rank is not their place", 0, None),
    Goal("argmax", "argmaxes off fp64, more than those of bf16 logits", 0, None),
    Goal("rank0", "rows where rank 0 and argmax == target disagree", 0, None),
    Goal("bits", "kernels that give a target's logit other bits than its column", 0, None),
]


def main() -> int:
    measured: dict[str, float] = {}
    if torch.cuda.is_available():
        import gpu_steps  # needs a device

        measured = gpu_steps.run_all()
    else:
        print(f"no CUDA device: {NOT_MEASURED}\n")
    print(f"\n{goal_table(GOALS, measured)}")
    return 1 if measured.get("rank0") or measured.get("failed") else 0


if __name__ == "__main__":
    sys.exit(main())
