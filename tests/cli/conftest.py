"""Tiny models and data on disk, as a user would have them: the recipes of these tests name real paths."""

import json
import random
from pathlib import Path

import datasets
import pytest
import torch
import transformers
import yaml
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors


WORDS = ["good", "bad", "film", "plot", "very", "not", "dull", "great"]
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def private_caches(tmp_path_factory, monkeypatch):
    """Keep the cache of datasets out of the user's home."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path_factory.getbasetemp() / "datasets"))


def save_tokenizer(directory: Path) -> None:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    vocabulary = {token: index for index, token in enumerate([*special, *WORDS, *map(str, range(10))])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="[SEP]", **names)
    fast.chat_template = "{% for message in messages %}not {{ message.content }}{% endfor %}"
    fast.save_pretrained(directory)


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> Path:
    """A random encoder without a classification head."""
    directory = tmp_path_factory.mktemp("bert")
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=22, **SIZES)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """A random causal language model."""
    directory = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=22, eos_token_id=3, initializer_range=0.3, **SIZES)
    transformers.LlamaForCausalLM(config).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def vit(tmp_path_factory) -> Path:
    """A random vision transformer with another number of classes than the data has."""
    directory = tmp_path_factory.mktemp("vit")
    torch.manual_seed(0)
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=5, **SIZES)
    transformers.ViTForImageClassification(config).save_pretrained(directory)
    transformers.ViTImageProcessorPil(size={"height": 8, "width": 8}).save_pretrained(directory)
    return directory


def write_rows(directory: Path, rows: list[dict[str, str]]) -> dict[str, str]:
    """Split rows into three JSON-lines files; returns the `data_files` of a recipe."""
    files = {}
    for split, part in {"train": rows[:64], "validation": rows[64:80], "test": rows[80:]}.items():
        files[split] = str(directory / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in part))
    return files


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> dict[str, str]:
    """Sentences whose first word is their label."""
    rng = random.Random(0)
    rows = []
    for _ in range(100):
        label = rng.choice(["good", "bad"])
        rows.append({"text": " ".join([label, *rng.choices(WORDS[2:], k=4)]), "other": "film", "label": label})
    return write_rows(tmp_path_factory.mktemp("reviews"), rows)


@pytest.fixture(scope="session")
def copies(tmp_path_factory) -> dict[str, str]:
    """Prompts of digits, completed by their first digit."""
    rng = random.Random(0)
    prompts = [rng.choices("0123456789", k=3) for _ in range(100)]
    rows = [{"prompt": " ".join(digits), "completion": digits[0]} for digits in prompts]
    return write_rows(tmp_path_factory.mktemp("copies"), rows)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """A directory of pictures, dark or light, as the image folder loader expects it."""
    directory = tmp_path_factory.mktemp("pictures")
    for split, count in {"train": 24, "validation": 8, "test": 8}.items():
        for index in range(count):
            label, shade = ("dark", 30) if index % 2 else ("light", 220)
            (directory / split / label).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 12), (shade + index, shade, shade)).save(directory / split / label / f"{index}.png")
    return directory


@pytest.fixture
def recipe(tmp_path, bert, reviews):
    """Writes a working recipe, changed by whole sections; returns its path."""

    def write(**sections) -> str:
        content = {
            "task": "sequence-classification",
            "model": {"name": str(bert)},
            "data": {"name": "json", "data_files": reviews},
            "tuner": {"peft_type": "HYPERADAPT"},
            "training": {
                "output_dir": str(tmp_path / "run"),
                "max_steps": 10,
                "learning_rate": 1e-2,
                "use_cpu": True,
                "disable_tqdm": True,
                "save_strategy": "no",
            },
        }
        for name, section in sections.items():
            if isinstance(section, dict) and name == "training":
                section = content["training"] | section
            content[name] = section
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump({name: section for name, section in content.items() if section is not None}))
        return str(path)

    return write
