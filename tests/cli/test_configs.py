"""The shipped data sections, each on a tiny local copy of its set's schema; comparisons; the dry run."""

import json
import shutil
import sys
from pathlib import Path

import datasets
import pytest
import yaml
from PIL import Image

from benchmarks import embedded
from hyperadapt_cli import main
from hyperadapt_peft.cli import compare
from hyperadapt_peft.cli.data import load_splits
from hyperadapt_peft.cli.recipe import load

from .test_train import run


CONFIGS = Path(__file__).parents[2] / "configs"
BENCHMARKS = CONFIGS.parent / "benchmarks"
OTHERS = ["calibration", "film_reviews", "text_classification_3_epochs"]
RECIPES = {"glue": "hyperadapt_glue", "commonsense": "commonsense", "arithmetic": "arithmetic", "images": "surm_image_classification"}  # fmt: skip
PARTS = [
    (family, part) for family in RECIPES for part in yaml.safe_load((CONFIGS / f"data/{family}.yaml").read_text())
]
ARC = {
    "question": "not good",
    "choices": {"text": ["film", "plot", "dull"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ROWS = {  # one row of each set, as the Hub has it, in the tiny tokenizer's words
    "cola": {"sentence": "good film", "label": 1},
    "sst2": {"sentence": "good film", "label": 1},
    "mrpc": {"sentence1": "good", "sentence2": "great", "label": 1},
    "stsb": {"sentence1": "good", "sentence2": "great", "label": 4.2},
    "qqp": {"question1": "good", "question2": "great", "label": 1},
    "mnli": {"premise": "good", "hypothesis": "great", "label": 1},
    "qnli": {"question": "good", "sentence": "great", "label": 1},
    "rte": {"sentence1": "good", "sentence2": "great", "label": 1},
    "boolq": {"passage": "very dull plot", "question": "good film", "answer": True},
    "piqa": {"goal": "good", "sol1": "film", "sol2": "plot", "label": 1},
    "siqa": {
        "context": "good",
        "question": "not",
        "answerA": "film",
        "answerB": "plot",
        "answerC": "dull",
        "label": "2",
    },
    "hellaswag": {"activity_label": "not", "ctx": "good", "endings": ["film", "plot", "dull", "great"], "label": "1"},
    "winogrande": {"sentence": "good _ not", "option1": "film", "option2": "plot", "answer": "2"},
    "arc_easy": ARC,
    "arc_challenge": ARC,
    "openbookqa": {"question_stem": ARC["question"]} | ARC,
    "gsm8k": {"question": "1 2", "answer": "very dull #### 3"},
    "svamp": {"Body": "1 2", "Question": "not", "Answer": "3.0"},
    "math": {"problem": "1 2", "solution": r"dull \boxed{3}"},
}
ANSWERS = {"gsm8k": "3", "svamp": "3.0", "math": "3", "boolq": "yes"}


def stand_in(family, part, directory):
    """Overrides that put a local file of the same columns in the place of the set on the Hub."""
    section = yaml.safe_load((CONFIGS / f"data/{family}.yaml").read_text())[part]
    names = ("train_split", "validation_split", "test_split")
    defaults = {"train_split": "train", "validation_split": "validation", "test_split": "test"}
    splits = {str(split).partition("[")[0] for name in names if (split := section.get(name, defaults[name]))}
    file = directory / "rows.parquet"
    if family == "images":
        image = directory / "picture.png"
        Image.new("RGB", (10, 12)).save(image)
        columns = {
            section.get("image_column", "image"): [str(image)] * 100,
            section.get("label_column", "label"): [0, 1] * 50,
        }
        rows = datasets.Dataset.from_dict(columns).cast_column(section.get("image_column", "image"), datasets.Image())
        rows = rows.cast_column(section.get("label_column", "label"), datasets.ClassLabel(names=["cat", "dog"]))
    else:
        rows = datasets.Dataset.from_list([ROWS[part]] * 40)
    rows.to_parquet(file)
    files = json.dumps(dict.fromkeys(splits, str(file)))
    return [f"data=data/{family}.yaml#{part}", "data.name=parquet", f"data.data_files={files}", "data.config=null", "data.revision=null"]  # fmt: skip


@pytest.mark.parametrize(("family", "part"), PARTS, ids=lambda value: value)
def test_every_set_is_encoded_from_its_schema(family, part, bert, llama, vit, tmp_path):
    changes = stand_in(family, part, tmp_path)
    recipe = load(CONFIGS / f"{RECIPES[family]}.yaml", [*changes, "training.bf16=false", "training.use_cpu=true"])
    splits = load_splits(recipe.data)
    model = {"glue": bert, "images": vit}.get(family, llama)
    encoded = recipe.task.encode(recipe.data, splits, str(model), None)
    assert recipe.data.metric in encoded.metrics
    role = "validation" if family == "glue" else "test"
    row = encoded.splits[role][0]
    batch = encoded.collator([encoded.splits[role][index] for index in range(2)])
    if family == "glue":
        assert row["labels"] == (4.2 if part == "stsb" else 0) and batch["input_ids"].shape[0] == 2
    elif family == "images":
        assert batch["labels"].tolist() == [0, 1] and batch["pixel_values"].shape[:2] == (2, 3)
    else:
        prompt, right, others = recipe.data.texts(ROWS[part])
        assert "{" not in prompt and prompt.startswith(("very", "good", "not", "Question: ", "Problem: ", "What"))
        assert recipe.data.answer(right) == ANSWERS.get(part, "plot")
        count = {"commonsense": 1 + len(others)}.get(family, 1)
        assert batch["input_ids"].shape[0] == 2 * count and (count == 1 or right not in others)


@pytest.mark.parametrize(("family", "part", "model"), [("glue", "stsb", "bert"), ("commonsense", "siqa", "llama"), ("arithmetic", "gsm8k", "llama")])  # fmt: skip
def test_one_set_of_each_kind_is_trained(family, part, model, tmp_path, request):
    changes = stand_in(family, part, tmp_path)
    changes += ["training.use_cpu=true", "training.bf16=false", "training.max_steps=2"]
    changes += [f"model.name={request.getfixturevalue(model)}", f"training.output_dir={tmp_path / 'run'}"]
    changes += ["data.max_new_tokens=4"] if family == "arithmetic" else []
    assert main(["train", str(CONFIGS / f"{RECIPES[family]}.yaml"), *changes]) == 0
    metrics = json.loads((tmp_path / "run/metrics.json").read_text())
    metric = {"glue": "pearson", "commonsense": "choice_likelihood", "arithmetic": "exact_match"}[family]
    assert metrics["metric"] == metric and metric in metrics["after"]["validation"]


@pytest.fixture
def embedded_directories(tmp_path, monkeypatch):
    """Be where `python -m benchmarks.embedded` has been run, as far as a recipe's check looks."""
    monkeypatch.chdir(tmp_path)
    for name in embedded.ASSETS:
        (tmp_path / embedded.DIRECTORY.relative_to(embedded.ROOT) / name).mkdir(parents=True)


@pytest.mark.usefixtures("embedded_directories")
@pytest.mark.parametrize("path", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_shipped_comparisons_are_valid(path):
    comparison = compare.load(path)
    assert len(comparison.seeds) == 3 and comparison.output_dir.name == path.stem
    assert {"HyperAdapt", "LoRA r=8, all linears", "IA3", "full fine-tuning"} <= set(comparison.methods)


@pytest.mark.usefixtures("embedded_directories")
@pytest.mark.parametrize("name", OTHERS)
def test_the_other_comparisons_are_valid(name):
    assert compare.load(BENCHMARKS / f"{name}.yaml").output_dir.name == name


@pytest.mark.usefixtures("embedded_directories")
@pytest.mark.parametrize(
    "path",
    [*sorted((CONFIGS / "compare").glob("*.yaml")), *(BENCHMARKS / f"{name}.yaml" for name in OTHERS)],
    ids=lambda path: path.stem,
)
def test_the_committed_tables_are_those_of_the_committed_runs(path, tmp_path, monkeypatch):
    results = BENCHMARKS / "results" / path.stem
    shutil.copytree(results, tmp_path / "benchmarks/results" / path.stem)
    for file in tmp_path.glob("benchmarks/results/*/comparison.*"):
        file.unlink()
    alpha = 5.0 if path.stem == "film_reviews" else 1.0  # what the default was when they ran, or did not exist
    for file in tmp_path.glob("benchmarks/results/**/metrics.json"):
        # as recipes named the assets
        metrics = json.loads(file.read_text().replace('"embedded:', '".cache/embedded/'))
        if metrics["recipe"]["tuner"]["peft_type"] == "HYPERADAPT":
            metrics["recipe"]["tuner"].setdefault("alpha", alpha)
        file.write_text(json.dumps(metrics))
    comparison = compare.load(path)
    monkeypatch.setattr(compare, "_train", None)  # nothing runs
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # and nothing is drawn
    compare.compare(comparison)
    for name in ("comparison.json", "comparison.md"):
        assert (tmp_path / comparison.output_dir / name).read_text() == (results / name).read_text()


def test_a_comparison_is_chosen_on_the_metric_of_its_recipe(recipe, tmp_path):
    path = recipe(
        data=yaml.safe_load(Path(recipe()).read_text())["data"] | {"metric": "f1"}, training={"max_steps": 2}
    )
    metrics, _ = run(path)
    results = {rate: json.loads(json.dumps(metrics)) for rate in (1e-3, 1e-2)}
    results[1e-2]["after"]["validation"] |= {"f1": 0.9, "accuracy": 0.1}
    results[1e-3]["after"]["validation"] |= {"f1": 0.2, "accuracy": 0.8}
    row = compare._row("ours", results, [])
    assert (row["learning_rate"], row["validation"], row["metric"]) == (1e-2, [0.9], "f1")


def test_a_dry_run_counts_what_is_here_and_writes_nothing(recipe, tmp_path, capsys, bert):
    path = recipe()
    before = sorted(tmp_path.iterdir())
    assert main(["train", path, "training.seed=7", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert load(path, ["training.seed=7"]).resolved == yaml.safe_load(text)
    assert f"trainable outside the head: {2 * (4 * 32 + 2 * 48) + 32:,} parameters" in text
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.usefixtures("embedded_directories")
@pytest.mark.parametrize("shipped", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_dry_run_of_the_shipped_recipes_downloads_nothing(shipped, capsys):
    assert main(["train", str(shipped), "training.bf16=false", "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "parameters not counted" in text and "name" in yaml.safe_load(text)["data"]


def test_a_part_that_is_not_there(capsys):
    assert main(["train", str(CONFIGS / "hyperadapt_glue.yaml"), "data=data/glue.yaml#rta"]) == 2
    assert "data: data/glue.yaml has no part 'rta'; the nearest valid name is 'rte'" in capsys.readouterr().err
