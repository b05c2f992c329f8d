"""The `data` section of a recipe, and the loading of its splits."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from datasets import Dataset, load_dataset, load_from_disk
from datasets.exceptions import DatasetsError
from pydantic import Field

from .errors import RecipeError, errors_about, suggestion


FILE_FORMATS = ("csv", "json", "parquet")
Count = Annotated[int, Field(ge=1)]


@dataclass(frozen=True)
class Data:
    """What every task's `data` section has.

    Args:
        name: a Hub id; a local directory (of data files, or one that `save_to_disk` wrote); or `csv`, `json` or
            `parquet` for the files in `data_files`.
        config: the configuration of a Hub dataset.
        revision: the revision of a Hub dataset.
        data_files: local files, split -> path. A json file may hold JSON lines.
        train_split: the split to train on; slices such as `train[:90%]` work too.
        validation_split: the split evaluated during training, or null.
        test_split: the split reported at the end, or null.
        max_train_samples: train on this many rows (a fixed shuffle picks them), default all; likewise the next two.
        metric: what `hyperadapt compare` chooses on and the summary shows.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    data_files: dict[str, str] | None = None
    train_split: str = "train"
    validation_split: str | None = "validation"
    test_split: str | None = "test"
    max_train_samples: Count | None = None
    max_validation_samples: Count | None = None
    max_test_samples: Count | None = None
    metric: str = "accuracy"

    def __post_init__(self) -> None:
        if self.validation_split is None and self.test_split is None:
            raise RecipeError("data.test_split: expected a split to evaluate on, here or in data.validation_split")
        formats = ", ".join(FILE_FORMATS)
        if self.name not in FILE_FORMATS and Path(self.name).expanduser().is_file():
            place = f"put it into data.data_files, such as {{train: {self.name}}}, and its format ({formats}) here"
            raise RecipeError(f"data.name: '{self.name}' is a file; {place}")
        if (self.name in FILE_FORMATS) != (self.data_files is not None):
            raise RecipeError(f"data.data_files: expected with name {formats}, and only there")
        for split, file in (self.data_files or {}).items():
            if not Path(file).is_file():
                raise RecipeError(f"data.data_files.{split}: no such file '{file}'")
        object.__setattr__(self, "name", resolve_source("data.name", self.name))

    @property
    def splits(self) -> dict[str, str]:
        """Role (train, validation, test) -> the split that plays it."""
        splits = {"train": self.train_split, "validation": self.validation_split, "test": self.test_split}
        return {role: split for role, split in splits.items() if split is not None}

    @property
    def columns(self) -> dict[str, str]:
        """Key of this section -> the column it names."""
        return {key: column for key, column in vars(self).items() if key.endswith("_column") and column is not None}


@dataclass(frozen=True)
class TextClassificationData(Data):
    """One text, or a pair of them when `text_pair_column` is given, and a label; cut to `max_length` tokens.

    The metrics pearson and spearman make it a regression: the label is a number.
    """

    text_column: str = "text"
    text_pair_column: str | None = None
    label_column: str = "label"
    max_length: int = 128
    metric: Literal["accuracy", "f1", "matthews_correlation", "pearson", "spearman"] = "accuracy"


