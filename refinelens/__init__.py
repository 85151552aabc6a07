"""refinelens: how deep into a language model does an answer settle?

Public names are imported on first use, so that `refinelens --help` needs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fused_lens": "op.lens",
    "LensStats": "op.lens",
    "LayerNorm": "kernels.norms",
    "RMSNorm": "kernels.norms",
    "lens_top_k": "op.top_k",
    "TopK": "op.top_k",
    "kl_to_final": "op.kl",
    "LogitLens": "lenses.logit_lens",
    "Translators": "lenses.translators",
    "load_lens": "lenses.lens_files",
    "load_run": "runs.frames",
    "spearman": "op.rank_agreement",
    "kendall_tau_b": "op.rank_agreement",
    "top_k_overlap": "op.rank_agreement",
    "between_layers": "op.rank_agreement",
    "compare_runs": "report.run_agreement",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
