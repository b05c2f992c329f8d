"""Which layers an adapter can be put on, told from what they are and how they are used, whatever they are called."""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
import warnings
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from typing import Any, Optional

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .config import TargetConfig
from .layer import named_modules_around_adapters
from .quantization import quantization_backend


_KNOWN_LAYERS = (nn.Linear, Conv1D, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_KNOWN_FORWARDS = {layer.forward for layer in _KNOWN_LAYERS}
_QUANTIZED = ("optimum.quanto.", "transformers.integrations.finegrained_fp8")  # modules of layers without a backend

_GENERATION = "transformers.generation.utils"  # by name: importing it takes long

# What can be asked of a weight, or done with it, that does not use its values.
_METADATA = {"device", "dim", "dtype", "is_cuda", "is_meta", "ndim", "numel", "requires_grad", "shape", "size"}
_ASKS = {"hasattr", "id", "isinstance", "type"}
_LIKE = {"empty_like", "full_like", "ones_like", "to", "type_as", "zeros_like"}
_CHANGES = re.compile("fuse_projections|init|reset|resize|tie")  # names of methods that make or change a module
# Read only with settings that no published model has (`pretraining_tp` > 1 with `slow_but_exact`, `z_steps` > 1), and
# called else.
_READ_NEVER = {("BloomAttention", "dense"), ("BloomMLP", "dense_4h_to_h"), ("DisentangledSelfAttention", "in_proj")}

# How PEFT ends the names of new heads, which it trains whole, by task.
_CLASSIFIERS = ("classifier", "score")
_NEW_HEADS = {"SEQ_CLS": _CLASSIFIERS, "TOKEN_CLS": _CLASSIFIERS, "QUESTION_ANS": ("qa_outputs",)}
_USUAL_HEADS = {"classification_head", "classifier", "qa_outputs", "score"}


def outer_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that PEFT compares with `target_modules`: those that are not inside tuner layers."""
    inside_tuner_layer: tuple[str, ...] = ()
    for key, module in named_modules_around_adapters(model):
        if not key or key.startswith(inside_tuner_layer or ("\0",)):
            continue
        if isinstance(module, BaseTunerLayer):
            inside_tuner_layer += (f"{key}.",)
        yield key, module


def target_exactly(names: set[str], config: TargetConfig, model: nn.Module) -> None:
    """Make a config target the modules of these full names, and no others that end so too."""
    config.target_modules = names
    config.layers_to_transform = config.layers_pattern = None  # the names say which
    for key, _ in outer_modules(model):
        parts = key.split(".")
        if key not in names and any(".".join(parts[i:]) in names for i in range(1, len(parts))):
            # a PeftMixedModel gives its own names to the modules when it adds an adapter
            config.target_modules = rf"(?:base_model\.model\.)?(?:{'|'.join(map(re.escape, sorted(names)))})"
            return


def heads(model: nn.Module) -> set[str]:
    """Return the names of the modules in which a model ends, or one of transformers' models inside it.

    They are what a head model has beside its base model; of a model that is no head model, children with usual names.
    """
    found = {name for name, _ in model.named_children() if name in _USUAL_HEADS}
    for key, module in model.named_modules():
        base = module.base_model if isinstance(module, PreTrainedModel) else module
        if base is not module:
            found |= {
                f"{key}.{name}".lstrip(".")
                for name, child in module.named_children()
                if child is not base and next(child.parameters(), None) is not None
            }
    return found


def save_heads(config: TargetConfig, model: nn.Module) -> None:
    """Name in `modules_to_save` all that PEFT will train whole, and the new heads of the config's task.

    PEFT wraps each module whose name ends in one of `modules_to_save`, but keeps adapters off those alone that are
    called so. It knows new heads as `classifier`, `score` and `qa_outputs`.
    """
    endings = (*(config.modules_to_save or ()), *_NEW_HEADS.get(config.task_type or "", ()))
    keys = [key for key, _ in outer_modules(model)]
    wrapped = [key for key in keys if endings and key.endswith(endings)]
    alone = tuple(ending for ending in endings if "." not in ending)  # a full name is one module's
    saved = {key.rpartition(".")[2] for key in wrapped if alone and key.endswith(alone)}
    if config.task_type in _NEW_HEADS and config.format_version != 1:  # files of format 1 lack the others
        for head in sorted(head for head in heads(model) - saved if "." not in head):
            if any(key.endswith(head) for key in keys if key != head) or any(
                k.startswith(f"{head}.") for k in wrapped
            ):
                warnings.warn(f"Not trained nor saved, because PEFT would wrap other modules or wrap twice: {head}")
            else:
                saved.add(head)
    if new := saved.difference(config.modules_to_save or ()):
        config.modules_to_save = [*(config.modules_to_save or ()), *sorted(new)]


def refusal(model: nn.Module, key: str) -> Optional[str]:
    """Return why a module must not be adapted though its kind can be, or None."""
    layer = model.get_submodule(key)
    layer = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer
    if not has_known_forward(layer):
        return f"the forward of {type(layer).__qualname__} is its own, and what an adapter would do there is not known"
    parent = model.get_submodule(key.rpartition(".")[0])
    lists = [value for value in vars(parent).values() if isinstance(value, (list, tuple))]
    if any(item is layer for value in lists for item in value):
        return "the module around it calls it from a list of its own, where an adapter would not be"
    if is_read_uncalled(model, key):
        return "a module around it reads its weight without calling it, so an adapter on it would be ignored"
    return None


def has_known_forward(layer: nn.Module) -> bool:
    """Return whether a layer's forward is torch's, transformers' or a quantization's for its kind, or computes the same.

    A sub-class with a forward of its own may split its input into groups, or return something else beside its output.
    That it computes the same (Falcon's linear layers), or a multiple of it (Gemma's embeddings), is tried on a copy
    with a tiny weight.
    """
    is_quantized = type(layer).__module__.startswith(_QUANTIZED) or quantization_backend(layer) is not None
    if type(layer).forward in _KNOWN_FORWARDS or is_quantized:
        return True
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (torch.randn(size, generator=generator) for size in ((5, 7), (5,), (2, 3, 7)))
    kind: type[nn.Module]
    copy: Any = object.__new__(type(layer))
    copy.__dict__.update(layer.__dict__, _parameters={"weight": weight})
    if isinstance(layer, nn.Linear):
        kind, copy.out_features, copy.in_features = nn.Linear, 5, 7
        copy._parameters["bias"] = None if layer.bias is None else bias
    elif isinstance(layer, nn.Embedding):
        kind, copy.num_embeddings, copy.embedding_dim = nn.Embedding, 5, 7
        x = torch.tensor([[4, 0, 2], [1, 1, 3]])
    else:
        return False
    try:
        with torch.no_grad():
            copy._buffers = {name: buffer.cpu() for name, buffer in layer.named_buffers(recurse=False)}
            expected, output = kind.forward(copy, x), type(layer).forward(copy, x)  # not a hook's in its place
            factor = (output / expected).mean() if kind is nn.Embedding else 1
            return torch.allclose(output, factor * expected, atol=1e-5)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):  # it wants something else
        return False


def is_read_uncalled(model: nn.Module, key: str) -> bool:
    """Return whether a module that contains the module `key` uses its weight without calling it.

    An adapter there would be without effect. Told from the source of the containing modules' `forward`, and of the
    methods that it uses.
    """
    parts = key.split(".")
    for depth in range(len(parts)):
        owner, inside = model.get_submodule(".".join(parts[:depth])), ".".join(parts[depth:])
        if any(fnmatch(inside, pattern) for pattern in _read_weights(type(owner))):  # type: ignore[arg-type]
            return True
    return False


@cache
def _read_weights(cls: type[nn.Module]) -> frozenset[str]:
    """Return the paths, from an instance, of the modules whose `.weight` the class reads when it is used.

    `*` stands for an index.
    """
    bases = [base for base in cls.__mro__ if base not in PreTrainedModel.__mro__ and base.__module__ != _GENERATION]
    reached = [name for base in bases for name in vars(base) if not name.startswith("_") and not _CHANGES.search(name)]
    found = set()
    for name in reached:  # grows
        for base in bases:
            if (function := _parsed(vars(base).get(name))) is None:
                continue
            paths = _paths(function)
            parents = {child: parent for parent in ast.walk(function) for child in ast.iter_child_nodes(parent)}
            for node, path in paths.items():
                if path.endswith(".weight") and "." in path[:-7] and _uses_values(node, parents):
                    found.add(path[1:-7])
                elif path.count(".") == 1 and path[1:] not in reached and callable(getattr(cls, path[1:], None)):
                    reached.append(path[1:])
    return frozenset(path for path in found if not any((base.__name__, path) in _READ_NEVER for base in bases))


def _parsed(function: Any) -> Optional[ast.FunctionDef]:
    function = inspect.unwrap(getattr(function, "__func__", getattr(function, "fget", function)))
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError):  # not Python's, or its source is not there
        return None
    return tree if isinstance(tree, ast.FunctionDef) and tree.args.args else None


def _paths(function: ast.FunctionDef) -> dict[ast.expr, str]:
    """Return the expressions in a method that are paths from its first argument, such as `.q_proj.weight`."""
    variables, named = {function.args.args[0].arg: ""}, set[ast.expr]()

    def path(node: ast.expr) -> Optional[str]:
        if isinstance(node, ast.Name):
            return variables.get(node.id)
        if not isinstance(node, (ast.Attribute, ast.Subscript)) or (start := path(node.value)) is None:
            return None
        return f"{start}.{node.attr if isinstance(node, ast.Attribute) else '*'}"

    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            target, value, item = node.targets[0], node.value, ""
        elif isinstance(node, ast.For):
            target, value, item = node.target, node.iter, ".*"
        else:
            continue
        if isinstance(target, ast.Name) and (start := path(value)):
            variables[target.id] = start + item
            named.add(value)
    loads = (ast.Attribute, ast.Name)
    nodes = [n for n in ast.walk(function) if isinstance(n, loads) and isinstance(n.ctx, ast.Load) and n not in named]
    return {node: found for node in nodes if (found := path(node))}


def _uses_values(node: ast.expr, parents: dict[ast.AST, ast.AST]) -> bool:
    parent = parents[node]
    if isinstance(parent, ast.Attribute):
        return parent.attr not in _METADATA and _uses_values(parent, parents)
    if isinstance(parent, ast.Call):
        if node is parent.func:  # a method of the weight
            return _uses_values(parent, parents)
        called = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return called not in (_LIKE if isinstance(parent.func, ast.Attribute) else _ASKS)
    if isinstance(parent, ast.Compare):
        return not any(isinstance(operator, (ast.Is, ast.IsNot)) for operator in parent.ops)
    return not isinstance(parent, ast.Expr)  # which drops what it gets, such as that of `clamp_`
