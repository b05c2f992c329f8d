"""transformers' own loading of adapters, which checks nothing and undoes nothing."""

from __future__ import annotations

from functools import wraps
from typing import Any, cast

import torch
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from ..tuners.common.config import TargetConfig
from ..tuners.common.loading import all_or_nothing, check_tensors, loadable_tensors


def check_loading() -> None:
    """Make `model.load_adapter` of transformers refuse what PEFT's loading refuses, and leave no trace of it.

    It has no hook for the weights, and puts an adapter's layers into the model before it reads them. So the method is
    wrapped, in memory and once; other methods' adapters are loaded exactly as they were.
    """
    mixin = cast(Any, PeftAdapterMixin)
    load = getattr(mixin.load_adapter, "unchecked", mixin.load_adapter)

    @wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            adapters = set(getattr(self, "peft_config", ()))
            parameters = [(module, dict(module._parameters)) for module in self.modules()]
            info = load(self, *args, **kwargs)
            for adapter_name in set(getattr(self, "peft_config", ())) - adapters:
                _check_loaded(self, adapter_name, info, parameters)
            return info

    cast(Any, load_adapter).unchecked = load
    mixin.load_adapter = load_adapter


def _check_loaded(
    model: nn.Module, adapter_name: str, info: Any, parameters: list[tuple[nn.Module, dict[str, Any]]]
) -> None:
    """Check what transformers has loaded as one of our adapters: `parameters` is what the modules had before."""
    config = model.peft_config[adapter_name]  # type: ignore[index]
    if not isinstance(config, TargetConfig):
        return
    state = model.state_dict()
    required, optional = loadable_tensors(model, adapter_name, state)
    names = {module: name for name, module in model.named_modules()}
    replaced = {
        f"{names[module]}.{key}"
        for module, old in parameters
        for key, parameter in module._parameters.items()
        if old.get(key) is not parameter
    }
    given = {*required, *replaced, *info.unexpected_keys}.difference(info.missing_keys)
    check_tensors(required, {name: state.get(name, torch.empty(0)) for name in given}, optional)
