"""Which layers are adapted, refused or trained whole: told from what they are, on real architectures from tiny configs."""

import pytest
import torch
import transformers as tf
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn import functional

from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.tuners.common.targets import has_known_forward, is_read_uncalled

from ...tiny import SIZES, build


TEXT = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": 32, "projection_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
VISION = {**TEXT, "image_size": 16, "patch_size": 8}
AUDIO = {
    **TEXT, "conv_dim": [16, 16], "conv_kernel": [4, 4], "conv_stride": [4, 4], "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2, "num_feat_extract_layers": 2, "hidden_dropout": 0.0, "feat_proj_dropout": 0.0,
    "attention_dropout": 0.0, "activation_dropout": 0.0, "layerdrop": 0.0, "mask_time_prob": 0.0,
}  # fmt: skip
IDS = torch.randint(3, 64, (4, 8), generator=torch.Generator().manual_seed(0))


def targets(model, **config):
    config.setdefault("cls", HyperAdaptConfig)
    return set(get_peft_model(model, config.pop("cls")(**config)).targeted_module_names)


def ends(names):
    return {name.rpartition(".")[2] for name in names}


# layers with a forward of their own


class Twice(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Typed(nn.Linear):
    def forward(self, input):
        return functional.linear(input.float(), self.weight.float(), self.bias).to(input.dtype)


def test_a_layer_whose_forward_is_its_own_is_left_out_and_refused_when_named():
    def model():
        return nn.ModuleDict({"fine": nn.Linear(4, 4), "twice": Twice(4, 4), "typed": Typed(4, 4)})

    with pytest.warns(UserWarning, match="Not adapted, because the forward of Twice is its own.*: twice"):
        assert targets(model()) == {"fine", "typed"}
    base = model()
    with pytest.raises(ValueError, match="twice is not supported: the forward of Twice is its own.*exclude_modules"):
        get_peft_model(base, HyperAdaptConfig(target_modules=["fine", "twice"]))
    assert type(base["fine"]) is nn.Linear


def test_forwards_that_compute_what_the_kind_computes_are_known():
    from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
    from transformers.models.bart.modeling_bart import BartLearnedPositionalEmbedding, BartScaledWordEmbedding
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear
    from transformers.models.falcon.modeling_falcon import FalconLinear
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    router = Llama4Router(tf.Llama4TextConfig(hidden_size=8, num_local_experts=4))
    known = [FalconLinear(4, 6), FalconLinear(4, 6, bias=False), BartScaledWordEmbedding(8, 4, 0, 3.0)]
    known += [NonDynamicallyQuantizableLinear(4, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))]
    strange = [DeepseekV4GroupedLinear(8, 12, 2), router, BartLearnedPositionalEmbedding(8, 4), nn.LayerNorm(4)]
    assert [has_known_forward(layer) for layer in known] == [True] * len(known)
    assert [has_known_forward(layer) for layer in strange] == [False] * len(strange)


