"""sentence-transformers' `add_adapter` with both tuners: train, encode, save, load."""

import pytest
import torch
from datasets import Dataset
from transformers import BertModel

from ..tiny import build
from .conftest import sentence, tiny_tokenizer


st = pytest.importorskip("sentence_transformers", reason="needs the extra `test`")
losses = pytest.importorskip("sentence_transformers.losses", reason="needs the extra `test`")

SENTENCES = [sentence(i) for i in range(5)]


@pytest.fixture
def model(tmp_path):
    """A tiny sentence encoder, loaded from a directory as users' are."""
    torch.manual_seed(0)
    BertModel(build("bert")[0].config).save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    return st.SentenceTransformer(str(tmp_path / "base"), device="cpu")


def train(model, directory):
    rows = [{"anchor": sentence(i), "positive": sentence(i + 1)} for i in range(16)]
    arguments = st.SentenceTransformerTrainingArguments(
        str(directory), max_steps=3, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    loss = losses.MultipleNegativesRankingLoss(model)
    st.SentenceTransformerTrainer(model, arguments, train_dataset=Dataset.from_list(rows), loss=loss).train()


def encode(model):
    return model.encode(SENTENCES, convert_to_tensor=True)


def test_train_encode_save_load(config, model, tmp_path):
    base = encode(model)
    model.add_adapter(config(task_type="FEATURE_EXTRACTION"))
    assert torch.equal(encode(model), base)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, tmp_path / "run")
    changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert changed and all(f".{config().peft_type.value.lower()}_" in n for n in changed)
    expected = encode(model)
    assert not torch.equal(expected, base)

    model.save_pretrained(str(tmp_path / "saved"))
    names = {path.name for path in (tmp_path / "saved").rglob("*")}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    assert torch.equal(encode(st.SentenceTransformer(str(tmp_path / "saved"), device="cpu")), expected)

    model.disable_adapters()
    assert torch.equal(encode(model), base)
    model.enable_adapters()
    assert torch.equal(encode(model), expected)


def test_several_adapters(config, model, tmp_path):
    model.add_adapter(config(init_weights=False), adapter_name="first")
    first = encode(model)
    model.save_pretrained(str(tmp_path / "first"))
    model.add_adapter(config(init_weights=False), adapter_name="second")
    model.set_adapter("second")
    assert not torch.equal(encode(model), first)
    model.set_adapter("first")
    assert torch.equal(encode(model), first)
    other = st.SentenceTransformer(str(tmp_path / "base"), device="cpu")
    other.load_adapter(str(tmp_path / "first"), adapter_name="loaded")
    assert torch.equal(encode(other), first)
