"""Quantized base models, for real, on the CPU: bitsandbytes in 8 and 4 bit and torchao's int8 weights."""

import warnings
from dataclasses import replace

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, TorchAoConfig
from transformers.integrations.finegrained_fp8 import FP8Linear

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.tuners.common import TargetLayer


bitsandbytes = pytest.importorskip("bitsandbytes")
torchao_quantization = pytest.importorskip("torchao.quantization")

LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
QUANTIZATIONS = {
    "bnb-8bit": lambda: BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0),
    "bnb-4bit": lambda: BitsAndBytesConfig(load_in_4bit=True),
    "bnb-nf4-nested": lambda: BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True
    ),
    "torchao-int8": lambda: TorchAoConfig(torchao_quantization.Int8WeightOnlyConfig(version=2)),
}
CONFIGS = {
    "hyperadapt": lambda **kwargs: HyperAdaptConfig(task_type="CAUSAL_LM", **kwargs),
    "surm": lambda **kwargs: SurmConfig(task_type="CAUSAL_LM", target_modules="all-linear", **kwargs),
}
# How far outputs move, relative to their size, when the merged weights are quantized again.
AGAIN = {"bnb-8bit": 0.05, "bnb-4bit": 0.4, "bnb-nf4-nested": 0.3, "torchao-int8": 0.05}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=64, num_key_value_heads=2, initializer_range=0.1))
    model.save_pretrained(path)
    return path


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request):
    return request.param


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@pytest.fixture
def batch():
    ids = torch.randint(3, 64, (6, 9), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone()}


def load(path, quantization):
    return LlamaForCausalLM.from_pretrained(
        path, quantization_config=QUANTIZATIONS[quantization](), dtype=torch.float32, device_map="cpu"
    ).eval()


def adapted(path, quantization, config):
    torch.manual_seed(2)
    model = get_peft_model(load(path, quantization), config(init_weights=False))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.mul_(0.2)
    return model.eval()


def logits(model, batch, **kwargs):
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], **kwargs).logits


def layers(model):
    return {key: module for key, module in model.named_modules() if isinstance(module, TargetLayer)}


def base_state(model):
    """Everything that makes up the quantized layers, as plain values and copies of tensors."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            value = value.dequantize() if hasattr(value, "qdata") else value.data.as_subclass(torch.Tensor)
            return value.clone()
        if isinstance(value, (str, int, float, bool, torch.dtype, torch.Size, type(None))):
            return value
        if isinstance(value, nn.Module):
            return type(value)
        return {k: plain(v) for k, v in vars(value).items()} if hasattr(value, "__dict__") else type(value)

    state = {}
    for key, layer in layers(model).items():
        base = layer.get_base_layer()
        state[key] = {name: plain(value) for name, value in vars(base).items() if not isinstance(value, dict)}
        state[key]["weight"] = plain(base.weight)
        state[key]["weight_attributes"] = {name: plain(value) for name, value in vars(base.weight).items()}
    return state


def assert_same(state, other, where=""):
    assert type(state) is type(other), where
    if isinstance(state, dict):
        assert state.keys() == other.keys(), where
        for key in state:
            assert_same(state[key], other[key], f"{where}.{key}")
    elif isinstance(state, torch.Tensor):
        assert torch.equal(state, other), where
    else:
        assert state == other, where


def quantized(weight, quantization):
    """The values that a weight has when it is quantized once, by the libraries' own functions."""
    functional = bitsandbytes.functional
    if quantization == "bnb-8bit":
        return functional.int8_vectorwise_dequant(*functional.int8_vectorwise_quant(weight.half())[:2])
    if quantization == "torchao-int8":
        linear = nn.Linear(*weight.T.shape, bias=False)
        linear.weight.data = weight
        torchao_quantization.quantize_(linear, torchao_quantization.Int8WeightOnlyConfig(version=2))
        return linear.weight.dequantize()
    nested = quantization == "bnb-nf4-nested"
    options = {"quant_type": "nf4" if nested else "fp4", "compress_statistics": nested, "blocksize": 64}
    return functional.dequantize_4bit(*functional.quantize_4bit(weight, **options))


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def test_train_save_load(path, quantization, config, batch, tmp_path):
    base = load(path, quantization)
    before = logits(base, batch)
    model = get_peft_model(base, config()).train()
    assert {key.split(".")[-1] for key in layers(model)} == LINEAR
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.02
    model.eval()
    trained = logits(model, batch)
    with model.disable_adapter():
        assert torch.equal(logits(model, batch), before)  # the base has not changed
    model.save_pretrained(tmp_path)
    fresh = PeftModel.from_pretrained(load(path, quantization), tmp_path).eval()
    assert torch.equal(logits(fresh, batch), trained)
    with (
        model.disable_adapter()
    ):  # nor has saving changed it, as bitsandbytes' own does where it has packed a 4-bit weight
        assert torch.equal(logits(model, batch), before)


