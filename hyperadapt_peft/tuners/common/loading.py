"""Loading an adapter, all of it or nothing: what a file may hold, and what undoes a load that was refused."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any, Optional

import torch
from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _filter_state_dict_by_key_prefixes,
    _get_tuner_state_dict_key_prefixes,
)
from peft.utils import PeftType
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn

from .config import TargetConfig, check_adapter_name
from .layer import TargetLayer, modules_around_adapters, named_modules_around_adapters


Tensors = dict[str, torch.Tensor]

# Fields that say where an adapter came from or what a run does with it, not what it computes.
IRRELEVANT_FIELDS = frozenset(
    {"base_model_name_or_path", "revision", "inference_mode", "init_weights", "peft_version", "auto_mapping"}
)


def config_differences(old: PeftConfig, new: PeftConfig) -> dict[str, tuple[Any, Any]]:
    """Return the fields in which two adapters compute differently, with the values of both."""
    others = new.to_dict()
    return {
        key: (value, others.get(key))
        for key, value in old.to_dict().items()
        if key not in IRRELEVANT_FIELDS and others.get(key) != value
    }


def check_tensors(
    required: Mapping[str, torch.Tensor],
    given: Mapping[str, torch.Tensor],
    optional: Optional[Mapping[str, torch.Tensor]] = None,
) -> None:
    """Check that `given` has the names and shapes of `required`, is finite, and writes to nothing but them and `optional`.

    `required` and `optional` are the model's tensors. Finite means: in the model's dtype, so what would overflow there
    is refused; any finite number is allowed.

    Raises:
        RuntimeError: A tensor has another shape; the message names it.
        ValueError: A tensor is missing, has no place or is not finite; the message names it.
    """
    expected = {**(optional or {}), **required}
    for kind, names in (
        ("lacks", required.keys() - given.keys()),
        ("has no place for", given.keys() - expected.keys()),
    ):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            who = "The adapter file" if kind == "lacks" else "The model"
            raise ValueError(f"{who} {kind} the tensor {min(names)}{more}; is it an adapter of this model and config?")
    for name, tensor in given.items():
        # ZeRO-3 empties what it has sharded
        if expected[name].numel() and tensor.shape != expected[name].shape:
            raise RuntimeError(  # as torch's load_state_dict, but before it has copied the tensors that fit
                f"size mismatch for {name}: its shape is {tuple(tensor.shape)}, but the model needs "
                f"{tuple(expected[name].shape)}; is it an adapter of this model and config? PEFT's option "
                "`ignore_mismatched_sizes` does not reach this method: build the model with the adapter's sizes "
                "(`num_labels`, the vocabulary)."
            )
        if not expected[name].is_floating_point():  # a saved module's counters, a quantized embedding
            if tensor.dtype != expected[name].dtype:
                raise ValueError(f"The tensor {name} is {tensor.dtype}, but the model needs {expected[name].dtype}.")
        elif not _is_finite(tensor, expected[name].dtype):
            raise ValueError(f"The tensor {name} is not finite floating point: the adapter file is broken.")


def _is_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    # floats of 8 bits and less are formats of quantized weights, and most operations refuse them
    if not tensor.is_floating_point() or torch.finfo(tensor.dtype).bits < 16:
        return False
    return bool(torch.isfinite(tensor.to(dtype)).all())


def state_around_adapters(model: nn.Module, adapter_name: str) -> Tensors:
    """As `model.state_dict()`, but for the other adapters' tensors."""
    state: Tensors = {}
    for name, module in named_modules_around_adapters(model, remove_duplicate=False):
        prefix = f"{name}." if name else ""
        module._save_to_state_dict(state, prefix, keep_vars=False)
        for key in module.adapter_layer_names if isinstance(module, TargetLayer) else ():
            if adapter_name in (adapters := getattr(module, key)):
                adapters[adapter_name].state_dict(destination=state, prefix=f"{prefix}{key}.{adapter_name}.")
    return state