def test_deepseek_v4_trains_by_default():
    config = tf.DeepseekV4Config(
        vocab_size=64, hidden_size=32, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, head_dim=16,
        q_lora_rank=8, o_lora_rank=8, o_groups=2, n_routed_experts=4, num_experts_per_tok=2, index_n_heads=2,
        index_head_dim=16, num_hash_layers=0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    with pytest.warns(UserWarning, match=r"DeepseekV4GroupedLinear.*layers\.\*\.self_attn\.o_a_proj"):
        model = get_peft_model(tf.DeepseekV4ForCausalLM(config), HyperAdaptConfig())
    model(input_ids=IDS, labels=IDS).loss.backward()
    assert "o_a_proj" not in ends(model.targeted_module_names) and "o_b_proj" in ends(model.targeted_module_names)


# layers that are read without being called


def wavlm():
    return tf.WavLMModel(tf.WavLMConfig(**AUDIO)), {"q_proj", "k_proj", "v_proj", "out_proj"}


def jamba():
    config = tf.JambaConfig(
        **{**TEXT, "num_hidden_layers": 2}, num_experts=2, attn_layer_period=2, attn_layer_offset=1, mamba_dt_rank=4,
        num_key_value_heads=2, use_mamba_kernels=False,
    )  # fmt: skip
    return tf.JambaModel(config), {"dt_proj"}


def mobilebert():
    config = tf.MobileBertConfig(
        vocab_size=64, hidden_size=32, embedding_size=16, intra_bottleneck_size=16, num_hidden_layers=1,
        num_attention_heads=2, intermediate_size=32, num_feedforward_networks=2,
    )  # fmt: skip
    return tf.MobileBertForMaskedLM(config).cls, {"dense"}  # alone, as of the whole model it is the head


def longcat():
    config = tf.LongcatFlashConfig(
        vocab_size=64, hidden_size=32, num_layers=1, num_hidden_layers=2, num_attention_heads=2, ffn_hidden_size=48,
        q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, head_dim=16, v_head_dim=16,
        moe_topk=1, n_routed_experts=4, zero_expert_num=2, expert_ffn_hidden_size=16, rope_parameters=None,
    )  # fmt: skip
    return tf.LongcatFlashModel(config), {"classifier"}


@pytest.mark.parametrize("architecture", [wavlm, jamba, mobilebert, longcat])
def test_layers_that_are_read_uncalled_are_left_out_and_refused_when_named(architecture):
    model, read = architecture()
    with pytest.warns(UserWarning, match="reads its weight without calling it") as caught:
        adapted = targets(model)
    assert adapted and sum("Not adapted" in str(w.message) for w in caught) == 1
    names = {name for name in dict(architecture()[0].named_modules()) if name.rpartition(".")[2] in read}
    uncalled = {name for name in names if is_read_uncalled(architecture()[0], name)}
    assert ends(uncalled) == read and not uncalled & adapted
    with pytest.raises(ValueError, match="is not supported: a module around it reads its weight"):
        get_peft_model(architecture()[0], HyperAdaptConfig(target_modules=sorted(uncalled)))


KERNELS = {  # which no CPU has: told from their sources alone
    "bamba.BambaMixer": {"out_proj"},
    "falcon_h1.FalconH1Mixer": {"out_proj"},
    "falcon_mamba.FalconMambaMixer": {"x_proj", "dt_proj", "out_proj"},
    "granitemoehybrid.GraniteMoeHybridMambaLayer": {"out_proj"},
    "mamba.MambaMixer": {"x_proj", "dt_proj", "out_proj"},
    "mamba2.Mamba2Mixer": {"out_proj"},
    "nemotron_h.NemotronHMamba2Mixer": {"out_proj"},
    "zamba2.Zamba2MambaMixer": {"out_proj"},
}
CALLED = {"bloom.BloomMLP": set(), "deberta.DisentangledSelfAttention": set(), "t5.T5DenseActDense": set()}
LINEAR = {"in_proj", "x_proj", "dt_proj", "out_proj", "dense_4h_to_h", "dense_h_to_4h", "wi", "wo"}


@pytest.mark.parametrize("name, read", [*KERNELS.items(), *CALLED.items()])
def test_what_fused_kernels_take_is_told_from_the_source(name, read):
    from importlib import import_module

    from hyperadapt_peft.tuners.common.targets import _read_weights

    module, _, cls = name.partition(".")
    cls = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), cls)
    assert _read_weights(cls) & LINEAR == read


class Parent(nn.Module):
    """Reads its children's weights in all the ways that use no value, and in some that do."""

    def __init__(self):
        super().__init__()
        for name in ("called", "asked", "helped", "named", "handed"):
            setattr(self, name, nn.Linear(4, 4))
        self.listed = nn.ModuleList([nn.Linear(4, 4)])
        nn.init.ones_(self.called.weight)

    def reset_parameters(self):
        nn.init.ones_(self.called.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, nn.Parameter) and self.asked.weight.device != x.device:
            x = x.to(self.asked.weight).to(self.asked.weight.dtype)
        if self.asked.weight is not None:
            self.called.weight.data.clamp_(-9, 9)
        like = self.asked.weight
        x = x.to(like.dtype) + torch.zeros_like(like)
        projection = self.named
        weight = projection.weight
        x = functional.linear(self._help(x), weight)
        for layer in self.listed:
            x = x @ layer.weight.T
        return self.asked(self.called(functional.linear(input=x, weight=self.handed.weight)))

    def _help(self, x):
        return x @ self.helped.weight


def test_reading_is_told_from_asking():
    model = nn.ModuleDict({"parent": Parent()})
    names = ("called", "asked", "helped", "named", "handed", "listed.0")
    assert {n for n in names if is_read_uncalled(model, f"parent.{n}")} == {"helped", "named", "handed", "listed.0"}


