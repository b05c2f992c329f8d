"""Models that have no input embeddings, by which transformers' `get_input_embeddings` raises: adapters load all the same."""

import pytest
import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments
from transformers.integrations.peft import PeftAdapterMixin

from hyperadapt_peft import HyperAdaptConfig, SurmConfig, load_adapters


TEXT = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
SPEECH = {
    **TEXT, "vocab_size": 32, "conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "final_dropout": 0.0, "layerdrop": 0.0,
}  # fmt: skip
STAGES = {"hidden_sizes": [16, 32], "depths": [1, 1]}
IMAGE = {"pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))}
SOUND = {"input_values": torch.randn(2, 400, generator=torch.Generator().manual_seed(1))}
BACKBONE = tf.ResNetConfig(embedding_size=16, layer_type="basic", out_features=["stage2"], **STAGES)

# The model, a batch, and the modules to adapt where the default takes none.
MODELS = {
    "clip": (
        lambda: tf.CLIPModel(
            tf.CLIPConfig(
                text_config={**TEXT, "vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 2},
                vision_config={**TEXT, "image_size": 32, "patch_size": 16},
            )
        ),
        {**IMAGE, "input_ids": torch.tensor([[3, 4, 2], [5, 6, 2]])},
        None,
    ),
    "wav2vec2": (lambda: tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**SPEECH)), SOUND, None),
    "hubert": (lambda: tf.HubertModel(tf.HubertConfig(**SPEECH)), SOUND, None),
    "wavlm": (lambda: tf.WavLMModel(tf.WavLMConfig(**SPEECH, num_buckets=8)), SOUND, None),
    "segformer": (
        lambda: tf.SegformerForSemanticSegmentation(
            tf.SegformerConfig(
                num_encoder_blocks=2, sr_ratios=[2, 1], patch_sizes=[7, 3], strides=[4, 2], mlp_ratios=[2, 2],
                num_attention_heads=[1, 2], decoder_hidden_size=16, **STAGES,
            )
        ),
        IMAGE,
        None,
    ),
    "detr": (
        lambda: tf.DetrForObjectDetection(
            tf.DetrConfig(
                backbone_config=BACKBONE, use_timm_backbone=False, backbone=None, d_model=32, encoder_layers=1,
                decoder_layers=1, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48,
                decoder_ffn_dim=48, num_queries=4, num_labels=3,
            )
        ),
        IMAGE,
        None,
    ),
    "convnext": (
        lambda: tf.ConvNextForImageClassification(tf.ConvNextConfig(num_stages=2, num_labels=2, **STAGES)),
        IMAGE,
        None,
    ),
    "resnet": (
        lambda: tf.ResNetForImageClassification(
            tf.ResNetConfig(embedding_size=16, layer_type="basic", num_labels=2, **STAGES)
        ),
        IMAGE,
        ["convolution"],
    ),
}  # fmt: skip
TUNERS = {"hyperadapt": HyperAdaptConfig, "surm": SurmConfig}
CASES = [
    (name, tuner) for name in MODELS for tuner in TUNERS if (name, tuner) != ("resnet", "surm")
]  # it has no linear


def build(name):
    torch.manual_seed(0)
    return MODELS[name][0]().eval()


def adapted(name, tuner):
    targets = MODELS[name][2]
    if tuner == "surm":
        targets = r".*(fc1|fc2|pwconv1|pwconv2|dense1|intermediate_dense)"
    return get_peft_model(build(name), TUNERS[tuner](target_modules=targets))


@torch.no_grad()
def outputs(model, name):
    result = model.eval()(**MODELS[name][1])
    return result.get("logits_per_image", result[0])


@pytest.mark.parametrize("name, tuner", CASES)
@pytest.mark.filterwarnings("ignore:Not adapted")
def test_adapters_load_exactly(name, tuner, tmp_path):
    with pytest.raises((NotImplementedError, AttributeError)):
        build(name).get_input_embeddings()
    model = adapted(name, tuner)
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    loss = model(**MODELS[name][1])[0].float().square().mean()
    loss.backward()
    optimizer.step()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    expected = outputs(model, name)
    assert not torch.equal(expected, outputs(build(name), name))
    model.save_pretrained(tmp_path)

    loaded = PeftModel.from_pretrained(build(name), tmp_path)
    assert torch.equal(outputs(loaded, name), expected)
    loaded.load_adapter(tmp_path, "second")
    load_adapters(loaded, {"third": tmp_path, "fourth": tmp_path})
    for adapter in ("second", "third", "fourth"):
        loaded.set_adapter(adapter)
        assert torch.equal(outputs(loaded, name), expected)
    native = build(name)
    PeftAdapterMixin.load_adapter(native, str(tmp_path))  # Wav2Vec2's own `load_adapter` means something else
    assert torch.equal(outputs(native, name), expected)


@pytest.mark.parametrize("tuner", TUNERS)
@pytest.mark.filterwarnings("ignore:Not adapted")
def test_the_trainer_resumes_and_loads_the_best_model(tuner, tmp_path):
    rows = [{"pixel_values": IMAGE["pixel_values"][i % 2], "labels": i % 2} for i in range(8)]

    def trainer(steps):
        arguments = TrainingArguments(
            tmp_path, max_steps=steps, per_device_train_batch_size=4, learning_rate=1e-2, report_to=[], use_cpu=True,
            save_steps=2, eval_strategy="steps", eval_steps=2, load_best_model_at_end=True, disable_tqdm=True,
        )  # fmt: skip
        return Trainer(adapted("convnext", tuner), arguments, train_dataset=rows, eval_dataset=rows)

    trainer(2).train()
    resumed = trainer(4)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    best = PeftModel.from_pretrained(build("convnext"), resumed.state.best_model_checkpoint)
    assert torch.equal(outputs(resumed.model, "convnext"), outputs(best, "convnext"))
