"""Parameters as targets: fused experts, with scales for each of them, and matrices that a module reads itself."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.hotswap import hotswap_adapter
from hyperadapt_peft.tuners.hyperadapt.experts import ParamWrapper, ScaledMatrices


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
         "intermediate_size": 24, "vocab_size": 32, "max_position_embeddings": 32, "initializer_range": 0.3}  # fmt: skip
TOP2 = {"num_experts_per_tok": 2, "head_dim": 8}
CONFIGS = {
    "mixtral": lambda: tf.MixtralConfig(**SIZES, **TOP2, num_local_experts=3),
    "qwen3_moe": lambda: tf.Qwen3MoeConfig(**SIZES, **TOP2, num_experts=3, moe_intermediate_size=16),
    "gpt_oss": lambda: tf.GptOssConfig(
        **SIZES, **TOP2, num_local_experts=3, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "llama4": lambda: tf.Llama4TextConfig(
        **SIZES, num_local_experts=3, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=20
    ),
}
ROUTER = {"mixtral": "mlp.gate", "qwen3_moe": "mlp.gate", "gpt_oss": "mlp.router", "llama4": "feed_forward.router"}
TRANSPOSED = {"gpt_oss", "llama4"}  # (E, inputs, outputs)


@pytest.fixture(params=CONFIGS)
def name(request):
    return request.param


def moe(name="mixtral", dtype=torch.float32):
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[name]())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.to(dtype).eval()


def config(**kwargs):
    return HyperAdaptConfig(task_type="CAUSAL_LM", **kwargs)


def adapted(name="mixtral", dtype=torch.float32, **kwargs):
    model = moe(name, dtype)
    torch.manual_seed(1)
    return get_peft_model(model, config(init_weights=False, **kwargs)).eval()


def wrappers(model):
    return {key: module for key, module in model.named_modules() if isinstance(module, ParamWrapper)}


def logits(model, **kwargs):
    ids = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model(input_ids=ids, **kwargs).logits


def base_state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if "hyperadapt_" not in k}


def assert_same(state, other):
    assert state.keys() == other.keys()
    for key in state:
        assert torch.equal(state[key], other[key]), key


def dense(layer, adapter_names=("default",)):
    """`W o (1 + row)(1 + column)` by einsum, in the parameter's layout."""
    weight = layer.base_parameter.detach().double()
    for adapter in adapter_names:
        row, column = (1 + offset.double() for offset in layer.get_offsets(adapter))
        formula = {False: "...nm,...n,...m->...nm", True: "...mn,...n,...m->...mn"}[layer.is_transposed]
        weight = torch.einsum(formula, weight, row, column)
    return weight


# What is adapted


