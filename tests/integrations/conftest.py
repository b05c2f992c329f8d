"""A tiny language that needs no files: a tokenizer of 64 words for the tiny models, and both tuners."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", *(f"w{i}" for i in range(60))]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "[PAD]", "bos_token": "[BOS]", "eos_token": "[EOS]", "unk_token": "[UNK]"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=32, **special)


def sentence(start: int, length: int = 6) -> str:
    return " ".join(f"w{(start + i) % 60}" for i in range(length))


@pytest.fixture(params=[HyperAdaptConfig, SurmConfig], ids=["hyperadapt", "surm"])
def config(request):
    """The config class of a tuner."""
    return request.param
