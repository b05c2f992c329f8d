"""A batch in which every sample names its adapter equals each sample run alone with it."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ...tiny import build
from .test_layer import LAYERS, Wrapper


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


def test_training_and_merged_models_are_refused():
    model = adapters(Wrapper(nn.Linear(4, 4)), HyperAdaptConfig, target_modules=["layer"])
    x = torch.randn(1, 4)
    with pytest.raises(ValueError, match="training mode"):
        model.train()(x=x, adapter_names=["default"])
    model.eval().merge_adapter()
    with pytest.raises(ValueError, match="merged adapters"):
        model(x=x, adapter_names=["default"])
