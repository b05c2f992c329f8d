"""transformers' pipelines from an adapter's directory."""

import pytest
import torch
from peft import get_peft_model
from transformers import pipeline

from ..tiny import build
from .conftest import sentence, tiny_tokenizer


@pytest.fixture
def adapter(config, tmp_path):
    """Saves an adapter of an architecture and returns its directory and the adapted model."""

    def save(architecture):
        build(architecture)[0].save_pretrained(tmp_path / "base")
        tiny_tokenizer().save_pretrained(tmp_path / "base")
        model = type(build(architecture)[0]).from_pretrained(tmp_path / "base")
        torch.manual_seed(0)
        model = get_peft_model(model, config(task_type=build(architecture)[2], init_weights=False)).eval()
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p) * p.requires_grad
        model.save_pretrained(tmp_path / "adapter")
        return str(tmp_path / "adapter"), model

    return save


@torch.no_grad()
def test_text_classification(adapter):
    path, model = adapter("bert")
    inputs = tiny_tokenizer()(sentence(3), return_tensors="pt")
    expected = model(input_ids=inputs["input_ids"]).logits.softmax(-1)[0]
    (scores,) = pipeline("text-classification", model=path, device="cpu", top_k=None)([sentence(3)])
    got = {row["label"]: row["score"] for row in scores}
    assert got == pytest.approx({f"LABEL_{i}": float(p) for i, p in enumerate(expected)}, rel=1e-5)
    with model.disable_adapter():
        assert abs(model(input_ids=inputs["input_ids"]).logits.softmax(-1)[0][0] - expected[0]) > 1e-4


@torch.no_grad()
def test_text_generation(adapter):
    path, model = adapter("llama")
    tokenizer = tiny_tokenizer()
    inputs = tokenizer(sentence(3), return_tensors="pt")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(input_ids=inputs["input_ids"], **options)
    generated = pipeline("text-generation", model=path, device="cpu")(sentence(3), return_tensors=True, **options)
    assert generated[0]["generated_token_ids"] == expected[0].tolist()
    with model.disable_adapter():
        assert not torch.equal(model.generate(input_ids=inputs["input_ids"], **options), expected)