def test_experts_and_routers_are_adapted_by_default(name):
    for targets in (None, "all-linear"):
        model = get_peft_model(moe(name), config(target_modules=targets))
        found = {key.split(".", 3)[-1] for key in model.targeted_parameter_names}
        block = ROUTER[name].rpartition(".")[0]
        assert found == {f"{block}.experts.gate_up_proj", f"{block}.experts.down_proj", f"{ROUTER[name]}.weight"}
        assert {"q_proj", "o_proj"} < {key.rpartition(".")[2] for key in model.targeted_module_names}
        assert not any("router" in key or key.endswith("gate") for key in model.targeted_module_names)
        assert torch.equal(logits(model), logits(moe(name)))  # the identity, bit by bit


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_the_same_as_lora_where_lora_adapts_experts(name):
    ours = get_peft_model(moe(name), config())
    lora = get_peft_model(moe(name), LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    assert sorted(ours.targeted_parameter_names) == sorted(lora.targeted_parameter_names)
    assert sorted(ours.targeted_module_names) == sorted(lora.targeted_module_names)


@pytest.mark.parametrize(
    "name, targets, parameters, modules",
    [
        ("mixtral", ["w1", "w3"], {"gate_up_proj"}, set()),
        ("mixtral", ["q_proj", "w2"], {"down_proj"}, {"q_proj"}),
        ("mixtral", r".*\.1\..*\.(w2|v_proj)", {"down_proj"}, {"v_proj"}),
        ("mixtral", ["gate", "k_proj"], {"weight"}, {"k_proj"}),
        ("mixtral", ["gate_up_proj"], {"gate_up_proj"}, set()),
        ("qwen3_moe", ["gate_proj", "up_proj", "down_proj"], {"gate_up_proj", "down_proj"}, set()),
        ("llama4", ["down_proj"], {"down_proj"}, {"down_proj"}),  # and the shared expert's, a layer
        ("llama4", ["q_proj"], set(), {"q_proj"}),
    ],
)
def test_the_names_that_layers_had_before_they_were_fused(name, targets, parameters, modules):
    model = get_peft_model(moe(name), config(target_modules=targets))
    assert {key.rpartition(".")[2] for key in model.targeted_parameter_names} == parameters
    assert {key.rpartition(".")[2] for key in model.targeted_module_names} == modules
    layers = {key.split(".")[2] for key in model.targeted_parameter_names}
    assert layers == ({"1"} if isinstance(targets, str) else {"0", "1"} if parameters else set())


def test_a_part_of_what_is_fused_is_refused():
    model = moe()
    with pytest.raises(ValueError, match=r"experts.gate_up_proj, but not model.layers.0.mlp.experts.0.w3, .*Name all"):
        get_peft_model(model, config(target_modules=["w1", "q_proj"]))
    with pytest.raises(ValueError, match="Name all"):  # one expert cannot be adapted alone
        get_peft_model(model, config(target_modules=["experts.1.w2"]))
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_options_hold_for_experts():
    def parameters(**kwargs):
        model = get_peft_model(moe(), config(**kwargs))
        return {key.removeprefix("model.layers.") for key in model.targeted_parameter_names}

    both = {f"{i}.mlp.experts.{leaf}" for i in (0, 1) for leaf in ("gate_up_proj", "down_proj")}
    gates = {f"{i}.mlp.gate.weight" for i in (0, 1)}
    assert parameters() == both | gates
    assert parameters(target_parameters=[]) == set()
    assert parameters(exclude_modules=["experts"]) == gates
    assert parameters(exclude_modules=["gate", "down_proj"]) == {k for k in both if "up" in k}
    assert parameters(layers_to_transform=[1]) == {k for k in both | gates if k[0] == "1"}
    assert parameters(target_modules=["w2"], layers_to_transform=0) == {"0.mlp.experts.down_proj"}
    only = get_peft_model(moe(), config(target_parameters=["experts.down_proj"]))
    assert only.targeted_module_names == [] and len(only.targeted_parameter_names) == 2
    more = get_peft_model(moe(), config(target_parameters=["gate.weight"], target_modules="all-linear"))
    assert len(more.targeted_module_names) == 8 and len(more.targeted_parameter_names) == 2


def test_trained_numbers():
    model = get_peft_model(moe(), config(target_modules=[], target_parameters=["gate_up_proj", "down_proj"]))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trained == 2 * 3 * ((2 * 24 + 16) + (16 + 24))  # layers, experts, n + m


@pytest.mark.parametrize("sides", ["row", "column"])
def test_rows_are_outputs_whatever_the_layout(name, sides):
    model = adapted(name, sides=sides)
    shapes = {layer.parameter_name: layer for layer in wrappers(model).values()}
    width = 16 if name == "qwen3_moe" else 24
    outputs, inputs = {"gate_up_proj": 2 * width, "down_proj": 16}, {"gate_up_proj": 16, "down_proj": width}
    for leaf in outputs:
        layer = shapes[leaf]
        assert layer.is_transposed == (name in TRANSPOSED)
        scales = layer.hyperadapt_row if sides == "row" else layer.hyperadapt_column
        assert scales["default"].weight.shape == (3, (outputs if sides == "row" else inputs)[leaf])
        assert not (layer.hyperadapt_column if sides == "row" else layer.hyperadapt_row)


def test_surm_says_what_it_leaves_out(recwarn):
    with pytest.warns(
        UserWarning, match="these parameters of fused experts are no layers: .*layers.0.mlp.experts.down_proj, .*gate"
    ):
        model = get_peft_model(moe(), SurmConfig(task_type="CAUSAL_LM"))
    assert len(model.targeted_module_names) == 8
    with pytest.warns(UserWarning, match="layers: model.layers.0.mlp.experts.down_proj, model.layers.1"):
        get_peft_model(moe(), SurmConfig(task_type="CAUSAL_LM", placement="sequential"))
    recwarn.clear()
    get_peft_model(moe(), SurmConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))  # nothing is left out
    assert not [w for w in recwarn if "fused experts" in str(w.message)]


