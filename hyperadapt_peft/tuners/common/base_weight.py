"""Writing merged weights and taking them out again, exactly, whoever else merges into the same weight."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Optional

import torch
from torch.utils.weak import WeakIdKeyDictionary


if TYPE_CHECKING:
    from .layer import TargetLayer


class SavedWeight:
    """A base weight from before the first merge into it, on the CPU: one for all the layers that merge into it."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.weight = on_cpu(weight)
        self.layers = 0  # how many of our layers have merged
        self.written: Optional[int] = fingerprint(weight)  # None once others have written as well

    def is_ours(self, weight: torch.Tensor) -> bool:
        """Whether the weight as it is now is what our layers alone have made of it."""
        if self.written != fingerprint(weight):
            self.written = None
        return self.written is not None


# By parameter; a saved weight lives as long as one of the layers that have merged.
_saved_weights = WeakIdKeyDictionary()


class MergedWeight:
    """One layer's part in what is merged into a base weight.

    The weight may be another module's too, and tuner layers sit around each other. So others may have merged into it
    before, may do so later, and unmerge in any order.
    """

    def __init__(self, layer: TargetLayer) -> None:
        parameter = layer.base_parameter
        reference = _saved_weights.get(parameter)
        saved = None if reference is None else reference()
        if saved is None:
            saved = SavedWeight(parameter.data)
            _saved_weights[parameter] = weakref.ref(saved)
        self.saved = saved
        self.before = on_cpu(parameter.data) if saved.layers else saved.weight

    def unmerged(self, layer: TargetLayer) -> torch.Tensor:
        """Return the weight from before the layer's first merge."""
        weight = layer.base_parameter.data.clone()
        local(weight).copy_(self.before)
        return weight

    def write(self, layer: TargetLayer, adapter_names: list[str], check: bool = False) -> None:
        """Merge these adapters in the place of the layer's that are merged now, if any.

        Raises:
            ValueError: If the weight does not keep what is written to it, or with `check` if that were not finite.
        """
        weight, old = layer.base_parameter.data, layer.merged_adapters
        ours = self.saved.is_ours(weight)
        alone = ours and self.saved.layers == 1
        if alone and not adapter_names:
            merged = self.saved.weight
        else:
            before = self.unmerged(layer)
            merged = layer.adapted_weight(before, adapter_names)
            if old and not (alone and self.before is self.saved.weight):  # what others have merged stays
                merged = weight + (merged - layer.adapted_weight(before, old))
            merged = merged.to(weight.dtype)
        if check:
            check_finite(merged, adapter_names)
        local(weight).copy_(local(merged))
        written = fingerprint(weight)
        if written != fingerprint(merged):
            local(weight).copy_(self.before)
            raise ValueError(f"The weight of a {type(layer.get_base_layer()).__name__} does not keep what is merged.")
        self.saved.written = written if ours else None
        self.saved.layers += (not old) - (not adapter_names)


def check_finite(weight: torch.Tensor, adapter_names: list[str]) -> None:
    """Raise ValueError naming the adapters if the weight with them is not finite."""
    if not torch.isfinite(weight).all():
        raise ValueError(
            f"NaNs detected in the merged weights. The adapter {', '.join(adapter_names)} seems to be broken"
        )


def fingerprint(tensor: torch.Tensor) -> int:
    """Return the sum of a tensor's bytes, taken as integers of 64 bits: the same for the same bits, on any device."""
    flat = local(tensor).contiguous().flatten()
    missing = -flat.nbytes % 8 // flat.element_size()
    if missing or flat.storage_offset() * flat.element_size() % 8:
        flat = torch.cat([flat, flat.new_zeros(missing)])
    return int(flat.view(torch.int64).sum())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor itself or, of one that FSDP2 has sharded, this process's shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the CPU; of a sharded tensor, of this process's shard."""
    return local(tensor).to("cpu", copy=True)