def test_merge_is_the_formula_and_unmerge_exact(path, quantization, config, batch):
    model = adapted(path, quantization, config)
    out, before = logits(model, batch), base_state(model)
    expected = {
        key: layer.adapted_weight(layer.get_base_weight(), ["default"]) for key, layer in layers(model).items()
    }
    deltas = {key: layer.get_delta_weight("default") for key, layer in layers(model).items()}
    for key, layer in layers(model).items():
        torch.testing.assert_close(layer.get_base_weight() + deltas[key], expected[key].to(deltas[key].dtype))
    model.merge_adapter()
    for key, layer in layers(model).items():
        torch.testing.assert_close(layer.get_base_weight(), quantized(expected[key], quantization))
        assert torch.equal(layer.get_delta_weight("default"), deltas[key])  # of the unmerged weight
    assert relative(logits(model, batch), out) < AGAIN[quantization]
    model.unmerge_adapter()
    assert_same(base_state(model), before)
    assert torch.equal(logits(model, batch), out)


def test_merging_before_any_forward_pass_is_the_same(path, quantization, config, batch):
    model, other = (adapted(path, quantization, config) for _ in range(2))
    logits(model, batch)
    pairs = list(zip(layers(model).values(), layers(other).values(), strict=True))
    # what bitsandbytes itself rounds in that pass: 4-bit block scales, on CPUs with AVX512-BF16
    rounded = [relative(layer.get_base_weight(), twin.get_base_weight()) for layer, twin in pairs]
    assert max(rounded) < 2**-8
    for m in (model, other):
        m.merge_adapter()
    for (layer, twin), error in zip(pairs, rounded, strict=True):
        assert relative(layer.get_base_weight(), twin.get_base_weight()) <= (0.05 if error else 0.0)
    other.unmerge_adapter()
    model.unmerge_adapter()
    assert torch.equal(logits(model, batch), logits(other, batch))


def test_several_adapters(path, quantization, config, batch):
    model = adapted(path, quantization, config)
    first, before = logits(model, batch), base_state(model)
    model.add_adapter("second", config(init_weights=False))
    model.set_adapter("second")
    second = logits(model, batch)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model, batch)
    model.merge_adapter()
    merged = logits(model, batch)
    model.unmerge_adapter()
    model.merge_adapter(["default"])
    model.merge_adapter(["second"])  # from the unmerged weight: no step is rounded twice
    assert torch.equal(logits(model, batch), merged)
    model.unmerge_adapter()
    assert_same(base_state(model), before)
    assert torch.equal(logits(model, batch), both)
    for name, out in (("default", first), ("second", second)):
        model.set_adapter(name)
        assert torch.equal(logits(model, batch), out)


def test_safe_merge_of_a_broken_adapter_changes_nothing(path, quantization, config, batch):
    model = adapted(path, quantization, config)
    last = list(layers(model).values())[-1]
    next(p for p in last.parameters() if p.requires_grad).data.view(-1)[0] = float("nan")
    before = base_state(model)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="The adapter default seems to be broken"):
            merge(safe_merge=True)
        assert_same(base_state(model), before)
        assert not any(layer.merged for layer in layers(model).values())


def test_merge_and_unload(path, quantization, config, batch):
    model = adapted(path, quantization, config)
    model.merge_adapter()
    merged = logits(model, batch)
    model.unmerge_adapter()
    unloaded = model.merge_and_unload(safe_merge=True)
    assert not [module for module in unloaded.modules() if isinstance(module, BaseTunerLayer)]
    assert torch.equal(logits(unloaded, batch), merged)