# What it computes


def test_forward_is_the_formula(name):
    model, reference = adapted(name), adapted(name)
    assert len(wrappers(reference)) == 6
    for layer in wrappers(reference).values():
        weight = dense(layer).float()
        for scales in (layer.hyperadapt_row, layer.hyperadapt_column):
            nn.init.zeros_(scales["default"].weight)
        layer.base_parameter.data.copy_(weight)
    torch.testing.assert_close(logits(model), logits(reference), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits(model), logits(moe(name)), atol=1e-2)


@pytest.mark.parametrize("zero", [False, True])
def test_gradients_to_the_second_order(zero):
    torch.manual_seed(0)
    weight, row, column = (torch.randn(s, dtype=torch.double) for s in ((2, 3, 4), (2, 3), (2, 4)))
    if zero:
        row[0, 1] = column[1, 2] = 0
    inputs = weight, row.requires_grad_(), column.requires_grad_()
    assert torch.equal(ScaledMatrices.apply(*inputs), weight * row[:, :, None] * column[:, None])
    assert torch.autograd.gradcheck(ScaledMatrices.apply, inputs)
    assert torch.autograd.gradgradcheck(ScaledMatrices.apply, inputs)
    assert torch.autograd.gradcheck(ScaledMatrices.apply, (weight.requires_grad_(), row, column))


