"""Mutated adapter files: each is loaded or refused, in time, and leaves the model as it was.

`python -m tests.attacks.fuzz --files 10000 --seed 0` writes benchmarks/results/fuzz.json.
"""

from __future__ import annotations

import argparse
import collections
import json
import pickle
import random
import shutil
import signal
import struct
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from safetensors import SafetensorError
from safetensors.torch import load, save_file
from torch import nn
from tqdm import tqdm

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


ROOT = Path(__file__).resolve().parents[2]
SECONDS = 10  # for one file; loading takes a hundredth of that
REFUSALS = (SafetensorError, ValueError, TypeError, RuntimeError, KeyError, OSError, pickle.UnpicklingError)
HOOK = "_remap_adapter_state_dict_for_load"  # where PEFT shows the tuner what it has read
IDS = torch.arange(8)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


class Net(nn.Module):
    """A small model with everything an adapter file can write to: layers, a head saved whole, an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(8, 6)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(6, 5), "down": nn.Linear(5, 6)}) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)))
        return self.head(x)


ADAPTERS: dict[str, Callable[[], Any]] = {
    "hyperadapt": lambda: HyperAdaptConfig(
        target_modules=["up", "down"], init_weights=False, modules_to_save=["head"]
    ),
    "hyperadapt-embedding": lambda: HyperAdaptConfig(
        target_modules=["embed", "up"], init_weights=False, sides="column"
    ),
    "surm": lambda: SurmConfig(target_modules=["up", "down"], init_weights=False, structure="toeplitz"),
    "surm-adapter": lambda: SurmConfig(
        target_modules=["down"], init_weights=False, placement="sequential", trainable_token_indices=[1, 2]
    ),
}


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


# ----------------------------------------------------------------------------------------------------------------------
# Mutations
# ----------------------------------------------------------------------------------------------------------------------


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    """Flip, overwrite, cut, repeat or insert bytes, in one to three places."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, kind = rng.randrange(len(out) + 1), rng.randrange(5)
        if kind == 0 and at < len(out):
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at : at + rng.randint(1, 8)] = rng.randbytes(rng.randint(1, 8))
        elif kind == 2:
            del out[at : at + rng.choice([1, 8, 64, len(out)])]
        elif kind == 3:
            out[at:at] = out[at : at + rng.randint(1, 200)]
        else:
            out[at:at] = rng.choice(
                [b"\0", b'"', b"{", b"}", b"[", b"]", b",", b"-", b"9" * 20, b"\xff", rng.randbytes(4)]
            )
    return bytes(out)


