"""diffusers' ways to weigh adapters, on its UNet, SD3 and Flux models: LoRA is the control."""

import diffusers
import pytest
import torch
from peft import LoraConfig

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]
CONFIGS = {
    "hyperadapt": lambda: HyperAdaptConfig(target_modules=TARGETS, init_weights=False),
    "surm": lambda: SurmConfig(target_modules=TARGETS, init_weights=False),
    "lora": lambda: LoraConfig(target_modules=TARGETS, init_lora_weights=False),
}
LINEAR_IN = (".hyperadapt_row.", ".hyperadapt_column.", ".lora_B.", ".surm_A.")  # the strength multiplies these


def unet():
    model = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(8, 16), layers_per_block=1,
        cross_attention_dim=16, attention_head_dim=4, norm_num_groups=4,
    )  # fmt: skip
    inputs = {"sample": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 16)}
    return model, {**inputs, "timestep": torch.tensor([1, 2])}, "cross_attention_kwargs"


def sd3():
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, pooled_projection_dim=16,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 4, 8, 8), "encoder_hidden_states": torch.randn(2, 3, 16)}
    inputs |= {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([1, 2])}
    return model, inputs, "joint_attention_kwargs"


def flux():
    model = diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    inputs = {"hidden_states": torch.randn(2, 16, 4), "encoder_hidden_states": torch.randn(2, 3, 16)}
    inputs |= {"pooled_projections": torch.randn(2, 16), "timestep": torch.tensor([0.1, 0.2])}
    inputs |= {"img_ids": torch.zeros(16, 3), "txt_ids": torch.zeros(3, 3)}
    return model, inputs, "joint_attention_kwargs"


@pytest.fixture(params=[unet, sd3, flux], ids=lambda build: build.__name__)
def built(request):
    torch.manual_seed(0)
    model, inputs, kwargs_name = request.param()
    return model.eval(), inputs, kwargs_name


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


@torch.no_grad()
def output_at(model, inputs, **strengths):
    """The output with each adapter's update at a strength, made by hand: in the parameters, and put back."""
    before = {p: p.clone() for p in model.parameters()}
    for key, p in model.named_parameters():
        for name, strength in strengths.items():
            if f".{name}." in key and any(part in key for part in LINEAR_IN):
                p *= strength
    out = model(**inputs)[0]
    for p, old in before.items():
        p.copy_(old)
    return out


@torch.no_grad()
def test_scale_of_one_call(built, config):
    model, inputs, kwargs_name = built
    base = model(**inputs)[0]
    model.add_adapter(config(), "first")
    plain, half = model(**inputs)[0], output_at(model, inputs, first=0.5)
    assert not torch.allclose(plain, base, atol=1e-3) and not torch.allclose(plain, half, atol=1e-3)
    for strength, expected in ((0.5, half), (0.0, base), (-1.0, output_at(model, inputs, first=-1.0))):
        scaled = model(**inputs, **{kwargs_name: {"scale": strength}})[0]
        torch.testing.assert_close(scaled, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(model(**inputs)[0], plain)  # it was for that call


@torch.no_grad()
def test_set_adapters_with_weights(built, config):
    model, inputs, _ = built
    for name in ("first", "second"):
        model.add_adapter(config(), name)
    for weights in ([1.0, 1.0], [0.5, -1.0], [0.0, 0.25]):
        model.set_adapters(["first", "second"], [1.0, 1.0])
        expected = output_at(model, inputs, **dict(zip(("first", "second"), weights, strict=True)))
        model.set_adapters(["first", "second"], weights)
        torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(output_at(model, inputs, second=0.0), model(**inputs)[0], atol=1e-4)


@torch.no_grad()
def test_fuse_with_a_scale_and_unfuse(built, config):
    model, inputs, _ = built
    base, weights = model(**inputs)[0], {key: p.clone() for key, p in model.named_parameters()}
    model.add_adapter(config(), "first")
    expected = output_at(model, inputs, first=0.5)
    model.fuse_lora(lora_scale=0.5)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    model.unfuse_lora()
    model.disable_adapters()
    torch.testing.assert_close(model(**inputs)[0], base, rtol=1e-4, atol=1e-5)
    restored = {key.replace(".base_layer", ""): p for key, p in model.named_parameters()}
    for key, weight in weights.items():
        torch.testing.assert_close(restored[key], weight, rtol=1e-5, atol=1e-6)
