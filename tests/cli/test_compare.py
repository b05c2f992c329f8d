"""Comparisons: chosen on validation, shown on test, never run twice."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from hyperadapt_cli import main
from hyperadapt_peft.cli import compare
from hyperadapt_peft.cli.errors import RecipeError


@pytest.fixture
def comparison(recipe, tmp_path, monkeypatch):
    """Writes a comparison; returns its path. Its runs take place in this process, for speed."""
    monkeypatch.setattr(compare, "ProcessPoolExecutor", lambda workers, **options: ThreadPoolExecutor(workers))
    recipe(training={"max_steps": 3})

    def write(**changes) -> str:
        content = {
            "recipe": "recipe.yaml",
            "output_dir": str(tmp_path / "runs"),
            "seeds": [0, 1],
            "methods": {
                "ours": {"tuner": {"peft_type": "HYPERADAPT"}, "learning_rates": [1e-3, 0.1]},
                "lora": {
                    "tuner": {"peft_type": "LORA", "r": 2},
                    "learning_rates": [1e-2],
                    "model": {"config": {"hidden_dropout_prob": 0.0}},
                    "training": {"max_steps": 2},
                },
            },
        }
        path = tmp_path / "comparison.yaml"
        path.write_text(
            yaml.safe_dump({key: value for key, value in (content | changes).items() if value is not None})
        )
        return str(path)

    return write


def test_a_table_a_plot_and_nothing_run_twice(comparison, tmp_path, capsys):
    path = comparison()
    assert main(["compare", path]) == 0
    table = capsys.readouterr().out
    rows = json.loads((tmp_path / "runs/comparison.json").read_text())
    assert (tmp_path / "runs/comparison.md").read_text() in table
    assert table.splitlines()[-1].startswith("Next: ")
    assert (tmp_path / "runs/comparison.png").stat().st_size > 1000
    runs = {file: file.stat().st_mtime_ns for file in (tmp_path / "runs").glob("*/*/*/metrics.json")}
    assert len(runs) == 2 + 1 + 1 + 1  # ours: two rates and a second seed; lora: one and a second
    for row in rows:
        directory = tmp_path / "runs" / row["method"] / f"lr{row['learning_rate']:g}"
        seeds = [json.loads((directory / f"seed{seed}/metrics.json").read_text()) for seed in (0, 1)]
        assert row["test"] == [metrics["after"]["test"]["accuracy"] for metrics in seeds]
        assert row["sweep"][f"{row['learning_rate']:g}"] == max(row["sweep"].values())
        assert seeds[1]["recipe"]["training"]["seed"] == 1
        assert seeds[0]["steps"] == {"ours": 3, "lora": 2}[row["method"]]  # lora has sections of its own
        assert ("config" in seeds[0]["recipe"]["model"]) is (row["method"] == "lora")

    lost = min(runs)
    lost.unlink()  # as if the comparison had been stopped there
    assert main(["compare", path]) == 0
    again = {file: file.stat().st_mtime_ns for file in runs}
    assert [file for file in runs if again[file] != runs[file]] == [lost]
    after = json.loads((tmp_path / "runs/comparison.json").read_text())
    assert [row["test"] for row in after] == [row["test"] for row in rows]


def test_a_finished_run_of_another_recipe_is_not_shown_for_this_one(comparison, recipe, tmp_path, capsys):
    path = comparison(seeds=[0])
    assert main(["compare", path]) == 0
    before = {file: file.read_bytes() for file in tmp_path.glob("runs/**/*") if file.is_file()}
    recipe(training={"max_steps": 4, "adam_beta2": 0.9})  # lora has max_steps of its own
    capsys.readouterr()
    assert main(["compare", path]) != 0
    error = capsys.readouterr().err
    assert f"training.adam_beta2: changed since {tmp_path / 'runs/lora/lr0.01/seed0'} ran" in error
    assert {file: file.read_bytes() for file in tmp_path.glob("runs/**/*") if file.is_file()} == before

    recipe(training={"max_steps": 3})  # as it was
    (tmp_path / "runs").rename(tmp_path / "moved")
    assert main(["compare", comparison(seeds=[0], output_dir=str(tmp_path / "moved"))]) == 0
    metrics = [*tmp_path.glob("moved/*/*/*/metrics.json")]
    assert {before[tmp_path / "runs" / file.relative_to(tmp_path / "moved")] for file in metrics} == {
        file.read_bytes() for file in metrics
    }


@pytest.mark.skipif(sys.platform == "win32", reason="kills by signal")
def test_a_killed_comparison_leaves_no_run_behind(comparison, recipe, tmp_path):
    path = comparison(seeds=[0], methods={"ours": {"tuner": {"peft_type": "HYPERADAPT"}, "learning_rates": [1e-3]}})
    recipe(training={"max_steps": 1_000_000, "logging_steps": 1})
    with subprocess.Popen(
        [sys.executable, "-m", "hyperadapt_peft", "compare", path], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        assert any(b"'loss'" in line for line in process.stdout)  # it trains
        process.kill()
        process.communicate(timeout=60)  # ends when every process that holds the pipe has
    assert not [*tmp_path.glob("runs/*/*/*/metrics.json")]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": [1]}, "seed: unknown key, did you mean 'seeds'"),
        ({"seeds": None}, "seeds: missing"),
        ({"seeds": "0"}, "seeds: expected a valid array"),
        ({"methods": {}}, "methods: Dictionary should have at least 1 item"),
        ({"recipe": "none.yaml"}, "recipe: no such file 'none.yaml'"),
        ({"methods": {"a": {"tuner": {"peft_type": "LORA"}}}}, "methods.a.learning_rates: missing"),
        (
            {"methods": {"a": {"tuner": {"peft_type": "LORA"}, "learning_rates": ["fast"]}}},
            "methods.a.learning_rates: expected a valid number",
        ),
        (
            {"methods": {"a": {"tuner": {"peft_type": "LORA"}, "learning_rates": [1.0], "model": "b"}}},
            "methods.a.model: expected keys with values",
        ),
        ({"recipe": [1]}, "recipe: expected keys with values or a valid string"),
        ({"recipe": {"task": "causal-lm", "data": {}, "training": {}}}, "model: missing section"),
        ({"recipe": {"task": "causal-lm", "data": {}, "model": {}}}, "training: missing section"),
        ({"methods": {"a": {"tuner": {"peft_type": "LORAX"}, "learning_rates": [1.0]}}}, "methods.a: tuner.peft_type"),
    ],
)
def test_mistakes_are_told_before_anything_runs(comparison, tmp_path, changes, message):
    with pytest.raises(RecipeError) as error:
        compare.load(comparison(**changes))
    assert message.split(",")[0] in str(error.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("split", ["validation", "test"])
def test_both_splits_are_needed(split, comparison, recipe, tmp_path):
    values = yaml.safe_load(Path(recipe()).read_text())
    values["data"][f"{split}_split"] = None
    with pytest.raises(RecipeError, match=f"recipe.data.{split}_split: expected"):
        compare.load(comparison(recipe=values))
    assert not (tmp_path / "runs").exists()
