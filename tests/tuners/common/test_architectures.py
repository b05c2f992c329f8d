"""The main job on every architecture: adapt by one line, train by the Trainer, save, load in a fresh process."""

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from transformers import Trainer, TrainingArguments

from hyperadapt_peft import HyperAdaptConfig

from ...tiny import MODELS, build


LOAD = """
import json, sys, torch, transformers
import hyperadapt_peft
import peft
report = {}
for name, (base_class, auto_class) in json.loads(sys.argv[2]).items():
    folder = f"{sys.argv[1]}/{name}"
    saved = torch.load(f"{folder}/outputs.pt")
    base = getattr(transformers, base_class).from_pretrained(f"{folder}/base")
    models = {"PeftModel": peft.PeftModel.from_pretrained(base, f"{folder}/adapter")}
    if auto_class:
        models[auto_class] = getattr(peft, auto_class).from_pretrained(f"{folder}/adapter")
    with torch.no_grad():
        report[name] = {k: torch.equal(m.eval()(**saved["batch"]).logits, saved["logits"]) for k, m in models.items()}
print(json.dumps(report))
"""
AUTO = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Train every model for 20 steps, save it, and say what happened."""
    root, results = tmp_path_factory.mktemp("trained"), {}
    for name in MODELS:
        model, batch, task_type = build(name)
        model.save_pretrained(root / name / "base")
        model.config._name_or_path = model.name_or_path = str(root / name / "base")
        config = HyperAdaptConfig(task_type=task_type, modules_to_save=None if task_type else ["classifier"])
        model = get_peft_model(model, config)
        before = {k: v.clone() for k, v in model.state_dict().items()}
        rows = [{k: v[i] for k, v in batch.items()} for i in range(8)]
        arguments = TrainingArguments(
            root / name / "run", max_steps=20, per_device_train_batch_size=8, learning_rate=1e-2, weight_decay=0.0,
            report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        with torch.no_grad():
            loss_before = model(**batch).loss.item()
        Trainer(model, arguments, train_dataset=rows).train()
        model.eval()
        with torch.no_grad():
            output = model(**batch)
        model.save_pretrained(root / name / "adapter")
        torch.save({"batch": batch, "logits": output.logits}, root / name / "outputs.pt")
        results[name] = {
            "base_class": type(model.get_base_model()).__name__,
            "auto": AUTO.get(task_type),
            "loss": (loss_before, output.loss.item()),
            "changed": [k for k, v in model.state_dict().items() if not torch.equal(v, before[k])],
            "trainable": [k for k, p in model.named_parameters() if p.requires_grad],
        }
    return root, results


@pytest.fixture(scope="module")
def loaded(trained):
    root, results = trained
    wanted = {name: (result["base_class"], result["auto"]) for name, result in results.items()}
    command = [sys.executable, "-c", LOAD, str(root), json.dumps(wanted)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", MODELS)
def test_twenty_steps_lower_the_loss_and_change_only_scales(trained, name):
    result = trained[1][name]
    before, after = result["loss"]
    assert after < before
    heads = ("classifier.modules_to_save.default.", "score.modules_to_save.default.")
    assert all(".hyperadapt_" in key or any(head in key for head in heads) for key in result["changed"])
    # the bias of k cancels in a softmax, so a row scale may stand still there; nothing else may
    assert len([k for k in result["changed"] if ".hyperadapt_" in k]) > 0.9 * sum(
        ".hyperadapt_" in k for k in result["trainable"]
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_fresh_process_gives_bit_identical_outputs(trained, loaded, name):
    expected = {"PeftModel", trained[1][name]["auto"]} - {None}
    assert loaded[name] == dict.fromkeys(expected, True)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity_at_init_is_bit_exact(name, dtype):
    model, batch, task_type = build(name)
    model = model.to(dtype)
    batch = {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        adapted = get_peft_model(model, HyperAdaptConfig(task_type=task_type)).eval()
        assert torch.equal(adapted(**batch).logits, expected)


@pytest.mark.parametrize("name", MODELS)
def test_merge_and_unload_equals_the_adapted_model(name):
    model, batch, task_type = build(name)
    config = HyperAdaptConfig(task_type=task_type, init_weights=False)
    model = get_peft_model(model.double(), config, autocast_adapter_dtype=False).eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    with torch.no_grad():
        expected = model(**batch).logits
        torch.testing.assert_close(model.merge_and_unload()(**batch).logits, expected)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_gives_the_same_gradients(use_reentrant):
    def gradients(checkpointing):
        model, batch, _ = build("llama")
        model = get_peft_model(model, HyperAdaptConfig(init_weights=False)).train()
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.data.normal_(std=0.1, generator=generator)
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model(**batch).loss.backward()
        return {k: p.grad for k, p in model.named_parameters() if p.requires_grad}

    plain, checkpointed = gradients(False), gradients(True)
    for key, grad in plain.items():
        torch.testing.assert_close(checkpointed[key], grad, rtol=1e-4, atol=1e-7)


def test_torch_compile_takes_the_whole_graph():
    model, batch, _ = build("llama")
    model = get_peft_model(model, HyperAdaptConfig(init_weights=False)).eval()
    with torch.no_grad():
        compiled = torch.compile(model.base_model.model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**batch).logits, model(**batch).logits)
