"""Replacing an adapter's values in place, so that a compiled model goes on without compiling again."""

from __future__ import annotations

from typing import Any, Optional

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights

from ..tuners.common.loading import check_tensors, config_differences


def hotswap_adapter(
    model: PeftModel,
    model_name_or_path: str,
    adapter_name: str = "default",
    torch_device: Optional[str] = None,
    **kwargs: Any,
) -> None:
    """Put the values of a saved adapter in the place of a loaded one. PEFT's function of this name is for LoRA only.

    No tensor is replaced, only its values, so a model from `torch.compile` needs no recompilation. The new adapter must
    have the same config and shapes; a different one is loaded by `model.load_adapter` as ever.

    Args:
        model (`PeftModel`): The model with the loaded adapter, possibly compiled.
        model_name_or_path (`str`): The directory or Hub id of the new adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter whose values are replaced.
        torch_device (`Optional[str]`):
            The device to read the file to, the CPU if `None`; the values are checked there before they are copied.
        **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, ... for loading.

    Raises:
        RuntimeError: If a tensor has another shape.
        ValueError: If there is no such adapter, it is merged, or the new one does not fit otherwise. Nothing has
            changed in any of these cases.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    if adapter_name not in model.peft_config:
        raise ValueError(f"Adapter {adapter_name} not found, available adapters: {sorted(model.peft_config)}")
    if any(isinstance(m, BaseTunerLayer) and adapter_name in m.merged_adapters for m in model.modules()):
        raise ValueError(f"The adapter {adapter_name} is merged; call `unmerge_adapter` first.")
    new = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    for key, (old_value, new_value) in config_differences(model.peft_config[adapter_name], new).items():
        raise ValueError(f"The new adapter has {key}={new_value!r} where the loaded one has {old_value!r}.")
    current = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
    loaded = load_peft_weights(model_name_or_path, device=torch_device or "cpu", **kwargs)
    check_tensors(current, loaded)
    with torch.no_grad():
        for key, tensor in current.items():
            tensor.copy_(loaded[key])