class Block(nn.Module):
    """Calls its children from a list of its own, as MaskFormer's heads do."""

    def __init__(self):
        super().__init__()
        self.steps = [nn.Linear(4, 4), nn.ReLU()]
        for i, layer in enumerate(self.steps):
            self.add_module(str(i), layer)

    def forward(self, x):
        for layer in self.steps:
            x = layer(x)
        return x


def test_a_layer_that_is_called_from_a_list_is_left_out_and_refused_when_named():
    with pytest.warns(UserWarning, match="calls it from a list of its own"):
        assert targets(nn.ModuleDict({"block": Block(), "fine": nn.Linear(4, 4)})) == {"fine"}
    with pytest.raises(ValueError, match="block.0 is not supported: the module around it calls it from a list"):
        get_peft_model(nn.ModuleDict({"block": Block()}), HyperAdaptConfig(target_modules=["block.0"]))


# heads


def head_models():
    text = {key: value for key, value in TEXT.items() if key != "projection_dim"}
    return {
        "distilbert": (
            tf.DistilBertForSequenceClassification,
            tf.DistilBertConfig(vocab_size=64, dim=32, n_heads=2, n_layers=1, hidden_dim=48, dropout=0.0),
            {"pre_classifier", "classifier"},
        ),
        "xlnet": (
            tf.XLNetForSequenceClassification,
            tf.XLNetConfig(vocab_size=64, d_model=32, n_layer=1, n_head=2, d_inner=48, dropout=0.0),
            {"sequence_summary", "logits_proj"},
        ),
        "xlm": (
            tf.XLMForSequenceClassification,
            tf.XLMConfig(vocab_size=64, emb_dim=32, n_layers=1, n_heads=2, max_position_embeddings=32),
            {"sequence_summary"},
        ),
        "deberta": (
            tf.DebertaForSequenceClassification,
            tf.DebertaConfig(**text, pooler_hidden_size=32),
            {"pooler", "classifier"},
        ),
        "bart": (
            tf.BartForSequenceClassification,
            tf.BartConfig(vocab_size=64, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                          decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48),
            {"classification_head"},
        ),
        "bert tokens": (tf.BertForTokenClassification, tf.BertConfig(**text), {"classifier"}),
        "modern bert answers": (
            tf.ModernBertForQuestionAnswering,
            tf.ModernBertConfig(**{**text, "num_hidden_layers": 1}, attention_dropout=0.0),
            {"head", "classifier"},
        ),
        "llama": (tf.LlamaForSequenceClassification, tf.LlamaConfig(**SIZES, pad_token_id=0), {"score"}),
    }  # fmt: skip


@pytest.mark.parametrize("name", head_models())
def test_a_new_head_is_trained_and_saved_whole_and_reloads_over_another(name, tmp_path):
    cls, config, expected = head_models()[name]
    task = {"TokenC": "TOKEN_CLS", "Questi": "QUESTION_ANS"}.get(cls.__name__.rpartition("For")[2][:6], "SEQ_CLS")
    ids = IDS.clone()
    ids[:, -1] = 2
    torch.manual_seed(0)
    base = cls(config)
    torch.manual_seed(0)
    fresh = cls(config)
    model = get_peft_model(base, HyperAdaptConfig(task_type=task))
    assert not any(name.startswith(tuple(expected)) for name in model.targeted_module_names)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                assert ".hyperadapt_" in key or key.split(".")[2] in expected
                parameter.normal_(std=0.1)
    heads = {key.split(".")[2] for key, p in model.named_parameters() if p.requires_grad and "modules_to_save" in key}
    assert heads == expected
    model.save_pretrained(tmp_path)
    for head in expected:
        for parameter in fresh.get_submodule(head).parameters():
            parameter.data.fill_(7.0)
    loaded = PeftModel.from_pretrained(fresh, tmp_path)
    with torch.no_grad():
        wanted, found = (m.eval()(input_ids=ids) for m in (model, loaded))
    key = "start_logits" if task == "QUESTION_ANS" else "logits"
    assert torch.equal(wanted[key], found[key])


def test_a_head_that_peft_would_wrap_twice_is_told(tmp_path):
    config = tf.BigBirdConfig(**TEXT, attention_type="original_full")
    with pytest.warns(UserWarning, match="Not trained nor saved, because .*: qa_classifier"):
        model = get_peft_model(tf.BigBirdForQuestionAnswering(config), HyperAdaptConfig(task_type="QUESTION_ANS"))
    model.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="Not trained nor saved"):
        PeftModel.from_pretrained(tf.BigBirdForQuestionAnswering(config), tmp_path)