@dataclass(frozen=True)
class PromptData(Data):
    """A prompt and its completion; a prompt too long for `max_length` tokens loses its beginning.

    Args:
        prompt_column: the column with the prompt.
        completion_column: the column with the completion, or with the right choice's label.
        prompt: the prompt as a format string over the row's columns, such as "{context} {question}", in place of
            `prompt_column`.
        choices: what to choose from: a column that holds a list, or a list of format strings.
        choice_labels: what `completion_column` calls the choices: a column, or a list; default 0, 1, ... Of nested
            columns write `choices.text`.
        max_length: in tokens, of both together.
        chat_template: make the prompt a user's turn in the tokenizer's own template.
        metric: `token_accuracy` of the completion; `exact_match` of what is generated with the completion; or
            `choice_likelihood`, how often the right choice is the likeliest per token.
        answer_pattern: `exact_match` compares the last match of this regular expression (its first group, where it has
            one), default all of the text; without spaces around it.
        max_new_tokens: `exact_match` generates no more than this.
    """

    prompt_column: str = "prompt"
    completion_column: str = "completion"
    prompt: str | None = None
    choices: str | list[str] | None = None
    choice_labels: str | list[str] | None = None
    max_length: int = 512
    chat_template: bool = False
    metric: Literal["token_accuracy", "exact_match", "choice_likelihood"] = "token_accuracy"
    answer_pattern: str | None = None
    max_new_tokens: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.metric == "choice_likelihood" and self.choices is None:
            raise RecipeError("data.choices: expected with data.metric choice_likelihood")
        if self.choice_labels is not None and self.choices is None:
            raise RecipeError("data.choice_labels: expected with data.choices only")
        try:
            re.compile(self.answer_pattern or "")
        except re.error as error:
            raise RecipeError(f"data.answer_pattern: not a regular expression: {error}") from error

    @property
    def columns(self) -> dict[str, str]:
        """Key of this section -> the column it names."""
        columns = super().columns
        if self.prompt is not None:
            del columns["prompt_column"]
        return columns

    def texts(self, row: dict[str, Any]) -> tuple[str, str, list[str]]:
        """The prompt of a row, its completion, and the other choices."""
        prompt = row[self.prompt_column] if self.prompt is None else self._format(self.prompt, row)
        completion = str(row[self.completion_column])
        if self.choices is None:
            return prompt, completion, []
        if isinstance(self.choices, list):
            choices = [self._format(choice, row) for choice in self.choices]
        else:
            choices = _nested(row, self.choices)
        labels = self.choice_labels or range(len(choices))
        names = [str(label) for label in (_nested(row, labels) if isinstance(labels, str) else labels)]
        if completion not in names:
            wrong = f"{completion!r} in {self.completion_column} is not one of {', '.join(names)}"
            raise RecipeError(f"data.choice_labels: {wrong}")
        right = choices[names.index(completion)]
        return prompt, right, [choice for choice in choices if choice != right]

    def answer(self, text: str) -> str:
        """The part of a completion that `exact_match` compares."""
        matches = [*re.finditer(self.answer_pattern, text)] if self.answer_pattern else []
        return (matches[-1][matches[-1].re.groups and 1] if matches else text).strip()

    @staticmethod
    def _format(template: str, row: dict[str, Any]) -> str:
        try:
            return template.format_map(row)
        except (KeyError, IndexError, ValueError) as error:
            raise RecipeError(f"data: the template {template!r} does not fit the columns {', '.join(row)}") from error


@dataclass(frozen=True)
class ImageClassificationData(Data):
    """An image and its label; resized to `image_size` pixels square, default as the model's image processor says."""

    image_column: str = "image"
    label_column: str = "label"
    image_size: int | None = None
    metric: Literal["accuracy", "f1", "matthews_correlation"] = "accuracy"


def _nested(row: dict[str, Any], column: str) -> Any:
    """The list in a column, or in one nested in others: `choices.text`."""
    value: Any = row
    try:
        for name in column.split("."):
            value = value[name]
    except (KeyError, TypeError) as error:
        raise RecipeError(f"data: no column '{column}'{suggestion(column, row)}") from error
    return value


def resolve_source(key: str, name: str) -> str:
    """A path with its `~` expanded, or a Hub id as it is. Raises RecipeError when `name` is a path that does not exist."""
    looks_local = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1
    path = Path(name).expanduser()
    if looks_local and not path.exists():
        raise RecipeError(f"{key}: no such directory '{name}'")
    return str(path) if looks_local else name


def load_splits(data: Data) -> dict[str, Dataset]:
    """Role -> dataset, subsampled, with every column of the recipe present.

    Raises:
        RecipeError: the dataset, a split or a column does not exist.
    """
    source = data.name if data.data_files is None else None
    with errors_about(f"data: cannot load '{data.name}'", source, DatasetsError):
        if Path(data.name, "dataset_dict.json").is_file():
            saved = load_from_disk(data.name)
            for split in data.splits.values():
                if split not in saved:
                    raise RecipeError(f"data: {data.name} has no split '{split}'{suggestion(split, saved)}")
            splits = {role: saved[split] for role, split in data.splits.items()}
        else:
            options = {"name": data.config, "revision": data.revision, "data_files": data.data_files}
            loaded = load_dataset(data.name, split=list(data.splits.values()), **options)
            splits = dict(zip(data.splits, loaded, strict=True))
    for role, split in splits.items():
        for key, column in data.columns.items():
            if column not in split.column_names:
                hint = suggestion(column, split.column_names)
                raise RecipeError(f"data.{key}: the {role} split has no column '{column}'{hint}")
        limit = getattr(data, f"max_{role}_samples")
        if limit is not None and limit < len(split):
            splits[role] = split.shuffle(seed=0).select(range(limit))
    return splits
