"""SURM layers against dense algebra: both placements, all structures, merge, several adapters, other PEFT methods."""

import copy
import json

import pytest
import torch
from peft import C3AConfig, LoKrConfig, LoraConfig, PeftConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel
from transformers.pytorch_utils import Conv1D

from hyperadapt_peft import SurmConfig
from hyperadapt_peft.tuners.surm.structures import LDR

from ...tiny import Wrapper


STRUCTURES = {
    "circulant": {"structure": "circulant"},
    "toeplitz": {"structure": "toeplitz"},
    "toeplitz-general": {"structure": "toeplitz", "symmetric": False},
    "kronecker": {"structure": "kronecker"},
    "ldr": {"structure": "ldr", "r": 2},
}
WIDE = LDR.dense_up_to + 5  # products of both kinds, FFT and dense, are run
LAYERS = {
    "square": lambda: nn.Linear(7, 7),
    "tall": lambda: nn.Linear(6, 9, bias=False),
    "flat-conv1d": lambda: Conv1D(5, 8),
    "wide": lambda: nn.Linear(WIDE, 12),
}


def adapt(layer_name, structure, dtype=torch.float64, **config):
    torch.manual_seed(0)
    layer = LAYERS[layer_name]().to(dtype)
    config = SurmConfig(target_modules=["layer"], **STRUCTURES[structure], **{"init_weights": False, **config})
    model = get_peft_model(Wrapper(copy.deepcopy(layer)), config, autocast_adapter_dtype=False).eval()
    columns = layer.weight.shape[0] if isinstance(layer, Conv1D) else layer.weight.shape[1]
    return layer, model, torch.randn(2, 3, columns, dtype=dtype)


def matrix(model, name="default"):
    return model.base_model.model.layer.matrix(name)


