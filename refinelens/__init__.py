"""refinelens: how deep into a language model does an answer settle?

Public names are imported on first use, so that `refinelens --help` needs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fused_lens": "lens",
    "LensStats": "lens",
    "LayerNorm": "kernels.norms",
    "RMSNorm": "kernels.norms",
    "lens_top_k": "top_k",
    "TopK": "top_k",
    "kl_to_final": "kl",
    "LogitLens": "logit_lens",
    "Translators": "translators",
    "load_lens": "lens_files",
    "load_run": "frames",
    "spearman": "rank_agreement",
    "kendall_tau_b": "rank_agreement",
    "top_k_overlap": "rank_agreement",
    "between_layers": "rank_agreement",
    "compare_runs": "run_agreement",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
