"""Counting: a model's bytes, what autograd keeps, a step's peak and kernels, the bytes of a safetensors file."""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler announces every start and stop


class SavedTensors(torch.autograd.graph.saved_tensors_hooks):
    """Counts what autograd keeps for the backward pass of what is computed inside this context.

    Counted are the tensors that operations save, and still hold when `nbytes` is called: each storage once, in full,
    and without the storages of `apart`. What a `torch.autograd.Function` keeps as plain attributes is not seen. Works
    with fake tensors, which have storages without memory.

    Args:
        apart: what is there anyway, such as a model's parameters and buffers.
    """

    def __init__(self, apart: Iterable[torch.Tensor]) -> None:
        super().__init__(self._pack, lambda saved: saved)
        self._saved: WeakSet[torch.Tensor] = WeakSet()  # a tensor is gone when its graph is
        self._apart = storages(apart)

    def _pack(self, tensor: torch.Tensor) -> torch.Tensor:
        saved = tensor.detach()  # an output itself would hold the graph that holds it
        self._saved.add(saved)
        return saved

    def nbytes(self) -> int:
        kept = storages(self._saved)
        return sum(size for storage, size in kept.items() if storage not in self._apart)


class KernelCounter(TorchDispatchMode):
    """Counts what runs inside this context as a GPU would see it, on any device.

    Attributes:
        kernels: the operations that compute or copy, not views and allocations.
        syncs: the operations that wait for a value, such as `item()`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernels = self.syncs = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if name in ("_local_scalar_dense", "is_nonzero", "item", "equal", "nonzero"):
            self.syncs += 1
        elif not is_view and name not in ("empty", "empty_like", "empty_strided", "new_empty", "_unsafe_view"):
            self.kernels += 1
        return result


def storages(tensors: Iterable[torch.Tensor]) -> dict[int, int]:
    """Storage -> its bytes. Fake storages have no address, so the storage object itself is the key."""
    found = (tensor.untyped_storage() for tensor in tensors)
    return {storage._cdata: storage.nbytes() for storage in found}


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """A model's parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


def stored_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters and buffers, tied ones once."""
    return sum(storages(tensors(model)).values())


def peak_bytes(run: Callable[[], Any], device: str = "cpu") -> int:
    """The most bytes that `run` had allocated on a device at one time through torch, beyond what was there before."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def safetensors_bytes(state: Mapping[str, torch.Tensor]) -> int:
    """The size of the file that safetensors writes for `state`, from shapes and dtypes alone.

    Source: the format's description, 8 bytes of length, a JSON header padded to 8 bytes, the data; tensors are ordered
    by alignment, then name.
    """
    names = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    names |= {torch.int64: "I64", torch.int32: "I32", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL"}
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in sorted(state.items(), key=lambda item: (-item[1].element_size(), item[0])):
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    return 8 + -(-len(text) // 8) * 8 + offset
