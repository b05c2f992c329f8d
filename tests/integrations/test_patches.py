"""Importing the package changes in other packages what `hyperadapt_peft/integrations/__init__.py` says, and no more."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


REGISTRY = {f"PEFT_TYPE_TO_{table}_MAPPING" for table in ("CONFIG", "TUNER", "PREFIX", "MIXED_MODEL")}
ENUM = {f"peft.utils.peft_types.PeftType.{name}" for name in (
    "HYPERADAPT", "SURM", "_member_map_", "_member_names_", "_value2member_map_",
)}  # fmt: skip
MIXED = {f"peft.tuners.mixed.model.{name}" for name in ("COMPATIBLE_TUNER_TYPES", "Configs", "Layers", "PREFIXES")}
MIXED |= {"peft.tuners.mixed.COMPATIBLE_TUNER_TYPES", "peft.mixed_model.MixedModel"}
LOADING = {"transformers.integrations.peft.PeftAdapterMixin.load_adapter"}
CARD = {"huggingface_hub._commit_api.CommitOperationAdd.__init__"}
OF_A_PROCESS = {"transformers.utils.hub.SESSION_ID"} | {
    f"huggingface_hub.hf_file_system.HfFileSystem.{name}" for name in ("_cache", "_latest", "_pid")
}


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """The names of what differs between a process that imported the package and one that did not."""
    directory = tmp_path_factory.mktemp("patches")
    found = []
    for arguments in (["with"], ["without", "with"]):
        command = [sys.executable, Path(__file__).with_name("patches.py"), *arguments]
        environment = {**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": str(Path(__file__).parents[2])}
        done = subprocess.run(command, cwd=directory, env=environment, check=False, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((directory / arguments[0]).read_text())["attributes"])
    after, before = found
    assert len(before) > 10_000  # it did look
    return {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)} - OF_A_PROCESS


def test_importing_changes_what_is_listed_and_no_more(changed):
    tables = {name.rpartition(".")[2] for name in changed} & REGISTRY
    assert tables == REGISTRY
    others = {name for name in changed if name.rpartition(".")[2] not in REGISTRY}
    assert others == ENUM | MIXED | LOADING | CARD
