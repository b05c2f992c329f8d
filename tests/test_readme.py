"""Every Python snippet of the README runs, in order, in a directory where the Hub ids are tiny local models."""

import re
from pathlib import Path

from transformers import RobertaConfig, RobertaForSequenceClassification

from .tiny import SIZES, build


README = Path(__file__).parents[1] / "README.md"


def test_every_snippet_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    build("llama")[0].save_pretrained("HuggingFaceTB/SmolLM2-135M")
    RobertaForSequenceClassification(RobertaConfig(**SIZES)).save_pretrained("FacebookAI/roberta-base")
    snippets = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(snippets) >= 4
    for snippet in snippets:
        exec(compile(snippet, "README.md", "exec"), {})  # noqa: S102


def test_every_recipe_the_readme_names_exists():
    for name in re.findall(r"configs/[\w/]+\.yaml", README.read_text()):
        assert (README.parent / name).is_file(), name
