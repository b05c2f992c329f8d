"""Adapters added, interpolated, inverted, rescaled and swapped: predictable whatever their gauge."""

import itertools

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.tuners.hyperadapt.algebra import combine, gauge, invert


def scales(*values):
    return torch.tensor(values) - 1


def model_of(**adapters) -> PeftModel:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    alphas = iter((2.0, 0.5, 1.0))
    configs = {
        name: HyperAdaptConfig(**{"target_modules": ["0", "2"], "alpha": next(alphas), **config})
        for name, config in adapters.items()
    }
    first, *others = configs
    model = get_peft_model(base, configs[first], first)
    for name in others:
        model.add_adapter(name, configs[name])
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".hyperadapt_" in name:
            p.data = torch.rand(p.shape, generator=generator) - 0.5  # all scales positive
    return model.eval()


def output(model, adapters, x):
    model.base_model.set_adapter(adapters)
    return model(x)


X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("kind", ["linear", "log"])
def test_one_zero_gives_the_first_and_equals_average_to_themselves(kind):
    model = model_of(a={}, b={})
    model.add_weighted_adapter(["a", "b"], [1.0, 0.0], "first", kind)
    model.add_weighted_adapter(["a", "a", "a"], [0.2, 0.3, 0.5], "average", kind)
    layer = model.base_model.model[0]
    for name in ("first", "average"):
        for one, other in zip(layer.get_offsets(name), layer.get_offsets("a"), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(output(model, [name], X), output(model, ["a"], X))


@pytest.mark.parametrize("kind", ["linear", "log", "product"])
def test_the_order_of_the_adapters_does_not_matter(kind):
    model = model_of(a={}, b={}, c={})
    outputs = []
    for i, order in enumerate(itertools.permutations([("a", 0.5), ("b", 0.25), ("c", -0.5)])):
        names, weights = zip(*order, strict=True)
        model.add_weighted_adapter(list(names), list(weights), f"new{i}", kind)
        outputs.append(output(model, [f"new{i}"], X))
    for other in outputs[1:]:
        torch.testing.assert_close(other, outputs[0])


@pytest.mark.parametrize("c", [3.0, 0.1, -2.0])
def test_the_gauge_does_not_matter(c):
    """(c a, b / c) is the same update, so every combination with it is the same update."""
    one = scales(1.2, 0.7, 0.9), scales(1.1, 0.8)
    two = scales(0.6, 1.5, 1.1), scales(0.9, 1.3)
    moved = (c * (1 + one[0]) - 1, (1 + one[1]) / c - 1)

    def update(offsets):
        return (1 + offsets[0])[:, None] * (1 + offsets[1])

    torch.testing.assert_close(update(moved), update(one))
    for kind in ("linear", "log") if c > 0 else ("linear",):
        for weights in ([0.5, 0.5], [1.0, 1.0], [1.0, -0.5], [0.3, 0.0]):
            expected = update(combine([one, two], weights, kind))
            torch.testing.assert_close(update(combine([moved, two], weights, kind)), expected)
    torch.testing.assert_close(gauge(*one) / gauge(*moved), torch.tensor([c]))


def test_log_is_the_geometric_mean_and_product_is_both_at_once():
    model = model_of(a={}, b={})
    row, column = combine([(scales(4.0), scales(1.0)), (scales(9.0), scales(4.0))], [0.5, 0.5], "log")
    torch.testing.assert_close((1 + row) * (1 + column), torch.tensor([12.0]))
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "product")
    torch.testing.assert_close(output(model, ["both"], X), output(model, ["a", "b"], X))


def test_log_refuses_signs_it_cannot_take_and_names_the_layer():
    model = model_of(a={}, b={})
    model.base_model.model[2].hyperadapt_row["b"].weight.data[1] = -1.5 / 0.5
    before = set(model.state_dict())
    with pytest.raises(ValueError, match="2: negative scales have no logarithm; use combination_type='linear'"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "log")
    model.base_model.model[2].hyperadapt_row["b"].weight.data[1] = -1 / 0.5
    with pytest.raises(ValueError, match="2: a scale is zero"):
        model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "log")
    with pytest.raises(ValueError, match="2: a scale is zero, which nothing can undo"):
        model.invert_adapter("b", "new")
    assert set(model.state_dict()) == before and "new" not in model.peft_config
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "new", "linear")
    both_negative, _ = combine([(scales(-4.0), None), (scales(-9.0), None)], [0.5, 0.5], "log")
    torch.testing.assert_close(1 + both_negative, torch.tensor([-6.0]))


def test_an_adapter_and_its_inverse_are_the_identity():
    model = model_of(a={})
    model.invert_adapter("a", "undo")
    with model.disable_adapter():
        base = model(X)
    assert not torch.allclose(output(model, ["a"], X), base)
    torch.testing.assert_close(output(model, ["a", "undo"], X), base)
    assert torch.equal(invert(torch.zeros(3)), torch.zeros(3))


def test_adapters_of_different_sides_and_layers():
    model = model_of(a={"sides": "row"}, b={"target_modules": ["2"]})
    model.add_weighted_adapter(["a", "b"], [1.0, 1.0], "both", "product")
    torch.testing.assert_close(output(model, ["both"], X), output(model, ["a", "b"], X))
    assert model.peft_config["both"].sides == "both" and model.peft_config["both"].target_modules == {"0", "2"}


def test_set_scale_is_linear_in_the_offset_and_merges():
    model = model_of(a={})
    with model.disable_adapter():
        base = model(X)
    model.set_scale("a", 0.0)
    assert torch.equal(output(model, ["a"], X), base)
    model.set_scale("a", -0.5)
    model.add_weighted_adapter(["a"], [-0.5], "kept", "product")
    half = output(model, ["a"], X)
    torch.testing.assert_close(half, output(model, ["kept"], X))
    model.set_adapter("a")
    model.merge_adapter()
    torch.testing.assert_close(model(X), half)
    with pytest.raises(ValueError, match="a is merged"):
        model.set_scale("a", 1.0)
    with pytest.raises(ValueError, match="not found"):
        model.set_scale("b", 1.0)


def test_the_new_adapter_saves_and_loads(tmp_path):
    model = model_of(a={}, b={})
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "mean")
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".mean." in n)
    expected = output(model, ["mean"], X)
    model.save_pretrained(tmp_path, selected_adapters=["mean"])
    fresh = PeftModel.from_pretrained(model_of(a={}).unload(), tmp_path / "mean").eval()
    assert torch.equal(fresh(X), expected)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.add_weighted_adapter(["a"], [1.0, 2.0], "n"), "one weight per adapter"),
        (lambda m: m.add_weighted_adapter([], [], "n"), "one weight per adapter"),
        (lambda m: m.add_weighted_adapter(["z"], [1.0], "n"), r"\['z'\] not found, available adapters: \['a'\]"),
        (lambda m: m.add_weighted_adapter(["a"], [1.0], "a"), "already an adapter called a"),
        (lambda m: m.add_weighted_adapter(["a"], [1.0], "n", "svd"), "Invalid combination_type: 'svd'"),
    ],
)
def test_wrong_calls_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(model_of(a={}))


def test_an_adapter_that_trained_more_than_scales_is_refused():
    model = get_peft_model(
        nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}),
        HyperAdaptConfig(target_modules=["a"], modules_to_save=["b"]),
    )
    with pytest.raises(ValueError, match="more than scales"):
        model.add_weighted_adapter(["default"], [1.0], "new")
