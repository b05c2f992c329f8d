"""The SURM tuner."""

from __future__ import annotations

from typing import Optional

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import resolve_quantization_backend
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..base import TargetModel
from .config import SurmConfig
from .layer import Linear, SurmLayer


# What transformers' architectures call them. In LoRA's place the paper adapts query, key and value; in an adapter's
# place it follows Houlsby et al. 2019: after the last projection of attention and of the feed-forward block.
DEFAULT_TARGETS = {
    "lora": (
        "query", "key", "value", "query_proj", "key_proj", "value_proj", "q_proj", "k_proj", "v_proj", "q_lin",
        "k_lin", "v_lin", "q", "k", "v", "c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv",
    ),
    "adapter": (
        "o_proj", "out_proj", "out_lin", "o", "wo", "Wo", "c_proj", "down_proj", "fc2", "fc_out", "lin2", "ffn_output",
        "dense_4h_to_h", "attention.dense", "self_attention.dense", "self_attn.dense", "output.dense", "output_dense",
    ),
}  # fmt: skip


class SurmModel(TargetModel):
    """Adapts a model by SURM: structured unrestricted-rank matrices in LoRA's place or in an adapter's place.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`SurmConfig`]): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create the factors on the meta device, to be loaded later.

    Raises:
        ValueError: If a target module is of a kind that is not supported, or `target_modules` is None and the model
            has none of the usual names; the model is left as it was.

    Example:

        ```py
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> from hyperadapt_peft import SurmConfig

        >>> model = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base")
        >>> model = get_peft_model(model, SurmConfig(structure="circulant", task_type="SEQ_CLS"))
        ```

    Source: arXiv 2406.17740.
    """

    prefix = "surm_"
    tuner_layer_cls = SurmLayer
    supported_layers = "`torch.nn.Linear` (optionally quantized) and `transformers.pytorch_utils.Conv1D`"

    @staticmethod
    def layer_class_for(base_layer: nn.Module) -> Optional[type[SurmLayer]]:
        if isinstance(base_layer, (nn.Linear, Conv1D)):
            return Linear
        backend = resolve_quantization_backend(base_layer, get_apply_tensor_subclass=lambda: None)
        return Linear if backend is not None and backend.layer_type == "linear" else None

    def default_targets(self, config: SurmConfig) -> set[str]:  # type: ignore[override]
        endings = tuple(f".{name}" for name in DEFAULT_TARGETS[config.place])
        inside = tuple(f"{key}." for key, m in self.model.named_modules() if isinstance(m, BaseTunerLayer))
        names = {
            key
            for key, module in self.model.named_modules()
            if f".{key}".endswith(endings)
            and not key.startswith(inside)
            and self.layer_class_for(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        }
        if not names:
            raise ValueError(
                f"Please specify `target_modules`: this model has no module named as usual for place={config.place!r} "
                f"({', '.join(DEFAULT_TARGETS[config.place])})."
            )
        return names
