"""`load_adapters` loads what `load_adapter` loads, all or none, and many adapters do not slow down what walks a model."""

import cProfile
import pstats
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from safetensors.torch import load_file, save_file

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.loading import load_adapters
from hyperadapt_peft.tuners.common.layer import modules_around_adapters

from ..tiny import build


CONFIGS = {
    "hyperadapt": HyperAdaptConfig,
    "hyperadapt with a head": lambda **kw: HyperAdaptConfig(modules_to_save=["lm_head"], **kw),
    "hyperadapt with tokens": lambda **kw: HyperAdaptConfig(trainable_token_indices={"embed_tokens": [1, 5]}, **kw),
    "surm": lambda **kw: SurmConfig(structure="ldr", alpha=0.5, surm_dropout=0.1, **kw),
    "sequential surm": lambda **kw: SurmConfig(placement="sequential", **kw),
}
KINDS = {"a": {}, "b": {}, "c": {"target_modules": ["q_proj"]}, "d": {}, "e": {"target_modules": ["q_proj"]}}
_, BATCH, _ = build("llama")


@torch.no_grad()
def logits(model, **kwargs):
    return model.eval()(**BATCH, **kwargs).logits


@pytest.fixture(scope="module", params=CONFIGS)
def saved(request, tmp_path_factory):
    """The paths of saved adapters of two kinds, by their names."""
    tmp_path = tmp_path_factory.mktemp("adapters")
    for i, (name, kind) in enumerate(KINDS.items()):
        model = get_peft_model(build("llama")[0], CONFIGS[request.param](**kind))
        torch.manual_seed(i)
        for p in model.parameters():
            p.data += 0.3 * torch.randn_like(p) * p.requires_grad
        model.save_pretrained(tmp_path / name)
    return {name: tmp_path / name for name in KINDS}


def first(saved):
    return PeftModel.from_pretrained(build("llama")[0], saved["a"], "first")


def state(model):
    return dict(model.named_parameters())


def test_the_same_as_one_by_one(saved, tmp_path):
    one_by_one, together = first(saved), first(saved)
    for name, path in saved.items():
        one_by_one.load_adapter(path, name)
    load_adapters(together, saved)
    assert together.active_adapter == "first"
    expected, loaded = state(one_by_one), state(together)
    assert expected.keys() == loaded.keys()
    for name, p in expected.items():
        assert torch.equal(p, loaded[name]) and p.dtype == loaded[name].dtype, name
        assert p.requires_grad == loaded[name].requires_grad, name
    assert len({p.data_ptr() for p in loaded.values()}) == len(loaded)  # no two adapters share a tensor
    outputs = []
    for name in saved:
        one_by_one.set_adapter(name)
        together.set_adapter(name)
        outputs.append(logits(together))
        assert torch.equal(outputs[-1], logits(one_by_one))
        assert {n for n, p in state(one_by_one).items() if p.requires_grad} == {
            n for n, p in state(together).items() if p.requires_grad
        }
        one, other = one_by_one.peft_config[name].to_dict(), together.peft_config[name].to_dict()
        assert one == other
    assert not any(torch.equal(outputs[0], other) for other in outputs[1:])

    together.save_pretrained(tmp_path / "again", selected_adapters=["d"])
    again, before = (load_file(p / "adapter_model.safetensors") for p in (tmp_path / "again/d", saved["d"]))
    assert again.keys() == before.keys() and all(torch.equal(again[key], before[key]) for key in again)
    for name in ("a", "d"):  # a template, and a copy of it
        together.delete_adapter(name)
        assert not [key for key in together.state_dict() if f".{name}." in key]
    together.set_adapter("b")
    assert torch.equal(logits(together), outputs[1])


def test_training_one_leaves_the_others(saved):
    model = first(saved)
    load_adapters(model, saved)
    model.set_adapter("b")
    before = {n: p.detach().clone() for n, p in state(model).items()}
    model.train()(**BATCH).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    changed = {n for n, p in state(model).items() if not torch.equal(p, before[n])}
    assert changed and all(".b." in n or n.endswith(".b") for n in changed)


