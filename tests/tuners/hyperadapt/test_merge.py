"""Merging and unmerging: exact, all or nothing."""

import copy
import gc
import weakref

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)


def adapted(dtype=torch.float32, **config) -> PeftModel:
    config = HyperAdaptConfig(target_modules=["0", "2"], **{"init_weights": False, **config})
    return get_peft_model(mlp(dtype), config)


def base_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "base_layer" in k}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for key in state:
        assert torch.equal(state[key], other[key]) or (state[key].isnan() & other[key].isnan()).any(), key


def test_a_thousand_cycles_in_bf16_change_no_bit():
    model = adapted(torch.bfloat16)
    before = base_state(model)
    for _ in range(1000):
        model.merge_adapter()
        model.unmerge_adapter()
    assert_same(base_state(model), before)


@pytest.mark.parametrize("value", [-1.0, float("inf"), float("nan")], ids=["zero-scale", "inf", "nan"])
def test_scales_that_division_could_not_undo(value):
    model = adapted(alpha=1.0)
    before = base_state(model)
    model.base_model.model[0].hyperadapt_row["default"].weight.data[1] = value
    model.merge_adapter()
    merged = model.base_model.model[0].base_layer.weight
    assert (merged[1] == 0).all() if value == -1 else not torch.isfinite(merged[1]).any()
    model.unmerge_adapter()
    for key, tensor in base_state(model).items():
        assert torch.equal(tensor, before[key])


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_safe_merge_failing_at_the_last_layer_changes_nothing(call):
    model = adapted()
    model.base_model.model[2].hyperadapt_column["default"].weight.data[0] = float("nan")
    before, x = base_state(model), torch.randn(2, 6)
    with pytest.raises(
        ValueError, match="NaNs detected in the merged weights. The adapter default seems to be broken"
    ):
        getattr(model, call)(safe_merge=True)
    assert_same(base_state(model), before)
    assert model.get_model_status().merged_adapters == []
    with model.disable_adapter():
        assert torch.equal(model(x), mlp()(x))


def test_overflow_in_a_half_precision_merge_is_found():
    model = adapted(torch.float16)
    model.base_model.model[0].hyperadapt_row["default"].weight.data[:] = 3e6
    with pytest.raises(ValueError, match="default seems to be broken"):
        model.merge_adapter(safe_merge=True)


def test_merge_rounds_once():
    """Two scales of 1.005 in bf16 steps would each be lost; their fp32 product is not."""
    model = adapted(torch.bfloat16, init_weights=True, alpha=1.0)
    layer = model.base_model.model[0]
    layer.hyperadapt_row["default"].weight.data.fill_(0.003)
    layer.hyperadapt_column["default"].weight.data.fill_(0.003)
    weight = layer.base_layer.weight.data.clone()
    model.merge_adapter()
    assert torch.equal(layer.base_layer.weight.data, (weight.float() * 1.003 * 1.003).bfloat16())


def test_forward_merged_disabled_and_back():
    model, x = adapted(), torch.randn(2, 6)
    base, out = mlp()(x), model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), out)
    with model.disable_adapter():  # unmerges, as PEFT's layers do
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), out)


def test_double_merge_and_unmerge_warn():
    model = adapted()
    model.merge_adapter()
    once = base_state(model)
    with pytest.warns(UserWarning, match="already merged"):
        model.merge_adapter()
    assert_same(base_state(model), once)
    model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_unload_gives_the_base_model_back():
    model, x = adapted(), torch.randn(2, 6)
    base = model.unload()
    assert type(base) is nn.Sequential and type(base[0]) is nn.Linear
    assert torch.equal(base(x), mlp()(x))


def test_merge_and_unload_keeps_no_copy_of_the_base_weights():
    model = adapted()
    layers = [weakref.ref(model.base_model.model[i]) for i in (0, 2)]
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert all(layer() is None for layer in layers)
    assert not [name for name, _ in merged.named_modules() if "hyperadapt" in name]


def test_tied_weights_stay_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.other, self.head = nn.Embedding(9, 4), nn.Linear(4, 4), nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

    model = get_peft_model(Tied(), HyperAdaptConfig(target_modules=["other"], init_weights=False))
    merged = model.merge_and_unload()
    assert merged.head.weight is merged.embed.weight


def test_delta_weight_is_that_of_the_unmerged_weight():
    model = adapted()
    layer = model.base_model.model[0]
    weight = layer.base_layer.weight.data.clone()
    delta = layer.get_delta_weight("default")
    model.merge_adapter()
    torch.testing.assert_close(layer.base_layer.weight.data - weight, delta)
    assert torch.equal(layer.get_delta_weight("default"), delta)


def test_new_layers_follow_eval_mode():
    model = get_peft_model(mlp().eval(), HyperAdaptConfig(target_modules=["0"]))
    assert not any(module.training for module in model.base_model.model.modules())


def test_delete_adapter_leaves_the_other():
    model = adapted()
    model.add_adapter("second", HyperAdaptConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(2, 6)
    model.set_adapter("second")
    out = model(x)
    model.delete_adapter("default")
    assert torch.equal(model(x), out)
    assert not [name for name in model.state_dict() if ".default." in name]
    model.merge_adapter()
    with pytest.raises(ValueError, match="while they are merged"):
        model.delete_adapter("second")


def test_pickle_and_deepcopy_keep_merged_state():
    model, x = adapted(), torch.randn(2, 6)
    out = model(x)
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    assert torch.equal(twin(x), out)
