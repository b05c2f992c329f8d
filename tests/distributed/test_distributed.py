"""Training on two processes with the engines that accelerate knows, as far as they run on a CPU."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from hyperadapt_cli import main
from tests import tiny
from tests.cli.conftest import save_tokenizer, write_rows

from .training import CLI_TUNERS, CONFIGS, TUNERS, launch_environment, train


ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "accelerate.commands.launch", "--main_process_port", "0")


def run(*command: str) -> str:
    """Run Python with `command`; returns what it printed."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, check=False, env=environment, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


@pytest.fixture(scope="module")
def recipe(tmp_path_factory) -> Path:
    """A recipe whose evaluation splits do not divide by the number of processes; nothing in it is random."""
    directory = tmp_path_factory.mktemp("recipe")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**tiny.SIZES, "vocab_size": 22}, eos_token_id=3, initializer_range=0.3)
    transformers.LlamaForCausalLM(config).save_pretrained(directory / "llama")
    save_tokenizer(directory / "llama")
    rng = random.Random(0)
    words = [
        [rng.choice(["good", "bad"]), *rng.choices(["film", "plot", "very"], k=rng.randint(2, 5))] for _ in range(95)
    ]
    content = {
        "task": "sequence-classification",
        "model": {"name": str(directory / "llama")},
        "data": {
            "name": "json",
            "data_files": write_rows(directory, [{"text": " ".join(row), "label": row[0]} for row in words]),
            "max_validation_samples": 13,
        },
        "tuner": {"peft_type": "HYPERADAPT"},
        "training": {
            "output_dir": str(directory / "run"),
            "max_steps": 20,
            "learning_rate": 1e-2,
            "per_device_train_batch_size": 4,
            "use_cpu": True,
            "disable_tqdm": True,
            "save_strategy": "no",
        },
    }
    path = directory / "recipe.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


@pytest.fixture(scope="module")
def base(recipe) -> Path:
    """A base model on disk, beside the recipe."""
    tiny.build("llama")[0].save_pretrained(recipe.parent / "base")
    return recipe.parent / "base"


@pytest.fixture(scope="module")
def two_processes(base) -> Path:
    """The directory in which two processes have run every part of `worker`."""
    command = (
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.distributed.worker",
    )
    (base.parent / "stdout").write_text(run(*command, str(base.parent)))
    return base.parent


@pytest.fixture(scope="module")
def one_process(base, tmp_path_factory):
    """Tuner -> the scales that one process trains."""
    scales = {}
    for tuner in TUNERS:
        directory = tmp_path_factory.mktemp(tuner)
        train(tuner, base, directory, use_cpu=True)
        scales[tuner] = load_file(directory / "adapter" / "adapter_model.safetensors")
        assert min(tensor.abs().max() for tensor in scales[tuner].values()) > 0.01  # far from where they began
    return scales


