"""The tuner layer's life around a base layer that is never changed: disable, merge, unmerge, refuse."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Optional, Union

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import quantization_extra_repr, resolve_quantization_backend
from torch import nn

from .quantization import dequantized


if TYPE_CHECKING:
    from .mixed_batch import BatchNames


class TargetLayer(nn.Module, BaseTunerLayer):
    """A base layer with adapters. Sub-classes say what an adapter adds: `update_layer`, `adapted_forward`,
    `mixed_batch_forward`, `adapted_weight`.

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
        self.quantization_backend = resolve_quantization_backend(
            self.get_base_layer(), get_apply_tensor_subclass=kwargs.get("get_apply_tensor_subclass")
        )
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self.scaling: dict[str, float] = {}  # each adapter's strength; sub-classes have it in `other_param_names`
        self._state_before_merge: Any = None
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
            if name in self.scaling:
                self.scaling[name] *= scale

    def unscale_layer(self, scale: Optional[float] = None) -> None:
        """Divide the active adapters' strengths by `scale`, or with None set them to 1 again."""
        for name in self.active_adapters:
            if name in self.scaling:
                self.scaling[name] = 1.0 if scale is None else self.scaling[name] / scale

    def adapted_forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters."""
        raise NotImplementedError

    def mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: BatchNames, **kwargs: Any
    ) -> torch.Tensor:
        """The base layer's output with one adapter, or none, per sample; the base layer is called once."""
        raise NotImplementedError

    def adapted_weight(self, weight: torch.Tensor, adapter_names: list[str]) -> torch.Tensor:
        """Return `weight`, in fp32 or wider, with the adapters applied. `weight` is left as it is."""
        raise NotImplementedError

    def has_adapter(self, adapter_name: str) -> bool:
        """Return whether an adapter is on this layer."""
        return any(adapter_name in getattr(self, name) for name in self.adapter_layer_names)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        if self.merged and adapter_names is not None:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is None:
            return self.adapted_forward(x, *args, **kwargs)
        if not any(map(self.has_adapter, adapter_names.unique)):
            return self.base_layer(x, *args, **kwargs)
        if len(x) == len(adapter_names):
            return self.mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        if x.dim() == 2 and len(x) == len(adapter_names) * adapter_names.tokens:  # flattened, in the samples' order
            x = x.unflatten(0, (len(adapter_names), adapter_names.tokens))
            return self.mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs).flatten(0, 1)
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(adapter_names)} and {len(x)} respectively."
        )

    def merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Merge adapters into the base weight, computed in fp32 from the unmerged weight and rounded once.

        The weight from before the first merge is kept on the CPU, so that `unmerge` is exact.

        Args:
            safe_merge (`bool`, defaults to `False`):
                Look for non-finite values first and leave the layer as it was if there are any.
            adapter_names (`Optional[list[str]]`):
                The adapters to merge; the active ones if `None`.

        Raises:
            ValueError: If an adapter cannot be merged, or with `safe_merge` if the merged weight would not be finite.
        """
        adapter_names = self._adapters_to_merge(adapter_names)
        if not adapter_names:
            return
        self._merge_inner(safe_merge)
        merged = self._merged_weight(adapter_names, check=safe_merge)
        if self._state_before_merge is None:
            self._state_before_merge = self._save_state()
        if self.quantization_backend is None:
            self.base_parameter.data.copy_(merged)
        else:
            self.set_base_weight(merged)
        self.merged_adapters.extend(adapter_names)

    def _merge_inner(self, safe_merge: bool) -> None:
        inner: Any = self.base_layer
        if isinstance(inner, BaseTunerLayer):  # its adapters are part of the weight adapted here
            inner.merge(safe_merge=safe_merge)

    def unmerge(self) -> None:
        """Put back the base weight from before the first merge, bit by bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.")
            return
        self._restore_state(self._state_before_merge)
        self._state_before_merge = None
        self.merged_adapters.clear()

    def check_merge(self, safe_merge: bool = False, adapter_names: Optional[list[str]] = None) -> None:
        """Raise the error that `merge` with these arguments would raise, and change nothing."""
        adapter_names = self._adapters_to_merge(adapter_names)
        if adapter_names and safe_merge:
            self._merged_weight(adapter_names, check=True)

    def check_mergeable(self, adapter_name: str) -> None:
        """Raise ValueError if the adapter is of a kind that no weight can hold."""

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """Return what one adapter adds to the unmerged base weight, in the weight's shape and dtype."""
        self.check_mergeable(adapter_name)
        weight = self._weight_before_merge()
        wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
        return (self.adapted_weight(weight, [adapter_name]) - wide).to(weight.dtype)

    def _adapters_to_merge(self, adapter_names: Optional[list[str]]) -> list[str]:
        available = self._get_available_adapters()
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in available]
        for name in names:
            self.check_mergeable(name)
        return names

    def _weight_before_merge(self) -> torch.Tensor:
        if self._state_before_merge is None:
            return self.get_base_weight()
        if self.quantization_backend is None:
            return self._state_before_merge.to(self.base_parameter.device)
        base_layer, attributes, _ = self._state_before_merge
        unmerged = object.__new__(type(base_layer))
        unmerged.__dict__.update(attributes)
        return dequantized(self.quantization_backend, unmerged)

    def get_base_weight(self) -> torch.Tensor:
        """Return the base layer's weight as it is now, dequantized if it is quantized."""
        if self.quantization_backend is None:
            return self.base_parameter.data
        return dequantized(self.quantization_backend, self.get_base_layer())

    def _merged_weight(self, adapter_names: list[str], check: bool) -> torch.Tensor:
        weight = self._weight_before_merge()
        merged = self.adapted_weight(weight, [*self.merged_adapters, *adapter_names]).to(weight.dtype)
        if check and not torch.isfinite(merged).all():
            raise ValueError(
                f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
            )
        return merged

    def _save_state(self) -> Any:
        if self.quantization_backend is None:
            return self.base_parameter.data.to("cpu", copy=True)
        base_layer = self.get_base_layer()
        # Backends replace the weight, or the layer, with new objects: the old ones stay valid and need no copy.
        attributes = {**base_layer.__dict__, "_parameters": dict(base_layer._parameters)}
        if "state" in attributes:  # bitsandbytes 8 bit
            attributes["state"] = copy.copy(attributes["state"])
        weight: Any = getattr(base_layer, "weight", None)
        # PEFT's backend for bitsandbytes 4 bit changes the old weight's attributes on its way to the new one
        return base_layer, attributes, dict(vars(weight)) if hasattr(weight, "quant_state") else None

    def _restore_state(self, state: Any) -> None:
        if self.quantization_backend is None:
            self.base_parameter.data.copy_(state)
            return
        base_layer, attributes, weight_attributes = state
        base_layer.__dict__.clear()
        base_layer.__dict__.update(attributes)
        if weight_attributes is not None:
            vars(base_layer.weight).clear()
            vars(base_layer.weight).update(weight_attributes)
        if self.get_base_layer() is not base_layer:  # a backend may replace the layer
            self.base_layer = base_layer

    def extra_repr(self) -> str:
        return quantization_extra_repr(self)


def modules_around_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The modules of a model as `model.modules()`, but for the adapters' own: with many adapters, nearly all of them."""
    seen, stack = set(), [model]
    while stack:
        module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        yield module
        own = (*module.adapter_layer_names, *module.other_param_names) if isinstance(module, TargetLayer) else ()
        children = list(module._modules.items())  # another thread may add an adapter meanwhile
        stack += [child for name, child in reversed(children) if child is not None and name not in own]


def _refuse_tensor_parallel(base_layer: nn.Module, parameter_name: str) -> None:
    # FSDP2's meshes have no names, or "fsdp" (transformers), "dp_shard_cp" and "dp_replicate" (accelerate)
    mesh = getattr(getattr(base_layer, parameter_name, None), "device_mesh", None)
    if mesh is not None and "tp" in (mesh.mesh_dim_names or ()):
        raise NotImplementedError(
            f"{type(base_layer).__name__} is sharded by tensor parallelism, which hyperadapt_peft does not support: an "
            "adapter saved from it would hold one shard. Load the base model without a tensor-parallel plan."
        )