def mutate_header(rng: random.Random, data: bytes) -> bytes:
    """Change one value in the header of a safetensors file, or its length."""
    length = struct.unpack("<Q", data[:8])[0]
    if rng.random() < 0.1:
        return (
            struct.pack(
                "<Q", rng.choice([0, 1, length - 1, length + 1, 2 * length, 2**32, 2**63, rng.getrandbits(64)])
            )
            + data[8:]
        )
    header = json.loads(data[8 : 8 + length])
    name = rng.choice([key for key in header if key != "__metadata__"])
    numbers = [0, 1, -1, 2**31, 2**62, 2**64, 1.5, None, "1", [], rng.randrange(1000)]
    kind = rng.randrange(6)
    if kind == 0:
        header[name]["dtype"] = rng.choice(
            ["F64", "F16", "BF16", "I32", "I64", "BOOL", "F8_E4M3", "C64", "U8", "X", None, 3]
        )
    elif kind == 1:
        header[name]["shape"] = rng.choice(
            [[], [0], [rng.choice(numbers)], [*header[name]["shape"], 1], [2**40, 2**40], None]
        )
    elif kind == 2:
        header[name]["data_offsets"][rng.randrange(2)] = rng.choice(numbers)
    elif kind == 3:
        header[rng.choice([name + "x", name[1:], "", "base_model.model.embed.weight"])] = header.pop(name)
    elif kind == 4:
        del header[name]
    else:
        other = rng.choice([key for key in header if key != "__metadata__"])
        header[name], header[other] = header[other], header[name]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate_tensors(rng: random.Random, data: bytes, path: Path) -> None:
    """Change a tensor's values, dtype, shape or name, or add or remove one."""
    state = load(data)
    name = rng.choice(sorted(state))
    tensor = state[name]
    kind = rng.randrange(8)
    if kind == 0:
        state[name] = tensor * rng.choice([1e10, 1e38, 1e-40, -1.0, 0.0])
    elif kind == 1:
        tensor.view(-1)[rng.randrange(tensor.numel())] = rng.choice([torch.nan, torch.inf, -torch.inf, 3e38, -1.0])
    elif kind == 2:
        dtypes = [torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.bool, torch.complex64]
        state[name] = tensor.to(rng.choice([*dtypes, torch.float8_e4m3fn, torch.float8_e5m2]))
    elif kind == 3:
        state[name] = rng.choice(
            [tensor[None], tensor.flatten(), tensor[:-1], tensor[:0], torch.cat([tensor, tensor]), tensor.sum()]
        ).clone()
    elif kind == 4:
        del state[name]
    elif kind == 5:
        parts = name.split(".")
        i = rng.randrange(len(parts))
        parts[i] = rng.choice([parts[i] + "x", "", "default", "..", "base_layer", "0", "weight", "head", "embed"])
        state[".".join(parts)] = state.pop(name)
    elif kind == 6:
        base = rng.choice(
            ["embed.weight", "layers.0.up.weight", "layers.0.up.base_layer.weight", "head.weight", "head.bias"]
        )
        state[rng.choice(["base_model.model.", "", "model."]) + base] = torch.randn(
            rng.randint(1, 8), rng.randint(1, 8)
        )
    else:
        other = rng.choice(sorted(state))
        state[name], state[other] = state[other].clone(), state[name].clone()
    save_file(state, path)


VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2**40, 0.5, float("nan"), float("inf"), "", "x", ".*", "up", "all-linear", "(", "..", [], {},
    ["up"], [""], [1], [None], {"up": 1}, {"up": [1]}, [[]], ["embed"], [1, 2, 3], "none", "all", "default", "\0", "ldr", "adapter",
]  # fmt: skip


def mutate_config(rng: random.Random, text: str) -> str:
    """Change one to three fields, to values of any type or to each other's."""
    config = json.loads(text)
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(sorted(config))
        kind = rng.randrange(5)
        if kind == 0:
            del config[key]
        elif kind == 1:
            config[rng.choice(["__class__", "lora_alpha", "x" * 1000, "runtime_config", key + "_"])] = rng.choice(
                VALUES
            )
        elif kind == 2:
            config[key] = config[rng.choice(sorted(config))] if config else None
        else:
            config[key] = rng.choice(VALUES)
        if not config:
            break
    return json.dumps(config)


def mutate(rng: random.Random, adapter: Path) -> str:
    """Change one file of an adapter; returns how."""
    kind = rng.choice(["weights' bytes", "header", "tensors", "tensors", "config's bytes", "config's fields"])
    data = (adapter / WEIGHTS).read_bytes()
    if kind == "weights' bytes":
        (adapter / WEIGHTS).write_bytes(mutate_bytes(rng, data))
    elif kind == "header":
        (adapter / WEIGHTS).write_bytes(mutate_header(rng, data))
    elif kind == "tensors":
        mutate_tensors(rng, data, adapter / WEIGHTS)
    elif kind == "config's bytes":
        (adapter / CONFIG).write_bytes(mutate_bytes(rng, (adapter / CONFIG).read_bytes()))
    else:
        (adapter / CONFIG).write_text(mutate_config(rng, (adapter / CONFIG).read_text()))
    return kind