@pytest.mark.parametrize(
    "position, broken",  # a copy, the first of its config, the last
    [("b", "not finite"), ("c", "size mismatch"), ("e", "lacks the tensor"), ("e", "missing")],
)
def test_all_or_none(saved, position, broken, tmp_path):
    model = PeftModel.from_pretrained(build("llama")[0], saved["c"], "first")  # of fewer layers than the others
    expected, modules = logits(model), {name: type(module) for name, module in model.named_modules()}
    saved = {**saved, position: shutil.copytree(saved[position], tmp_path / position)}
    file = saved[position] / "adapter_model.safetensors"
    tensors = load_file(file)
    key = max(key for key in tensors if "_proj" in key or "embed" not in key)
    if broken == "missing":
        file.unlink()
    else:
        {
            "not finite": lambda: tensors[key].fill_(float("nan")),
            "size mismatch": lambda: tensors.update({key: torch.zeros(77)}),
            "lacks the tensor": lambda: tensors.pop(key),
        }[broken]()
        save_file(tensors, file)
    with pytest.raises(
        ValueError, match=f"The adapter {position} of .*none was: .*{'' if broken == 'missing' else broken}"
    ):
        load_adapters(model, saved)
    assert list(model.peft_config) == ["first"] and model.active_adapter == "first"
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert {n.split(".")[-2] for n in model.state_dict() if ".hyperadapt_" in n or ".surm_" in n} == {"first"}
    assert torch.equal(logits(model), expected)


def test_refusals(tmp_path):
    model = get_peft_model(build("llama")[0], HyperAdaptConfig())
    with pytest.raises(ValueError, match=r"already adapters called \['default'\]"):
        load_adapters(model, {"default": tmp_path, "other": tmp_path})
    with pytest.raises(TypeError, match="not for .*LoraModel"):
        load_adapters(get_peft_model(build("llama")[0], LoraConfig(target_modules=["q_proj"])), {"a": tmp_path})


@pytest.mark.parametrize("architecture", ["llama", "bert", "t5"])
@pytest.mark.parametrize("config", [HyperAdaptConfig, lambda **kw: SurmConfig(surm_dropout=0.1, **kw)])
def test_walks_leave_out_the_adapters_own_modules_and_nothing_else(architecture, config):
    model, _, task_type = build(architecture)
    everything = list(model.modules())
    model = get_peft_model(model, config(task_type=task_type))
    count = len(list(modules_around_adapters(model)))
    model.add_adapter("other", config(task_type=task_type))
    around = list(modules_around_adapters(model))
    heads = [m for m in model.modules() if isinstance(m, ModulesToSaveWrapper)]
    assert len(around) == len(set(around)) == count + len(heads)  # one more copy of each head
    assert set(everything) <= set(around) <= set(model.modules())
    assert [m for m in around if isinstance(m, BaseTunerLayer)] == [
        m for m in model.modules() if isinstance(m, BaseTunerLayer)
    ]


def test_switching_resets_what_is_trained_as_peft_does():
    model = get_peft_model(build("llama")[0], HyperAdaptConfig())
    model.add_adapter("other", HyperAdaptConfig())

    def trained():
        return {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad and ".hyperadapt_" in n}

    model.set_requires_grad("other")
    assert trained() == {"default", "other"}
    model.set_adapter("default")
    assert trained() == {"default"}
    model.set_adapter("other", inference_mode=True)
    assert trained() == set() and model.active_adapters == ["other"]
    model.base_model.set_adapter(["default", "other"])
    assert trained() == {"default", "other"} and model.base_model.active_adapter == ["default", "other"]
    with pytest.raises(ValueError, match="not found"):
        model.set_adapter("nobody")


def test_load_adapter_walks_around_the_adapters_there_are(tmp_path):
    """PEFT's share of a load grows with the number of adapters; this package's own walks do not."""
    walks = {"modules", "named_modules", "parameters", "named_parameters", "state_dict"}

    def steps(loaded):
        model = get_peft_model(build("llama")[0], HyperAdaptConfig())
        model.save_pretrained(tmp_path)
        load_adapters(model, {f"more{i}": tmp_path for i in range(loaded)})
        profile = cProfile.Profile()
        profile.runcall(model.load_adapter, tmp_path, "one more")
        return sum(
            calls[0]
            for (_, _, name), (*_, callers) in pstats.Stats(profile).stats.items()
            for (caller, _, _), calls in callers.items()
            if name in walks and "hyperadapt_peft/tuners" in caller
        )

    assert steps(40) <= 1.1 * steps(2)
