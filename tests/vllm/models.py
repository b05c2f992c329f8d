"""Tiny random models and adapters for vLLM, and what transformers and PEFT make of them one at a time."""

import torch
import transformers as tf
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from hyperadapt_peft import HyperAdaptConfig


SIZES = {
    "hidden_size": 128,  # vLLM's attention on CPUs takes heads of 32 and more
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 96}

CONFIGS = {
    "llama": lambda: tf.LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: tf.Qwen2Config(**GROUPED),
    "phi3": lambda: tf.Phi3Config(**GROUPED),  # one matrix for query, key and value in the checkpoint, too
    "opt": lambda: tf.OPTConfig(**SIZES, ffn_dim=96, word_embed_proj_dim=128),
}
PROMPTS = [[3, 5, 7, 9, 11], [4, 8, 15, 16, 23, 42]]
TOKENS = 8


def save_model(kind, path):
    """Save a model whose matrices and biases all matter."""
    torch.manual_seed(0)
    model = tf.AutoModelForCausalLM.from_config(CONFIGS[kind]())
    for name, parameter in model.named_parameters():
        norm = parameter.dim() == 1 and name.endswith("weight")
        torch.nn.init.normal_(parameter, mean=float(norm), std=0.2)
    model.save_pretrained(path)
    return path


def save_in_4_bits(model_path, path):
    """Save a copy in a format of compressed-tensors, and round the model to what the copy stands for."""
    group = 32
    model = load(model_path)
    tensors = {}
    for name, parameter in model.state_dict().items():
        if not name.endswith("proj.weight"):
            tensors[name] = parameter
            continue
        groups = parameter.unflatten(1, (-1, group))
        scale = groups.abs().amax(2) / 7
        numbers = (groups / scale[..., None]).round()
        parameter.copy_((numbers * scale[..., None]).flatten(1))
        shifts = torch.arange(0, 32, 4)
        packed = (numbers.long().flatten(1) + 8).unflatten(1, (-1, 8)).bitwise_left_shift(shifts).sum(2)
        tensors |= {f"{name}_packed": packed.to(torch.uint32).view(torch.int32), f"{name}_scale": scale}
        tensors[f"{name}_shape"] = torch.tensor(parameter.shape)
    weights = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": group}
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head"],
        "config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
    }
    model.config.save_pretrained(path)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    del model.config.quantization_config
    model.save_pretrained(model_path)
    return path


def load(path, dtype=torch.float32):
    return tf.AutoModelForCausalLM.from_pretrained(path, dtype=dtype)


def save_adapter(model_path, path, seed=1, **config):
    """Save an adapter of random scales."""
    torch.manual_seed(seed)
    config = HyperAdaptConfig(task_type="CAUSAL_LM", **{"init_weights": False, **config})
    get_peft_model(load(model_path), config).save_pretrained(path)
    return path


def alone(model_path, adapter_paths, prompts=PROMPTS, dtype=torch.float32):
    """Return what transformers and PEFT generate greedily for (adapter's path or None, prompt), one at a time."""
    results = {}
    for adapter_path in adapter_paths:
        model = load(model_path, dtype)
        if adapter_path is not None:
            model = PeftModel.from_pretrained(model, adapter_path)
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.no_grad():
                ids = model.generate(input_ids=ids, max_new_tokens=TOKENS, eos_token_id=None, do_sample=False)
                logits = model(ids).logits[0, len(prompt) - 1 : -1]
            tokens = ids[0, len(prompt) :]
            results[adapter_path and str(adapter_path), tuple(prompt)] = tokens.tolist(), chosen(logits, tokens)
    return results


def chosen(logits, tokens):
    return logits.float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def request(name, path, number):
    from vllm.lora.request import LoRARequest

    return LoRARequest(name, number, str(path))


def generate(engine, requests, prompts=None):
    """Return (adapter's path or None, prompt, tokens, log-probabilities) of all requests in one batch."""
    from vllm import SamplingParams

    pairs = [(adapter, prompt) for adapter in requests for prompt in prompts or PROMPTS]
    outputs = engine.generate(
        [{"prompt_token_ids": prompt} for _, prompt in pairs],
        SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=0, detokenize=False),
        lora_request=[adapter for adapter, _ in pairs],
        use_tqdm=False,
    )
    results = []
    for (adapter, prompt), output in zip(pairs, outputs, strict=True):
        tokens = list(output.outputs[0].token_ids)
        logprobs = [step[token].logprob for step, token in zip(output.outputs[0].logprobs, tokens, strict=True)]
        results.append((adapter and adapter.lora_path, prompt, tokens, torch.tensor(logprobs)))
    return results


def assert_equal(results, expected):
    """Check each request's tokens and log-probabilities."""
    for adapter_path, prompt, tokens, logprobs in results:
        expected_tokens, expected_logprobs = expected[adapter_path, tuple(prompt)]
        assert tokens == expected_tokens, adapter_path
        torch.testing.assert_close(logprobs, expected_logprobs, atol=1e-4, rtol=0)


def save_tokenizer(path):
    """Save a tokenizer of one word for each id, for a server, which takes and returns text."""
    words = {f"w{i}": i for i in range(SIZES["vocab_size"])}
    tokenizer = Tokenizer(WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2").save_pretrained(path)
