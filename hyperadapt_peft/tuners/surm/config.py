"""Configuration of SURM."""

from dataclasses import InitVar, dataclass
from typing import Literal, Optional, Union

import torch

from ...integrations.peft import add_peft_type
from ..common.config import TargetConfig


@dataclass
class SurmConfig(TargetConfig):
    """Configuration of a [`SurmModel`]: structured unrestricted-rank updates.

    Args:
        structure (`Literal["circulant", "toeplitz", "kronecker", "ldr"]`):
            The structure of the trained matrix; for a square weight of width n it has 2n parameters (circulant),
            2n (symmetric Toeplitz), the fewest a Kronecker product can have (default), or 2nr (LDR).
        placement (`Literal["parallel", "sequential"]`):
            `"parallel"` (default) to the layer, as LoRA: `W' = W + alpha dW`. `"sequential"`, as Houlsby's adapters:
            `Y = X + gelu(alpha X S) + b` after the layer, with X its output; it cannot be merged.
        r (`int`):
            The displacement rank of `structure="ldr"`, 1 by default; the other structures have none.
        symmetric (`bool`):
            Whether `structure="toeplitz"` uses symmetric matrices (default) or general ones of twice the size.
        alpha (`Optional[float]`):
            A plain factor of the update; it is not divided by `r`. B starts smaller by its root, so under Adam 4 times
            the `alpha` trains as twice the learning rate. `None`, the default, is 16 for circulant matrices and
            Kronecker products and 0.25 for the others, which makes LoRA's learning rates theirs.
        surm_dropout (`float`):
            The dropout probability of the update's input, 0.0 by default.

    `target_modules=None` means every linear layer but the output head for the parallel placement, and the outputs of
    attention and feed-forward blocks (Houlsby's sites) for the sequential one, by the names transformers gives them.

    All other fields, and what is raised, are those of [`TargetConfig`]. Source: arXiv 2406.17740.
    """

    structure: Literal["circulant", "toeplitz", "kronecker", "ldr"] = "kronecker"
    placement: Literal["parallel", "sequential"] = "parallel"
    r: int = 1
    symmetric: bool = True
    alpha: Union[float, int] = None  # type: ignore[assignment]  # the structure's, set below
    surm_dropout: Union[float, int] = 0.0
    place: InitVar[Optional[str]] = None  # `placement` in files of format 1

    def __post_init__(self, place):
        self.peft_type = add_peft_type("SURM")
        if place is not None:
            self.placement = {"lora": "parallel", "adapter": "sequential"}.get(place, place)
        if self.alpha is None:
            self.alpha = 16.0 if self.structure in ("circulant", "kronecker") else 0.25
        super().__post_init__()
        if self.r < 1:
            raise ValueError(f"`r` must be a positive integer, not {self.r!r}.")
        if self.r != 1 and self.structure != "ldr":
            raise ValueError(f"`r` is the displacement rank of structure='ldr'; {self.structure!r} has none.")
        if not abs(self.alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"`alpha` must be finite in fp32, not {self.alpha!r}.")
        if not 0 <= self.surm_dropout < 1:
            raise ValueError(f"`surm_dropout` must be in [0, 1), not {self.surm_dropout!r}.")
