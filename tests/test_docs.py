"""README and documentation: their Python runs, their tables and numbers are those of the committed results."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
from transformers import RobertaConfig, RobertaForSequenceClassification

from benchmarks import runs

from .tiny import SIZES, build


ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").rglob("*.md"))
SPEC = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
assert SPEC is not None and SPEC.loader is not None
hooks = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(hooks)
GPU_RUNS = ("llama-3.2-3b-bf16", "llama-3.2-3b-small-batch", "llama-3.1-8b-bf16", "qwen2.5-14b-bf16")


def blocks(page, language):
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A directory in which the pages' Hub ids are tiny local models."""
    directory = tmp_path_factory.mktemp("hub")
    build("llama")[0].save_pretrained(directory / "HuggingFaceTB/SmolLM2-135M")
    RobertaForSequenceClassification(RobertaConfig(**SIZES)).save_pretrained(directory / "FacebookAI/roberta-base")
    return directory


@pytest.mark.parametrize(
    "page", [p for p in (README, *PAGES) if blocks(p, "python")], ids=lambda p: str(p.relative_to(ROOT))
)
def test_the_snippets_of_a_page_run_one_after_the_other(page, hub, monkeypatch):
    monkeypatch.chdir(hub)
    names: dict = {}
    for snippet in blocks(page, "python"):
        exec(compile(snippet, str(page), "exec"), names)  # noqa: S102


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_commands_that_a_page_names_exist(page):
    text = page.read_text()
    for name in re.findall(r"(?:configs|benchmarks|tests|docs)/[\w/.-]+\.(?:yaml|py|md|png)", text):
        assert (ROOT / name).is_file(), name
    for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", text):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_readme_is_a_page():
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 120


def test_the_pages_are_filled_from_the_results():
    for page in PAGES:
        if page.name != "command-line.md":
            assert "{{" not in hooks.fill(page.read_text()), page


def test_the_readmes_table_is_that_of_the_results():
    text = README.read_text()
    assert hooks.quality_overview("HyperAdapt", "SURM Kronecker", "LoRA r=1", "LoRA r=8") in text
    tasks = [hooks.chosen(task) for task in hooks.quality_tasks()]

    def above(method, reference):
        return sum(runs.mean(task[method], "test") > runs.mean(task[reference], "test") for task in tasks)

    told = (
        f"of the {len(tasks)} tasks below LoRA r=8 scores higher than HyperAdapt on {above('LoRA r=8', 'HyperAdapt')}, LoRA r=1 "
        f"of equal size on {above('LoRA r=1', 'HyperAdapt')}; SURM's Kronecker products score above LoRA r=1 on "
        f"{above('SURM Kronecker', 'LoRA r=1')}, above r=8 on {above('SURM Kronecker', 'LoRA r=8')}."
    )
    assert told in re.sub(r"\s+", " ", text)


def test_the_readmes_numbers_are_those_of_the_results():
    text = re.sub(r"\s+", " ", README.read_text())
    bench = {row["method"]: f"{row['step_ratio']:.2f}" for row in hooks.read("bench/bench")["rows"]}
    assert f"A training step takes {bench['hyperadapt']} times" in text
    others = f"LoRA r=1 {bench['lora-r1']}, MiSS {bench['miss-r8']}, IA3 {bench['ia3']}, LoRA r=8 {bench['lora-r8']}"
    assert f"({others};" in text
    kept = {row["method"]: row["saved_bytes"] for row in hooks.read("bench/bench")["rows"]}
    assert f"keeps {kept['hyperadapt'] / kept['lora-r8']:.1f} times what LoRA r=8 keeps" in text
    assert f"for backward ({kept['hyperadapt-save-memory'] / kept['lora-r8']:.2f} with `save_memory=True`)" in text
    gpu = {row["method"]: row for row in hooks.read("gpu/llama-3.2-3b-bf16/bench")["rows"]}
    steps = [f"{gpu[method]['step_ratio']:.2f}" for method in ("hyperadapt", "miss-r8", "ia3", "lora-r8")]
    assert f"on an [H100](docs/results/gpu.md) {steps[0]} ({', '.join(steps[1:])}; 3B Llama, bf16)" in text
    kept = [hooks.gpu_kept("llama-3.2-3b", method) for method in ("hyperadapt", "hyperadapt-save-memory", "miss-r8")]
    assert f"on the H100 {kept[0]} ({kept[1]}; MiSS {kept[2]})." in text
    mixed = [run for run in hooks.read("mixed_batch")["runs"] if run["loaded"] == 64]
    prefill, token = (
        {run["method"]: f"{run[f'{kind}, 64 adapters / {kind}, one adapter']:.2f}" for run in mixed}
        for kind in ("prefill of 16 tokens", "single token")
    )
    assert (
        f"take {prefill['HyperAdapt']} times the rows of one (LoRA r=8: {prefill['LoRA r=8']}), single tokens "
        f"{token['HyperAdapt']} ({token['LoRA r=8']})."
    ) in text
    quickstart = json.loads((ROOT / "benchmarks/results/quickstart/seed42-float32.json").read_text())
    assert f"{quickstart['parameters']['trainable_outside_head']:,} trained parameters" in text
    assert f"a file of {quickstart['adapter_bytes']:,} bytes" in text


