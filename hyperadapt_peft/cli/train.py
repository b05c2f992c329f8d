"""Run a recipe: transformers' Trainer trains, and the adapter is saved and evaluated."""

import errno
import gc
import itertools
import json
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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

from .data import load_splits
from .errors import RecipeError, errors_about, first_line, suggestion
from .recipe import Recipe
from .tasks import EncodedData


HEADS = ("classifier", "score")  # what PEFT too takes for a classification head
PACKAGES = ("hyperadapt_peft", "peft", "transformers", "accelerate", "datasets", "torch")
EVALUATIONS = {"before": "before training", "after": "after training", "reloaded": "reloaded from disk"}


def train(recipe: Recipe, resume: bool = False, overwrite: bool = False, verify: bool = False) -> dict[str, Any]:
    """Train, save and evaluate, and write `metrics.json` into the output directory; returns what it holds.

    Args:
        recipe: what to run.
        resume: go on from the last checkpoint in the output directory, or start when there is none.
        overwrite: remove the earlier run in the output directory first.
        verify: evaluate before training too, and once more what is reloaded from disk.

    Raises:
        RecipeError: model or data cannot be loaded as the recipe says, or the output directory holds a run already.
        RuntimeError: with `verify`, the adapter reloaded from disk does not give the metrics it had when it was saved.
    """
    started = time.monotonic()
    output = Path(str(recipe.arguments.output_dir))
    earlier = [path for kind in ("checkpoint-*", "adapter", "metrics.json") for path in output.glob(kind)]
    checkpoint = recipe.arguments.resume_from_checkpoint or (_last_checkpoint(output) if resume else None)
    if earlier and not (resume or overwrite or checkpoint):
        raise RecipeError(f"training.output_dir: {output} holds an earlier run; pass --resume or --overwrite")
    with recipe.arguments.main_process_first():  # which downloads and encodes; the others read its caches
        if changes := recipe.model.config:  # checked before the data, which may take long
            with errors_about("model.name", recipe.model.name):
                config = AutoConfig.from_pretrained(recipe.model.name, revision=recipe.model.revision)
            _change(config, changes)
        data = _encode(recipe)

    def base_model(seed: int) -> PreTrainedModel:
        set_seed(seed)  # of a new head
        options = {"revision": recipe.model.revision, "dtype": recipe.model.dtype}
        options |= recipe.model.config | data.model_options
        with errors_about("model.name", recipe.model.name):
            model = recipe.task.auto_model.from_pretrained(recipe.model.name, **options)
        pad = getattr(data.processor, "pad_token_id", None)
        if pad is not None:
            model.config.pad_token_id = pad
        return model

    model = _adapted(recipe, base_model(recipe.arguments.seed))
    trainer = _trainer(recipe, model, data)
    _check_sharding(trainer, verify)
    if overwrite and recipe.arguments.should_save:
        for path in [*earlier, *output.glob(".saving-*")]:  # the latter by runs that were killed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    adapter = output / "adapter"
    results: dict[str, Any] = {"parameters": _parameters(recipe, model)}
    if verify:
        with torch.random.fork_rng():  # training is the same without it
            results["before"] = _evaluate(trainer, data)
        if trainer.args.world_size > 1:
            # accelerate would take the model for a wrapped one, and every process would train on its own
            model._is_accelerate_prepared = False  # type: ignore[assignment]
    done = trainer.train(resume_from_checkpoint=checkpoint)
    _save(trainer, adapter)
    results["after"] = _evaluate(trainer, data)
    results["adapter_bytes"] = sum(file.stat().st_size for file in adapter.glob("*.safetensors"))
    results["steps"] = done.global_step
    del trainer, model
    if verify:
        gc.collect()  # the Trainer's cycles hold the trained model
        if recipe.peft_config is not None:
            # another random head than the run began with: the one it trained must come from the disk
            reloaded = PeftModel.from_pretrained(base_model(recipe.arguments.seed + 1), adapter)
        else:
            reloaded = recipe.task.auto_model.from_pretrained(adapter, dtype=recipe.model.dtype)
        results["reloaded"] = _evaluate(_trainer(recipe, reloaded, data), data)
    results |= {
        "metric": recipe.data.metric,
        "labels": data.labels,
        "seconds": {"train": done.metrics["train_runtime"], "total": time.monotonic() - started},
        "peak_rss_bytes": _peak_rss(),
        "recipe": recipe.resolved,
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
    }
    if recipe.arguments.should_save:  # a whole file or none: with it the run is finished
        temporary = output / "metrics.json.tmp"
        temporary.write_text(json.dumps(results, indent=2) + "\n")
        temporary.replace(output / "metrics.json")
    if verify and not _same(results["after"], results["reloaded"]):
        raise RuntimeError(f"{adapter} does not evaluate as it did when it was saved; see metrics.json beside it")
    return results