class Experts3(nn.Module):
    """Three experts, x (3, b, m) -> (3, b, n)."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x):
        return torch.einsum("ebm,enm->ebn", x, self.weight)


def test_torch_func_batches_and_differentiates_twice():
    torch.manual_seed(0)
    layer = get_peft_model(
        nn.Sequential(Experts3()), HyperAdaptConfig(target_parameters=["0.weight"], init_weights=False)
    ).base_model.model[0]
    x = torch.randn(4, 3, 2, 5)
    row = layer.hyperadapt_row["default"].weight.detach()

    def loss(row, x):
        return torch.func.functional_call(layer, {"hyperadapt_row.default.weight": row}, (x,)).tanh().square().sum()

    torch.testing.assert_close(
        torch.func.hessian(loss)(row, x[0]), torch.autograd.functional.hessian(lambda row: loss(row, x[0]), row)
    )
    got = torch.func.vmap(torch.func.grad(loss), (None, 0))(row, x)
    torch.testing.assert_close(got, torch.stack([torch.func.grad(loss)(row, sample) for sample in x]))


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_equal_the_dense_formula_s(transposed):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 5, dtype=torch.double))
            self.is_transposed = transposed

        def forward(self, x):
            return torch.einsum("ebm,emn->ebn" if transposed else "ebm,enm->ebn", x, self.weight)

    torch.manual_seed(0)
    base = Experts()
    model = nn.Sequential(base)
    model = get_peft_model(
        model,
        HyperAdaptConfig(target_parameters=["0.weight"], init_weights=False, alpha=2.0),
        autocast_adapter_dtype=False,
    ).double()
    layer = model.base_model.model[0]
    x = torch.randn(3, 2, 4 if transposed else 5, dtype=torch.double, requires_grad=True)
    model(x).square().sum().backward()
    # of the trained numbers, whose offsets are 2 times as large
    row, column = (scales["default"].weight.grad / 2 for scales in (layer.hyperadapt_row, layer.hyperadapt_column))
    got = [row, column, x.grad]
    row, column = (offset.clone().requires_grad_() for offset in layer.get_offsets("default"))
    weight = base.weight.detach().mT if transposed else base.weight.detach()
    x = x.detach().requires_grad_()
    torch.einsum("ebm,enm->ebn", x, weight * (1 + row)[:, :, None] * (1 + column)[:, None]).square().sum().backward()
    for value, expected in zip(got, (row.grad, column.grad, x.grad), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    assert base.weight.grad is None


def test_one_copy_of_the_weight_for_each_call(monkeypatch):
    calls = []
    original = ParamWrapper.scaled
    monkeypatch.setattr(ParamWrapper, "scaled", lambda self, *args: calls.append(self) or original(self, *args))
    logits(adapted("gpt_oss"))
    assert len(calls) == len(set(calls)) == 6  # though every expert reads its part of it


def test_bf16_is_rounded_as_merging_rounds_it(name):
    model = adapted(name, torch.bfloat16)
    out = logits(model)
    for layer in wrappers(model).values():
        weight = layer.scaled(*layer.get_offsets("default"))
        assert weight.dtype == torch.bfloat16 and torch.equal(weight, dense(layer).float().bfloat16())
    for layer in list(wrappers(model).values()):
        layer.merge()
    assert torch.equal(logits(model), out)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(name, reentrant):
    def gradients(checkpointing):
        model = adapted(name).train()
        if checkpointing:
            model.enable_input_require_grads()
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        ids = torch.arange(3, 19).view(2, 8)
        model(input_ids=ids, labels=ids).loss.backward()
        return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}

    expected, got = gradients(False), gradients(True)
    assert all(isinstance(value, torch.Tensor) for value in expected.values())
    for key in expected:
        torch.testing.assert_close(got[key], expected[key], rtol=1e-4, atol=1e-6)


def test_compile_in_one_graph():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.randn(3, 8, 4)), nn.Parameter(torch.randn(3, 4, 8))

        def forward(self, x):
            return torch.einsum("ebn,emn->ebm", torch.einsum("ebm,enm->ebn", x, self.up).relu(), self.down)

    torch.manual_seed(0)
    model = nn.Sequential(Experts())
    model = get_peft_model(model, HyperAdaptConfig(target_parameters=["up", "down"], init_weights=False))
    x = torch.randn(3, 2, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    model(x).sum().backward()
    expected = [p.grad.clone() for p in model.parameters() if p.requires_grad]
    model.zero_grad()
    compiled(x).sum().backward()
    for value, want in zip([p.grad for p in model.parameters() if p.requires_grad], expected, strict=True):
        torch.testing.assert_close(value, want)


def test_training_lowers_the_loss_and_leaves_the_base(name):
    model = get_peft_model(moe(name), config()).train()
    before = base_state(model)
    ids = torch.arange(3, 19).view(2, 8)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert_same(base_state(model), before)
    for layer in wrappers(model).values():
        assert all(s["default"].weight.abs().amax() > 1e-3 for s in (layer.hyperadapt_row, layer.hyperadapt_column))


# What is done with adapters


def test_merge_unmerge_and_unload(name):
    model = adapted(name)
    out, before = logits(model), base_state(model)
    deltas = {key: layer.get_delta_weight("default") for key, layer in wrappers(model).items()}
    expected = {key: dense(layer).float() for key, layer in wrappers(model).items()}
    weights = {key: layer.base_parameter.detach().clone() for key, layer in wrappers(model).items()}
    model.merge_adapter(safe_merge=True)
    for key, layer in wrappers(model).items():
        torch.testing.assert_close(layer.base_parameter.data, expected[key])
        torch.testing.assert_close(weights[key] + deltas[key], expected[key])
        assert torch.equal(layer.get_delta_weight("default"), deltas[key])
    torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():  # unmerges, as PEFT's layers do
        assert torch.equal(logits(model), logits(moe(name)))
    assert_same(base_state(model), before)
    assert torch.equal(logits(model), out)
    unloaded = model.merge_and_unload()
    assert type(unloaded) is type(moe(name)) and not wrappers(unloaded)
    assert unloaded.state_dict().keys() == moe(name).state_dict().keys()
    torch.testing.assert_close(logits(unloaded), out, rtol=1e-4, atol=1e-5)
    assert torch.equal(logits(adapted(name).unload()), logits(moe(name)))


def test_a_broken_expert_is_found_before_anything_is_merged():
    model = adapted()
    list(wrappers(model).values())[-1].hyperadapt_row["default"].weight.data[2, 0] = float("nan")
    before = base_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge(safe_merge=True)
        assert_same(base_state(model), before)
        assert not any(layer.merged for layer in wrappers(model).values())


def test_save_and_load_in_a_fresh_process(tmp_path):
    for name in CONFIGS:
        model = adapted(name)
        model.save_pretrained(tmp_path / name)
        moe(name).save_pretrained(tmp_path / "base" / name)
        torch.save(logits(model), tmp_path / name / "out.pt")
    code = (
        "import torch, hyperadapt_peft\n"
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM\n"
        "ids = torch.randint(3, 32, (3, 8), generator=torch.Generator().manual_seed(1))\n"
        f"for name in {list(CONFIGS)}:\n"
        "    base = AutoModelForCausalLM.from_pretrained(f'base/{name}')\n"
        "    with torch.no_grad():\n"
        "        out = PeftModel.from_pretrained(base, name).eval()(input_ids=ids).logits\n"
        "    assert torch.equal(out, torch.load(f'{name}/out.pt')), name\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_transformers_own_adapter_calls(name, tmp_path):
    model = adapted(name)
    model.save_pretrained(tmp_path)
    native = moe(name)
    native.load_adapter(str(tmp_path))
    assert torch.equal(logits(native), logits(model))
    native.add_adapter(config(init_weights=False), adapter_name="second")
    native.set_adapter("second")
    assert not torch.allclose(logits(native), logits(model))
    native.disable_adapters()
    assert torch.equal(logits(native), logits(moe(name)))


def test_several_adapters(name):
    model = adapted(name)
    first = logits(model)
    count = len(wrappers(model))
    torch.manual_seed(2)
    model.add_adapter("second", config(init_weights=False))
    assert len(wrappers(model)) == count
    model.set_adapter("second")
    second = logits(model)
    assert not torch.allclose(first, second)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    for layer in wrappers(model).values():
        weight = dense(layer, ["default", "second"]).float()
        sides = [layer.active_offset(s) for s in (layer.hyperadapt_row, layer.hyperadapt_column)]
        torch.testing.assert_close(layer.scaled(*sides).detach(), weight, rtol=1e-5, atol=1e-6)
    model.base_model.set_adapter(["second", "default"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    model.delete_adapter("default")
    assert torch.equal(logits(model), second)


def test_adapter_algebra_expert_by_expert():
    model = adapted()
    torch.manual_seed(2)
    model.add_adapter("second", config(init_weights=False, alpha=1.0))
    out = logits(model)
    model.add_weighted_adapter(["default", "second"], [1.0, 0.0], "first", "linear")
    model.add_weighted_adapter(["default", "default"], [0.5, 0.5], "mean", "linear")
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "mixed", "linear")
    for name in ("first", "mean"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(model), out, rtol=1e-4, atol=1e-5)
    # each expert has a gauge of its own: one in another gauge changes nothing
    with torch.no_grad():
        for layer in wrappers(model).values():
            row, column = layer.hyperadapt_row["second"].weight, layer.hyperadapt_column["second"].weight
            if row.dim() == 2:
                row[1], column[1] = 4 * (1 + row[1]) - 1, (1 + column[1]) / 4 - 1
    model.add_weighted_adapter(["default", "second"], [0.5, 0.5], "again", "linear")
    model.set_adapter("mixed")
    mixed = logits(model)
    model.set_adapter("again")
    torch.testing.assert_close(logits(model), mixed, rtol=1e-3, atol=1e-4)
    model.invert_adapter("default", "undo")
    model.base_model.set_adapter(["default", "undo"])
    torch.testing.assert_close(logits(model), logits(moe()), rtol=1e-3, atol=1e-4)
    model.set_adapter("default")
    model.set_scale("default", 0.0)
    assert torch.equal(logits(model), logits(moe()))


def test_a_combination_is_saved_and_loaded(tmp_path):
    model = adapted()
    model.add_weighted_adapter(["default"], [0.5], "halved", "linear")
    model.set_adapter("halved")
    model.save_pretrained(tmp_path, selected_adapters=["halved"])
    fresh = PeftModel.from_pretrained(moe(), tmp_path / "halved").eval()
    torch.testing.assert_close(logits(fresh), logits(model), rtol=1e-5, atol=1e-6)


def test_hot_swap(tmp_path):
    torch.manual_seed(5)
    other = get_peft_model(moe(), config(init_weights=False)).eval()
    other.save_pretrained(tmp_path)
    model = adapted()
    hotswap_adapter(model, tmp_path)
    assert torch.equal(logits(model), logits(other))


def test_mixed_batches_are_refused_where_experts_are_adapted():
    model = adapted()
    with pytest.raises(
        ValueError, match="does not support mixed adapter batches yet: experts see the tokens of all samples"
    ):
        logits(model, adapter_names=["default", "__base__", "default"])
    model.add_adapter("attention", config(init_weights=False, target_modules=["q_proj"], target_parameters=[]))
    mixed = logits(model, adapter_names=["attention", "__base__", "attention"])  # no experts in this batch
    torch.testing.assert_close(mixed[1], logits(moe())[1], rtol=1e-4, atol=1e-5)


def test_no_conversion_to_lora():
    assert not adapted().supports_lora_conversion()


def test_calls_from_several_threads_take_turns(name):
    """A module's parameter is replaced during a call: another thread's call saw the wrong one, or scaled it again."""
    model = adapted(name)
    batches = [torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(32)]

    def call(ids):
        with torch.no_grad():
            return model(input_ids=ids).logits

    expected = [call(ids) for ids in batches]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(call, batches))
    assert sum(not torch.equal(out, want) for out, want in zip(got, expected, strict=True)) == 0


def test_training_in_several_threads_gives_the_same_gradients():
    """With checkpointing backward calls the experts again, in autograd's own threads."""
    model = adapted().train()
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    batches = [torch.randint(3, 32, (2, 6), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    parameters = [p for p in model.parameters() if p.requires_grad]

    def gradients(ids):
        return torch.autograd.grad(model(input_ids=ids, labels=ids).loss, parameters, allow_unused=True)

    expected = [gradients(ids) for ids in batches]
    with ThreadPoolExecutor(4) as threads:
        got = list(threads.map(gradients, batches))
    for one, other in zip(got, expected, strict=True):
        for grad, want in zip(one, other, strict=True):
            assert (grad is None) == (want is None)
            assert grad is None or torch.equal(grad, want)


# Other parameters, and what is refused


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.matrix, self.stack = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(2, 4, 4))
        self.vector, self.whole = nn.Parameter(torch.randn(4)), nn.Parameter(torch.ones(4, 4).long(), False)

    def forward(self, x):
        return torch.einsum("bn,enm->bm", x @ self.matrix.T, self.stack) + self.vector


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(4, 2)
        self.top = nn.Parameter(torch.randn(2, 2))

    def forward(self, x):
        return self.head(self.block(x)) @ self.top


def test_a_matrix_and_a_stack_on_one_module():
    torch.manual_seed(0)
    base, x = Model(), torch.randn(3, 6)
    model = get_peft_model(base, HyperAdaptConfig(target_parameters=["matrix", "block.stack"], init_weights=False))
    outer = model.base_model.model.block
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("stack", "matrix")
    assert "parameter_name='stack'" in repr(outer)
    assert outer.base_layer.hyperadapt_row["default"].weight.shape == (4,)
    expected = torch.einsum("bn,enm->bm", x.double() @ dense(outer.base_layer).T, dense(outer)).float()
    expected = base.head(expected + base.block.base_layer.base_layer.vector) @ base.top
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_a_linear_layer_s_weight_as_a_parameter_is_the_layer_itself():
    def model(**kwargs):
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 3), tf.pytorch_utils.Conv1D(5, 3))
        return get_peft_model(base, HyperAdaptConfig(init_weights=False, **kwargs))

    modules, parameters = model(target_modules=["0", "1"]), model(target_parameters=["0.weight", "1.weight"])
    state = get_peft_model_state_dict(modules)
    assert state.keys() == get_peft_model_state_dict(parameters).keys()
    parameters.load_state_dict({k.replace(".weight", ".default.weight"): v for k, v in state.items()}, strict=False)
    x = torch.randn(2, 4)
    torch.testing.assert_close(parameters(x), modules(x))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"target_parameters": ["vector"]}, "only matrices, or several in one"),
        ({"target_parameters": ["whole"]}, "of floating point are, not torch.int64"),
        ({"target_parameters": ["top"]}, "on the top-level module is not supported"),
        ({"target_parameters": ["head.weight"], "target_modules": ["head"]}, "head cannot be in `target_modules` and"),
        ({"target_parameters": ["block.stack", "vector"]}, "only matrices"),
    ],
)
def test_what_cannot_be_adapted_is_refused_before_anything_changes(kwargs, message):
    model = Model()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, HyperAdaptConfig(**kwargs))
    assert not any(hasattr(module, "base_layer") for module in model.modules())


