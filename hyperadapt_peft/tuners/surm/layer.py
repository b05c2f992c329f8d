"""SURM layers: a structured matrix parallel to a layer, or after it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from ..common import AdapterWeight, TargetLayer
from ..common.mixed_batch import BASE, BatchNames, read_weight, stack_weights
from .config import SurmConfig
from .structures import Structure, get_structure


# Standard deviation of B at the start with an alpha of 1. With A's steps of the learning rate's size, the update's
# entries then grow by about a tenth of it to once it per step, as LoRA's do.
RANDOM_STD = {"circulant": 0.1, "kronecker": 0.1, "toeplitz": 0.02, "ldr": 0.02}


class SurmLayer(TargetLayer):
    """A base layer with structured matrices, each of two factors: A, which starts at zero, and B, which is random."""

    adapter_layer_names = ("surm_A", "surm_B", "surm_bias")
    other_param_names = ("scaling", "surm_config", "surm_structure", "surm_dropout")

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: SurmConfig, **kwargs: Any) -> None:
        super().__init__(base_layer, **kwargs)
        self.surm_A = nn.ModuleDict()
        self.surm_B = nn.ModuleDict()
        self.surm_bias = nn.ModuleDict()  # of sequential adapters
        self.surm_dropout = nn.ModuleDict()
        self.surm_config: dict[str, SurmConfig] = {}
        self.surm_structure: dict[str, Structure] = {}
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: SurmConfig) -> None:
        """Add an adapter, at the identity unless `config.init_weights` is False."""
        self.scaling[adapter_name] = 1.0
        self.surm_config[adapter_name] = config
        self.surm_structure[adapter_name] = get_structure(config.structure, config.r, config.symmetric)
        a, b = self.surm_structure[adapter_name].factor_shapes(*self.matrix_shape(adapter_name))
        self.surm_A[adapter_name] = AdapterWeight(*a)
        self.surm_B[adapter_name] = AdapterWeight(*b)
        if config.placement == "sequential":
            self.surm_bias[adapter_name] = AdapterWeight(self.out_features)
        self.surm_dropout[adapter_name] = nn.Dropout(config.surm_dropout) if config.surm_dropout else nn.Identity()
        self.reset_parameters(adapter_name, config.init_weights)
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_parameters(self, adapter_name: str, init_weights: bool = True) -> None:
        """Set an adapter to a zero and a random factor; with `init_weights=False` both are random and large."""
        config = self.surm_config[adapter_name]
        root = math.sqrt(abs(config.alpha) or 1.0)
        for factors, std in ((self.surm_A, 0.0), (self.surm_B, RANDOM_STD[config.structure])):
            nn.init.normal_(factors[adapter_name].get_parameter("weight"), std=(std if init_weights else 0.25) / root)

    def matrix_shape(self, adapter_name: str) -> tuple[int, int]:
        """(out, in) of an adapter's structured matrix."""
        parallel = self.surm_config[adapter_name].placement == "parallel"
        return self.out_features, self.in_features if parallel else self.out_features

    def gain(self, adapter_name: str) -> float:
        """The factor of A: alpha, times the strength where that can be in the matrix."""
        config = self.surm_config[adapter_name]
        return config.alpha * self.scaling[adapter_name] if config.placement == "parallel" else config.alpha

    def matrix(self, adapter_name: str) -> torch.Tensor:
        """`gain dW` (out, in), detached, in fp32 or wider."""
        factors = [factors[adapter_name]().detach() for factors in (self.surm_A, self.surm_B)]
        a, b = (factor.to(torch.promote_types(factor.dtype, torch.float32)) for factor in factors)
        dense = self.surm_structure[adapter_name].dense(a, b, *self.matrix_shape(adapter_name))
        return self.gain(adapter_name) * dense

    def __repr__(self) -> str:
        return "surm." + super().__repr__()


class Linear(SurmLayer):
    """SURM of `nn.Linear`, transformers' `Conv1D` and every quantized linear layer PEFT knows. (..., in) -> (..., out).

    A parallel adapter makes the weight `W + alpha dW`, and several add. A sequential one makes the output X the output
    `X + gelu(alpha X S) + b`, and several follow each other, after the parallel ones.
    """

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_forward(x, *args, **kwargs)
        names = [name for name in self.active_adapters if name in self.surm_config]
        for name in sorted(names, key=lambda name: self.surm_config[name].placement == "sequential"):
            parts: Any = [read_weight(part, name) for part in (self.surm_A, self.surm_B, self.surm_bias)]
            a, b, bias = parts
            result = self.add_update(result, x, name, (self.gain(name) * a, b, bias, self.scaling[name]))
        return result

    def mixed_batch_forward(self, x: torch.Tensor, names: BatchNames, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = self.base_forward(x, *args, **kwargs)
        kinds = defaultdict(list)
        for name in filter(self.has_adapter, names.unique):
            config = self.surm_config[name]
            kinds[config.placement, self.surm_structure[name], config.surm_dropout].append(name)
        for alike in kinds.values():  # one product of all samples, with zeros for those of other kinds
            make = partial(self.batch_factors, alike, names, x.dim())
            factors = names.remember((self, alike[0]), make)
            result = self.add_update(result, x, alike[0], factors)
        return result

    def batch_factors(self, names: list[str], adapter_names: BatchNames, dims: int) -> tuple:
        """Return what `add_update` takes, a row for each sample, of zeros where its name is another."""
        unique = [name if name in names else BASE for name in adapter_names.unique]
        parts: list[Any] = [stack_weights(part, unique) for part in (self.surm_A, self.surm_B, self.surm_bias)]
        a, b, bias = parts

        def table(values: Callable[[str], float], dims: int) -> torch.Tensor:
            numbers = tuple(0.0 if name == BASE else values(name) for name in unique)
            return adapter_names.tensor(numbers, a.dtype, a.device).reshape(-1, *(1,) * (dims - 1))

        a, b = adapter_names.gather(a * table(self.gain, a.dim())), adapter_names.gather(b)
        if bias is None:
            return a, b, None, 1.0
        bias = bias.reshape(len(unique), *(1,) * (dims - 2), -1)
        return a, b, adapter_names.gather(bias), adapter_names.gather(table(self.scaling.__getitem__, dims))

    def add_update(self, result: torch.Tensor, x: torch.Tensor, adapter_name: str, factors: tuple) -> torch.Tensor:
        """Return the output `result` for the input `x` with an update of an adapter's kind, in its dtype.

        `factors` are A times its gain, B, and for sequential adapters the bias and the strength; or a batch of each.
        """
        a, b, bias, strength = factors
        inputs = self.surm_dropout[adapter_name](x if bias is None else result)
        update = self.surm_structure[adapter_name].matmul(inputs, a, b, self.out_features)
        if bias is not None:
            update = strength * (F.gelu(update) + bias)
        return result + update.to(result.dtype)

    def adapted_weight(self, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        for name in adapter_names:
            update = self.matrix(name).to(weight)
            weight = weight + (update.T if isinstance(self.get_base_layer(), Conv1D) else update)
        return weight

    def check_mergeable(self, adapter_name: str) -> None:
        if self.surm_config[adapter_name].placement == "sequential":
            raise ValueError(
                f"The adapter {adapter_name} cannot be merged: with placement='sequential' it computes gelu of a product "
                "after the layer, which is not linear, so no weight of the base layer can hold it."
            )

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return all(config.placement == "parallel" for config in self.surm_config.values())