def evaluate(recipe: Recipe, model: PreTrainedModel | PeftModel) -> dict[str, dict[str, float]]:
    """Split -> loss and metrics of a model on the recipe's data, which is encoded for the recipe's model."""
    data = _encode(recipe)
    return _evaluate(_trainer(recipe, model, data), data)


def dry_run(recipe: Recipe) -> str:
    """The resolved recipe as YAML, and how much it would train if the model's config is on this machine."""
    text = yaml.safe_dump(recipe.resolved, sort_keys=False)
    name, revision = recipe.model.name, recipe.model.revision
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, local_files_only=True)
    except (OSError, ValueError):
        return text + f"# parameters not counted: {name} is not on this machine\n"
    _change(config, recipe.model.config)
    with torch.device("meta"):
        # another number of classes changes the head only, which is not counted
        model = _adapted(recipe, recipe.task.auto_model.from_config(config))
    return (
        text + f"# trainable outside the head: {_parameters(recipe, model)['trainable_outside_head']:,} parameters\n"
    )


def summary(results: dict[str, Any]) -> str:
    """The table printed at the end of a run."""
    parameters, seconds, metric = results["parameters"], results["seconds"], results["metric"]
    split = "test" if "test" in results["after"] else "validation"
    name = f"{split} {metric.replace('_', ' ')}"
    scores = {label: results[when][split] for when, label in EVALUATIONS.items() if when in results}
    rows = [(f"{name} {label}", f"{score[metric]:.2%}") for label, score in scores.items()]
    if metric == "accuracy":
        rows.insert(0, (f"{name} of the most frequent label", f"{results['after'][split]['majority']:.2%}"))
    outside = f"{parameters['trainable_outside_head']:,} outside the head"
    rows.append(("trainable parameters", f"{parameters['trainable']:,} ({outside}) of {parameters['total']:,}"))
    output = results["recipe"]["training"]["output_dir"]
    rows.append(("adapter weights on disk", f"{results['adapter_bytes']:,} bytes in {Path(output, 'adapter')}"))
    rows.append(("seconds", f"{seconds['train']:.0f} training, {seconds['total']:.0f} in all"))
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def _change(config: PretrainedConfig, changes: dict[str, Any]) -> None:
    """Change the model's config in place; a key that it lacks would change nothing, silently."""
    known = config.to_dict()
    for key, value in changes.items():
        if key not in known:
            raise RecipeError(f"model.config.{key}: unknown key{suggestion(key, known)}")
        try:
            setattr(config, key, value)
        except StrictDataclassError as error:
            raise RecipeError(f"model.config.{key}: {first_line(error.__cause__ or error)}") from error


def _encode(recipe: Recipe) -> EncodedData:
    """The data of the recipe, encoded for its model; the Trainer's arguments are told what that needs."""
    splits = load_splits(recipe.data)
    with errors_about("model.name", recipe.model.name):
        data = recipe.task.encode(recipe.data, splits, recipe.model.name, recipe.model.revision)
    if data.keep_columns:
        recipe.arguments.remove_unused_columns = False
    if data.labels:  # this loss is a mean over samples, which the Trainer would multiply by the number of processes
        recipe.arguments.average_tokens_across_devices = False
    if recipe.arguments.label_names is None:
        recipe.arguments.label_names = ["labels"]  # the Trainer cannot see it through every PEFT model
    return data


def _adapted(recipe: Recipe, model: PreTrainedModel) -> PreTrainedModel | PeftModel:
    """The model with the recipe's tuner, its classification head trainable."""
    head = _head(recipe, model)
    config = recipe.peft_config
    if config is None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad = recipe.peft_type == "FULL" or _is_in(head, name)
        return model
    if head and config.task_type is None and getattr(config, "modules_to_save", ()) is None:
        config.modules_to_save = head  # type: ignore[attr-defined]  # with a task type PEFT does so itself
    with errors_about("tuner"):
        adapted = get_peft_model(model, config)
    if head and not any(_is_in(head, name) and ".modules_to_save." in name for name, _ in adapted.named_parameters()):
        raise RecipeError(f"tuner.modules_to_save: expected the classification head, {' and '.join(head)}")
    return adapted


def _head(recipe: Recipe, model: PreTrainedModel | PeftModel) -> list[str]:
    """The names of the children that make the classification head: the usual names, or all beside the encoder."""
    if not recipe.task.has_head:
        return []
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    names = [name for name, child in base.named_children() if any(True for _ in child.parameters())]
    return [name for name in names if name in HEADS] or [name for name in names if name != base.base_model_prefix]


