"""The part of an adapter's README that says how to install and load it, and how it gets to the Hub."""

from __future__ import annotations

import json
import re
import uuid
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional, cast

from huggingface_hub import CommitOperationAdd, ModelCard, ModelCardData
from peft import MODEL_TYPE_TO_PEFT_MODEL_MAPPING
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import CONFIG_NAME, PeftType

from ..version import INSTALL


if TYPE_CHECKING:
    from peft.config import PeftConfig

_BEGIN, _END = "<!-- hyperadapt_peft: usage -->", "<!-- hyperadapt_peft: end of usage -->"


def auto_class(config: PeftConfig) -> Optional[str]:
    """Return the name of PEFT's auto class for the config's task, or None if there is none."""
    model_cls = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(getattr(config.task_type, "value", config.task_type)))
    return f"Auto{model_cls.__name__}" if model_cls else None


def usage(config: PeftConfig, subfolder: str = "") -> str:
    """Return the Markdown section with install line, import line, base model, method and a loading snippet."""
    base = f"`{config.base_model_name_or_path}`" if config.base_model_name_or_path else "not recorded"
    method, auto = PeftType(config.peft_type).value, auto_class(config)
    if auto and not subfolder:  # PEFT's auto classes look for the base model in the same subfolder
        imported, loading = auto, f"model = {auto}.from_pretrained(adapter)"
    else:
        imported, where = "PeftModel", f", subfolder={subfolder!r}" if subfolder else ""
        loading = f"base_model = ...  # {base}\nmodel = PeftModel.from_pretrained(base_model, adapter{where})"
    return f"""\
{_BEGIN}
## Use this {method} adapter

PEFT finds this adapter's method only after `import hyperadapt_peft`; without it, loading ends in
`KeyError: '{method}'`.

```bash
{INSTALL}
```

```python
import hyperadapt_peft  # registers {method} with PEFT
from peft import {imported}

adapter = "..."  # this repository's id, or this directory
{loading}
```

- Base model: {base}
- Method: {method}, `{type(config).__name__}`
{_END}
"""


def add_usage(directory: str | Path, config: PeftConfig) -> None:
    """Put `usage(config)` into the README.md in `directory`; there are never two of it, nor half a file."""
    path = Path(directory) / "README.md"
    card = _with_usage(path, config)
    written = path.with_name(f".{uuid.uuid4().hex}.md")  # others may write the same README at the same time
    card.save(written)
    written.replace(path)


def _with_usage(path: Path, config: PeftConfig, subfolder: str = "") -> ModelCard:
    """Return the card in `path` with the section after its title; an older one is replaced, all else stays.

    A card is made if there is none; it does not say which library it is for, because transformers' `Trainer` takes every
    model whose README says PEFT for a `PeftModel`.
    """
    method = PeftType(config.peft_type).value.lower()
    if path.exists():
        card = ModelCard.load(path, ignore_metadata_errors=True)
    else:
        card = ModelCard(f"---\n{ModelCardData().to_yaml()}\n---\n\n# {method} adapter\n")
    card.data.base_model = card.data.get("base_model") or config.base_model_name_or_path or None
    card.data.tags = sorted({*(card.data.tags or []), method})
    text = re.sub(f"{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "", card.text, flags=re.DOTALL)
    title = re.search(r"^# .*\n+", text, flags=re.MULTILINE)
    at = title.end() if title else 0
    card.text = f"{text[:at]}{usage(config, subfolder)}\n{text[at:]}"
    return card


def keep_usage() -> None:
    """Put the section into each README that is uploaded from a directory with an adapter of this package.

    `push_to_hub` of PEFT and transformers, the Trainer and sentence-transformers write a new README over the one that
    was saved, each in its own way. What they have in common is the class that says which file is uploaded, so its
    constructor is wrapped, in memory and once. Files on the disk stay as they are, and so do all other uploads.
    """
    operation = cast(Any, CommitOperationAdd)
    init = getattr(operation.__init__, "as_given", operation.__init__)

    @wraps(init)
    def __init__(self: CommitOperationAdd, path_in_repo: str, path_or_fileobj: Any, *args: Any, **kwargs: Any) -> None:
        path = Path(path_or_fileobj) if isinstance(path_or_fileobj, (str, Path)) else None
        if path and path.name == "README.md" and path.is_file() and (found := _adapter_beside(path)):
            path_or_fileobj = str(_with_usage(path, *found)).encode()
        init(self, path_in_repo, path_or_fileobj, *args, **kwargs)

    cast(Any, __init__).as_given = init
    operation.__init__ = __init__


def _adapter_beside(readme: Path) -> Optional[tuple[PeftConfig, str]]:
    """Return the config of this package's adapter beside a README or, if that is a model's card, below it; and where."""
    paths = [readme.with_name(CONFIG_NAME)]
    if re.search("^library_name: (peft|transformers)$", readme.read_text(encoding="utf-8"), flags=re.MULTILINE):
        paths += sorted(readme.parent.glob(f"*/{CONFIG_NAME}"))  # adapters of other names than "default"
    for path in paths:
        try:
            config_cls: Any = PEFT_TYPE_TO_CONFIG_MAPPING[json.loads(path.read_text())["peft_type"]]
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not there, or none that PEFT reads
        if config_cls.__module__.partition(".")[0] == __name__.partition(".")[0]:
            subfolder = "" if path.parent == readme.parent else path.parent.name
            return config_cls.from_pretrained(str(path.parent)), subfolder
    return None
