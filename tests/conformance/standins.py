"""Tiny models with seeded weights under the names of the Hub models that PEFT's tests load: no network, no download.

Sizes follow the originals where tests depend on them (two layers in Llama, twelve of width 768 in OPT-125M, fc1 and fc2
of 16 x 4 in the tiny OPT, widths of 37 that nothing divides); vocabularies are small. The directory has the layout of the Hub's cache, so `from_pretrained`
finds the models when `HF_HOME` points to it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .upstream import digest, once


_BERT = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 37}
_LLAMA = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
_MOE = {**_LLAMA, "head_dim": 8, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 1}
_OPT = {"hidden_size": 16, "word_embed_proj_dim": 16, "ffn_dim": 4, "num_attention_heads": 4, "num_hidden_layers": 3}
_OPT_125M = {**_OPT, "hidden_size": 768, "word_embed_proj_dim": 768, "num_attention_heads": 12}
_QWEN = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2}
_T5 = {"d_model": 32, "d_ff": 37, "d_kv": 8, "num_layers": 3, "num_heads": 4, "decoder_start_token_id": 0}
_BART: dict[str, Any] = {"d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4}
_BART |= {
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 4,
    "decoder_ffn_dim": 4,
    "forced_eos_token_id": None,
    "init_std": 0.1,
}

# name on the Hub -> class in transformers, arguments of its config
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "bert-base-uncased": ("BertForMaskedLM", _BERT),
    "hf-internal-testing/tiny-random-Gemma3ForCausalLM": (
        "Gemma3ForCausalLM",
        {**_LLAMA, "hidden_size": 32, "head_dim": 8, "num_key_value_heads": 2},
    ),
    "hf-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
    "peft-internal-testing/opt-125m": ("OPTForCausalLM", {**_OPT_125M, "num_hidden_layers": 12}),
    "peft-internal-testing/tiny-dummy-qwen2": (
        "Qwen2ForCausalLM",
        {**_QWEN, "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    "peft-internal-testing/tiny-random-BartForConditionalGeneration": ("BartForConditionalGeneration", _BART),
    "peft-internal-testing/tiny-random-BertForSequenceClassification": ("BertForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-BertModel": ("BertModel", _BERT),
    "peft-internal-testing/tiny-random-DebertaModel": ("DebertaModel", {**_BERT, "pos_att_type": ["none"]}),
    "peft-internal-testing/tiny-random-DebertaV2Model": ("DebertaV2Model", {**_BERT, "pos_att_type": ["none"]}),
    "peft-internal-testing/tiny-random-GPT2LMHeadModel": (
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 37},
    ),
    "peft-internal-testing/tiny-random-GPTJForCausalLM": (
        "GPTJForCausalLM",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_inner": 37, "rotary_dim": 4},
    ),
    "peft-internal-testing/tiny-random-OPTForCausalLM": ("OPTForCausalLM", _OPT),
    "peft-internal-testing/tiny-random-RobertaForSequenceClassification": ("RobertaForSequenceClassification", _BERT),
    "peft-internal-testing/tiny-random-RobertaModel": ("RobertaModel", _BERT),
    "peft-internal-testing/tiny-random-T5ForConditionalGeneration-calibrated": ("T5ForConditionalGeneration", _T5),
    "peft-internal-testing/tiny-random-t5": ("T5ForConditionalGeneration", _T5),
    "trl-internal-testing/tiny-GptOssForCausalLM": ("GptOssForCausalLM", _MOE),
    "trl-internal-testing/tiny-Llama4ForCausalLM": ("Llama4ForCausalLM", {**_MOE, "intermediate_size_mlp": 64}),
    "trl-internal-testing/tiny-LlamaForSequenceClassification-3.2": (
        "LlamaForSequenceClassification",
        {**_LLAMA, "num_labels": 1},
    ),
    "trl-internal-testing/tiny-random-LlamaForCausalLM": ("LlamaForCausalLM", _LLAMA),
}

# an adapter on the Hub, with its branch
ADAPTER, BRANCH = "peft-internal-testing/tiny-opt-lora-revision", "test"

VOCAB_SIZE = 260
_REVISION = "0" * 40


def _tokenizer() -> Any:
    """Return a tokenizer with one token per byte and four special ones."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<s>", "<unk>", "</s>", "<pad>"]
    vocab = {token: i for i, token in enumerate(special + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    core = Tokenizer(models.BPE(vocab, merges=[], unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    names = dict(zip(("bos_token", "unk_token", "eos_token", "pad_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=64, **names)


def models() -> Path:
    """Return an `HF_HOME` whose cache holds every model of `MODELS`."""
    import transformers

    def build(target: Path) -> None:
        import torch
        from peft import LoraConfig

        def repository(name: str, branch: str = "main") -> Path:
            path = target / "hub" / f"models--{name.replace('/', '--')}"
            (path / "refs").mkdir(parents=True)
            (path / "refs" / branch).write_text(_REVISION)
            return path / "snapshots" / _REVISION

        transformers.utils.logging.disable_progress_bar()
        for name, (cls_name, kwargs) in MODELS.items():
            cls = getattr(transformers, cls_name)
            ids = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 3}  # not 1: tests type 1, padding embeds to 0
            torch.manual_seed(0)
            model = cls(cls.config_class(vocab_size=VOCAB_SIZE, **ids, **kwargs)).eval()
            snapshot = repository(name)
            model.save_pretrained(snapshot)
            _tokenizer().save_pretrained(snapshot)
        LoraConfig(target_modules=["q_proj", "v_proj"]).save_pretrained(str(repository(ADAPTER, BRANCH)))

    return once(f"models-{transformers.__version__}-{digest(Path(__file__))}", build)
