"""Metrics, and evaluation by generation and by the likelihood of choices."""

import json

import datasets
import numpy as np
import pytest
import torch
import transformers

from hyperadapt_peft.cli.data import PromptData
from hyperadapt_peft.cli.errors import RecipeError
from hyperadapt_peft.cli.scoring import REGRESSION, classification, predict
from hyperadapt_peft.cli.tasks import causal_lm

from .test_train import check_metrics, run


def score(metrics, predictions, labels):
    return {name: metric(np.array(labels), np.array(predictions)) for name, metric in metrics.items()}


def test_classification_metrics():
    found = score(classification(2), [1, 1, 0, 1, 0, 0], [1, 0, 0, 1, 1, 0])
    true, false_positive, false_negative, negative = 2, 1, 1, 2
    assert found["accuracy"] == pytest.approx(4 / 6)
    assert found["f1"] == pytest.approx(2 * true / (2 * true + false_positive + false_negative))
    matthews = (true * negative - false_positive * false_negative) / (3 * 3 * 3 * 3) ** 0.5
    assert found["matthews_correlation"] == pytest.approx(matthews)
    assert score(classification(3), [0, 1, 1], [0, 1, 2])["f1"] == pytest.approx((1 + 2 / 3 + 0) / 3)


def test_regression_metrics():
    predictions, labels = [0.0, 1.0, 4.0, 9.0], [0.0, 1.0, 2.0, 3.0]
    found = score(REGRESSION, predictions, labels)
    assert found["pearson"] == pytest.approx(np.corrcoef(predictions, labels)[0, 1])
    assert found["spearman"] == pytest.approx(1.0)
    assert score(REGRESSION, [1.0, 1.0, 1.0, 1.0], labels) == {"pearson": 0.0, "spearman": 0.0}


def test_predictions_are_classes_tokens_or_values():
    assert predict(torch.tensor([[0.1, 0.9]]), torch.tensor([0])).tolist() == [1]
    assert predict(torch.tensor([[0.7], [0.2]]), torch.tensor([1.0, 2.0])).tolist() == pytest.approx([0.7, 0.2])
    virtual_token_first = torch.eye(4)[None]
    assert predict(virtual_token_first, torch.tensor([[0, 0, 0]])).tolist() == [[1, 2, 3]]


