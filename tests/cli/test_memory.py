"""Bytes counted by hand, beside the counters."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from hyperadapt_peft.cli.memory import SavedTensors, peak_bytes, safetensors_bytes, stored_bytes, tensors


def saved_bytes(model, x):
    saved = SavedTensors(tensors(model))
    with saved:
        y = model(x)
    kept = saved.nbytes()
    del y
    assert saved.nbytes() == 0  # with the graph goes what it held
    return kept


@pytest.mark.parametrize("fake", [False, True])
def test_what_autograd_keeps_of_linear_layers(fake):
    with FakeTensorMode() if fake else torch.device("cpu"):
        x = torch.ones(7, 3, requires_grad=True)
        linear = nn.Linear(3, 5)
        assert saved_bytes(linear, x) == 7 * 3 * 4  # x, for the weight's gradient; the weight itself does not count
        assert saved_bytes(linear, x[:2]) == 7 * 3 * 4  # a view keeps its whole storage
        assert saved_bytes(nn.Sequential(linear, nn.ReLU()), x) == (7 * 3 + 7 * 5) * 4  # and the output of the ReLU
        linear.requires_grad_(False)
        assert saved_bytes(linear, x) == 0


def test_a_storage_counts_once():
    x = torch.ones(7, 3)
    model = nn.ModuleList([nn.Linear(3, 5), nn.Linear(3, 5)])
    saved = SavedTensors(tensors(model))
    with saved:
        ys = [layer(x) for layer in model]
    assert len(ys) == 2 and saved.nbytes() == 7 * 3 * 4


def test_gradients_are_not_changed_by_counting():
    x, linear = torch.randn(7, 3), nn.Linear(3, 5)
    linear(x).square().sum().backward()
    expected = linear.weight.grad.clone()
    linear.zero_grad()
    with SavedTensors(tensors(linear)):
        loss = linear(x).square().sum()
    loss.backward()
    assert torch.equal(linear.weight.grad, expected)


def test_tied_weights_are_stored_once():
    model = nn.ModuleList([nn.Linear(3, 5, bias=False), nn.Linear(3, 5, bias=False)])
    assert stored_bytes(model) == 2 * 3 * 5 * 4
    model[0].weight = model[1].weight
    assert stored_bytes(model) == 3 * 5 * 4


def test_the_peak_is_what_was_there_at_one_time():
    before = torch.empty(10_000)

    def run():
        nonlocal before
        first, second = torch.empty(1000), torch.empty(500)
        del first
        third = torch.empty(300)
        del second, third
        before = None

    assert peak_bytes(run) == (1000 + 500) * 4


@pytest.mark.parametrize("padding", range(8))
def test_the_size_of_a_safetensors_file(tmp_path, padding):
    state = {
        "z" * (padding + 1): torch.ones(3, 5),
        "a.é": torch.ones(2, 2, dtype=torch.bfloat16),
        "a.flags": torch.ones(20_000, dtype=torch.bool),
        "count": torch.tensor(7),
        "empty": torch.ones(0),
        "b": torch.ones(1000),
    }
    save_file(state, tmp_path / "file.safetensors", metadata={"format": "pt"})
    assert safetensors_bytes(state) == (tmp_path / "file.safetensors").stat().st_size
