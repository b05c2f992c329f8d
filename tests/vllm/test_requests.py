"""Requests with and without adapters, in one batch, get what transformers and PEFT give each alone."""

import pytest

from .models import CONFIGS, alone, assert_equal, generate, request, save_adapter, save_model


ADAPTERS = (
    {},
    {"sides": "row"},
    {"sides": "column"},
    {"target_modules": ".*(v_proj|up_proj|o_proj|out_proj|fc1|qkv_proj|query_key_value|dense)"},
    {"target_modules": ["q_proj", "fc2", "qkv_proj", "query_key_value", "down_proj"], "layers_to_transform": [1]},
)


@pytest.mark.parametrize("kind", CONFIGS)
def test_mixed_batch(kind, start, tmp_path):
    model = save_model(kind, tmp_path / "model")
    adapters = [
        save_adapter(model, tmp_path / f"{i}", seed=i, **ADAPTERS[i % len(ADAPTERS)])
        for i in range(8 if kind == "llama" else len(ADAPTERS))
    ]
    expected = alone(model, [None, *adapters])
    engine = start(model, max_loras=8)

    requests = [None, *(request(path.name, path, i) for i, path in enumerate(adapters, 1))]
    results = generate(engine, requests)

    assert len({tuple(tokens) for _, _, tokens, _ in results}) > len(results) / 2  # the adapters do matter
    assert_equal(results, expected)
