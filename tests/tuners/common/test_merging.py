"""Merging: all layers or none, exact to undo whoever else merges, and only where the merged model is the adapted one."""

import gc
import itertools
import pickle
from collections import OrderedDict

import pytest
import torch
from peft import LoKrConfig, LoraConfig, PeftMixedModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from transformers import Wav2Vec2Config, Wav2Vec2Model, Zamba2Config, Zamba2ForCausalLM

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.tuners.common import TargetLayer
from hyperadapt_peft.tuners.common.base_weight import SavedWeight


METHODS = {
    "hyperadapt": lambda **kwargs: HyperAdaptConfig(init_weights=False, **kwargs),
    "surm": lambda **kwargs: SurmConfig(init_weights=False, **kwargs),
    "lora": lambda **kwargs: LoraConfig(init_lora_weights=False, **kwargs),
    "lokr": lambda **kwargs: LoKrConfig(init_weights=False, **kwargs),
}
OURS = ("hyperadapt", "surm")
MERGES = ("merge_adapter", "merge_and_unload")


class Tied(nn.Module):
    """An embedding and a head of one weight, and two linear layers of one."""

    def __init__(self):
        super().__init__()
        self.embed, self.q, self.k = nn.Embedding(9, 6), nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 9, bias=False)
        self.k.weight, self.head.weight = self.q.weight, self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(self.q(x) + self.k(x))


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(OrderedDict(first=nn.Linear(6, 6), act=nn.ReLU(), last=nn.Linear(6, 6)))


def mixed(model, *methods, **targets):
    torch.manual_seed(1)
    model = PeftMixedModel(model, METHODS[methods[0]](**targets), methods[0])
    for method in methods[1:]:
        model.add_adapter(method, METHODS[method](**targets))
    model.set_adapter(list(methods))
    return model.eval()


def layers(model):
    return {key: module for key, module in model.named_modules() if isinstance(module, TargetLayer)}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def assert_same(model, before):
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key in before:
        assert torch.equal(after[key], before[key]), key


# Others merge into the same weight


