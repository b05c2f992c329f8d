"""Batches in which every sample names its own adapter: `model(**inputs, adapter_names=[...])`, as PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Optional

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from .layer import modules_around_adapters


BASE = "__base__"  # the name that stands for the base model


class BatchNames(list[str]):
    """The adapter names of a batch's samples, and what the layers made of them: `memo` lasts for one model call.

    A call to `generate` runs the model many times with the same names and the same adapters.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.memo: dict[Any, Any] = {}


@contextmanager
def adapter_names_hooks(
    model: nn.Module, adapter_names: Optional[list[str]], layer_cls: type[BaseTunerLayer], kwargs: dict[str, Any]
) -> Iterator[None]:
    """While it is open, give every tuner layer its samples' adapter names.

    Generation repeats each input for its beams or return sequences, but not in an encoder; the names are repeated
    where the inputs were.

    Args:
        model (`nn.Module`): The adapted model.
        adapter_names (`Optional[list[str]]`): One name per sample, `"__base__"` for none; nothing happens if `None`.
        layer_cls (`type`): The tuner layer class.
        kwargs (`dict`): The arguments of the forward or generate call.

    Raises:
        TypeError: If `adapter_names` is not a list or tuple of str.
        ValueError: If the model is in training mode, or no layer has an adapter of a given name.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    modules = list(modules_around_adapters(model))
    layers = [m for m in modules if isinstance(m, layer_cls)]
    known = {BASE}.union(*(layer._get_available_adapters() for layer in layers))
    if unknown := set(adapter_names) - known:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

    copies = _copies_in_generation(model, kwargs)
    names = BatchNames(adapter_names)
    repeated = BatchNames(name for name in adapter_names for _ in range(copies))

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        inputs = args[0] if args else next(iter(kwargs.values()))
        return args, {**kwargs, "adapter_names": repeated if len(inputs) == len(repeated) else names}

    auxiliary = [m for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
    handles = [m.register_forward_pre_hook(hook, with_kwargs=True) for m in [*layers, *auxiliary]]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _copies_in_generation(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each input: for its beams or its return sequences."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    copies = [1]
    for key in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(key), *(getattr(config, key, None) for config in configs)]
        copies.append(next((value for value in values if value is not None), 1))
    return max(copies)
