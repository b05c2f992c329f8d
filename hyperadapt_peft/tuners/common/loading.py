"""Loading an adapter, all of it or nothing: what a file may hold, and what undoes a load that was refused."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any, Optional, cast

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import _filter_state_dict_by_key_prefixes, _get_tuner_state_dict_key_prefixes
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from .config import TargetConfig
from .layer import TargetLayer


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
    ignore_mismatched_sizes: bool = False,
) -> None:
    """Check that `given` has the names and shapes of `required`, is finite, and writes to nothing but them and `optional`.

    Finite means: in the dtype of the model, so what would overflow there is refused; any finite number is allowed.

    Args:
        required: The adapter's tensors in the model.
        given: The tensors to be loaded into them.
        optional: Other tensors of the model that a file may hold.
        ignore_mismatched_sizes: PEFT's option: tensors of another shape will be left out of the loading.

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
        if expected[name].numel() and tensor.shape != expected[name].shape and not ignore_mismatched_sizes:
            raise RuntimeError(  # as torch's load_state_dict, but before it has copied the tensors that fit
                f"size mismatch for {name}: its shape is {tuple(tensor.shape)}, but the model needs "
                f"{tuple(expected[name].shape)}; is it an adapter of this model and config?"
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


def loadable_tensors(model: nn.Module, adapter_name: str, state: Tensors) -> tuple[Tensors, Tensors]:
    """Return what of a model's `state` an adapter's file must hold, and what it may hold besides.

    It must hold the adapter's tensors and the modules and tokens that were trained with it. It may hold what else PEFT
    saves with an adapter: biases (with `bias`), and the input and output embeddings (whole, after a change of the
    vocabulary). Nothing else of the base model.
    """
    prefixes = _get_tuner_state_dict_key_prefixes(model, adapter_name=adapter_name)
    required = _filter_state_dict_by_key_prefixes(state, prefixes)
    optional = {key: state[key] for key in state if f".{key}".endswith(".bias") and ".modules_to_save." not in key}
    embeddings = _embeddings(model)
    for name, module in model.named_modules(remove_duplicate=False):
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
        module = getattr(model, getter, lambda: None)()
        while isinstance(module, nn.Module):  # the wrappers around it, and it
            found.add(module)
            module = getattr(module, "base_layer", getattr(module, "original_module", None))
    return found


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Undo on an exception what was done to the modules of `model`: layers, parameters and attributes added or replaced.

    Values that were changed in place are not undone, nor are hooks, which other threads' forward passes add and remove.
    A model without any layer of this package is left to PEFT.
    """
    before = [(current, dict(current)) for current in _attributes(model)]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        if any(isinstance(module, TargetLayer) for module in model.modules()):
            for current, old in before:
                for key in current.keys() - old.keys():
                    del current[key]
                current.update(old)
            for parameter, requires_grad in trained:
                parameter.requires_grad_(requires_grad)
        raise


def _attributes(model: nn.Module) -> Iterator[dict[str, Any]]:
    for module in model.modules():
        yield vars(module)
        for name, value in list(vars(module).items()):
            if isinstance(value, dict) and "hooks" not in name:  # children, parameters, buffers, configs, ...
                yield value


def guard_loading() -> None:
    """Make a refused adapter of this package leave no trace in the model, whichever call was to load it.

    PEFT and transformers put an adapter's layers into the model before they read its weights, and have no hook for a
    load that fails; transformers has none for the weights either. So their loading methods are wrapped, in memory and
    once. Other methods' adapters are loaded exactly as they were; should one of the wrapped methods be gone, all stay as
    they are, with one warning.
    """
    try:
        model, mixed, mixin = cast(Any, PeftModel), cast(Any, PeftMixedModel), cast(Any, PeftAdapterMixin)
        load, load_natively = model.load_adapter, mixin.load_adapter
        constructors = [(cls, vars(cls)["from_pretrained"].__func__) for cls in (model, mixed)]
    except (AttributeError, KeyError) as exc:
        warnings.warn(f"A refused adapter will leave untrained layers in the model: {exc}", stacklevel=2)
        return
    if hasattr(load, "all_or_nothing"):
        return

    @wraps(load)
    def load_adapter(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self), _named_cause(self):
            return load(self, *args, **kwargs)

    @wraps(load_natively)
    def load_adapter_natively(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        with all_or_nothing(self):
            adapters = set(getattr(self, "peft_config", ()))
            parameters = [(module, dict(module._parameters)) for module in self.modules()]
            info = load_natively(self, *args, **kwargs)
            for adapter_name in set(getattr(self, "peft_config", ())) - adapters:
                _check_loaded(self, adapter_name, info, parameters)
            return info

    def guard(construct: Any) -> Any:
        @wraps(construct)
        def from_pretrained(cls: Any, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with all_or_nothing(model):
                return construct(cls, model, *args, **kwargs)

        return classmethod(from_pretrained)

    cast(Any, load_adapter).all_or_nothing = True
    model.load_adapter, mixin.load_adapter = load_adapter, load_adapter_natively
    for cls, construct in constructors:
        cls.from_pretrained = guard(construct)


@contextmanager
def _named_cause(model: nn.Module) -> Iterator[None]:
    try:
        yield
    except KeyError as exc:  # PEFT's, for a tensor of `modules_to_save` or `trainable_token_indices`
        key = str(exc.args[0])
        if key.startswith("base_model.") and any(isinstance(module, TargetLayer) for module in model.modules()):
            raise ValueError(f"The adapter file lacks the tensor {key}.") from exc
        raise


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
