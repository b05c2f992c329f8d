"""HyperAdapt layers: `W' = A W B`, computed on the activations so that the base layer stays as it is."""

from __future__ import annotations

from functools import partial
from typing import Any, Optional

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..common import AdapterWeight, TargetLayer
from ..common.mixed_batch import BatchNames, read_weight, stack_weights
from .algebra import Offsets
from .config import HyperAdaptConfig
from .functional import scale


# The offsets of columns and rows, (size,) or (batch, size) or None, the factor of both, and whether to save memory.
Scales = tuple[Optional[torch.Tensor], Optional[torch.Tensor], float, bool]


class HyperAdaptLayer(TargetLayer):
    """A base layer of weight `W` (n x m) whose rows are scaled by `a` (n) and whose columns by `b` (m).

    Several active adapters multiply their scales, in any order. The bias is not scaled. A scale is `1 + alpha * d`, stored
    as d: so a bf16 copy keeps the update's relative precision, weight decay pulls to the identity, and missing values mean
    the identity.
    """

    adapter_layer_names = ("hyperadapt_row", "hyperadapt_column")
    other_param_names = ("scaling", "hyperadapt_alpha", "hyperadapt_save_memory")
    stack_shape: tuple[int, ...] = ()  # what is before rows and columns: () of one matrix, (E,) of E matrices

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: HyperAdaptConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.hyperadapt_row = nn.ModuleDict()
        self.hyperadapt_column = nn.ModuleDict()
        self.hyperadapt_alpha: dict[str, float] = {}
        self.hyperadapt_save_memory: dict[str, bool] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    @property
    def is_transposed(self) -> bool:
        """Whether the weight is stored as (m, n)."""
        return isinstance(self.get_base_layer(), Conv1D)

    def update_layer(self, adapter_name: str, config: HyperAdaptConfig) -> None:
        """Add an adapter, at the identity unless `config.init_weights` is False."""
        self.scaling[adapter_name] = 1.0
        self.hyperadapt_alpha[adapter_name] = config.alpha
        self.hyperadapt_save_memory[adapter_name] = config.save_memory
        if config.sides != "column":
            self.hyperadapt_row[adapter_name] = AdapterWeight(*self.stack_shape, self.out_features)
        if config.sides != "row":
            self.hyperadapt_column[adapter_name] = AdapterWeight(*self.stack_shape, self.in_features)
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set an adapter to the identity, or with `init_weights=False` to random scales around it."""
        for scales in (self.hyperadapt_row, self.hyperadapt_column):
            if adapter_name in scales:
                std = 0.0 if init_weights else 0.3 / abs(self.hyperadapt_alpha[adapter_name])
                nn.init.normal_(scales[adapter_name].get_parameter("weight"), std=std)

    def get_offsets(self, adapter_name: str) -> Offsets:
        """Return an adapter's offsets `alpha * d` of rows (..., n) and columns (..., m), detached; None where it has none."""
        row, column = (
            self.hyperadapt_alpha[adapter_name] * scales[adapter_name]().detach() if adapter_name in scales else None
            for scales in (self.hyperadapt_row, self.hyperadapt_column)
        )
        return row, column

    def add_offsets(
        self,
        adapter_name: str,
        config: HyperAdaptConfig,
        row: Optional[torch.Tensor],
        column: Optional[torch.Tensor],
    ) -> None:
        """Add an adapter with given offsets; it is not trained and not active."""
        self.update_layer(adapter_name, config)
        for scales, offset in ((self.hyperadapt_row, row), (self.hyperadapt_column, column)):
            if adapter_name in scales:
                weight = scales[adapter_name].get_parameter("weight")
                weight.data = torch.zeros_like(weight) if offset is None else offset.to(weight.device) / config.alpha
                weight.requires_grad_(False)

    def factor(self, adapter_name: str) -> float:
        """Return what an adapter's d is multiplied by: alpha, at its strength."""
        return self.hyperadapt_alpha[adapter_name] * self.scaling[adapter_name]

    def offset(self, scales: nn.ModuleDict, adapter_name: str) -> torch.Tensor:
        """Return one adapter's offset from 1 at its strength, (size,)."""
        return self.factor(adapter_name) * scales[adapter_name]()

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self.scaled_forward(x, self.active_scales(), *args, **kwargs)

    def mixed_batch_forward(self, x: torch.Tensor, names: BatchNames, *args: Any, **kwargs: Any) -> torch.Tensor:
        scales = names.remember(self, partial(self.batch_scales, names))
        return self.scaled_forward(x, scales, *args, **kwargs)

    def scaled_forward(self, x: torch.Tensor, scales: Scales, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer between scales, of the same offsets for all samples or of one for each."""
        raise NotImplementedError

    def active_scales(self) -> Scales:
        """Return the active adapters' scales, with offsets (size,)."""
        column, row, names = self.hyperadapt_column, self.hyperadapt_row, self.active_adapters
        save_memory = self.saves_memory(names)
        if len(names) == 1 and names[0] in self.scaling:
            return read_weight(column, names[0]), read_weight(row, names[0]), self.factor(names[0]), save_memory
        return self.active_offset(column), self.active_offset(row), 1.0, save_memory

    def active_offset(self, scales: nn.ModuleDict) -> Optional[torch.Tensor]:
        """Return the offset from 1 of the product of the active adapters' scales, (size,), or None without any."""
        total = None
        for name in self.active_adapters:
            if name in scales:
                offset = self.offset(scales, name)
                total = offset if total is None else total + offset + total * offset
        return total

    def batch_scales(self, adapter_names: BatchNames) -> Scales:
        """Return the samples' scales.

        An offset is (batch, size), or (size,) if it is the same for all samples, or None if none has any.
        """
        names = adapter_names.unique
        save_memory = self.saves_memory(names)
        if len(names) == 1:
            column, row = (read_weight(scales, names[0]) for scales in (self.hyperadapt_column, self.hyperadapt_row))
            return column, row, self.factor(names[0]), save_memory
        column, row = (stack_weights(scales, names) for scales in (self.hyperadapt_column, self.hyperadapt_row))
        factors = {self.factor(name) for name in names if name in self.scaling}
        factor = factors.pop()
        if factors:
            by_name, factor = tuple(self.factor(name) if name in self.scaling else 0.0 for name in names), 1.0
            column, row = (
                table if table is None else table * adapter_names.tensor(by_name, table.dtype, table.device)[:, None]
                for table in (column, row)
            )
        column, row = (table if table is None else adapter_names.gather(table) for table in (column, row))
        return column, row, factor, save_memory

    def saves_memory(self, adapter_names: list[str]) -> bool:
        """Return whether activations are kept in 8 bits: if all of these adapters that are on this layer want it."""
        return torch.is_grad_enabled() and all(self.hyperadapt_save_memory.get(name, True) for name in adapter_names)

    def scale_weight(self, weight: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """Return `weight` with its rows times `row` and its columns times `column`."""
        if self.is_transposed:
            row, column = column, row
        return weight * row[..., :, None] * column[..., None, :]

    def adapted_weight(self, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        row = weight.new_ones(*self.stack_shape, self.out_features)
        column = weight.new_ones(*self.stack_shape, self.in_features)
        for name in adapter_names:
            if name in self.hyperadapt_row:
                row = row * (1 + self.offset(self.hyperadapt_row, name).detach().to(row))
            if name in self.hyperadapt_column:
                column = column * (1 + self.offset(self.hyperadapt_column, name).detach().to(column))
        return self.scale_weight(weight, row, column)

    def __repr__(self) -> str:
        return "hyperadapt." + super().__repr__()


class Linear(HyperAdaptLayer):
    """HyperAdapt of `nn.Linear`, transformers' `Conv1D` and every quantized linear layer PEFT knows.

    `x` (..., m) -> (..., n).
    """

    channel_dims = 0  # how many dimensions follow the channels in the activations

    def scaled_forward(self, x: torch.Tensor, scales: Scales, *args: Any, **kwargs: Any) -> torch.Tensor:
        column, row, factor, save_memory = scales
        if column is not None:
            x = scale(x, self.along_channels(column, x), factor, save_memory=save_memory)
        result = self.base_forward(x, *args, **kwargs)
        if row is None:
            return result
        bias = self.base_bias(result, x, *args, **kwargs)
        bias = None if bias is None else self.along_channels(bias, result)
        return scale(result, self.along_channels(row, result), factor, bias, save_memory)

    def along_channels(self, vector: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Shape (size,) or (batch, size) so that it broadcasts to the channels of x."""
        if self.channel_dims:
            vector = vector.reshape(*vector.shape, *(1,) * self.channel_dims)
        if vector.dim() == self.channel_dims + 1:
            return vector
        return vector.reshape(len(vector), *(1,) * (x.dim() - vector.dim()), *vector.shape[1:])

    def base_bias(self, result: torch.Tensor, x: torch.Tensor, *args: Any, **kwargs: Any) -> Optional[torch.Tensor]:
        """The base layer's bias, (size,)."""
        bias = getattr(self.base_layer, "bias", None)
        if callable(bias):  # of torch's own quantized layers
            bias = bias()
        if bias is None:
            return None
        if bias.device != result.device or bias.numel() != self.out_features:
            # offloaded or sharded: outside the base layer's forward the bias is not here, but it is W 0 + bias
            bias = self.base_layer(torch.zeros_like(x[:1]), *args, **kwargs).detach()
            bias = bias.movedim(bias.dim() - 1 - self.channel_dims, -1).reshape(-1, self.out_features)[0]
        return bias

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return self.channel_dims == 0  # not of convolutions


class Conv(Linear):
    """HyperAdapt of `nn.Conv1d`, `nn.Conv2d` and `nn.Conv3d`: rows are output channels, columns input channels."""

    @property
    def channel_dims(self) -> int:  # type: ignore[override]
        conv: Any = self.get_base_layer()
        return len(conv.kernel_size)

    def scale_weight(self, weight: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        conv: Any = self.get_base_layer()
        groups = conv.groups  # the weight is n x (m / groups) x kernel
        column = column.reshape(groups, -1).repeat_interleave(self.out_features // groups, dim=0)
        return (weight.flatten(2) * row[:, None, None] * column[:, :, None]).reshape(weight.shape)


class Embedding(HyperAdaptLayer):
    """HyperAdapt of `nn.Embedding`: rows are tokens, columns the embedding's dimensions. Ids (...) -> (..., m)."""

    def base_sizes(self) -> tuple[int, int]:
        num_tokens, num_dimensions = super().base_sizes()
        return num_dimensions, num_tokens

    def scaled_forward(self, x: torch.Tensor, scales: Scales, *args: Any, **kwargs: Any) -> torch.Tensor:
        column, row, factor, _ = scales
        result = self.base_layer(x, *args, **kwargs)
        if row is not None:
            tokens = F.embedding(x, row[:, None]) if row.dim() == 1 else row.gather(1, x.flatten(1))[..., None]
            result = scale(result, tokens.reshape(*x.shape, 1), factor)
        if column is not None:
            result = scale(result, column.reshape(-1, *(1,) * (result.dim() - 2), column.shape[-1]), factor)
        return result