@pytest.mark.parametrize("layer_name", LAYERS)
@pytest.mark.parametrize("structure", STRUCTURES)
class TestBothPlacements:
    def test_parallel_is_an_added_matrix(self, layer_name, structure):
        layer, model, x = adapt(layer_name, structure, alpha=0.7)
        expected = layer(x) + x @ matrix(model).T
        assert not torch.allclose(expected, layer(x))
        torch.testing.assert_close(model(x), expected)
        before = model.base_model.model.layer.base_layer.weight.clone()
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), expected)
        model.unmerge_adapter()
        assert torch.equal(model.base_model.model.layer.base_layer.weight, before)
        merged = model.merge_and_unload()
        assert type(merged.layer) is type(layer)
        torch.testing.assert_close(merged(x), expected)

    def test_sequential_is_a_gelu_layer_after_it(self, layer_name, structure):
        layer, model, x = adapt(layer_name, structure, placement="sequential", alpha=0.7)
        model.base_model.model.layer.surm_bias["default"].weight.data.normal_()
        out = layer(x)
        expected = out + F.gelu(out @ matrix(model).T) + model.base_model.model.layer.surm_bias["default"].weight
        torch.testing.assert_close(model(x), expected)
        for call in (model.merge_adapter, model.merge_and_unload):
            with pytest.raises(ValueError, match="default cannot be merged.*not linear"):
                call()
        assert torch.equal(model.unload()(x), out)

    @pytest.mark.parametrize("placement", ["parallel", "sequential"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_identity_at_start_and_gradients_flow(self, layer_name, structure, placement, dtype):
        layer, model, x = adapt(layer_name, structure, dtype, placement=placement, init_weights=True)
        assert torch.equal(model(x), layer(x))
        model(x).square().sum().backward()
        assert model.base_model.model.layer.surm_A["default"].weight.grad.abs().sum() > 0

    @pytest.mark.parametrize("placement", ["parallel", "sequential"])
    def test_gradcheck(self, layer_name, structure, placement):
        _, model, x = adapt(layer_name, structure, placement=placement)
        names = [name for name, p in model.named_parameters() if p.requires_grad]
        assert len(names) == (2 if placement == "parallel" else 3)
        values = [model.get_parameter(name).detach().clone().requires_grad_() for name in names]

        def run(x, *values):
            return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(run, (x.requires_grad_(), *values), fast_mode=True, check_forward_ad=True)


def test_kronecker_products_in_bf16():
    """With factors in fp32: as exact as the rounding of the output, and nothing of x's size is kept in fp32."""
    torch.manual_seed(0)
    dtype = torch.bfloat16
    model = Wrapper(nn.Linear(64, 48, dtype=dtype))
    model = get_peft_model(model, SurmConfig(target_modules=["layer"], structure="kronecker", init_weights=False))
    layer = model.base_model.model.layer
    x = torch.randn(32, 64, dtype=dtype, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = model(x)
    assert {t.dtype for t in saved if t.numel() >= x.numel()} == {dtype}
    update = (out - layer.base_layer(x)).double()
    exact = x.double() @ layer.matrix("default").double().T
    eps = torch.finfo(dtype).eps
    assert (update - exact).norm() < 2 * eps * out.norm()
    out.double().square().sum().backward()
    a, b = layer.surm_A["default"].weight, layer.surm_B["default"].weight
    grad = 2 * out.detach().double().T @ x.double()
    for weight, subscripts, other in ((a, "prqs,rs->pq", b), (b, "prqs,pq->rs", a)):
        (p, q), (r, s) = a.shape, b.shape
        factor = layer.gain("default")
        expected = factor * torch.einsum(subscripts, grad.reshape(p, r, q, s), other.detach().double())
        assert weight.grad.dtype == torch.float32
        assert (weight.grad - expected).norm() < 8 * eps * expected.norm()


@pytest.mark.parametrize("structure", STRUCTURES)
def test_fp16_products_have_the_range_of_fp32(structure):
    """alpha times A alone takes x beyond fp16's largest number, 65,504; the product with B is small again."""
    torch.manual_seed(0)
    model = Wrapper(nn.Linear(64, 64, dtype=torch.float16))
    model = get_peft_model(model, SurmConfig(target_modules=["layer"], alpha=1e4, **STRUCTURES[structure]))
    layer = model.base_model.model.layer
    nn.init.constant_(layer.surm_A["default"].weight, 1e-1)
    layer.surm_B["default"].weight.data *= 1e-4
    assert model(100 + torch.randn(8, 64, dtype=torch.float16)).isfinite().all()


def test_several_adapters_add_and_then_sequential_ones_follow():
    layer, model, x = adapt("square", "circulant")
    model.add_adapter("after", SurmConfig(target_modules=["layer"], placement="sequential", init_weights=False))
    model.add_adapter("second", SurmConfig(target_modules=["layer"], structure="ldr", init_weights=False))
    model.double()
    model.base_model.set_adapter(["after", "default", "second"])
    inner = layer(x) + x @ (matrix(model) + matrix(model, "second")).T
    torch.testing.assert_close(model(x), inner + F.gelu(inner @ matrix(model, "after").T))
    model.merge_adapter(["default", "second"])  # what can be merged is, though another adapter cannot
    model.unmerge_adapter()
    with pytest.raises(ValueError, match="after cannot be merged"):
        model.merge_adapter()
    assert model.get_model_status().merged_adapters == []


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
def test_set_scale_and_scale_layer_are_the_update_s_strength(placement):
    layer, model, x = adapt("square", "toeplitz", placement=placement, alpha=0.7)
    surm, base, full = model.base_model.model.layer, layer(x), model(x)

    def assert_strength(strength):
        torch.testing.assert_close(model(x), base + strength * (full - base))

    model.base_model.set_scale("default", -0.5)
    assert_strength(-0.5)
    surm.scale_layer(4)
    assert_strength(-2)
    if placement == "parallel":
        model.merge_adapter()
        assert_strength(-2)
        with pytest.raises(ValueError, match="default is merged"):
            model.base_model.set_scale("default", 1)
        model.unmerge_adapter()
    surm.unscale_layer(2)
    assert_strength(-1)
    surm.unscale_layer()
    assert_strength(1)


ADAPTERS = {
    "circulant": {"structure": "circulant", "alpha": 0.7},
    "again": {"structure": "circulant", "alpha": -2.0},
    "toeplitz": {"structure": "toeplitz"},
    "kronecker": {"structure": "kronecker"},
    "ldr": {"structure": "ldr", "r": 2},
    "after": {"structure": "circulant", "placement": "sequential", "alpha": 3.0},
    "after-2": {"structure": "circulant", "placement": "sequential"},
}


def many_adapters(layer_name):
    _, model, x = adapt(layer_name, "circulant")
    for name, config in ADAPTERS.items():
        model.add_adapter(name, SurmConfig(target_modules=["layer"], init_weights=False, **config))
    for name, strength in {"again": 0.5, "after": 0.5, "after-2": -1.0}.items():
        model.base_model.set_scale(name, strength)
    for bias in model.base_model.model.layer.surm_bias.values():
        bias.weight.data.normal_()
    return model.double(), x


def alone(model, x, name):
    if name == "__base__":
        with model.disable_adapter():
            return model(x)
    model.base_model.set_adapter(name)
    return model(x)


@pytest.mark.parametrize("layer_name", ["square", "wide"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)], ids=str)
def test_mixed_batch_is_each_sample_s_own_adapter(layer_name, shape):
    model, x = many_adapters(layer_name)
    names = [*ADAPTERS, "__base__", "ldr", "after", "default"]
    x = torch.randn(len(names), *shape, x.shape[-1], dtype=torch.float64)
    mixed = model(x, adapter_names=names)
    with torch.no_grad():
        torch.testing.assert_close(model(x, adapter_names=names), mixed)
    for i, name in enumerate(names):
        torch.testing.assert_close(mixed[i : i + 1], alone(model, x[i : i + 1], name))


def test_mixed_batch_trains_each_sample_s_own_adapter():
    model, x = many_adapters("square")
    names = [*ADAPTERS, "__base__", "ldr", "after"]
    x = torch.randn(len(names), 3, x.shape[-1], dtype=torch.float64)
    model.train()
    model.set_requires_grad(list(ADAPTERS))
    model(x, adapter_names=names).square().sum().backward()
    found = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    assert found and not any("base_layer" in key or "default" in key for key in found)
    model.zero_grad()
    for i, name in enumerate(names[: len(ADAPTERS)] + names[-2:]):
        i = i if i < len(ADAPTERS) else i + 1
        alone(model, x[i : i + 1], name).square().sum().backward()
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_torch_func_differentiates_twice_and_forwards(structure):
    _, model, x = adapt("wide", structure)
    base = model.get_base_model()
    name, weight = next((name, p.detach()) for name, p in base.named_parameters() if p.requires_grad)

    def loss(weight):
        return torch.func.functional_call(base, {name: weight}, (x,)).square().sum()

    tangent = torch.randn_like(weight)
    gradient = torch.func.grad(loss)
    _, slope = torch.func.jvp(loss, (weight,), (tangent,))
    torch.testing.assert_close(slope, (gradient(weight) * tangent).sum())
    _, found = torch.func.jvp(gradient, (weight,), (tangent,))  # the Hessian times the tangent
    torch.testing.assert_close(found, torch.func.grad(lambda weight: (gradient(weight) * tangent).sum())(weight))


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_torch_func_gives_gradients_per_sample(structure, placement):
    _, model, x = adapt("wide", structure, placement=placement)
    base = model.get_base_model()
    parameters = {name: p.detach() for name, p in base.named_parameters() if p.requires_grad}

    def loss(parameters, x):
        return torch.func.functional_call(base, parameters, (x,)).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for i, sample in enumerate(x):
        torch.testing.assert_close(
            {name: gradient[i] for name, gradient in found.items()}, torch.func.grad(loss)(parameters, sample)
        )
    model.zero_grad()
    loss(dict(base.named_parameters()), x).backward()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient.sum(0), base.get_parameter(name).grad)


def test_complex_layers_are_refused():
    base = Wrapper(nn.Linear(4, 4, dtype=torch.complex64))
    with pytest.raises(ValueError, match="layer is not supported.*of real weights"):
        get_peft_model(base, SurmConfig(target_modules=["layer"]))
    assert type(base.layer) is nn.Linear


def test_dropout_acts_in_training_only_and_follows_the_mode():
    _, model, x = adapt("square", "circulant", surm_dropout=0.5)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))
    base = Wrapper(nn.Linear(4, 4)).eval()
    layer = get_peft_model(base, SurmConfig(target_modules=["layer"], surm_dropout=0.5)).base_model.model.layer
    assert not any(module.training for module in layer.modules())


