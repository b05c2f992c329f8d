"""Threads that serve mixed batches from one model do not disturb each other, nor does one that adds adapters."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from ..tiny import build


BATCHES = [["default", "second", "__base__"], ["second", "third", "second"], ["third", "__base__", "default"], None]


@pytest.fixture
def often_switched():
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@torch.no_grad()
@pytest.mark.parametrize("config", [HyperAdaptConfig, SurmConfig])
def test_mixed_batches_while_adapters_come_and_go(config, often_switched, tmp_path):
    model, batch, task_type = build("bert")
    options = {"task_type": task_type, "init_weights": False}
    narrow = {**options, "target_modules": ["query"]}
    model = get_peft_model(model, config(**narrow)).eval()
    for name in ("second", "third"):
        model.add_adapter(name, config(**narrow))
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data = torch.randn_like(parameter)
    model.save_pretrained(tmp_path, selected_adapters=["third"])
    inputs = {"input_ids": batch["input_ids"][:3]}
    expected = [model(**inputs, adapter_names=names).logits for names in BATCHES]
    served, stop = [0] * len(BATCHES), threading.Event()

    @torch.no_grad()
    def serve(which):
        while not stop.is_set():
            logits = model(**inputs, adapter_names=BATCHES[which]).logits
            assert torch.equal(logits, expected[which]), f"batch {BATCHES[which]} after {served[which]} right ones"
            served[which] += 1

    def come_and_go():
        try:
            for target in ("key", "0.intermediate.dense", "query", "value", "1.intermediate.dense", "0.output.dense"):
                if target == "query":
                    model.load_adapter(tmp_path / "third", "new")
                else:  # on layers that no adapter was on
                    model.add_adapter("new", config(**options, target_modules=[target]))
                before = sum(served)
                while sum(served) < before + 8 and not stop.is_set():
                    stop.wait(0.001)
                model.delete_adapter("new")
        finally:
            stop.set()

    with ThreadPoolExecutor(len(BATCHES) + 1) as pool:
        results = [pool.submit(come_and_go), *(pool.submit(serve, which) for which in range(len(BATCHES)))]
        for result in results:
            result.add_done_callback(lambda done: stop.set())
    for result in results:
        result.result()
    assert all(served)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_adapter_deleted_during_its_call_is_told():
    class Deleting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            model.delete_adapter("second")
            return self.layer(x)

    config = HyperAdaptConfig(target_modules=["layer"], init_weights=False)
    model = get_peft_model(Deleting(), config)
    model.add_adapter("second", config)
    with pytest.raises(RuntimeError, match="Deleted while a batch used them.*second"):
        model.eval()(x=torch.randn(2, 4), adapter_names=["default", "second"])
