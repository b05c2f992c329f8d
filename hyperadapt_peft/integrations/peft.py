"""How a tuner type gets into PEFT, and nothing else.

PEFT keeps its types in a closed `str` enum and its methods in tables. `register_peft_type` adds a real member to the
enum and then uses PEFT's own `register_peft_method`, and lets `PeftMixedModel` accept the type. Nothing on disk is touched; where
`PeftMixedModel`'s private tables look different, it is left as it is, with one warning.
"""

from __future__ import annotations

import threading
import warnings
from importlib import import_module
from inspect import getattr_static
from typing import TYPE_CHECKING, Any, Union

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_MIXED_MODEL_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method


if TYPE_CHECKING:
    from peft.config import PeftConfig
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

_lock = threading.RLock()
_DISPATCHED = ("_prepare_adapter_config", "_prepare_model", "_create_and_replace")  # methods of PEFT's MixedModel


def add_peft_type(name: str) -> PeftType:
    """Return the `PeftType` member called `name`, adding it to the enum if PEFT does not have it.

    `PeftType` has no extension point, and transformers needs a member with a `.value`; a plain string is not enough.

    Args:
        name: The type's name, upper case, for instance `"HYPERADAPT"`.

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
            added = PeftType(name) is PeftType[name] is getattr(PeftType, name) is member and member in list(PeftType)
        except Exception as exc:
            raise RuntimeError(f"hyperadapt_peft cannot add {name} to PEFT's PeftType on this Python: {exc}") from exc
        if not added:
            raise RuntimeError(f"hyperadapt_peft cannot add {name} to PEFT's PeftType on this Python.")
        return member


def register_peft_type(
    name: str, config_cls: type[PeftConfig], model_cls: type[BaseTuner], layer_cls: type[BaseTunerLayer]
) -> None:
    """Make a tuner a PEFT method of its own: `get_peft_model`, `from_pretrained`, transformers' `add_adapter`, ...

    Safe to call again (reloaded modules replace their older selves) and from several threads. If PEFT itself, or
    another package, already has a method of that name, theirs stays and one warning says so.

    Args:
        name: The method's name, lower case; the prefix of its parameters is `name + "_"`.
        config_cls: The method's `PeftConfig`.
        model_cls: The method's `BaseTuner`.
        layer_cls: The method's `BaseTunerLayer`, needed by `PeftMixedModel`.
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
        if _register_mixed(peft_type, config_cls, layer_cls):
            PEFT_TYPE_TO_MIXED_MODEL_MAPPING[peft_type] = model_cls


def _register_mixed(peft_type: PeftType, config_cls: type[PeftConfig], layer_cls: type[BaseTunerLayer]) -> bool:
    """Let `PeftMixedModel` accept the type, or warn and leave it as it is if its private tables have changed.

    Returns:
        Whether it was done.
    """
    try:
        mixed: Any = import_module("peft.tuners.mixed")
        mixed_model: Any = import_module("peft.tuners.mixed.model")
        model_cls = mixed_model.MixedModel
        compatible, prefixes = mixed_model.COMPATIBLE_TUNER_TYPES, mixed_model.PREFIXES
        configs, layers = mixed_model.Configs, mixed_model.Layers
        prefix = f"{peft_type.value.lower()}_"
        # read all, and check all, before the first write
        _ = mixed.COMPATIBLE_TUNER_TYPES, configs.__args__
        _ = [getattr(model_cls, name) for name in _DISPATCHED]
        new_compatible = (*(t for t in compatible if t != peft_type), peft_type)
        new_layers = (*layers, layer_cls)
        new_prefixes = [*(p for p in prefixes if p != prefix), prefix]
    except (ImportError, AttributeError, TypeError) as exc:
        warnings.warn(f"PeftMixedModel of this PEFT cannot take {peft_type.value} adapters: {exc}", stacklevel=3)
        return False
    _dispatch_mixed_by_type(model_cls)
    mixed_model.COMPATIBLE_TUNER_TYPES = mixed.COMPATIBLE_TUNER_TYPES = new_compatible
    mixed_model.Configs = Union[configs, config_cls]
    mixed_model.Layers = new_layers
    prefixes[:] = new_prefixes
    return True


def _dispatch_mixed_by_type(model_cls: Any) -> None:
    """Send configs of types registered here to their own tuner; `MixedModel` knows PEFT's by isinstance only.

    The class is looked up by `peft_type` at every call, so that a reloaded tuner is found.
    """
    if hasattr(model_cls, "_hyperadapt_dispatch"):
        return

    def dispatched(name: str) -> Any:
        method = getattr_static(model_cls, name)

        def call(self, config, *args, **kwargs):
            tuner: Any = PEFT_TYPE_TO_TUNER_MAPPING[PeftType(config.peft_type)]
            if tuner.__module__.partition(".")[0] == __name__.partition(".")[0]:
                return getattr(tuner, name)(self, config, *args, **kwargs)
            return method.__get__(self, model_cls)(config, *args, **kwargs)

        return call

    for name in _DISPATCHED:
        setattr(model_cls, name, dispatched(name))
    model_cls._hyperadapt_dispatch = True
