"""The methods under test, their rows in upstream's tables, and everything we leave out, with the reason.

Our rows are LoRA's rows: what a table asks of LoRA it asks of us. LoRA's own hyperparameters are dropped from a row,
what is left must be a field of our config, and rows that have become equal are run once.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
from _pytest.mark import ParameterSet
from peft import BOFTConfig, IA3Config, LoraConfig, OFTConfig, PeftConfig


@dataclasses.dataclass(frozen=True)
class Method:
    """A config class that takes part in the tests.

    `variants` are further settings, each run on the first row of every custom model; `unsupported` maps a model or a
    target module of upstream's to the reason why its rows are skipped; `capabilities` open the gates in
    `upstream.PATCHES`. A `baseline` runs upstream's own rows, for comparison.
    """

    config_cls: type[PeftConfig]
    variants: tuple[dict[str, Any], ...] = ()
    unsupported: dict[str, str] = dataclasses.field(default_factory=dict)
    capabilities: frozenset[str] = frozenset()
    baseline: bool = False


MHA = "torch reads the projections of nn.MultiheadAttention without calling them: refused with an error, by design"


def _hyperadapt() -> Method:
    from hyperadapt_peft import HyperAdaptConfig

    return Method(
        HyperAdaptConfig,
        variants=({"sides": "row"}, {"sides": "column"}),
        unsupported={"mha": MHA},
        capabilities=frozenset({"conv", "conv1d", "gain", "merge", "mixed batches", "mixed models", "weighted"}),
    )


MATRICES = "SURM is defined for matrices: linear layers and transformers' Conv1D"


def _surm() -> Method:
    from hyperadapt_peft import SurmConfig

    convolutions = ("Conv1d", "Conv2d", "Conv2dGroups", "Conv2dGroups2", "Conv3d", "conv2d")
    return Method(
        SurmConfig,
        variants=(
            {"structure": "circulant"},
            {"structure": "toeplitz"},
            {"structure": "ldr", "r": 2},
            {"placement": "sequential"},
        ),
        unsupported={"mha": MHA} | dict.fromkeys((*convolutions, "emb", "embed_tokens", "l2.*"), MATRICES),
        capabilities=frozenset({"conv1d", "merge", "mixed batches", "mixed models"}),
    )


METHODS: dict[str, Callable[[], Method]] = {
    "hyperadapt": _hyperadapt,
    "surm": _surm,
    "ia3": lambda: Method(IA3Config, baseline=True),
    "lora": lambda: Method(LoraConfig, baseline=True),
}


class Exclusion(NamedTuple):
    """Tests that do not run: `tests` is a regular expression over `file::class::function[id]`."""

    methods: tuple[str, ...]
    tests: str
    reason: str


OURS = ("hyperadapt", "surm")
EXCLUDED = (
    Exclusion(
        ("surm",),
        r"test_lora_conversion\[.*target_modules=None.*(GPT2|GPTJ|OPT|Gemma3)",
        "random Kronecker products on every linear layer have full rank, and the error of their rank-8 approximation, 0.5 "
        "to 1.3 here, is above upstream's absolute bound of 0.5; the other rows run",
    ),
    Exclusion(
        tuple(METHODS),
        r"test_from_pretrained_cache_dir",
        "downloads from the Hub into an empty cache",
    ),
    Exclusion(
        OURS,
        r"test_add_weighted_adapter_cat_with_rank_pattern",
        "ignores its config class and tests LoRA whatever the row: would be a test passed for nothing",
    ),
    Exclusion(
        OURS,
        r"TestDefaultTargetModules",
        "no target_modules means every linear layer, by design; upstream exempts OSF, which does the same",
    ),
    Exclusion(
        OURS,
        r"test_feature_extraction_models.*(test_training|test_training_gradient_checkpointing)\[(?!.*attention).*/"
        r"tiny-random-(Bert|Roberta)Model",
        "the default targets include the pooler, on which the tested output does not depend: no gradient; "
        "the row with explicit targets runs",
    ),
    Exclusion(
        OURS,
        r"test_load_resized_embedding_ignore_mismatched_sizes",
        "PEFT hands `ignore_mismatched_sizes` to no hook of a tuner's: tensors of another shape are refused with an error",
    ),
    Exclusion(
        OURS,
        r"test_mixed_adapter_batches_training_mode_raises",
        "mixed batches can be trained here, by design; upstream refuses training mode",
    ),
    Exclusion(
        ("hyperadapt",),
        r"test_weighted_combination.*trainable_token_indices",
        "only scales are combined: an adapter that has also trained tokens is refused with an error, by design",
    ),
    Exclusion(
        ("hyperadapt",),
        r"test_mixed.*test_target_last_layer",
        "two scalings of one layer, or a scaling and a sum, do not add up: the test is of methods that add to the output",
    ),
)

# Tests that upstream wrote down for LoRA alone and that hold for any method: they run with our config in its place.
# Regular expressions over `file::class::function`.
IN_PLACE_OF_LORA = (
    r"test_config.*::test_(from_peft_type|lora_config_layers_to_transform_validation|regex_with_layer_indexing_lora)$",
    r"test_custom.*::test_add_adapter_rejects_duplicate_name_without_mutation$",
    r"test_custom.*::test_delete_adapter_(with_multiple_adapters_works|multiple_adapters_with_\w+)$",
    r"test_custom.*::test_(non_)?existing_model_card$",
    r"test_custom.*::test_(ignore_mismatched_sizes_with_scalar_modules_to_save|load_does_not_overwrite_\w+)$",
    r"test_custom.*::test_save_embedding_layers_excludes_\w+$",
    r"test_custom.*::test_loading_model_with_trainble_tokens_requires_grad_set_correctly$",
    r"test_custom.*::test_multiple_active_adapters_with_(different|same)_trainable_token_indices_(works|raises)$",
    r"test_custom.*::test_multiple_adapters_(automatic|no_needless_copy)_modules_to_save$",
    r"test_custom.*::test_set_adapter_non_overlapping_trainable_token_indices$",
    r"test_custom.*::test_weight_bias_attributes$",
    r"test_decoder.*::test_merge_and_unload_fixes_tie_word_embeddings_config$",
    r"test_encoder_decoder.*::test_(load_model_low_cpu_mem_usage|save_shared_tensors)$",
    r"test_feature.*::test_load_model_low_cpu_mem_usage$",
    r"test_low_level.*::test_get_and_set_peft_model_state_dict_(adapter_name_same_as|normal|weight_in)_\w+$",
    r"test_low_level.*::test_trained_modules_to_save_module_named_like_peft_prefix_round_trip$",
    r"test_low_level.*::test_get_peft_model_state_dict_removes_\w+$",
    r"test_low_level.*::test_inject_from_state_dict_(compiled_model|extra_keys_warning|low_cpu_mem_usage)$",
    r"test_low_level.*::test_inject_from_state_dict_transformers(_irregular_targets)?$",
    r"test_low_level.*::test_(set_peft_model_state_dict_preserves_input|multiple_adapters)$",
    r"test_other.*::TestGetModuleNamesTiedWithEmbedding::test_get_modules_tied_to_embedding_peft$",
    r"test_other.*::TestModulesToSave(AttributeAccess|KwargsOnlyForward|NameSubstringBug|UnloadNoActiveAdapter)::",
    r"test_other.*::test_(load_multiple_adapters_different_modules_to_save|modules_to_save_targets_\w+)$",
    r"test_other.*::test_(nested_ignores_modules_to_save|targeting_module_to_save_raises)$",
    r"test_target_parameters.*::test_multiple_adapters_load_order_independent$",
    r"test_target_parameters.*::test_target_parameter_(init_does_not_warn_\w+|on_top_level_module_raises)$",
    r"test_trainable.*::test_(default_embedding_name_is_inferred|embedding_name_is_used_when_given)_combined$",
    r"test_trainable.*::test_(ensure_weight_tying|weight_tying_bc|untied_model|tied_model|composite_model)_\w+$",
    r"test_trainable.*::test_(original_module_not_in_state_dict|scaled_embedding_with_lora)$",
)

# What a LoRA row may say that is LoRA's alone. Any other field that our config does not have drops the row.
_LORA_ONLY = {
    "alora_invocation_tokens",
    "init_lora_weights",
    "kasa_config",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "monteclora_config",
    "r",
    "rank_pattern",
    "use_bdlora",
    "use_dora",
    "velora_config",
}
# LoRA's default targets are the attention's projections, ours every linear layer: a row without targets is run as it is
# and with these, which are the names in all of upstream's models.
_ATTENTION = ["q_proj", "v_proj", "c_attn", "q", "v", "query", "value", "query_proj", "value_proj", "in_proj"]
# Tables without a LoRA row, and whose rows stand for everybody.
_STAND_FOR_ALL = {"test_quantization": (BOFTConfig, OFTConfig)}


class NoRow(Exception):
    """A row asks for what the method does not have; the message is the reason."""


def _kwargs(method: Method, kwargs: dict[str, Any]) -> dict[str, Any]:
    fields = {field.name for field in dataclasses.fields(method.config_cls)}
    out = {key: value for key, value in kwargs.items() if key not in _LORA_ONLY}
    if unknown := out.keys() - fields:
        raise NoRow(f"{method.config_cls.__name__} has no {', '.join(sorted(unknown))}")
    if kwargs.get("init_lora_weights") is False:
        out["init_weights"] = False
    return out


def config_in_place_of_lora(method: Method) -> Callable[..., PeftConfig]:
    """Return what stands for `LoraConfig` in the tests of `IN_PLACE_OF_LORA`."""

    def make(**kwargs: Any) -> PeftConfig:
        try:
            _supported(method, [kwargs])
            return method.config_cls(**_kwargs(method, kwargs))
        except NoRow as reason:
            pytest.skip(f"hyperadapt_peft: {reason}")

    return make


def translate(method: Method, value: Any) -> Any:
    """Return a value of a LoRA row as the method's: config class, config, arguments of a config, or a tuple of those."""
    if isinstance(value, type) and issubclass(value, PeftConfig):
        return method.config_cls
    if isinstance(value, PeftConfig):
        default = type(value)()
        changed = {k: v for k, v in vars(value).items() if v != getattr(default, k)}
        changed.pop("runtime_config", None)
        return method.config_cls(**_kwargs(method, changed))
    if isinstance(value, dict):
        return _kwargs(method, value)
    if isinstance(value, types.FunctionType):  # a factory of configs
        return lambda *args: translate(method, value(*args))
    if isinstance(value, tuple):
        return tuple(translate(method, item) for item in value)
    return value