# ----------------------------------------------------------------------------------------------------------------------
# Loading
# ----------------------------------------------------------------------------------------------------------------------


class Hang(Exception):
    """A file was not read in time."""


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise Hang(f"not loaded and not refused in {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def state_of(model: nn.Module) -> dict[str, Any]:
    return {
        "modules": [(name, type(module), module.training) for name, module in model.named_modules()],
        "names": sorted(model.state_dict()),
        "trained": [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        "adapters": sorted(getattr(model, "peft_config", {})),
    }


def replaceable(name: str) -> bool:
    """Whether a file may replace this for good: embeddings and biases, which PEFT saves with adapters (SECURITY.md)."""
    return name.endswith(("embed.weight", "embed.base_layer.weight", ".bias")) and ".modules_to_save." not in name


def fuzz(files: int, seed: int, progress: bool = False) -> dict[str, Any]:
    """Load mutated files, into a bare model or beside another adapter; return counts and what went wrong."""
    rng = random.Random(seed)
    counts: collections.Counter[str] = collections.Counter()
    failures = []
    with tempfile.TemporaryDirectory() as tmp, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        good = {name: Path(tmp) / name for name in ADAPTERS}
        for name, config in ADAPTERS.items():
            get_peft_model(net(), config()).save_pretrained(good[name])
        models: dict[tuple[str, bool], nn.Module] = {}  # reused until a load succeeds
        for number in tqdm(range(files), disable=not progress, desc="files"):
            name, second = rng.choice(sorted(ADAPTERS)), rng.random() < 0.5
            bad = Path(shutil.copytree(good[name], Path(tmp) / "bad"))
            kind = mutate(rng, bad)
            if (name, second) not in models:
                models[name, second] = (
                    PeftModel.from_pretrained(net(), good[name], adapter_name="first") if second else net()
                )
            model: Any = models[name, second]
            shown, outputs = True, model(IDS)
            before, values = state_of(model), [(key, p, p.clone()) for key, p in model.named_parameters()]
            try:
                with time_limit(SECONDS):
                    model.load_adapter(bad, "second") if second else PeftModel.from_pretrained(model, bad)
                outcome = "loaded"
                del models[name, second]
                if second:
                    model.delete_adapter("second")
            except REFUSALS as exc:
                outcome = f"refused: {type(exc).__name__}"
                shown = any(frame.name == HOOK for frame in traceback.extract_tb(exc.__traceback__))
            except BaseException as exc:  # noqa: BLE001  (whatever else it is, it is a failure)
                outcome = f"failed: {type(exc).__name__}: {exc}"
            different = [
                key
                for key, p, old in values
                if not torch.equal(p, old) and not (outcome == "loaded" and replaceable(key))
            ]
            if outcome != "loaded":
                after = state_of(model)
                changed = [key for key in before if before[key] != after[key]]
                if shown or not torch.equal(model(IDS), outputs):
                    different += changed
                elif changed:  # an adapter that changes nothing: PEFT did not get as far as the tuner's hook
                    outcome += ", an untrained adapter left"
                    del models[name, second]
            counts[f"{kind}: {outcome}"] += 1
            if different or outcome.startswith("failed"):
                failures.append(
                    {"file": number, "adapter": name, "kind": kind, "outcome": outcome, "changed": different}
                )
                models.pop((name, second), None)
            shutil.rmtree(bad)
    return {"files": files, "seed": seed, "outcomes": dict(sorted(counts.items())), "failures": failures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = fuzz(args.files, args.seed, progress=True)
    result = {"command": f"python -m tests.attacks.fuzz --files {args.files} --seed {args.seed}", **result}
    (ROOT / "benchmarks" / "results" / "fuzz.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result["outcomes"], indent=2))
    if result["failures"]:
        raise SystemExit(f"{len(result['failures'])} failures: {result['failures'][:5]}")


if __name__ == "__main__":
    main()
