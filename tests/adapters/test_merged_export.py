"""A merged model is an ordinary checkpoint: the base's names, shapes, dtypes and config, loadable without this package."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ..tiny import build


CASES = [
    (architecture, dtype, config)
    for architecture, dtype in [("llama", "bfloat16"), ("qwen", "float32"), ("gpt2", "float16"), ("bert", "float32")]
    for config in (HyperAdaptConfig, SurmConfig)
]
LOAD = """
import sys, torch, transformers
for path in sys.argv[1:]:
    name = transformers.AutoConfig.from_pretrained(path).architectures[0]
    auto = transformers.AutoModelForCausalLM if "Causal" in name or "LM" in name else (
        transformers.AutoModelForSequenceClassification)
    model, report = auto.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.save(model.eval()(**torch.load(path + "/batch.pt")).logits, path + "/logits.pt")
assert "hyperadapt_peft" not in sys.modules
"""


def description(directory):
    tensors = load_file(directory / "model.safetensors")
    return {name: (t.dtype, t.shape) for name, t in tensors.items()}, json.loads(
        (directory / "config.json").read_text()
    )


@torch.no_grad()
def test_an_ordinary_checkpoint(tmp_path):
    expected = {}
    for architecture, dtype, config in CASES:
        model, batch, task_type = build(architecture)
        del batch["labels"]  # with which a classifier writes `problem_type` into its config
        model = model.to(getattr(torch, dtype))
        path = tmp_path / f"{architecture}-{config.__name__}"
        model.save_pretrained(path / "base")
        base_logits = model(**batch).logits
        torch.manual_seed(0)
        adapted = get_peft_model(model, config(task_type=task_type))
        for p in adapted.parameters():
            p += 0.1 * torch.randn_like(p) * p.requires_grad
        merged = adapted.merge_and_unload()
        merged.save_pretrained(path / "merged")
        assert description(path / "merged") == description(path / "base")
        torch.save(batch, path / "merged/batch.pt")
        expected[path / "merged"] = merged.eval()(**batch).logits
        assert not torch.equal(expected[path / "merged"], base_logits)
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, expected)], check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for path, logits in expected.items():
        tolerance = 0.02 if logits.dtype == torch.bfloat16 else 1e-6  # in bf16 a product depends on memory's alignment
        torch.testing.assert_close(torch.load(path / "logits.pt"), logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("architecture", ["llama", "t5"])
def test_tied_and_encoder_decoder_models(architecture, tmp_path):
    model, batch, task_type = build(architecture)
    if architecture == "llama":
        model.config.tie_word_embeddings = True
        model.tie_weights()
    model.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(model, HyperAdaptConfig(task_type=task_type, init_weights=False)).eval()
    with torch.no_grad():
        expected = adapted(**batch).logits
    adapted.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert description(tmp_path / "merged") == description(tmp_path / "base")
    loaded = type(model).from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, expected, rtol=1e-3, atol=1e-4)
