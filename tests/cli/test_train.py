"""Whole runs through the command line, on tiny models and data."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
import transformers
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers.trainer_callback import TrainerCallback

from hyperadapt_cli import main
from hyperadapt_peft.cli.data import PromptData
from hyperadapt_peft.cli.recipe import load
from hyperadapt_peft.cli.tasks import causal_lm

from .conftest import SIZES, save_tokenizer


def run(path: str, *arguments: str) -> tuple[dict, Path]:
    """Train; returns the metrics written and the run's directory."""
    assert main(["train", path, "--verify", *arguments]) == 0
    directory = Path(path).parent / "run"
    return json.loads((directory / "metrics.json").read_text()), directory


def check_metrics(metrics: dict, directory: Path) -> None:
    """What every run's `metrics.json` and files must say."""
    assert metrics["reloaded"] == metrics["after"]  # to the last digit on a CPU
    assert metrics["after"]["test"]["loss"] < metrics["before"]["test"]["loss"]
    parameters = metrics["parameters"]
    assert 0 <= parameters["trainable_outside_head"] <= parameters["trainable"] < parameters["total"]
    assert metrics["adapter_bytes"] == (directory / "adapter" / "adapter_model.safetensors").stat().st_size
    assert metrics["seconds"]["total"] > metrics["seconds"]["train"] > 0 and metrics["peak_rss_bytes"] > 2**20
    assert {"python", "torch", "peft", "transformers", "hyperadapt_peft"} < set(metrics["versions"])
    assert sorted(file.name for file in directory.iterdir()) == ["adapter", "metrics.json"]


@pytest.mark.parametrize("tuner", [{"peft_type": "HYPERADAPT"}, {"peft_type": "LORA", "r": 2}, {"peft_type": "IA3"}])
def test_sequence_classification(recipe, tuner, capsys, bert):
    path = recipe(tuner=tuner, training={"max_steps": 20})
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["labels"] == ["bad", "good"] and metrics["steps"] == 20
    assert metrics["recipe"]["tuner"]["peft_type"] == tuner["peft_type"]
    parameters = metrics["parameters"]
    assert parameters["trainable"] - parameters["trainable_outside_head"] == 2 * 16 + 2
    table = capsys.readouterr().out
    for line in ("test accuracy before", "test accuracy after", "test accuracy reloaded", "bytes", "outside the head"):
        assert line in table
    config = PeftConfig.from_pretrained(directory / "adapter")
    assert config.peft_type == tuner["peft_type"] and config.task_type == "SEQ_CLS"
    base = transformers.AutoModelForSequenceClassification.from_pretrained(bert)
    PeftModel.from_pretrained(base, directory / "adapter")


def test_hyperadapt_counts_its_scales(recipe):
    metrics, _ = run(recipe(training={"max_steps": 1}))
    per_layer = 4 * (16 + 16) + 2 * (16 + 32)
    assert metrics["parameters"]["trainable_outside_head"] == 2 * per_layer + 16 + 16  # the pooler


@pytest.mark.parametrize("peft_type", ["HYPERADAPT", "LORA"])
def test_a_learning_rate_of_the_head_s_own(recipe, peft_type):
    adapters = []
    for rate in (0.01, 0.03):  # Adam's first step moves every number by its rate
        training = {"max_steps": 1, "learning_rate": 0.02, "head_learning_rate": rate, "weight_decay": 0.1}
        _, directory = run(recipe(tuner={"peft_type": peft_type}, training=training), "--overwrite")
        adapters.append(load_file(directory / "adapter" / "adapter_model.safetensors"))
    for name, one in adapters[0].items():
        step = 0.02 if "classifier" in name else 0
        distance = (adapters[1][name] - one).abs()
        torch.testing.assert_close(distance, torch.full_like(one, step), rtol=0.05, atol=1e-7)


