"""Every method measured once on a tiny model."""

import json

import pytest
import torch
from transformers import LlamaConfig

from hyperadapt_cli import main
from hyperadapt_peft.cli import bench
from hyperadapt_peft.cli.plan import plan

from .. import tiny


def test_all_methods_are_measured(tmp_path, capsys):
    config = tmp_path / "config.json"
    config.write_text(LlamaConfig(**tiny.SIZES, num_key_value_heads=2).to_json_string())
    output = tmp_path / "out"
    options = ["--batch-size", "3", "--sequence-length", "12"]
    assert main(["bench", "--model", str(config), *options, "--rounds", "2", "--output-dir", str(output)]) == 0
    assert (output / "bench.md").read_text() in capsys.readouterr().out
    assert (output / "bench.png").stat().st_size > 1000

    results = json.loads((output / "bench.json").read_text())
    assert results["settings"]["sequence_length"] == 12
    rows = {row["method"]: row for row in results["rows"]}
    assert list(rows) == list(bench.METHODS)
    for name, row in rows.items():
        assert len(row["step_ratios"]) == 2 and row["step_ratio"] > 0 and row["step_seconds"] > 0
        held = 8 if name == "full" else 12  # two moments of each trained number, and an adapter's own numbers
        if name.startswith("hyperadapt"):
            assert row["syncs"] == 0 and row["kernels"] < rows["lora-r8"]["kernels"]
        assert row["training_kernels"] > row["kernels"] > 0
        assert row["peak_bytes"] > row["saved_bytes"] + held * row["trainable"] > 0
        if name == "frozen":
            assert row["trainable"] == 0 and row["adapter_bytes"] is None and row["step_ratios"] == [1, 1]
            continue
        assert row["trainable"] > 0 and row["adapter_bytes"] > 4 * row["trainable"] * (name != "dora-r8")
        merged = (row["merge_seconds"], row["load_seconds"])
        assert merged == (None, None) if name == "full" else min(merged) > 0

    for name, row in rows.items():
        section = bench.METHODS[name]
        if name in ("full", "hyperadapt", "hyperadapt-save-memory", "lora-r8"):
            if name == "lora-r8":
                section = {**section, "target_modules": "all-linear"}
            planned = plan(str(config), section, batch_size=3, sequence_length=12)
            assert (row["trainable"], row["saved_bytes"]) == (planned.trainable, planned.activation_bytes)


@pytest.mark.parametrize("steps", [0, 3], ids=["at once", "in the second round"])
def test_a_method_for_which_memory_is_too_small_has_a_row_that_says_so(tmp_path, monkeypatch, steps):
    tiny.build("bert")[0].config.save_pretrained(tmp_path)
    done = []

    def update(loss, optimizer):
        if optimizer is not None and len(optimizer.param_groups[0]["params"][0]) == 8:  # LoRA's r
            done.append(loss)
            if len(done) > steps:
                raise torch.OutOfMemoryError("full")
        own(loss, optimizer)

    own = bench._update
    monkeypatch.setattr(bench, "_update", update)
    options = {"rounds": 2, "methods": ["ia3", "lora-r8"], "output_dir": tmp_path / "out"}
    frozen, ia3, lora = bench.bench(str(tmp_path), "sequence-classification", 2, 8, **options)["rows"]
    assert len(done) == steps + 1 and lora == {"method": "lora-r8", "out_of_memory": True}
    assert len(frozen["step_ratios"]) == len(ia3["step_ratios"]) == 2
    assert "| lora-r8 | out of memory |" in (tmp_path / "out" / "bench.md").read_text()


def test_only_the_methods_asked_for_beside_frozen(tmp_path):
    config = tiny.build("bert")[0].config
    config.save_pretrained(tmp_path)
    results = bench.bench(
        str(tmp_path), "sequence-classification", 2, 8, rounds=1, methods=["ia3"], output_dir=tmp_path / "out"
    )
    assert [row["method"] for row in results["rows"]] == ["frozen", "ia3"]


def test_compiled(tmp_path, monkeypatch):
    compiled = []

    def without_a_c_compiler(forward):
        compiled.append(forward)
        return original(forward, backend="aot_eager")

    original = torch.compile
    monkeypatch.setattr(torch, "compile", without_a_c_compiler)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    tiny.build("llama")[0].config.save_pretrained(tmp_path)
    options = ["--rounds", "1", "--methods", "hyperadapt", "--batch-size", "2", "--sequence-length", "8", "--compile"]
    assert main(["bench", "--model", str(tmp_path), *options, "--output-dir", str(tmp_path / "out")]) == 0
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert results["settings"]["compile"] and len(compiled) == 2
    assert [row["saved_bytes"] > 0 for row in results["rows"]] == [True, True]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "ia3", "lora"], "got 'lora'; the nearest valid name is 'lora-r8'"),
        (["--device", "cuda"], "device: torch sees no GPU here"),
        (["--rounds", "0"], "rounds: expected at least 1, got 0"),
        (["--model", "./nowhere"], "model: no such directory"),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(arguments, message, tmp_path, capsys):
    assert main(["bench", "--output-dir", str(tmp_path / "out"), *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()
