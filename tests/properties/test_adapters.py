"""Any shape, dtype and name: the identity at the start, the dense update after it, the same bits after saving and loading."""

import tempfile
from pathlib import Path

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel, get_peft_model
from torch import nn

from hyperadapt_peft import HyperAdaptConfig, SurmConfig

from .operations import dense_surm, offsets


settings.register_profile("properties", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("properties")

SIZES = st.integers(1, 9)
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])
HYPERADAPT = st.builds(dict, sides=st.sampled_from(["both", "row", "column"]))
SURM = st.one_of(
    st.builds(dict, structure=st.sampled_from(["circulant", "toeplitz", "kronecker"])),
    st.builds(dict, structure=st.just("ldr"), r=st.integers(1, 3)),
)
CONFIGS = st.one_of(
    st.tuples(st.just(HyperAdaptConfig), HYPERADAPT),
    st.tuples(st.just(SurmConfig), SURM),
    st.tuples(st.just(SurmConfig), SURM.map(lambda fields: fields | {"placement": "sequential"})),
)


def base(rows, columns, bias, dtype):
    torch.manual_seed(rows * 10 + columns)
    return nn.Sequential(nn.Linear(columns, rows, bias=bias)).to(dtype)


@torch.no_grad()
@given(SIZES, SIZES, st.booleans(), DTYPES, CONFIGS, st.integers(0, 3))
def test_shapes_and_dtypes(rows, columns, bias, dtype, config, batch):
    config_cls, fields = config
    x = torch.randn(batch, columns).to(dtype)
    expected = base(rows, columns, bias, dtype)(x)
    fresh = get_peft_model(base(rows, columns, bias, dtype), config_cls(target_modules=["0"], **fields))
    assert torch.equal(fresh(x), expected)

    config = config_cls(target_modules=["0"], init_weights=False, **fields)
    model = get_peft_model(base(rows, columns, bias, dtype), config).eval()
    output = model(x)
    assert output.dtype == dtype and output.shape == (batch, rows)
    if getattr(config, "placement", "parallel") == "parallel":
        layer = model.base_model.model[0]
        weight = layer.base_layer.weight.double()
        if config_cls is HyperAdaptConfig:
            row, column = offsets(layer, "default", config.alpha)
            weight = (1 + row)[:, None] * weight * (1 + column)
        else:
            weight = weight + dense_surm(layer, "default", config)
        dense = x.double() @ weight.T + (layer.base_layer.bias.double() if bias else 0)
        tolerance = 20 * torch.finfo(dtype).eps
        torch.testing.assert_close(output.double(), dense, rtol=tolerance, atol=tolerance * columns)
    with tempfile.TemporaryDirectory() as tmp:
        model.save_pretrained(tmp)
        loaded = PeftModel.from_pretrained(base(rows, columns, bias, dtype), tmp)
    state = model.state_dict()
    assert {key: tensor.dtype for key, tensor in loaded.state_dict().items()} == {k: t.dtype for k, t in state.items()}
    assert all(torch.equal(tensor, state[key]) for key, tensor in loaded.state_dict().items())
    assert torch.equal(loaded(x), output)


@torch.no_grad()
@given(st.text(max_size=20))
def test_names(name):
    """Any text is refused as a name before anything is done, or is saved under the name and loads from there."""
    layers = base(3, 4, True, torch.float32)
    config = HyperAdaptConfig(target_modules=["0"], init_weights=False)
    try:
        model = get_peft_model(layers, config, adapter_name=name)
    except ValueError as exc:
        assert "cannot be called" in str(exc)
        assert type(layers[0]) is nn.Linear
        return
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / "root"
        model.save_pretrained(root)
        assert [path.name for path in Path(tmp).iterdir()] == ["root"]
        saved = root if name == "default" else root / name
        loaded = PeftModel.from_pretrained(base(3, 4, True, torch.float32), saved, adapter_name=name)
        x = torch.randn(2, 4)
        assert torch.equal(loaded(x), model(x))
