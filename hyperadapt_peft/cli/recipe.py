"""A recipe: a YAML file with the sections task, model, data, tuner and training, checked before anything is loaded."""

import copy
import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_type_hints

import yaml
from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from pydantic import ConfigDict, TypeAdapter, ValidationError, with_config
from transformers import TrainingArguments
from typing_extensions import NotRequired, TypedDict  # pydantic takes typing's from Python 3.12 on

from .data import Data, resolve_source
from .errors import RecipeError, errors_about, suggestion
from .tasks import Task, find_task


SECTIONS = ("task", "model", "data", "tuner", "training")
T = TypeVar("T")
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
        object.__setattr__(self, "name", resolve_source("model.name", self.name))


@dataclass
class Training(TrainingArguments):
    """The `training` section: what transformers' TrainingArguments take, and a rate of the head's own.

    Args:
        head_learning_rate: the learning rate of the classification head; None is the adapter's.
    """

    head_learning_rate: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A checked recipe. `peft_config` is None for the types FULL and NONE; `resolved` is the recipe as plain data."""

    task: Task
    model: Model
    data: Data
    peft_type: str
    peft_config: PeftConfig | None
    arguments: Training
    resolved: dict[str, Any]


def load(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe, apply `section.key=value` overrides (the value is YAML), and check all of it.

    Raises:
        RecipeError: anything in it is wrong; the message is one line that names the key.
    """
    values = read_sections(Path(path))
    for override in overrides:
        _override(values, override)
        _resolve_references(values, Path(path).parent)
    return check(values)


def read_sections(path: Path) -> dict[str, Any]:
    """What a recipe's file holds; a section may be a part of another file beside it, `data: data/glue.yaml#rte`.

    Raises:
        RecipeError: there is no such file, or no such part of it, or no sections.
    """
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: expected the sections {', '.join(SECTIONS)}")
    _resolve_references(values, path.parent)
    return values


def _resolve_references(values: dict[str, Any], directory: Path) -> None:
    for section in SECTIONS[1:]:
        reference = values.get(section)
        if isinstance(reference, str) and "#" in reference:
            name, _, key = reference.rpartition("#")
            parts = read_yaml(directory / name)
            if not isinstance(parts, dict) or key not in parts:
                raise RecipeError(f"{section}: {name} has no part '{key}'{suggestion(key, parts or ())}")
            values[section] = parts[key]


def check_sections(values: Mapping[str, Any]) -> None:
    """Whether these are a recipe's sections, whatever their content. Raises RecipeError."""
    for section in values:
        if section not in SECTIONS:
            raise RecipeError(f"{section}: unknown section{suggestion(str(section), SECTIONS)}")
    for section in SECTIONS:
        if section not in values:
            raise RecipeError(f"{section}: missing section")
        if section != "task" and not isinstance(values[section], dict):
            raise RecipeError(f"{section}: expected keys with values, got {values[section]!r}")


def check(values: Mapping[str, Any]) -> Recipe:
    """The recipe that `values` (section -> its content) describe. Raises RecipeError."""
    check_sections(values)
    resolved: dict[str, Any] = {section: copy.deepcopy(values[section]) for section in SECTIONS}
    task = find_task(str(values["task"]))
    resolved["tuner"], peft_config = read_tuner(values["tuner"], task)
    model = make("model", values["model"], Model)
    data = make("data", values["data"], task.data)
    if not values["training"].get("output_dir"):
        raise RecipeError("training.output_dir: missing")
    arguments = make("training", values["training"], Training)
    for key in ("bf16_full_eval", "fp16_full_eval", "prediction_loss_only"):
        if getattr(arguments, key):  # the Trainer would round the weights being trained; or give no accuracy
            raise RecipeError(f"training.{key}: not supported")
    if arguments.head_learning_rate is not None and not task.has_head:
        raise RecipeError("training.head_learning_rate: this task has no classification head")
    checkpoint = arguments.resume_from_checkpoint
    if checkpoint is not None and not Path(checkpoint).is_dir():
        raise RecipeError(f"training.resume_from_checkpoint: no such directory '{checkpoint}'")
    if arguments.eval_strategy != "no" and data.validation_split is None:
        raise RecipeError("data.validation_split: expected a split, for training.eval_strategy is not 'no'")
    return Recipe(task, model, data, resolved["tuner"]["peft_type"], peft_config, arguments, resolved)