def test_pair_from_a_saved_dataset_with_named_labels(recipe, reviews, tmp_path):
    loaded = datasets.load_dataset("json", data_files=reviews).cast_column(
        "label", datasets.ClassLabel(names=["good", "bad"])
    )
    loaded.save_to_disk(tmp_path / "saved")
    section = {"name": str(tmp_path / "saved"), "text_pair_column": "other", "max_train_samples": 40}
    metrics, directory = run(recipe(data=section, training={"max_steps": 20}))
    check_metrics(metrics, directory)
    assert metrics["labels"] == ["good", "bad"]


@pytest.mark.parametrize("peft_type", ["FULL", "NONE"])
def test_without_an_adapter(recipe, peft_type):
    metrics, directory = run(recipe(tuner={"peft_type": peft_type}))
    assert metrics["reloaded"] == metrics["after"]
    parameters = metrics["parameters"]
    if peft_type == "FULL":
        assert parameters["trainable"] == parameters["total"]
    else:
        assert (parameters["trainable"], parameters["trainable_outside_head"]) == (34, 0)
    assert (directory / "adapter" / "model.safetensors").is_file()


def test_a_change_of_the_model_s_config(recipe, bert, capsys):
    def path(**changes) -> str:
        return recipe(tuner={"peft_type": "FULL"}, model={"name": str(bert), "config": changes})

    _, directory = run(path(hidden_dropout_prob=0.0))
    trained = transformers.AutoModelForSequenceClassification.from_pretrained(directory / "adapter")
    assert trained.bert.encoder.layer[0].output.dropout.p == 0
    assert trained.config.attention_probs_dropout_prob == 0.1  # the rest is the model's

    unknown, wrong = "unknown key; the nearest valid name is", "Field 'hidden_dropout_prob' with value 'no'"
    for changes, message in [({"hidden_dropout": 0.0}, unknown), ({"hidden_dropout_prob": "no"}, wrong)]:
        for option in ("--overwrite", "--dry-run"):
            assert main(["train", path(**changes), option]) == 2
            assert f"model.config.{next(iter(changes))}: {message}" in capsys.readouterr().err
    assert (directory / "metrics.json").is_file()  # nothing is lost


def test_causal_lm(recipe, llama, copies):
    section = {"name": "json", "data_files": copies, "max_length": 16}
    path = recipe(task="causal-lm", model={"name": str(llama)}, data=section, training={"max_steps": 20})
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["labels"] == []


def test_a_mixture_of_experts(recipe, copies, tmp_path):
    sizes = SIZES | {"num_key_value_heads": 2, "num_local_experts": 2, "num_experts_per_tok": 1}
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(vocab_size=22, eos_token_id=3, **sizes))
    model.save_pretrained(tmp_path / "moe")
    save_tokenizer(tmp_path / "moe")
    section = {"name": "json", "data_files": copies, "max_length": 16}
    training = {"max_steps": 20, "gradient_checkpointing": True}
    metrics, directory = run(
        recipe(task="causal-lm", model={"name": str(tmp_path / "moe")}, data=section, training=training)
    )
    check_metrics(metrics, directory)
    experts = 2 * ((64 + 16) + (16 + 32)) + (2 + 16)  # of one block, with the router
    assert metrics["parameters"]["trainable"] == 2 * (experts + 4 * (16 + 16))


def test_causal_lm_masks_the_prompt_and_keeps_the_completion(llama, copies):
    rows = datasets.Dataset.from_list([{"prompt": "1 2 3", "completion": "1"}])
    for max_length, chat_template, ids, masked in [
        (16, False, [2, 13, 14, 15, 3, 13, 3], 5),
        (16, True, [9, 13, 14, 15, 13, 3], 4),  # the template says what is special
        (4, False, [15, 3, 13, 3], 2),
        (1, False, [13], 0),
    ]:
        section = PromptData("json", data_files=copies, max_length=max_length, chat_template=chat_template)
        row = causal_lm(section, {"train": rows}, str(llama), None).splits["train"][0]
        assert row["input_ids"] == ids and row["labels"] == [-100] * masked + ids[masked:]


