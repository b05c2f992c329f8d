"""What differs between the tasks: the model class, the encoding of a row, the collator."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Image
from transformers import (
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    EvalPrediction,
)

from .data import Data, ImageClassificationData, PromptData, TextClassificationData
from .errors import RecipeError


IGNORED = -100  # the label the loss leaves out


@dataclass
class Prepared:
    """A task's data, ready for the Trainer, with what its model must be told."""

    splits: Mapping[str, Any]
    collator: Callable[[list[Any]], dict[str, Any]]
    processor: Any
    labels: list[str] = field(default_factory=list)  # empty: not a classification
    keep_columns: bool = False  # the collator needs columns that are no arguments of the model

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
    prepare: Callable[[Any, dict[str, Dataset], str, str | None], Prepared]
    task_type: str | None  # of PEFT


def load_tokenizer(model: str, revision: str | None) -> Any:
    """The tokenizer, padding with its end of text when it has no padding token."""
    tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def label_names(splits: dict[str, Dataset], column: str) -> list[str]:
    """The names of a `ClassLabel` column, or else the sorted values of the training split.

    Raises:
        RecipeError: an evaluation split holds a label that training never sees.
    """
    feature = splits["train"].features[column]
    named = isinstance(feature, ClassLabel)
    values = range(feature.num_classes) if named else sorted(splits["train"].unique(column))
    for role, split in splits.items():
        if unknown := set(split.unique(column)) - set(values):
            raise RecipeError(f"data.{role}_split: {unknown.pop()!r} in its {column} is not one of training's labels")
    return list(feature.names) if named else [str(value) for value in values]


def label_ids(values: list[Any], names: list[str], feature: Any) -> list[int]:
    """The labels of a batch as indices into `names`."""
    return values if isinstance(feature, ClassLabel) else [names.index(str(value)) for value in values]


def sequence_classification(
    data: TextClassificationData, splits: dict[str, Dataset], model: str, revision: str | None
) -> Prepared:
    """Tokenized texts or pairs, padded per batch."""
    tokenizer = load_tokenizer(model, revision)
    names = label_names(splits, data.label_column)
    text_columns = [column for column in (data.text_column, data.text_pair_column) if column]
    feature = splits["train"].features[data.label_column]

    def encode(batch: dict[str, list[Any]]) -> dict[str, Any]:
        texts = [batch[column] for column in text_columns]
        labels = label_ids(batch[data.label_column], names, feature)
        return {**tokenizer(*texts, truncation=True, max_length=data.max_length), "labels": labels}

    encoded = {role: rows.map(encode, batched=True, remove_columns=rows.column_names) for role, rows in splits.items()}
    return Prepared(encoded, DataCollatorWithPadding(tokenizer), tokenizer, names)


def causal_lm(data: PromptData, splits: dict[str, Dataset], model: str, revision: str | None) -> Prepared:
    """Prompt, completion and end of text in one sequence; the loss sees the completion and the end only."""
    tokenizer = load_tokenizer(model, revision)

    def encode(row: dict[str, Any]) -> dict[str, list[int]]:
        prompt, completion = row[data.prompt_column], row[data.completion_column]
        if data.chat_template:
            turn = [{"role": "user", "content": prompt}]
            before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        else:
            before = tokenizer(prompt).input_ids
        after = [*tokenizer(completion, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        after = after[: data.max_length]
        before = before[max(len(before) + len(after) - data.max_length, 0) :]
        ids = before + after
        return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": [IGNORED] * len(before) + after}

    encoded = {role: rows.map(encode, remove_columns=rows.column_names) for role, rows in splits.items()}
    return Prepared(encoded, DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED), tokenizer)


def image_classification(
    data: ImageClassificationData, splits: dict[str, Dataset], model: str, revision: str | None
) -> Prepared:
    """Images as they are on disk; the collator decodes and resizes them batch by batch."""
    processor = AutoImageProcessor.from_pretrained(model, revision=revision)
    names = label_names(splits, data.label_column)
    feature = splits["train"].features[data.label_column]

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        images = [row[data.image_column].convert("RGB") for row in rows]
        labels = label_ids([row[data.label_column] for row in rows], names, feature)
        return {**processor(images=images, return_tensors="pt"), "labels": torch.tensor(labels)}

    decoded = {role: rows.cast_column(data.image_column, Image()) for role, rows in splits.items()}
    return Prepared(decoded, collate, processor, names, keep_columns=True)


TASKS = {
    "sequence-classification": Task(
        TextClassificationData, AutoModelForSequenceClassification, sequence_classification, "SEQ_CLS"
    ),
    "causal-lm": Task(PromptData, AutoModelForCausalLM, causal_lm, "CAUSAL_LM"),
    "image-classification": Task(ImageClassificationData, AutoModelForImageClassification, image_classification, None),
}


def predict(logits: Any, labels: torch.Tensor) -> torch.Tensor:
    """The most likely class, or token at each position (virtual tokens of prompt methods come first and are cut)."""
    classes = (logits[0] if isinstance(logits, tuple) else logits).argmax(-1)
    return classes if labels.ndim == 1 else classes[:, -labels.shape[1] :]


def accuracy(prediction: EvalPrediction) -> dict[str, float]:
    """Accuracy over the examples, or over the completion's tokens."""
    predicted, labels = np.asarray(prediction.predictions), np.asarray(prediction.label_ids)
    if labels.ndim == 2:  # a language model predicts the next token
        predicted, labels = predicted[:, :-1], labels[:, 1:]
    counted = labels != IGNORED
    return {"accuracy": float((predicted == labels)[counted].mean())}
