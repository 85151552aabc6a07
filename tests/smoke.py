"""That an installed refinelens works: `python tests/smoke.py`, of a wheel say, outside of the repository.

Checks that the extension was built, unless `--without-extension` says that there was no compiler, that the op agrees
with plain torch, and that a small sweep of the tiny model finishes.
"""

import argparse
import tempfile
from pathlib import Path

import torch

import refinelens
from refinelens.cli import main
from refinelens.op.backends import choose_backend


def check_op() -> None:
    """One call against the formulas."""
    hidden, unembedding = torch.randn(5, 3, 17), torch.randn(101, 17)
    logits = torch.nn.functional.layer_norm(hidden, (17,)) @ unembedding.T
    stats = refinelens.fused_lens(hidden, unembedding, norm=torch.nn.LayerNorm(17))
    torch.testing.assert_close(stats.logsumexp, logits.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(stats.argmax, logits.argmax(-1))


def check_sweep() -> None:
    """From questions to tables, by the model that comes with the package."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = ["sweep", "--model", "tiny", "--documents", "3", "--examples", "2", "--device", "cpu"]
        assert main([*command, "--out", str(out)]) == 0
        assert (out / "summary.csv").is_file()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Whether an installed refinelens works.")
    parser.add_argument("--without-extension", action="store_true", help="it was built without a compiler")
    wanted = "reference" if parser.parse_args().without_extension else "cpp"
    found, why = choose_backend("cpu")
    assert found == wanted, f"expected the backend {wanted}, got {found}: {why}"
    check_op()
    check_sweep()
    print(f"refinelens {refinelens.__version__} of {Path(refinelens.__file__).parent}: {found}, works")