@pytest.mark.parametrize("target_modules", [["q_proj", "v_proj"], "all-linear"])
def test_image_classification_trains_the_head_too(recipe, vit, pictures, target_modules):
    tuner = {"peft_type": "LORA", "r": 2, "target_modules": target_modules}
    section = {"name": str(pictures)}
    path = recipe(task="image-classification", model={"name": str(vit)}, data=section, tuner=tuner)
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["labels"] == ["dark", "light"]
    saved = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert {"base_model.model.classifier.weight", "base_model.model.classifier.bias"} < set(saved)
    assert not any("classifier" in name and "lora" in name for name in saved)


def test_image_classification_with_hyperadapt(recipe, vit, pictures):
    path = recipe(task="image-classification", model={"name": str(vit)}, data={"name": str(pictures)})
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["after"]["test"]["accuracy"] == 1.0


def test_a_head_that_would_stay_random_is_refused(recipe, vit, pictures, capsys):
    tuner = {"peft_type": "LORA", "target_modules": "all-linear", "modules_to_save": ["layernorm"]}
    path = recipe(task="image-classification", model={"name": str(vit)}, data={"name": str(pictures)}, tuner=tuner)
    assert main(["train", path]) == 2
    assert "tuner.modules_to_save: expected the classification head, classifier" in capsys.readouterr().err


class Interrupted(Exception):
    """Stands for a kill."""


