"""Which layers are adapted, refused or trained whole: told from what they are, on real architectures from tiny configs."""

import pytest
import torch
import transformers as tf
from peft import get_peft_model
from torch import nn
from torch.nn import functional

from hyperadapt_peft import HyperAdaptConfig
from hyperadapt_peft.tuners.common.targets import has_known_forward


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
