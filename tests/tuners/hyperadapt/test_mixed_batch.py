"""A batch in which every sample names its adapter equals each sample run alone with it."""

import random

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.hotswap import hotswap_adapter
from hyperadapt_peft.tuners.hyperadapt import HyperAdaptLayer

from ...tiny import SIZES, Wrapper, build
from .test_layer import LAYERS


NAMES = ["second", "__base__", "default", "third", "second"]


def adapters(model, config, names=("second", "third"), **kwargs):
    torch.manual_seed(0)
    model = get_peft_model(model, config(init_weights=False, **kwargs))
    for name in names:
        model.add_adapter(name, config(init_weights=False, **kwargs))
    return model.eval()


def alone(model, name, run):
    if name == "__base__":
        with model.disable_adapter():
            return run(model)
    model.set_adapter(name)
    return run(model)


def assert_each_equals_its_own(model, names, inputs, run):
    """`run(model, inputs, **kwargs)` returns a tensor with one row per sample."""
    mixed = run(model, inputs, adapter_names=names)
    model.set_adapter("third")  # what is active must not matter
    for i, name in enumerate(names):
        sample = {key: value[i : i + 1] for key, value in inputs.items()}
        expected = alone(model, name, lambda m, sample=sample: run(m, sample))
        rows = mixed[i * len(expected) : (i + 1) * len(expected)]
        if rows.is_floating_point():
            torch.testing.assert_close(rows, expected, rtol=1e-6, atol=1e-6)
        else:
            width = min(rows.shape[1], expected.shape[1])  # a batch pads its rows to the longest
            assert torch.equal(rows[:, :width], expected[:, :width])


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in LAYERS if "unbatched" not in name])
@pytest.mark.parametrize("sides", ["both", "row", "column"])
def test_every_layer_kind(name, sides):
    torch.manual_seed(0)
    layer, x = LAYERS[name]()
    x = torch.randint(0, 11, (5, 4)) if name == "embedding" else torch.randn(5, *x.shape[1:])
    model = adapters(Wrapper(layer), HyperAdaptConfig, target_modules=["layer"], sides=sides)
    assert_each_equals_its_own(model, NAMES, {"x": x}, lambda m, inputs, **kw: m(**inputs, **kw))


@torch.no_grad()
@pytest.mark.parametrize("config", [HyperAdaptConfig, SurmConfig])
@pytest.mark.parametrize("architecture", ["llama", "t5", "gpt2"])
@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 4}, {"num_beams": 4, "num_return_sequences": 2}],
    ids=["greedy", "4-beams", "2-of-4-beams"],
)
def test_generation_with_left_padding_and_cache(config, architecture, options):
    model, _, task_type = build(architecture)
    model = adapters(model, config, task_type=task_type)
    for name, p in model.named_parameters():
        if ".hyperadapt_" in name or ".surm_" in name:
            p.data *= 3  # so that the adapters differ in the tokens they choose
    ids = torch.randint(3, 64, (5, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :3] = mask[3, :2] = 0
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **options}

    def run(m, inputs, **kwargs):
        return m.generate(**inputs, **options, **kwargs)

    assert_each_equals_its_own(model, NAMES, {"input_ids": ids, "attention_mask": mask}, run)


@torch.no_grad()
def test_sampled_return_sequences_use_the_sample_s_adapter():
    model, *_ = build("llama")
    model = adapters(model, HyperAdaptConfig, task_type="CAUSAL_LM")
    ids = torch.randint(3, 64, (2, 5))
    options = {"do_sample": True, "top_k": 1, "num_return_sequences": 3, "max_new_tokens": 4, "pad_token_id": 0}
    out = model.generate(input_ids=ids, adapter_names=["default", "third"], **options)
    for i, name in enumerate(["default", "third"]):
        model.set_adapter(name)
        own = model.generate(input_ids=ids[i : i + 1], **options)
        assert torch.equal(out[3 * i : 3 * i + 3], own)