@pytest.mark.parametrize(
    "inner, outer", [pair for pair in itertools.permutations(METHODS, 2) if set(pair) & set(OURS)]
)
def test_two_methods_on_one_layer(inner, outer):
    """PEFT merges the outer layer first, and then the inner one of ours took the outer's update for part of its weight."""
    model, x = mixed(mlp(), inner, outer, target_modules=["first", "last"]), torch.randn(3, 6)
    before, out = state(model), model(x)
    for _ in range(3):
        model.base_model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)
        model.base_model.unmerge_adapter()
    after = state(model)
    for key, value in before.items():
        if {inner, outer} == set(OURS):
            assert torch.equal(after[key], value), key
        torch.testing.assert_close(after[key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:All adapters are already merged:UserWarning")
@pytest.mark.parametrize("methods", list(itertools.permutations(["hyperadapt", "lora", "lokr"])))
def test_three_methods_on_one_layer(methods):
    model, x = mixed(mlp(), *methods, target_modules=["first"]), torch.randn(3, 6)
    weight, out = mlp().first.weight.data, model(x)
    model.base_model.merge_adapter()
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(model.base_model.model.first.get_base_layer().weight.data, weight, rtol=0, atol=1e-6)
    torch.testing.assert_close(model.merge_and_unload()(x), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("shape, stride", [((3, 3), (3, 1)), ((4, 6), (1, 4)), ((5, 5), (7, 1)), ((1, 1), (1, 1))])
def test_weights_of_any_size_and_layout(method, shape, stride):
    """What is written is compared in words of 64 bits, which need not fit the weight."""
    memory = torch.randn(64)
    linear = nn.Linear(shape[1], shape[0])
    linear.weight = nn.Parameter(memory[1:].as_strided(shape, stride, 1))
    model = get_peft_model(nn.Sequential(OrderedDict(first=linear)), METHODS[method](target_modules=["first"]))
    x, before = torch.randn(2, shape[1]), memory.clone()
    out = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), out, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(memory, before)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("merges, unmerges", list(itertools.product(itertools.permutations("qk"), repeat=2)))
def test_one_copy_of_a_shared_weight(method, merges, unmerges):
    """Layers can be merged one by one; each had a copy of its own, the second one's of what the first had merged."""
    torch.manual_seed(0)
    model = get_peft_model(Tied(), METHODS[method](target_modules=["q", "k"]))
    found, before = layers(model.base_model.model), state(model)
    for key in merges:
        found[key].merge()
    deltas = [found[key].get_delta_weight("default") for key in merges]
    assert not torch.equal(deltas[0], deltas[1])
    for key in unmerges:
        found[key].unmerge()
    assert_same(model, before)


@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("order", list(itertools.permutations(["merge q", "merge k", "unmerge q", "unmerge k"])))
def test_a_lora_merged_into_the_same_weight_meanwhile(method, order):
    if any(order.index(f"merge {key}") > order.index(f"unmerge {key}") for key in "qk"):
        return
    torch.manual_seed(0)
    model = PeftMixedModel(Tied(), METHODS[method](target_modules=["q"]), "ours")
    model.add_adapter("lora", LoraConfig(target_modules=["k"], init_lora_weights=False))
    model.set_adapter(["ours", "lora"])
    base = model.base_model.model
    weight = base.q.base_layer.weight.detach().clone()
    for step in order:
        call, key = step.split()
        getattr(getattr(base, key), call)()
    torch.testing.assert_close(base.q.base_layer.weight.data, weight, rtol=0, atol=1e-6)
    assert base.q.base_layer.weight is base.k.base_layer.weight


@pytest.mark.parametrize("method", OURS)
def test_another_adapter_merged_after_a_lora_leaves_the_lora(method):
    model = mixed(mlp(), method, "lora", target_modules=["first"])
    model.base_model.model.first.base_layer.update_layer("second", METHODS[method](target_modules=["first"]))
    model.base_model.merge_adapter()
    lora = model.base_model.model.first.get_delta_weight("lora")
    inner = model.base_model.model.first.base_layer
    inner.merge(adapter_names=["second"])
    expected = inner.adapted_weight(mlp().first.weight.data, [method, "second"]) + lora
    torch.testing.assert_close(inner.base_layer.weight.data, expected, rtol=1e-5, atol=1e-5)
    model.base_model.unmerge_adapter()
    torch.testing.assert_close(inner.base_layer.weight.data, mlp().first.weight.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", OURS)
def test_what_is_trained_into_a_merged_weight_stays(method):
    model = get_peft_model(mlp(), METHODS[method](target_modules=["first"]))
    model.merge_adapter()
    model.base_model.model.first.base_layer.weight.data += 0.5
    model.unmerge_adapter()
    weight = model.base_model.model.first.base_layer.weight.data
    torch.testing.assert_close(weight, mlp().first.weight.data + 0.5, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", OURS)
def test_a_pickled_merged_model_unmerges_exactly(method):
    model = get_peft_model(mlp(), METHODS[method](target_modules=["first", "last"]))
    before = state(model)
    model.merge_adapter()
    model = pickle.loads(pickle.dumps(model))
    model.unmerge_adapter()
    assert_same(model, before)


@pytest.mark.parametrize("method", OURS)
def test_merge_and_unload_holds_one_saved_weight_at_a_time(method, monkeypatch):
    model = nn.Sequential(*(nn.Linear(6, 6) for _ in range(5)))
    model = get_peft_model(model, METHODS[method](target_modules=list("01234")))
    alive = []
    init = SavedWeight.__init__

    def counting_init(self, weight):
        init(self, weight)
        alive.append(sum(type(thing) is SavedWeight for thing in gc.get_objects()))

    monkeypatch.setattr(SavedWeight, "__init__", counting_init)
    gc.disable()  # nothing may wait for the collector
    try:
        model = model.merge_and_unload()
    finally:
        gc.enable()
    assert len(alive) == 5 and max(alive) <= 2
    assert not any(type(thing) is SavedWeight for thing in gc.get_objects())


# Merged models that would not be the adapted ones


@pytest.mark.parametrize("merge", MERGES)
@pytest.mark.parametrize(
    "targets, names",
    [
        (["q", "k"], "q and k"),
        (["embed", "head"], "embed and head"),
        (["k"], "k and q"),
        (["embed"], "embed and head"),
        (["head"], "head and embed"),
    ],
)
def test_a_weight_shared_with_another_module_is_not_merged_into(merge, targets, names):
    torch.manual_seed(0)
    model = get_peft_model(Tied().eval(), HyperAdaptConfig(target_modules=targets, init_weights=False))
    ids = torch.arange(9)
    out, before = model(ids), state(model)
    with pytest.raises(ValueError, match=f"{names} share one weight.*weight = torch.nn.Parameter"):
        getattr(model, merge)()
    assert_same(model, before)
    assert torch.equal(model(ids), out) and not any(layer.merged for layer in layers(model).values())
    base = model.unload()  # as the message says
    base.k.weight, base.head.weight = (nn.Parameter(m.weight.detach().clone()) for m in (base.k, base.head))
    torch.manual_seed(2)
    model = get_peft_model(base, HyperAdaptConfig(target_modules=targets, init_weights=False))
    out = model(ids)
    torch.testing.assert_close(model.merge_and_unload()(ids), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merge", MERGES)
def test_a_shared_weight_in_a_mixed_model(merge):
    torch.manual_seed(0)
    model = PeftMixedModel(Tied(), HyperAdaptConfig(target_modules=["q"], init_weights=False), "ours")
    model.add_adapter("lora", LoraConfig(target_modules=["k"], init_lora_weights=False))
    model.set_adapter(["ours", "lora"])
    before = state(model)
    with pytest.raises(ValueError, match="q and k share one weight"):
        getattr(model.base_model, merge)()
    assert_same(model, before)
    model.set_adapter(["lora"])
    model.base_model.merge_adapter()  # theirs, on a weight that ours only reads
    assert not torch.equal(
        model.base_model.model.q.base_layer.weight.data, before["base_model.model.q.base_layer.weight"]
    )


def test_a_module_in_two_places_and_a_view_are_shared_weights():
    torch.manual_seed(0)
    linear = nn.Linear(6, 6)
    model = get_peft_model(nn.ModuleDict({"one": linear, "two": linear}), HyperAdaptConfig(target_modules=["one"]))
    with pytest.raises(ValueError, match="one and two share one weight"):
        model.merge_adapter()
    whole, part = nn.Linear(6, 6), nn.Linear(6, 2)
    part.weight = nn.Parameter(whole.weight.data[3:5])
    model = get_peft_model(nn.ModuleDict({"whole": whole, "part": part}), HyperAdaptConfig(target_modules=["part"]))
    with pytest.raises(ValueError, match="part and whole share one weight"):
        model.merge_adapter()


def test_a_layer_in_two_places_and_neighbours_in_one_storage_are_not_shared_weights():
    torch.manual_seed(0)
    flat, block = torch.randn(72), nn.ModuleDict({"q": nn.Linear(6, 6, False), "k": nn.Linear(6, 6, False)})
    block["q"].weight, block["k"].weight = (nn.Parameter(part.view(6, 6)) for part in flat.chunk(2))
    model = nn.ModuleDict({"first": block, "second": block})
    model = get_peft_model(model, HyperAdaptConfig(target_modules=["q", "k"], init_weights=False))
    before = state(model)
    model.merge_adapter()
    assert all(layer.merged for layer in layers(model).values())
    model.unmerge_adapter()
    assert_same(model, before)


@pytest.mark.filterwarnings("ignore:Not adapted")
def test_zamba2_s_shared_blocks():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = Zamba2Config(
        **sizes, vocab_size=32, num_hidden_layers=4, hybrid_layer_ids=[1, 3], layers_block_type=["mamba", "hybrid"] * 2,
        num_mem_blocks=1, mamba_d_state=8, mamba_ngroups=1, n_mamba_heads=4, mamba_headdim=16, use_mamba_kernels=False,
    )  # fmt: skip
    model = get_peft_model(Zamba2ForCausalLM(config), HyperAdaptConfig(init_weights=False))
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.shared_transformer\S+ and \S+layers\.3\.shared_transformer"):
        model.merge_adapter()
    assert_same(model, before)


# Merges that would keep nothing


class Forgetful(torch.Tensor):
    """A tensor that does not keep what is written to it, as the quantized weights of some libraries."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.copy_:
            return args[0]
        return super().__torch_function__(func, types, args, kwargs or {})


def forgetful(linear):
    linear.weight = nn.Parameter(linear.weight.data.as_subclass(Forgetful))


def pruned(linear):
    prune.l1_unstructured(linear, "weight", 0.5)


KINDS = {
    "weight_norm": nn.utils.weight_norm,
    "parametrized weight_norm": parametrizations.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "parametrized spectral_norm": parametrizations.spectral_norm,
    "parametrized orthogonal": parametrizations.orthogonal,
    "pruned": pruned,
    "unknown tensor": forgetful,
}


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_that_would_not_keep_a_merge(kind, method, safe_merge):
    base, x = mlp().eval(), torch.randn(3, 6)
    KINDS[kind](base.last)
    model = get_peft_model(base, METHODS[method](target_modules=["first", "last"])).eval()
    out, before = model(x), state(model)
    for merge in MERGES:
        with pytest.raises(ValueError, match="Cannot merge into a .*Linear: its weight is .*Use the adapter unmerged"):
            getattr(model, merge)(safe_merge=safe_merge)
        assert_same(model, before)
        assert torch.equal(model(x), out)
        assert len(layers(model)) == 2 and not any(layer.merged for layer in layers(model).values())
    with pytest.raises(ValueError, match="Cannot merge into"):
        model.base_model.model.last.merge()


def test_wav2vec2_s_convolution_for_positions():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    convolutions = {"conv_dim": (8, 8), "conv_kernel": (4, 2), "conv_stride": (2, 2)}
    config = Wav2Vec2Config(**sizes, **convolutions, num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2)
    model = Wav2Vec2Model(config).eval()
    model = get_peft_model(
        model, HyperAdaptConfig(target_modules=["q_proj", "pos_conv_embed.conv"], init_weights=False)
    )
    before = state(model)
    for merge in MERGES:
        with pytest.raises(ValueError, match="Conv1d: its weight is computed from other parameters"):
            getattr(model, merge)()
        assert_same(model, before)


def test_a_weight_that_does_not_keep_what_is_written_is_found_after_writing(monkeypatch):
    model = get_peft_model(mlp(), HyperAdaptConfig(target_modules=["first", "last"], init_weights=False))
    before, copy_ = state(model), torch.Tensor.copy_
    lost = model.base_model.model.first.base_layer.weight.data_ptr()
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "copy_", lambda x, y: x if x.data_ptr() == lost else copy_(x, y))
        with pytest.raises(ValueError, match="The weight of a Linear does not keep what is merged"):
            model.merge_adapter()
    assert_same(model, before)
    assert not any(layer.merged for layer in layers(model).values())


@pytest.mark.filterwarnings("ignore:Already following adapters were merged:UserWarning")
@pytest.mark.parametrize("method", OURS)
@pytest.mark.parametrize("merged", [[], ["default"]])
def test_an_error_at_one_layer_undoes_the_others(merged, method):
    """A weight's elements that are all the same memory: torch refuses to write to it."""
    model = get_peft_model(mlp(), METHODS[method](target_modules=["first", "last"]))
    model.add_adapter("second", METHODS[method](target_modules=["first", "last"]))
    first, last = model.base_model.model.first, model.base_model.model.last
    if merged:
        last.merge(adapter_names=merged)
    first.base_layer.weight.data = torch.ones(1, 1).expand(6, 6)
    before = state(model)
    with pytest.raises(RuntimeError, match="single memory location"):
        model.merge_adapter(["default", "second"])
    assert_same(model, before)
    assert first.merged_adapters == [] and last.merged_adapters == merged


def test_a_broken_adapter_of_another_method_undoes_the_others():
    model, x = mixed(mlp(), "lora", "hyperadapt", target_modules=["first", "last"]), torch.randn(3, 6)
    out, before = model(x), state(model)
    lora = model.base_model.model.first.base_layer.lora_B["lora"].weight
    good, lora.data = lora.data, lora.data * float("nan")
    with pytest.raises(ValueError, match="The adapter lora seems to be broken"):
        model.base_model.merge_adapter(safe_merge=True)
    lora.data = good
    for key, value in state(model).items():
        torch.testing.assert_close(value, before[key], rtol=0, atol=1e-6)
    torch.testing.assert_close(model(x), out, rtol=1e-5, atol=1e-5)
