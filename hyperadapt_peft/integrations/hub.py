"""The part of an adapter's README that says how to install and load it, and how it gets to the Hub."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

from huggingface_hub import ModelCard, ModelCardData
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, PeftType
from transformers.utils import PushToHubMixin


if TYPE_CHECKING:
    from peft import PeftModel
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
model = PeftModel.from_pretrained(base_model, adapter{subfolder})"""


def usage(config: PeftConfig, subfolder: str = "") -> str:
    """Return the Markdown section with install line, import line, base model, method and a loading snippet."""
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "not recorded"
    auto = _AUTO_CLASSES.get(str(getattr(config.task_type, "value", config.task_type)))
    if auto and not subfolder:  # PEFT's auto classes look for the base model in the same subfolder
        snippet = _AUTO_SNIPPET.format(auto=auto)
    else:
        snippet = _PLAIN_SNIPPET.format(base=base, subfolder=f", subfolder={subfolder!r}" if subfolder else "")
    return _USAGE.format(
        begin=_BEGIN,
        end=_END,
        peft_type=PeftType(config.peft_type).value,
        snippet=snippet,
        base=base,
        config=type(config).__name__,
    )


def add_usage(directory: str | Path, config: PeftConfig, subfolder: str = "", tags: Iterable[str] = ()) -> None:
    """Put `usage(config)` into the README.md in `directory`, after its title; an older one is replaced.

    Metadata and text that are there already stay. A README is made if there is none; it does not say which library it
    is for, because transformers' `Trainer` takes every model whose README says PEFT for a `PeftModel`.

    Args:
        directory (`str | Path`): Where the README is, or will be.
        config ([`PeftConfig`]): The adapter's configuration.
        subfolder (`str`): Where in `directory` the adapter is.
        tags (`Iterable[str]`): More tags to put into the metadata.
    """
    path = Path(directory) / "README.md"
    method = PeftType(config.peft_type).value.lower()
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        data = ModelCardData(base_model=config.base_model_name_or_path or None)
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {method} adapter\n")
    card.data.tags = sorted({*(card.data.tags or []), *tags, method})
    text = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "", card.text, flags=re.DOTALL)
    title = re.search(r"^# .*\n+", text, flags=re.MULTILINE)
    at = title.end() if title else 0
    card.text = f"{text[:at]}{usage(config, subfolder)}\n{text[at:]}"
    card.save(path)


def keep_usage() -> None:
    """Make the section survive those who write a new README over it: `push_to_hub` and transformers' `Trainer`.

    Two methods are wrapped, in memory and once: the one that writes PEFT's part of a `PeftModel`'s README, and the one
    by which every `push_to_hub` (of a `PeftModel`, of a transformers model with an adapter, of a config) uploads a
    directory. For all that is not an adapter of this package they do exactly what they did; should one of them be gone,
    both stay as they are, with one warning.
    """
    from peft import PeftModel

    model, mixin = cast(Any, PeftModel), cast(Any, PushToHubMixin)
    try:
        write, upload = model.create_or_update_model_card, mixin._upload_modified_files
    except AttributeError as exc:
        warnings.warn(f"The README of a pushed adapter will not say how to load it: {exc}", stacklevel=2)
        return
    if hasattr(upload, "keeps_usage"):
        return

    @wraps(write)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        name = "default" if "default" in self.peft_config else self.active_adapter
        config, readme = self.peft_config[name], Path(output_dir) / "README.md"
        if not is_own(type(config)):
            return write(self, output_dir)
        tags = ModelCard.load(readme).data.tags if readme.exists() else None
        write(self, output_dir)  # drops the tags that are there
        add_usage(output_dir, config, subfolder="" if name == "default" else name, tags=tags or ())

    @wraps(upload)
    def _upload_modified_files(self: PushToHubMixin, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self, PeftModel) and is_own(type(self.active_peft_config)):
            self.create_or_update_model_card(working_dir)
        elif config := _own_config_in(working_dir):
            add_usage(working_dir, config)
        return upload(self, working_dir, *args, **kwargs)

    cast(Any, _upload_modified_files).keeps_usage = True
    model.create_or_update_model_card, mixin._upload_modified_files = (
        create_or_update_model_card,
        _upload_modified_files,
    )


def is_own(config_cls: Any) -> bool:
    """Whether a config class is of this package."""
    return getattr(config_cls, "__module__", "").partition(".")[0] == __name__.partition(".")[0]


def _own_config_in(directory: str | Path) -> Optional[PeftConfig]:
    path = Path(directory) / CONFIG_NAME
    peft_type: Any = json.loads(path.read_text()).get("peft_type") if path.exists() else None
    config_cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING.get(peft_type)
    return config_cls.from_pretrained(str(directory)) if is_own(config_cls) else None