def read_tuner(values: Mapping[str, Any] | str, task: Task) -> tuple[dict[str, Any], PeftConfig | None]:
    """A `tuner` section, or its YAML, completed with what the task implies, and its config, which FULL and NONE lack.

    Raises:
        RecipeError: anything in it is wrong; the message is one line that names the key.
    """
    section = _parse(values, "tuner") if isinstance(values, str) else values
    if not isinstance(section, Mapping):
        raise RecipeError(f"tuner: expected keys with values, got {section!r}")
    fields = copy.deepcopy(dict(section))
    known = [*(str(kind.value) for kind in PEFT_TYPE_TO_CONFIG_MAPPING), *WITHOUT_ADAPTER]
    if "peft_type" not in fields:
        raise RecipeError("tuner.peft_type: missing, expected a PEFT method such as HYPERADAPT")
    peft_type = str(fields.pop("peft_type"))
    if peft_type not in known:
        raise RecipeError(f"tuner.peft_type: unknown type {peft_type!r}{suggestion(peft_type, known)}")
    if peft_type not in WITHOUT_ADAPTER:
        fields.setdefault("task_type", task.task_type)
        config = make("tuner", fields, PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(peft_type)])
        return {"peft_type": peft_type, **fields}, config
    if fields:
        raise RecipeError(f"tuner.{next(iter(fields))}: unknown key; {peft_type} takes none")
    if peft_type == "NONE" and not task.has_head:
        raise RecipeError("tuner.peft_type: NONE trains the classification head only, and this task has none")
    return {"peft_type": peft_type}, None


def make(section: str, values: Mapping[str, Any], cls: type[T]) -> T:
    """`cls(**values)`, checked. Raises RecipeError, also about what the class itself refuses."""
    if not isinstance(values, Mapping):
        raise RecipeError(f"{section}: expected keys with values, got {values!r}")
    check_fields(f"{section}.", values, cls)
    with errors_about(section):
        return cls(**copy.deepcopy(dict(values)))  # PEFT extends lists it was given


def check_fields(prefix: str, values: Mapping[str, Any], cls: type[Any]) -> None:
    """Check plain data against the fields of the dataclass `cls`.

    Raises:
        RecipeError: a key is unknown, missing or of another type; the message is one line that names prefix and key.
    """
    hints = get_type_hints(cls, include_extras=True)
    fields = {}
    for field in dataclasses.fields(cls):
        if field.init:
            required = field.default is field.default_factory is dataclasses.MISSING
            hint = _without_free_text(hints[field.name])
            fields[field.name] = hint if required else NotRequired[hint]
    config = ConfigDict(extra="forbid", strict=True, arbitrary_types_allowed=True)
    schema = with_config(config)(TypedDict("schema", fields))  # type: ignore[misc, operator]
    try:
        TypeAdapter(schema).validate_json(json.dumps(values))
    except ValidationError as error:
        _raise_first(prefix, values, error, fields)


def _raise_first(prefix: str, values: Mapping[str, Any], error: ValidationError, fields: Mapping[str, Any]) -> None:
    """Raise RecipeError for the first key that pydantic refuses, unless PEFT takes its value all the same."""
    errors: dict[str, list[Any]] = {}
    for entry in error.errors(include_url=False):
        errors.setdefault(str(entry["loc"][0]), []).append(entry)
    for key, entries in errors.items():
        if entries[0]["type"] == "extra_forbidden":
            raise RecipeError(f"{prefix}{key}: unknown key{suggestion(key, fields)}")
        if entries[0]["type"] == "missing":
            raise RecipeError(f"{prefix}{key}: missing")
        choices = re.findall("'(.*?)'", " ".join(entry.get("ctx", {}).get("expected", "") for entry in entries))
        openings = tuple(choice.partition("[")[0] for choice in choices if "[" in choice)
        value = values[key]
        if isinstance(value, str) and openings and value.startswith(openings):
            continue  # PEFT writes such a choice as `pissa_niter_[number of iters]`
        expected = " or ".join(dict.fromkeys(entry["msg"].replace("Input should be", "expected") for entry in entries))
        expected = expected.replace("an object", "keys with values")  # YAML's users know no JSON
        hint = suggestion(value, choices) if isinstance(value, str) else ""
        raise RecipeError(f"{prefix}{key}: {expected.replace(' or expected', ' or')}, got {value!r}{hint}")


def _without_free_text(hint: Any) -> Any:
    """`SomeEnum | str`, which transformers writes for one of the enum's values, without the `str`."""
    members = get_args(hint)
    enum = any(isinstance(member, type) and issubclass(member, Enum) for member in members)
    return Union[tuple(member for member in members if member is not str)] if enum else hint


class _Loader(yaml.SafeLoader):
    """YAML as of version 1.2 in what recipes need: `no` and dates are text, and 1e-3 is a number."""

    yaml_implicit_resolvers: ClassVar = {  # type: ignore[misc]
        first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile("(?i:true|false)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_yaml(path: Path) -> Any:
    """What a YAML file holds. Raises RecipeError if it cannot be read or is not YAML."""
    try:
        return _parse(path.read_text(), str(path))
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from error


def _parse(text: str, key: str) -> Any:
    """What YAML says. Raises RecipeError about `key`."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.YAMLError as error:
        raise RecipeError(f"{key}: not YAML: {' '.join(str(error).split())}") from error


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
    values[key] = _parse(text, path)
