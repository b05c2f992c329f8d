"""The arithmetic of the scales: exact gradients for any scale, few kernels, nothing that waits for a GPU."""

import inspect

import pytest
import torch
from peft import get_peft_model
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.cli.memory import KernelCounter
from hyperadapt_peft.tuners.hyperadapt.functional import scale

from ...tiny import build


SCALES = {"zero": 0.0, "tiny": 1e-12, "negative": -1.7, "huge": 1e6, "one": 1.0}


def offsets(*shape, value=None):
    """Offsets from 1, of which one gives the scale `value`."""
    torch.manual_seed(0)
    offset = 0.3 * torch.randn(shape, dtype=torch.float64)
    if value is not None:
        offset.view(-1)[0] = value - 1
    return offset.requires_grad_()


@pytest.mark.parametrize("shift", [False, True], ids=["", "shift"])
@pytest.mark.parametrize("value", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize(
    "x_shape, offset_shape",
    [
        ((4,), (4,)),
        ((3, 4), (4,)),
        ((2, 3, 4), (2, 1, 4)),
        ((2, 4, 3), (4, 1)),
        ((2, 3, 4), (2, 3, 1)),
        ((0, 4), (4,)),
    ],
    ids=str,
)
def test_gradients_of_the_first_and_second_order(x_shape, offset_shape, value, shift):
    offset = offsets(*offset_shape, value=value)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=True)
    shift = torch.randn(offset_shape[-2:], dtype=torch.float64, requires_grad=True) if shift else None

    def run(x, offset, shift):
        return scale(x, offset, 0.7, shift)

    expected = x + 0.7 * offset * (x - (0 if shift is None else shift))
    torch.testing.assert_close(run(x, offset, shift), expected, rtol=1e-12, atol=1e-12)
    assert gradcheck(run, (x, offset, shift)) and gradgradcheck(run, (x, offset, shift))


def test_complex_numbers():
    offset = torch.randn(4, dtype=torch.complex128, requires_grad=True)
    x, shift = (torch.randn(s, dtype=torch.complex128, requires_grad=True) for s in ((3, 4), (4,)))
    assert gradcheck(scale, (x, offset, 0.7, shift)) and gradgradcheck(scale, (x, offset, 0.7, shift))


LAYERS = {
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear-no-bias": (lambda: nn.Linear(4, 6, bias=False), (2, 3, 4)),
    "complex": (lambda: nn.Linear(4, 6, dtype=torch.complex128), (5, 4)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2), (2, 4, 3, 3)),
    "conv1d-groups-no-bias": (lambda: nn.Conv1d(4, 6, 2, groups=2, bias=False), (2, 4, 5)),
    "embedding": (lambda: nn.Embedding(7, 4), (2, 3)),
}


def adapted(name, **config):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    layer = make()
    layer = layer if layer.weight.is_complex() else layer.double()
    config = HyperAdaptConfig(target_modules=["0"], **{"init_weights": False, **config})
    model = get_peft_model(nn.Sequential(layer), config, autocast_adapter_dtype=False)
    x = torch.randint(7, shape) if name == "embedding" else torch.randn(shape, dtype=layer.weight.dtype)
    return model, x


