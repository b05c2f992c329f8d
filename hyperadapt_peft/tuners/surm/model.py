"""The SURM tuner."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Optional, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from tqdm import tqdm
from transformers.pytorch_utils import Conv1D

from ..common import TargetLayer, TargetModel
from ..common.experts import fused_targets
from ..common.targets import outer_modules
from .config import SurmConfig
from .layer import Linear, SurmLayer
from .nearest import nearest


# What transformers' architectures call the last projections of attention and of the feed-forward block, after which
# Houlsby et al. 2019 put their adapters.
HOULSBY_SITES = (
    "o_proj", "out_proj", "out_lin", "o", "wo", "Wo", "c_proj", "down_proj", "fc2", "fc_out", "lin2", "ffn_output",
    "dense_4h_to_h", "attention.dense", "self_attention.dense", "self_attn.dense", "output.dense", "output_dense",
)  # fmt: skip


class SurmModel(TargetModel):
    """Adapts a model by SURM: structured unrestricted-rank matrices parallel to its layers, or after them.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`SurmConfig`]): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create the factors on the meta device, to be loaded later.

    Raises:
        ValueError: If a target module is of a kind that is not supported, or `target_modules` is None for a sequential
            adapter and the model has none of the usual names; the model is left as it was.

    Example:
        ```py
        >>> from peft import get_peft_model
        >>> from transformers import AutoModelForSequenceClassification
        >>> from hyperadapt_peft import SurmConfig

        >>> model = AutoModelForSequenceClassification.from_pretrained("FacebookAI/roberta-base")
        >>> model = get_peft_model(model, SurmConfig(task_type="SEQ_CLS"))
        ```

    Source: arXiv 2406.17740.
    """

    prefix = "surm_"
    tuner_layer_cls = SurmLayer
    layer_classes = {nn.Linear: Linear, Conv1D: Linear}  # noqa: RUF012
    supported_layers = (
        "`torch.nn.Linear` (optionally quantized) and `transformers.pytorch_utils.Conv1D`, of real weights"
    )

    @classmethod
    def layer_class_for(cls, base_layer: nn.Module) -> Optional[type[TargetLayer]]:
        weight = getattr(base_layer, "weight", None)
        return (
            None if isinstance(weight, torch.Tensor) and weight.is_complex() else super().layer_class_for(base_layer)
        )

    @classmethod
    def default_targets(cls, config: SurmConfig, model: nn.Module) -> set[str]:  # type: ignore[override]
        if config.placement == "parallel":
            return super().default_targets(config, model)
        endings = tuple(f".{name}" for name in HOULSBY_SITES)
        names = {
            key
            for key, module in outer_modules(model)
            if f".{key}".endswith(endings)
            and cls.layer_class_for(module.get_base_layer() if isinstance(module, BaseTunerLayer) else module)
        }
        if not names:
            raise ValueError(
                "Please specify `target_modules`: this model has no module named as usual for placement='sequential' "
                f"({', '.join(HOULSBY_SITES)})."
            )
        return names

    @classmethod
    def resolve(cls, config: SurmConfig, model: nn.Module) -> None:  # type: ignore[override]
        asked = config
        if config.target_modules is None and config.placement == "sequential":
            asked = replace(config, target_modules=set(HOULSBY_SITES))
        fused = fused_targets(asked, model)
        if fused and not config.inference_mode:
            names = ", ".join(sorted(weight.name for weight in fused))
            warnings.warn(f"Not adapted, because these parameters of fused experts are no layers: {names}")
        super().resolve(config, model)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: SurmConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        renamed = {  # format 1
            key.replace(".surm_first.", ".surm_A.").replace(".surm_second.", ".surm_B."): value
            for key, value in state_dict.items()
        }
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, renamed)

    def init_from_updates(
        self, updates: Mapping[str, torch.Tensor], adapter_name: str = "default", progress: bool = False
    ) -> dict[str, float]:
        """Start a parallel adapter from the structured matrices nearest to given updates.

        Args:
            updates (`Mapping[str, torch.Tensor]`):
                Module name -> the matrix dW (out, in) to approximate, for instance what another adapter's
                `get_delta_weight` gives. Modules that are not named keep their factors.
            adapter_name (`str`, defaults to `"default"`): The adapter.
            progress (`bool`, defaults to `False`): Show a bar.

        Returns:
            Module name -> the relative error of the approximation, in the Frobenius norm. It tells which structure
            suits an update.

        Raises:
            ValueError: If a module has no such parallel adapter, or an update has the wrong shape or is not finite.
                Nothing has changed then.
        """
        found = {}
        for name, update in tqdm(updates.items(), disable=not progress, desc="nearest"):
            layer = dict(self.model.named_modules()).get(name)
            config = layer.surm_config.get(adapter_name) if isinstance(layer, SurmLayer) else None
            if layer is None or config is None or config.placement != "parallel" or config.alpha == 0:
                raise ValueError(f"{name} has no parallel adapter {adapter_name} to start.")
            if tuple(update.shape) != layer.matrix_shape(adapter_name):
                raise ValueError(f"{name} needs {layer.matrix_shape(adapter_name)}, got {tuple(update.shape)}.")
            found[name] = nearest(update / config.alpha, layer.surm_structure[adapter_name])
        for name, result in found.items():
            layer = cast(SurmLayer, self.model.get_submodule(name))
            for factors, value in zip((layer.surm_A, layer.surm_B), result.factors, strict=True):
                factors[adapter_name].get_parameter("weight").data.copy_(value)
        return {name: result.error for name, result in found.items()}
