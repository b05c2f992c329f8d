"""Saving an adapter over another: what is in the directory is the old one or the new one, or is refused."""

from __future__ import annotations

import inspect
import os
import shutil
import tempfile
from functools import wraps
from pathlib import Path
from typing import Any, cast

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME

from .hub import is_own


def save_whole() -> None:
    """Make `PeftModel.save_pretrained` save this package's adapters whole or not at all.

    PEFT writes the weights and then the config into the directory. Cut off in between, over an adapter of other
    settings and the same shapes, it leaves an adapter that loads and is neither. Here a save that fails (a full disk)
    changes nothing. One that is killed leaves the old adapter, the new one, or for the moment in which files are
    exchanged no config, without which PEFT refuses the directory.

    The method is wrapped in memory and once, and does what it did for all that is not an adapter of this package.
    transformers' own `model.save_pretrained` is not wrapped; it writes the config first.
    """
    from peft import PeftModel

    save = PeftModel.save_pretrained
    if hasattr(save, "saves_whole"):
        return

    @wraps(save)
    def save_pretrained(self: PeftModel, save_directory: str, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(save).bind(self, save_directory, *args, **kwargs).arguments
        own = any(is_own(type(config)) for config in self.peft_config.values())
        if not own or not given.get("is_main_process", True) or os.path.isfile(save_directory):
            return save(self, save_directory, *args, **kwargs)
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        for left in directory.glob(".saving-*"):  # by a process that was killed
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as temporary:
            if (directory / "README.md").exists():
                shutil.copy(directory / "README.md", temporary)  # is completed, not replaced
            save(self, temporary, *args, **kwargs)
            _move(Path(temporary), directory)

    cast(Any, save_pretrained).saves_whole = True
    cast(Any, PeftModel).save_pretrained = save_pretrained


def _move(source: Path, directory: Path) -> None:
    """Move what was saved into its place: away with the old configs and weights, then the files, the configs last."""
    files = [file.relative_to(source) for file in source.rglob("*") if file.is_file()]
    for config in [file for file in files if file.name == CONFIG_NAME]:
        for name in (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            (directory / config.with_name(name)).unlink(missing_ok=True)
    for file in sorted(files, key=lambda file: file.name == CONFIG_NAME):
        (directory / file).parent.mkdir(exist_ok=True)
        (source / file).replace(directory / file)
