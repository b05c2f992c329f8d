"""Configuration of HyperAdapt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from ..base.config import TargetConfig, one_of
from ..registration import add_peft_type


@dataclass
class HyperAdaptConfig(TargetConfig):
    """Configuration of a [`HyperAdaptModel`]: `W' = A W B` with trained diagonal matrices A and B.

    Args:
        sides (`Literal["both", "row", "column"]`):
            Which scales are trained: of an n x m weight the n of its rows, the m of its columns, or (default) both.
        save_memory (`bool`):
            Whether training keeps nothing for the scales but each layer's input, and computes each base layer a second
            time in the backward pass. Default `False`. It changes neither outputs nor what is saved.

    All other fields, and what is raised, are those of [`TargetConfig`]. Source: arXiv 2509.18629.
    """

    sides: Literal["both", "row", "column"] = field(
        default="both",
        metadata={"help": "Train the scales of the weight's rows, of its columns, or of both."},
    )
    save_memory: bool = field(
        default=False,
        metadata={"help": "Keep less for the backward pass and compute the base layers twice instead."},
    )

    def __post_init__(self):
        self.peft_type = add_peft_type("HYPERADAPT")
        super().__post_init__()
        one_of(self.sides, "sides", ("both", "row", "column"))
        one_of(self.save_memory, "save_memory", (True, False))
