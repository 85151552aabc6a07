"""refinelens: how deep into a language model does an answer settle?

Public names are imported on first use, so that `refinelens --help` needs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .machine import __version__

if TYPE_CHECKING:
    from .api import drift, essential_layers, fit, merge_lenses, merge_runs, prompts, recipe, sweep
    from .data.convert import convert
    from .errors import FaultError, InputError, UnsupportedModelError
    from .kernels.reference import LayerNorm, LensHead, LensStats, RMSNorm
    from .layers.sublayers import SublayerReading, read_sublayers
    from .lens.files import load_lens
    from .lens.logit_lens import LogitLens
    from .lens.reading import LayerReading
    from .lens.translators import Translators
    from .model.loading import load_model
    from .op.divergences import jsd_to_final, kl_to_final
    from .op.fused_lens import fused_lens
    from .op.lens_kl import lens_kl
    from .op.ranks import between_layers, kendall_tau_b, spearman, top_k_overlap
    from .op.vocabulary import TopK, lens_top_k
    from .report.agreement import compare_runs
    from .store.frames import LoadedLayers, LoadedRun, load_run
    from .store.trajectory import Trajectories, trajectories


_PUBLIC = {
    # The op.
    "fused_lens": "op.fused_lens",
    "LensHead": "kernels.reference",
    "LensStats": "kernels.reference",
    "LayerNorm": "kernels.reference",
    "RMSNorm": "kernels.reference",
    "kl_to_final": "op.divergences",
    "jsd_to_final": "op.divergences",
    "lens_kl": "op.lens_kl",
    "lens_top_k": "op.vocabulary",
    "TopK": "op.vocabulary",
    # A model, layer by layer.
    "load_model": "model.loading",
    "LogitLens": "lens.logit_lens",
    "LayerReading": "lens.reading",
    "Translators": "lens.translators",
    "load_lens": "lens.files",
    "read_sublayers": "layers.sublayers",
    "SublayerReading": "layers.sublayers",
    "trajectories": "store.trajectory",
    "Trajectories": "store.trajectory",
    # Experiments.
    "sweep": "api",
    "prompts": "api",
    "fit": "api",
    "merge_runs": "api",
    "merge_lenses": "api",
    "essential_layers": "api",
    "recipe": "api",
    "drift": "api",
    "convert": "data.convert",
    "load_run": "store.frames",
    "LoadedRun": "store.frames",
    "LoadedLayers": "store.frames",
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
# Written out, so that editors and type checkers know the names without running this.
__all__ = [
    "fused_lens",
    "LensHead",
    "LensStats",
    "LayerNorm",
    "RMSNorm",
    "kl_to_final",
    "jsd_to_final",
    "lens_kl",
    "lens_top_k",
    "TopK",
    "load_model",
    "LogitLens",
    "LayerReading",
    "Translators",
    "load_lens",
    "read_sublayers",
    "SublayerReading",
    "trajectories",
    "Trajectories",
    "sweep",
    "prompts",
    "fit",
    "merge_runs",
    "merge_lenses",
    "essential_layers",
    "recipe",
    "drift",
    "convert",
    "load_run",
    "LoadedRun",
    "LoadedLayers",
    "compare_runs",
    "spearman",
    "kendall_tau_b",
    "top_k_overlap",
    "between_layers",
    "InputError",
    "UnsupportedModelError",
    "FaultError",
    "__version__",
]


if not TYPE_CHECKING:  # to type checkers a name that is not imported above is an error

    def __getattr__(name: str):
        if name in _PUBLIC:
            return getattr(import_module(f".{_PUBLIC[name]}", __name__), name)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
