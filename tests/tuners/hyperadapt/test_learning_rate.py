"""The warning of a learning rate at which scales stand still."""

import gc
import warnings

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR
from transformers import Trainer, TrainingArguments, get_linear_schedule_with_warmup

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.tuners.hyperadapt.layer import SCALES

from ...tiny import build


HYPERADAPT = HyperAdaptConfig(target_modules=["0"])
SLOW, RIGHT = 2e-4, 5e-3


def told(recorded):
    return [str(warning.message) for warning in recorded if "scales hardly move" in str(warning.message)]


def small(config=HYPERADAPT):
    return get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), config)


def steps(model, optimizer, count=1):
    for _ in range(count):
        model(torch.ones(2, 4)).sum().backward()
        optimizer.step()


def scales_of(model):
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("rate", "count"), [(SLOW, 1), (RIGHT, 0)])
def test_in_a_users_own_trainer(rate, count, tmp_path, recwarn):
    model = get_peft_model(build("llama")[0], HyperAdaptConfig(task_type="CAUSAL_LM"))
    data = Dataset.from_dict({"input_ids": [[1, 2, 3]] * 4, "labels": [[1, 2, 3]] * 4})
    arguments = TrainingArguments(
        tmp_path,
        learning_rate=rate,
        warmup_steps=2,  # the first step's own rate is 0
        max_steps=3,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
    )
    Trainer(model, arguments, train_dataset=data).train()
    text = "HyperAdapt's scales hardly move at a learning rate of 0.0002, which suits weights; start from 5e-3."
    assert told(recwarn) == [text] * count


def test_in_a_users_own_loop_once_per_optimizer(recwarn):
    model = small()
    warnings.simplefilter("always")
    steps(model, AdamW(scales_of(model), lr=SLOW), count=3)
    assert len(told(recwarn)) == 1
    steps(model, AdamW(scales_of(model), lr=torch.tensor(SLOW)), count=3)
    assert len(told(recwarn)) == 2


def test_other_parameters_and_optimizers_are_left_alone(recwarn):
    model, lora = small(), small(LoraConfig(r=1, target_modules=["0"]))
    steps(model, SGD(scales_of(model), lr=SLOW))  # its steps are as large as the gradients
    steps(lora, AdamW(scales_of(lora), lr=SLOW))
    head = nn.Linear(2, 2)  # trained beside the scales, at a rate of its own
    groups = [{"params": head.parameters(), "lr": SLOW}, {"params": scales_of(model), "lr": RIGHT}]
    steps(model, AdamW(groups))
    assert not told(recwarn)


def test_the_rate_that_a_schedule_leads_to_counts(recwarn):
    model = small()
    optimizer = AdamW(scales_of(model), lr=RIGHT)
    get_linear_schedule_with_warmup(optimizer, 100, 1000)
    steps(model, optimizer)
    optimizer = AdamW(scales_of(model), lr=SLOW)
    OneCycleLR(optimizer, max_lr=RIGHT, total_steps=1000)
    steps(model, optimizer)
    assert not told(recwarn)
    optimizer = AdamW(scales_of(model), lr=RIGHT)
    OneCycleLR(optimizer, max_lr=SLOW, total_steps=1000)
    steps(model, optimizer)
    assert len(told(recwarn)) == 1


def test_deleted_adapters_are_not_kept():
    gc.collect()  # what earlier tests have left
    before = len(SCALES)
    model = small()
    assert len(SCALES) == before + 2
    del model
    gc.collect()
    assert len(SCALES) == before


def test_a_compiled_step_warns_and_works(recwarn):
    model = small()
    optimizer = AdamW(scales_of(model), lr=SLOW)
    model(torch.ones(2, 4)).sum().backward()
    torch.compile(optimizer.step, backend="eager")()
    assert len(told(recwarn)) == 1
    assert all(scale.abs().max() > 0 for scale in scales_of(model))
