"""Run a recipe: transformers' Trainer trains, the adapter is saved, reloaded from disk and evaluated again."""

import gc
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel, get_peft_model
from transformers import AutoConfig, EvalPrediction, PretrainedConfig, PreTrainedModel, Trainer, set_seed

from .data import load_splits, local_path
from .errors import RecipeError, attempt, first_line, nearest
from .recipe import Recipe
from .tasks import Prepared


HEADS = ("classifier", "score")  # what PEFT too takes for a classification head


def train(
    recipe: Recipe, resume: bool = False, overwrite: bool = False, evaluate_once: bool = False
) -> dict[str, Any]:
    """Train, save, reload, and write `metrics.json` into the output directory; returns what it holds.

    Args:
        recipe: what to run.
        resume: go on from the last checkpoint in the output directory, or start when there is none.
        overwrite: remove the earlier run in the output directory first.
        evaluate_once: evaluate after training only, not before it and not what is reloaded.

    Raises:
        RecipeError: model or data cannot be loaded as the recipe says, or the output directory holds a run already.
        RuntimeError: the adapter reloaded from disk does not give the metrics it had when it was saved.
    """
    started = time.monotonic()
    output = Path(str(recipe.arguments.output_dir))
    earlier = [*output.glob("checkpoint-*"), *output.glob("adapter"), *output.glob("metrics.json")]
    checkpoint = recipe.arguments.resume_from_checkpoint or (_last_checkpoint(output) if resume else None)
    if earlier and not (resume or overwrite or checkpoint):
        raise RecipeError(f"training.output_dir: {output} holds an earlier run; pass --resume or --overwrite")
    with recipe.arguments.main_process_first():  # which downloads and encodes; the others read its caches
        source = local_path(recipe.model.name)
        if changes := recipe.model.config:  # checked before the data, which may take long
            load = partial(AutoConfig.from_pretrained, source, revision=recipe.model.revision)
            _change(attempt("model.name", load), changes)
        prepared = _prepare(recipe, source)

    def base_model(seed: int) -> PreTrainedModel:
        set_seed(seed)  # of a new head
        options = {"revision": recipe.model.revision, "dtype": recipe.model.dtype}
        options |= recipe.model.config | prepared.model_options
        model = attempt("model.name", lambda: recipe.task.auto_model.from_pretrained(source, **options))
        pad = getattr(prepared.processor, "pad_token_id", None)
        if pad is not None:
            model.config.pad_token_id = pad
        return model

    model = _adapted(recipe, base_model(recipe.arguments.seed), bool(prepared.labels))
    trainer = _trainer(recipe, model, prepared)
    if overwrite and recipe.arguments.should_save:
        for path in earlier:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    adapter = output / "adapter"
    results = _fit(trainer, model, prepared, adapter, checkpoint, evaluate_once)
    del trainer, model
    gc.collect()  # the Trainer's cycles hold the trained model
    if not evaluate_once:
        if recipe.peft_config is not None:
            # another random head than the run began with: the one it trained must come from the disk
            reloaded = PeftModel.from_pretrained(base_model(recipe.arguments.seed + 1), adapter)
        else:
            reloaded = recipe.task.auto_model.from_pretrained(adapter, dtype=recipe.model.dtype)
        results["reloaded"] = _evaluate(_trainer(recipe, reloaded, prepared), prepared)
    results["seconds"]["total"] = time.monotonic() - started
    results |= {
        "metric": recipe.data.metric,
        "labels": prepared.labels,
        "peak_rss_bytes": _peak_rss(),
        "recipe": recipe.resolved,
    }
    results["versions"] = {"python": platform.python_version()}
    for package in ("hyperadapt_peft", "peft", "transformers", "accelerate", "datasets", "torch"):
        results["versions"][package] = version(package)
    if recipe.arguments.should_save:
        _write(output / "metrics.json", json.dumps(results, indent=2) + "\n")
    if not evaluate_once and not _same(results["after"], results["reloaded"]):
        raise RuntimeError(f"{adapter} does not evaluate as it did when it was saved; see metrics.json beside it")
    return results