def _config_classes(value: Any) -> set[type]:
    if isinstance(value, tuple | list):
        return set().union(*map(_config_classes, value))
    if isinstance(value, PeftConfig):
        return {type(value)}
    if isinstance(value, types.FunctionType):
        return {LoraConfig}  # factories are LoRA's
    return {value} if isinstance(value, type) and issubclass(value, PeftConfig) else set()


def label(cell: Any) -> str:
    """Return a short name for a cell of a row, for node ids."""
    if isinstance(cell, type):
        return cell.__name__.removesuffix("Config")
    if isinstance(cell, tuple):
        return "-".join(map(label, cell))
    if isinstance(cell, PeftConfig):
        cell = {key: value for key, value in vars(cell).items() if value != getattr(type(cell)(), key)}
    if isinstance(cell, dict):
        plain = {key: sorted(value) if isinstance(value, set) else value for key, value in cell.items()}
        if plain.get("target_modules") == _ATTENTION:
            plain["target_modules"] = "attention"
        return ",".join(f"{key}={value}" for key, value in plain.items() if key != "task_type") or "default"
    return str(cell) if isinstance(cell, str | int | float) else type(cell).__name__


def _supported(method: Method, cells: Iterable[Any]) -> None:
    """Raise NoRow if one of a row's cells is a model, or has a target, that the method does not support."""
    names: set[str] = set()
    for cell in cells:
        if isinstance(cell, tuple):
            _supported(method, cell)
        targets = cell.get("target_modules") if isinstance(cell, dict) else getattr(cell, "target_modules", cell)
        names |= {targets} if isinstance(targets, str) else set(targets) if isinstance(targets, list | set) else set()
    for name, reason in method.unsupported.items():
        if any(re.search(rf"(^|\W){re.escape(name)}$", target) for target in names):
            raise NoRow(reason)


