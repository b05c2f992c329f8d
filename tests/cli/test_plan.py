"""A plan, made without weights, beside the model it is of."""

import resource

import pytest
import torch
from peft import get_peft_model
from transformers import Qwen2Config

from hyperadapt_cli import main
from hyperadapt_peft.cli.memory import SavedTensors, stored_bytes, tensors
from hyperadapt_peft.cli.models import build, make_batch
from hyperadapt_peft.cli.plan import plan
from hyperadapt_peft.cli.recipe import read_tuner
from hyperadapt_peft.cli.tasks import find_task

from .. import tiny


LINEAR = {"target_modules": "all-linear"}
TUNERS = {
    "HyperAdapt": {"peft_type": "HYPERADAPT"},
    "HyperAdapt, save_memory": {"peft_type": "HYPERADAPT", "save_memory": True},
    "SURM": {"peft_type": "SURM"},
    "sequential SURM": {"peft_type": "SURM", "placement": "sequential", "structure": "toeplitz"},
    "LoRA": {"peft_type": "LORA", "r": 8, **LINEAR},
    "DoRA": {"peft_type": "LORA", "use_dora": True, **LINEAR},
    "IA3": {"peft_type": "IA3", "feedforward_modules": [], **LINEAR},
    "VeRA": {"peft_type": "VERA", **LINEAR},
    "MiSS": {"peft_type": "MISS", "r": 8, **LINEAR},
    "tokens": {"peft_type": "HYPERADAPT", "trainable_token_indices": [1, 2]},
    "full": {"peft_type": "FULL"},
}
CASES = [("llama", "causal-lm", "float32", tuner) for tuner in TUNERS]
CASES += [("llama", "causal-lm", "bfloat16", tuner) for tuner in ("HyperAdapt", "SURM", "LoRA", "full")]
CASES += [("gpt2", "causal-lm", "float32", "tokens")]  # of an embedding that is tied to the head
CASES += [("gpt2", "causal-lm", "float32", "HyperAdapt"), ("bert", "sequence-classification", "float32", "HyperAdapt")]
CASES += [("vit", "image-classification", "float32", "HyperAdapt")]


@pytest.mark.parametrize("name, task, dtype, tuner", CASES)
def test_a_plan_is_what_training_takes(name, task, dtype, tuner, tmp_path):
    config = tiny.build(name)[0].config
    planned = plan(config, TUNERS[tuner], task, batch_size=3, sequence_length=12, dtype=dtype)

    base = build(config, find_task(task), dtype)
    _, peft_config = read_tuner(TUNERS[tuner], find_task(task))
    model = get_peft_model(base, peft_config).train() if peft_config else base
    saved = SavedTensors(tensors(model))
    with saved:
        loss = model(**make_batch(base, 3, 12)).loss
    assert planned.activation_bytes == saved.nbytes() > 0

    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    assert planned.trainable == sum(parameter.numel() for parameter in trained)
    assert planned.gradient_bytes == sum(parameter.grad.nbytes for parameter in trained)
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert planned.optimizer_bytes == sum(moment.nbytes for moment in moments)
    assert planned.weights_bytes == stored_bytes(model)
    if peft_config is None:
        assert planned.adapter_bytes is None
    else:
        model.save_pretrained(tmp_path)
        assert planned.adapter_bytes == (tmp_path / "adapter_model.safetensors").stat().st_size


def test_fourteen_billion_parameters_are_planned_without_their_memory():
    width, inner, key_value, layers = 5120, 13824, 1024, 48
    config = Qwen2Config(
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=40,
        num_key_value_heads=8,
        vocab_size=152064,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan(config, {"peft_type": "HYPERADAPT"}, batch_size=1, sequence_length=2048, dtype="bfloat16")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**20  # 1 GiB, in KiB

    per_layer = 2 * (width + width) + 2 * (width + key_value) + 3 * (width + inner)
    assert planned.trainable == layers * per_layer
    assert planned.parameters - planned.trainable == 14_770_033_664
    assert 4 * planned.trainable < planned.adapter_bytes < 4.1 * planned.trainable
    assert planned.total_bytes > planned.weights_bytes > 2 * 14_770_033_664


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["llama", "--tuner", "{peft_type: LORAX}"], "tuner.peft_type: unknown type 'LORAX'"),
        (["llama", "--tuner", "{peft_type: LORA, rank: 8}"], "tuner.rank: unknown key"),
        (["llama", "--tuner", "LORA"], "tuner: expected keys with values, got 'LORA'"),
        (["llama", "--tuner", "{"], "tuner: not YAML"),
        (["llama", "--tuner", "{peft_type: NONE}", "--task", "sequence-classification"], "NONE has no adapter"),
        (["llama", "--tuner", "{peft_type: PROMPT_TUNING, num_virtual_tokens: 4}"], "PROMPT_TUNING adapts no layers"),
        (["llama", "--tuner", "{peft_type: LOKR, target_modules: all-linear}"], "LOKR cannot be planned without"),
        (["llama", "--task", "causal"], "task: expected one of"),
        (["llama", "--task", "image-classification"], "model: Unrecognized configuration class"),
        (["llama", "--sequence-length", "4096"], "sequence_length: the model takes at most 2048 tokens"),
        (["llama", "--batch-size", "0"], "batch_size and sequence_length: expected at least 1"),
        (["./nowhere"], "model: no such directory './nowhere'"),
    ],
)
def test_mistakes_are_told_in_one_line(arguments, message, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_the_command_prints_the_plan(capsys):
    assert main(["plan", "llama", "--batch-size", "1", "--sequence-length", "8"]) == 0
    printed = capsys.readouterr().out
    assert "LlamaForCausalLM, 45,710,592 parameters" in printed
    assert "87,552 (0.1915%)" in printed
