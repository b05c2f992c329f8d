"""What is said of installing the package is true of it."""

import re
from pathlib import Path


ROOT = Path(__file__).parents[1]
NAMED = (r"extra `(\w+)`", r"'\.\[([\w,]+)\]'", r"hyperadapt_peft\[([\w,]+)\]")


def test_extras_that_are_named_exist():
    _, _, table = (ROOT / "pyproject.toml").read_text().partition("[project.optional-dependencies]\n")
    extras = set(re.findall(r"^(\w+) = ", table.partition("\n[")[0], re.MULTILINE))
    assert "test" in extras
    named = {}
    texts = [ROOT / "Makefile", ROOT / "pyproject.toml", *ROOT.glob("*.md")]
    for folder in ("hyperadapt_peft", "benchmarks", "docs", "tests"):
        texts += [*(ROOT / folder).rglob("*.py"), *(ROOT / folder).rglob("*.md")]
    for file in texts:
        for pattern in NAMED:
            for group in re.findall(pattern, file.read_text()):
                named.update(dict.fromkeys(group.split(","), str(file)))
    assert {"test", "train"} <= named.keys()
    assert {name: file for name, file in named.items() if name not in extras} == {}
