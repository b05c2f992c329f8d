"""A few families of every kind on every run; `python -m tests.architectures` walks all and commits what it found."""

import json

import pytest

from hyperadapt_peft.tuners.common import targets

from .__main__ import RESULTS
from .walk import METHODS, walk


FAMILIES = {  # and the adapted layers that a forward of 8 tokens, or of queries that start as zeros, does not train
    "BertForMaskedLM": [],
    "DistilBertForSequenceClassification": [],
    "Qwen3MoeForCausalLM": [],
    "T5ForConditionalGeneration": [],
    "MambaForCausalLM": [],
    "DeepseekV4ForCausalLM": ["gate_proj", "kv_proj"],
    "CLIPModel": [],
    "SegformerForSemanticSegmentation": [],
    "DetrForObjectDetection": ["k_proj", "o_proj", "q_proj", "v_proj"],
    "Dinov2ForImageClassification": [],
    "Wav2Vec2ForCTC": [],
    "Speech2TextForConditionalGeneration": [],
}


@pytest.mark.parametrize("name", FAMILIES)
def test_defaults_train_save_and_load_exactly(name):
    results = walk(name)
    assert results["HyperAdapt"]["status"] == "adapted", results
    assert sorted({layer.rpartition(".")[2] for layer in results["HyperAdapt"]["unused"]}) == FAMILIES[name]
    assert results["SURM"]["status"] in ("adapted", "refused"), results


def test_an_adapter_without_effect_is_found(monkeypatch):
    monkeypatch.setattr(targets, "is_read_uncalled", lambda model, key: False)
    result = walk("WavLMModel")["HyperAdapt"]
    assert result["status"] == "fault" and "no gradient: encoder.layers.*.attention.k_proj" in result["reason"]


def test_the_committed_walk_has_no_unexplained_exception():
    table = json.loads(RESULTS.read_text())
    assert table["classes"]["built"] >= 1200 and table["model types"]["built"] >= 450
    for method in METHODS:
        counts = table[method]
        assert counts["fault"] == 0 and counts["exceptions"]["fault"] == {}
        assert counts["adapted"] + counts["refused"] == table["classes"]["built"]
