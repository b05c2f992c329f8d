"""The HyperAdapt tuner."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import cast

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..common import TargetModel
from ..common.config import check_adapter_name
from ..common.experts import fused_targets, targeted_parameters, without_wrappers
from ..common.loading import taken_names
from ..common.targets import outer_modules, target_exactly
from . import algebra
from .config import HyperAdaptConfig
from .experts import ParamWrapper
from .layer import Conv, Embedding, HyperAdaptLayer, Linear


class HyperAdaptModel(TargetModel):
    """Adapts a model by HyperAdapt: `W' = A W B` with trained diagonal matrices, n + m numbers for an n x m weight.

    Args:
        model (`torch.nn.Module`): The model to be adapted.
        config ([`HyperAdaptConfig`]): The configuration of the adapter.
        adapter_name (`str`, defaults to `"default"`): The adapter's name.
        low_cpu_mem_usage (`bool`, defaults to `False`): Create the scales on the meta device, to be loaded later.

    Raises:
        ValueError: If a target module or parameter is of a kind that is not supported; the model is left as it was.

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
    parameter_layer_cls = ParamWrapper
    layer_classes = {  # noqa: RUF012
        nn.Linear: Linear, Conv1D: Linear, nn.Embedding: Embedding, nn.Conv1d: Conv, nn.Conv2d: Conv, nn.Conv3d: Conv
    }  # fmt: skip
    supported_layers = (
        "`torch.nn.Linear` (optionally quantized), `torch.nn.Embedding`, `torch.nn.Conv1d`, `torch.nn.Conv2d`, "
        "`torch.nn.Conv3d` and `transformers.pytorch_utils.Conv1D`"
    )

    @classmethod
    def all_linear(cls, config: HyperAdaptConfig, model: nn.Module) -> set[str]:  # type: ignore[override]
        # but what is named as a parameter is adapted as one
        return super().all_linear(config, model) - targeted_parameters(model, config.target_parameters or []).keys()

    @classmethod
    def resolve(cls, config: HyperAdaptConfig, model: nn.Module) -> None:  # type: ignore[override]
        if config.target_modules is None and config.target_parameters:
            config.target_modules = set()  # what is named is all that is adapted
        if config.target_parameters is None:
            cls._resolve_fused(config, model)
        super().resolve(config, model)

    @classmethod
    def _resolve_fused(cls, config: HyperAdaptConfig, model: nn.Module) -> None:
        """Name in `config` the parameters that stand for target modules, and not their modules."""
        asked = fused_targets(config, model)
        for weight, missing in asked.items():
            if missing:
                raise ValueError(
                    f"`target_modules` names some of the layers that are one parameter now, {weight.name}, but not "
                    f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}. Name all of them, or name the "
                    "parameter in `target_parameters`, or set `target_parameters=[]` to leave it as it is."
                )
        config.target_parameters = sorted(weight.name for weight in asked)
        if asked and config.target_modules not in (None, "all-linear"):
            names = {key for key, _ in outer_modules(model) if cls._check_target_module_exists(config, key)}
            target_exactly(names - {weight.owner for weight in asked}, config, model)

    @classmethod
    def check(cls, config: HyperAdaptConfig, model: nn.Module) -> None:  # type: ignore[override]
        super().check(config, model)
        for owner, names in targeted_parameters(model, config.target_parameters or []).items():
            if not owner:
                raise ValueError(
                    f"Targeting an nn.Parameter on the top-level module is not supported (parameter '{names[0]}')."
                )
            module = model.get_submodule(owner)
            if cls._check_target_module_exists(config, owner):
                raise ValueError(f"{owner} cannot be in `target_modules` and its {names[0]} in `target_parameters`.")
            cls._check_parameters(module, owner, names, config)

    @staticmethod
    def _check_parameters(module: nn.Module, owner: str, names: list[str], config: HyperAdaptConfig) -> None:
        adapted = []
        while isinstance(module, ParamWrapper):
            adapted.append(module.parameter_name)
            module = module.base_layer
        if adapted and set(adapted) != set(names):
            # the names of what is saved depend on how the wrappers are nested
            raise ValueError(
                f"Of the parameters of one module, all adapters must target the same set of parameters: {owner} has "
                f"adapters of {', '.join(sorted(adapted))}, and the new adapter targets {', '.join(sorted(names))}."
            )
        for name in names:  # raises what it would raise later
            ParamWrapper(module, "check", replace(config, inference_mode=True), parameter_name=name)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "linear"
    ) -> None:
        """Make a new, inactive adapter from existing ones; named as PEFT's LoRA names it.

        The combination is computed in a canonical gauge, so it depends on the adapters' updates and not on how they
        are split between rows and columns. The new adapter has the first one's `alpha`. The weights (1, 0) give the
        first adapter, and equal adapters whose weights sum to 1 give themselves, for the first two types.

        Args:
            adapters (`list[str]`): The adapters to combine.
            weights (`list[float]`): One weight for each, of any sign.
            adapter_name (`str`): The name of the new adapter.
            combination_type (`str`, defaults to `"linear"`):
                Of the scales `1 + d_k`, where `d_k` is the trained numbers times the adapter's `alpha`: `"linear"` gives
                `1 + sum w_k d_k`; `"log"` gives `prod (1 + d_k) ** w_k`, for which all scales must be positive;
                `"product"` gives `prod (1 + w_k d_k)`, which is the adapters active together at the strengths w_k.

        Raises:
            ValueError: If an adapter is unknown, has more than scales (`modules_to_save`, `trainable_token_indices`,
                `bias`), the new name is taken, or the scales do not allow the type. Nothing has changed then.
        """
        if len(adapters) != len(weights) or not adapters:
            raise ValueError(f"There must be one weight per adapter, got {len(adapters)} and {len(weights)}.")
        self._add_combination(
            adapters, adapter_name, lambda offsets: algebra.combine(offsets, weights, combination_type)
        )

    def invert_adapter(self, adapter: str, adapter_name: str) -> None:
        """Make a new, inactive adapter of the scales `1 / (1 + d)`: active together, the two are the identity.

        Args:
            adapter (`str`): The adapter to invert.
            adapter_name (`str`): The name of the new adapter.

        Raises:
            ValueError: If a scale is zero, or as in `add_weighted_adapter`. Nothing has changed then.
        """
        self._add_combination(
            [adapter], adapter_name, lambda offsets: (algebra.invert(offsets[0][0]), algebra.invert(offsets[0][1]))
        )

    def _add_combination(
        self, adapters: list[str], adapter_name: str, combine: Callable[[list[algebra.Offsets]], algebra.Offsets]
    ) -> None:
        if unknown := [name for name in adapters if name not in self.peft_config]:
            raise ValueError(f"Adapter(s) {unknown} not found, available adapters: {sorted(self.peft_config)}")
        check_adapter_name(adapter_name, taken_names(self.model, self.tuner_layer_cls))
        if adapter_name in self.peft_config:
            raise ValueError(f"There is already an adapter called {adapter_name}.")
        configs = cast(list[HyperAdaptConfig], [self.peft_config[name] for name in adapters])
        for name, config in zip(adapters, configs, strict=True):
            if config.modules_to_save or config.trainable_token_indices or config.bias != "none":
                raise ValueError(f"The adapter {name} has trained more than scales, which cannot be combined.")

        results = {}
        for key, layer in self.model.named_modules():
            if isinstance(layer, HyperAdaptLayer) and layer._get_available_adapters() & set(adapters):
                try:
                    results[key] = combine([layer.get_offsets(name) for name in adapters])
                except ValueError as exc:
                    raise ValueError(f"{key}: {exc}") from None

        layers = {key: cast(HyperAdaptLayer, self.model.get_submodule(key)) for key in results}
        parameters = {key for key, layer in layers.items() if isinstance(layer, ParamWrapper)}
        sides = {config.sides for config in configs}
        config = replace(
            configs[0],
            sides=sides.pop() if len(sides) == 1 else "both",
            target_parameters=sorted(f"{without_wrappers(key)}.{layers[key].parameter_name}" for key in parameters),
            exclude_modules=None,
            inference_mode=True,
        )
        target_exactly(results.keys() - parameters, config, self.model)
        self.peft_config[adapter_name] = config
        for key, offsets in results.items():
            layers[key].add_offsets(adapter_name, config, *offsets)
