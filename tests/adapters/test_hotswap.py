"""Hot swapping: same outputs as loading, no recompilation, all or nothing."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.hotswap import hotswap_adapter


CONFIGS = {
    "hyperadapt": lambda: HyperAdaptConfig(target_modules=["0", "2"], modules_to_save=["3"], init_weights=False),
    "surm": lambda: SurmConfig(target_modules=["0", "2"], init_weights=False, structure="ldr"),
}
X = torch.randn(3, 6, generator=torch.Generator().manual_seed(2))


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4), nn.Linear(4, 2))


@pytest.fixture(params=CONFIGS)
def saved(request, tmp_path):
    """Two saved adapters and their outputs."""
    outputs = []
    for i in (1, 2):
        model = base()
        torch.manual_seed(i)
        model = get_peft_model(model, CONFIGS[request.param]()).eval()
        for p in model.parameters():
            p.data += 0.1 * torch.rand_like(p) * p.requires_grad  # a saved module's as well
        model.save_pretrained(tmp_path / str(i))
        outputs.append(model(X).detach())
    return tmp_path, outputs


def test_the_new_adapter_s_outputs_without_recompiling(saved):
    path, (first, second) = saved
    model = PeftModel.from_pretrained(base(), path / "1").eval()
    compilations = []

    def backend(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        assert torch.equal(compiled(X), first)
        count = len(compilations)
        hotswap_adapter(compiled, path / "2")
        assert torch.equal(compiled(X), second)
        hotswap_adapter(compiled, path / "1", "default", "cpu")  # PEFT's order: `torch_device` is its fourth
        hotswap_adapter(compiled, path / "1", torch_device="cpu")
        assert torch.equal(compiled(X), first)
        assert len(compilations) == count > 0
        model.load_adapter(path / "2", "other")
        model.set_adapter("other")
        assert torch.equal(compiled(X), second)
    assert len(compilations) > count  # what hot swapping saves


def test_what_does_not_fit_changes_nothing(saved):
    path, (first, _) = saved
    model = PeftModel.from_pretrained(base(), path / "1").eval()
    file = path / "2" / "adapter_model.safetensors"
    tensors = load_file(file)
    key = max(tensors)
    broken = {
        "lacks the tensor": {k: v for k, v in tensors.items() if k != key},
        "no place for the tensor": {**tensors, "extra": torch.zeros(1)},
        "size mismatch": {**tensors, key: torch.zeros(77)},
        "not finite": {**tensors, key: torch.full_like(tensors[key], float("nan"))},
    }
    for message, state in broken.items():
        save_file(state, file)
        with pytest.raises((RuntimeError, ValueError), match=message):
            hotswap_adapter(model, path / "2")
        assert torch.equal(model(X), first)
    with pytest.raises(ValueError, match="not found"):
        hotswap_adapter(model, path / "1", "other")
    model.merge_adapter()
    with pytest.raises(ValueError, match="is merged"):
        hotswap_adapter(model, path / "1")


def test_another_config_is_refused(tmp_path):
    get_peft_model(base(), HyperAdaptConfig(target_modules=["0", "2"], sides="row")).save_pretrained(tmp_path)
    model = get_peft_model(base(), HyperAdaptConfig(target_modules=["0", "2"]))
    with pytest.raises(ValueError, match="sides='row' where the loaded one has 'both'"):
        hotswap_adapter(model, tmp_path)
