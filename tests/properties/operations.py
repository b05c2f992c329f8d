"""Random sequences of adapter operations against a dense model of them in float64.

`python -m tests.properties.operations --sequences 2000 --seed 0` writes benchmarks/results/operations.json.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from tqdm import tqdm

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


ROOT = Path(__file__).resolve().parents[2]
TOLERANCE = 1e-6  # of the outputs, relative to the largest one, in float32 as in float64
NAMES = ("one", "two", "three", "four")
STRUCTURES = ("circulant", "toeplitz", "kronecker", "ldr")
Matrices = dict[str, Tensor]  # layer -> float64 matrix


def base(dtype: torch.dtype) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4, bias=False)).to(dtype).eval()


class Dense:
    """What the operations mean: two weight matrices, and per adapter what it makes of them.

    HyperAdapt: per layer the offsets of rows and columns; SURM: per layer the added matrix. Both taken from the file
    format's tensors by formulas that share nothing with the package but the definitions.
    """

    def __init__(self, model: nn.Sequential) -> None:
        self.weights: Matrices = {key: getattr(model, key).weight.detach().double().clone() for key in ("0", "2")}
        self.bias = model[0].bias.detach().double()
        self.updates: dict[str, dict[str, Any]] = {}
        self.strengths: dict[str, float] = {}
        self.active: list[str] = []
        self.merged: list[str] = []
        self.enabled = True

    def weight(self, key: str, names: list[str]) -> Tensor:
        weight = self.weights[key]
        for name in names:
            update, s = self.updates[name].get(key), self.strengths[name]
            if isinstance(update, tuple):
                row, column = update
                weight = (1 + s * row)[:, None] * weight * (1 + s * column)
            elif update is not None:
                weight = weight + update
        return weight

    def output(self, x: Tensor, names: list[str] | None = None) -> Tensor:
        """The output with these adapters, or with those that are in use."""
        used = {key: self.names_used(key) if names is None else names for key in self.weights}
        hidden = torch.tanh(x.double() @ self.weight("0", used["0"]).T + self.bias)
        return hidden @ self.weight("2", used["2"]).T

    def names_used(self, key: str) -> list[str]:
        """A layer into which something is merged uses that, the others what is active: as PEFT, layer by layer."""
        merged = [name for name in self.merged if key in self.updates[name]]
        return (merged or self.active) if self.enabled else []


def offsets(layer: Any, name: str, alpha: float) -> tuple[Tensor, Tensor]:
    """(row, column) offsets from 1 in float64, zeros on a side that has none."""
    sides = []
    for side, size in (("hyperadapt_row", layer.out_features), ("hyperadapt_column", layer.in_features)):
        scales = getattr(layer, side)
        sides.append(alpha * scales[name].weight.detach().double() if name in scales else torch.zeros(size).double())
    return sides[0], sides[1]


def dense_surm(layer: Any, name: str, config: SurmConfig) -> Tensor:
    """alpha dW by the definition of each structure, entry by entry."""
    first, second = (part[name].weight.detach().double() for part in (layer.surm_A, layer.surm_B))
    rows, columns = layer.out_features, layer.in_features
    if config.structure == "kronecker":
        matrix = torch.kron(first, second)
    elif config.structure == "toeplitz":
        inner = torch.stack([torch.stack([first[abs(i - j)] for j in range(columns)]) for i in range(columns)])
        outer = torch.stack([torch.stack([second[abs(i - j)] for j in range(columns)]) for i in range(rows)])
        matrix = outer @ inner
    else:
        n = max(rows, columns)

        def wrapped(v: Tensor, f: int) -> Tensor:
            return torch.stack(
                [torch.stack([v[i - j] if i >= j else f * v[n + i - j] for j in range(n)]) for i in range(n)]
            )

        if config.structure == "circulant":
            matrix = wrapped(first * second, 1)
        else:
            matrix = sum(
                (wrapped(g, 1) @ wrapped(h, -1) for g, h in zip(first, second, strict=True)), torch.zeros(n, n)
            )
        matrix = matrix[:rows, :columns]
    return config.alpha * matrix


class Sequence:
    """One model under random operations, and the dense one beside it."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.method = self.rng.choice(("hyperadapt", "surm"))
        self.dtype = self.rng.choice((torch.float32, torch.float64))
        self.done: list[str] = []
        model = base(self.dtype)
        self.bits = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        self.dense = Dense(model)
        torch.manual_seed(seed)
        name = self.rng.choice(NAMES)
        self.model: Any = get_peft_model(model, self.config(), adapter_name=name, autocast_adapter_dtype=False).eval()
        self.model.requires_grad_(False)
        self.dense.active = [name]
        self.learn(name)

    def config(self) -> HyperAdaptConfig | SurmConfig:
        targets = self.rng.choice((["0", "2"], ["0"], ["2"]))
        if self.method == "hyperadapt":
            sides: Any = self.rng.choice(("both", "both", "row", "column"))
            alpha = self.rng.choice((1.0, 5.0, -0.5))
            return HyperAdaptConfig(target_modules=targets, sides=sides, init_weights=False, alpha=alpha)
        structure: Any = self.rng.choice(STRUCTURES)
        r = self.rng.randint(1, 3) if structure == "ldr" else 1
        return SurmConfig(
            target_modules=targets, structure=structure, r=r, alpha=self.rng.choice((1, 0.5)), init_weights=False
        )

    def learn(self, name: str) -> None:
        """Tell the dense model what an adapter does."""
        updates: dict[str, Any] = {}
        for key in ("0", "2"):
            layer = self.layer(key)
            if isinstance(layer, nn.Linear) or name not in layer._get_available_adapters():
                continue
            config = self.model.peft_config[name]
            if self.method == "hyperadapt":
                updates[key] = offsets(layer, name, config.alpha)
            else:
                updates[key] = dense_surm(layer, name, config)
        self.dense.updates[name], self.dense.strengths[name] = updates, 1.0

    def layer(self, key: str) -> Any:
        return getattr(self.model.base_model.model, key)

    @property
    def names(self) -> list[str]:
        return list(self.dense.updates)

    # ---- operations: each returns whether it applied ----

    def add(self) -> bool:
        free = [name for name in NAMES if name not in self.names]
        if not free or self.dense.merged or not self.dense.enabled:  # PEFT enables the layers of a new adapter
            return False
        self.model.add_adapter(free[0], self.config(), autocast_adapter_dtype=False)
        self.learn(free[0])
        return True

    def set(self) -> bool:
        if self.dense.merged:
            return False
        names = self.rng.sample(self.names, self.rng.randint(1, len(self.names)))
        self.model.set_adapter(names[0], inference_mode=True)  # PeftModel's own takes one name only
        self.model.base_model.set_adapter(names, inference_mode=True)
        self.dense.active = names
        return True

    def merge(self) -> bool:
        if self.dense.merged or not self.dense.enabled:
            return False
        names = self.rng.sample(self.names, self.rng.randint(1, len(self.names)))
        self.model.merge_adapter(names, safe_merge=self.rng.random() < 0.5)
        self.dense.merged = names
        return True

    def merge_more(self) -> bool:
        rest = [name for name in self.names if name not in self.dense.merged]
        if not self.dense.merged or not rest:
            return False
        self.model.merge_adapter([rest[0]])
        self.dense.merged = [*self.dense.merged, rest[0]]
        return True

    def unmerge(self) -> bool:
        if not self.dense.merged:
            return False
        self.model.unmerge_adapter()
        self.dense.merged = []
        return True

    def delete(self) -> bool:
        if len(self.names) < 2 or self.dense.merged:
            return False
        name = self.rng.choice(self.names)
        if self.dense.active[0] == name:
            return False  # PEFT then activates another one of its choice, layer by layer
        self.model.delete_adapter(name)
        del self.dense.updates[name]
        self.dense.active = [other for other in self.dense.active if other != name]
        return True

    def toggle(self) -> bool:
        if self.dense.merged:
            return False
        self.dense.enabled = not self.dense.enabled
        if self.dense.enabled:
            self.model.base_model.enable_adapter_layers()
        else:
            self.model.base_model.disable_adapter_layers()
        return True

    def disable_for_one_call(self) -> bool:
        x = self.inputs()
        if self.dense.merged or not self.dense.enabled:
            return False
        with self.model.disable_adapter():
            self.compare(self.model(x), self.dense.output(x, []))
        self.model.requires_grad_(False)
        return True

    def set_scale(self) -> bool:
        if self.method != "hyperadapt" or self.dense.merged:
            return False
        name, strength = self.rng.choice(self.names), self.rng.choice((-1.0, 0.0, 0.5, 1.0, 1.5))
        self.model.set_scale(name, strength)
        self.dense.strengths[name] = strength
        return True

    def combine(self) -> bool:
        """`product` is the adapters active together, each at its weight; the other types have gauges (test_algebra)."""
        free = [name for name in NAMES if name not in self.names]
        if self.method != "hyperadapt" or not free or self.dense.merged or not self.dense.enabled:
            return False
        names = self.rng.sample(self.names, self.rng.randint(1, len(self.names)))
        weights = [self.rng.choice((-0.5, 0.5, 1.0)) for _ in names]
        self.model.add_weighted_adapter(names, weights, free[0], "product")
        updates: dict[str, Any] = {}
        for key in ("0", "2"):
            present = [
                (self.dense.updates[n][key], w)
                for n, w in zip(names, weights, strict=True)
                if key in self.dense.updates[n]
            ]
            if present:
                row, column = (torch.ones(size).double() for size in self.dense.weights[key].shape)
                for (d_row, d_column), weight in present:
                    row, column = row * (1 + weight * d_row), column * (1 + weight * d_column)
                updates[key] = row - 1, column - 1
        self.dense.updates[free[0]], self.dense.strengths[free[0]] = updates, 1.0
        return True

    def mixed_batch(self) -> bool:
        if self.dense.merged or not self.dense.enabled:
            return False
        x = self.inputs()
        names = [self.rng.choice([*self.names, "__base__"]) for _ in x]
        expected = [
            self.dense.output(row[None], [] if name == "__base__" else [name])
            for row, name in zip(x, names, strict=True)
        ]
        self.compare(self.model(x, adapter_names=names), torch.cat(expected))
        return True

    def save_and_load(self) -> bool:
        if self.dense.merged or not self.dense.enabled:
            return False
        with tempfile.TemporaryDirectory() as tmp:
            name = self.rng.choice(self.names)
            self.model.save_pretrained(tmp, selected_adapters=[name])
            loaded: Any = PeftModel.from_pretrained(
                base(self.dtype), Path(tmp) / name, adapter_name="again", autocast_adapter_dtype=False
            )
        x, strength = self.inputs(), self.dense.strengths[name]
        self.dense.strengths[name] = 1.0  # it is not saved
        self.compare(loaded(x), self.dense.output(x, [name]))
        self.dense.strengths[name] = strength
        return True

    OPERATIONS = (add, add, set, set, merge, merge_more, unmerge, delete, toggle, disable_for_one_call, set_scale, combine,
                  mixed_batch, save_and_load)  # fmt: skip

    # ---- running ----

    def inputs(self) -> Tensor:
        generator = torch.Generator().manual_seed(self.rng.randrange(2**31))
        return torch.randn(4, 6, generator=generator, dtype=self.dtype)

    def compare(self, output: Tensor, expected: Tensor) -> None:
        error = float((output.double() - expected).abs().max() / expected.abs().max().clamp(min=1))
        self.error = max(getattr(self, "error", 0.0), error)
        assert error <= TOLERANCE, f"{self.method}, {self.dtype}: error {error:.2g} after {self.done}"

    @torch.no_grad()
    def run(self, operations: int) -> float:
        """Do so many operations, compare after each, and check the base weights' bits at the end; returns the error."""
        while len(self.done) < operations:
            operation = self.rng.choice(self.OPERATIONS)
            self.done.append(operation.__name__)
            if not operation(self):
                self.done.pop()
                continue
            x = self.inputs()
            self.compare(self.model(x), self.dense.output(x))
        if self.dense.merged:
            self.model.unmerge_adapter()
        state = self.model.unload().state_dict()
        assert state.keys() == self.bits.keys()
        for key, tensor in self.bits.items():
            assert torch.equal(state[key], tensor), f"{key} changed by {self.done}"
        return self.error


def run(sequences: int, seed: int, progress: bool = False) -> dict[str, Any]:
    """Run sequences of 5 to 25 operations; raises AssertionError with the operations on a difference."""
    worst: dict[str, float] = {}
    counts: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in tqdm(range(sequences), disable=not progress, desc="sequences"):
            sequence = Sequence(seed * 10**6 + number)
            error = sequence.run(random.Random(number).randint(5, 25))
            key = f"{sequence.method}, {str(sequence.dtype).removeprefix('torch.')}"
            worst[key] = max(worst.get(key, 0.0), error)
            for name in sequence.done:
                counts[name] = counts.get(name, 0) + 1
    return {
        "sequences": sequences,
        "seed": seed,
        "largest error, relative to max(1, largest output)": worst,
        "operations": dict(sorted(counts.items())),
        "base weights bit-identical": True,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    result = run(args.sequences, args.seed, progress=True)
    command = f"python -m tests.properties.operations --sequences {args.sequences} --seed {args.seed}"
    (ROOT / "benchmarks" / "results" / "operations.json").write_text(
        json.dumps({"command": command, **result}, indent=2) + "\n"
    )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
