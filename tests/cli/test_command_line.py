"""The `hyperadapt` command as a process: how soon it answers, and what it gives to the processes of another command."""

import os
import subprocess
import sys
import time
from pathlib import Path

import datasets
import huggingface_hub
import pytest
from peft import get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from hyperadapt_cli import main
from hyperadapt_peft import HyperAdaptConfig


ROOT = Path(__file__).parents[2]
HYPERADAPT = [sys.executable, "-m", "hyperadapt_cli"]
# transformers looks for peft before it imports it
LOAD = """
import importlib.util, sys
assert importlib.util.find_spec("peft") is not None
from peft import PeftModel
from torch import nn
print(type(PeftModel.from_pretrained(nn.Sequential(nn.Linear(4, 4)), sys.argv[1]).base_model).__name__)
"""


def process(*command, **environment):
    path = os.pathsep.join([*environment.pop("PYTHONPATH", []), str(ROOT)])
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | environment | {"PYTHONPATH": path}
    )


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter's directory, beside a script that loads it without importing this package."""
    directory = tmp_path_factory.mktemp("adapter")
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4)), HyperAdaptConfig(target_modules=["0"]))
    model.save_pretrained(directory)
    (directory / "load.py").write_text(LOAD)
    return directory


@pytest.mark.parametrize(
    ("arguments", "code"), [(["--help"], 0), (["train", "--help"], 0), (["--version"], 0), (["plan", "--tunr"], 2)]
)
def test_help_version_and_a_wrong_option_need_no_torch(arguments, code):
    check = f"""
import sys
from hyperadapt_cli import main
try:
    main({arguments})
except SystemExit as end:
    assert "torch" not in sys.modules and "hyperadapt_peft" not in sys.modules
    sys.exit(end.code)
"""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        done = process(sys.executable, "-c", check)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == code, done.stderr
    assert min(seconds) < 1
    printed, silent = (done.stdout, done.stderr) if code == 0 else (done.stderr, done.stdout)
    assert "hyperadapt" in printed and silent == ""


def test_a_command_that_never_imports_this_package_loads_an_adapter(adapter):
    load = (sys.executable, str(adapter / "load.py"), str(adapter))
    alone = process(*load)
    assert alone.returncode == 1 and "KeyError: 'HYPERADAPT'" in alone.stderr
    done = process(*HYPERADAPT, "run", *load)
    assert (done.returncode, done.stdout) == (0, "HyperAdaptModel\n"), done.stderr


def test_the_children_of_the_command_know_the_methods_too(adapter):
    start = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, *sys.argv[1:]]))"
    load = str(adapter / "load.py"), str(adapter)
    done = process(*HYPERADAPT, "run", sys.executable, "-c", start, *load)
    assert (done.returncode, done.stdout) == (0, "HyperAdaptModel\n"), done.stderr


def test_the_sitecustomize_that_was_there_runs_as_well(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.customized = True\n")
    code = "import sys, sitecustomize; print(sys.customized, sitecustomize.__file__, 'torch' in sys.modules)"
    command = (*HYPERADAPT, "run", *HYPERADAPT, "run", sys.executable, "-c", code)  # nested, too
    done = process(*command, PYTHONPATH=[str(tmp_path)])
    assert done.stdout == f"True {tmp_path / 'sitecustomize.py'} False\n", done.stderr


def test_the_command_s_exit_code_and_options_are_its_own():
    done = process(*HYPERADAPT, "run", sys.executable, "-c", "import sys; sys.exit(int(sys.argv[2]))", "--help", "7")
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")
    done = process(*HYPERADAPT, "run", "no-such-command", "--help")
    assert (done.returncode, done.stderr) == (127, "error: no-such-command: No such file or directory\n")
    assert process(*HYPERADAPT, "run").returncode == 2


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (["train", "RECIPE", "model.name=owner/model"], "model.name"),
        (["train", "RECIPE", "data={name: owner/data}"], "data: cannot load 'owner/data'"),
        (["plan", "owner/model"], "model"),
        (["inspect", "owner/adapter"], "owner/adapter"),
    ],
)
def test_without_a_network_the_error_says_that_a_directory_works(arguments, key, recipe, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    assert main([recipe() if argument == "RECIPE" else argument for argument in arguments]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {key}: ") and line.endswith("; a local directory works too")


@pytest.mark.parametrize("command", ["plan", "bench", "inspect"])
def test_a_command_ends_with_what_to_do_next(command, tmp_path, llama, capsys):
    model = get_peft_model(LlamaForCausalLM.from_pretrained(llama), HyperAdaptConfig(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "adapter")
    sizes = ["--batch-size", "1", "--sequence-length", "8"]
    arguments = {
        "plan": [str(llama), *sizes],
        "bench": [
            "--model",
            str(llama),
            *sizes,
            "--rounds",
            "1",
            "--methods",
            "hyperadapt",
            "--output-dir",
            str(tmp_path),
        ],
        "inspect": [str(tmp_path / "adapter")],
    }
    assert main([command, *arguments[command]]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("Next: ")
