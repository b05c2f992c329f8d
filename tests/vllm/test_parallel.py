"""Two processes with a part of each layer's weight give what one gives."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from .models import CONFIGS, alone, assert_equal, generate, save_model
from .test_requests import requests_for, save_adapters


@pytest.mark.parametrize("heads", [1, 2])  # of keys and values: one is copied to both processes
def test_tensor_parallel(heads, start, tmp_path, monkeypatch):
    config = CONFIGS["llama"]()
    config.num_key_value_heads = heads
    monkeypatch.setitem(CONFIGS, "llama", lambda: config)
    model = save_model("llama", tmp_path / "model")
    adapters = save_adapters(model, tmp_path, 5)
    expected = alone(model, [None, *adapters])
    engine = start(model, max_loras=5, tensor_parallel_size=2)

    assert_equal(generate(engine, [None, *requests_for(adapters)]), expected)


def test_layers_in_another_stage_of_a_pipeline_are_no_error():
    """vLLM 0.32's pipelines fail on CPUs, with and without adapters, so this is what one stage's manager does."""
    from vllm.model_executor.models.utils import PPMissingLayer

    from hyperadapt_peft.integrations.vllm.manager import HyperAdaptModelManager

    manager = HyperAdaptModelManager.__new__(HyperAdaptModelManager)
    manager.model = nn.Module()
    manager.model.layers = nn.ModuleList([nn.Linear(3, 2), PPMissingLayer()])
    manager.sizes = {"layers.0": (2, 3)}
    manager.lora_config = SimpleNamespace(lora_dtype=torch.float32)

    weights = manager.weights("mine", {"layers.0": {"row": torch.ones(2)}, "layers.1.up": {"row": torch.ones(9)}})
    assert weights.keys() == {"layers.0", "layers.1.up"}
    assert weights["layers.0"].lora_b.tolist() == [[1], [1]] and weights["layers.0"].lora_a.tolist() == [[0, 0, 0]]
    with pytest.raises(ValueError, match="The adapter mine cannot be served: layers.0.up is not one of"):
        manager.weights("mine", {"layers.0.up": {"row": torch.ones(9)}})