def rows(method: Method, module: str, columns: list[str], table: Iterable[Any]) -> list[Any] | None:
    """Return the method's rows of an upstream table, or None if it is not a table over PEFT methods.

    Args:
        method: The method under test.
        module: Name of the upstream module.
        columns: Names of the table's columns.
        table: Its rows: tuples, `pytest.param`s, or bare values if there is but one column.
    """
    wide = len(columns) > 1
    plain = [row.values if isinstance(row, ParameterSet) else tuple(row) if wide else (row,) for row in table]
    if not any(map(_config_classes, plain)):
        return None
    if method.baseline:
        mine = [row for row in plain if _config_classes(row) == {method.config_cls}]
        return [pytest.param(*row, id=f"{i}-{'-'.join(map(label, row))}") for i, row in enumerate(mine)]

    reference = set(_STAND_FOR_ALL.get(module, (LoraConfig,)))
    out: dict[str, Any] = {}
    models: set[str] = set()
    for row in plain:
        if not _config_classes(row) <= reference:
            continue
        try:
            cells = dict(zip(columns, translate(method, row), strict=True))
            _supported(method, cells.values())
        except NoRow as reason:
            name = "-".join(map(label, row))
            out[name] = pytest.param(*row, id=name, marks=pytest.mark.skip(reason=f"hyperadapt_peft: {reason}"))
            continue
        if cells.get("tuner_method") == "lora":  # upstream's name for add_weighted_adapter(combination_type="cat")
            cells["tuner_method"] = method.config_cls.__name__
        kwargs = cells.get("config_kwargs", {})
        more: list[dict[str, Any]] = [{}]
        if "test_name" in columns and kwargs and cells["model_id"] not in models:
            more += method.variants
            models.add(cells["model_id"])
        elif kwargs.get("target_modules", ()) is None:
            more.append({"target_modules": _ATTENTION})
        for new in more:
            new = cells | ({"config_kwargs": kwargs | new} if new else {})
            name = "-".join(label(cell) for column, cell in new.items() if column != "test_name")
            out.setdefault(name, pytest.param(*new.values(), id=name))  # rows that have become equal run once
    return list(out.values())
