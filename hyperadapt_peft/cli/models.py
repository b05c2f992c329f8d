"""A model of any size from its config alone, and a batch for it."""

from typing import Any

import torch
from transformers import AutoConfig, LlamaConfig, PretrainedConfig, PreTrainedModel

from .data import resolve_source
from .errors import RecipeError, errors_about
from .tasks import Task


def load_config(name: str) -> PretrainedConfig:
    """The config of a Hub id, a local directory, a config.json, or `llama`.

    `llama` is a Llama of 6 layers, width 768, 12 heads and an intermediate width of 2048; its vocabulary of 2048 keeps
    the head small beside the layers.

    Raises:
        RecipeError: there is no such config.
    """
    if name == "llama":
        return LlamaConfig(
            hidden_size=768, intermediate_size=2048, num_hidden_layers=6, num_attention_heads=12, vocab_size=2048
        )
    source = resolve_source("model", name)
    with errors_about("model", source):
        return AutoConfig.from_pretrained(source)


def build(config: PretrainedConfig, task: Task, dtype: str) -> PreTrainedModel:
    """The task's model with random weights, in training mode. Raises RecipeError if the task has none of this type."""
    with errors_about("model"):
        model = task.auto_model.from_config(config, dtype=getattr(torch, dtype))
    model.name_or_path = ""  # with a name, PEFT would ask the Hub about it
    return model.train()


def make_batch(model: PreTrainedModel, batch_size: int, sequence_length: int) -> dict[str, torch.Tensor]:
    """Random ids (batch_size, sequence_length) without padding, or images, with labels: all that the loss needs.

    Raises:
        RecipeError: a size is less than 1, or the model takes no sequence of that length.
    """
    if min(batch_size, sequence_length) < 1:
        raise RecipeError(f"batch_size and sequence_length: expected at least 1, got {batch_size}, {sequence_length}")
    config: Any = model.config
    if model.main_input_name == "pixel_values":
        shape = config.num_channels, config.image_size, config.image_size
        return {
            "pixel_values": torch.randn(batch_size, *shape, dtype=model.dtype),
            "labels": torch.zeros(batch_size, dtype=torch.long),
        }
    longest = getattr(config, "max_position_embeddings", sequence_length)
    if sequence_length > longest:
        raise RecipeError(f"sequence_length: the model takes at most {longest} tokens, got {sequence_length}")
    ids = torch.randint(config.get_text_config().vocab_size, (batch_size, sequence_length))
    one_label_each = "Classification" in type(model).__name__
    return {"input_ids": ids, "labels": torch.zeros(batch_size, dtype=torch.long) if one_label_each else ids}