def evaluate(recipe: Recipe, model: PreTrainedModel | PeftModel) -> dict[str, dict[str, float]]:
    """Split -> loss and metrics of a model on the recipe's data, which is encoded for the recipe's model."""
    source = local_path(recipe.model.name)
    prepared = _prepare(recipe, source)
    return _evaluate(_trainer(recipe, model, prepared), prepared)


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe as YAML, and how much it would train if the model's config is on this machine."""
    text = yaml.safe_dump(recipe.resolved, sort_keys=False)
    name, revision = recipe.model.name, recipe.model.revision
    try:
        config = AutoConfig.from_pretrained(local_path(name), revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return text + f"# parameters not counted: {name} is not on this machine\n"
    _change(config, recipe.model.config)
    with torch.device("meta"):
        model = recipe.task.auto_model.from_config(config)
        # another number of classes changes the head only, which is not counted
        model = _adapted(recipe, model, recipe.task.has_head)
    head = _head(model, recipe.task.has_head)
    sizes = [p.numel() for n, p in model.named_parameters() if p.requires_grad and not _is_in(head, n)]
    return text + f"# trainable outside the head: {sum(sizes):,} parameters in {len(sizes)} tensors\n"


def summary(results: dict[str, Any]) -> str:
    """The table printed at the end of a run."""
    parameters, seconds = results["parameters"], results["seconds"]
    split = "test" if "test" in results["after"] else "validation"
    metric = results["metric"]
    rows = [
        (f"{split} {metric.replace('_', ' ')} {label}", f"{results[when][split][metric]:.2%}")
        for when, label in (("before", "before"), ("after", "after"), ("reloaded", "reloaded from disk"))
    ]
    outside = f"{parameters['trainable_outside_head']:,} outside the head"
    rows.append(("trainable parameters", f"{parameters['trainable']:,} ({outside}) of {parameters['total']:,}"))
    rows.append(("adapter weights on disk", f"{results['adapter_bytes']:,} bytes"))
    rows.append(("seconds", f"{seconds['train']:.0f} training, {seconds['total']:.0f} in all"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _change(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """Change the model's config in place; a key that it lacks would change nothing, silently."""
    known = config.to_dict()
    for key, value in changes.items():
        if key not in known:
            raise RecipeError(f"model.config.{key}: unknown key{nearest(key, known)}")
        try:
            setattr(config, key, value)
        except StrictDataclassError as error:
            raise RecipeError(f"model.config.{key}: {first_line(error.__cause__ or error)}") from error


def _prepare(recipe: Recipe, source: str) -> Prepared:
    """The data of the recipe, encoded for its model; the Trainer's arguments are told what that needs."""
    splits = load_splits(recipe.data)
    prepared = attempt("model.name", lambda: recipe.task.prepare(recipe.data, splits, source, recipe.model.revision))
    if prepared.keep_columns:
        recipe.arguments.remove_unused_columns = False
    if (
        prepared.labels
    ):  # this loss is a mean over samples, which the Trainer would multiply by the number of processes
        recipe.arguments.average_tokens_across_devices = False
    if recipe.arguments.label_names is None:
        recipe.arguments.label_names = ["labels"]  # the Trainer cannot see it through every PEFT model
    return prepared


def _adapted(recipe: Recipe, model: PreTrainedModel, has_head: bool) -> PreTrainedModel | PeftModel:
    """The model with the recipe's tuner, its classification head trainable."""
    head = _head(model, has_head)
    config = recipe.peft_config
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = recipe.peft_type == "FULL" or _is_in(head, name)
        return model
    if head and config.task_type is None and getattr(config, "modules_to_save", ()) is None:
        config.modules_to_save = head  # type: ignore[attr-defined]  # with a task type PEFT does so itself
    adapted = attempt("tuner", lambda: get_peft_model(model, config))
    if head and not any(_is_in(head, name) and ".modules_to_save." in name for name, _ in adapted.named_parameters()):
        raise RecipeError(f"tuner.modules_to_save: expected the classification head, {' and '.join(head)}")
    return adapted


def _head(model: PreTrainedModel | PeftModel, has_head: bool) -> list[str]:
    """The names of the children that make the classification head: the usual names, or all beside the encoder."""
    if not has_head:
        return []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [name for name, child in base.named_children() if any(True for _ in child.parameters())]
    return [name for name in names if name in HEADS] or [name for name in names if name != base.base_model_prefix]


def _is_in(head: list[str], parameter: str) -> bool:
    return not set(head).isdisjoint(parameter.split("."))


def _trainer(recipe: Recipe, model: PreTrainedModel | PeftModel, prepared: Prepared) -> Trainer:
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        return {name: metric(prediction) for name, metric in prepared.metrics.items()}

    create = partial(
        prepared.trainer,
        model=model,
        args=recipe.arguments,
        train_dataset=prepared.splits["train"],
        eval_dataset=prepared.splits.get("validation"),
        data_collator=prepared.collator,
        processing_class=prepared.processor,
        compute_metrics=metrics,
    )
    trainer = attempt("training", create)
    if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
        raise RecipeError("training: FSDP and DeepSpeed evaluate only what they train, so use this command with DDP")
    return trainer


def _fit(
    trainer: Trainer,
    model: PreTrainedModel | PeftModel,
    prepared: Prepared,
    adapter: Path,
    checkpoint: str | None,
    evaluate_once: bool,
) -> dict[str, Any]:
    """Evaluate, train, evaluate, save to `adapter`; the part of the results known by then."""
    before = {} if evaluate_once else {"before": _evaluate(trainer, prepared)}
    if trainer.args.world_size > 1:
        # accelerate would take the model for one that is wrapped already, and every process would train on its own
        model._is_accelerate_prepared = False  # type: ignore[assignment]
    done = trainer.train(resume_from_checkpoint=checkpoint)
    after = _evaluate(trainer, prepared)
    if trainer.args.should_save:
        _save(model, prepared, adapter)
    trainer.accelerator.wait_for_everyone()
    head = _head(model, bool(prepared.labels))
    trainable = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    return {
        **before,
        "after": after,
        "parameters": {
            "total": sum(p.numel() for p in model.parameters()),
            "trainable": sum(trainable.values()),
            "trainable_outside_head": sum(size for name, size in trainable.items() if not _is_in(head, name)),
        },
        "adapter_bytes": sum(file.stat().st_size for file in adapter.glob("*.safetensors")),
        "steps": done.global_step,
        "seconds": {"train": done.metrics["train_runtime"]},
    }


def _save(model: PreTrainedModel | PeftModel, prepared: Prepared, adapter: Path) -> None:
    """Save to `adapter`: whenever this is cut off, the directory is the old one, the new one or not there."""
    for left in adapter.parent.glob(".saving-*"):  # by runs that were killed
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=adapter.parent) as temporary:
        new, old = Path(temporary, "new"), Path(temporary, "old")
        model.save_pretrained(str(new))
        prepared.processor.save_pretrained(new)
        if adapter.exists():
            adapter.rename(old)
        new.rename(adapter)


def _evaluate(trainer: Trainer, prepared: Prepared) -> dict[str, dict[str, float]]:
    """Split -> loss and metrics, on every split but the training one."""
    results = {}
    for role, rows in prepared.splits.items():
        if role != "train":
            metrics = trainer.evaluate(rows)
            results[role] = {name: metrics[f"eval_{name}"] for name in ("loss", *prepared.metrics)}
    return results


def _same(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> bool:
    """Whether two evaluations agree, but for the last digits of a device's arithmetic."""
    values = [[metrics[key] for metrics in run.values() for key in sorted(metrics)] for run in (one, other)]
    return np.allclose(values[0], values[1], rtol=1e-3, atol=0, equal_nan=True)


def _write(path: Path, text: str) -> None:
    """Write a whole file or none."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _last_checkpoint(output: Path) -> str | None:
    """The latest checkpoint in `output` that was written to its end: the Trainer's state is its last file."""
    complete = [file.parent for file in output.glob("checkpoint-*/trainer_state.json") if _is_json(file)]
    return str(max(complete, key=lambda path: int(path.name.rpartition("-")[2]))) if complete else None


def _is_json(file: Path) -> bool:
    """Whether a JSON file was written to its end: no beginning of an object is JSON."""
    try:
        return bool(json.loads(file.read_text()))
    except ValueError:
        return False


def _peak_rss() -> int:
    """The most memory this process ever had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
