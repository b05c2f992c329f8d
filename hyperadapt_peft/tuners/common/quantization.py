"""The weight of a quantized layer, also where PEFT's backends would get it wrong."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Optional, cast

import torch
from peft.utils.quantization_utils import (
    Bnb8bitBackend,
    QuantizationBackend,
    TorchaoBackend,
    resolve_quantization_backend,
)
from torch import nn

from .base_weight import check_finite


if TYPE_CHECKING:
    from .layer import TargetLayer


class MergedQuantizedWeight:
    """What a layer has merged into a quantized weight.

    Backends replace the weight, or the layer, by new objects: the old ones stay valid and need no copy.
    """

    def __init__(self, layer: TargetLayer) -> None:
        self.base_layer = layer.get_base_layer()
        self.attributes = {**vars(self.base_layer), "_parameters": dict(self.base_layer._parameters)}
        if "state" in self.attributes:  # bitsandbytes 8 bit
            self.attributes["state"] = copy.copy(self.attributes["state"])
        weight: Any = getattr(self.base_layer, "weight", None)
        # PEFT's backend for bitsandbytes 4 bit changes the old weight's attributes on its way to the new one
        self.weight_attributes = dict(vars(weight)) if hasattr(weight, "quant_state") else None

    def unmerged(self, layer: TargetLayer) -> torch.Tensor:
        """Return the dequantized weight from before the layer's first merge."""
        stand_in = object.__new__(type(self.base_layer))
        stand_in.__dict__.update(self.attributes)
        return dequantized(cast(QuantizationBackend, layer.quantization_backend), stand_in)

    def write(self, layer: TargetLayer, adapter_names: list[str], check: bool = False) -> None:
        """Merge these adapters in the place of the layer's that are merged now, if any.

        Raises:
            ValueError: With `check`, if the weight would not be finite.
        """
        if not adapter_names:
            self.restore(layer)
            return
        before = self.unmerged(layer)
        merged = layer.adapted_weight(before, adapter_names).to(before.dtype)
        if check:
            check_finite(merged, adapter_names)
        try:
            layer.set_base_weight(merged)
        except Exception:
            self.restore(layer)
            raise

    def restore(self, layer: TargetLayer) -> None:
        """Put back what was before the layer's first merge."""
        vars(self.base_layer).clear()
        vars(self.base_layer).update(self.attributes)
        if self.weight_attributes is not None:
            vars(self.base_layer.weight).clear()
            vars(self.base_layer.weight).update(self.weight_attributes)
        if layer.get_base_layer() is not self.base_layer:  # a backend may replace the layer
            layer.base_layer = self.base_layer


def quantization_backend(layer: nn.Module, **kwargs: Any) -> Optional[QuantizationBackend]:
    """Return what handles the layer's quantized weight, or None if it is not quantized.

    `kwargs` are what PEFT's `get_quantization_kwargs` found on the model. Of weights that torchao's `quantize_` has
    quantized that is nothing: they cannot be quantized again, and not be merged into.
    """
    again = kwargs.get("get_apply_tensor_subclass")
    backend = resolve_quantization_backend(layer, get_apply_tensor_subclass=again or (lambda: None))
    if isinstance(backend, TorchaoBackend) and again is None:
        backend.supports_merge = False
    return backend


def dequantized(backend: QuantizationBackend, base_layer: nn.Module) -> torch.Tensor:
    """Return the weight of a quantized layer, which is left as it is."""
    weight: Any = getattr(base_layer, "weight", None)
    if isinstance(backend, Bnb8bitBackend):  # writes into the state
        stand_in: Any = SimpleNamespace(weight=weight, state=copy.copy(base_layer.state))
        return backend.get_base_weight(stand_in)
    if not is_packed(base_layer):
        return backend.get_base_weight(base_layer)
    from bitsandbytes import functional

    return functional.dequantize_4bit(*_unpacked(weight))


def is_packed(layer: nn.Module) -> bool:
    """Whether bitsandbytes has packed the layer's 4-bit weight anew.

    On CPUs with AVX512-BF16 it does so in the first forward pass in eval mode, for a kernel of its own that has no
    backward, and drops the block scales to bf16. Its dequantization does not know that layout and returns wrong values
    without an error, and what it unpacks itself, to save it, has its block scales in the wrong order.
    """
    return getattr(getattr(getattr(layer, "weight", None), "quant_state", None), "packing_format_for_cpu", False)


def unpack(layer: nn.Module) -> None:
    """Undo what bitsandbytes did to a packed 4-bit weight, up to the rounding of its block scales."""
    if is_packed(layer):
        weight: Any = layer.weight
        weight.data, weight.quant_state = _unpacked(weight)
        layer.quant_state = weight.quant_state


def _unpacked(weight: Any) -> tuple[torch.Tensor, Any]:
    from bitsandbytes import functional

    state = copy.copy(weight.quant_state)  # backward of earlier passes may need the old one
    state.original_nested = False  # the scales are not nested any more, and must not be rounded again
    data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
    state.absmax = state.absmax.T.reshape(-1).float()  # of blocks within rows; the inverse leaves them transposed
    return data, state