def loadable_tensors(model: nn.Module, adapter_name: str, state: Tensors) -> tuple[Tensors, Tensors]:
    """Return what of a model's `state` an adapter's file must hold, and what it may hold besides.

    It must hold the adapter's tensors and the modules and tokens that were trained with it. It may hold what else PEFT
    saves with an adapter: biases (with `bias`), and the input and output embeddings (whole, after a change of the
    vocabulary). Nothing else of the base model.
    """
    around: Any = SimpleNamespace(named_modules=lambda: named_modules_around_adapters(model))
    prefixes = _get_tuner_state_dict_key_prefixes(around, adapter_name=adapter_name)
    required = _filter_state_dict_by_key_prefixes(state, prefixes)
    optional = {key: state[key] for key in state if f".{key}".endswith(".bias") and ".modules_to_save." not in key}
    embeddings = _embeddings(model)
    for name, module in named_modules_around_adapters(model, remove_duplicate=False):
        if isinstance(module, AuxiliaryTrainingWrapper):
            keys = [f"{name}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values()]
            required.update({key: state[key] for key in keys if key in state})
            # with `bias`, PEFT saves their biases once more, and ignores them
            doubled = {key.replace(f".{adapter_name}.", "."): key for key in keys if key.endswith(".bias")}
            optional.update({name: state[key] for name, key in doubled.items() if key in state})
        if module in embeddings:
            keys = [f"{name}.{key}" for key, _ in module.named_parameters(recurse=False)]
            optional.update({key: state[key] for key in keys if key in state})
    return required, optional


def _embeddings(model: nn.Module) -> set[nn.Module]:
    found = set()
    for getter in ("get_input_embeddings", "get_output_embeddings"):
        module = None
        with suppress(AttributeError, NotImplementedError):  # vision and audio models may have none
            module = getattr(model, getter)()
        while isinstance(module, nn.Module):  # the wrappers around it, and it
            found.add(module)
            module = getattr(module, "base_layer", getattr(module, "original_module", None))
    return found


class AtomicInjection(BaseTuner):
    """A tuner that adds all layers of an adapter or, on an error, none, and can remove them when the weights are refused."""

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, as PEFT's `inject_adapter`, or on an error none.

        Raises:
            TypeError: If the adapter's name is not a str.
            ValueError: If the name is taken or cannot be a module's or a directory's, or the config does not fit the model.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, TargetConfig):  # another method's in a mixed model
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        layer_cls = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)].tuner_layer_cls
        saved = config.modules_to_save or ()
        check_adapter_name(adapter_name, taken_names(model, layer_cls, saved))
        if config.trainable_before is not None and len(self.peft_config) == 1:
            config.trainable_before = {name for name, p in model.named_parameters() if p.requires_grad}
        try:
            with all_or_nothing(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except IndexError as exc:
            raise ValueError(f"`trainable_token_indices` has a token that the embedding has not: {exc}") from exc


def taken_names(model: nn.Module, layer_cls: type[BaseTunerLayer], modules_to_save: Collection[str] = ()) -> set[str]:
    """Return the names that PEFT would confuse with an adapter's: of parameters, inside of saved modules, and its own."""
    names, adapters = {"base_layer", "original_module"}, set()
    for cls in (layer_cls, ModulesToSaveWrapper, TrainableTokensWrapper):
        for name in (*cls.adapter_layer_names, *cls.other_param_names):
            names.update(name.split("."))
    for module in modules_around_adapters(model):
        names |= module._parameters.keys() | module._buffers.keys()
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            adapters |= module._get_available_adapters()
    for key, module in model.named_modules() if modules_to_save else ():
        if key.endswith(tuple(modules_to_save)):
            names.update(part for child, _ in module.named_modules() for part in child.split(".") if part)
    return names - adapters


def remove_adapter(model: nn.Module, adapter_name: str, trainable: Collection[str] = ()) -> None:
    """Remove an adapter that is not active, and the layers and wrappers that are around nothing without it.

    `trainable` are the names of the base model's parameters to be trainable if no adapter is left.
    """
    configs: Any = model.peft_config
    del configs[adapter_name]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for name, module in reversed(list(model.named_modules())):  # inner layers first
        if isinstance(module, TargetLayer):
            module.delete_adapter(adapter_name)
            original: Any = module.base_layer
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module.delete_adapter(adapter_name, [name for name in module.active_adapters if name != adapter_name])
            original = module.original_module
        else:
            continue
        if not module._get_available_adapters():
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, original)
    for parameter, requires_grad in trained:  # which wrappers change, when they set what is active
        parameter.requires_grad_(requires_grad)
    if configs:
        return
    for module in model.modules():
        if vars(module).get("peft_config") is configs and not isinstance(module, BaseTuner):  # the base model
            del module.peft_config
            for name, parameter in module.named_parameters():
                parameter.requires_grad_(name in trainable)


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo on an exception what was done to the modules of `model`: layers, parameters and attributes added or replaced.

    Values that were changed in place are not undone, nor are hooks, which other threads' forward passes add and remove.
    A model without any layer of this package is left to PEFT.
    """
    before = [(current, dict(current)) for current in _attributes(model)]
    trained = [(parameter, parameter.requires_grad) for parameter in _parameters(model)]
    try:
        yield
    except BaseException:
        if any(isinstance(module, TargetLayer) for module in modules_around_adapters(model)):
            for current, old in before:
                for key in current.keys() - old.keys():
                    del current[key]
                current.update(old)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        raise


def _attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in modules_around_adapters(model):
        yield vars(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, dict) and "hooks" not in name:  # children, parameters, buffers, configs, ...
                yield value
        yield from (container._modules for container in _containers(module))


def _parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in modules_around_adapters(model):
        yield from module.parameters(recurse=False)
        for container in _containers(module):
            for adapter in list(container._modules.values()):
                # `parameters()` finds what FSDP has wrapped, but takes ten times as long
                yield from adapter._parameters.values() or adapter.parameters()  # type: ignore


def _containers(module: nn.Module) -> list[nn.ModuleDict]:
    own = module.own_names if isinstance(module, TargetLayer) else ()
    return [child for name, child in module._modules.items() if name in own and isinstance(child, nn.ModuleDict)]