def test_mixed_batches_equal_each_sample_alone(path, quantization, config, batch):
    model = adapted(path, quantization, config)
    model.add_adapter("second", config(init_weights=False))
    names = ["default", "__base__", "second", "second", "default", "__base__"]
    mixed = logits(model, batch, adapter_names=names)
    for i, name in enumerate(names):
        alone = {"input_ids": batch["input_ids"][i : i + 1]}
        model.set_adapter("default" if name == "__base__" else name)
        if name == "__base__":
            with model.disable_adapter():
                expected = logits(model, alone)
        else:
            expected = logits(model, alone)
        torch.testing.assert_close(mixed[i : i + 1], expected, rtol=1e-6, atol=1e-6 * expected.abs().max().item())


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS)
def test_4_bit_weights_that_a_forward_pass_has_packed(config, nested, quant_type, storage):
    """What bitsandbytes' `Linear4bit.forward` does in eval mode on CPUs with AVX512-BF16, done here on any CPU."""
    torch.manual_seed(0)
    linear = bitsandbytes.nn.Linear4bit(
        128, 96, compute_dtype=torch.float32, quant_type=quant_type, compress_statistics=nested, quant_storage=storage
    ).to("cpu")
    targets = {"target_modules": ["0"], "init_weights": False}
    config = HyperAdaptConfig(**targets) if config == "hyperadapt" else SurmConfig(**targets)
    model = get_peft_model(nn.Sequential(linear), config)
    layer = model.base_model.model[0]
    weight, delta = layer.get_base_weight(), layer.get_delta_weight("default")
    model.merge_adapter()
    merged = layer.get_base_weight()
    model.unmerge_adapter()

    functional = bitsandbytes.functional
    linear.weight.data, linear.weight.quant_state = functional._convert_weight_packed_for_cpu(
        linear.weight.data, linear.weight.quant_state
    )
    wrong = functional.dequantize_4bit(linear.weight.data, linear.weight.quant_state).float()
    assert relative(wrong, weight) > 0.5  # what PEFT's backend would merge into; if not, this is not needed any more
    before = base_state(model)
    assert relative(layer.get_base_weight(), weight) < 2**-8  # packing rounds the block scales to bf16
    assert relative(layer.get_delta_weight("default"), delta) < 2**-7
    assert layer.get_base_weight().dtype == weight.dtype
    model.merge_adapter(safe_merge=True)
    assert relative(layer.get_base_weight(), merged) < 0.05
    assert relative(layer.get_delta_weight("default"), delta) < 2**-7
    model.unmerge_adapter()
    assert_same(base_state(model), before)


def test_restored_4_bit_weights_are_known_to_be_quantized(batch):
    """PEFT's backend marks the weight it replaces as unquantized: moving it would quantize its bytes again."""
    linear = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32).to("cpu")
    x = torch.randn(2, 64)
    model = get_peft_model(nn.Sequential(linear), HyperAdaptConfig(target_modules=["0"], init_weights=False))
    out = model(x)
    model.merge_adapter()
    model.unmerge_adapter()
    model.to("cpu")
    assert torch.equal(model(x), out)