def assert_equal(directory: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_file(directory / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("config", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_shipped_configs(config):
    environment = launch_environment(config.stem)
    engine, _, version = config.stem.rpartition("_")[2].partition("fsdp")
    if version:
        assert (environment["ACCELERATE_USE_FSDP"], environment["FSDP_VERSION"]) == ("true", version)
        assert environment["FSDP_STATE_DICT_TYPE"] == "FULL_STATE_DICT"  # without it the Trainer saves no adapter
    elif engine.startswith("zero"):
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == engine[-1]
    assert environment["ACCELERATE_MIXED_PRECISION"] == "no"


WRAPPERS = {
    "ddp": "DistributedDataParallel",
    "fsdp2": "FSDPPeftModelForCausalLM",
    "deepspeed_zero2": "DeepSpeedEngine",
    "deepspeed_zero3": "DeepSpeedEngine",
}


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.parametrize("engine", WRAPPERS)
def test_two_processes_train_what_one_does(two_processes, one_process, base, engine, tuner):
    if engine.startswith("deepspeed"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    directory = two_processes / f"{engine}-{tuner}"
    assert (directory / "engine").read_text() == WRAPPERS[engine]
    assert ((directory / "weights").read_text() == "0") == (engine == "deepspeed_zero3")  # sharded since it was loaded
    assert (directory / "checkpoint-10" / "trainer_state.json").is_file()
    for saved in ("adapter", "resumed"):
        assert_equal(directory / saved, one_process[tuner])
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), directory / "adapter")
    loaded = {
        name.replace(".default", ""): tensor for name, tensor in model.state_dict().items() if f"{tuner}_" in name
    }
    assert_equal(directory / "adapter", loaded)


def test_fsdp1_wraps_both_ways(two_processes):
    said = json.loads((two_processes / "fsdp1.json").read_text())
    for method in ("hyperadapt", "surm", "lora"):
        assert said[f"{method} True"] == said[f"{method} False"] == "ran"
    for method in ("ia3", "road", "vera"):  # whose parameters are no modules of their own
        assert said[f"{method} True"] == "ran"
        assert "Must flatten tensors with uniform `requires_grad`" in said[f"{method} False"]


def test_tensor_parallel_layers_are_refused_and_fsdp2_layers_are_not(two_processes):
    said = json.loads((two_processes / "meshes.json").read_text())
    assert "sharded by tensor parallelism" in said.pop("tp")
    assert len(said) == 5
    for name, (rows, columns, error) in said.items():
        assert (name, rows, columns) == (name, 6, 8) and error < 1e-6


def test_grouping_by_length_gives_every_row_to_one_process(two_processes):
    first, second = json.loads((two_processes / "order.json").read_text())
    assert len(first) == len(second) == 24 and sorted(first + second) == list(range(48))


def test_the_command_line_in_two_processes(two_processes, recipe, tmp_path):
    codes = json.loads((two_processes / "codes.json").read_text())
    assert codes == [0, 2, 0, 0, 0, 2]  # the directory is taken; FSDP cannot evaluate before it trains
    printed = (two_processes / "stdout").read_text()
    assert printed.count("test accuracy after") == 4  # one table per run
    options = ["training.per_device_train_batch_size=8", "--verify"]
    assert main(["train", str(recipe), f"training.output_dir={tmp_path}", *options]) == 0
    found = two_processes / "recipe-ddp"
    assert sorted(file.name for file in found.iterdir()) == ["adapter", "metrics.json"]
    one, two = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path, found))
    assert one["after"] != one["before"]
    for when in ("before", "after", "reloaded"):
        for split in ("validation", "test"):
            assert two[when][split]["accuracy"] == one[when][split]["accuracy"]
    for key in ("steps", "parameters", "labels", "adapter_bytes"):
        assert two[key] == one[key]
    assert_equal(found / "adapter", load_file(tmp_path / "adapter" / "adapter_model.safetensors"))


@pytest.mark.parametrize("name", CLI_TUNERS)
def test_the_command_line_under_fsdp2_trains_and_saves_what_one_process_does(two_processes, recipe, tmp_path, name):
    changes = [
        f"training.output_dir={tmp_path}",
        "training.per_device_train_batch_size=8",
        f"tuner={CLI_TUNERS[name]}",
    ]
    assert main(["train", str(recipe), *changes]) == 0
    found = two_processes / f"recipe-fsdp2-{name}"
    assert sorted(file.name for file in found.iterdir()) == ["adapter", "metrics.json"]
    assert not (found / "adapter" / "training_args.bin").exists()
    assert_equal(found / "adapter", load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    one, two = (json.loads((path / "metrics.json").read_text()) for path in (tmp_path, found))
    ddp = json.loads((two_processes / "recipe-ddp" / "metrics.json").read_text())
    if name == "hyperadapt":  # the Trainer averages the loss over each process's batches, so one process has another
        assert two["after"]["test"]["loss"] == pytest.approx(ddp["after"]["test"]["loss"], rel=1e-3)
    assert two["after"]["test"]["accuracy"] == one["after"]["test"]["accuracy"]
    for key in ("steps", "parameters", "labels", "adapter_bytes"):
        assert two[key] == one[key]


def test_accelerate_launches_the_command_line(recipe, tmp_path):
    config = str(CONFIGS / "ddp.yaml")
    changes = ["training.max_steps=2", f"training.output_dir={tmp_path}"]
    printed = run(*LAUNCH, "--config_file", config, "-m", "hyperadapt_peft", "train", str(recipe), *changes)
    assert printed.count("test accuracy after") == 1
    assert json.loads((tmp_path / "metrics.json").read_text())["steps"] == 2
