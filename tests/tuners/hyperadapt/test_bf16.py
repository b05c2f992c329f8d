"""In bf16, offsets that would vanish in a scale rounded to bf16 still act and add up.

bf16's ulp of 1.0 is 2^-7, so every scale within 0.39 % above 1 would round to 1. The scaled activations are rounded too: one
that was in bf16 before moves by a whole ulp or not at all. Below 0.2 % none does; at the 0.3 % tested here their average
follows the offset.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.cli.memory import KernelCounter


DTYPES = [torch.bfloat16, torch.float32]


def adapt(dtype, adapter_dtype, bias=True):
    """A linear layer of `dtype`, HyperAdapt on it with scales of `adapter_dtype`, and many inputs."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 48, bias=bias)).to(dtype)
    model = get_peft_model(base, HyperAdaptConfig(target_modules=["0"], alpha=1.0), autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    scales = layer.hyperadapt_row["default"], layer.hyperadapt_column["default"]
    row, column = (scale.to(adapter_dtype).weight for scale in scales)
    assert row.dtype == column.dtype == adapter_dtype
    return model, row, column, torch.randn(4096, 64, dtype=dtype)


def fill(row, column):
    """Give both sides offsets between -1/3 and 1/3."""
    with torch.no_grad():
        for offsets in (row, column):
            offsets.copy_(torch.linspace(-1, 1, len(offsets)) / 3)


def slope(change, reference):
    """The factor of `reference` that fits `change` best, over all entries."""
    return ((change * reference).sum() / reference.square().sum()).item()


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("side", ["row", "column"])
def test_bf16_outputs_follow_an_offset_below_half_an_ulp(adapter_dtype, side):
    offset = 3e-3
    assert torch.tensor(1 + offset).to(torch.bfloat16) == 1
    model, row, column, x = adapt(torch.bfloat16, adapter_dtype)
    with torch.no_grad():
        before = model(x).double()
        (row if side == "row" else column).fill_(offset)
        change = model(x).double() - before
    without_bias = before - model.base_model.model[0].get_base_layer().bias.detach().double()
    assert slope(change, without_bias) == pytest.approx(offset, rel=0.2)


@pytest.mark.parametrize("side", ["row", "column"])
def test_fp32_outputs_follow_bf16_offsets_to_their_own_precision(side):
    offset = torch.tensor(1e-3, dtype=torch.bfloat16)
    model, row, column, x = adapt(torch.float32, torch.bfloat16, bias=False)
    with torch.no_grad():
        before = model(x).double()
        (row if side == "row" else column).fill_(offset)
        change = model(x).double() - before
    assert slope(change, before) == pytest.approx(offset.item(), rel=1e-3)


@pytest.mark.parametrize("adapter_dtype", DTYPES)
def test_bf16_steps_below_half_an_ulp_add_up(adapter_dtype):
    """Adam moves every scale by 1e-4 a step, and never by enough for a scale in bf16 to leave 1."""
    model, row, column, x = adapt(torch.bfloat16, adapter_dtype, bias=False)
    with torch.no_grad():
        before = model(x).double()
    optimizer = torch.optim.Adam([row, column], lr=1e-4)
    for _ in range(30):
        optimizer.zero_grad()
        (-(model(x) * before).mean()).backward()  # falls with every scale that grows
        optimizer.step()
    for offsets in (row, column):
        assert 2e-3 < offsets.min() and offsets.max() < 3.9e-3
    with torch.no_grad():
        change = model(x).double() - before
    asked = (1 + row.double().mean()) * (1 + column.double().mean()) - 1
    assert slope(change, before) == pytest.approx(asked.item(), rel=0.2)


def test_bf16_offsets_give_the_outputs_of_fp32_ones_bit_by_bit_without_casts():
    kernels, outputs = [], []
    for adapter_dtype in DTYPES:
        model, row, column, x = adapt(torch.bfloat16, adapter_dtype)
        fill(row, column)
        with torch.no_grad(), KernelCounter() as counter:
            outputs.append(model(x))
        kernels.append(counter.kernels)
    assert torch.equal(*outputs)
    assert kernels == [4, 6]  # a base call, two scalings, a shift by the bias; and two casts


def test_from_pretrained_keeps_bf16_offsets_in_bf16_if_asked(tmp_path):
    model, row, column, x = adapt(torch.bfloat16, torch.float32)
    fill(row, column)
    with torch.no_grad():
        expected = model(x)
    model.save_pretrained(tmp_path)
    base = model.unload()
    loaded = PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=False)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        assert torch.equal(loaded(x), expected)
