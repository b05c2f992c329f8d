"""Configuration of HyperAdapt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Optional, Union

import torch

from ...integrations.peft import add_peft_type
from ..common.config import TargetConfig, names_or_regex


@dataclass
class HyperAdaptConfig(TargetConfig):
    """Configuration of a [`HyperAdaptModel`]: `W' = A W B` with trained diagonal matrices A and B.

    Args:
        sides (`Literal["both", "row", "column"]`):
            Which scales are trained: of an n x m weight the n of its rows, the m of its columns, or (default) both.
        alpha (`float`):
            The factor of what is trained: a scale is `1 + alpha * d`, with d trained and saved. 10.0 by default. Adam's
            steps do not depend on a gradient's size, so the scales move by alpha times the learning rate.
        save_memory (`bool`):
            Whether training keeps the layers' inputs and outputs, which only the scales' own gradients need, in 8 bits
            (float8_e5m2). Default `False`. It changes neither outputs nor the gradients that flow on; those of the
            scales err by about 5 % of what they differ by from batch to batch. Where several adapters are used, all of
            them must ask for it. Under `torch.compile`, which decides itself what is kept, it changes nothing.
        target_parameters (`Optional[list[str]]`):
            The names, or their endings, of parameters to adapt that are not the weight of a supported layer, such as
            `"experts.gate_up_proj"`: matrices, or (E, n, m) of fused experts, which get scales for each expert. With
            `None`, the default, the weights of fused experts and of their routers are adapted where `target_modules`
            asks for them: by `None` or `"all-linear"`, or by the names that their linear layers had before transformers
            fused them (`"w1"`, `"w2"`, `"w3"`, `"gate_proj"`, ...). `[]` leaves them out. Where it names parameters and
            `target_modules` is `None`, only these are adapted.

    All other fields, and what is raised, are those of [`TargetConfig`]. Source: arXiv 2509.18629.
    """

    sides: Literal["both", "row", "column"] = "both"
    alpha: Union[float, int] = 10.0
    save_memory: bool = False
    target_parameters: Optional[list[str]] = None

    def __post_init__(self):
        self.peft_type = add_peft_type("HYPERADAPT")
        super().__post_init__()
        if not 0 < abs(self.alpha) <= torch.finfo(torch.float32).max:
            raise ValueError(f"`alpha` must be finite in fp32 and not 0, not {self.alpha!r}.")
        names_or_regex(self.target_parameters, "target_parameters")

    def _read_version(self, version: int) -> None:
        if version == 1:
            self.alpha = 1.0
