"""The one command for a GPU, on the CPU and with tiny models."""

import json

import pytest
import torch

from benchmarks import gpu
from hyperadapt_peft.cli.plan import plan


def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["gpu", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        gpu.main()
    assert "torch sees no GPU here; `--device cpu --small`" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_all_that_a_gpu_should_show(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["gpu", "--device", "cpu", "--small", "--output-dir", str(tmp_path)])
    gpu.main()
    rows = {}
    for run in gpu.RUNS:
        results = json.loads((tmp_path / f"llama-{run}" / "bench.json").read_text())
        rows[run] = {row["method"]: row for row in results["rows"]}
        assert list(rows[run]) == ["frozen", *gpu.METHODS_HERE]
        assert results["settings"]["autocast"] == (run == "autocast")
    for method in gpu.METHODS_HERE:
        kept, again = (rows[run][method]["saved_bytes"] for run in ("bf16", "bf16-checkpointing"))
        assert again < kept / 2
    memory = json.loads((tmp_path / "memory.json").read_text())["llama"]
    assert list(memory) == list(gpu.METHODS_HERE)
    base = plan(gpu.SMALL["llama"], {"peft_type": "FULL"}, dtype="bfloat16").weights_bytes
    for method, row in memory.items():
        measured = rows["bf16"][method]
        own = (
            0 if method == "vera-r256" else 16 * measured["trainable"]
        )  # weights, gradients, two moments; VeRA has more
        assert row["planned"] >= base + measured["saved_bytes"] + own
        assert own == 0 or row["planned"] == base + measured["saved_bytes"] + own
        assert row["planned"] < row["measured"] < 1.7 * row["planned"]
