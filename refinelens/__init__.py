"""refinelens: how deep into a language model does an answer settle?

Public names are imported on first use, so that `refinelens --help` needs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    "fused_lens": "op.fused_lens",
    "LensHead": "kernels.reference",
    "LensStats": "kernels.reference",
    "LayerNorm": "kernels.reference",
    "RMSNorm": "kernels.reference",
    "lens_top_k": "op.vocabulary",
    "TopK": "op.vocabulary",
    "kl_to_final": "op.vocabulary",
    "LogitLens": "lens.logit_lens",
    "Translators": "lens.translators",
    "load_lens": "lens.files",
    "load_run": "store.frames",
    "spearman": "op.ranks",
    "kendall_tau_b": "op.ranks",
    "top_k_overlap": "op.ranks",
    "between_layers": "op.ranks",
    "compare_runs": "report.agreement",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
