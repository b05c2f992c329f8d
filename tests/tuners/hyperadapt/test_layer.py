"""HyperAdapt against dense algebra: every layer kind, its gradients, its rank, its merge."""

import copy
import io

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from hyperadapt_peft import HyperAdaptConfig

from ...tiny import Wrapper


def tokens(*shape):
    return torch.randint(0, 11, shape)


# name -> (layer, input); odd sizes, with and without bias, every group count a convolution can have
LAYERS = {
    "linear": lambda: (nn.Linear(7, 5), torch.randn(3, 4, 7)),
    "linear-no-bias": lambda: (nn.Linear(7, 5, bias=False), torch.randn(2, 7)),
    "conv1d-transformers": lambda: (Conv1D(5, 7), torch.randn(3, 4, 7)),
    "embedding": lambda: (nn.Embedding(11, 6, padding_idx=0), tokens(3, 4)),
    "conv1d": lambda: (nn.Conv1d(4, 6, 3, padding=1), torch.randn(2, 4, 9)),
    "conv2d": lambda: (nn.Conv2d(4, 6, (3, 2), stride=2, bias=False), torch.randn(2, 4, 8, 9)),
    "conv2d-groups": lambda: (nn.Conv2d(4, 6, 3, groups=2, padding="same"), torch.randn(2, 4, 5, 5)),
    "conv2d-depthwise": lambda: (nn.Conv2d(4, 8, 3, groups=4, padding_mode="circular", padding=1),
                                 torch.randn(2, 4, 5, 5)),
    "conv2d-unbatched": lambda: (nn.Conv2d(4, 6, 3), torch.randn(4, 5, 5)),
    "conv3d": lambda: (nn.Conv3d(2, 4, 2, groups=2), torch.randn(1, 2, 3, 4, 3)),
}  # fmt: skip


def adapt(name, dtype=torch.float64, **config):
    """The base layer, the model adapted on a copy of it, and an input."""
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    layer = layer.to(dtype)
    x = x.to(dtype) if x.is_floating_point() else x
    config = HyperAdaptConfig(target_modules=["layer"], **{"init_weights": False, **config})
    return layer, get_peft_model(Wrapper(copy.deepcopy(layer)), config, autocast_adapter_dtype=False).eval(), x


def trained(model, side, name="default"):
    return getattr(model.base_model.model.layer, f"hyperadapt_{side}")[name].weight


def dense(layer, model, adapters=("default",)):
    """A copy of the base layer that holds `diag(a) W diag(b)`, written entry by entry."""
    layer = copy.deepcopy(layer)
    weight = layer.weight.data
    if isinstance(layer, Conv1D):
        weight = weight.T
    groups = getattr(layer, "groups", 1)
    for adapter in adapters:
        alpha = model.peft_config[adapter].alpha
        a, b = (1 + alpha * trained(model, side, adapter).detach() for side in ("row", "column"))
        n, m = weight.shape[:2]
        for i in range(n):
            for j in range(m):
                weight[i, j] *= a[i] * b[i // (n // groups) * m + j]
    return layer


@pytest.mark.parametrize("name", LAYERS)
def test_forward_is_dense_algebra(name):
    layer, model, x = adapt(name)
    expected = dense(layer, model)(x)
    assert not torch.allclose(expected, layer(x))
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", LAYERS)
def test_merge_is_dense_algebra_and_leaves_the_bias(name):
    layer, model, _ = adapt(name)
    expected = dense(layer, model)
    merged = model.merge_and_unload().layer
    assert type(merged) is type(layer)
    torch.testing.assert_close(merged.weight, expected.weight, rtol=1e-12, atol=1e-12)
    if getattr(layer, "bias", None) is not None:
        assert torch.equal(merged.bias, layer.bias)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity_at_init_is_bit_exact(name, dtype):
    layer, model, x = adapt(name, dtype, init_weights=True)
    assert torch.equal(model(x), layer(x))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("sides", ["both", "row", "column"])
def test_gradcheck(name, sides):
    _, model, x = adapt(name, sides=sides)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(names) == (2 if sides == "both" else 1)
    values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

    def run(x, *values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    x = x.clone().requires_grad_() if x.is_floating_point() else x
    assert torch.autograd.gradcheck(run, (x, *values), fast_mode=True, check_forward_ad=True)


@pytest.mark.parametrize("name", ["linear", "conv2d-groups", "embedding"])
def test_active_adapters_multiply_in_any_order(name):
    layer, model, x = adapt(name)
    model.add_adapter("second", HyperAdaptConfig(target_modules=["layer"], init_weights=False, alpha=-0.7))
    model.to(torch.float64)
    expected = dense(layer, model, ("default", "second"))(x)
    for order in (["default", "second"], ["second", "default"]):
        model.base_model.set_adapter(order)
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])  # starts from the unmerged weight and the merged adapters
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "sides, rank, bound", [("both", 3, 6), ("both", 20, 16), ("row", 3, 3), ("column", 3, 3), ("row", 20, 16)]
)
def test_rank_of_the_update_reaches_its_bound(sides, rank, bound):
    """rank(dW) <= min(2 rank(W), n, m) with both sides, <= rank(W) with one."""
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, dtype=torch.float64)
    layer.weight.data = torch.randn(16, rank, dtype=torch.float64) @ torch.randn(rank, 24, dtype=torch.float64)
    config = HyperAdaptConfig(target_modules=["layer"], init_weights=False, sides=sides)
    model = get_peft_model(Wrapper(layer), config, autocast_adapter_dtype=False)
    assert torch.linalg.matrix_rank(model.base_model.model.layer.get_delta_weight("default")) == bound


