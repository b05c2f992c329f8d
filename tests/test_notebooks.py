"""Every notebook runs, with tiny models and data, publishing to a directory and to a Hub; what is committed is whole."""

import ast
import os
import random
import re

import nbformat
import pytest
import torch
from datasets import ClassLabel, Dataset
from transformers import BertConfig, BertModel

from benchmarks.embedded import ASSETS
from benchmarks.notebooks import NOTEBOOKS, VLLM, colab, offline_values, parameters, refer, run

from .cli.conftest import SIZES, WORDS, save_tokenizer
from .integrations.hub.server import Hub


PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
RUN_HERE = [path for path in PATHS if path.stem != VLLM]
TINY = {"EPOCHS": 1, "STEPS": 3}  # those of them that a notebook has


def assignments(source):
    return {node.targets[0].id: ast.literal_eval(node.value) for node in ast.parse(source).body}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=22, **SIZES)).save_pretrained(directory)
    save_tokenizer(directory)
    return directory


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    """Sentences whose label is in their words, with the columns of the Hub's data set and of the embedded one."""
    directory = tmp_path_factory.mktemp("reviews")
    chance = random.Random(0)
    for split, count in (("train", 64), ("validation", 32), ("test", 32)):
        sentences = [" ".join(chance.choices(WORDS, k=chance.choice([3, 20]))) for _ in range(count)]
        good = ["good" in sentence for sentence in sentences]
        hub = Dataset.from_dict({"text": sentences, "label": [int(value) for value in good]})
        hub = hub.cast_column("label", ClassLabel(names=["neg", "pos"]))
        hub.to_parquet(directory / "hub" / f"{split}.parquet")
        names = ["positive" if value else "negative" for value in good]
        embedded = Dataset.from_dict({"sentence": sentences, "label": names})
        embedded.to_json(directory / "embedded" / f"{split}.jsonl")
    return directory


@pytest.mark.parametrize("source", ["hub", "embedded"])
@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: path.stem)
def test_every_notebook_runs(path, source, model, reviews, tmp_path, monkeypatch):
    hub = Hub()
    for key, value in hub.environment(tmp_path / "home").items():
        monkeypatch.setenv(key, value)
    for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=os.pathsep)
    notebook = nbformat.read(path, as_version=4)
    names = re.findall(r"^([A-Z_]+) = ", parameters(notebook).source, re.MULTILINE)
    values = {"MODEL": str(model), "DATA": str(reviews / source), **TINY}
    if source == "hub":
        values["REPOSITORY"] = "user/many-adapters"
    hub.start()
    try:
        values = "\n".join(f"{name} = {value!r}" for name, value in values.items() if name in names)
        run(notebook, values, tmp_path, timeout=120)
    finally:
        hub.stop()
    if path.stem == "many_adapters":
        assert (tmp_path / "many-adapters").is_dir() == (source == "embedded")
        assert len(hub.repos) == (source == "hub")


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_with_the_outputs_of_a_whole_run(path):
    assert path.stat().st_size < 300_000
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    assert {output.output_type for output in outputs} <= {"stream", "display_data", "execute_result"}
    assert not any(output.get("name") == "stderr" for output in outputs)


@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: path.stem)
def test_a_notebook_begins_with_its_parameters_the_hubs_and_the_offline_ones(path):
    notebook = nbformat.read(path, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    assert first is parameters(notebook)
    given, offline = assignments(first.source), assignments(offline_values(notebook))
    assert re.fullmatch(r"[\w-]+/[\w.-]+", given["MODEL"])
    assert offline.keys() <= given.keys()
    made = re.search(r"`python -m benchmarks\.embedded ([\w -]+)`", first.source)[1].split()
    assert offline["MODEL"] == f"../.cache/embedded/{made[0]}"
    assert set(made) <= ASSETS.keys()


@pytest.mark.parametrize("path", RUN_HERE, ids=lambda path: path.stem)
def test_a_notebook_names_the_one_install_source(path):
    notebook = nbformat.read(path, as_version=4)
    assert colab(path) in notebook.cells[0].source
    assert "\nSOURCE = " in parameters(notebook).source
    refer(notebook, path)
    assert notebook == nbformat.read(path, as_version=4)


def test_the_badge_opens_the_notebook_on_github_once_the_package_is_there(monkeypatch):
    monkeypatch.setattr("benchmarks.notebooks.INSTALL", "pip install git+https://github.com/owner/name.git")
    assert "(https://colab.research.google.com/github/owner/name/blob/main/notebooks/ranks.ipynb)" in colab(
        NOTEBOOKS / "ranks.ipynb"
    )
