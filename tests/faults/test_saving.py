"""Saves that others disturb: two processes at once, and, by `hyperadapt train`, a kill or a full disk half way."""

import random
import resource
import shutil
import time

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.cli.train import whole_directory

from .kill import FORK, kill_at


X = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
# Pairs of adapters whose tensors have the same names and shapes: no check of the tensors tells them apart.
PAIRS = {
    "surm": (SurmConfig(alpha=1.0, target_modules=["0"]), SurmConfig(alpha=3.0, target_modules=["0"])),
    "hyperadapt": (
        HyperAdaptConfig(target_modules=["0"]),
        HyperAdaptConfig(target_modules=["0"], inference_mode=True),
    ),
}


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8)).eval()


def adapted(config, value):
    model = get_peft_model(base(), config).eval()
    for name, parameter in model.named_parameters():
        if "default" in name:
            parameter.data = torch.full_like(parameter, value)
    return model


@pytest.fixture(params=PAIRS)
def models(request):
    old, new = PAIRS[request.param]
    return adapted(old, 0.25), adapted(new, 0.5)


def files(directory):
    return {str(file.relative_to(directory)): file.read_bytes() for file in directory.rglob("*") if file.is_file()}


@torch.no_grad()
def loaded(directory, models):
    """Which of the models is in the directory, or None if it is refused; an error if it is neither."""
    try:
        logits = PeftModel.from_pretrained(base(), directory)(X)
    except (OSError, ValueError) as error:
        assert "adapter_config.json" in str(error)
        return None
    (which,) = [name for name, model in zip(("old", "new"), models, strict=True) if torch.equal(model(X), logits)]
    return which


def save_run(model, directory):
    with whole_directory(directory) as new:
        model.save_pretrained(new)


def killed(model, directory, operation):
    torch.set_num_threads(1)
    count = kill_at(operation, directory.parent)
    save_run(model, directory)
    directory.with_suffix(".count").write_text(str(count()))


@pytest.mark.parametrize("models", ["surm"], indirect=True)
def test_killed_at_every_operation_on_a_file(models, tmp_path):
    old, new = models
    found, operation = [], 0
    while not (tmp_path / "work" / "adapter.count").exists():
        operation += 1
        shutil.rmtree(tmp_path / "work", ignore_errors=True)
        directory = tmp_path / "work" / "adapter"
        old.save_pretrained(directory)
        process = FORK.Process(target=killed, args=(new, directory, operation))
        process.start()
        process.join()
        found.append(loaded(directory, models))
    order = {"old": 0, None: 1, "new": 2}
    assert [order[which] for which in found] == sorted(order[which] for which in found) and set(found) == set(order)
    save_run(new, directory)
    assert loaded(directory, models) == "new" and not list(directory.rglob(".saving-*"))


def save_fifty_times(model, directory, barrier, seed):
    torch.set_num_threads(1)
    delay = random.Random(seed)
    for _ in range(50):
        barrier.wait()
        time.sleep(delay.uniform(0, 0.02))
        save_run(model, directory)
        barrier.wait()


@pytest.mark.parametrize("models", ["surm"], indirect=True)
def test_two_processes_that_save_one_adapter_leave_each_other_s_files_alone(models, tmp_path):
    directory, barrier = tmp_path / "adapter", FORK.Barrier(3, timeout=60)
    processes = [
        FORK.Process(target=save_fifty_times, args=(model, directory, barrier, seed))
        for seed, model in enumerate(models)
    ]
    for process in processes:
        process.start()
    for _ in range(50):
        barrier.wait()
        barrier.wait()
        assert loaded(directory, models) in ("old", "new")
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize("room", [10, 300, 700])  # bytes a file may have: not even the weights, not the config, ...
def test_a_full_disk_changes_nothing(models, room, tmp_path):
    directory = tmp_path / "adapter"
    models[0].save_pretrained(directory)
    before = files(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        with pytest.raises(Exception, match="(?i)file too large"):
            save_run(models[1], directory)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files(tmp_path) == before and loaded(directory, models) == "old"


def save_at_a_random_time(model, directory, seed):
    torch.set_num_threads(1)
    time.sleep(random.Random(seed).uniform(0, 0.02))
    model.save_pretrained(directory)


@pytest.mark.parametrize("models", ["surm"], indirect=True)
def test_two_processes_save_one_adapter_into_one_directory(models, tmp_path):
    """As every rank of an FSDP recipe does, which has no main process of its own."""
    _, model = models
    for attempt in range(50):
        directory = tmp_path / str(attempt % 5)  # new ones first, then over those
        processes = [
            FORK.Process(target=save_at_a_random_time, args=(model, directory, 2 * attempt + i)) for i in (0, 1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        assert [process.exitcode for process in processes] == [0, 0]
        assert loaded(directory, models) == "new"
        assert (directory / "README.md").read_text().count("import hyperadapt_peft ") == 1
        assert {file.name for file in directory.iterdir()} == {
            "README.md", "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip


def test_other_adapters_and_files_stay(models, tmp_path):
    models[0].save_pretrained(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "README.md").write_text((tmp_path / "README.md").read_text() + "\nMy results.\n")
    other = get_peft_model(base(), PAIRS["surm"][0], adapter_name="other")
    other.save_pretrained(tmp_path)
    assert loaded(tmp_path, models) == "old" and (tmp_path / "other" / "adapter_config.json").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine" and "My results." in (tmp_path / "README.md").read_text()