def scales_of(model):
    return {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("value", SCALES.values(), ids=SCALES)
@pytest.mark.parametrize("sides", ["both", "row", "column"])
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_s_gradients_whatever_its_scales(name, sides, value):
    model, x = adapted(name, sides=sides, alpha=2.0)
    scales = scales_of(model)
    for weight in scales.values():
        weight.data[1] = (value - 1) / 2

    def run(x, *values):
        return functional_call(model, dict(zip(scales, values, strict=True)), (x,))

    x = x if name == "embedding" else x.requires_grad_()
    assert gradcheck(run, (x, *scales.values()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "conv2d", "embedding"])
def test_gradients_per_sample_by_vmap_are_those_of_a_loop(name):
    model, x = adapted(name)
    scales = {key: value.detach() for key, value in scales_of(model).items()}

    def loss(scales, sample):
        return functional_call(model, scales, (sample[None],)).square().sum()

    got = vmap(grad(loss), (None, 0))(scales, x)
    for i, sample in enumerate(x):
        expected = grad(loss)(scales, sample)
        torch.testing.assert_close({key: value[i] for key, value in got.items()}, expected)
    model.zero_grad()
    model(x).square().sum().backward()
    for key, value in got.items():
        torch.testing.assert_close(value.sum(0), model.get_parameter(key).grad)


@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "conv2d", "embedding"])
def test_torch_func_differentiates_twice_and_forwards(name):
    model, x = adapted(name)
    scales = {key: value.detach() for key, value in scales_of(model).items()}

    def loss(*values):
        return functional_call(model, dict(zip(scales, values, strict=True)), (x,)).tanh().square().sum()

    values, tangents = tuple(scales.values()), tuple(torch.randn_like(value) for value in scales.values())
    numbers = tuple(range(len(values)))
    expected = torch.autograd.functional.hessian(loss, values)
    torch.testing.assert_close(hessian(loss, numbers)(*values), expected)
    torch.testing.assert_close(jacrev(jacrev(loss, numbers), numbers)(*values), expected)
    _, derivative = jvp(loss, values, tangents)
    gradients = grad(loss, numbers)(*values)
    torch.testing.assert_close(derivative, sum((g * t).sum() for g, t in zip(gradients, tangents, strict=True)))


def kernels(bias, **options):
    """The kernels of a call, those of a training step, and what that step waits for, of one linear layer in bf16."""
    model = nn.Sequential(nn.Linear(16, 32, bias=bias)).bfloat16()
    model = get_peft_model(model, HyperAdaptConfig(target_modules=["0"], **options))
    x = torch.randn(4, 16, dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad(), KernelCounter() as inference:
        model(x)
    with KernelCounter() as training:
        model(x).sum().backward()
    return inference.kernels, training.kernels, inference.syncs + training.syncs


def test_no_more_kernels_than_these_and_none_that_waits():
    assert kernels(bias=False) == (5, 16, 0)
    assert kernels(bias=True) == (6, 20, 0)
    assert kernels(bias=False, sides="row") == (3, 10, 0)
    assert kernels(bias=False, save_memory=True)[2] == 0


def test_a_step_binds_no_signature(monkeypatch):
    """Torch's own `apply` does so for functions with `setup_context`: a third of the time of a small layer's step."""

    def bind(*args, **kwargs):
        raise AssertionError("bound")

    monkeypatch.setattr(inspect.Signature, "bind", bind)
    x = torch.randn(3, 4, requires_grad=True)
    scale(x, torch.zeros(4, requires_grad=True), 2.0).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("names", [None, ["default", "second"]], ids=["one-adapter", "mixed-batch"])
def test_a_step_of_a_model_waits_for_nothing(names):
    model, batch, task_type = build("llama")
    with KernelCounter() as bare:
        model(**batch).loss.backward()
    model = get_peft_model(model, HyperAdaptConfig(task_type=task_type, init_weights=False)).train()
    model.add_adapter("second", HyperAdaptConfig(task_type=task_type, init_weights=False))
    model.base_model.set_adapter(["default", "second"])  # both are trained
    adapter_names = {} if names is None else {"adapter_names": names * 4}
    with KernelCounter() as adapted:
        model(**batch, **adapter_names).loss.backward()
    assert adapted.syncs == bare.syncs


def test_the_counter_sees_what_waits():
    with KernelCounter() as counter:
        x = torch.ones(3)
        assert x.sum().item() == 3 and (x > 0).all()
    assert counter.syncs == 2 and counter.kernels == 4


def test_a_model_without_weights_on_the_meta_device_has_shapes():
    model = get_peft_model(nn.Sequential(nn.Linear(4, 6)).to("meta"), HyperAdaptConfig(target_modules=["0"]))
    assert model(torch.empty(2, 4, device="meta")).shape == (2, 6)


def test_frozen_scales_keep_no_activations():
    x, offset = torch.randn(3, 4, dtype=torch.float64, requires_grad=True), offsets(4).detach()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        result = scale(x, offset)
    assert x.shape not in kept
    (grad_x,) = torch.autograd.grad(result.sum(), x)
    torch.testing.assert_close(grad_x, (1 + offset).expand(3, 4))


def test_a_trained_bias_gets_its_gradient():
    model, x = adapted("linear", bias="all")
    layer = model.base_model.model[0]
    model(x).sum().backward()
    torch.testing.assert_close(layer.get_base_layer().bias.grad, torch.full((6,), 5.0, dtype=torch.float64))


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save_memory", [False, True], ids=["", "save-memory"])
def test_what_is_kept_is_each_input_and_output_once(save_memory, dtype):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 64, bias=False), nn.Linear(32, 16, bias=False)

        def forward(self, x):
            return self.a(x).sum() + self.b(x).sum()

    model = get_peft_model(Model().to(dtype), HyperAdaptConfig(target_modules=["a", "b"], save_memory=save_memory))
    kept, output = kept_bytes(model, torch.randn(128, 32, dtype=dtype))
    assert kept == (1 if save_memory else dtype.itemsize) * 128 * (32 + 64 + 16)
    output.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_8_bits_are_enough_for_the_gradient(dtype):
    torch.manual_seed(0)
    x = torch.randn(4096, 64, dtype=dtype) * torch.logspace(-3, 3, 64).to(dtype)
    upstream = torch.randn(4096, 64).to(dtype)
    grads = []
    for save_memory in (False, True):
        offset = torch.zeros(64, requires_grad=True)
        scale(x, offset, save_memory=save_memory).backward(upstream)
        grads.append(offset.grad)
    noise = (upstream * x).float().square().sum(0).sqrt()  # what such a sum differs by from batch to batch
    assert ((grads[1] - grads[0]) / noise).square().mean().sqrt() < 0.1
    assert not torch.equal(*grads)


