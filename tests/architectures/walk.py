"""One architecture's walk: adapt by default, train a step, save, load in a fresh model, compare."""

import copy
import inspect
import re
import tempfile
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from peft import NoMatchingPeftModuleError, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.tuners.common.targets import heads

from .models import build, tensors


METHODS: dict[str, type[PeftConfig]] = {"HyperAdapt": HyperAdaptConfig, "SURM": SurmConfig}
FAINT = 1e-12  # a gradient that may round to zero in an adapter: SAM's weights start at 1e-10
TASKS = {"SequenceClassification": "SEQ_CLS", "TokenClassification": "TOKEN_CLS", "QuestionAnswering": "QUESTION_ANS"}


def walk(name: str) -> dict[str, dict[str, Any]]:
    """Adapt a small model of a class of transformers by each method's default, and return what happened.

    Returns:
        By method the `status`, "adapted", "refused" or "fault", and for the last two the `reason`. A fault is: an error
        that is not the method's refusal; an adapted layer without a gradient though its weight has one in the bare
        model; outputs of the loaded adapter that are not bit by bit those of the trained one. Of the adapted: `layers`,
        their number; `warnings`, what was left out; `unused`, the adapted layers without a gradient whose weights have
        none in the bare model either, so that this forward does not use them.

    Raises:
        ValueError: If the class cannot be built.
    """
    model, inputs = build(name)
    # as PEFT's models of these want, which hand on `inputs_embeds`: BLIP's answers questions by generating, and takes none
    of_text = {"input_ids", "inputs_embeds"} <= taken(model)
    task_type = TASKS.get(name.rpartition("For")[2]) if of_text else None
    bare = copy.deepcopy(model)
    untie(bare)
    step(bare, inputs)
    used = {key for key, p in bare.named_parameters() if has_gradient(p) and p.grad.abs().max() > FAINT}
    results: dict[str, dict[str, Any]] = {}
    for method, config in METHODS.items():
        try:
            results[method] = {
                "status": "adapted",
                **adapt(copy.deepcopy(model), inputs, config(task_type=task_type), used),
            }
        except NoMatchingPeftModuleError as exc:
            results[method] = {"status": "refused", "reason": str(exc)}
        except Exception as exc:  # noqa: BLE001
            refused = type(exc) is ValueError and str(exc).startswith("Please specify")
            reason = f"{type(exc).__name__}: {exc}"[:400]
            results[method] = {"status": "refused" if refused else "fault", "reason": reason}
    return results


def taken(model: nn.Module) -> set[str]:
    """Return the names that a model's forward takes."""
    return set(inspect.signature(model.forward).parameters)


def adapt(model: Any, inputs: dict[str, torch.Tensor], config: PeftConfig, used: set[str]) -> dict[str, Any]:
    """Adapt a model, train a step, save and load it, as `walk` says; `used` has the names of the trainable weights."""
    fresh = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        adapted: Any = get_peft_model(model, config)
    layers = {key: m for key, m in model.named_modules() if isinstance(m, BaseTunerLayer)}
    step(adapted, inputs)
    without = [key for key, layer in layers.items() if not any(map(has_gradient, own_parameters(layer)))]
    if faults := [key for key in without if weight_of(key, layers[key]) in used]:
        raise AssertionError(f"no gradient: {', '.join(alike(faults))}")
    torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=1e-2).step()
    expected = outputs(adapted, inputs)
    if config.task_type:
        for head in heads(fresh) & set(config.modules_to_save or ()):  # a warning has told of others
            for p in fresh.get_submodule(head).parameters():
                p.data.normal_(generator=torch.Generator().manual_seed(5))
    with tempfile.TemporaryDirectory() as directory:
        adapted.save_pretrained(directory)
        loaded = PeftModel.from_pretrained(fresh, directory)
    if set(adapted.targeted_module_names) != set(loaded.targeted_module_names):
        raise AssertionError("the loaded adapter has other targets")
    for a, b in zip(expected, outputs(loaded, inputs), strict=True):
        if not torch.equal(a.nan_to_num(), b.nan_to_num()):
            raise AssertionError("the loaded adapter's outputs are others")
    said = [str(w.message) for w in caught if str(w.message).startswith("Not ")]
    return {"layers": len(layers), "warnings": said, "unused": alike(without)}


def untie(model: nn.Module) -> None:
    """Give each module weights of its own: a gradient of a shared one would not tell whose it is."""
    seen = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter in seen:
                setattr(module, name, nn.Parameter(parameter.detach().clone()))
            seen.add(parameter)


def step(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Compute the gradients of a loss of all that the model returns, in training mode."""
    model.train()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()  # its statistics would change, which are the base model's and not saved
    torch.manual_seed(0)
    given = tensors(model(**inputs))
    weights = [torch.linspace(0.5, 1.5, t.numel()).reshape(t.shape) for t in given]  # a mean is constant after a norm
    losses = [(t.float() * w).square().mean() for t, w in zip(given, weights, strict=True) if t.requires_grad]
    if losses:  # where nothing that is adapted was used there are none
        torch.stack(losses).sum().backward()


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Return what the model computes in eval mode, without randomness."""
    model.eval()
    torch.manual_seed(0)
    with torch.no_grad():
        return tensors(model(**inputs))


def own_parameters(layer: BaseTunerLayer) -> Iterable[nn.Parameter]:
    """Return the parameters of a tuner layer's adapters."""
    return [p for name in layer.adapter_layer_names for p in getattr(layer, name).parameters()]


def has_gradient(parameter: nn.Parameter) -> bool:
    """Return whether a parameter has a gradient, and not of zeros alone."""
    return parameter.grad is not None and bool(parameter.grad.any())


def weight_of(key: str, layer: BaseTunerLayer) -> str:
    """Return what a tuner layer's adapted parameter was called in the bare model."""
    return f"{key.replace('.base_layer', '')}.{getattr(layer, 'parameter_name', 'weight')}"


def alike(keys: Iterable[str]) -> list[str]:
    """Return names with `*` for every number, once each."""
    return sorted({re.sub(r"\b\d+\b", "*", key) for key in keys})
