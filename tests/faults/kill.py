"""`python -m tests.faults.kill`: kill training runs by SIGKILL, resume them, and compare with the run left alone.

    python -m tests.faults.kill [--kills 50] [--seed 0]

A run is `hyperadapt train` on a tiny model and data, with checkpoints that are rotated, dropout and shuffled data; every
second kill groups the samples by length. Half of the kills come at a random time, half at a random operation on a file of
the run. Each run is killed once and then resumed to its end. Writes benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from tqdm import tqdm

from hyperadapt_peft.cli.recipe import load
from hyperadapt_peft.cli.train import train

from ..cli.conftest import SIZES, WORDS, save_tokenizer, write_rows


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "kills.json"
SAMPLERS = ("random", "group_by_length")
FORK = multiprocessing.get_context("fork")  # a child has everything imported
COMPARED = ("before", "after", "reloaded", "steps", "parameters")  # of metrics.json


def write_recipe(directory: Path) -> Path:
    """Make a model, data and the recipe that names them."""
    torch.manual_seed(0)
    transformers.BertModel(transformers.BertConfig(vocab_size=22, **SIZES)).save_pretrained(directory / "bert")
    save_tokenizer(directory / "bert")
    rng = random.Random(0)
    rows = []
    for _ in range(90):
        label = rng.choice(["good", "bad"])
        rows.append({"text": " ".join([label, *rng.choices(WORDS[2:], k=rng.randint(1, 9))]), "label": label})
    training = {"num_train_epochs": 2, "per_device_train_batch_size": 8, "learning_rate": 1e-2, "use_cpu": True}
    training |= {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 2, "logging_steps": 5}
    recipe = {
        "task": "sequence-classification",
        "model": {"name": str(directory / "bert")},
        "data": {"name": "json", "data_files": write_rows(directory, rows)},
        "tuner": {"peft_type": "HYPERADAPT"},
        "training": {"output_dir": "?", "disable_tqdm": True, "report_to": [], **training},
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return directory / "recipe.yaml"


def run(recipe: Path, output: Path, sampler: str, resume: bool, die_at: int | None = None) -> None:
    """Train in this process; with `die_at`, kill it at that operation on a file in `output`. For a child process."""
    torch.set_num_threads(1)
    with output.with_suffix(".log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    count = kill_at(die_at, output) if die_at is not None else None
    changes = [f"training.output_dir={output}", f"training.train_sampling_strategy={sampler}"]
    train(load(recipe, changes), resume=resume, verify=True)
    if count is not None:
        output.with_suffix(".events").write_text(str(count()))


def kill_at(operation: int, directory: Path) -> Callable[[], int]:
    """Kill this process at its n-th operation on files in `directory` (never for 0); returns how to count them."""
    count = 0

    def audit(event: str, args: tuple[Any, ...]) -> None:
        nonlocal count
        if event.startswith(("open", "os.", "shutil.")) and any(str(directory) in str(arg) for arg in args):
            count += 1
            if count == operation:
                directory.with_suffix(".event").write_text(f"{event} {args[0]}".replace(str(directory), "run"))
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    return lambda: count


def child(*args: Any, kill_after: float | None = None) -> int:
    """Fork, run, kill after some seconds if asked to; returns the exit code, negative for a signal."""
    process = FORK.Process(target=run, args=args)
    process.start()
    process.join(kill_after)
    if kill_after is not None and process.is_alive():
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return process.exitcode


def outcome(output: Path) -> tuple[dict[str, bytes], dict[str, Any]]:
    """The bytes of the adapter's files, and what was measured of it."""
    files = {file.name: file.read_bytes() for file in (output / "adapter").iterdir()}
    metrics = json.loads((output / "metrics.json").read_text())
    return files, {key: metrics[key] for key in COMPARED}


def state(output: Path) -> dict[str, Any]:
    """What a killed run had on disk."""
    checkpoints = sorted(output.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    whole = {
        file.parent for file in output.glob("checkpoint-*/trainer_state.json") if file.read_bytes().endswith(b"}\n")
    }
    return {
        "checkpoints": [path.name if path in whole else f"{path.name} (incomplete)" for path in checkpoints],
        "saving": bool(list(output.glob(".saving-*"))),
        "adapter": (output / "adapter").is_dir(),
        "metrics": (output / "metrics.json").is_file(),
    }


def kills(count: int, seed: int, directory: Path) -> list[dict[str, Any]]:
    """Kill and resume `count` runs; one entry for each. Raises RuntimeError if a run left alone fails."""
    rng, recipe, expected, seconds, events = random.Random(seed), write_recipe(directory), {}, {}, {}
    for sampler in (SAMPLERS[0], *SAMPLERS):  # the first fills the cache of the data
        alone = directory / f"alone-{sampler}"
        shutil.rmtree(alone, ignore_errors=True)
        started = time.monotonic()
        if child(recipe, alone, sampler, False, 0):
            raise RuntimeError(alone.with_suffix(".log").read_text()[-2000:])
        seconds[sampler] = time.monotonic() - started
        expected[sampler], events[sampler] = outcome(alone), int(alone.with_suffix(".events").read_text())
    entries = []
    for index in tqdm(range(count), desc="kills"):
        output, sampler = directory / f"run{index}", SAMPLERS[index // 2 % 2]
        entry: dict[str, Any] = {"sampler": sampler}
        for _ in range(100):  # until a kill comes before the run's end
            shutil.rmtree(output, ignore_errors=True)
            if index % 2:
                code = child(recipe, output, sampler, False, rng.randint(1, events[sampler]))
                entry["at"] = output.with_suffix(".event").read_text()
            else:
                after = rng.uniform(0, seconds[sampler])
                code, entry["at"] = child(recipe, output, sampler, False, kill_after=after), f"{after:.2f} s"
            if code == -signal.SIGKILL:
                break
        entry |= {"killed": code == -signal.SIGKILL, **state(output)}
        entry["resumed"] = child(recipe, output, sampler, True) == 0
        entry["identical"] = entry["resumed"] and outcome(output) == expected[sampler]
        if not entry["identical"]:
            entry["log"] = output.with_suffix(".log").read_text()[-2000:]
        entries.append(entry)
        shutil.rmtree(output, ignore_errors=True)
    return entries


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults.kill")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        entries = kills(args.kills, args.seed, Path(temporary))
    counts = {key: sum(entry[key] for entry in entries) for key in ("killed", "resumed", "identical")}
    command = f"python -m tests.faults.kill --kills {args.kills} --seed {args.seed}"
    RESULTS.write_text(json.dumps({"command": command, **counts, "kills": entries}, indent=1) + "\n")
    print(*(f"{key} {count} of {args.kills}" for key, count in counts.items()), sep=", ")
    return int(counts["identical"] != args.kills)


if __name__ == "__main__":
    sys.exit(main())
