"""The tuner layer's life around a base layer: disable, merge, unmerge, refuse."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr
from torch import nn

from .base_weight import MergedWeight, check_finite, local
from .quantization import MergedQuantizedWeight, dequantized, quantization_backend, unpack


if TYPE_CHECKING:
    from .mixed_batch import BatchNames


class AdapterWeight(nn.Module):
    """A trained tensor of an adapter, at first of zeros.

    It is a module so that FSDP, ZeRO and offloading, which act on modules' forwards, see it.
    """

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(shape))

    def forward(self) -> torch.Tensor:
        return self.weight.clone()  # sharded engines free the weight after this call


class TargetLayer(nn.Module, BaseTunerLayer):
    """A base layer with adapters.

    Sub-classes say what an adapter adds: `update_layer`, `adapted_forward`, `mixed_batch_forward`, `adapted_weight`.

    Args:
        base_layer (`nn.Module`): The layer to adapt, possibly quantized, possibly already a tuner layer.
        **kwargs: What PEFT's `get_quantization_kwargs` found on the model.

    Raises:
        TypeError: If the layer's sizes are unknown.
        NotImplementedError: If the layer's weight is sharded by tensor parallelism.
    """

    parameter_name = "weight"  # of the base layer's parameter that is adapted

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = quantization_backend(self.get_base_layer(), **kwargs)
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.scaling: dict[str, float] = {}  # each adapter's strength; sub-classes have it in `other_param_names`
        self._merged_weight: Optional[Union[MergedWeight, MergedQuantizedWeight]] = None
        self._called_with_names = False  # the last time
        self._merged_weight_class = MergedWeight if self.quantization_backend is None else MergedQuantizedWeight
        self.cast_input_dtype_enabled = True  # read by peft.helpers.disable_input_dtype_casting
        _refuse_tensor_parallel(self.get_base_layer(), self.parameter_name)
        self.in_features, self.out_features = self.base_sizes()

    def base_sizes(self) -> tuple[int, int]:
        """Return the base layer's numbers of inputs and outputs."""
        base_layer: Any = self.get_base_layer()
        if isinstance(base_layer, nn.Linear):
            # PEFT takes the shard's sizes where FSDP2's mesh is not called "fsdp", but the layer is called with the whole
            return base_layer.in_features, base_layer.out_features
        in_features, out_features = _get_in_out_features(base_layer)
        if in_features is None or out_features is None:
            raise TypeError(f"Unsupported layer type {type(base_layer)}")
        return in_features, out_features

    @property
    def own_names(self) -> tuple[str, ...]:
        """The names of the attributes that hold, by adapter names, the adapters' modules and settings."""
        return (*self.adapter_layer_names, *self.other_param_names)

    @property
    def base_parameter(self) -> torch.Tensor:
        """The base layer's parameter that is adapted."""
        return self.weight

    def set_adapter(self, adapter_names: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Set the active adapters, and train them unless `inference_mode`; PEFT's, for a thousand adapters as well."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        for attribute in self.adapter_layer_names:
            for name, module in getattr(self, attribute).items():
                trained = name in names and not inference_mode
                # `parameters()` finds what FSDP has wrapped, but takes ten times as long
                for parameter in module._parameters.values() or module.parameters():
                    if parameter.requires_grad != trained and parameter.is_leaf:
                        parameter.requires_grad_(trained)
        self._active_adapter = names

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set an adapter's strength: 0 is the base layer, 1 the adapter as trained. Nothing if it is not on this layer."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale

    def scale_layer(self, scale: float) -> None:
        """Multiply the active adapters' strengths by `scale`."""
        for name in self.active_adapters:
            self.set_scale(name, self.scaling.get(name, 1.0) * scale)

    def unscale_layer(self, scale: Optional[float] = None) -> None:
        """Divide the active adapters' strengths by `scale`, or with None set them to 1 again."""
        for name in self.active_adapters:
            self.set_scale(name, 1.0 if scale is None else self.scaling.get(name, 1.0) / scale)

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters."""
        raise NotImplementedError

    def mixed_batch_forward(self, x: torch.Tensor, names: BatchNames, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with one adapter, or none, per sample; the base layer is called once."""
        raise NotImplementedError

    def adapted_weight(self, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Return `weight`, in fp32 or wider, with the adapters applied. `weight` is left as it is."""
        raise NotImplementedError

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether an adapter is on this layer."""
        return any(adapter_name in getattr(self, name) for name in self.adapter_layer_names)

    def base_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Return the base layer's output, with a gradient for the input if that needs one.

        Raises:
            RuntimeError: If the base layer gives its input no gradient.
        """
        needs_grad = torch.is_grad_enabled() and x.requires_grad
        if needs_grad:
            unpack(self.get_base_layer())
        result = self.base_layer(x, *args, **kwargs)
        if needs_grad and not result.requires_grad:
            base_layer: Any = self.get_base_layer()
            raise RuntimeError(
                f"A {type(base_layer).__name__} whose weight is a {type(base_layer.weight).__name__} gives its input no "
                "gradient, so adapters before it would not be trained. Quantize the base model in another way to "
                "train, for instance its weights only; to evaluate, call it under `torch.no_grad()`."
            )
        return result

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters or self.merged:
            if self.merged and adapter_names is not None:
                raise ValueError(
                    "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
                )
            if self.disable_adapters and self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            if self._called_with_names:
                self._refuse_recomputing()
                self._called_with_names = False
            return self.adapted_forward(x, *args, **kwargs)
        if not self._called_with_names:
            self._called_with_names = True
        if not any(map(self.has_adapter, adapter_names.unique)):
            return self.base_layer(x, *args, **kwargs)
        if len(x) == len(adapter_names):
            return self.mixed_batch_forward(x, adapter_names, *args, **kwargs)
        if x.dim() == 2 and len(x) == len(adapter_names) * adapter_names.tokens:  # flattened, in the samples' order
            x = x.unflatten(0, (len(adapter_names), adapter_names.tokens))
            return self.mixed_batch_forward(x, adapter_names, *args, **kwargs).flatten(0, 1)
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )

    def _refuse_recomputing(self) -> None:
        if torch._C._current_graph_task_id() != -1:  # called by a backward pass
            raise RuntimeError(
                "Gradient checkpointing has called a layer again without the adapter names of the batch. To train with "
                "`adapter_names` use that of transformers: `model.gradient_checkpointing_enable()`."
            )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Merge adapters into the base weight, computed in fp32 from the unmerged weight and rounded once.

        The weight from before the first merge is kept on the CPU, so that `unmerge` is exact.

        Raises:
            ValueError: If an adapter cannot be merged, the base layer would not keep the merged weight, or with
                `safe_merge` if it would not be finite. The layer is left as it was.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        if not adapter_names:
            return
        inner: Any = self.base_layer
        # what is inside is part of the weight adapted here, unless it is a wrapper of another parameter
        if isinstance(inner, BaseTunerLayer) and not inner.merged and not isinstance(inner, type(self)):
            inner.merge(safe_merge=safe_merge)
        merged_weight = self._merged_weight or self._merged_weight_class(self)
        merged_weight.write(self, [*self.merged_adapters, *adapter_names], check=safe_merge)
        self._merged_weight = merged_weight
        self.merged_adapters.extend(adapter_names)

    def unmerge(self) -> None:
        """Put back the base weight from before the merge, bit by bit.

        What others have merged into the same weight stays, up to rounding; the last of this package's layers to be
        unmerged puts back what was before the first.
        """
        if self._merged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self._merged_weight.write(self, [])
        self._merged_weight = None
        self.merged_adapters.clear()

    def check_merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> list[str]:
        """Raise the error that `merge` with these arguments would raise, and change nothing.

        Returns:
            The adapters that it would merge.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        if adapter_names and safe_merge:
            weight, names = self._unmerged_weight(), [*self.merged_adapters, *adapter_names]
            check_finite(self.adapted_weight(weight, names).to(weight.dtype), names)
        return adapter_names

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter is of a kind that no weight can hold."""

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return what one adapter adds to the unmerged base weight, in the weight's shape and dtype."""
        self.check_mergeable(adapter_name)
        weight = self._unmerged_weight()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.adapted_weight(weight, [adapter_name]) - wide).to(weight.dtype)

    def get_base_weight(self) -> torch.Tensor:
        """Return the base layer's weight as it is now, dequantized if it is quantized."""
        if self.quantization_backend is None:
            return self.base_parameter.data
        return dequantized(self.quantization_backend, self.get_base_layer())

    def _unmerged_weight(self) -> torch.Tensor:
        return self.get_base_weight() if self._merged_weight is None else self._merged_weight.unmerged(self)

    def _adapters_to_merge(self, adapter_names: Optional[list[str]]) -> list[str]:
        available = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in available]
        for name in names:
            self.check_mergeable(name)
        if names and (why := self._why_not_mergeable()):
            raise ValueError(
                f"Cannot merge into a {type(self.get_base_layer()).__name__}: {why}. Use the adapter unmerged, or merge "
                "it into the base model as it was before it was quantized, parametrized or offloaded."
            )
        return names

    def _why_not_mergeable(self) -> Optional[str]:
        name, backend = self.parameter_name, self.quantization_backend
        if backend is not None:
            return None if backend.supports_merge else f"its {backend.backend_name} weight cannot be quantized again"
        if name not in self.get_base_layer()._parameters:
            return f"its {name} is computed from other parameters, which a merge would not change"
        if type(local(self.base_parameter.data)) is not torch.Tensor:
            return (
                f"its {name} is a {type(self.base_parameter.data).__name__}, which does not keep what is written to it"
            )
        if self.base_parameter.element_size() == 1:
            return f"its {name} is {self.base_parameter.dtype}, with scales beside it that a merge would not know"
        return f"its {name} is not in memory" if self.base_parameter.is_meta else None

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> None:
        unpack(self.get_base_layer())  # before bitsandbytes does, wrongly
        super()._save_to_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def named_modules_around_adapters(model: nn.Module, remove_duplicate: bool = True) -> Iterator[tuple[str, nn.Module]]:
    """As `model.named_modules()`, but for the adapters' own modules: with many adapters, nearly all there are."""
    seen, stack = set(), [("", model)]
    while stack:
        prefix, module = stack.pop()
        if remove_duplicate and module in seen:
            continue
        seen.add(module)
        yield prefix, module
        own = module.own_names if isinstance(module, TargetLayer) else ()
        children = list(module._modules.items())  # another thread may add an adapter meanwhile
        start = f"{prefix}." if prefix else ""
        stack += [(start + name, child) for name, child in reversed(children) if child is not None and name not in own]


def modules_around_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """As `model.modules()`, but for the adapters' own modules."""
    for _, module in named_modules_around_adapters(model):
        yield module


def _refuse_tensor_parallel(base_layer: nn.Module, parameter_name: str) -> None:
    # FSDP2's meshes have no names, or "fsdp" (transformers), "dp_shard_cp" and "dp_replicate" (accelerate)
    mesh = getattr(getattr(base_layer, parameter_name, None), "device_mesh", None)
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
        raise NotImplementedError(
            f"{type(base_layer).__name__} is sharded by tensor parallelism, which hyperadapt_peft does not support: an "
            "adapter saved from it would hold one shard. Load the base model without a tensor-parallel plan."
        )
