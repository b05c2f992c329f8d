"""How a tuner type gets into PEFT, and nothing else.

PEFT keeps its types in a closed `str` enum and its methods in tables. `register_peft_type` adds a real member to the
enum and then uses PEFT's own `register_peft_method`, and lets `PeftMixedModel` accept the type. Nothing on disk is touched; where
`PeftMixedModel`'s private tables look different, it is left as it is, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from typing import Any, Union, cast

import peft.mixed_model
from peft.config import PeftConfig
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.tuners import mixed
from peft.tuners.mixed import model as mixed_model
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import PeftType, register_peft_method
from torch import nn

from ..tuners.common.config import TargetConfig
from ..tuners.common.loading import AtomicInjection
from ..tuners.common.merging import AtomicMerging


_lock = threading.RLock()


def add_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, adding it to the enum if PEFT does not have it.

    `PeftType` has no extension point, and transformers needs a member with a `.value`; a plain string is not enough.

    Raises:
        RuntimeError: If this Python's `enum` does not take the new member.
    """
    with _lock:
        if name in PeftType.__members__:
            return PeftType[name]
        enum: Any = PeftType
        member: Any = str.__new__(PeftType, name)
        member._name_ = member._value_ = name
        member.__objclass__ = PeftType
        member._sort_order_ = len(PeftType.__members__)
        try:
            if hasattr(enum, "_add_member_"):  # Python >= 3.13
                enum._add_member_(name, member)
            else:
                setattr(enum, name, member)  # before the maps: afterwards the enum refuses assignment
                enum._member_map_[name] = member
            if name not in enum._member_names_:
                enum._member_names_.append(name)
            enum._value2member_map_[name] = member
        except Exception as exc:
            raise RuntimeError(f"hyperadapt_peft cannot add {name} to PEFT's PeftType on this Python: {exc}") from exc
        return member


def register_peft_type(
    name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], layer_cls: type[BaseTunerLayer]
) -> None:
    """Make a tuner a PEFT method of its own: `get_peft_model`, `from_pretrained`, transformers' `add_adapter`, ...

    Safe to call again (reloaded modules replace their older selves) and from several threads. If PEFT itself, or
    another package, already has a method of that name, theirs stays and one warning says so.

    The name is lower case; the prefix of the method's parameters is `name + "_"`.
    """
    with _lock:
        peft_type = add_peft_type(name.upper())
        registered = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
        if registered is not None and registered.__module__ != config_cls.__module__:
            warnings.warn(
                f"The PEFT method {peft_type.value} is already provided by {registered.__module__}; hyperadapt_peft "
                "leaves it in place and does not register its own. Uninstall one of the two to choose.",
                stacklevel=2,
            )
            return
        if registered is None:
            register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
        else:  # an older copy of our own module
            PEFT_TYPE_TO_CONFIG_MAPPING[peft_type] = config_cls
            PEFT_TYPE_TO_TUNER_MAPPING[peft_type] = model_cls
        _register_mixed(peft_type, config_cls, layer_cls)


def _register_mixed(peft_type: PeftType, config_cls: type[PeftConfig], layer_cls: type[BaseTunerLayer]) -> None:
    """Let `PeftMixedModel` accept the type, or warn and leave it as it is if its private tables have changed."""
    tables, prefix = cast(Any, mixed_model), PEFT_TYPE_TO_PREFIX_MAPPING[peft_type]
    try:
        # read all before the first write
        compatible, _ = tables.COMPATIBLE_TUNER_TYPES, mixed.COMPATIBLE_TUNER_TYPES
        configs, layers = tables.Configs, tables.Layers
        tables.PREFIXES[:] = dict.fromkeys((*tables.PREFIXES, prefix))
    except AttributeError as exc:
        warnings.warn(f"PeftMixedModel of this PEFT cannot take {peft_type.value} adapters: {exc}", stacklevel=3)
        return
    tables.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES = tuple(dict.fromkeys((*compatible, peft_type)))
    tables.Configs = Union[configs, config_cls]
    tables.Layers = (*layers, layer_cls)
    cast(Any, peft.mixed_model).MixedModel = MixedModel
    PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = PEFT_TYPE_TO_TUNER_MAPPING[peft_type]


class MixedModel(AtomicInjection, AtomicMerging, mixed_model.MixedModel):
    """`PeftMixedModel`'s model, which leaves the configs of this package to their own tuners."""

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:  # type: ignore[override]
        if tuner := _own_tuner(peft_config):
            return tuner._prepare_adapter_config(self, peft_config, model_config)
        return super()._prepare_adapter_config(peft_config, model_config)

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        if tuner := _own_tuner(peft_config):
            tuner._prepare_model(self, peft_config, model)

    def _create_and_replace(self, config: Any, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        if tuner := _own_tuner(config):
            tuner._create_and_replace(self, config, *args, **kwargs)
        else:
            super()._create_and_replace(config, *args, **kwargs)


def _own_tuner(config: Any) -> Any:
    return PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)] if isinstance(config, TargetConfig) else None