def test_a_second_adapter_needs_the_same_parameters_of_a_module():
    model = get_peft_model(Model(), HyperAdaptConfig(target_parameters=["block.matrix"], target_modules=["head"]))
    with pytest.raises(ValueError, match="must target the same set of parameters: block has adapters of matrix"):
        model.add_adapter("second", HyperAdaptConfig(target_parameters=["stack"]))
    with pytest.raises(
        ValueError, match="weight is not supported: its module is adapted already, as a hyperadapt_peft"
    ):
        model.add_adapter("second", HyperAdaptConfig(target_parameters=["head.weight"]))
    assert list(model.peft_config) == ["default"]


def test_a_parametrized_module_is_refused():
    model = Model()
    nn.utils.parametrizations.weight_norm(model.head)
    with pytest.raises(ValueError, match="head.weight is not supported: it is parametrized already"):
        get_peft_model(model, HyperAdaptConfig(target_parameters=["head.weight"]))


def test_a_lora_wrapper_is_refused():
    from peft import PeftMixedModel

    lora = LoraConfig(target_modules=[], target_parameters=["block.matrix"])
    model = PeftMixedModel(Model(), lora, "lora")
    with pytest.raises(ValueError, match="adapted already"):
        model.add_adapter("hyperadapt", HyperAdaptConfig(target_modules=[], target_parameters=["block.matrix"]))


def test_offloaded_experts_are_refused_rather_than_ignored(tmp_path):
    from accelerate import cpu_offload

    model = cpu_offload(adapted())
    with pytest.raises(NotImplementedError, match="is offloaded, and an adapter on it would not be seen"):
        logits(model)


@pytest.mark.parametrize("value", ["w1", [1], 3])
def test_target_parameters_is_a_list_of_names(value):
    with pytest.raises(TypeError, match=r"`target_parameters` must be list\[str\] or None, not"):
        HyperAdaptConfig(target_parameters=value)
