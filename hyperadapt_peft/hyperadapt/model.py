"""The HyperAdapt tuner."""

from __future__ import annotations

from typing import Optional

from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base import TargetModel
from .layer import Conv, Embedding, HyperAdaptLayer, Linear


class HyperAdaptModel(TargetModel):
    """Adapts a model by HyperAdapt: `W' = A W B` with trained diagonal matrices, n + m numbers for an n x m weight.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`HyperAdaptConfig`]): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create the scales on the meta device, to be loaded later.

    Raises:
        ValueError: If a target module is of a kind that is not supported; the model is left as it was.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForCausalLM
        >>> from hyperadapt_peft import HyperAdaptConfig

        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M")
        >>> model = get_peft_model(model, HyperAdaptConfig(task_type="CAUSAL_LM"))
        ```

    Source: arXiv 2509.18629.
    """

    prefix = "hyperadapt_"
    tuner_layer_cls = HyperAdaptLayer
    supported_layers = (
        "`torch.nn.Linear` (optionally quantized), `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
        "`torch.nn.Conv3d` and `transformers.pytorch_utils.Conv1D`"
    )

    @staticmethod
    def layer_class_for(base_layer: nn.Module) -> Optional[type[HyperAdaptLayer]]:
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            return Linear
        if isinstance(base_layer, nn.Embedding):
            return Embedding
        if isinstance(base_layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
            return Conv
        backend = resolve_quantization_backend(base_layer, get_apply_tensor_subclass=lambda: None)
        return Linear if backend is not None and backend.layer_type == "linear" else None
