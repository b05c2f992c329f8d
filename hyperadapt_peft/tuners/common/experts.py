"""Weights that transformers keeps outside linear layers since version 5: those of fused experts and of their routers."""

from __future__ import annotations

from copy import copy
from typing import NamedTuple

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from .config import TargetConfig
from .layer import named_modules_around_adapters


class FusedWeight(NamedTuple):
    """A parameter in the place of linear layers.

    `name` is its full name, `owner` that of its module. `layers` are the names that the linear layers had before, in
    the alternatives that there are, and its own.
    """

    name: str
    owner: str
    layers: tuple[tuple[str, ...], ...]


# What experts' linear layers were called that are one parameter now; another parameter stands for a layer of its name.
_LAYERS = {"gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")), "down_proj": (("down_proj",), ("w2",))}


def fused_weights(model: nn.Module) -> list[FusedWeight]:
    """Return the (E, n, m) parameters of the model's fused experts and the (E, m) weights of the routers beside them.

    Experts are what transformers calls so, a class named `...Experts` that holds parameters of three dimensions. A
    router that is an ordinary linear layer is not among the results.
    """
    modules = {
        without_wrappers(key): m
        for key, m in named_modules_around_adapters(model)
        if not isinstance(m, BaseTunerLayer)
    }
    found = {}
    for owner, module in modules.items():
        if "Experts" not in type(module).__name__:
            continue
        for leaf, parameter in module.named_parameters(recurse=False):
            if parameter.dim() != 3 or not parameter.is_floating_point():
                continue
            name, count = f"{owner}.{leaf}", len(parameter)
            layers = _LAYERS.get(leaf, ((leaf,),))
            old = (tuple(f"{owner}.{i}.{layer}" for i in range(count) for layer in names) for names in layers)
            found[name] = FusedWeight(name, owner, (*old, (name,)))
            for key, sibling in modules.items():
                if key != owner and _parent(key) == _parent(owner) and _is_router(sibling, count):
                    found[f"{key}.weight"] = FusedWeight(f"{key}.weight", key, ((key,),))
    return list(found.values())


def fused_targets(config: TargetConfig, model: nn.Module) -> dict[FusedWeight, list[str]]:
    """Return the fused weights that a config asks for, each with those of their layers that it leaves out.

    `target_modules` asks for all weights if it is None or "all-linear", else for those whose layers it matched before
    they were fused. Exclusions and `layers_to_transform` hold.
    """
    asked: dict[FusedWeight, list[str]] = {}
    for weight in fused_weights(model):
        if not is_selected(config, weight.owner) or not is_selected(config, weight.name):
            continue
        if config.target_modules in (None, "all-linear"):
            asked[weight] = []
            continue
        for layers in weight.layers:
            matched = {layer for layer in layers if check_target_module_exists(config, layer)}
            if matched:
                asked[weight] = sorted(set(layers) - matched)
                break
    return asked


def targeted_parameters(model: nn.Module, target_parameters: list[str]) -> dict[str, list[str]]:
    """Return the full names of the modules that own a targeted parameter, each with its parameters, as PEFT finds them.

    Raises:
        ValueError: If a targeted parameter is parametrized already.
    """
    found: dict[str, list[str]] = {}
    endings = tuple(f".{target}" for target in target_parameters)
    for key, module in named_modules_around_adapters(model):
        owner = without_wrappers(key)
        for name in getattr(module, "parametrizations", ()):
            if f"{owner}.{name}" in target_parameters:
                raise ValueError(f"Target parameter {owner}.{name} is not supported: it is parametrized already.")
        for name, _ in module.named_parameters(recurse=False):
            if f"{owner}.{name}" in target_parameters or f"{owner}.{name}".endswith(endings):
                found.setdefault(owner, []).append(name)
    return found


def is_selected(config: TargetConfig, key: str) -> bool:
    """Return whether a name is neither excluded nor in a layer that is not adapted, whatever the targets are."""
    everything = copy(config)
    everything.target_modules = ".*"
    ending = copy(config)
    # PEFT counts layers for endings only, not for full names
    ending.exclude_modules, ending.target_modules = None, {key.rpartition(".")[2]}
    return bool(check_target_module_exists(everything, key) and check_target_module_exists(ending, f".{key}"))


def without_wrappers(key: str) -> str:
    """Return a module's name as it was before tuner layers were put around it."""
    return key.replace(".base_layer", "")


def _is_router(module: nn.Module, count: int) -> bool:
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    # an ordinary linear layer is adapted as one; Llama 4's router is a linear layer that returns something else
    ordinary = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return (
        not ordinary
        and weight is not None
        and weight.is_floating_point()
        and weight.dim() == 2
        and len(weight) == count
    )


def _parent(key: str) -> str:
    return key.rpartition(".")[0]
