"""`hyperadapt inspect`, against numpy and against the bounds that the algebra gives."""

import itertools
import json

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from transformers import MixtralConfig, MixtralForCausalLM

from hyperadapt_cli import main
from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.inspection import describe, inspect_adapter, table

from ..tiny import build


def adapter(config, directory, architecture="bert"):
    """Save the tiny model and a random adapter of it; returns the adapter's directory."""
    base, _, task_type = build(architecture)
    base.save_pretrained(directory / "base")
    config.task_type = task_type
    model = get_peft_model(base, config)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.base_model.model.config.name_or_path = str(directory / "base")
    for adapted in model.peft_config.values():
        adapted.base_model_name_or_path = str(directory / "base")
    path = directory / config.peft_type.value
    model.save_pretrained(path)
    return str(path), model


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (5, 5)])
def test_ranks_of_known_spectra(shape):
    rng = np.random.default_rng(0)
    left, right = (np.linalg.qr(rng.normal(size=(side, side)))[0] for side in shape)
    values = np.array([4.0, 2.0, 1.0])
    found = describe(torch.from_numpy(left[:, :3] @ np.diag(values) @ right[:3]).float())
    assert found["numerical_rank"] == 3 and found["full_rank"] == min(shape)
    assert found["stable_rank"] == pytest.approx((16 + 4 + 1) / 16, rel=1e-5)
    p = values / values.sum()
    assert found["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-4)
    assert found["singular_values"][:3] == pytest.approx(values, rel=1e-3)


def test_a_zero_update_has_no_rank():
    found = describe(torch.zeros(3, 4))
    assert (found["numerical_rank"], found["stable_rank"], found["effective_rank"]) == (0, 0.0, 0.0)


def test_both_sides_are_of_high_rank_beside_lora(tmp_path, capsys):
    ours, model = adapter(HyperAdaptConfig(), tmp_path)
    lora, _ = adapter(LoraConfig(r=2, target_modules="all-linear"), tmp_path)
    assert main(["inspect", ours, "--beside", lora, "--output", str(tmp_path / "out")]) == 0
    reports = json.loads((tmp_path / "out/ranks.json").read_text())
    assert set(reports) == {"HYPERADAPT", "LORA"} and (tmp_path / "out/ranks.png").stat().st_size > 1000
    assert (tmp_path / "out/ranks.md").read_text() == table(reports)
    assert (tmp_path / "out/ranks.md").read_text() in capsys.readouterr().out
    assert all(entry["numerical_rank"] > 0.9 * entry["full_rank"] for entry in reports["HYPERADAPT"].values())
    assert all(entry["numerical_rank"] == 2 for entry in reports["LORA"].values())

    name = "bert.encoder.layer.1.intermediate.dense"
    layer = model.base_model.model.get_submodule(name)
    row, column = (1 + offset.numpy() for offset in layer.get_offsets("default"))
    weight = layer.base_layer.weight.detach().numpy()
    update = row[:, None] * weight * column - weight
    entry = reports["HYPERADAPT"][name]
    assert entry["singular_values"] == pytest.approx(np.linalg.svd(update)[1], rel=1e-3)
    assert entry["relative_norm"] == pytest.approx(np.linalg.norm(update) / np.linalg.norm(weight), rel=1e-5)
    assert entry["scales"]["row"]["max"] == pytest.approx(row.max(), rel=1e-6)
    assert entry["scales"]["column"]["std"] == pytest.approx(column.std(), rel=1e-5)


@pytest.mark.parametrize("sides, bound", [("both", 6), ("row", 3), ("column", 3)])
def test_the_bound_on_a_weight_of_low_rank(sides, bound):
    torch.manual_seed(0)
    base, _, _ = build("llama")
    with torch.no_grad():
        for module in base.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.copy_(torch.randn(module.out_features, 3) @ torch.randn(3, module.in_features))
    model = get_peft_model(base, HyperAdaptConfig(sides=sides, init_weights=False))
    ranks = {entry["numerical_rank"] for entry in inspect_adapter(model).values()}
    assert ranks == {bound}  # min(2 rank(W), n, m) for two sides, rank(W) for one


def test_an_entry_for_each_expert():
    config = MixtralConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=64, num_local_experts=3,
    )  # fmt: skip
    model = get_peft_model(MixtralForCausalLM(config), HyperAdaptConfig(init_weights=False))
    report, module = inspect_adapter(model), "model.layers.0.mlp"
    experts = model.get_submodule(f"base_model.model.{module}.experts").get_base_layer()
    for parameter, i in itertools.product(("gate_up_proj", "down_proj"), range(3)):
        entry = report[f"{module}.experts.{parameter}[{i}]"]
        assert entry["shape"] == list(getattr(experts, parameter)[i].shape) and entry["numerical_rank"] > 16
        assert entry["relative_norm"] > 0.1 and set(entry["scales"]) == {"row", "column"}
    assert report[f"{module}.gate.weight"]["shape"] == [3, 32] and len(report) == 4 + 6 + 1


def test_other_methods_and_a_head_of_another_size(tmp_path, capsys):
    path, _ = adapter(SurmConfig(), tmp_path)
    config = json.loads((tmp_path / "base/config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"id2label": {"0": "a", "1": "b", "2": "c"}}))
    (tmp_path / "base/model.safetensors").rename(tmp_path / "weights")
    from safetensors.torch import load_file, save_file

    weights = {name: t for name, t in load_file(tmp_path / "weights").items() if "classifier" not in name}
    save_file(weights, tmp_path / "base/model.safetensors", metadata={"format": "pt"})
    assert main(["inspect", path]) == 0
    assert "query" in capsys.readouterr().out


@pytest.mark.parametrize("problem", ["no update", "no adapter"])
def test_what_cannot_be_inspected_is_one_line(tmp_path, capsys, problem):
    path = str(tmp_path / "none")
    if problem == "no update":
        path, _ = adapter(IA3Config(), tmp_path)
    assert main(["inspect", path]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert path in error and (problem != "no update" or "IA3 has no update that is added to a weight" in error)
