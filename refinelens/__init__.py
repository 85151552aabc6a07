"""refinelens: how deep into a language model does an answer settle?

Public names are imported on first use, so that `refinelens --help` needs no torch.
"""

from importlib import import_module

__version__ = "0.1.0"

_PUBLIC = {
    # The op.
    "fused_lens": "op.fused_lens",
    "LensHead": "kernels.reference",
    "LensStats": "kernels.reference",
    "LayerNorm": "kernels.reference",
    "RMSNorm": "kernels.reference",
    "kl_to_final": "op.vocabulary",
    "lens_top_k": "op.vocabulary",
    "TopK": "op.vocabulary",
    # A model, layer by layer.
    "load_model": "model.loading",
    "LogitLens": "lens.logit_lens",
    "LayerReading": "lens.reading",
    "Translators": "lens.translators",
    "load_lens": "lens.files",
    "trajectories": "store.trajectory",
    "Trajectories": "store.trajectory",
    # Experiments.
    "sweep": "api",
    "fit": "api",
    "essential_layers": "api",
    "load_run": "store.frames",
    "compare_runs": "report.agreement",
    # Agreement of ranks.
    "spearman": "op.ranks",
    "kendall_tau_b": "op.ranks",
    "top_k_overlap": "op.ranks",
    "between_layers": "op.ranks",
    # Errors.
    "InputError": "errors",
    "UnsupportedModelError": "errors",
    "FaultError": "errors",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name in _PUBLIC:
        return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