def test_ctc_heads_are_no_targets_and_the_default_saves_and_loads(tmp_path):
    def model():
        torch.manual_seed(0)
        return tf.Wav2Vec2ForCTC(tf.Wav2Vec2Config(**AUDIO)).eval()

    adapted = get_peft_model(model(), HyperAdaptConfig(init_weights=False)).eval()
    assert "lm_head" not in ends(adapted.targeted_module_names)
    adapted.save_pretrained(tmp_path)
    sound = torch.randn(2, 400, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted, found = (m(sound).logits for m in (adapted, PeftModel.from_pretrained(model(), tmp_path)))
    assert torch.equal(wanted, found)


def test_heads_of_models_inside_are_no_targets():
    config = {k: v for k, v in TEXT.items() if k != "projection_dim"}
    decoder = tf.BertLMHeadModel(tf.BertConfig(**config, is_decoder=True, add_cross_attention=True))
    model = tf.EncoderDecoderModel(encoder=tf.BertModel(tf.BertConfig(**config)), decoder=decoder)
    names = targets(nn.ModuleDict({"inside": model}))
    assert any("decoder.bert" in name for name in names) and not any("decoder.cls" in name for name in names)


def test_distillation_heads_are_no_targets():
    config = tf.DeiTConfig(**{k: v for k, v in VISION.items() if k != "projection_dim"})
    names = targets(tf.DeiTForImageClassificationWithTeacher(config))
    assert len(names) == 12 and not any("classifier" in name for name in names)


def test_a_model_with_tied_weights_and_no_embeddings_can_be_adapted():
    resnet = tf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = tf.DabDetrConfig(
        backbone_config=resnet, hidden_size=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=4,
    )  # fmt: skip
    assert targets(tf.DabDetrForObjectDetection(config))


# exactly these targets


def clip():
    return tf.CLIPModel(tf.CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16))


@pytest.mark.parametrize("model", [clip, lambda: tf.LlamaModel(tf.LlamaConfig(**SIZES)), lambda: build("llama")[0]])
def test_layer_1_and_nothing_else(model, tmp_path):
    adapted = get_peft_model(model(), HyperAdaptConfig(layers_to_transform=[1]))
    names = set(adapted.targeted_module_names)
    assert names == {name for name in targets(model()) if "layers.1." in name}
    adapted.save_pretrained(tmp_path)
    assert set(PeftModel.from_pretrained(model(), tmp_path).targeted_module_names) == names


class Patched(nn.Module):
    """A top-level `proj` beside one that no adapter can be put on and one that is read uncalled."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 4)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, 4, 2)})
        self.attention = nn.ModuleDict({"proj": Twice(4, 4)})

    def forward(self, x):
        return self.attention["proj"](self.proj(x))


@pytest.mark.filterwarnings("ignore:Not adapted")
@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("cls", [HyperAdaptConfig, SurmConfig])
def test_full_names_are_no_endings(cls, mixed, tmp_path):
    def config():
        return cls(target_modules="all-linear")

    model = get_peft_model(Patched(), config(), mixed=mixed)
    assert model.base_model.targeted_module_names == ["proj"]
    model.add_adapter("second", config())
    assert [name for name in model.base_model.targeted_module_names if not name.endswith("proj")] == []
    if not mixed:
        model.save_pretrained(tmp_path)
        assert PeftModel.from_pretrained(Patched(), tmp_path).targeted_module_names == ["proj"]


@pytest.mark.parametrize("cls", [HyperAdaptConfig, SurmConfig])
@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_a_mixed_model_has_the_same_default_targets(name, cls):
    model = build(name)[0]
    mixed = get_peft_model(model, cls(), mixed=True)
    assert set(mixed.base_model.targeted_module_names) == targets(build(name)[0], cls=cls)
    lora = LoraConfig(target_modules=["lm_head", "classifier"])
    mixed.add_adapter("lora", lora)  # PEFT's own are prepared by PEFT
    mixed.add_adapter("second", cls())
    assert set(mixed.peft_config["second"].target_modules) == set(mixed.peft_config["default"].target_modules)


@pytest.mark.filterwarnings("ignore:Not adapted")
def test_a_model_without_default_targets_is_told_so():
    with pytest.raises(ValueError, match="Please specify `target_modules`"):
        get_peft_model(nn.ModuleDict({"twice": Twice(4, 4), "conv": nn.Conv1d(4, 4, 1)}), HyperAdaptConfig())