class Interrupt(TrainerCallback):
    """Stop the run in the middle of its seventh step."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 7:
            raise Interrupted


def test_a_resumed_run_equals_an_uninterrupted_one(recipe, monkeypatch, capsys):
    path = recipe(training={"max_steps": 12, "save_strategy": "steps", "save_steps": 3, "logging_steps": 4})
    whole, directory = run(path)
    expected = load_file(directory / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(directory)

    initialise = transformers.Trainer.__init__
    with monkeypatch.context() as context:
        context.setattr(
            transformers.Trainer,
            "__init__",
            lambda self, *args, **kwargs: initialise(self, *args, callbacks=[Interrupt()], **kwargs),
        )
        with pytest.raises(Interrupted):
            main(["train", path])
    assert not (directory / "adapter").exists() and not (directory / "metrics.json").exists()
    (directory / "checkpoint-9").mkdir()  # killed while saving: no state in it yet

    capsys.readouterr()
    assert main(["train", path]) == 2
    assert "holds an earlier run; pass --resume or --overwrite" in capsys.readouterr().err
    resumed, _ = run(path, "--resume")
    found = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert found.keys() == expected.keys() and all(found[name].equal(expected[name]) for name in found)
    for key in ("before", "after", "reloaded", "steps", "parameters"):
        assert resumed[key] == whole[key]


def test_overwrite_starts_again(recipe):
    path = recipe(training={"max_steps": 4, "save_strategy": "steps", "save_steps": 2})
    first, directory = run(path)
    second, _ = run(path, "training.max_steps=9", "--overwrite", "training.max_steps=3")
    assert (first["steps"], second["steps"]) == (4, 3)
    assert sorted(file.name for file in directory.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]


def test_the_best_checkpoint_is_the_one_saved(recipe):
    training = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True}
    training |= {"max_steps": -1, "num_train_epochs": 3, "metric_for_best_model": "accuracy", "learning_rate": 0.05}
    metrics, directory = run(recipe(training=training))
    (last,) = directory.glob("checkpoint-24")
    state = json.loads((last / "trainer_state.json").read_text())
    assert metrics["after"]["validation"]["accuracy"] == state["best_metric"]


def test_what_the_trainer_refuses_is_one_line_and_destroys_nothing(recipe, capsys):
    path = recipe(training={"max_steps": 1})
    _, directory = run(path)
    assert main(["train", path, "training.save_strategy=best", "--overwrite"]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "training: " in error and "metric_for_best_model" in error
    assert (directory / "adapter").is_dir() and (directory / "metrics.json").is_file()


def test_a_decoder_classifies_with_its_score_head_and_without_a_validation_split(recipe, llama, reviews):
    section = {"name": "json", "data_files": reviews, "validation_split": None}
    metrics, directory = run(recipe(model={"name": str(llama)}, data=section))
    check_metrics(metrics, directory)
    assert metrics["parameters"]["trainable"] - metrics["parameters"]["trainable_outside_head"] == 2 * 16
    assert list(metrics["after"]) == ["test"]


@pytest.mark.parametrize(
    "shipped", sorted((Path(__file__).parents[2] / "configs").glob("*.yaml")), ids=lambda p: p.stem
)
def test_the_shipped_recipes_run(shipped, bert, llama, vit, reviews, copies, pictures, tmp_path, monkeypatch):
    """With stand-ins for the models and data that must be downloaded; all else as it is shipped."""
    stand_ins = {
        "sequence-classification": (bert, {"name": "json", "data_files": reviews}),
        "causal-lm": (llama, {"name": "json", "data_files": copies, "chat_template": True}),
        "image-classification": (vit, {"name": str(pictures)}),
    }
    changes = ["training.use_cpu=true", "training.max_steps=2", f"training.output_dir={tmp_path / 'run'}"]
    for name in ("minilm", "movie-reviews"):
        (tmp_path / ".cache/embedded" / name).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    task = load(shipped, changes).resolved["task"]  # with its own model and data: the names are right
    model, data = stand_ins[task]
    assert main(["train", str(shipped), *changes, f"model.name={model}", f"data={json.dumps(data)}"]) == 0
    assert (tmp_path / "run" / "metrics.json").is_file() and list((tmp_path / "run").glob("checkpoint-*"))


def test_a_broken_data_file_is_one_line(recipe, reviews, tmp_path, capsys):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "good", "label"')
    assert main(["train", recipe(data={"name": "json", "data_files": {**reviews, "test": str(broken)}})]) == 2
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: data: cannot load 'json': ")


def test_labels_unknown_in_training_are_refused(recipe, reviews, tmp_path, capsys):
    odd = tmp_path / "odd.jsonl"
    odd.write_text('{"text": "good", "other": "film", "label": "neutral"}\n')
    assert main(["train", recipe(data={"name": "json", "data_files": {**reviews, "test": str(odd)}})]) == 2
    assert "data.test_split: 'neutral' in its label is not one of training's labels" in capsys.readouterr().err


def test_a_reload_that_differs_is_an_error(recipe, monkeypatch):
    load = PeftModel.from_pretrained.__func__

    def broken(cls, *args, **kwargs):
        model = load(cls, *args, **kwargs)
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.data.add_(1.0).mul_(-2.0)
        return model

    monkeypatch.setattr(PeftModel, "from_pretrained", classmethod(broken))
    with pytest.raises(RuntimeError, match="does not evaluate as it did when it was saved"):
        main(["train", recipe(), "--verify"])


def test_a_mistake_is_one_line_of_a_process(recipe):
    """And no line of the libraries that are imported."""
    command = [sys.executable, "-m", "hyperadapt_cli", "train", recipe(), "tuner.peft_typ=LORA"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: tuner.peft_typ: unknown key; the nearest valid name is 'peft_type'\n"


def test_a_run_prints_bars_and_the_table(recipe):
    """Not transformers' report of the new head, nor deprecations and missing kernels."""
    command = [sys.executable, "-m", "hyperadapt_cli", "train", recipe(training={"max_steps": 2})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    *logged, frequent, accuracy, _, _, _ = done.stdout.splitlines()
    assert frequent.startswith("test accuracy of the most frequent label") and "test accuracy after" in accuracy
    assert all(line.startswith("{") for line in logged)
    bars = re.split(r"[\r\n]+", done.stderr.strip())
    assert all("%|" in line or "examples/s" in line for line in bars), bars


def test_only_what_is_asked_for_is_evaluated(recipe):
    path = recipe(training={"max_steps": 2})
    assert main(["train", path]) == 0
    metrics = json.loads((Path(path).parent / "run" / "metrics.json").read_text())
    assert "after" in metrics and "before" not in metrics and "reloaded" not in metrics
    verified, _ = run(path, "--overwrite")
    assert verified["after"] == metrics["after"] and verified["parameters"] == metrics["parameters"]