def _is_in(head: list[str], parameter: str) -> bool:
    return not set(head).isdisjoint(parameter.split("."))


def _parameters(recipe: Recipe, model: PreTrainedModel | PeftModel) -> dict[str, int]:
    """How many parameters there are, and how many are trained; ZeRO-3 has replaced them by empty ones of a `ds_numel`."""
    head, counts = _head(recipe, model), {"total": 0, "trainable": 0, "trainable_outside_head": 0}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        counts["total"] += size
        counts["trainable"] += size * parameter.requires_grad
        counts["trainable_outside_head"] += size * (parameter.requires_grad and not _is_in(head, name))
    return counts


def _trainer(recipe: Recipe, model: PreTrainedModel | PeftModel, data: EncodedData) -> Trainer:
    def metrics(prediction: EvalPrediction) -> dict[str, float]:
        scored = prediction.label_ids, prediction.predictions
        return {name: metric(*scored) for name, metric in data.metrics.items()}

    with errors_about("training"):
        trainer = data.trainer(
            model=model,
            args=recipe.arguments,
            train_dataset=data.splits["train"],
            eval_dataset=data.splits.get("validation"),
            data_collator=data.collator,
            processing_class=data.processor,
            compute_metrics=metrics,
        )
    trainer.is_head = partial(_is_in, _head(recipe, model))
    return trainer


def _check_sharding(trainer: Trainer, verify: bool) -> None:
    """Refuse what FSDP and DeepSpeed cannot do, before hours of training rather than after them."""
    state: Any = trainer.accelerator.state
    if verify and (trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled):
        raise RecipeError("--verify: FSDP and DeepSpeed evaluate only what they train; leave it out")
    if trainer.is_fsdp_enabled and "FULL_STATE_DICT" not in str(state.fsdp_plugin.state_dict_type):
        raise RecipeError("training: FSDP saves no adapter; set fsdp_state_dict_type: FULL_STATE_DICT for accelerate")
    zero3 = trainer.is_deepspeed_enabled and state.deepspeed_plugin.zero_stage == 3
    if zero3 and not state.deepspeed_plugin.zero3_save_16bit_model:
        raise RecipeError("training: ZeRO-3 saves no adapter; set zero3_save_16bit_model: true for accelerate")


def _save(trainer: Trainer, adapter: Path) -> None:
    """Save the adapter, or all of the model, and what encodes its input; every process must take part."""
    if trainer.args.should_save:
        with whole_directory(adapter) as directory:
            trainer.save_model(str(directory))
            (directory / "training_args.bin").unlink()  # a pickle; metrics.json has the recipe
    else:
        trainer.save_model(str(adapter))  # gathers what is sharded, and writes nothing
    trainer.accelerator.wait_for_everyone()


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """A directory to write into, which takes the place of `target` at the end.

    Whenever this is cut off, `target` is the old directory, the new one, or for a moment not there. Several processes
    may write one target: the last one's directory stays.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=target.parent) as temporary:
        new = Path(temporary, "new")
        new.mkdir()
        yield new
        for number in itertools.count():
            with suppress(FileNotFoundError):
                target.rename(Path(temporary, f"old{number}"))
            try:
                new.rename(target)
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
                continue  # another process was first
            return


def _evaluate(trainer: Trainer, data: EncodedData) -> dict[str, dict[str, float]]:
    """Split -> loss and metrics, on every split but the training one."""
    results = {}
    for role, rows in data.splits.items():
        if role != "train":
            metrics = trainer.evaluate(rows)
            results[role] = {name: metrics[f"eval_{name}"] for name in ("loss", *data.metrics)}
    return results


def _same(one: dict[str, dict[str, float]], other: dict[str, dict[str, float]]) -> bool:
    """Whether two evaluations agree, but for the last digits of a device's arithmetic."""
    values = [[value for metrics in run.values() for value in metrics.values()] for run in (one, other)]
    return np.allclose(values[0], values[1], rtol=1e-3, atol=0, equal_nan=True)


def _last_checkpoint(output: Path) -> str | None:
    """The latest checkpoint in `output` that was written to its end: the Trainer's state is its last file."""
    states = output.glob("checkpoint-*/trainer_state.json")
    for state in sorted(states, key=lambda file: int(file.parent.name.rpartition("-")[2]), reverse=True):
        with suppress(ValueError):  # no beginning of an object is JSON
            json.loads(state.read_text())
            return str(state.parent)
    return None


def _peak_rss() -> int:
    """The most memory this process ever had, in bytes."""
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
