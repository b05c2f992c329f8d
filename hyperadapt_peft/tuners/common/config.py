"""Configuration fields that every tuner here has: which modules, which layers, what is trained beside them."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from inspect import formatannotation
from typing import Any, Literal, Optional, Union, cast, get_args, get_origin, get_type_hints

from huggingface_hub.dataclasses import type_validator
from peft.config import PeftConfig
from peft.tuners._buffer_dict import BufferDict
from peft.utils import PeftType
from torch import nn

from ...integrations.hub import add_usage
from ...version import INSTALL


Names = Union[list[str], tuple[str, ...], set[str]]
Indices = Union[list[int], tuple[int, ...], set[int]]
FORMAT_VERSION = 2  # of adapter files; raised as tests/golden/README.md says


@dataclass
class TargetConfig(PeftConfig):
    """The fields of PEFT's tuners under PEFT's names, validated when the config is made.

    Args:
        target_modules (`Optional[Union[list[str], str]]`):
            The names of the modules to adapt. A list matches whole names or their endings, a string is a regular
            expression, `"all-linear"` (also what `None`, the default, means) takes every linear layer but the output
            head, on any architecture.
        exclude_modules (`Optional[Union[list[str], str]]`):
            The names of the modules not to adapt; a list or a regular expression as above.
        init_weights (`bool`):
            `True` (default) starts as the identity: the adapted model equals the base model bit by bit. `False` starts
            from random values, which only tests want.
        bias (`str`):
            Which biases are trained as well: `"none"` (default), `"all"` or `"<method>_only"` (those of the adapted
            layers).
        modules_to_save (`Optional[list[str]]`):
            Modules that are trained and saved whole, such as a new classification head.
        layers_to_transform (`Optional[Union[list[int], int]]`):
            Only adapt layers with these indices; needs `target_modules` to be a list.
        layers_pattern (`Optional[Union[list[str], str]]`):
            The name of the module list that `layers_to_transform` counts in, if it is not one PEFT knows.
        trainable_token_indices (`Optional[Union[list[int], dict[str, list[int]]]]`):
            Ids of tokens whose embeddings are trained as well, as in PEFT's `LoraConfig`.
        format_version (`int`):
            The version of the adapter's file format, not to be set by hand. Files of an older one are converted, files
            of a newer one are refused.

    Raises:
        TypeError: If a field has a value that is not of its type.
        ValueError: If a field has a value it cannot have. Both messages name the field and what it takes.
    """

    target_modules: Optional[Union[Names, str]] = None
    exclude_modules: Optional[Union[Names, str]] = None
    init_weights: bool = True
    bias: str = "none"
    modules_to_save: Optional[Names] = None
    layers_to_transform: Optional[Union[Indices, int]] = None
    layers_pattern: Optional[Union[Names, str]] = None
    trainable_token_indices: Optional[Union[Indices, dict[str, Indices]]] = None
    format_version: Optional[int] = None

    # Of a config that was read from a file, until the adapter's weights are loaded: the names of the parameters that were
    # trainable before its layers were added, which a refused load restores. No field, and never saved.
    trainable_before = cast(Optional[set[str]], None)

    def __post_init__(self):
        if self.format_version is None:  # PEFT writes its version into every file; the first files had no other
            self.format_version = FORMAT_VERSION if self.peft_version is None else 1
        super().__post_init__()
        if type(self.format_version) is not int or self.format_version < 1:
            raise TypeError(f"`format_version` must be a positive int, not {self.format_version!r}.")
        if self.format_version > FORMAT_VERSION:
            raise ValueError(
                f"The adapter's `format_version` is {self.format_version}, and this hyperadapt_peft reads versions up to "
                f"{FORMAT_VERSION}. Install a newer one: `{INSTALL}`."
            )
        self._read_version(self.format_version)
        self.format_version = FORMAT_VERSION
        check_types(self)
        self.target_modules = names_or_regex(self.target_modules, "target_modules")
        self.exclude_modules = names_or_regex(self.exclude_modules, "exclude_modules")
        for name in ("modules_to_save", "layers_pattern"):
            patterns = names_or_regex(getattr(self, name), name)
            for pattern in patterns if isinstance(patterns, set) else ():
                names_or_regex(pattern, name)  # PEFT puts each into a regular expression
        if self.bias not in (biases := ("none", "all", f"{PeftType(self.peft_type).value.lower()}_only")):
            raise ValueError(f"`bias` must be one of {biases}, not {self.bias!r}.")
        layers, tokens = self.layers_to_transform, self.trainable_token_indices
        check_indices([layers] if isinstance(layers, int) else layers or (), "layers_to_transform")
        for ids in tokens.values() if isinstance(tokens, dict) else () if tokens is None else (tokens,):
            check_indices(ids, "trainable_token_indices")
            if not ids:
                raise ValueError("`trainable_token_indices` must not be empty; None means no tokens.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be used when `target_modules` is a str.")
        if isinstance(self.target_modules, str) and self.layers_pattern is not None:
            raise ValueError("`layers_pattern` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _read_version(self, version: int) -> None:
        """Give the fields the meaning that a file of this version had."""

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> TargetConfig:
        """Read `adapter_config.json`, as PEFT's `from_pretrained`.

        `init_weights` is True: should the weights, which come from a file too, be unreadable, the adapter changes
        nothing.
        """
        config = super().from_pretrained(*args, **kwargs)
        config.init_weights, config.trainable_before = True, set()
        return config

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Save `adapter_config.json`, and in the README beside it how to install and load the adapter.

        Without `import hyperadapt_peft` PEFT meets an unknown type and can only say `KeyError`.
        """
        super().save_pretrained(save_directory, **kwargs)
        add_usage(save_directory, self)


