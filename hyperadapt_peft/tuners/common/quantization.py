"""The weight of a quantized layer, also where PEFT's backends would get it wrong."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from peft.utils.quantization_utils import Bnb8bitBackend, QuantizationBackend
from torch import nn


def dequantized(backend: QuantizationBackend, base_layer: nn.Module) -> torch.Tensor:
    """Return the weight of a quantized layer, which is left as it is.

    On CPUs with AVX512-BF16, bitsandbytes packs a 4-bit weight anew in the first forward pass in eval mode, for a
    kernel of its own, and drops the block scales to bf16. Its dequantization does not know that layout and returns
    wrong values without an error. Here the packed weight is unpacked first, in a copy.
    """
    weight: Any = getattr(base_layer, "weight", None)
    if isinstance(backend, Bnb8bitBackend):  # writes into the state
        stand_in: Any = SimpleNamespace(weight=weight, state=copy.copy(base_layer.state))
        return backend.get_base_weight(stand_in)
    if not getattr(getattr(weight, "quant_state", None), "packing_format_for_cpu", False):
        return backend.get_base_weight(base_layer)
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)
    state.original_nested = False  # the scales are not nested any more, and must not be rounded again
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()  # of blocks within rows; the inverse leaves them transposed
    return functional.dequantize_4bit(data, state)