def test_autocast_and_compile_and_checkpointing_agree():
    _, model, x = adapt("wide", "ldr", torch.float32)
    expected = model(x)
    with torch.autocast("cpu", torch.bfloat16):
        y = model(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=3e-2, atol=3e-2)
    compiled = torch.compile(model.get_base_model(), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), expected)
    checkpointed = torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False)
    grads = [torch.autograd.grad(y.sum(), model.base_model.model.layer.surm_A["default"].weight)[0]
             for y in (model(x), checkpointed, compiled(x))]  # fmt: skip
    torch.testing.assert_close(grads[1], grads[0])
    torch.testing.assert_close(grads[2], grads[0])


def bert_base():
    with torch.device("meta"):
        return BertModel(BertConfig())  # 12 layers, width 768


@pytest.mark.parametrize(
    "config, trained",
    [
        ({"structure": "circulant"}, 55_296),
        ({"structure": "toeplitz"}, 55_296),
        ({"structure": "kronecker"}, 55_296),
        ({"structure": "circulant", "target_modules": ["query", "value"]}, 36_864),
        ({"structure": "ldr", "r": 4}, 4 * 55_296),
    ],
    ids=str,
)
def test_the_paper_s_parameter_counts(config, trained):
    config = SurmConfig(**{"target_modules": ["query", "key", "value"], **config})
    model = get_peft_model(bert_base(), config, low_cpu_mem_usage=True)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_the_default_is_a_kronecker_product_on_every_linear_layer_of_fewer_parameters_than_lora_s():
    model = get_peft_model(bert_base(), SurmConfig(), low_cpu_mem_usage=True)
    assert len(model.targeted_module_names) == 12 * 6 + 1  # and the pooler
    lora = get_peft_model(bert_base(), LoraConfig(r=1, target_modules="all-linear"), low_cpu_mem_usage=True)
    assert model.peft_config["default"].structure == "kronecker"
    assert set(model.targeted_module_names) == set(lora.targeted_module_names)
    assert model.get_nb_trainable_parameters()[0] < lora.get_nb_trainable_parameters()[0]


