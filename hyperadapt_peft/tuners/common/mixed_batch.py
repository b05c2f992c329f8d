"""Batches in which every sample names its own adapter: `model(**inputs, adapter_names=[...])`, as PEFT's LoRA."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from functools import partial
from threading import Lock
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTuner
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers import PreTrainedModel

from .layer import TargetLayer, modules_around_adapters


BASE = "__base__"  # the name that stands for the base model


class BatchNames(list[str]):
    """The adapter names of a batch's samples, for one call of the model or of `generate`.

    `unique` are the different names, `tokens` is how many positions a sample has in the model's own input, and `memo` is
    what layers keep for the rest of the call.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.unique = list(dict.fromkeys(self))
        numbers = {name: i for i, name in enumerate(self.unique)}
        self.rows = tuple(numbers[name] for name in self)
        self.tokens = 1
        self.memo: dict[Any, Any] = {}

    def remember(self, key: Any, make: Callable[[], Any]) -> Any:
        """Return `make()`, for the rest of the call; anew where gradients flow, as checkpointing runs layers twice."""
        if torch.is_grad_enabled():
            return make()
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def tensor(self, values: tuple, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Return `values` as a tensor, made once for all layers: a copy to the device is not free."""
        key = values, dtype, device
        if key not in self.memo:
            self.memo[key] = torch.tensor(values, dtype=dtype).to(device, non_blocking=True)
        return self.memo[key]

    def gather(self, table: torch.Tensor) -> torch.Tensor:
        """Return each sample's row of a table of the unique names: (unique, ...) -> (batch, ...)."""
        if len(self.unique) == len(self):
            return table
        return table.index_select(0, self.tensor(self.rows, torch.long, table.device))


def read_weight(modules: nn.ModuleDict, adapter_name: str) -> Optional[torch.Tensor]:
    """Return an adapter's weight, or None if it has none.

    Its module is called only where somebody wants to see it (FSDP, ZeRO, offloading): the call copies the weight, and
    takes ten times as long as the reading.
    """
    module: Any = modules._modules.get(adapter_name)
    if module is None:
        return None
    return module() if _is_called(module) else module._parameters["weight"]


def stack_weights(modules: nn.ModuleDict, adapter_names: list[str]) -> Optional[torch.Tensor]:
    """Return these adapters' weights, (names, ...), with zeros where one has none, or None where none has any.

    They are read anew at every call, so there is nothing that could be outdated.
    """
    found: dict[str, Any] = modules._modules
    some = next((found[name] for name in adapter_names if name in found), None)
    if some is None:
        return None
    if not _is_called(some):  # nor are the others; if they were, what is read of them could not be stacked
        with suppress(KeyError):
            return torch.stack([found[name]._parameters["weight"] for name in adapter_names])
    weights = [read_weight(modules, name) for name in adapter_names]
    zeros = torch.zeros_like(next(weight for weight in weights if weight is not None))
    return torch.stack([zeros if weight is None else weight for weight in weights])


def _is_called(module: nn.Module) -> bool:
    return bool(module._forward_pre_hooks) or "forward" in module.__dict__ or "weight" not in module._parameters


class _Call:
    """A call with adapter names: those of its samples and, as generation repeats samples, those repeated."""

    def __init__(self, names: BatchNames, repeated: BatchNames) -> None:
        self.names, self.repeated = names, repeated
        self.shape = torch.Size((len(names), 1))  # of the innermost model's own input: samples, positions, ...

    def names_of(self, inputs: torch.Tensor) -> BatchNames:
        """Return the names for a layer's input: one for each row, or for all the rows of a sample's tokens."""
        samples, tokens = self.shape[:2]
        for names in (self.repeated, self.names):
            names.tokens = tokens
            if len(names) == samples and len(inputs) in (samples, samples * tokens):
                return names
        return self.repeated if len(inputs) == len(self.repeated) else self.names


# The call that runs in this thread (or task).
_call: ContextVar[Optional[_Call]] = ContextVar("adapter_names", default=None)


@contextmanager
def adapter_names_hooks(
    tuner: BaseTuner, adapter_names: Optional[list[str]], kwargs: dict[str, Any]
) -> Iterator[None]:
    """While it is open, give every tuner layer its samples' adapter names, `"__base__"` for none; or nothing if `None`.

    Generation repeats each input for its beams or return sequences, but not in an encoder; the names are repeated
    where the inputs were. In training each sample's gradient goes to its own adapter, under transformers' gradient
    checkpointing too.

    Several threads may call one model, each with names of its own or without, while another thread adds adapters, or
    deletes adapters that no running call names.

    Raises:
        TypeError: If `adapter_names` is not a list or tuple of str.
        ValueError: If there is no adapter of a given name, it adapts single experts, which see the tokens of all samples
            in an order of their own, or it is frozen while the model is trained.
        RuntimeError: After the call, if one of its adapters was deleted while it ran; in the backward pass, if other
            gradient checkpointing than transformers' runs a layer again, which does not know the names.
    """
    if adapter_names is None:
        yield
        return
    if not isinstance(adapter_names, (list, tuple)) or not all(isinstance(name, str) for name in adapter_names):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    if unknown := set(adapter_names) - {BASE, *tuner.peft_config}:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(sorted(unknown))}")
    model = tuner.model
    copies = _copies_in_generation(model, kwargs)
    call = _Call(BatchNames(adapter_names), BatchNames(name for name in adapter_names for _ in range(copies)))
    modules = list(modules_around_adapters(model))
    _refuse_experts(modules, call.names)
    if model.training and torch.is_grad_enabled():
        _refuse_frozen(modules, call.names)
    with _hooks(model, modules, call):
        yield
    if deleted := set(adapter_names) - {BASE, *tuner.peft_config}:
        raise RuntimeError(f"Deleted while a batch used them, so its outputs are wrong: {', '.join(sorted(deleted))}")