def test_a_regression(recipe, tmp_path):
    rows = [{"text": "good " * (index % 5), "score": float(index % 5)} for index in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = dict.fromkeys(("train", "validation", "test"), str(tmp_path / "rows.jsonl"))
    section = {"name": "json", "data_files": files, "label_column": "score", "metric": "pearson"}
    metrics, directory = run(recipe(data=section, training={"max_steps": 30}))
    check_metrics(metrics, directory)
    assert metrics["metric"] == "pearson" and metrics["after"]["test"]["pearson"] > 0.7
    assert set(metrics["after"]["test"]) == {"loss", "pearson", "spearman"}


def write(directory, rows):
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict.fromkeys(("train", "validation", "test"), str(directory / "rows.jsonl"))


def test_exact_match_of_what_is_generated(recipe, llama, tmp_path, capsys):
    rows = [{"prompt": f"{a} {b}", "completion": "good 5"} for a in range(4) for b in range(4)]
    section = {"name": "json", "data_files": write(tmp_path, rows), "metric": "exact_match", "max_new_tokens": 4}
    training = {"max_steps": 40, "learning_rate": 5e-2, "eval_strategy": "steps", "eval_steps": 20}
    path = recipe(task="causal-lm", model={"name": str(llama)}, data=section, training=training)
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["before"]["test"]["exact_match"] == 0.0 and metrics["after"]["test"]["exact_match"] == 1.0
    assert "test exact match after" in capsys.readouterr().out


def test_generation_sees_the_prompt_only_and_scores_each_row(llama, tmp_path):
    """Against transformers' own generation, one prompt at a time; half of the completions are what it writes."""
    model = transformers.AutoModelForCausalLM.from_pretrained(llama)
    tokenizer = transformers.AutoTokenizer.from_pretrained(llama)
    rows = []
    for index, prompt in enumerate(["1 2 3", "good film", "7", "very dull plot not great"]):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        tokens = model.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=3, pad_token_id=0)[
            0, ids.shape[1] :
        ]
        written = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append({"prompt": prompt, "completion": written if index % 2 else written + " film"})
    section = PromptData("json", data_files=write(tmp_path, rows), metric="exact_match", max_new_tokens=3)
    encoded = causal_lm(section, {"train": datasets.Dataset.from_list(rows)}, str(llama), None)
    trainer = encoded.trainer(
        model=model,
        args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, per_device_eval_batch_size=4),
        data_collator=encoded.collator,
        processing_class=encoded.processor,
        compute_metrics=lambda prediction: {"right": prediction.predictions},
    )
    assert trainer.evaluate(encoded.splits["train"])["eval_right"].tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize(
    ("pattern", "text", "answer"),
    [
        (None, " 42 ", "42"),
        ("#### *(.+)", "2 + 2 = 4\n#### 3\n#### 4 ", "4"),
        (r"\d+", "first 1, then 23", "23"),
        (r"\\boxed\{(.+)\}", r"so \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("#### (.+)", "no mark", "no mark"),
    ],
)
def test_the_answer_within_a_completion(pattern, text, answer, copies):
    assert PromptData("json", data_files=copies, answer_pattern=pattern).answer(text) == answer


def test_choices_are_scored_per_token(llama, tmp_path):
    """Against a forward pass of each prompt with each choice, alone and unpadded."""
    rows = [
        {"prompt": "1 2", "choices": ["good", "bad film plot", "7 7"], "answer": 0},
        {"prompt": "good film very 3", "choices": ["dull", "great"], "answer": 1},
        {"prompt": "9", "choices": ["film film film", "plot", "not not", "1"], "answer": 2},
    ]
    section = PromptData(
        "json",
        data_files=write(tmp_path, rows),
        choices="choices",
        completion_column="answer",
        metric="choice_likelihood",
    )
    splits = {role: datasets.Dataset.from_list(rows) for role in ("train", "test")}
    encoded = causal_lm(section, splits, str(llama), None)
    assert "others" not in encoded.splits["train"].column_names
    model = transformers.AutoModelForCausalLM.from_pretrained(llama).eval()
    tokenizer = encoded.processor
    expected, losses = [], []
    for row in rows:
        prompt, scores = tokenizer(row["prompt"]).input_ids, []
        for choice in row["choices"]:
            after = [*tokenizer(choice, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
            labels = torch.tensor([[-100] * len(prompt) + after])
            with torch.no_grad():
                scores.append(model(input_ids=torch.tensor([prompt + after]), labels=labels).loss.item())
        expected.append(float(np.argmin(scores) == row["answer"]))
        losses.append(scores[row["answer"]])
    trainer = encoded.trainer(
        model=model,
        args=transformers.TrainingArguments(str(tmp_path), use_cpu=True, remove_unused_columns=False),
        data_collator=encoded.collator,
        processing_class=tokenizer,
        compute_metrics=lambda prediction: {"right": prediction.predictions},
    )
    trainer.label_names = ["labels"]
    found = trainer.evaluate(encoded.splits["test"])
    assert found["eval_right"].tolist() == expected
    assert found["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_training_makes_the_right_choice_the_likeliest(recipe, llama, tmp_path):
    rows = [{"q": f"{a} {b}", "a": "good", "b": "bad", "right": "B"} for a in range(4) for b in range(4)]
    section = {
        "name": "json",
        "data_files": write(tmp_path, rows),
        "prompt": "{q} film ",
        "choices": ["{a}", "{b}"],
        "choice_labels": ["A", "B"],
        "completion_column": "right",
        "metric": "choice_likelihood",
    }
    path = recipe(task="causal-lm", model={"name": str(llama)}, data=section, training={"max_steps": 30})
    metrics, directory = run(path)
    check_metrics(metrics, directory)
    assert metrics["after"]["test"]["choice_likelihood"] == 1.0


def test_a_label_that_is_no_choice_is_one_line(llama, copies):
    section = PromptData("json", data_files=copies, choices=["a {x}", "b"], completion_column="y", prompt="{x}")
    with pytest.raises(RecipeError, match="data.choice_labels: '7' in y is not one of 0, 1"):
        section.texts({"x": "1", "y": 7})
    with pytest.raises(RecipeError, match=r"data: the template '\{x\}' does not fit the columns z, y"):
        section.texts({"z": "1", "y": 0})
    assert section.texts({"x": "1", "y": 1}) == ("1", "b", ["a 1"])