def test_layers_quantized_without_transformers():
    torch.manual_seed(0)
    x = torch.randn(3, 64)
    for linear in (
        bitsandbytes.nn.Linear8bitLt(64, 32, has_fp16_weights=False, threshold=0.0).to("cpu"),
        bitsandbytes.nn.Linear4bit(64, 32, compute_dtype=torch.float32).to("cpu"),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            base = linear(x)
            model = get_peft_model(nn.Sequential(linear), HyperAdaptConfig(target_modules=["0"]))
            assert torch.equal(model(x), base)


def pack(model):
    """Do to all 4-bit weights what bitsandbytes does in a forward pass in eval mode on CPUs with AVX512-BF16."""
    packed = 0
    for module in model.modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = module.weight
            if not getattr(weight.quant_state, "packing_format_for_cpu", False):
                weight.data, weight.quant_state = bitsandbytes.functional._convert_weight_packed_for_cpu(
                    weight.data, weight.quant_state
                )
            packed += 1
    return packed


def gradients(model, batch):
    model.zero_grad()
    model(**batch).loss.backward()
    return {key: p.grad for key, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-nf4-nested"])
def test_gradients_after_an_evaluation(path, quantization, config, batch, training):
    """Packed weights have no backward: gradients through them were wrong by more than their size, without an error."""
    expected = gradients(adapted(path, quantization, config).train(training), batch)
    model = adapted(path, quantization, config)
    out = logits(model, batch)
    assert pack(model) == len(layers(model))
    got = gradients(model.train(training), batch)
    assert got.keys() == expected.keys()
    for key in expected:  # packing rounds the block scales to bf16
        assert relative(got[key], expected[key]) < 0.02, key
    assert relative(logits(model.eval(), batch), out) < 0.02


def test_gradients_through_other_layers_after_an_evaluation(path, config, batch):
    def model():
        return adapted(path, "bnb-4bit", lambda **kwargs: replace(config(**kwargs), target_modules=["q_proj"]))

    expected, evaluated = gradients(model().train(), batch), model()
    logits(evaluated, batch)
    pack(evaluated)
    for key, grad in gradients(evaluated.train(), batch).items():
        assert relative(grad, expected[key]) < 0.02, key


@pytest.mark.parametrize("quantization", ["bnb-4bit", "bnb-nf4-nested"])
def test_saving_after_an_evaluation_leaves_the_base(path, quantization, config, batch, tmp_path):
    """bitsandbytes' own unpacking, in `state_dict`, leaves the block scales in another order."""
    model = adapted(path, quantization, config)
    logits(model, batch)
    pack(model)
    before = {key: layer.get_base_weight() for key, layer in layers(model).items()}
    model.save_pretrained(tmp_path)
    for key, layer in layers(model).items():
        assert torch.equal(layer.get_base_weight(), before[key])


def quantized_by_torchao(path, config):
    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    torchao_quantization.quantize_(model, config, lambda module, name: name.endswith("_proj"))
    return model


def test_layers_quantized_by_torchao_itself(path, config, batch, tmp_path):
    def base():
        return quantized_by_torchao(path, torchao_quantization.Int8WeightOnlyConfig(version=2))

    torch.manual_seed(2)
    model = get_peft_model(base(), config())
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    losses = []
    for _ in range(4):
        assert all(grad is not None for grad in gradients(model, batch).values())
        optimizer.step()
        losses.append(model(**batch).loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path)
    out = logits(model.eval(), batch)
    loaded = PeftModel.from_pretrained(base(), tmp_path).eval()
    assert torch.equal(logits(loaded, batch), out)
    for merge in (loaded.merge_adapter, loaded.merge_and_unload):
        with pytest.raises(
            ValueError, match="Cannot merge into a Linear: its torchao weight cannot be quantized again"
        ):
            merge()
        assert torch.equal(logits(loaded, batch), out)


def test_training_behind_a_layer_without_gradients_is_refused(path, config, batch, tmp_path):
    """torchao's kernels for int8 activations end the graph: columns, and all in front, were not trained, in silence."""
    base = torchao_quantization.Int8DynamicActivationInt8WeightConfig(version=2)
    model = get_peft_model(quantized_by_torchao(path, base), config(init_weights=False))
    model.enable_input_require_grads()
    with pytest.raises(RuntimeError, match="A Linear whose weight is a Int8Tensor gives its input no gradient"):
        model(**batch)
    out = logits(model.eval(), batch)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized_by_torchao(path, base), tmp_path).eval()
    assert torch.equal(loaded(input_ids=batch["input_ids"]).logits, out)  # nothing is trained here


class QLinear(nn.Linear):
    """Stands for quanto's: a linear layer with a forward and a kind of tensor of its own."""

    __module__ = "optimum.quanto.nn.qlinear"

    def forward(self, x):
        return nn.functional.linear(x, self.weight.as_subclass(torch.Tensor).round(decimals=1), self.bias)


class QTensor(torch.Tensor):
    pass


def test_quanto_s_layers_are_adapted_and_not_merged_into(config):
    torch.manual_seed(0)
    base, x = nn.Sequential(QLinear(8, 8), nn.Linear(8, 8)), torch.randn(3, 8)
    base[0].weight = nn.Parameter(base[0].weight.data.as_subclass(QTensor), requires_grad=False)
    expected = base(x)
    model = get_peft_model(base, replace(config(), task_type=None, target_modules=["0", "1"]))
    assert torch.equal(model(x), expected)
    with pytest.raises(ValueError, match="Cannot merge into a QLinear: its weight is a QTensor"):
        model.merge_adapter()
    assert not any(layer.merged for layer in layers(model).values())


def test_fp8_weights_with_scales_beside_them_are_not_merged_into(config):
    """They are ordinary parameters, to which a merge would add an update without their scales."""
    layer = FP8Linear(128, 128, block_size=(128, 128))
    layer.weight.data = torch.randn(128, 128).to(torch.float8_e4m3fn)
    model = get_peft_model(nn.Sequential(layer), replace(config(), task_type=None, target_modules=["0"]))
    before = layer.weight.data.float()
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="its weight is torch.float8_e4m3fn, with scales beside it"):
            merge()
        assert torch.equal(layer.weight.data.float(), before)
