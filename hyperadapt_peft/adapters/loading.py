"""Loading very many adapters, reading the model once per kind of adapter rather than ten times per adapter."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import Any, Union, cast

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import ModulesToSaveWrapper, load_peft_weights
from torch import nn

from ..tuners.common import TargetConfig, TargetLayer, TargetModel
from ..tuners.common.layer import modules_around_adapters
from ..tuners.common.loading import IRRELEVANT_FIELDS, check_tensors, config_differences, remove_adapter


def load_adapters(model: PeftModel, adapters: Mapping[str, Union[str, os.PathLike]], **kwargs: Any) -> None:
    """Load many saved adapters, all or none; the active adapter stays active.

    The same as `model.load_adapter(path, name)` for each, whose time grows with the number of adapters already there:
    with 1,000 it takes half a minute for one more. Here only the first adapter of each config is loaded so, and the
    others are copies of it with values of their own.

    Args:
        model (`PeftModel`): The model, adapted by a tuner of this package.
        adapters (`Mapping[str, Union[str, os.PathLike]]`): The directory or Hub id of each adapter, by its new name.
        **kwargs: `revision`, `subfolder`, `token`, `cache_dir`, ... for loading.

    Raises:
        TypeError: If the model's tuner is not of this package.
        ValueError: If a name is taken or an adapter cannot be loaded; the message names it. No adapter is loaded then.
    """
    model = getattr(model, "_orig_mod", model)  # a compiled model's own
    if not isinstance(model.base_model, TargetModel):
        raise TypeError(f"load_adapters is for the tuners of hyperadapt_peft, not for {type(model.base_model)}.")
    if taken := sorted(adapters.keys() & model.peft_config.keys()):
        raise ValueError(f"There are already adapters called {taken}.")
    templates: list[_Template] = []
    copies = []
    for name, path in adapters.items():
        path = os.fspath(path)
        try:
            config = cast(TargetConfig, PeftConfig.from_pretrained(path, **kwargs))
            template = next((t for t in templates if not config_differences(t.saved_config, config)), None)
            if template is None:
                model.load_adapter(path, name, **kwargs)
                if config.bias == "none" and config.trainable_token_indices is None:  # which have places of their own
                    templates.append(_Template(model, name, config))
            else:
                weights = load_peft_weights(path, device="cpu", **kwargs)
                copies.append((name, config, template, template.parameters_from(weights)))
        except BaseException as exc:
            for loaded in adapters.keys() & model.peft_config.keys():
                remove_adapter(model, loaded)
            if not isinstance(exc, Exception):
                raise
            raise ValueError(f"The adapter {name} of {path} cannot be loaded, and so none was: {exc}") from exc
    for name, config, template, parameters in copies:
        template.copy_as(name, config, parameters)


class _Template:
    """An adapter of the model, of which adapters with the same config are copies but for their values."""

    def __init__(self, model: PeftModel, adapter_name: str, saved_config: TargetConfig) -> None:
        self.adapter_name, self.saved_config, self.configs = adapter_name, saved_config, model.peft_config
        self.tensors = get_peft_model_state_dict(model, adapter_name=adapter_name, save_embedding_layers=False)
        self.containers: list[Any] = []  # of the adapter's modules and settings, by adapter names
        self.wrappers: list[ModulesToSaveWrapper] = []
        for module in modules_around_adapters(model):
            if isinstance(module, TargetLayer):
                own = (getattr(module, attribute) for attribute in module.own_names)
                self.containers += [container for container in own if adapter_name in container]
            elif isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
                self.containers.append(module.modules_to_save)
                self.wrappers.append(module)
        modules = [c[adapter_name] for c in self.containers if isinstance(c, nn.ModuleDict)]
        by_address = {p.data_ptr(): p for module in modules for p in module.parameters()}
        self.parameters = {key: by_address[tensor.data_ptr()] for key, tensor in self.tensors.items()}

    def parameters_from(self, weights: dict) -> dict[str, nn.Parameter]:
        """Return the frozen parameters of an adapter with the checked values of its file."""
        check_tensors(self.tensors, weights)
        return {
            key: nn.Parameter(weights[key].to(p, copy=True), requires_grad=False) for key, p in self.parameters.items()
        }

    def copy_as(self, name: str, config: TargetConfig, parameters: dict[str, nn.Parameter]) -> None:
        """Add an adapter to the model: its modules are this one's with other parameters."""
        replaced = {id(p): parameters[key] for key, p in self.parameters.items()}
        for container in self.containers:
            container[name] = copy.deepcopy(container[self.adapter_name], replaced)
        for wrapper in self.wrappers:
            wrapper._adapters.add(name)
        own = {field: getattr(config, field) for field in IRRELEVANT_FIELDS - {"inference_mode"}}
        self.configs[name] = copy.copy(self.configs[self.adapter_name])
        self.configs[name].__dict__.update(own)
