"""Two processes with a part of each layer's weight give what one gives."""

import pytest

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