@torch.no_grad()
def test_modules_to_save_follow_the_sample():
    model, batch, task_type = build("bert")
    model = adapters(model, HyperAdaptConfig, task_type=task_type)
    for name, p in model.named_parameters():
        if "modules_to_save" in name:
            p.data = torch.randn_like(p)
    inputs = {"input_ids": batch["input_ids"][:5]}
    names = ["second", "default", "default", "third", "second"]
    assert_each_equals_its_own(model, names, inputs, lambda m, inputs, **kw: m(**inputs, **kw).logits)


@torch.no_grad()
def test_one_base_call_however_many_adapters():
    calls = []
    layer = nn.Linear(4, 4)
    layer.register_forward_hook(lambda *_: calls.append(1))
    model = adapters(Wrapper(layer), HyperAdaptConfig, target_modules=["layer"])
    model(x=torch.randn(5, 4), adapter_names=NAMES)
    assert len(calls) == 1


def test_the_strength_holds_in_a_mixed_batch():
    model = adapters(Wrapper(nn.Linear(4, 4)), HyperAdaptConfig, target_modules=["layer"])
    model.set_scale("second", 0.0)
    x = torch.randn(2, 4)
    with torch.no_grad():
        y = model(x=x, adapter_names=["second", "__base__"])
        with model.disable_adapter():
            torch.testing.assert_close(y, model(x=x))


@pytest.mark.parametrize(
    "names, message",
    [
        (["default"], "Length of `adapter_names` should be the same as the number of inputs"),
        (["default", "nobody"], "non-existing adapter.*nobody"),
        ("default", "expected a list of str"),
    ],
)
def test_wrong_names_are_refused(names, message):
    model = adapters(Wrapper(nn.Linear(4, 4)), HyperAdaptConfig, target_modules=["layer"])
    with pytest.raises((TypeError, ValueError), match=message):
        model(x=torch.randn(2, 4), adapter_names=names)
    assert not model.base_model.model.layer._forward_pre_hooks  # nothing stays behind


def test_merged_models_are_refused():
    model = adapters(Wrapper(nn.Linear(4, 4)), HyperAdaptConfig, target_modules=["layer"])
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x=torch.randn(1, 4), adapter_names=["default"])


# Models that flatten their tokens


def qwen3_next():
    config = transformers.Qwen3NextConfig(
        **SIZES, num_key_value_heads=2, head_dim=8, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        num_experts=4, num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    return transformers.Qwen3NextForCausalLM(config)


@pytest.mark.parametrize("config", [HyperAdaptConfig, SurmConfig])
@pytest.mark.parametrize(
    "model_of, targets",
    [
        (lambda: build("opt")[0], ["fc1", "fc2", "q_proj"]),
        (qwen3_next, ["shared_expert.up_proj", "shared_expert.down_proj", "shared_expert_gate"]),
    ],
    ids=["opt", "qwen3-next"],
)
@pytest.mark.parametrize("samples, tokens", [(5, 3), (5, 5), (5, 1)])
@torch.no_grad()
def test_flattened_tokens_follow_their_sample(config, model_of, targets, samples, tokens):
    torch.manual_seed(0)
    model = adapters(model_of(), config, target_modules=targets)
    ids = torch.randint(3, 64, (samples, tokens))
    assert_each_equals_its_own(model, NAMES, {"input_ids": ids}, lambda m, inputs, **kw: m(**inputs, **kw).logits)


@torch.no_grad()
def test_flattened_tokens_in_beam_search():
    model = adapters(build("opt")[0], HyperAdaptConfig, target_modules=["fc1", "fc2"])
    options = {"num_beams": 3, "max_new_tokens": 4, "min_new_tokens": 4, "pad_token_id": 0}
    ids = torch.randint(3, 64, (2, 3))  # as many tokens as beams
    out = model.generate(input_ids=ids, adapter_names=["default", "third"], **options)
    for i, name in enumerate(["default", "third"]):
        model.set_adapter(name)
        assert torch.equal(out[i : i + 1], model.generate(input_ids=ids[i : i + 1], **options))


@torch.no_grad()
def test_experts_that_see_tokens_in_their_own_order_are_refused():
    config = transformers.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=16, num_layers=2, num_sparse_encoder_layers=1, num_decoder_layers=1,
        num_sparse_decoder_layers=0, num_heads=4, num_experts=2, vocab_size=64,
    )  # fmt: skip
    encoder = transformers.SwitchTransformersEncoderModel(config)
    model = adapters(encoder, HyperAdaptConfig, names=["second"], target_modules=["wi"])
    assert any(".experts." in key for key, m in model.named_modules() if isinstance(m, HyperAdaptLayer))
    inputs = {"input_ids": torch.randint(3, 64, (2, 1))}  # one token each: as many rows as names
    with pytest.raises(ValueError, match="order of their own.*second"):
        model(**inputs, adapter_names=["__base__", "second"])
    model.add_adapter("attention", HyperAdaptConfig(init_weights=False, target_modules=["q"]))
    mixed = model(**inputs, adapter_names=["__base__", "attention"]).last_hidden_state
    for i, name in enumerate(["__base__", "attention"]):
        own = alone(model, name, lambda m, i=i: m(input_ids=inputs["input_ids"][i : i + 1]).last_hidden_state)
        torch.testing.assert_close(mixed[i : i + 1], own, rtol=1e-5, atol=1e-5)


