"""How much of an adapter PEFT's conversion to LoRA keeps."""

from __future__ import annotations

import torch
from peft import PeftModel

from ..tuners.common import TargetLayer


@torch.no_grad()
def lora_energy(model: PeftModel, rank: int, adapter_name: str = "default") -> dict[str, float]:
    """Return the part of each layer's update that a LoRA of this rank can keep, as `convert_to_lora` makes it.

    PEFT's `save_as_lora` and `convert_to_lora` take the best approximation of each update `dW` of the given rank, its
    largest singular values. The part they keep is the sum of those values' squares over the sum of all, which is
    `1 - ||dW - B A||^2 / ||dW||^2` in the Frobenius norm. Conversion by a `float` chooses the rank of each layer by the
    same measure.

    Args:
        model (`PeftModel`): The adapted model.
        rank (`int`): LoRA's rank.
        adapter_name (`str`, defaults to `"default"`): The adapter.

    Returns:
        The kept part, from 0 to 1, by the names of the adapted modules. A layer without an update keeps 1.

    Raises:
        ValueError: If there is no such adapter, the rank is not positive, or a layer is of a kind that no LoRA of PEFT's
            conversion can hold.
    """
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} not found, available adapters: {sorted(model.peft_config)}")
    if rank < 1:
        raise ValueError(f"`rank` must be at least 1, not {rank}.")
    kept = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, TargetLayer) or adapter_name not in layer._get_available_adapters():
            continue
        if not layer.supports_lora_conversion(adapter_name):
            raise ValueError(f"{name} cannot be converted to LoRA: it is a {type(layer.get_base_layer()).__name__}.")
        energy = torch.linalg.svdvals(layer.get_delta_weight(adapter_name).float()).square()
        kept[name] = float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0
    return kept
