"""Merging all layers of a model, or none: from the inside out, and only where the merged model is the adapted one."""

from __future__ import annotations

from collections import defaultdict
from typing import Optional

import torch
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer, onload_layer
from torch import nn

from .base_weight import check_finite, local
from .experts import without_wrappers
from .layer import TargetLayer, modules_around_adapters, named_modules_around_adapters


class AtomicMerging(BaseTuner):
    """A tuner that merges adapters in all layers or, on an error, in none, and only what the merged model can hold."""

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, as PEFT's `merge_adapter`, in all layers or, on an error, in none.

        Raises:
            ValueError: If an adapter or a base layer cannot be merged, another module shares a weight that would be
                merged into, or with `safe_merge` if a merged weight would not be finite.
        """
        self._check_merge_allowed()
        check_merge(self.model, adapter_names, safe_merge)
        layers = self._tuner_layers()
        before = [list(layer.merged_adapters) for layer in layers]
        try:
            for layer in layers:
                with onload_layer(layer):
                    layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        except Exception:
            for layer, names in zip(reversed(layers), reversed(before), strict=True):
                if layer.merged_adapters != names:
                    with onload_layer(layer):
                        layer.unmerge()
                        if names:
                            layer.merge(adapter_names=names)
            raise

    def _tuner_layers(self) -> list[BaseTunerLayer]:
        """Return the tuner layers, of whatever method; what is inside a layer, and part of the weight it adapts, first."""
        layers = [module for module in modules_around_adapters(self.model) if isinstance(module, BaseTunerLayer)]
        return list(reversed(layers))

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> None:  # PEFT's annotation; it returns the model
        if merge:
            check_merge(self.model, adapter_names, safe_merge)
            for layer in self._tuner_layers():
                third = getattr(getattr(layer, "base_layer", None), "base_layer", None)
                # of a PeftMixedModel, where PEFT would merge the second before it; parameters' wrappers unload themselves
                if isinstance(third, BaseTunerLayer) and not hasattr(third, "unload_and_optionally_merge_module"):
                    third.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return super()._unload_and_optionally_merge(merge, progressbar, safe_merge, adapter_names)


def check_merge(model: nn.Module, adapter_names: Optional[list[str]], safe_merge: bool) -> None:
    """Raise the error that a merge would raise, and change nothing.

    Raises:
        ValueError: If an adapter cannot be merged into its layer, if the layer shares its weight with another module,
            or with `safe_merge` if a merged weight would not be finite.
    """
    merging = []
    for module in modules_around_adapters(model):
        if isinstance(module, TargetLayer):
            with onload_layer(module):
                if module.check_merge(safe_merge, adapter_names):
                    merging.append(module)
        elif safe_merge and isinstance(module, TrainableTokensLayer):
            for name in adapter_names or module.active_adapters:
                if name in module.trainable_tokens_delta:
                    check_finite(module.trainable_tokens_delta[name], [name])
    _check_not_shared(model, merging)


def _check_not_shared(model: nn.Module, layers: list[TargetLayer]) -> None:
    """Raise ValueError if one of the layers has its weight in common with another module, adapted or not.

    Merging into the one would change what the other computes. Quantized weights are replaced and not changed.
    """
    readers, outermost = defaultdict(list), {}
    places: dict[str, nn.Module] = {}
    for key, module in named_modules_around_adapters(model, remove_duplicate=False):
        name = without_wrappers(key)
        place = places.setdefault(name, module)  # a tuner layer, or the outermost of several, and what is inside
        outermost[module] = name, place
        for parameter in module._parameters.values():
            if parameter is not None and (memory := _memory(parameter)):
                storage, start, end = memory
                readers[storage].append((start, end, name, place))
    for layer in layers:
        if layer.quantization_backend is not None or (memory := _memory(layer.base_parameter)) is None:
            continue
        storage, start, end = memory
        name, place = outermost[layer]
        for other_start, other_end, other_name, other in readers[storage]:
            if other is not place and start < other_end and other_start < end:
                raise ValueError(
                    f"Cannot merge: {name} and {other_name} share one weight, so that merging an adapter of the one would "
                    "change the other too. Use the adapter unmerged, or give each a weight of its own before adapting: "
                    f"`{other_name}.weight = torch.nn.Parameter({other_name}.weight.detach().clone())`, and "
                    "`tie_word_embeddings=False` in the model's config if these are its embeddings."
                )


def _memory(parameter: torch.Tensor) -> Optional[tuple[int, int, int]]:
    """Return which memory a parameter is in: the storage, start and end; None if it is in none of its own."""
    tensor = local(parameter.data)
    if type(tensor) is not torch.Tensor or tensor.is_meta or not tensor.numel():
        return None
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return tensor.untyped_storage().data_ptr(), start, start + (last + 1) * tensor.element_size()