def check_types(config: PeftConfig) -> None:
    """Refuse the first field whose value is not of its annotated type; a bool is no int here.

    Raises:
        TypeError: If the value is of another type.
        ValueError: If it is none of the values of a `Literal`.
    """
    types = get_type_hints(type(config))
    for name in (field.name for field in fields(config) if field.name not in ("peft_type", "task_type")):
        value = getattr(config, name)
        try:
            type_validator(name, value, types[name])
        except TypeError:
            if get_origin(types[name]) is Literal:
                raise ValueError(f"`{name}` must be one of {get_args(types[name])}, not {value!r}.") from None
            kinds = get_args(types[name]) if get_origin(types[name]) is Union else [types[name]]
            expected = " or ".join("None" if kind is type(None) else formatannotation(kind) for kind in kinds)
            raise TypeError(f"`{name}` must be {expected}, not {value!r}.") from None


def names_or_regex(value: Optional[Union[Names, str]], name: str) -> Union[set[str], str, None]:
    """Return names as PEFT wants them, a set; a regular expression or None as it is.

    Raises:
        ValueError: If a name is empty, or a str is not a regular expression.
    """
    if isinstance(value, str):
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as exc:
            raise ValueError(f"`{name}` must be a regular expression, not {value!r}: {exc}.") from None
    elif value is not None:
        value = set(value)
    if value == "" or (isinstance(value, set) and "" in value):
        raise ValueError(f"`{name}` must not be an empty name or have one.")
    return value


def check_indices(value: Collection[int], name: str) -> None:
    """Raise ValueError if an index is negative or too large for any model."""
    if not all(0 <= item < 2**31 for item in value):
        raise ValueError(f"`{name}` must have no negative or huge indices, not {value!r}.")


def check_adapter_name(name: Any, taken: Collection[str]) -> None:
    """Check that an adapter can have this name: modules are called so, and `save_pretrained` makes a directory of it.

    `taken` are the names of parameters, and PEFT's own, that it would be confused with.

    Raises:
        TypeError: If it is not a str.
        ValueError: If it is not the name of one directory or module, or means something else already.
    """
    if not isinstance(name, str):
        raise TypeError(f"`adapter_name` must be a str, not {name!r}.")
    containers = (nn.ModuleDict(), nn.ParameterDict(), BufferDict())
    if not name or set(name) & set("./\\:\0") or name == "__base__" or any(name in dir(c) for c in containers):
        raise ValueError(
            f"An adapter cannot be called {name!r}: a directory and a module get its name, so it must not be empty, hold "
            "any of . / \\ : or be the name of an attribute of torch.nn.ModuleDict; '__base__' means no adapter."
        )
    if name in taken:
        raise ValueError(
            f"An adapter cannot be called {name!r}: something inside the model is, and PEFT tells what belongs to an adapter "
            "by its name."
        )
