"""Exports without merging compute the adapted outputs, also for another batch size."""

import io

import onnx
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import nn

from .test_layer import STRUCTURES, adapt


pytestmark = [
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning"),
    pytest.mark.parametrize("placement", ["parallel", "sequential"]),
    pytest.mark.parametrize("structure", STRUCTURES),
]


@pytest.fixture
def adapted(structure, placement):
    """An adapted layer wide enough for FFTs, inputs of two batch sizes and the outputs."""
    layer, model, x = adapt("wide", structure, torch.float32, placement=placement)
    inputs = x, torch.randn(5, *x.shape[1:])
    outputs = [model(x).detach() for x in inputs]
    assert not torch.allclose(outputs[0], layer(x), atol=0.01)
    return model, inputs, outputs


def assert_outputs(run, inputs, outputs):
    for x, expected in zip(inputs, outputs, strict=True):
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)


def test_jit_trace(adapted):
    model, inputs, outputs = adapted
    file = io.BytesIO()
    torch.jit.save(torch.jit.trace(model.get_base_model(), inputs[:1]), file)
    file.seek(0)
    assert_outputs(torch.jit.load(file), inputs, outputs)


def test_torch_export(adapted):
    model, inputs, outputs = adapted
    program = torch.export.export(
        model.get_base_model(), inputs[:1], dynamic_shapes=({0: torch.export.Dim("batch", min=2)},)
    )
    assert_outputs(program.module(), inputs, outputs)


def test_onnx_by_torchscript(adapted):
    model, inputs, outputs = adapted
    file = io.BytesIO()
    options = {"input_names": ["x"], "dynamic_axes": {"x": {0: "batch"}}}
    torch.onnx.export(model.get_base_model(), inputs[:1], file, dynamo=False, opset_version=18, **options)
    session = ReferenceEvaluator(onnx.load_from_string(file.getvalue()))
    assert_outputs(lambda x: torch.tensor(session.run(None, {"x": x.numpy()})[0]), inputs, outputs)


def test_onnx_by_torch_export(adapted, tmp_path):
    model, inputs, outputs = adapted
    program = torch.onnx.export(
        model.get_base_model(), inputs[:1], dynamo=True, dynamic_shapes=({0: "batch"},), verbose=False
    )
    program.save(tmp_path / "model.onnx")
    session = ReferenceEvaluator(str(tmp_path / "model.onnx"))
    assert_outputs(lambda x: torch.tensor(session.run(None, {"x": x.numpy()})[0]), inputs, outputs)


def test_quantize_dynamic(adapted):
    """The base layer is quantized, and the adapter acts on its output."""
    model, inputs, _ = adapted
    with torch.no_grad(), model.disable_adapter():
        base = model.get_base_model().layer.base_layer
        alone = torch.ao.quantization.quantize_dynamic(nn.Sequential(base), {nn.Linear}, torch.qint8)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, torch.qint8)
    x, layer = inputs[0], model.get_base_model().layer
    layer.base_layer = alone[0]
    assert type(quantized.get_base_model().layer.base_layer) is type(alone[0])
    torch.testing.assert_close(quantized(x), model(x))
