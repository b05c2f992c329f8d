"""Tiny random models of the architectures users have, built from configs: name -> (model, batch, task type)."""

import torch
import transformers as tf


SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 64,
    "max_position_embeddings": 32,
}


def _text(labels=None):
    ids = torch.randint(3, 64, (8, 12), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids.clone() if labels is None else labels}


def _llama():
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES, num_key_value_heads=2)), _text(), "CAUSAL_LM"


def _gpt2():
    config = tf.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=32, vocab_size=64, attn_pdrop=0, resid_pdrop=0,
                           embd_pdrop=0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return tf.GPT2LMHeadModel(config), _text(), "CAUSAL_LM"


def _bert():
    config = tf.BertConfig(**SIZES, num_labels=2, hidden_dropout_prob=0, attention_probs_dropout_prob=0)
    return tf.BertForSequenceClassification(config), _text(torch.tensor([0, 1] * 4)), "SEQ_CLS"


def _t5():
    config = tf.T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=64, dropout_rate=0,
                         decoder_start_token_id=0)  # fmt: skip
    return tf.T5ForConditionalGeneration(config), _text(), "SEQ_2_SEQ_LM"


def _opt():
    config = tf.OPTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=48, vocab_size=64,
                          max_position_embeddings=32, word_embed_proj_dim=32, dropout=0)  # fmt: skip
    return tf.OPTForCausalLM(config), _text(), "CAUSAL_LM"


def _qwen():
    return tf.Qwen2ForCausalLM(tf.Qwen2Config(**SIZES, num_key_value_heads=2)), _text(), "CAUSAL_LM"


def _vit():
    config = tf.ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
                          image_size=16, patch_size=8, num_labels=2)  # fmt: skip
    pixels = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    return tf.ViTForImageClassification(config), {"pixel_values": pixels, "labels": torch.tensor([0, 1] * 4)}, None


MODELS = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "t5": _t5, "opt": _opt, "qwen": _qwen, "vit": _vit}


class Wrapper(torch.nn.Module):
    """A model of one layer."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def build(name):
    torch.manual_seed(0)
    model, batch, task_type = MODELS[name]()
    return model.eval(), batch, task_type
