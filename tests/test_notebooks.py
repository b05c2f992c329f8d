"""Every notebook runs, with tiny models and data, publishing to a directory and to a Hub."""

import json
import os
import random
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from transformers import BertConfig, BertModel

from .cli.conftest import SIZES, WORDS, save_tokenizer
from .integrations.hub.server import Hub


NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
RUN_HERE = [path for path in sorted(NOTEBOOKS.glob("*.ipynb")) if path.stem != "serve_three_tasks"]  # by tests/vllm


@pytest.fixture(scope="module")
def assets(tmp_path_factory):
    """A tiny encoder and sentences whose label is in their words, in the layout of the embedded ones."""
    directory = tmp_path_factory.mktemp("assets")
    torch.manual_seed(0)
    BertModel(BertConfig(vocab_size=22, **SIZES)).save_pretrained(directory / "model")
    save_tokenizer(directory / "model")
    (directory / "reviews").mkdir()
    chance = random.Random(0)
    for split, count in (("train", 64), ("test", 32)):
        sentences = [" ".join(chance.choices(WORDS, k=chance.choice([3, 20]))) for _ in range(count)]
        rows = [{"sentence": s, "label": "positive" if "good" in s else "negative"} for s in sentences]
        (directory / "reviews" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return directory


@pytest.mark.parametrize(
    "path, place",
    [(NOTEBOOKS / "many_adapters.ipynb", "hub"), *((path, "directory") for path in RUN_HERE)],
    ids=lambda value: getattr(value, "stem", value),
)
def test_every_notebook_runs(path, place, assets, tmp_path, monkeypatch):
    monkeypatch.setenv("NOTEBOOK_ASSETS", str(assets))
    monkeypatch.setenv("PYTHONPATH", str(NOTEBOOKS.parent), prepend=os.pathsep)
    monkeypatch.delenv("HF_USER", raising=False)
    hub = Hub()
    if place == "hub":
        for key, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(key, value)
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
            monkeypatch.delenv(key, raising=False)
        monkeypatch.setenv("HF_USER", "user")
        hub.start()
    try:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=60, resources={"metadata": {"path": str(tmp_path)}}).execute()
    finally:
        if place == "hub":
            hub.stop()
    if path.stem == "many_adapters":
        assert (tmp_path / "many-adapters").is_dir() == (place == "directory")
        assert len(hub.repos) == (place == "hub")


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebooks_are_committed_with_small_outputs(path):
    assert path.stat().st_size < 100_000
    nbformat.validate(nbformat.read(path, as_version=4))
