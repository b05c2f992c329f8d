"""What training keeps and computes for the scales: every mode gives the gradients of the dense formula."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.tuners.hyperadapt.functional import can_fuse, scale_input, scale_output, scaled_linear

from ...tiny import build


def offsets(zero=False, dtype=torch.float64):
    torch.manual_seed(0)
    row, column = 0.3 * torch.randn(6, dtype=dtype), 0.3 * torch.randn(4, dtype=dtype)
    if zero:
        row[1] = column[2] = -1
    return row.requires_grad_(), column.requires_grad_()


class Counted(nn.Module):
    """A frozen layer that counts its calls."""

    def __init__(self, layer):
        super().__init__()
        self.layer, self.calls = layer.requires_grad_(False), 0

    def forward(self, x):
        self.calls += 1
        return self.layer(x)


def adapted(base, x, row, column, channel_dims=0, bias=None, **modes):
    result = base(scale_input(x, column, channel_dims))
    return scale_output(result, row, bias, base, (x, column), channel_dims, **modes)


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-scale"])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "compute-again"])
@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "new"])
@pytest.mark.parametrize("kind", ["linear", "linear-with-bias", "conv2d"])
def test_gradients_are_those_of_the_dense_formula(kind, in_place, keep, zero):
    row, column = offsets(zero)
    if kind == "conv2d":
        layer, x, channel_dims = nn.Conv2d(4, 6, 2).double(), torch.randn(2, 4, 3, 3).double(), 2
        shape = (1, 1, 1)
    else:
        layer, x, channel_dims = nn.Linear(4, 6, bias=kind != "linear").double(), torch.randn(2, 3, 4).double(), 0
        shape = (1,)
    layer.requires_grad_(False)
    x.requires_grad_()
    target = torch.randn_like(layer(x))

    def dense(x, row, column):
        weight = (1 + row).reshape(-1, *shape) * layer.weight * (1 + column).reshape(-1, *shape[1:])
        return torch.func.functional_call(layer, {"weight": weight}, x)

    got = adapted(layer, x, row, column, channel_dims, bias=layer.bias, in_place=in_place, keep=keep)
    expected = dense(x, row, column)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad((got - target).square().sum(), (x, row, column))
    expected = torch.autograd.grad((expected - target).square().sum(), (x, row, column))
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("in_place", [True, False], ids=["in-place", "new"])
def test_the_base_layer_is_computed_again_only_if_what_was_kept_cannot_serve(in_place):
    x = torch.randn(3, 4, dtype=torch.float64)

    def gradient(change=False, zero=False, keep=True):
        base, (row, column) = Counted(nn.Linear(4, 6, bias=False).double()), offsets(zero)
        torch.nn.init.ones_(base.layer.weight)
        y = adapted(base, x, row, column, in_place=in_place, keep=keep)
        if change:  # as models do to a linear layer's output; through a view, too
            y.view(-1)[:5].add_(1)
        y.sum().backward()
        return row.grad, base.calls

    kept, calls = gradient()
    assert calls == 1
    for options in ({"change": True}, {"keep": False}, {"zero": True}):
        again, calls = gradient(**options)
        assert calls == 2, options
        if "zero" not in options:
            torch.testing.assert_close(again, kept)


@pytest.mark.parametrize("changed", [False, True], ids=["", "changed-in-place-afterwards"])
@pytest.mark.parametrize("zero", [False, True], ids=["", "zero-scale"])
@pytest.mark.parametrize("keep", [True, False], ids=["keep", "compute-again"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (0, 4)], ids=str)
def test_one_node_for_a_linear_layer_and_its_scales(shape, bias, keep, zero, changed):
    row, column = offsets(zero)
    layer = nn.Linear(4, 6, bias=bias).double().requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert can_fuse(layer, x, column, row)
    got = scaled_linear(x, column, row, layer.weight, layer.bias, keep)
    weight = (1 + row)[:, None] * layer.weight * (1 + column)
    expected = nn.functional.linear(x, weight, layer.bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    if changed:
        got, expected = got.mul_(3).relu_(), (3 * expected).relu()
    target = torch.randn_like(expected)
    grads = torch.autograd.grad((got * target).sum(), (x, row, column))
    for grad, dense in zip(grads, torch.autograd.grad((expected * target).sum(), (x, row, column)), strict=True):
        torch.testing.assert_close(grad, dense, rtol=1e-10, atol=1e-10)


def test_one_node_in_bf16_keeps_the_scales_in_fp32():
    row, column = offsets(dtype=torch.float32)
    layer = nn.Linear(4, 6, dtype=torch.bfloat16).requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.bfloat16)
    result = scaled_linear(x, column, row, layer.weight, layer.bias)
    assert result.dtype == torch.bfloat16
    result.float().square().sum().backward()
    got = row.grad, column.grad
    row.grad = column.grad = None
    adapted(layer, x, row, column, bias=layer.bias).float().square().sum().backward()
    for grad, expected in zip(got, (row.grad, column.grad), strict=True):
        assert grad.dtype == torch.float32
        torch.testing.assert_close(grad, expected, rtol=2e-2, atol=2e-2 * expected.abs().max())


def frozen(layer, hook=None):
    layer.requires_grad_(False)
    if hook is not None:
        getattr(layer, hook)(lambda *args: None)
    return layer


def overridden():
    layer = nn.Linear(4, 6)
    layer.forward = layer.forward
    return frozen(layer)


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Linear(4, 6),
        overridden,
        lambda: frozen(nn.Linear(4, 6), "register_forward_hook"),
        lambda: frozen(nn.Linear(4, 6), "register_forward_pre_hook"),
        lambda: frozen(nn.Linear(4, 6), "register_full_backward_hook"),
        lambda: frozen(nn.modules.linear.NonDynamicallyQuantizableLinear(4, 6)),
    ],
    ids=["trained", "overridden", "hook", "pre-hook", "backward-hook", "another-class"],
)
def test_a_layer_that_must_be_called_is_called(layer):
    row, column = offsets(dtype=torch.float32)
    x = torch.randn(3, 4)
    assert not can_fuse(layer(), x, column, row)
    plain = frozen(nn.Linear(4, 6))
    assert can_fuse(plain, x, column, row)
    assert not can_fuse(plain, x, None, row) and not can_fuse(plain, x, column, None)
    with torch.autocast("cpu", torch.bfloat16):
        assert not can_fuse(plain, x, column, row)
    with torch.no_grad():
        assert not can_fuse(plain, x, column, row)
    everywhere = nn.modules.module.register_module_forward_hook(lambda *args: None)
    try:
        assert not can_fuse(plain, x, column, row)
    finally:
        everywhere.remove()


def test_a_model_without_weights_on_the_meta_device_has_shapes():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)).to("meta"), HyperAdaptConfig(target_modules=["0"]))
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 6)


def test_one_node_with_frozen_scales_keeps_no_activations():
    row, column = (offset.requires_grad_(False) for offset in offsets())
    layer = nn.Linear(4, 6).double().requires_grad_(False)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        result = scaled_linear(x, column, row, layer.weight, layer.bias)
    assert x.shape not in kept and result.shape not in kept
    (grad,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(grad, (((1 + row) @ layer.weight) * (1 + column)).expand(3, 4))


def test_a_trained_bias_gets_its_gradient():
    row, column = offsets()
    layer, x = nn.Linear(4, 6).double(), torch.randn(3, 4).double()
    layer.weight.requires_grad_(False)
    adapted(layer, x, row, column, bias=layer.bias).sum().backward()
    torch.testing.assert_close(layer.bias.grad, torch.full((6,), 3.0, dtype=torch.float64))


def test_a_second_derivative_is_refused_not_wrong():
    row, column = offsets()
    layer, x = nn.Linear(4, 6, bias=False).double().requires_grad_(False), torch.randn(3, 4).double()
    loss = adapted(layer, x, row, column).square().sum()
    (gradient,) = torch.autograd.grad(loss, row, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def kept_bytes(model, x):
    """What autograd keeps of activations, by storage; the model's own tensors do not count."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and storage.nbytes() > 1024:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)
    return sum(kept.values()), output


