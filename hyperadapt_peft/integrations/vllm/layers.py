"""vLLM's linear layers with the scales of each token's adapter."""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import nn
from vllm.lora.layers import (
    ColumnParallelLinearWithLoRA,
    MergedColumnParallelLinearVariableSliceWithLoRA,
    MergedColumnParallelLinearWithLoRA,
    MergedQKVParallelLinearWithLoRA,
    QKVParallelLinearWithLoRA,
    ReplicatedLinearWithLoRA,
    RowParallelLinearWithLoRA,
)
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    UnquantizedLinearMethod,
)


# Exactly these: a sub-class may compute its product in a way of its own.
BASE_LAYERS = (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)

# Multi-head latent attention takes its weight into the attention and does not call it.
UNCALLED = "kv_b_proj"


class HyperAdaptMixin:
    """`y = a (W (b x)) + bias` with the scales a (n) and b (m) of each token's adapter, over a layer of vLLM's LoRA.

    vLLM fills and frees the slots: at rank 1, LoRA's A (1 x m) has the place of the offsets of b from 1, LoRA's B
    (n x 1) that of the offsets of a, and zeros are the identity. Before vLLM's slots there is one that stays zero, for
    tokens without an adapter, whose slot is -1. A layer that holds several matrices, such as
    query, key and value, has a slice for each, with b of its own.
    """

    base_layer: Any
    device: torch.device
    input_size: int
    output_size: int
    output_slices: tuple[int, ...]
    n_slices: int
    punica_wrapper: Any

    def create_lora_weights(self, max_loras: int, lora_config: Any, model_config: Any = None) -> None:
        options = {"dtype": lora_config.lora_dtype, "device": self.device}
        self.sizes = self.output_slices if self.n_slices > 1 else (self.output_size,)
        self.columns = torch.zeros(self.n_slices, max_loras + 1, self.input_size, **options)
        self.rows = torch.zeros(max_loras + 1, sum(self.sizes), **options)
        # the same memory in the shapes in which vLLM fills it
        self.lora_a_stacked = tuple(self.columns[:, 1:, None, None, :])
        self.lora_b_stacked = tuple(rows[1:, None, :, None] for rows in self.rows.split(self.sizes, dim=1))
        self.slices = self._split() if self.n_slices > 1 else None

    def _split(self) -> Optional[nn.ModuleList]:
        """Return each slice of the weight as a layer, or None of a quantized weight."""
        method = self.base_layer.quant_method
        if type(method) is not UnquantizedLinearMethod:
            return None
        weight = self.base_layer.weight
        if weight.numel() == 0:  # packed by vLLM for a CPU's kernels, so read back and packed again by slices
            inputs = torch.eye(self.input_size, dtype=weight.dtype)
            weight = method.apply(self.base_layer, inputs).t().contiguous()
            del self.base_layer.cpu_linear
        slices = nn.ModuleList()
        for part in weight.split(self.sizes):
            layer = nn.Module()
            layer.weight = nn.Parameter(part, requires_grad=False)
            method.process_weights_after_loading(layer)
            slices.append(layer)
        return slices

    def apply(self, x: torch.Tensor, bias: Optional[torch.Tensor] = None) -> torch.Tensor:
        if x.dim() > 2 and x.shape[0] != 1:  # (1, tokens, columns) by vLLM's Transformers backend
            raise NotImplementedError(
                f"HyperAdapt adapters cannot be served on this model: the input of {self.base_layer.prefix} has the "
                f"shape {tuple(x.shape)}, in which its rows cannot be told to be a batch's tokens."
            )
        tokens = x.flatten(0, -2)
        slots = self.punica_wrapper._token_lora_indices[: len(tokens)] + 1
        # (slices, tokens, columns); indexing by brackets takes 10 times as long on CPUs
        inputs = torch.addcmul(tokens, tokens, self.columns.index_select(1, slots))
        outputs = self._products(inputs)
        outputs.addcmul_(outputs, self.rows.index_select(0, slots))
        if bias is not None:
            outputs += bias
        return outputs.unflatten(0, x.shape[:-1])

    def _products(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return each slice's rows of `W x` for its own inputs: (slices, tokens, columns) -> (tokens, rows)."""
        method = self.base_layer.quant_method
        if self.n_slices == 1:
            return method.apply(self.base_layer, inputs[0])
        if self.slices is not None:
            return torch.cat([method.apply(*pair) for pair in zip(self.slices, inputs, strict=True)], dim=-1)
        every = method.apply(self.base_layer, inputs.flatten(0, 1)).unflatten(0, inputs.shape[:2])
        return torch.cat([rows[i] for i, rows in enumerate(every.split(self.sizes, dim=-1))], dim=-1)


LAYERS: list[Any] = [
    type(layer.__name__.replace("WithLoRA", "WithHyperAdapt"), (HyperAdaptMixin, layer), {})
    for layer in (
        ColumnParallelLinearWithLoRA,
        MergedColumnParallelLinearWithLoRA,
        QKVParallelLinearWithLoRA,
        MergedQKVParallelLinearWithLoRA,
        MergedColumnParallelLinearVariableSliceWithLoRA,
        RowParallelLinearWithLoRA,
        ReplicatedLinearWithLoRA,
    )
]


def adapted_layer(name: str, layer: nn.Module, parts: list[str], lora_config: Any) -> Optional[Any]:
    """Return a layer of vLLM's with scales, or None if its kind is not one that is known to apply them.

    Args:
        name (`str`): The layer's name in the model.
        layer (`torch.nn.Module`): The layer.
        parts (`list[str]`): The names that the matrices it holds have in checkpoints, if it holds several.
        lora_config (`LoRAConfig`): vLLM's settings, of rank 1.
    """
    if type(layer) not in BASE_LAYERS or name.endswith(UNCALLED):
        return None
    if getattr(layer, "weight", torch.empty(0)).dim() == 3:  # of a convolution, which reads it uncalled
        return None
    if len(parts) > 1 and len(_rows(layer)) != len(parts):  # a part of several slices
        return None
    if isinstance(layer, QKVParallelLinear) and getattr(layer, "v_head_size", layer.head_size) != layer.head_size:
        return None  # vLLM takes the heads of keys and values for equal
    for layer_cls in LAYERS:
        if layer_cls.can_replace_layer(source_layer=layer, lora_config=lora_config, packed_modules_list=parts):
            return layer_cls(layer)
    return None


def matrix_sizes(layer: Any, parts: list[str]) -> list[tuple[int, int]]:
    """Return the numbers of rows and columns of the matrices that a layer holds, whole where it holds a shard."""
    rows, columns = _rows(layer.base_layer), layer.base_layer.input_size
    return [(size, columns) for size in rows] if len(parts) > 1 else [(sum(rows), columns)]


def _rows(layer: Any) -> list[int]:
    if isinstance(layer, QKVParallelLinear):  # its own sizes count the copies of heads that several shards have
        key = layer.total_num_kv_heads * layer.head_size
        return [layer.total_num_heads * layer.head_size, key, key]
    return list(getattr(layer, "output_sizes", [layer.output_size]))
