"""A wrong recipe ends in one line on stderr and exit code 2, before anything is loaded or written."""

import pytest
import yaml

from hyperadapt_cli import main
from hyperadapt_peft.cli.errors import RecipeError
from hyperadapt_peft.cli.recipe import check, load


WRONG = {
    "unknown section": (["tunr.r=8"], "tunr: unknown section; the nearest valid name is 'tuner'"),
    "unknown task": (["task=sequence-clasification"], "task: expected one of .*nearest valid name is 'sequence-"),
    "unknown key in model": (["model.revison=x"], "model.revison: unknown key.*'revision'"),
    "unknown key in data": (["data.text_colum=x"], "data.text_colum: unknown key.*'text_column'"),
    "key of another task": (["data.prompt_column=x"], "data.prompt_column: unknown key"),
    "unknown key in tuner": (["tuner.side=row"], "tuner.side: unknown key.*'sides'"),
    "key of another tuner": (["tuner.lora_alpha=8"], "tuner.lora_alpha: unknown key"),
    "unknown key in training": (["training.learning_rte=1"], "training.learning_rte: unknown key.*'learning_rate'"),
    "wrong type in training": (
        ["training.learning_rate=fast"],
        "training.learning_rate: expected a valid number, got 'fast'",
    ),
    "number for text": (["model.revision=5"], "model.revision: expected a valid string, got 5"),
    "bool for int": (["training.seed=true"], "training.seed: expected a valid integer, got True"),
    "number for bool": (["training.bf16=1"], "training.bf16: expected a valid boolean, got 1"),
    "wrong type in tuner": (
        ["tuner.target_modules=5"],
        "tuner.target_modules: expected a valid array or a valid string, got 5",
    ),
    "wrong type in data": (["data.max_length=long"], "data.max_length: expected a valid integer, got 'long'"),
    "wrong scheduler": (["training.lr_scheduler_type=linaer"], "training.lr_scheduler_type: .*'linear'"),
    "wrong strategy": (["training.eval_strategy=epochs"], "training.eval_strategy: .*'epoch'"),
    "wrong dtype": (["model.dtype=bf16"], "model.dtype: expected 'auto', .*name is 'bfloat16'"),
    "wrong sides": (["tuner.sides=rows"], "tuner.sides: expected 'both', 'row' or 'column', .*'row'"),
    "unknown peft_type": (["tuner.peft_type=HYPERADPT"], "tuner.peft_type: unknown type 'HYPERADPT'.*'HYPERADAPT'"),
    "lower-case peft_type": (["tuner.peft_type=lora"], "tuner.peft_type: unknown type 'lora'.*'LORA'"),
    "missing peft_type": (["tuner={}"], "tuner.peft_type: missing"),
    "section without keys": (["tuner=LORA"], "tuner: expected keys with values, got 'LORA'"),
    "FULL with fields": (["tuner={peft_type: FULL, r: 8}"], "tuner.r: unknown key; FULL takes none"),
    "refused by PEFT": (["tuner={peft_type: LORA, r: 8, layers_pattern: h}"], "tuner: .*layers_to_transform"),
    "refused by transformers": (
        ["training.bf16=true", "training.fp16=true"],
        "training: At most one of fp16 and bf16",
    ),
    "missing name": (["model={}"], "model.name: missing"),
    "missing output_dir": (["training={}"], "training.output_dir: missing"),
    "missing model directory": (["model.name=./nowhere"], "model.name: no such directory './nowhere'"),
    "missing data directory": (["data={name: /no/where}"], "data.name: no such directory '/no/where'"),
    "missing data file": (["data.data_files.test=no.jsonl"], "data.data_files.test: no such file 'no.jsonl'"),
    "files without format": (["data.name=imdb"], "data.data_files: expected with name csv, json, parquet"),
    "file for a name": ([f"data.name={__file__}"], "data.name: .* is a file; put it into data.data_files"),
    "model not prepared": (["model.name=.cache/embedded/no"], "model.name: no such directory '.cache/embedded/no'"),
    "data not prepared": (["data={name: .cache/embedded/no}"], "data.name: no such directory '.cache/embedded/no'"),
    "nothing to evaluate on": (["data.validation_split=null", "data.test_split=null"], "data.test_split: expected"),
    "evaluation without split": (
        ["data.validation_split=null", "training.eval_strategy=epoch"],
        "data.validation_split: expected a split, for training.eval_strategy is not 'no'",
    ),
    "choices without choices": (
        ["task=causal-lm", "data={name: x, metric: choice_likelihood}"],
        "data.choices: expected with data.metric choice_likelihood",
    ),
    "labels without choices": (
        ["task=causal-lm", "data={name: x, choice_labels: [A]}"],
        "data.choice_labels: expected",
    ),
    "broken pattern": (
        ["task=causal-lm", "data={name: x, answer_pattern: '('}"],
        "data.answer_pattern: not a regular",
    ),
    "metric of another task": (["data.metric=exact_match"], "data.metric: expected 'accuracy', 'f1', "),
    "reference to nowhere": (["data=none.yaml#rte"], ".*none.yaml: No such file"),
    "no samples": (["data.max_train_samples=0"], "data.max_train_samples: expected greater than or equal to 1, got 0"),
    "evaluation in bf16": (["training.bf16_full_eval=true"], "training.bf16_full_eval: not supported"),
    "a rate for no head": (
        ["task=causal-lm", "data={name: x}", "training.head_learning_rate=1e-3"],
        "training.head_learning_rate: this task has no classification head",
    ),
    "missing checkpoint": (["training.resume_from_checkpoint=x"], "training.resume_from_checkpoint: no such dir"),
    "override without value": (["training.seed"], "training.seed: expected section.key=value"),
    "override through a value": (["task.name=x"], "task.name=x: 'task' has no keys"),
}


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=WRONG)
def test_one_line_names_the_key(recipe, tmp_path, capsys, overrides, message):
    path = recipe()
    assert main(["train", path, *overrides]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    with pytest.raises(RecipeError, match=f"^{message}"):
        load(path, overrides)
    assert [file.name for file in tmp_path.iterdir()] == ["recipe.yaml"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        ("task: [", "not YAML"),
        ("- task", "expected the sections"),
        ("task: causal-lm", "model: "),
    ],
)
def test_unreadable_recipe(tmp_path, capsys, content, message):
    path = tmp_path / "recipe.yaml"
    if content is not None:
        path.write_text(content)
    assert main(["train", str(path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_columns_and_splits_are_checked_before_the_model_is_loaded(recipe, capsys, tmp_path):
    path = recipe(model={"name": "no-such-organisation/no-such-model"})
    for override, message in {
        "data.text_column=txt": "data.text_column: the train split has no column 'txt'; the nearest valid name is 'text'",
        "data.test_split=tset": "data: cannot load 'json'",
    }.items():
        assert main(["train", path, override]) == 2
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and message in error[0]
    assert not (tmp_path / "run").exists()


def test_yaml_values_become_what_transformers_expects(recipe):
    overrides = [
        "training.learning_rate=1e-3",
        "training.save_strategy=no",
        "training.lr_scheduler_kwargs.num_cycles=2",
    ]
    loaded = load(recipe(), overrides)
    assert loaded.arguments.learning_rate == 1e-3  # YAML takes 1e-3 for a string
    assert loaded.arguments.save_strategy == "no"  # and no for false
    assert loaded.arguments.lr_scheduler_kwargs == {"num_cycles": 2}
    assert loaded.resolved["training"]["learning_rate"] == 1e-3


def test_the_task_fills_in_its_task_type_unless_given(recipe):
    assert load(recipe()).peft_config.task_type == "SEQ_CLS"
    assert load(recipe(), ["tuner.task_type=TOKEN_CLS"]).peft_config.task_type == "TOKEN_CLS"


def test_an_override_can_replace_the_tuner(recipe):
    loaded = load(recipe(tuner={"peft_type": "HYPERADAPT", "sides": "row"}), ["tuner={peft_type: LORA, r: 4}"])
    assert loaded.peft_config.peft_type == "LORA" and loaded.peft_config.r == 4


def test_an_open_choice_of_peft_is_accepted(recipe):
    tuner = {"peft_type": "LORA", "init_lora_weights": "pissa_niter_16"}
    assert load(recipe(tuner=tuner)).peft_config.init_lora_weights == "pissa_niter_16"


def test_a_resolved_recipe_can_be_run_again(recipe):
    resolved = load(recipe(), ["tuner.peft_type=IA3", "training.seed=3"]).resolved
    assert check(yaml.safe_load(yaml.safe_dump(resolved))).resolved == resolved


def test_none_needs_a_classification_head(recipe, copies):
    path = recipe(task="causal-lm", data={"name": "json", "data_files": copies}, tuner={"peft_type": "NONE"})
    with pytest.raises(RecipeError, match=r"^tuner.peft_type: NONE trains the classification head only"):
        load(path)