@pytest.mark.parametrize("save_memory", [False, True])
def test_what_is_kept_is_the_input_and_the_output_or_the_input_alone(save_memory):
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 16, bias=False))
    model = get_peft_model(model, HyperAdaptConfig(target_modules=["0", "1"], save_memory=save_memory))
    x = torch.randn(128, 32)
    kept, output = kept_bytes(model, x)
    inputs, outputs = 32 + 64, 64 + 16
    between = 64  # one's output is the other's input
    numbers = inputs if save_memory else inputs + outputs - between
    assert kept == 4 * 128 * numbers
    output.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "non-reentrant"])
@pytest.mark.parametrize("architecture", ["llama", "bert", "gpt2"])
def test_save_memory_trains_the_same(architecture, checkpointing, autocast):
    grads = []
    for save_memory in (False, True):
        model, batch, task_type = build(architecture)
        model = get_peft_model(
            model, HyperAdaptConfig(task_type=task_type, init_weights=False, save_memory=save_memory)
        )
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.1)
        model.train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
    assert all(grad.abs().max() > 0 for name, grad in grads[0].items() if "k_proj.hyperadapt_row" not in name)
    # bf16 sums of a few hundred products; in fp32 the two differ by the division alone
    tolerance = {"rtol": 0.05, "atol": 0.02} if autocast else {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(grads[0], grads[1], **tolerance)


def test_training_and_inference_give_the_same_bits():
    model, batch, _ = build("bert")
    model = get_peft_model(model, HyperAdaptConfig(task_type="SEQ_CLS", init_weights=False)).eval()
    trained = model(**batch).logits
    with torch.no_grad():
        assert torch.equal(trained, model(**batch).logits)


def test_a_layer_whose_output_others_see_is_not_overwritten():
    layer = nn.Linear(4, 6)
    seen = []
    layer.register_forward_hook(lambda module, args, output: seen.append((output, output.detach().clone())))
    model = get_peft_model(nn.Sequential(layer), HyperAdaptConfig(target_modules=["0"], init_weights=False))
    for grad in (torch.no_grad(), torch.enable_grad()):
        with grad:
            model(torch.randn(3, 4))
    assert all(torch.equal(output, before) for output, before in seen)