def test_8_bits_of_numbers_beyond_their_range_and_of_inputs_changed_since():
    offset = torch.zeros(2, requires_grad=True)
    x = torch.tensor([[1e30, 2.0]])
    scale(x, offset, save_memory=True).sum().backward()
    assert torch.equal(offset.grad, torch.tensor([57344.0, 2.0]))
    x.fill_(3)
    offset.grad = None
    scale(x, offset, save_memory=True).sum().backward()
    assert torch.equal(offset.grad, torch.tensor([3.0, 3.0]))


def test_8_bits_are_too_few_for_second_derivatives():
    offset = torch.zeros(2, requires_grad=True)
    y = scale(torch.ones(3, 2), offset, save_memory=True).square().sum()
    with pytest.raises(RuntimeError, match="save_memory"):
        torch.autograd.grad(y, offset, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["", "reentrant", "non-reentrant"])
def test_save_memory_trains_the_same(checkpointing, autocast):
    grads = []
    for save_memory in (False, True):
        model, batch, task_type = build("bert")
        config = HyperAdaptConfig(task_type=task_type, init_weights=False, save_memory=save_memory)
        model = get_peft_model(model, config).train()
        if checkpointing is not None:
            model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            model.enable_input_require_grads()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(**batch).loss
        loss.backward()
        grads.append(torch.cat([p.grad for name, p in model.named_parameters() if "hyperadapt_" in name]))
    assert 0 < (grads[1] - grads[0]).norm() < 0.2 * grads[0].norm()


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
    for mode in (torch.no_grad(), torch.enable_grad()):
        with mode:
            model(torch.randn(3, 4))
    assert all(torch.equal(output, before) for output, before in seen)
