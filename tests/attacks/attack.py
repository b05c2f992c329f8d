"""What an attack is: a saved adapter, made bad by a few lines, and the refusal that every way of loading it must end in."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load, save_file

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.adapters.hotswap import hotswap_adapter

from ..tiny import build


CONFIGS = {
    "hyperadapt": lambda **fields: HyperAdaptConfig(init_weights=False, **fields),
    "surm": lambda **fields: SurmConfig(structure="ldr", init_weights=False, **fields),
}


class Attack(NamedTuple):
    """`spoil` makes the adapter in a directory bad; loading it must raise one of `errors` whose message matches `says`.

    Where PEFT has added the adapter and then does not get as far as to show the tuner its tensors, it is `unread`.
    """

    spoil: Callable[[Path], None]
    errors: type[Exception] | tuple[type[Exception], ...]
    says: str
    entries: tuple[str, ...]
    unread: bool = False


class Attacks(list[Attack]):
    """The attacks of one file, in a decorator: `@attacks(ValueError, "lacks the tensor")`."""

    def __call__(
        self,
        errors: type[Exception] | tuple[type[Exception], ...],
        says: str,
        entries: tuple[str, ...] = (),
        unread: bool = False,
    ) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
        def add(spoil: Callable[[Path], None]) -> Callable[[Path], None]:
            self.append(Attack(spoil, errors, says, entries or tuple(ENTRIES), unread))
            return spoil

        return add

    def cases(self, but: tuple[str, ...] = ()) -> pytest.MarkDecorator:
        """Every attack, by every entry point it concerns, but these."""
        cases = [
            pytest.param(attack, entry, id=f"{attack.spoil.__name__}-{entry}")
            for attack in self
            for entry in attack.entries
            if entry not in but
        ]
        return pytest.mark.parametrize("attack, entry", cases)


# ----------------------------------------------------------------------------------------------------------------------
# Spoiling
# ----------------------------------------------------------------------------------------------------------------------


def save_good(method: str, path: Path, **fields: Any) -> None:
    get_peft_model(build("llama")[0], CONFIGS[method](**fields)).save_pretrained(path)


def weights(adapter: Path) -> Path:
    return adapter / "adapter_model.safetensors"


def read_tensors(adapter: Path) -> dict[str, torch.Tensor]:
    return load(weights(adapter).read_bytes())  # not mapped: the file will be written over


@contextmanager
def tensors(adapter: Path) -> Iterator[dict[str, torch.Tensor]]:
    """The tensors of the adapter's file, to be changed."""
    state = read_tensors(adapter)
    yield state
    save_file(state, weights(adapter))


def edit_config(adapter: Path, **fields: Any) -> None:
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# ----------------------------------------------------------------------------------------------------------------------
# Loading, and what must be as it was
# ----------------------------------------------------------------------------------------------------------------------


def bare(good: Path) -> Any:
    return build("llama")[0]


def with_peft(good: Path) -> Any:
    return PeftModel.from_pretrained(build("llama")[0], good, adapter_name="first")


def with_native(good: Path) -> Any:
    model = build("llama")[0]
    model.load_adapter(str(good), adapter_name="first")
    return model


class Entry(NamedTuple):
    prepare: Callable[[Path], Any]
    load: Callable[[Any, Path], Any]


ENTRIES = {
    "from_pretrained": Entry(bare, lambda model, path: PeftModel.from_pretrained(model, path)),
    "low_cpu_mem_usage": Entry(
        bare, lambda model, path: PeftModel.from_pretrained(model, path, low_cpu_mem_usage=True)
    ),
    "load_adapter": Entry(with_peft, lambda model, path: model.load_adapter(path, "second")),
    "native": Entry(bare, lambda model, path: model.load_adapter(str(path))),
    "native_second": Entry(with_native, lambda model, path: model.load_adapter(str(path), adapter_name="second")),
    "hotswap": Entry(with_peft, lambda model, path: hotswap_adapter(model, path, "first")),
}
PEFT_S = ("from_pretrained", "low_cpu_mem_usage", "load_adapter")  # they add the adapter before they read its weights
NOT_HOTSWAP = tuple(entry for entry in ENTRIES if entry != "hotswap")


def snapshot(model: Any) -> dict[str, Any]:
    """All that a refused load must leave as it was."""
    with torch.no_grad():
        logits = model(input_ids=torch.arange(24).reshape(2, 12)).logits
    return {
        "outputs": logits,
        "weights": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "modules": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "trained": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "adapters": {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()},
        "attributes": set(vars(model)),
    }


@contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Check that the block leaves the model as it was: its bits, modules, adapters, outputs and flags."""
    before = snapshot(model)
    yield
    after = snapshot(model)
    for key in ("modules", "training", "trained", "adapters", "attributes"):
        assert before[key] == after[key], key
    assert before["weights"].keys() == after["weights"].keys()
    for name, tensor in before["weights"].items():
        assert torch.equal(tensor, after["weights"][name]), name
    assert torch.equal(before["outputs"], after["outputs"])


@contextmanager
def harmless(model: Any) -> Iterator[None]:
    """Check that the block leaves at most an adapter more that changes nothing: the same outputs from the same bits."""

    def bare(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {
            re.sub(r"\.(base_layer|original_module|token_adapter)(?=\.)", "", key): t for key, t in weights.items()
        }

    before = snapshot(model)
    yield
    after = snapshot(model)
    weights = bare(after["weights"])
    assert all(torch.equal(tensor, weights[name]) for name, tensor in bare(before["weights"]).items())
    assert torch.equal(before["outputs"], after["outputs"])


def check_refused(attack: Attack, entry: str, good: Path, bad: Path) -> None:
    """Spoil the adapter in `bad` and check that it is refused with the stated cause and leaves no trace, or unread no harm."""
    attack.spoil(bad)
    prepare, load = ENTRIES[entry]
    model = prepare(good)
    says = f"{attack.says}|where the loaded one has" if entry == "hotswap" else attack.says
    left = harmless if attack.unread and entry in PEFT_S else untouched
    with left(model), pytest.raises(attack.errors, match=says):
        load(model, bad)