@pytest.mark.parametrize("name", LAYERS)
def test_parameter_count_is_rows_plus_columns(name):
    layer, model, _ = adapt(name)
    rows, columns = layer.weight.shape[:2]
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == rows + columns * getattr(
        layer, "groups", 1
    )


def test_scales_below_half_an_ulp_of_one_still_move_bf16_outputs():
    """1 + 0.003 rounds to 1 in bf16; x + x * 0.003 does not, for x in the upper half of its binade."""
    layer, model, x = adapt("linear-no-bias", torch.bfloat16, init_weights=True, sides="row", alpha=1.0)
    assert torch.tensor(1.003, dtype=torch.bfloat16) == 1
    x = torch.full_like(x, 1.9)
    trained(model, "row").data.fill_(0.003)
    assert not torch.equal(model(x), layer(x))


def test_output_dtype_and_autocast():
    _, model, x = adapt("linear", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), model(x), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "module",
    [nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 1), nn.Bilinear(4, 4, 4), nn.EmbeddingBag(4, 4), nn.LSTM(4, 4)],
    ids=lambda m: type(m).__name__,
)
def test_other_layers_are_refused_by_name_and_nothing_changes(module):
    model = nn.ModuleDict({"fine": nn.Linear(4, 4), "odd": module})
    before = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=rf"odd is not supported.*{type(module).__name__}.*torch.nn.Conv3d"):
        get_peft_model(model, HyperAdaptConfig(target_modules=["fine", "odd"]))
    assert {name: type(m) for name, m in model.named_modules()} == before


def test_children_that_torch_reads_uncalled():
    attention = nn.ModuleDict({"attn": nn.MultiheadAttention(8, 2), "lin": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match="attn.out_proj is not supported.*exclude_modules"):
        get_peft_model(copy.deepcopy(attention), HyperAdaptConfig(target_modules=["out_proj"]))
    with pytest.warns(UserWarning, match="attn.out_proj"):
        model = get_peft_model(attention, HyperAdaptConfig())
    assert model.targeted_module_names == ["lin"]
    with pytest.raises(ValueError, match="linear1 is not supported"):
        get_peft_model(
            Wrapper(nn.TransformerEncoderLayer(8, 2)), HyperAdaptConfig(target_modules=["linear1", "linear2"])
        )


def test_embedding_scale_and_max_norm_stay_the_base_layers():
    class Scaled(nn.Embedding):  # as Gemma's
        def forward(self, ids):
            return super().forward(ids) * 3

    torch.manual_seed(0)
    layer = Scaled(11, 6).double()
    model = get_peft_model(
        Wrapper(copy.deepcopy(layer)),
        HyperAdaptConfig(target_modules=["layer"], init_weights=False),
        autocast_adapter_dtype=False,
    )
    ids = tokens(4)
    torch.testing.assert_close(model(ids), dense(layer, model)(ids), rtol=1e-12, atol=1e-12)


def traced(model, x):
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model, x), file)
    file.seek(0)
    return torch.jit.load(file)(x)


def to_onnx(model, x):
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=False)
    graph = onnx.load_from_string(file.getvalue())
    return torch.from_numpy(ReferenceEvaluator(graph).run(None, {graph.graph.input[0].name: x.numpy()})[0])


def compiled(model, x):
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    output = compiled(x)
    output.sum().backward()
    assert all(p.grad.abs().max() > 0 for p in model.parameters() if p.requires_grad)
    return output


EXPORTS = {
    "trace": traced,
    "onnx": to_onnx,
    "export": lambda model, x: torch.export.export(model, (x,)).module()(x),
    "compile": compiled,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["linear", "linear-no-bias", "conv1d-transformers", "embedding", "conv2d-groups"])
@pytest.mark.parametrize("export", EXPORTS.values(), ids=EXPORTS)
def test_exported_without_merging(export, name):
    layer, model, x = adapt(name, torch.float32)
    expected = model(x).detach()
    assert not torch.allclose(layer(x), expected, atol=1e-2)
    got = export(model.base_model.model, x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", ["linear", "linear-no-bias"])
def test_quantized_by_torch_afterwards(name):
    layer, model, x = adapt(name, torch.float32)
    expected = model(x).detach()
    quantized = torch.ao.quantization.quantize_dynamic(model.base_model.model, {nn.Linear})
    assert not isinstance(quantized.layer.get_base_layer(), nn.Linear)
    error = (quantized(x) - expected).abs().max()
    assert 0 < error < 0.05 * expected.abs().max() and error < 0.2 * (layer(x) - expected).abs().max()


def test_a_complex_layer_saves_loads_and_merges(tmp_path):
    torch.manual_seed(0)
    base = Wrapper(nn.Linear(4, 3, dtype=torch.complex64))
    model = get_peft_model(copy.deepcopy(base), HyperAdaptConfig(target_modules=["layer"], init_weights=False))
    x = torch.randn(2, 4, dtype=torch.complex64)
    expected = model(x)
    torch.testing.assert_close(dense(base.layer, model)(x), expected)
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
    assert torch.equal(fresh(x), expected)
    torch.testing.assert_close(fresh.merge_and_unload()(x), expected)
