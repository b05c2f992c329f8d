"""What differs between the tasks: the model class, the encoding of a row, the collator, the metrics."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers
from datasets import ClassLabel, Dataset, Image
from transformers import AutoImageProcessor, AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

from . import scoring
from .data import Data, ImageClassificationData, PromptData, TextClassificationData
from .errors import RecipeError, suggestion
from .scoring import IGNORED


@dataclass
class EncodedData:
    """A task's data, ready for the Trainer, with what its model must be told and how it is scored."""

    splits: Mapping[str, Any]
    collator: Callable[[list[Any]], dict[str, Any]]
    processor: Any
    metrics: scoring.Metrics
    labels: list[str] = field(default_factory=list)  # empty: no head; one: a regression
    keep_columns: bool = False  # the collator needs columns that are no arguments of the model
    trainer: Callable[..., scoring.RecipeTrainer] = scoring.ArgmaxTrainer

    @property
    def model_options(self) -> dict[str, Any]:
        """The arguments of the model's `from_pretrained`: a fresh head of the right size for a classification."""
        if not self.labels:
            return {}
        names = dict(enumerate(self.labels))
        return {
            "id2label": names,
            "label2id": {name: index for index, name in names.items()},
            "ignore_mismatched_sizes": True,
        }


@dataclass(frozen=True)
class Task:
    """One row of the table of tasks."""

    data: type[Data]
    auto_model: Any
    encode: Callable[[Any, dict[str, Dataset], str, str | None], EncodedData]
    task_type: str | None  # of PEFT

    @property
    def has_head(self) -> bool:
        """Whether its models have a classification head."""
        return self.task_type != "CAUSAL_LM"


def find_task(name: str) -> Task:
    """The task of that name. Raises RecipeError."""
    if name not in TASKS:
        raise RecipeError(f"task: expected one of {', '.join(TASKS)}, got {name!r}{suggestion(name, TASKS)}")
    return TASKS[name]


def load_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer, padding with its end of text when it has no padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def label_ids(splits: dict[str, Dataset], column: str) -> tuple[list[str], dict[Any, int]]:
    """The labels' names and value -> index: of a `ClassLabel` column, or else the sorted values of the training split.

    Raises:
        RecipeError: an evaluation split holds a label that training never sees.
    """
    feature = splits["train"].features[column]
    named = isinstance(feature, ClassLabel)
    values = range(feature.num_classes) if named else sorted(splits["train"].unique(column))
    for role, split in splits.items():
        if unknown := set(split.unique(column)) - set(values):
            raise RecipeError(f"data.{role}_split: {unknown.pop()!r} in its {column} is not one of training's labels")
    names = list(feature.names) if named else [str(value) for value in values]
    return names, {value: index for index, value in enumerate(values)}


def sequence_classification(
    data: TextClassificationData, splits: dict[str, Dataset], model: str, revision: str | None
) -> EncodedData:
    """Tokenized texts or pairs, padded per batch."""
    tokenizer = load_tokenizer(model, revision)
    text_columns = [column for column in (data.text_column, data.text_pair_column) if column]
    label: Callable[[Any], float]
    if data.metric in scoring.REGRESSION:
        names, metrics, label = [data.label_column], scoring.REGRESSION, float
    else:
        names, ids = label_ids(splits, data.label_column)
        metrics, label = scoring.classification(len(names)), ids.__getitem__

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in text_columns]
        labels = [label(value) for value in batch[data.label_column]]
        return {**tokenizer(*texts, truncation=True, max_length=data.max_length), "labels": labels}

    encoded = {role: rows.map(encode, batched=True, remove_columns=rows.column_names) for role, rows in splits.items()}
    return EncodedData(encoded, DataCollatorWithPadding(tokenizer), tokenizer, metrics, names)


def causal_lm(data: PromptData, splits: dict[str, Dataset], model: str, revision: str | None) -> EncodedData:
    """Prompt, completion and end of text in one sequence; the loss sees the completion and the end only."""
    tokenizer = load_tokenizer(model, revision)
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    keys = ("input_ids", "attention_mask", "labels")

    def sequence(before: list[int], completion: str) -> dict[str, list[int]]:
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        after = after[: data.max_length]
        before = before[max(len(before) + len(after) - data.max_length, 0) :]
        ids = before + after
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(before) + after}

    def encode(row: dict[str, Any], with_others: bool) -> dict[str, Any]:
        prompt, completion, others = data.texts(row)
        space = ""
        if data.chat_template:
            turn = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        else:  # tokenizers that keep spaces put one at the beginning of the word after it
            space = prompt[len(prompt.rstrip(" ")) :]
            before = tokenizer(prompt.rstrip(" ")).input_ids
        encoded: dict[str, Any] = sequence(before, space + completion)
        if with_others:
            encoded["others"] = [sequence(before, space + other) for other in others]
        return encoded

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        if "others" not in rows[0]:
            return pad(rows)
        others = [(index, other) for index, row in enumerate(rows) for other in row["others"]]
        batch = pad([{key: row[key] for key in keys} for row in (*rows, *(other for _, other in others))])
        return {**batch, "example": torch.tensor([index for index, _ in others])}

    choosing = data.metric == "choice_likelihood"
    encoded = {}
    for role, rows in splits.items():
        options = {"with_others": choosing and role != "train"}
        encoded[role] = rows.map(encode, fn_kwargs=options, remove_columns=rows.column_names)
    trainers: dict[str, Any] = {
        "choice_likelihood": scoring.ChoiceTrainer,
        "exact_match": partial(scoring.GenerationTrainer, max_new_tokens=data.max_new_tokens, answer=data.answer),
    }
    trainer = trainers.get(data.metric, scoring.ArgmaxTrainer)
    metric = scoring.mean if data.metric in trainers else scoring.token_accuracy
    return EncodedData(encoded, collate, tokenizer, {str(data.metric): metric}, keep_columns=choosing, trainer=trainer)


def image_classification(
    data: ImageClassificationData, splits: dict[str, Dataset], model: str, revision: str | None
) -> EncodedData:
    """Images as they are on disk; the collator decodes and resizes them batch by batch."""
    processor = AutoImageProcessor.from_pretrained(model, revision=revision)
    names, ids = label_ids(splits, data.label_column)
    size = {} if data.image_size is None else {"size": {"height": data.image_size, "width": data.image_size}}

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [row[data.image_column].convert("RGB") for row in rows]
        labels = [ids[row[data.label_column]] for row in rows]
        return {**processor(images=images, return_tensors="pt", **size), "labels": torch.tensor(labels)}

    decoded = {role: rows.cast_column(data.image_column, Image()) for role, rows in splits.items()}
    return EncodedData(decoded, collate, processor, scoring.classification(len(names)), names, keep_columns=True)


TASKS = {
    "sequence-classification": Task(
        TextClassificationData, transformers.AutoModelForSequenceClassification, sequence_classification, "SEQ_CLS"
    ),
    "causal-lm": Task(PromptData, transformers.AutoModelForCausalLM, causal_lm, "CAUSAL_LM"),
    "image-classification": Task(
        ImageClassificationData, transformers.AutoModelForImageClassification, image_classification, None
    ),
}
