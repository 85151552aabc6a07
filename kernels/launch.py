"""What the launchers of one call share: its options, and the rows of one chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .configs import LensConfig


@dataclass(frozen=True)
class LensOptions:
    """The operands and options of one call apart from its rows; see ``lens_triton.fused_lens_triton``."""

    unembedding: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    config: LensConfig

    @property
    def cap(self) -> float:
        """The softcap as a kernel's argument, which does not read it without one."""
        return float(self.softcap or 0.0)

    @property
    def interpreted(self) -> bool:
        """Whether kernels run in Triton's interpreter; a compile-time argument where the two differ."""
        return triton.knobs.runtime.interpret

    @property
    def is_plain(self) -> bool:
        """Whether a logit is nothing but its product."""
        return self.bias is None and self.softcap is None and self.logit_scale == 1.0

    def by_tma(self, targets: bool, same_bits: bool) -> bool:
        """Whether whole tiles go through the kernel of ``lens_tma``, which takes plain logits, rows that do not overlap
        and, with ``targets``, their logits with the bits of the main product.
        """
        can_read = self.is_plain and self.unembedding.stride(0) >= self.unembedding.shape[1]
        return self.config.kind == "tma" and can_read and (same_bits or not targets)

    def product_flags(self) -> dict:
        """Compile-time arguments of the kernels that form logits."""
        return dict(
            HAS_BIAS=self.bias is not None,
            HAS_SCALE=self.logit_scale != 1.0,
            # The interpreter multiplies bfloat16 wrongly; products of fp32 copies are the same numbers.
            UPCAST=self.interpreted,
            # "ieee" has no tensor core instruction; three tf32 products keep fp32's accuracy.
            PRECISION="tf32x3" if self.unembedding.dtype == torch.float32 else "tf32",
            BLOCK_K=self.config.block_k,
        )

    def row_flags(self, targets: bool) -> dict:
        """Compile-time arguments of the kernels that reduce logits."""
        return dict(HAS_TARGETS=targets, HAS_SOFTCAP=self.softcap is not None)


@dataclass(frozen=True)
class LensRows:
    """The rows of one chunk."""

    x_hat: Tensor  # [padded R, padded d_model], zeros in the padding
    targets: Tensor | None  # [R] int64
    target_z: Tensor | None  # [R] fp32, the targets' uncapped logits
    count: int  # R


def stride_of(vector: Tensor | None) -> int:
    """Stride of a vector that may be absent."""
    return 0 if vector is None else vector.stride(0)
