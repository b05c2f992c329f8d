"""The one command for a GPU, on the CPU and with tiny models."""

import json

from benchmarks import gpu


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
    table = [line.split(" | ") for line in (tmp_path / "memory.md").read_text().splitlines() if "| bf16 |" in line]
    assert len(table) == len(gpu.METHODS_HERE)
    for *_, planned, measured in table:
        assert 0.9 * float(planned) < float(measured.rstrip(" |")) < 3 * float(planned)
