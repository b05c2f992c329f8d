"""A recipe: a YAML file with the sections task, model, data, tuner and training, checked before anything is loaded."""

import copy
import dataclasses
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import TrainingArguments

from .data import Data, check_source
from .errors import RecipeError, first_line, nearest
from .tasks import TASKS, Task


SECTIONS = ("task", "model", "data", "tuner", "training")
WITHOUT_ADAPTER = ("FULL", "NONE")  # every parameter is trained; only the classification head is


@dataclass(frozen=True)
class Model:
    """The `model` section.

    Args:
        name: a Hub id or a local directory.
        revision: the revision on the Hub.
        dtype: of the weights; `auto` is what the checkpoint holds.
        config: what differs from the model's own config in training, such as `hidden_dropout_prob: 0.0`.
    """

    name: str
    revision: str | None = None
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_source("model.name", self.name)


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `peft_config` is None for the types FULL and NONE; `resolved` is the recipe as plain data."""

    task: Task
    model: Model
    data: Data
    peft_type: str
    peft_config: PeftConfig | None
    arguments: TrainingArguments
    resolved: dict[str, Any]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides (the value is YAML), and check all of it.

    A section may be a part of another file, `data: data/glue.yaml#rte`, looked for beside the recipe.

    Raises:
        RecipeError: anything in it is wrong; the message is one line that names the key.
    """
    values = read_yaml(Path(path))
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected the sections {', '.join(SECTIONS)}")
    directory = Path(path).parent
    refer(values, directory)
    for override in overrides:
        _override(values, override)
        refer(values, directory)
    return check(values)


def refer(values: dict[str, Any], directory: Path) -> None:
    """Replace each section that names a part of another file, `data: data/glue.yaml#rte`, by that part, in place.

    Raises:
        RecipeError: there is no such file, or no such part of it.
    """
    for section in SECTIONS[1:]:
        reference = values.get(section)
        if isinstance(reference, str) and "#" in reference:
            name, _, key = reference.rpartition("#")
            parts = read_yaml(directory / name)
            if not isinstance(parts, dict) or key not in parts:
                raise RecipeError(f"{section}: {name} has no part '{key}'{nearest(key, parts or ())}")
            values[section] = parts[key]


def check_sections(values: Mapping[str, Any]) -> None:
    """Whether these are a recipe's sections, whatever their content. Raises RecipeError."""
    for section in values:
        if section not in SECTIONS:
            raise RecipeError(f"{section}: unknown section{nearest(str(section), SECTIONS)}")
    for section in SECTIONS:
        if section not in values:
            raise RecipeError(f"{section}: missing section")
        if section != "task" and not isinstance(values[section], dict):
            raise RecipeError(f"{section}: expected keys with values, got {values[section]!r}")


def check(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `values` (section -> its content) describe. Raises RecipeError."""
    check_sections(values)
    name = str(values["task"])
    if name not in TASKS:
        raise RecipeError(f"task: expected one of {', '.join(TASKS)}, got {name!r}{nearest(name, TASKS)}")
    task = TASKS[name]
    peft_type, config_class, tuner = _tuner(dict(values["tuner"]), task)
    resolved: dict[str, Any] = {
        "task": name,
        "model": _fields("model", values["model"], Model),
        "data": _fields("data", values["data"], task.data),
        "tuner": {"peft_type": peft_type, **tuner},
        "training": _fields("training", values["training"], TrainingArguments),
    }
    recipe = Recipe(
        task=task,
        model=_build("model", Model, resolved["model"]),
        data=_build("data", task.data, resolved["data"]),
        peft_type=peft_type,
        peft_config=_build("tuner", config_class, tuner) if config_class else None,
        arguments=_build("training", TrainingArguments, resolved["training"]),
        resolved=resolved,
    )
    if not resolved["training"].get("output_dir"):
        raise RecipeError("training.output_dir: missing, expected str")
    for key in ("bf16_full_eval", "fp16_full_eval", "prediction_loss_only"):
        if getattr(recipe.arguments, key):  # the Trainer would round the weights being trained; or give no accuracy
            raise RecipeError(f"training.{key}: not supported")
    checkpoint = recipe.arguments.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise RecipeError(f"training.resume_from_checkpoint: no such directory '{checkpoint}'")
    if recipe.arguments.eval_strategy != "no" and recipe.data.validation_split is None:
        raise RecipeError("data.validation_split: expected a split, for training.eval_strategy is not 'no'")
    return recipe


def read_tuner(values: Mapping[str, Any] | str, task: Task) -> tuple[str, PeftConfig | None]:
    """The type and the config that a `tuner` section, or its YAML, describes; FULL and NONE have no config.

    Raises:
        RecipeError: anything in it is wrong; the message is one line that names the key.
    """
    try:
        section = yaml.safe_load(values) if isinstance(values, str) else values
    except yaml.YAMLError as error:
        raise RecipeError(f"tuner: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(section, Mapping):
        raise RecipeError(f"tuner: expected keys with values, got {section!r}")
    peft_type, config_class, tuner = _tuner(dict(section), task)
    return peft_type, _build("tuner", config_class, tuner) if config_class else None


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises RecipeError if it cannot be read or is not YAML."""
    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {' '.join(str(error).split())}") from error


def _override(values: dict[str, Any], override: str) -> None:
    """Set one `section.key=value` in place."""
    path, equals, text = override.partition("=")
    *sections, key = path.split(".")
    if not equals or not all((*sections, key)):
        raise RecipeError(f"{override}: expected section.key=value")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeError(f"{override}: '{section}' has no keys")
    try:
        values[key] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override}: the value is not YAML") from error


