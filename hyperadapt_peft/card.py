"""The part of an adapter's README that says how to install and load it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import ModelCard, ModelCardData
from peft.utils import PeftType


if TYPE_CHECKING:
    from peft.config import PeftConfig

_BEGIN, _END = "<!-- hyperadapt_peft: usage -->", "<!-- hyperadapt_peft: end of usage -->"
_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoPeftModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoPeftModelForSeq2SeqLM",
    "SEQ_CLS": "AutoPeftModelForSequenceClassification",
    "TOKEN_CLS": "AutoPeftModelForTokenClassification",
    "QUESTION_ANS": "AutoPeftModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoPeftModelForFeatureExtraction",
}
_USAGE = """\
{begin}
## Use this {peft_type} adapter

PEFT finds this adapter's method only after `import hyperadapt_peft`; without it, loading ends in
`KeyError: '{peft_type}'`.

```bash
pip install hyperadapt_peft
```

```python
import hyperadapt_peft  # registers {peft_type} with PEFT
{snippet}
```

- Base model: {base}
- Method: {peft_type}, `{config}`
{end}
"""
_AUTO_SNIPPET = """\
from peft import {auto}

adapter = "..."  # this repository's id, or this directory
model = {auto}.from_pretrained(adapter)"""
_PLAIN_SNIPPET = """\
from peft import PeftModel

adapter = "..."  # this repository's id, or this directory
base_model = ...  # {base}
model = PeftModel.from_pretrained(base_model, adapter)"""


def usage(config: PeftConfig) -> str:
    """Return the Markdown section with install line, import line, base model, method and a loading snippet."""
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "not recorded"
    auto = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    return _USAGE.format(
        begin=_BEGIN,
        end=_END,
        peft_type=PeftType(config.peft_type).value,
        snippet=_AUTO_SNIPPET.format(auto=auto) if auto else _PLAIN_SNIPPET.format(base=base),
        base=base,
        config=type(config).__name__,
    )


def add_usage(directory: str | Path, config: PeftConfig) -> None:
    """Put `usage(config)` into the README.md in `directory`, after its title; an older one is replaced.

    Metadata and text that are there already stay. A README is made if there is none.
    """
    path = Path(directory) / "README.md"
    method = PeftType(config.peft_type).value.lower()
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData(library_name="peft", base_model=config.base_model_name_or_path or None)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {method} adapter\n")
    card.data.tags = sorted({*(card.data.tags or []), method})
    text = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "", card.text, flags=re.DOTALL)
    title = re.search(r"^# .*\n+", text, flags=re.MULTILINE)
    at = title.end() if title else 0
    card.text = f"{text[:at]}{usage(config)}\n{text[at:]}"
    card.save(path)
