"""What cannot be served is refused by a sentence that names the adapter and the module, and the engine goes on."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from hyperadapt_peft.integrations import vllm as plugin

from .models import alone, assert_equal, generate, load, request, save_adapter, save_model


WEIGHTS = "adapter_model.safetensors"
DOWN = "model.layers.1.mlp.down_proj"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_model("qwen2", tmp_path_factory.mktemp("refusals") / "model")


@pytest.fixture(scope="module")
def engine(model, start):
    return start(model)


def edit_tensor(path, change, key=f"base_model.model.{DOWN}.hyperadapt_row.weight"):
    tensors = load_file(path / WEIGHTS)
    new_key, tensor = change(key, tensors.pop(key))
    save_file({**tensors, new_key: tensor.contiguous()}, path / WEIGHTS)


def edit_config(path, **fields):
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**config, **fields}))


CONFIGS = {
    "saved modules": ({"modules_to_save": ["lm_head"]}, "lm_head.weight is not a scale"),
    "biases": ({"bias": "all"}, "q?k?v?_proj.base_layer.bias is not a scale"),
    "tokens": ({"trainable_token_indices": [1]}, "embed_tokens.* is not a scale"),
    "head": ({"target_modules": ["lm_head", "q_proj"]}, "lm_head.base_layer.weight is not a scale"),
    "embeddings": ({"target_modules": ["embed_tokens"]}, "embed_tokens.base_layer.weight is not a scale"),
}
EDITS = {
    "shape": (lambda key, x: (key, x[:-1]), rf"the row scales of {DOWN} have the shape \(127,\).* needs \(128,\)"),
    "not finite": (lambda key, x: (key, x / 0), f"the row scales of {DOWN} are not finite"),
    "experts": (
        lambda key, x: (key.replace("down_proj", "experts"), x),
        "mlp.experts is not one of the linear layers",
    ),
    "head's scales": (
        lambda key, x: ("base_model.model.lm_head.hyperadapt_row.weight", x),
        "lm_head is not one of the",
    ),
    "unknown layer": (lambda key, x: (key.replace("layers.1", "layers.7"), x), "layers.7.mlp.down_proj is not one"),
    "fused layer": (lambda key, x: (key.replace("down", "qkv"), x), "mlp.qkv_proj is not one of the linear layers"),
    "other tensors": (lambda key, x: (key.replace("row", "gain"), x), "hyperadapt_gain.weight is not a scale"),
}


@pytest.mark.parametrize("kind", [*CONFIGS, *EDITS])
def test_what_is_not_served(kind, engine, model, tmp_path):
    config, sentence = CONFIGS.get(kind, ({}, None))
    path = save_adapter(model, tmp_path / "adapter", **config)
    if kind in EDITS:
        change, sentence = EDITS[kind]
        edit_tensor(path, change)
    with pytest.raises(Exception, match=f"The adapter mine cannot be served: .*{sentence}"):
        engine.llm_engine.add_lora(request("mine", path, 99))


def test_other_types_and_formats(engine, model, tmp_path):
    lora = tmp_path / "lora"
    get_peft_model(load(model), LoraConfig(task_type="CAUSAL_LM")).save_pretrained(lora)
    newer = save_adapter(model, tmp_path / "newer")
    edit_config(newer, format_version=99)
    broken = save_adapter(model, tmp_path / "broken")
    (broken / WEIGHTS).write_bytes(b"cut off")
    empty = save_adapter(model, tmp_path / "empty")
    save_file({}, empty / WEIGHTS)
    for path, sentence in (
        (lora, "The adapter mine cannot be served: it is of the type .*LORA"),
        (newer, "The adapter mine in .* cannot be read: .*format_version.* is 99"),
        (broken, "The adapter mine in .* cannot be read: "),
        (empty, "The adapter mine cannot be served: its file has no scales"),
        (tmp_path / "nowhere", "No adapter found for .*nowhere"),
    ):
        with pytest.raises(Exception, match=sentence):
            engine.llm_engine.add_lora(request("mine", path, 99))


def test_the_engine_goes_on_after_a_refusal(engine, model, tmp_path):
    good, bad = (save_adapter(model, tmp_path / name) for name in ("good", "bad"))
    edit_tensor(bad, lambda key, x: (key, x[:-1]))
    expected = alone(model, [None, good])
    requests = [None, request("good", good, 1)]
    assert_equal(generate(engine, requests), expected)
    with pytest.raises(Exception, match="cannot be served"):
        engine.llm_engine.add_lora(request("bad", bad, 2))
    assert_equal(generate(engine, requests), expected)


def test_layers_of_other_kinds_are_left_alone(engine):
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.linear import ReplicatedLinear

    from hyperadapt_peft.integrations.vllm.layers import adapted_layer

    class OwnProduct(ReplicatedLinear):
        pass

    with set_current_vllm_config(engine.llm_engine.vllm_config):
        layer, other, convolution = ReplicatedLinear(8, 8), OwnProduct(8, 8), ReplicatedLinear(8, 8)
        convolution.weight.data = convolution.weight.data[:, None]
        settings = engine.llm_engine.vllm_config.lora_config
        assert adapted_layer("mlp.gate", layer, [], settings).base_layer is layer
        assert adapted_layer("mlp.gate", other, [], settings) is None
        assert adapted_layer("mixer.conv1d", convolution, [], settings) is None
        assert adapted_layer("self_attn.kv_b_proj", layer, [], settings) is None


def test_a_vllm_without_a_name_is_told(monkeypatch):
    plugin.check_names()
    monkeypatch.setitem(plugin.NAMES, "vllm.lora.utils", ("gone_from_here",))
    with pytest.raises(RuntimeError, match=r"this vLLM \([\d.]+\), which lacks vllm.lora.utils.gone_from_here"):
        plugin.check_names()


@pytest.mark.parametrize("setting", ["fully_sharded_loras"])
def test_settings_that_are_refused(setting, start, model):
    with pytest.raises(ValueError, match="HyperAdapt adapters cannot be served with --fully-sharded-loras"):
        start(model, **{setting: True})


def test_rows_that_vllm_reorders_are_refused(start, model, monkeypatch):
    from hyperadapt_peft.integrations.vllm import manager

    monkeypatch.setattr(manager, "REORDERED", ("Qwen2ForCausalLM",))
    with pytest.raises(ValueError, match="cannot be served on Qwen2ForCausalLM, whose rows vLLM reorders"):
        start(model)


def test_without_the_opt_in_lora_is_served_as_without_the_plugin(start, model, tmp_path):
    from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
    from vllm.v1.worker import lora_model_runner_mixin

    torch.manual_seed(0)
    config = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    get_peft_model(load(model), config).save_pretrained(tmp_path / "lora")
    expected = alone(model, [tmp_path / "lora"])
    hyperadapt = save_adapter(model, tmp_path / "hyperadapt")
    engine = start(model, hyperadapt=False)

    assert lora_model_runner_mixin.LRUCacheWorkerLoRAManager is plugin.worker_manager  # the plugin is there
    manager = engine.llm_engine.model_executor.driver_worker.worker.model_runner.lora_manager
    assert type(manager) is LRUCacheWorkerLoRAManager
    assert {type(layer).__module__.partition(".")[0] for layer in manager._adapter_manager.modules.values()} == {
        "vllm"
    }
    assert_equal(generate(engine, [request("lora", tmp_path / "lora", 1)]), expected)
    with pytest.raises(Exception, match="lora_alpha|unexpected|missing|r"):
        engine.llm_engine.add_lora(request("hyperadapt", hyperadapt, 2))
