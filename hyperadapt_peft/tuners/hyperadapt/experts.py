"""HyperAdapt of parameters that a module reads itself: a row and a column vector for each of its fused experts."""

from __future__ import annotations

from threading import RLock
from typing import Any, Optional
from weakref import WeakKeyDictionary

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call

from ..common.autograd import in_transform
from ..common.mixed_batch import BatchNames
from .config import HyperAdaptConfig
from .layer import HyperAdaptLayer


# Experts that hold (E, m, n) without saying so in `is_transposed`, as transformers' others do.
_TRANSPOSED = {"Llama4TextExperts"}
# A module's parameter is replaced for the time of a call, so calls from several threads take turns.
_locks: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ParamWrapper(HyperAdaptLayer):
    """A module of whose parameters one is adapted: a matrix (n, m) or E matrices (E, n, m), each with scales of its own.

    Rows are outputs and columns inputs, also where the matrices are stored as (m, n): transformers' Conv1D, and experts
    that are known to be (GPT-OSS, Llama 4, ...). Where it cannot be known, the layout is taken to be that of `nn.Linear`.

    The module reads the parameter itself, so the scaled copy of it takes its place during forward. It is made once for
    each call and, in half precision, rounded as merging rounds it: scales closer to 1 than a part in 512 (bf16) then
    change little. Several parameters of one module have a wrapper each, around each other. The class's name is what
    PEFT knows it by.

    Args:
        base_layer (`nn.Module`): The module, possibly already in a `ParamWrapper` for another parameter.
        adapter_name (`str`): The first adapter.
        config ([`HyperAdaptConfig`]): Its config.
        parameter_name (`str`): The parameter.

    Raises:
        ValueError: If the parameter has not 2 or 3 dimensions or is quantized, or its module has other adapters.
    """

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: HyperAdaptConfig, *, parameter_name: str, **kwargs: Any
    ) -> None:
        is_foreign = isinstance(base_layer, BaseTunerLayer) and not isinstance(base_layer, ParamWrapper)
        if is_foreign:
            raise ValueError(
                f"Target parameter {parameter_name} is not supported: its module is adapted already, as a "
                f"{type(base_layer).__module__}.{type(base_layer).__qualname__}."
            )
        self.parameter_name = parameter_name
        super().__init__(base_layer, adapter_name, config, **kwargs)

    @property
    def base_parameter(self) -> torch.Tensor:
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def is_transposed(self) -> bool:
        if not self.stack_shape:
            return super().is_transposed
        module = self.get_base_layer()
        return getattr(module, "is_transposed", type(module).__name__ in _TRANSPOSED)

    def base_sizes(self) -> tuple[int, int]:
        parameter = self.base_parameter
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 empties what it has sharded
        if len(shape) not in (2, 3) or parameter.dtype not in _DTYPES or self.quantization_backend is not None:
            raise ValueError(
                f"Target parameter {self.parameter_name} of {type(self.get_base_layer()).__name__} is not supported: "
                f"only matrices, or several in one (E, n, m), of floating point are, not {parameter.dtype} "
                f"{tuple(shape)}."
            )
        self.stack_shape = tuple(shape[:-2])
        out_features, in_features = reversed(shape[-2:]) if self.is_transposed else shape[-2:]
        return in_features, out_features

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        return self.base_parameter.device, self.base_parameter.dtype

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return super().forward(x, *args, **kwargs)
        with _locks.setdefault(self.get_base_layer(), RLock()):
            return super().forward(x, *args, **kwargs)

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        row, column = self.active_offset(self.hyperadapt_row), self.active_offset(self.hyperadapt_column)
        if row is None and column is None:
            return self.base_layer(x, *args, **kwargs)
        if self.base_parameter.is_meta:
            raise NotImplementedError(
                f"The parameter {self.parameter_name} of {type(self.get_base_layer()).__name__} is offloaded, and an "
                "adapter on it would not be seen. Keep the module on one device, or merge the adapter first."
            )
        name, inner = self.parameter_name, self.base_layer
        while isinstance(inner, ParamWrapper):
            name, inner = f"base_layer.{name}", inner.base_layer
        return functional_call(self.base_layer, {name: self.scaled(row, column)}, (x, *args), kwargs)

    def scaled(self, row: Optional[torch.Tensor], column: Optional[torch.Tensor]) -> torch.Tensor:
        """Return the parameter, scaled by what has these offsets from 1, in its dtype."""
        parameter = self.base_parameter
        shape = (self.stack_shape or (1,))[0], *parameter.shape[-2:]
        weight = parameter.reshape(shape)
        sides = (column, row) if self.is_transposed else (row, column)
        wide = torch.promote_types(weight.dtype, torch.float32)
        a, b = (
            weight.new_ones(size, dtype=wide) if side is None else 1 + side.to(wide).reshape(size)
            for side, size in zip(sides, (shape[:2], shape[::2]), strict=True)
        )
        if in_transform():
            scaled = (weight * a[:, :, None] * b[:, None]).to(weight.dtype)
        else:
            scaled = ScaledMatrices.apply(weight, a, b)
        return scaled.reshape(parameter.shape)

    def mixed_batch_forward(self, x: torch.Tensor, names: BatchNames, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise ValueError(
            f"hyperadapt.ParamWrapper does not support mixed adapter batches yet: {self.parameter_name} is one for all "
            "samples. Call the model with one adapter at a time, or leave out "
            f"{', '.join(filter(self.has_adapter, names.unique))}."
        )

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: Optional[list[str]]
    ) -> nn.Module:
        """Merge this wrapper and those inside, if asked to, and return the module."""
        layer: nn.Module = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def extra_repr(self) -> str:
        return f"parameter_name={self.parameter_name!r}"


class ScaledMatrices(torch.autograd.Function):
    """`W_e o a_e b_e^T` of E matrices (E, n, m) with scales (E, n) and (E, m), in W's dtype, rounded once.

    One matrix is in fp32 at a time, and backward keeps nothing but what came in.
    """

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight, row, column)
        scaled = torch.empty_like(weight)
        for out, w, a, b in zip(scaled, weight, row, column, strict=True):
            out.copy_(w * a[:, None] * b)
        return scaled

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Optional[torch.Tensor], ...]:
        weight, row, column = ctx.saved_tensors
        rows, columns = [], []
        for g, w, a, b in zip(grad, weight, row, column, strict=True):
            product = g.to(a.dtype) * w
            rows.append((product * b).sum(1))
            columns.append((product * a[:, None]).sum(0))
        to_weight = (grad * row[:, :, None] * column[:, None]).to(grad) if ctx.needs_input_grad[0] else None
        return to_weight, torch.stack(rows), torch.stack(columns)
