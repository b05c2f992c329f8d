"""What an adapter has learned: the ranks and singular values of its updates, and the scales behind them.

Of an update `dW` (n x m) with singular values s_1 >= s_2 >= ...:
- numerical rank: how many exceed `max(n, m) * eps(fp32) * s_1`, as in `torch.linalg.matrix_rank`;
- stable rank: `sum(s_i^2) / s_1^2`;
- effective rank: `exp(-sum(p_i log p_i))`, `p_i = s_i / sum(s)` (Roy and Vetterli 2007).
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftConfig, PeftModel, PeftType, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import load_peft_weights
from transformers import PreTrainedModel

from ..integrations.hub import auto_class
from ..tuners.hyperadapt import HyperAdaptLayer
from ..tuners.hyperadapt.experts import ParamWrapper


def load(adapter: str | Path, base: str | None = None) -> PeftModel:
    """Return an adapter's layers on its base model, in fp32; what was saved whole, such as a new head, is left out.

    Args:
        adapter (`str | Path`): A directory or a Hub id.
        base (`Optional[str]`): The base model's directory or Hub id; what the adapter's config names if `None`.

    Raises:
        ValueError: If the config does not say which model of transformers it adapts.
    """
    config = PeftConfig.from_pretrained(str(adapter))
    source = base or config.base_model_name_or_path
    auto, name = auto_class(config), (config.auto_mapping or {}).get("base_model_class", "")
    model_cls: Any = getattr(peft, auto)._target_class if auto else getattr(transformers, name, None)
    if source is None or not (auto or (isinstance(model_cls, type) and issubclass(model_cls, PreTrainedModel))):
        raise ValueError(f"{adapter}: its config names no base model that transformers has")
    config.task_type = config.modules_to_save = None  # type: ignore[attr-defined]
    model = PeftModel(model_cls.from_pretrained(source, dtype=torch.float32), config)
    weights = load_peft_weights(str(adapter), device="cpu")
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    set_peft_model_state_dict(model, {key: weights[key] for key in wanted if key in weights})
    return model


def inspect_adapter(model: PeftModel, adapter_name: str = "default") -> dict[str, dict[str, Any]]:
    """Module -> what its update is like; see `describe`, and for HyperAdapt the statistics of its scales.

    A parameter of fused experts has an entry for each of them: `mlp.experts.gate_up_proj[0]`.

    Raises:
        ValueError: the method has no additive update of a weight.
    """
    report = {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, BaseTunerLayer) or not hasattr(module, "get_delta_weight"):
            continue
        if adapter_name not in module._get_available_adapters():
            continue
        layer, ours = cast(Any, module), isinstance(module, HyperAdaptLayer)
        weight = layer.base_parameter if ours else layer.get_base_layer().weight
        offsets = layer.get_offsets(adapter_name) if ours else (None, None)
        with torch.no_grad():
            delta = layer.get_delta_weight(adapter_name).float()
        key = f"{name.split('.base_layer')[0]}.{layer.parameter_name}" if isinstance(module, ParamWrapper) else name
        if not ours or not layer.stack_shape:
            report[key] = _entry(delta, weight, offsets)
            continue
        for i in range(len(delta)):
            of_one = [None if offset is None else offset[i] for offset in offsets]
            report[f"{key}[{i}]"] = _entry(delta[i], weight[i], of_one)
    if not report:
        method = PeftType(model.peft_config[adapter_name].peft_type).value
        raise ValueError(f"{method} has no update that is added to a weight")
    return report


def _entry(delta: torch.Tensor, weight: torch.Tensor, offsets: Iterable[torch.Tensor | None]) -> dict[str, Any]:
    entry = describe(delta.flatten(1))
    entry["relative_norm"] = float(delta.norm() / weight.detach().float().norm())
    sides = zip(("row", "column"), offsets, strict=True)
    scales = {side: _statistics(1 + offset) for side, offset in sides if offset is not None}
    return entry | ({"scales": scales} if scales else {})


def describe(delta: torch.Tensor) -> dict[str, Any]:
    """The shape, ranks and singular values, largest first, of a matrix (n, m). A zero matrix has ranks 0."""
    values = torch.linalg.svdvals(delta.double())
    largest = float(values[0])
    tolerance = max(delta.shape) * torch.finfo(torch.float32).eps * largest
    shares = values / values.sum() if largest else values
    return {
        "shape": list(delta.shape),
        "full_rank": min(delta.shape),
        "numerical_rank": int((values > tolerance).sum()),
        "stable_rank": float((values**2).sum() / largest**2) if largest else 0.0,
        "effective_rank": float(torch.special.entr(shares).sum().exp()) if largest else 0.0,
        "singular_values": [float(f"{value:.4g}") for value in values],
    }


def _statistics(scales: torch.Tensor) -> dict[str, float]:
    values = {"mean": scales.mean(), "std": scales.std(correction=0), "min": scales.min(), "max": scales.max()}
    return {name: float(value) for name, value in values.items()}


def table(reports: Mapping[str, Mapping[str, Any]]) -> str:
    """Label of an adapter -> its report, as one Markdown table: a line per module and adapter, then the least and mean."""
    lines = [
        "| module | adapter | shape | change of norm | numerical rank | of full | stable | effective | row scales | column scales |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in dict.fromkeys(name for report in reports.values() for name in report):
        for label, report in reports.items():
            if name in report:
                lines.append(_line(name, label, report[name]))
    lines.append("")
    for label, report in reports.items():
        shares = [entry["numerical_rank"] / entry["full_rank"] for entry in report.values()]
        lines.append(
            f"{label}: numerical rank {min(shares):.1%} of full at least, {sum(shares) / len(shares):.1%} on average "
            f"over {len(shares)} matrices."
        )
    return "\n".join(lines) + "\n"


def _line(name: str, label: str, entry: Mapping[str, Any]) -> str:
    scales = [entry.get("scales", {}).get(side) for side in ("row", "column")]
    cells = [f"{side['min']:.2f} to {side['max']:.2f}" if side else "" for side in scales]
    rows, columns = entry["shape"]
    return (
        f"| {name} | {label} | {rows} x {columns} | {entry['relative_norm']:.1%} | {entry['numerical_rank']} | "
        f"{entry['numerical_rank'] / entry['full_rank']:.1%} | {entry['stable_rank']:.1f} | "
        f"{entry['effective_rank']:.1f} | {cells[0]} | {cells[1]} |"
    )


def write(reports: Mapping[str, Mapping[str, Any]], directory: Path) -> None:
    """Write `ranks.json`, `ranks.md` and, with matplotlib, `ranks.png` into `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "ranks.json").write_text(json.dumps(reports) + "\n")
    (directory / "ranks.md").write_text(table(reports))
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return  # plots are an extra
    plot(reports, Figure(figsize=(11, 4.5), layout="constrained")).savefig(directory / "ranks.png", dpi=120)


def plot(reports: Mapping[str, Mapping[str, Any]], figure: Any) -> Any:
    """Draw the singular values, relative to the largest, and the ranks over the modules into a matplotlib figure."""
    spectra, ranks = figure.subplots(1, 2)
    for index, (label, report) in enumerate(reports.items()):
        colour = f"C{index}"
        for number, entry in enumerate(report.values()):
            values = [value for value in entry["singular_values"] if value > 0]
            share = [(position + 1) / entry["full_rank"] for position in range(len(values))]
            relative = [value / values[0] for value in values]
            spectra.plot(share, relative, color=colour, alpha=0.3, label=None if number else label)
        positions = range(len(report))
        for kind, marker in (("numerical", "o"), ("effective", "x"), ("stable", ".")):
            shares = [entry[f"{kind}_rank"] / entry["full_rank"] for entry in report.values()]
            ranks.plot(positions, shares, marker, color=colour, markersize=4, label=f"{label}, {kind}")
    spectra.set(yscale="log", xlabel="singular value's place / full rank", ylabel="relative to the largest")
    spectra.set_ylim(bottom=1e-7)
    ranks.set(xlabel="adapted matrix, from the input on", ylabel="rank / full rank")
    for axes in (spectra, ranks):
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