def _tuner(values: dict[str, Any], task: Task) -> tuple[str, type[PeftConfig] | None, dict[str, Any]]:
    """The tuner's type, its config class and its checked fields, completed with what the task implies."""
    known = [*(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING), *WITHOUT_ADAPTER]
    if "peft_type" not in values:
        raise RecipeError("tuner.peft_type: missing, expected a PEFT method such as HYPERADAPT")
    peft_type = str(values.pop("peft_type"))
    if peft_type not in known:
        raise RecipeError(f"tuner.peft_type: unknown type {peft_type!r}{nearest(peft_type, known)}")
    if peft_type in WITHOUT_ADAPTER:
        if values:
            raise RecipeError(f"tuner.{next(iter(values))}: unknown key; {peft_type} takes none")
        if peft_type == "NONE" and task.task_type == "CAUSAL_LM":
            raise RecipeError("tuner.peft_type: NONE trains the classification head only, and this task has none")
        return peft_type, None, {}
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)]
    fields = _fields("tuner", values, config_class)
    fields.setdefault("task_type", task.task_type)
    return peft_type, config_class, fields


def _build(section: str, cls: type[Any], values: dict[str, Any]) -> Any:
    """An instance of `cls`; what its own checks refuse becomes a RecipeError."""
    try:
        return cls(**copy.deepcopy(values))  # PEFT extends lists it was given
    except RecipeError:
        raise
    except (ValueError, TypeError, ImportError) as error:
        raise RecipeError(f"{section}: {first_line(error)}") from error


def _fields(section: str, values: Mapping[str, Any], cls: type[Any]) -> dict[str, Any]:
    """`values` checked against the fields of the dataclass `cls`, as plain data of the right types."""
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    checked = {}
    for key, value in values.items():
        if key not in fields:
            raise RecipeError(f"{section}.{key}: unknown key{nearest(str(key), fields)}")
        try:
            checked[key] = _convert(value, hints[key])
        except _Mismatch as mismatch:
            raise RecipeError(f"{section}.{key}: expected {mismatch}, got {value!r}{mismatch.hint}") from mismatch
    for name, field in fields.items():
        if field.default is field.default_factory is dataclasses.MISSING and name not in checked:
            raise RecipeError(f"{section}.{name}: missing, expected {_describe(hints[name])}")
    return checked


class _Mismatch(Exception):
    """A value is not of the type expected; the message is the expectation, `hint` the nearest valid choice."""

    def __init__(self, expected: str, hint: str = "") -> None:
        super().__init__(expected)
        self.hint = hint


def _convert(value: Any, hint: Any) -> Any:
    """`value`, as YAML gives it, as the type `hint`: 1 and "1e-3" are floats, `no` is a choice of an enum.

    Raises:
        _Mismatch: it is nothing of the kind.
    """
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        enums = [arg for arg in args if _is_enum(arg)]
        mismatch = _Mismatch(_describe(hint))
        for arg in args:
            if enums and arg is str:  # `SomeEnum | str` means one of the enum's values
                continue
            try:
                return _convert(value, arg)
            except _Mismatch as error:
                mismatch.hint = mismatch.hint or error.hint
        raise mismatch
    if origin is Literal:
        return _choice(value, args)
    if _is_enum(hint):
        return _choice("no" if value is False else value, [member.value for member in hint])
    if origin in (list, tuple, set):
        if not isinstance(value, list):
            raise _Mismatch(_describe(hint))
        return [_convert(item, args[0]) for item in value]
    if origin is dict:
        if not isinstance(value, dict):
            raise _Mismatch(_describe(hint))
        return {_convert(key, args[0]): _convert(item, args[1]) for key, item in value.items()}
    if hint is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            raise _Mismatch("float") from None
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise _Mismatch(_describe(hint))
    return value


def _choice(value: Any, choices: Sequence[Any]) -> Any:
    """`value` when it is one of `choices`; PEFT writes an open one as `pissa_niter_[number of iters]`."""
    open_choices = tuple(str(choice).partition("[")[0] for choice in choices if "[" in str(choice))
    if value in choices or (open_choices and str(value).startswith(open_choices)):
        return value
    hint = nearest(value, map(str, choices)) if isinstance(value, str) else ""
    raise _Mismatch(f"one of {', '.join(map(str, choices))}", hint)


def _is_enum(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Enum)


def _describe(hint: Any) -> str:
    """A type as one would write it in an annotation."""
    if get_origin(hint) in (Union, types.UnionType):
        return " | ".join(dict.fromkeys(_describe(arg) for arg in get_args(hint)))
    if hint is type(None):
        return "null"
    return hint.__name__ if isinstance(hint, type) and not get_args(hint) else str(hint).replace("typing.", "")