@contextmanager
def _hooks(root: nn.Module, modules: list[nn.Module], call: _Call) -> Iterator[None]:
    token = _call.set(call)
    undo: list[Callable[[], None]] = []
    try:
        for module in modules:
            if isinstance(module, (TargetLayer, AuxiliaryTrainingWrapper)):
                undo.append(module.register_forward_pre_hook(_give_names, with_kwargs=True).remove)
            elif module is root or isinstance(module, PreTrainedModel):
                undo.append(module.register_forward_pre_hook(partial(_note_shape, root), with_kwargs=True).remove)
            if module.training and getattr(module, "gradient_checkpointing", False):
                undo.append(_Checkpointing.of(module).end)
        yield
    finally:
        for action in undo:
            action()
        _call.reset(token)


def _give_names(
    module: nn.Module, args: tuple, kwargs: Optional[dict[str, Any]] = None
) -> Optional[tuple[tuple, dict[str, Any]]]:
    """The hook of all calls. Other threads' calls come here as well; theirs are the names in their own context.

    Torch leaves `kwargs` out when another thread is just adding or removing the hook of its own call.
    """
    call = _call.get()
    if call is None or kwargs is None:
        return None
    inputs = args[0] if args else next(iter(kwargs.values()))
    names: list[str] = call.names_of(inputs)
    if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's, which knows the names of its own adapters only
        names = [name if name in module._adapters else BASE for name in names]
    return args, {**kwargs, "adapter_names": names}


def _note_shape(root: nn.Module, module: nn.Module, args: tuple, kwargs: Optional[dict[str, Any]] = None) -> None:
    call = _call.get()
    if call is None or kwargs is None:
        return
    main = kwargs.get(getattr(module, "main_input_name", "")), kwargs.get("inputs_embeds")
    shapes = [x.shape for x in (*main, *args, *kwargs.values()) if isinstance(x, torch.Tensor) and x.dim() > 1]
    sizes = len(call.names), len(call.repeated)
    call.shape = next((shape for shape in shapes if shape[0] in sizes), call.shape)
    if module is root and shapes and call.shape not in shapes:
        raise ValueError(
            "Length of `adapter_names` should be the same as the number of inputs, but got "
            f"{len(call.names)} and {shapes[0][0]} respectively."
        )


class _Checkpointing:
    """transformers' gradient checkpointing of a module, whose backward pass runs it again after the call's end.

    It is in the place of the module's own while calls with names run, for the calls of all threads.
    """

    lock = Lock()

    def __init__(self, module: Any) -> None:
        self.module, self.checkpoint, self.calls = module, module._gradient_checkpointing_func, 0

    @classmethod
    def of(cls, module: Any) -> _Checkpointing:
        with cls.lock:
            if not isinstance(module._gradient_checkpointing_func, cls):
                module._gradient_checkpointing_func = cls(module)
            found = module._gradient_checkpointing_func
            found.calls += 1
        return found

    def end(self) -> None:
        with self.lock:
            self.calls -= 1
            if not self.calls:
                self.module._gradient_checkpointing_func = self.checkpoint

    def __call__(self, function: Callable, *args: Any) -> Any:
        call = _call.get()
        if call is None:
            return self.checkpoint(function, *args)
        shape = call.shape

        def again(*inputs: Any) -> Any:
            call.shape = shape
            with _hooks(self.module, list(modules_around_adapters(self.module)), call):
                return function(*inputs)

        return self.checkpoint(again, *args)


def _refuse_experts(modules: list[nn.Module], names: BatchNames) -> None:
    for module in modules:
        for key, child in module._modules.items():
            if child is None or not (key == "experts" or "Experts" in type(child).__name__):
                continue
            for layer in modules_around_adapters(child):
                if isinstance(layer, TargetLayer) and (named := list(filter(layer.has_adapter, names.unique))):
                    raise ValueError(
                        f"{type(child).__name__} does not support mixed adapter batches yet: experts see the tokens of all "
                        "samples in an order of their own. Call the model with one adapter at a time, or leave out "
                        f"{', '.join(sorted(named))}."
                    )


def _refuse_frozen(modules: list[nn.Module], names: BatchNames) -> None:
    containers = [getattr(m, key) for m in modules if isinstance(m, TargetLayer) for key in m.adapter_layer_names]
    trained = {
        name for c in containers for name in names.unique if name in c for p in c[name].parameters() if p.requires_grad
    }
    if frozen := [name for name in names.unique if name not in {BASE, *trained}]:
        raise ValueError(
            f"Frozen adapters cannot be trained: {', '.join(frozen)}. Call `model.set_requires_grad([...])` with all names "
            "that are to be trained, or `model.eval()`."
        )


def _copies_in_generation(model: nn.Module, kwargs: dict[str, Any]) -> int:
    """How often `generate` repeats each input: for its beams or its return sequences."""
    configs = [kwargs.get("generation_config"), getattr(model, "generation_config", None)]
    copies = [1]
    for key in ("num_beams", "num_return_sequences"):
        values = [kwargs.get(key), *(getattr(config, key, None) for config in configs)]
        copies.append(next((value for value in values if value is not None), 1))
    return max(copies)