# Nothing that could be outdated is kept, and nothing waits for the device


def test_every_change_of_an_adapter_is_seen(tmp_path):
    config = HyperAdaptConfig(target_modules=["layer"], init_weights=False)
    model = adapters(Wrapper(nn.Linear(4, 3)), HyperAdaptConfig, target_modules=["layer"])
    model.save_pretrained(tmp_path)
    layer, x = model.base_model.model.layer, torch.randn(5, 4)
    weight = lambda: layer.hyperadapt_row["second"].weight

    def compare():
        with torch.no_grad():
            mixed = model(x=x, adapter_names=NAMES)
            expected = [alone(model, name, lambda m, i=i: m(x=x[i : i + 1])) for i, name in enumerate(NAMES)]
        torch.testing.assert_close(mixed, torch.cat(expected), rtol=1e-5, atol=1e-5)
        return mixed

    def step():
        model.set_adapter("second")
        optimizer = torch.optim.SGD(layer.hyperadapt_row["second"].parameters(), lr=0.5)
        model(x=x).sum().backward()
        optimizer.step()

    def again():
        model.delete_adapter("second")
        model.add_adapter("second", config)

    def load():
        model.delete_adapter("second")
        model.load_adapter(tmp_path / "third", "second")

    changes = [
        step,
        again,
        load,
        lambda: hotswap_adapter(model, tmp_path / "second", "second"),
        lambda: model.set_scale("second", 0.5),
        lambda: layer.set_scale("second", -1.0),
        lambda: weight().data.copy_(torch.randn(3)),
        lambda: weight().data.mul_(2),
        lambda: setattr(weight(), "data", torch.randn(3)),
        lambda: nn.init.normal_(weight()),
        lambda: model.load_state_dict({k: v + 1 for k, v in model.state_dict().items()}, assign=True),
        lambda: layer.hyperadapt_row["second"].register_parameter("weight", nn.Parameter(torch.randn(3))),
        lambda: model.double(),
    ]
    seen = compare()
    random.Random(0).shuffle(changes)
    for change in changes:
        change()
        x = x.to(weight().dtype)
        now = compare()
        assert not torch.equal(now[0], seen[0].to(now.dtype)), change
        seen = now


@torch.no_grad()
@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="this torch knows no autocast of the meta device",
)
def test_a_mixed_forward_does_not_wait_for_the_device():
    class Copies(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if func is torch.ops.aten._to_copy.default and args[0].device != torch.device("meta"):
                Copies.count += 1
                assert kwargs["non_blocking"]
            return func(*args, **kwargs)

    model = adapters(build("llama")[0], HyperAdaptConfig, task_type="CAUSAL_LM").to("meta")  # it has no values to read
    ids = torch.zeros(5, 4, dtype=torch.long, device="meta")
    for names, copies in ((NAMES, 1), (["second"] * 5, 0)):
        Copies.count = 0
        with Copies():
            assert model(input_ids=ids, adapter_names=names).logits.shape == (5, 4, 64)
        assert Copies.count == copies
