"""What the tuner models share: default targets, refusals before anything changes, all-or-nothing merges."""

from __future__ import annotations

import re
import warnings
from contextlib import AbstractContextManager
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar, Optional, Union

import torch
from peft import NoMatchingPeftModuleError
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    set_adapter,
)
from peft.utils import get_quantization_kwargs
from torch import nn

from .config import TargetConfig
from .experts import fused_weights, is_selected
from .layer import TargetLayer, modules_around_adapters
from .loading import (
    AtomicInjection,
    check_tensors,
    loadable_tensors,
    remove_adapter,
    state_around_adapters,
)
from .merging import AtomicMerging
from .mixed_batch import adapter_names_hooks
from .quantization import quantization_backend, unpack
from .targets import heads, outer_modules, refusal, save_heads, target_exactly


class TargetModel(AtomicInjection, AtomicMerging):
    """A tuner that puts a [`TargetLayer`] around each target module.

    Sub-classes set PEFT's `prefix` and `tuner_layer_cls`, and here `layer_classes` and `supported_layers`.
    """

    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (None means every linear layer)
    layer_classes: ClassVar[
        dict[type[nn.Module], type[TargetLayer]]
    ]  # by the base layer's; of quantized ones nn.Linear's
    supported_layers: ClassVar[str]  # named when another kind of layer is refused
    parameter_layer_cls: ClassVar[Optional[type[TargetLayer]]] = None  # of targeted parameters, if they can be

    @classmethod
    def layer_class_for(cls, base_layer: nn.Module) -> Optional[type[TargetLayer]]:
        """Return the tuner layer class for a base layer, or None if its kind is not supported."""
        backend = quantization_backend(base_layer)
        kind = nn.Linear if backend is not None and backend.layer_type == "linear" else type(base_layer)
        return next((cls.layer_classes[base] for base in kind.__mro__ if base in cls.layer_classes), None)

    @classmethod
    def default_targets(cls, config: TargetConfig, model: nn.Module) -> set[str]:
        """Return the full names of the modules that `target_modules=None` means."""
        return cls.all_linear(config, model)

    @classmethod
    def all_linear(cls, config: TargetConfig, model: nn.Module) -> set[str]:
        """Return the full names of all linear layers but those of the model's heads."""
        found: Any = SimpleNamespace(target_modules="all-linear", task_type=config.task_type)
        _maybe_include_all_linear_layers(found, model)
        routers = {weight.owner for weight in fused_weights(model)}  # Llama 4's looks like a linear layer
        return found.target_modules - routers

    @classmethod
    def resolve(cls, config: TargetConfig, model: nn.Module) -> None:
        """Write into a config what its defaults mean for a model: the names of its targets and of its new head."""
        save_heads(config, model)
        if config.target_modules is not None and config.target_modules != "all-linear":
            return
        names = (cls.all_linear if config.target_modules else cls.default_targets)(config, model)
        ends = tuple(f"{head}." for head in heads(model))
        names = {name for name in names if is_selected(config, name) and not f"{name}.".startswith(ends)}
        refused = {name: reason for name in names if (reason := refusal(model, name))}
        for reason in sorted(set(refused.values())):
            like = sorted({re.sub(r"\b\d+\b", "*", name) for name in refused if refused[name] == reason})
            warnings.warn(f"Not adapted, because {reason}: {', '.join(like)}")
        target_exactly(names - refused.keys(), config, model)
        if not config.target_modules and not getattr(config, "target_parameters", None):
            raise NoMatchingPeftModuleError(
                "By default nothing of this model is adapted: all its linear layers, if it has any, are its head, "
                "excluded, in other layers than asked for or not supported. Please specify `target_modules`."
            )

    @classmethod
    def check(cls, config: TargetConfig, model: nn.Module) -> None:
        """Raise ValueError if a config's target is not supported, before the first layer is replaced."""
        for key, module in outer_modules(model):
            if not cls._check_target_module_exists(config, key):
                continue
            _layer_class(config, module, key)
            if reason := refusal(model, key):
                raise ValueError(
                    f"Target module {key} is not supported: {reason}. Leave it out of `target_modules` or name it in "
                    "`exclude_modules`."
                )

    # `self` may be a MixedModel in the next three, so nothing of our own is looked up on it

    def _prepare_adapter_config(self, peft_config: TargetConfig, model_config: dict) -> TargetConfig:  # type: ignore[override]
        _tuner(peft_config).resolve(peft_config, self.model)
        return peft_config

    def _prepare_model(self, peft_config: TargetConfig, model: nn.Module) -> None:  # type: ignore[override]
        _tuner(peft_config).check(peft_config, model)

    def _create_and_replace(  # type: ignore[override]
        self,
        config: TargetConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        *,
        parameter_name: Optional[str] = None,
    ) -> None:
        tuner: Any = _tuner(config)
        if isinstance(target, tuner.tuner_layer_cls) and parameter_name in (None, target.parameter_name):
            target.update_layer(adapter_name, config)
            return
        layer_cls: Any
        if parameter_name is None:
            layer_cls = _layer_class(config, target, current_key)
        else:
            layer_cls = partial(tuner.parameter_layer_cls, parameter_name=parameter_name)
        new_module = layer_cls(target, adapter_name, config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            new_module.set_adapter([])  # an additional adapter is not trained, and not used, before it is set
        new_module.train(target.training)
        self._replace_module(parent, target_name, new_module, target)

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        try:
            return super()._get_module_names_tied_with_embedding()
        except NotImplementedError:  # of a model without input embeddings
            return []

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer has moved its adapter to the base layer's device already, and unloading restores the base layer
        # itself: none of the base class's repairs apply, and they break TrainableTokensWrapper.
        setattr(parent, child_name, new_module)

    def set_adapter(self, adapter_name: Union[str, list[str]], inference_mode: bool = False) -> None:
        """Set the active adapters, as PEFT's `set_adapter`, which would look for layers inside every adapter too."""
        outside: Any = SimpleNamespace(modules=lambda: modules_around_adapters(self.model))
        set_adapter(outside, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_scale(self, adapter_name: str, scale: float) -> None:
        """Use an adapter at another strength: 0 is the base model, 1 the adapter as trained.

        The strength holds for forward and merging; it is not saved.

        Args:
            adapter_name (`str`): The adapter.
            scale (`float`): Its strength, of any sign.

        Raises:
            ValueError: If the adapter is unknown, or merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found, available adapters: {sorted(self.peft_config)}")
        layers = [layer for layer in modules_around_adapters(self.model) if isinstance(layer, TargetLayer)]
        if any(adapter_name in layer.merged_adapters for layer in layers):
            raise ValueError(f"The adapter {adapter_name} is merged; call `unmerge_adapter` first.")
        for layer in layers:
            layer.set_scale(adapter_name, scale)

    def train(self, mode: bool = True) -> TargetModel:
        """Set the training mode, as `torch.nn.Module.train`, and undo what bitsandbytes has done for evaluation alone."""
        if mode:  # also in layers without an adapter: gradients for those before must pass them
            for module in modules_around_adapters(self.model):
                unpack(module)
        return super().train(mode)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        return adapter_names_hooks(self, kwargs.pop("adapter_names", None), kwargs)

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: TargetConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # before anything is loaded: PEFT loads what fits, says little of what does not, and takes NaN
        trainable, config.trainable_before = config.trainable_before, None
        try:
            state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
            state = state_around_adapters(model, adapter_name)
            required, optional = loadable_tensors(model, adapter_name, state)
            # where the layers were injected without a PeftModel around them, PEFT removes its prefix after this hook
            known = {**state, **optional}
            given = {
                key if key in known else key.removeprefix("base_model.model."): v for key, v in state_dict.items()
            }
            check_tensors(required, given, optional)
        except BaseException:
            if trainable is not None:  # PEFT has added the adapter for this load
                remove_adapter(model, adapter_name, trainable)
            raise
        return state_dict


def _layer_class(config: TargetConfig, target: nn.Module, key: str) -> type[TargetLayer]:
    """Return the tuner layer class for a target module, or raise ValueError naming the module and what would do."""
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_cls = _tuner(config).layer_class_for(base_layer)
    if layer_cls is None:
        raise ValueError(
            f"Target module {key} is not supported: it is a {type(base_layer).__module__}."
            f"{type(base_layer).__qualname__}. {type(config).__name__} adapts {_tuner(config).supported_layers}."
        )
    return layer_cls


def _tuner(config: TargetConfig) -> type[TargetModel]:
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # type: ignore[index, return-value]
