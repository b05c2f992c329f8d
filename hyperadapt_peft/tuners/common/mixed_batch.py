"""Batches in which every sample names its own adapter: `model(**inputs, adapter_names=[...])`, as PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Optional

from peft.tuners.tuners_utils import BaseTuner
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


# The names of the call that runs in this thread (or task), and those names repeated for generation.
_names: ContextVar[Optional[tuple[BatchNames, BatchNames]]] = ContextVar("adapter_names", default=None)


@contextmanager
def adapter_names_hooks(
    model: nn.Module, adapter_names: Optional[list[str]], tuner: BaseTuner, kwargs: dict[str, Any]
) -> Iterator[None]:
    """While it is open, give every tuner layer its samples' adapter names.

    Generation repeats each input for its beams or return sequences, but not in an encoder; the names are repeated
    where the inputs were.

    Several threads may call one model, each with names of its own or without, while another thread adds adapters, or
    deletes adapters that no running call names.

    Args:
        model (`nn.Module`): The adapted model.
        adapter_names (`Optional[list[str]]`): One name per sample, `"__base__"` for none; nothing happens if `None`.
        tuner (`BaseTuner`): The tuner that adapts the model.
        kwargs (`dict`): The arguments of the forward or generate call.

    Raises:
        TypeError: If `adapter_names` is not a list or tuple of str.
        ValueError: If the model is in training mode, or there is no adapter of a given name.
        RuntimeError: After the call, if one of its adapters was deleted while it ran.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if model.training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    if unknown := set(adapter_names) - {BASE, *tuner.peft_config}:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")

    copies = _copies_in_generation(model, kwargs)
    repeated = BatchNames(name for name in adapter_names for _ in range(copies))
    token = _names.set((BatchNames(adapter_names), repeated))
    takers = (tuner.tuner_layer_cls, AuxiliaryTrainingWrapper)
    handles = [
        module.register_forward_pre_hook(_give_names, with_kwargs=True)
        for module in modules_around_adapters(model)
        if isinstance(module, takers)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        _names.reset(token)
    if deleted := set(adapter_names) - {BASE, *tuner.peft_config}:
        raise RuntimeError(f"Deleted while a batch used them, so its outputs are wrong: {', '.join(sorted(deleted))}")


def _give_names(
    module: nn.Module, args: tuple, kwargs: Optional[dict[str, Any]] = None
) -> Optional[tuple[tuple, dict[str, Any]]]:
    """The hook of all calls. Other threads' calls come here as well; theirs are the names in their own context.

    Torch leaves `kwargs` out when another thread is just adding or removing the hook of its own call.
    """
    batch = _names.get()
    if batch is None or kwargs is None:
        return None
    names, repeated = batch
    inputs = args[0] if args else next(iter(kwargs.values()))
    return args, {**kwargs, "adapter_names": repeated if len(inputs) == len(repeated) else names}


def _copies_in_generation(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each input: for its beams or its return sequences."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    copies = [1]
    for key in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(key), *(getattr(config, key, None) for config in configs)]
        copies.append(next((value for value in values if value is not None), 1))
    return max(copies)
