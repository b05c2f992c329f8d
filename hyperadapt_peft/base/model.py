"""What the tuner models share: default targets, refusals before anything changes, all-or-nothing merges."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, ClassVar, Optional

import torch
from peft.mapping import PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.trainable_tokens import TrainableTokensLayer
from peft.tuners.tuners_utils import (
    BaseTuner,
    BaseTunerLayer,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
    onload_layer,
)
from peft.utils import get_quantization_kwargs
from torch import nn

from .config import TargetConfig, check_adapter_name
from .layer import TargetLayer
from .loading import all_or_nothing, check_tensors, loadable_tensors
from .mixed_batch import adapter_names_hooks


# These parents read their children's weights without calling them; an adapter there would be ignored.
_READING_PARENTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
# So do the fused kernels of these architectures with these children.
_MAMBA_TYPES = {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"}
_MAMBA_CHILDREN = {"conv1d", "out_proj"}


# New heads under their usual names; PEFT itself knows them for SEQ_CLS only, and trains them whole for every task.
_HEADS = {"classification_head", "classifier", "qa_outputs", "score"}


class TargetModel(BaseTuner):
    """A tuner that puts a [`TargetLayer`] around each target module.

    Sub-classes set PEFT's `prefix` and `tuner_layer_cls`, and here `layer_class_for` and `supported_layers`.
    """

    target_module_mapping: dict[str, Any] = {}  # noqa: RUF012  (None means every linear layer)
    supported_layers: ClassVar[str]  # named when another kind of layer is refused

    @staticmethod
    def layer_class_for(base_layer: nn.Module) -> Optional[type[TargetLayer]]:
        """Return the tuner layer class for a base layer, or None if its kind is not supported."""
        raise NotImplementedError

    def default_targets(self, config: TargetConfig) -> set[str]:
        """Return the full names of the modules that `target_modules=None` means."""
        return self.all_linear(config)

    def all_linear(self, config: TargetConfig) -> set[str]:
        """Return the full names of all linear layers but the output head, as PEFT finds them."""
        found: Any = SimpleNamespace(target_modules="all-linear", task_type=config.task_type)
        _maybe_include_all_linear_layers(found, self.model)
        return {name for name in found.target_modules if name.partition(".")[0] not in _HEADS}

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """Add an adapter's layers, as PEFT's `inject_adapter`, or on an error none.

        Raises:
            TypeError: If the adapter's name is not a str.
            ValueError: If the name cannot be a module's or a directory's, or the config does not fit the model.
        """
        check_adapter_name(adapter_name)
        try:
            with all_or_nothing(model):
                super().inject_adapter(model, adapter_name, *args, **kwargs)
        except IndexError as exc:
            raise ValueError(f"`trainable_token_indices` has a token that the embedding has not: {exc}") from exc

    def _prepare_adapter_config(self, peft_config: TargetConfig, model_config: dict) -> TargetConfig:  # type: ignore[override]
        if peft_config.target_modules is None or peft_config.target_modules == "all-linear":
            names = (self.all_linear if peft_config.target_modules else self.default_targets)(peft_config)
            if uncalled := {name for name in names if _is_read_uncalled(self.model, _parent(self.model, name), name)}:
                warnings.warn(f"Not adapted, because their parents read their weights uncalled: {sorted(uncalled)}")
            names -= uncalled
            if peft_config.layers_to_transform is not None:  # PEFT counts layers for endings only, not for full names
                names = {name for name in names if _ending_matches(peft_config, name)}
            peft_config.target_modules = names
        return peft_config

    def _prepare_model(self, peft_config: TargetConfig, model: nn.Module) -> None:  # type: ignore[override]
        # refuse before the first layer is replaced, so that an error leaves the model as it was
        inside_tuner_layer: tuple[str, ...] = ()
        for key, module in model.named_modules():
            if not key or key.startswith(inside_tuner_layer or ("\0",)):
                continue
            if isinstance(module, BaseTunerLayer):
                inside_tuner_layer += (f"{key}.",)
            if self._check_target_module_exists(peft_config, key):
                _layer_class(peft_config, module, model, _parent(model, key), key)

    def _create_and_replace(  # type: ignore[override]  # no `parameter_name`: modules are targeted, not parameters
        self,
        config: TargetConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if current_key is None:
            raise ValueError("Current Key shouldn't be `None`")
        # `self` may be a MixedModel, so nothing of our own is looked up on it
        if isinstance(target, _tuner(config).tuner_layer_cls):
            target.update_layer(adapter_name, config)  # type: ignore[operator]
            return
        layer_cls: Any = _layer_class(config, target, self.model, parent, current_key)
        new_module = layer_cls(target, adapter_name, config, **get_quantization_kwargs(self.model))
        if adapter_name not in self.active_adapters:
            new_module.requires_grad_(False)  # an additional adapter is not trained before it is set
        new_module.train(target.training)
        self._replace_module(parent, target_name, new_module, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        # The layer has moved its adapter to the base layer's device already, and unloading restores the base layer
        # itself: none of the base class's repairs apply, and they break TrainableTokensWrapper.
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        names = kwargs.pop("adapter_names", None)
        with adapter_names_hooks(self.model, names, self.tuner_layer_cls, kwargs):
            yield

    @classmethod
    def _remap_adapter_state_dict_for_load(  # type: ignore[override]
        cls, model: nn.Module, config: TargetConfig, adapter_name: str, state_dict: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        # before anything is loaded: PEFT loads what fits, says little of what does not, and takes NaN
        state_dict = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        state = model.state_dict()
        required, optional = loadable_tensors(model, adapter_name, state)
        # where the layers were injected without a PeftModel around them, PEFT removes its prefix after this hook
        given = {key if key in state else key.removeprefix("base_model.model."): v for key, v in state_dict.items()}
        # PEFT does not pass its option on; its only caller of this hook, set_peft_model_state_dict, holds it
        ignore = sys._getframe(1).f_locals.get("ignore_mismatched_sizes", False)
        check_tensors(required, given, optional, ignore_mismatched_sizes=ignore)
        return state_dict

    def merge_adapter(self, adapter_names: Optional[list[str]] = None, safe_merge: bool = False) -> None:
        """Merge adapters into the base weights, as PEFT's `merge_adapter`, in all layers or, on an error, in none.

        Args:
            adapter_names (`Optional[list[str]]`): The adapters to merge; the active ones if `None`.
            safe_merge (`bool`, defaults to `False`): Refuse to merge what would not be finite.

        Raises:
            ValueError: If an adapter cannot be merged, or with `safe_merge` if a merged weight would not be finite.
        """
        self._check_merge(safe_merge, adapter_names)
        super().merge_adapter(adapter_names=adapter_names, safe_merge=safe_merge)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: Optional[list[str]] = None,
    ) -> None:  # PEFT's annotation; it returns the model
        if merge:
            self._check_merge(safe_merge, adapter_names)
        return super()._unload_and_optionally_merge(
            merge=merge, progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def _check_merge(self, safe_merge: bool, adapter_names: Optional[list[str]]) -> None:
        for module in self.model.modules():
            if isinstance(module, TargetLayer):
                with onload_layer(module):
                    module.check_merge(safe_merge, adapter_names)
            elif safe_merge and isinstance(module, TrainableTokensLayer):
                for name in adapter_names or module.active_adapters:
                    delta = module.trainable_tokens_delta.get(name)
                    if delta is not None and not torch.isfinite(delta).all():
                        raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")


def _layer_class(
    config: TargetConfig, target: nn.Module, model: nn.Module, parent: nn.Module, key: str
) -> type[TargetLayer]:
    """Return the tuner layer class for a target module, or raise ValueError naming the module and what would do."""
    if _is_read_uncalled(model, parent, key):
        raise ValueError(
            f"Target module {key} is not supported: its parent reads its weight without calling it, so an adapter on "
            "it would be ignored. Leave it out of `target_modules` or name it in `exclude_modules`."
        )
    base_layer = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    layer_cls = _tuner(config).layer_class_for(base_layer)
    if layer_cls is None:
        raise ValueError(
            f"Target module {key} is not supported: it is a {type(base_layer).__module__}."
            f"{type(base_layer).__qualname__}. {type(config).__name__} adapts {_tuner(config).supported_layers}."
        )
    return layer_cls


def _tuner(config: TargetConfig) -> type[TargetModel]:
    return PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]  # type: ignore[index, return-value]


def _is_read_uncalled(model: nn.Module, parent: nn.Module, key: str) -> bool:
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    in_mamba_kernel = model_type in _MAMBA_TYPES and key.rpartition(".")[2] in _MAMBA_CHILDREN
    return in_mamba_kernel or isinstance(parent, _READING_PARENTS)


def _ending_matches(config: TargetConfig, name: str) -> bool:
    ending = replace(config, target_modules=[name.rpartition(".")[2]])
    return bool(check_target_module_exists(ending, name))


def _parent(model: nn.Module, key: str) -> nn.Module:
    return model.get_submodule(key.rpartition(".")[0])