def test_the_readme_on_smaller_methods_and_on_full_fine_tuning():
    assert "RoAd and VeRA, smaller still, score as high or higher, and so does full fine-tuning." in re.sub(
        r"\s+", " ", README.read_text()
    )
    for method in ("RoAd", "VeRA", "full fine-tuning"):
        assert "behind" not in hooks.standing(method, "HyperAdapt")


def test_what_the_page_says_of_runs_that_learn_nothing():
    stuck = {
        method: sum(run["test"] < 0.683 for run in hooks.chosen("syllogisms")[method].values())
        for method in ("HyperAdapt", "LoRA r=1", "LoRA r=8", "SURM Kronecker", "MiSS r=1")
    }
    assert stuck == {"HyperAdapt": 0, "LoRA r=1": 3, "LoRA r=8": 1, "SURM Kronecker": 1, "MiSS r=1": 3}


def test_weight_decay_changes_no_score():
    methods = hooks.chosen("one_rate/fashion-mnist")
    for decay in ("0.01", "0.1"):
        for seed, run in methods[f"HyperAdapt, weight decay {decay}"].items():
            assert run["test"] == methods["HyperAdapt"][seed]["test"]


def test_what_the_page_of_the_gpu_says_is_in_its_results():
    rows = {run: {row["method"]: row for row in hooks.read(f"gpu/{run}/bench")["rows"]} for run in GPU_RUNS}

    def cheapest(run):
        ours = ("hyperadapt", "lora-r8", "miss-r8", "ia3", "road", "vera-r256", "surm-kronecker")
        found = {method: rows[run][method]["step_ratio"] for method in ours if "step_ratio" in rows[run][method]}
        return sorted(found, key=found.__getitem__)

    large = cheapest("llama-3.2-3b-bf16")
    assert large[0] == "ia3" and set(large[1:3]) == {"hyperadapt", "miss-r8"} and large[3] == "lora-r8"
    assert cheapest("llama-3.1-8b-bf16")[:4] == ["hyperadapt", "ia3", "miss-r8", "lora-r8"]
    by_launches = cheapest("llama-3.2-3b-small-batch")
    assert by_launches[0] == "ia3" and set(by_launches[1:3]) == {"hyperadapt", "miss-r8"}
    assert by_launches[3] == "lora-r8"
    fits = [method for method, row in rows["qwen2.5-14b-bf16"].items() if "out_of_memory" not in row]
    assert fits == ["frozen", "hyperadapt-save-memory", "miss-r8"]
    beyond = [
        row["measured"] - row["planned"]
        for model in hooks.read("gpu/memory").values()
        for row in model.values()
        if row["measured"]
    ]
    assert 4e9 < min(beyond) and max(beyond) < 5e9  # "4 to 5 GB more than the plan says"


def test_the_prose_on_little_data():
    methods = hooks.chosen("cifar10")
    sides = {
        name: hooks.side(*hooks.difference(methods[f"{name}, 300 rows, 10 epochs"], methods["LoRA r=1, 300 rows, 10 epochs"]))
        for name in ("HyperAdapt", "SURM Kronecker")
    }  # fmt: skip
    assert sides == {"HyperAdapt": "ahead", "SURM Kronecker": "level"}