@pytest.mark.parametrize("structure, alpha", {"circulant": 16, "kronecker": 16, "toeplitz": 0.25, "ldr": 0.25}.items())
def test_alpha_is_a_gain_of_the_learning_rate(structure, alpha):
    """Adam's steps do not depend on a gradient's size, so factors smaller by a root of alpha see a rate larger by it."""

    def trained(alpha, rate):
        torch.manual_seed(0)
        model = get_peft_model(
            Wrapper(nn.Linear(6, 6)), SurmConfig(target_modules=["layer"], **alpha, **kind)
        ).double()
        x, y = torch.randn(2, 9, 6, dtype=torch.float64)
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=rate, eps=1e-30)
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        return matrix(model)

    kind = {"structure": structure}
    assert SurmConfig(structure=structure).alpha == alpha
    plain = trained({"alpha": 1.0}, 4e-3)
    assert plain.abs().max() > 1e-4
    torch.testing.assert_close(trained({}, 4e-3 / alpha**0.5), plain, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(trained({"alpha": -4.0}, 2e-3), plain, rtol=1e-5, atol=1e-9)
    off = get_peft_model(Wrapper(nn.Linear(6, 6)), SurmConfig(target_modules=["layer"], alpha=0, **kind))
    assert matrix(off).count_nonzero() == 0 and off.base_model.model.layer.surm_B["default"].weight.isfinite().all()


def test_houlsby_sites_are_the_default_of_the_sequential_placement():
    model = get_peft_model(bert_base(), SurmConfig(placement="sequential"), low_cpu_mem_usage=True)
    names = model.targeted_module_names
    assert len(names) == 24
    assert all(name.endswith(("attention.output.dense", ".output.dense")) for name in names)
    assert model.peft_config["default"].target_modules  # saved by name


def test_circulant_is_c3a_with_one_block():
    """C3A's kernel w is the first row of n dW: our first column is w[-i mod n] / n."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8, bias=False)
    c3a = get_peft_model(Wrapper(copy.deepcopy(layer)), C3AConfig(target_modules=["layer"], block_size=8))
    kernel = torch.randn(8)
    c3a_layer = c3a.base_model.model.layer
    next(iter(c3a_layer.c3a_kernel.values())).data.copy_(kernel.reshape(1, 1, 8))
    surm = get_peft_model(
        Wrapper(copy.deepcopy(layer)), SurmConfig(target_modules=["layer"], structure="circulant", alpha=1)
    )
    ours = surm.base_model.model.layer
    ours.surm_A["default"].weight.data.copy_(kernel[-torch.arange(8) % 8] / 8)
    ours.surm_B["default"].weight.data.fill_(1)
    torch.testing.assert_close(ours.get_delta_weight("default"), c3a_layer.get_delta_weight("default"))
    x = torch.randn(3, 8)
    torch.testing.assert_close(ours(x), c3a_layer(x))


def test_kronecker_is_lokr():
    torch.manual_seed(0)
    layer = nn.Linear(16, 16, bias=False)
    config = LoKrConfig(target_modules=["layer"], r=8, alpha=8, decompose_factor=4)
    lokr = get_peft_model(Wrapper(copy.deepcopy(layer)), config).base_model.model.layer
    surm = get_peft_model(
        Wrapper(copy.deepcopy(layer)), SurmConfig(target_modules=["layer"], structure="kronecker", alpha=1)
    ).base_model.model.layer
    for theirs, ours in ((lokr.lokr_w1, surm.surm_A), (lokr.lokr_w2, surm.surm_B)):
        theirs["default"].data.normal_()
        ours["default"].weight.data.copy_(theirs["default"])
    torch.testing.assert_close(surm.get_delta_weight("default"), lokr.get_delta_weight("default"))


@pytest.mark.parametrize(
    "config, message",
    [
        (
            {"structure": "hankel"},
            r"`structure` must be one of \('circulant', 'toeplitz', 'kronecker', 'ldr'\), not 'hankel'",
        ),
        ({"placement": "attention"}, r"`placement` must be one of \('parallel', 'sequential'\), not 'attention'"),
        ({"r": 2}, "displacement rank of structure='ldr'"),
        ({"r": 0, "structure": "ldr"}, "`r` must be a positive integer"),
        ({"alpha": float("nan")}, "`alpha` must be finite in fp32"),
        ({"surm_dropout": 1.0}, r"`surm_dropout` must be in \[0, 1\)"),
        ({"symmetric": "yes"}, "`symmetric` must be bool, not 'yes'"),
    ],
    ids=str,
)
def test_config_fields_are_checked(config, message):
    with pytest.raises((TypeError, ValueError), match=message):
        SurmConfig(**config)


@pytest.mark.parametrize("load", [SurmConfig.from_pretrained, PeftConfig.from_pretrained], ids=["own", "PEFT's"])
def test_files_of_format_1_say_place(load, tmp_path):
    """PEFT drops keys that a config does not take: without `place` the adapter would be parallel."""
    SurmConfig(target_modules=["layer"]).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    assert "place" not in config
    del config["placement"]
    for place, placement in {"lora": "parallel", "adapter": "sequential"}.items():
        path.write_text(json.dumps({**config, "place": place}))
        assert load(tmp_path).placement == placement


def test_unknown_names_and_layers_are_refused():
    with pytest.raises(ValueError, match="specify `target_modules`.*o_proj"):
        get_peft_model(Wrapper(nn.Linear(4, 4)), SurmConfig(placement="sequential"))
    with pytest.raises(ValueError, match="layer is not supported.*Conv2d.*adapts `torch.nn.Linear`"):
        get_peft_model(Wrapper(nn.Conv2d(4, 4, 1)), SurmConfig(target_modules=["layer"]))


@pytest.mark.parametrize("structure", STRUCTURES)
def test_init_from_updates_recovers_a_structured_update(structure):
    _, teacher, x = adapt("square", structure)
    _, model, _ = adapt("square", structure, alpha=0.5)
    before = model.base_model.model.layer.surm_A["default"].weight.clone()
    for wrong, message in (
        ({"layer": torch.zeros(2, 2)}, "needs"),
        ({"other": matrix(teacher)}, "no parallel adapter default"),
    ):
        with pytest.raises(ValueError, match=message):
            model.init_from_updates(wrong)
    assert torch.equal(model.base_model.model.layer.surm_A["default"].weight, before)
    errors = model.init_from_updates({"layer": matrix(teacher)})
    difference = (matrix(model) - matrix(teacher)).norm() / matrix(teacher).norm()
    assert abs(errors["layer"] - difference.item()) < 1e-6
    if not structure.startswith("toeplitz"):  # a product of two: a local minimum
        assert difference < 1e-6
        torch.testing.assert_close(model(x), teacher(x))
