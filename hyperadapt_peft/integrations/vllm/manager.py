"""What loads HyperAdapt adapters into vLLM: the layers that take them, and the reading of their files."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils import CONFIG_NAME, load_peft_weights
from vllm.exceptions import LoRAAdapterNotFoundError
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.model_manager import LRUCacheLoRAModelManager
from vllm.lora.utils import get_adapter_absolute_path, is_in_target_modules, replace_submodule
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.model_executor.models.utils import PPMissingLayer

from ...tuners.hyperadapt import HyperAdaptConfig
from .layers import adapted_layer, matrix_sizes


# vLLM changes the order of rows when it loads these, so that an adapter's scales would meet other rows.
REORDERED = ("K2HorizonForCausalLM", "Llama4ForCausalLM")

Offsets = dict[str, dict[str, torch.Tensor]]  # by module and side


class HyperAdaptModelManager(LRUCacheLoRAModelManager):
    """vLLM's slots and their least-recently-used order, over layers with scales."""

    def _create_lora_modules(self) -> None:
        if found := {type(module).__name__ for module in self.model.modules()} & {*REORDERED}:
            raise ValueError(f"HyperAdapt adapters cannot be served on {min(found)}, whose rows vLLM reorders.")
        for wrapper in self.punica_wrapper_mapping.values():
            wrapper._token_lora_indices.fill_(-1)  # padding reads what no batch has set yet
        self.sizes: dict[str, tuple[int, int]] = {}  # rows and columns of each matrix that can be adapted
        layers: dict[torch.nn.Module, Any] = {}
        for name, module in list(self.model.named_modules(remove_duplicate=False)):
            if module in layers:  # a second name of the same layer
                replace_submodule(self.model, name, layers[module])
                continue
            parts = self.packed_modules_mapping.get(name.rpartition(".")[2], [])
            wrapper = self._get_punica_wrapper(name)
            named = is_in_target_modules(name, self.lora_config.target_modules, self.packed_modules_mapping)
            if wrapper is None or not named:
                continue
            layer = adapted_layer(name, module, parts, self.lora_config)
            if layer is None:
                continue
            layer.create_lora_weights(self.lora_slots, self.lora_config)
            layer.set_mapping(wrapper)
            layers[module] = replace_submodule(self.model, name, layer)
            self.register_module(name, layer)
            self._register_packed_modules(name)
            self.sizes.update(zip(self.packed_modules.get(name, [name]), matrix_sizes(layer, parts), strict=True))

    def weights(self, adapter: str, offsets: Offsets) -> dict[str, LoRALayerWeights]:
        """Return an adapter's offsets by vLLM's names, in the shapes of LoRA's factors at rank 1.

        Args:
            adapter (`str`): The adapter's name, for messages.
            offsets (`dict[str, dict[str, torch.Tensor]]`): The offsets by the checkpoint's names.

        Raises:
            ValueError: If a module is none that can be adapted, or an offset has another size than it or is not finite.
        """
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = mapper and mapper.get_rename_mapper()
        dtype = self.lora_config.lora_dtype
        result = {}
        for module, sides in offsets.items():
            name = mapper._map_name(f"{module}.weight").removesuffix(".weight") if mapper else module
            if self._is_elsewhere(name):
                result[name] = LoRALayerWeights(name, 1, 1, torch.empty(0), torch.empty(0))
                continue
            if name not in self.sizes:
                raise ValueError(
                    f"The adapter {adapter} cannot be served: {module} is not one of the linear layers that HyperAdapt "
                    "is applied to in vLLM."
                )
            tensors = []
            for side, size in zip(("row", "column"), self.sizes[name], strict=True):
                offset = sides.get(side, torch.zeros(size)).to(dtype)
                if offset.shape != (size,):
                    raise ValueError(
                        f"The adapter {adapter} cannot be served: the {side} scales of {module} have the shape "
                        f"{tuple(offset.shape)}, and the model needs ({size},)."
                    )
                if not offset.isfinite().all():
                    raise ValueError(
                        f"The adapter {adapter} cannot be served: the {side} scales of {module} are not finite in "
                        f"{dtype}."
                    )
                tensors.append(offset)
            row, column = tensors
            result[name] = LoRALayerWeights(name, 1, 1, column[None, :], row[:, None])
        return result

    def _is_elsewhere(self, name: str) -> bool:
        """Whether a module is in another stage of the pipeline."""
        module: Any = self.model
        for part in name.split("."):
            module = getattr(module, part, None)
            if isinstance(module, PPMissingLayer):
                return True
        return False


class HyperAdaptWorkerManager(LRUCacheWorkerLoRAManager):
    """Loads the adapters that requests name, as vLLM does for LoRA's."""

    _manager_cls = HyperAdaptModelManager
    lora_config: Any

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(vllm_config, *args, **kwargs)
        refused = {
            "--fully-sharded-loras": self.lora_config.fully_sharded_loras,
            "an encoder-decoder model": vllm_config.model_config.is_encoder_decoder,
            # layers then get some of a batch's tokens
            "--kv-sharing-fast-prefill": vllm_config.cache_config.kv_sharing_fast_prefill,
            "micro-batches": getattr(vllm_config.parallel_config, "use_ubatching", False),
            "sequence-parallel experts": getattr(vllm_config.parallel_config, "use_sequence_parallel_moe", False),
        }
        for option, given in refused.items():
            if given:
                raise ValueError(f"HyperAdapt adapters cannot be served with {option}.")
        self.lora_config = copy.copy(self.lora_config)
        self.lora_config.max_lora_rank = 1

    def add_dummy_lora(self, lora_request: Any, rank: int) -> bool:
        return super().add_dummy_lora(lora_request, rank=1)

    def _load_adapter(self, lora_request: Any) -> LoRAModel:
        name, path = lora_request.lora_name, get_adapter_absolute_path(lora_request.lora_path)
        if not Path(path, CONFIG_NAME).is_file():
            raise LoRAAdapterNotFoundError(name, path)
        weights = self._adapter_manager.weights(name, read_offsets(name, path))
        return LoRAModel(lora_request.lora_int_id, rank=1, loras=weights)


def read_offsets(adapter: str, path: str) -> Offsets:
    """Return an adapter's offsets from 1 by the names that modules have in the checkpoint, fp32 and times its gain.

    Args:
        adapter (`str`): The adapter's name, for messages.
        path (`str`): The directory that `save_pretrained` wrote.

    Raises:
        ValueError: If the files cannot be read, or hold anything but offsets of rows and columns.
    """
    try:
        config = PeftConfig.from_pretrained(path)
        tensors = load_peft_weights(path, device="cpu")
    except Exception as exc:  # whatever is wrong with the files, the engine goes on
        raise ValueError(f"The adapter {adapter} in {path} cannot be read: {exc}") from exc
    if not isinstance(config, HyperAdaptConfig):
        raise ValueError(  # noqa: TRY004
            f"The adapter {adapter} cannot be served: it is of the type {config.peft_type}, and this engine was started "
            "for HYPERADAPT."
        )
    offsets: Offsets = {}
    for key, tensor in tensors.items():
        key = key.removeprefix("base_model.model.")
        module, _, side = key.removesuffix(".weight").rpartition(".hyperadapt_")
        if side not in ("row", "column"):
            raise ValueError(f"The adapter {adapter} cannot be served: {key} is not a scale of rows or columns.")
        offsets.setdefault(module, {})[side] = tensor.float() * config.alpha
    if not offsets:
        raise ValueError(f"The adapter {adapter} cannot be served: its file has no scales.")
    return offsets
