"""Requests with and without adapters, in one batch, get what transformers and PEFT give each alone."""

import json

import pytest
import torch

from .models import CONFIGS, alone, assert_equal, generate, request, save_adapter, save_in_4_bits, save_model


ADAPTERS = (
    {},
    {"sides": "row"},
    {"sides": "column"},
    {"target_modules": ".*(v_proj|up_proj|o_proj|out_proj|fc1|qkv_proj)"},
    {"target_modules": ["q_proj", "fc2", "qkv_proj", "down_proj"], "layers_to_transform": [1]},
)


def save_adapters(model, directory, count):
    return [save_adapter(model, directory / f"{i}", seed=i, **ADAPTERS[i % len(ADAPTERS)]) for i in range(count)]


def requests_for(adapters):
    return [request(path.name, path, i) for i, path in enumerate(adapters, 1)]


@pytest.mark.parametrize("kind", CONFIGS)
def test_mixed_batch(kind, start, tmp_path):
    model = save_model(kind, tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 8 if kind == "llama" else 5)
    expected = alone(model, [None, *adapters])
    engine = start(model, max_loras=8)

    results = generate(engine, [None, *requests_for(adapters)])

    assert len({tuple(tokens) for _, _, tokens, _ in results}) > len(results) / 2  # the adapters do matter
    assert_equal(results, expected)


def test_a_model_that_vllm_takes_from_transformers(start, tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # it changes classes of transformers
    model = save_model("llama", tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 5)
    expected = alone(model, [None, *adapters])
    engine = start(model, max_loras=5, model_impl="transformers")

    assert_equal(generate(engine, [None, *requests_for(adapters)]), expected)


def test_more_adapters_than_slots(start, tmp_path):
    model = save_model("qwen2", tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 6)
    expected = alone(model, [None, *adapters])
    requests = [None, *requests_for(adapters)]
    engine = start(model, max_loras=2, max_cpu_loras=3)

    assert_equal(generate(engine, requests), expected)
    assert_equal(generate(engine, requests[::-1]), expected)


def test_alpha_and_the_first_format(start, tmp_path):
    model = save_model("qwen2", tmp_path / "model")
    old, new = (save_adapter(model, tmp_path / name, alpha=alpha) for name, alpha in (("old", 1.0), ("new", 2.0)))
    config = json.loads((old / "adapter_config.json").read_text())
    del config["alpha"]
    (old / "adapter_config.json").write_text(json.dumps({**config, "format_version": 1}))
    expected = alone(model, [old, new])
    engine = start(model)

    assert_equal(generate(engine, requests_for([old, new])), expected)


def test_prefix_cache_never_crosses_adapters(start, tmp_path):
    model = save_model("qwen2", tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 2)
    prompt = [3 + i % 50 for i in range(40)]
    expected = alone(model, [None, *adapters], [prompt])
    engine = start(model, enable_prefix_caching=True, block_size=32, disable_log_stats=False)

    first = [generate(engine, [adapter], [prompt]) for adapter in [None, *requests_for(adapters)]]
    again = [generate(engine, [adapter], [prompt]) for adapter in [None, *requests_for(adapters)]]

    for results in (*first, *again):
        assert_equal(results, expected)
    hits = [metric.value for metric in engine.get_metrics() if metric.name == "vllm:prefix_cache_hits"]
    assert hits == [3 * 32]  # the second request of each adapter


def test_weights_that_cannot_be_sliced(start, tmp_path, monkeypatch):
    """As those of quantized bases, in fp32: each layer computes all its rows for the inputs of each of its matrices."""
    from hyperadapt_peft.integrations.vllm.layers import HyperAdaptMixin

    monkeypatch.setattr(HyperAdaptMixin, "_split", lambda self: None)
    model = save_model("llama", tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 3)
    expected = alone(model, [None, *adapters])

    assert_equal(generate(start(model), [None, *requests_for(adapters)]), expected)


@pytest.mark.parametrize("bits", [16, 4])
def test_bfloat16_is_as_exact_as_transformers(bits, start, tmp_path):
    model = served = save_model("llama", tmp_path / "model")
    if bits == 4:
        served = save_in_4_bits(model, tmp_path / "quantized")
    adapters = save_adapters(model, tmp_path, 5)
    exact, rounded = (alone(model, [None, *adapters], dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    engine = start(served, dtype="bfloat16", max_loras=5)
    results = generate(engine, [None, *requests_for(adapters)])

    def error(found):  # of the first token, which is the likeliest, so that it may be another one
        return max(abs(logprobs[0] - exact[key][1][0]).item() for key, logprobs in found)

    allowed = 2 * error((key, logprobs) for key, (_, logprobs) in rounded.items())
    assert error(((path, tuple(prompt)), logprobs) for path, prompt, _, logprobs in results) < allowed < 1


def test_layers_are_compiled_once(start, tmp_path):
    """On CPUs vLLM compiles no model with LoRA, so this is a layer of it."""
    model = save_model("llama", tmp_path / "model")
    engine = start(model).llm_engine
    for adapter in requests_for(save_adapters(model, tmp_path, 2)):
        engine.add_lora(adapter)
    manager = engine.model_executor.driver_worker.worker.model_runner.lora_manager._adapter_manager
    layer = manager.modules["model.layers.0.self_attn.qkv_proj"]
    slots = layer.punica_wrapper._token_lora_indices[:3]
    compiled = torch.compile(layer.apply, fullgraph=True, backend="eager")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]

    x = torch.randn(3, 128)
    outputs = []
    for given in ([-1, -1, -1], [0, 1, -1], [1, 1, 0]):
        slots.copy_(torch.tensor(given))
        outputs.append(compiled(x))
        torch.testing.assert_close(outputs[-1], layer.apply(x))
    assert not outputs[0].isclose(outputs[1]).all(dim=1)[:2].any() and outputs[0][2].equal(outputs[1][2])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before + 1
