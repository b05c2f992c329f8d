"""The notebook that serves three tasks runs, with a tiny model and a few texts."""

import json
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

from .models import save_model, save_tokenizer


NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "serve_three_tasks.ipynb"
ROW = {"family": "Ann is married to Bob.", "question": "What is Ann to Bob?"}


def test_the_notebook_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # as it is without this directory's settings
    save_model("llama", tmp_path / "model")
    save_tokenizer(tmp_path / "model")
    (tmp_path / "families").mkdir()
    for split in ("train", "test"):
        (tmp_path / "families" / f"{split}.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(ROW) + "\n")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    parameters.source = (
        f"MODEL, FAMILIES, STEPS = Path({str(tmp_path / 'model')!r}), Path({str(tmp_path / 'families')!r}), 4"
    )

    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()

    assert all(
        (tmp_path / "adapters" / task / "adapter_config.json").is_file() for task in ("people", "couples", "question")
    )
    (table,) = (cell for cell in notebook.cells if "requests =" in cell.source)
    printed = "".join(output.text for output in table.outputs if output.output_type == "stream")
    assert re.findall(r"^ *([a-z ]+?) +\d+% +\d+% +\d+%$", printed, re.MULTILINE) == [
        "people",
        "couples",
        "question",
        "base model",
    ]
