"""Small models of any class of transformers, and inputs for them, from what their configs and signatures say."""

import inspect
import itertools
import re
from collections.abc import Iterator
from typing import Any

import torch
import transformers as tf
from transformers.models.auto import modeling_auto


MAX_PARAMETERS = 60_000_000  # of a model to try
VOCABULARY = 96
WORDS = range(88, VOCABULARY)  # none of them special in a tiny config

# Patterns of config fields, and the value that makes the model small; the first that matches counts.
LAYERS = (
    r"(.*_)?(num|n)_?(hidden_|encoder_|decoder_|transformer_)*(layers?|blocks?)|depth|(encoder|decoder)_(layers|depth)"
)
LENGTH: tuple[tuple[str, int], ...] = (
    (r"type_vocab_size", 2),
    (r"(.*_)?vocab_size(_.*)?|n_words", VOCABULARY),
    (r"(.*_)?codebook_size", 64),
    (r"(.*_)?(num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts|router_top_k)", 2),
    (r"topk_group|n_group", 1),
    (r"(.*_)?(num|n)_(local_|routed_|shared_|zero_)?experts|num_local_experts|moe_num_experts", 4),
    (r"max_position_embeddings|n_positions|max_sequence_length|n_ctx|seq_length|max_seq_len", 512),
    (r"max_source_positions", 64),
    (r"num_queries|num_detection_tokens|two_stage_num_proposals", 8),
)  # fmt: skip
WIDTH: tuple[tuple[str, int], ...] = (
    (r".*(num|n)_(key_value|kv)_heads.*|multi_query_group_num", 2),
    (r"mamba_(n|num)_heads|linear_num_(key|value)_heads|num_v_heads", 8),
    (r"(.*_)?(num|n)_(attention_|attn_)?heads?(_.*)?|(.*_)?attention_heads|n_head", 4),
    (r"(.*_)?head_dim(_.*)?|d_kv|d_head|attention_head_size|dim_head|key_length|mamba_d_head|mamba_headdim", 16),
    (r"(.*_)?(lora|low|dt|time_step)_?(rank|rank_dim)", 16),
    (
        r"(.*_)?(hidden|emb|embed|embedding|embeddings|model|proj|projection|channel|latent)_(size|dim)|d_model|n_embd|dim",
        64,
    ),
    (r"(.*_)?(intermediate|ffn|ff|mlp|feed_forward|feedforward)_(size|dim)|d_ff|n_inner|dim_feedforward|d_inner", 96),
    (r"image_size|input_size|img_size", 64),
    (r"mamba_d_ssm|mamba_d_inner", 128),
    (r"mamba_n_groups|n_groups", 1),
    (r"(mamba_d_|ssm_)?(state_size|d_state|state_dim)", 8),
)
RESNET = tf.ResNetConfig(
    embedding_size=16, hidden_sizes=[16] * 4, depths=[1] * 4, layer_type="basic",
    out_features=["stage2", "stage3", "stage4"],
)  # fmt: skip
TOKEN = re.compile(r"\w*(token|bos|eos|pad|start|end)_?(id|index|idx)|\w+_token_(id|index)")
OFF = re.compile(r"dropout|layerdrop|drop_path|drop_rate|jitter|mask_time_prob|mask_feature_prob")


def model_classes() -> Iterator[tuple[str, str]]:
    """Yield each model type with the name of each of its classes in transformers' auto mappings, each class once."""
    types: dict[str, str] = {}
    for mapping in sorted(key for key in vars(modeling_auto) if re.fullmatch(r"MODEL_.*MAPPING_NAMES", key)):
        for model_type, names in getattr(modeling_auto, mapping).items():
            for name in [names] if isinstance(names, str) else names:
                types.setdefault(name, model_type)
    yield from sorted((model_type, name) for name, model_type in types.items())


def tiny_config(cls: type, sizes: tuple[tuple[str, int], ...], **values: Any) -> Any:
    """Return a config with small sizes; what its class derives from them, it derives."""
    parameters = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    chosen: dict[str, Any] = {}
    for name, parameter in parameters.items():
        default = parameter.default
        size = next((size for pattern, size in sizes if re.fullmatch(pattern, name)), None)
        if name == "pad_token_id" and default is None:
            chosen[name] = 0
        elif name == "use_cache":
            chosen[name] = False
        elif type(default) is int and size is not None:
            chosen[name] = min(size, default)
        elif type(default) is int and TOKEN.fullmatch(name):
            chosen[name] = default if default < VOCABULARY else 8 + sum(map(ord, name)) % 80
        elif isinstance(default, float) and OFF.search(name):
            chosen[name] = 0.0
    for name, sub in cls.sub_configs.items():  # type: ignore[attr-defined]
        kind = type(getattr(cls(), name)) if sub is tf.AutoConfig else sub
        if issubclass(kind, tf.PreTrainedConfig) and parameters[name].default is None:
            chosen[name] = tiny_config(kind, sizes)
    chosen.update({key: value for key, value in values.items() if key in parameters})
    return cls(**chosen)


def build(name: str) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return a small random model of a class in eval mode, and inputs that it takes.

    Raises:
        ValueError: If none of the tries works; the message says why the last that came furthest did not.
    """
    cls = getattr(tf, name)
    failures = []
    few, backbone = ((LAYERS, 2),), {"backbone_config": RESNET}
    wide = tuple((pattern, {64: 512, 16: 128}.get(size, size)) for pattern, size in WIDTH)  # rotary sections, groups
    narrow = (*few, *LENGTH, *WIDTH)
    tries: tuple[tuple[Any, dict[str, Any]], ...] = (
        (narrow, {}), (narrow, backbone), ((*few, *LENGTH, *wide), {}), ((*LENGTH, *WIDTH), {}), ((*few, *LENGTH), {})
    )  # fmt: skip
    for sizes, values in tries:
        try:
            with torch.device("meta"):
                parameters = sum(p.numel() for p in cls(tiny_config(cls.config_class, sizes, **values)).parameters())
            if parameters > MAX_PARAMETERS:
                raise ValueError(f"{parameters} parameters")
            torch.manual_seed(0)
            model = cls(tiny_config(cls.config_class, sizes, **values)).eval()
        except Exception as exc:  # noqa: BLE001  (of any kind)
            failures.append(f"build: {type(exc).__name__}: {exc}"[:300])
            continue
        for parameter in model.parameters():
            if parameter.dim() > 1 and not parameter.any():
                parameter.data.normal_(
                    std=0.02
                )  # zeros have no update that scales them, and train nothing before them
        for inputs in candidates(model):
            try:
                torch.manual_seed(0)
                with torch.no_grad():
                    if not tensors(model(**inputs)):
                        raise ValueError("no floating-point output")
                return model, inputs
            except Exception as exc:  # noqa: BLE001  (of any kind)
                failures.append(f"forward: {type(exc).__name__}: {exc}"[:300])
    raise ValueError(next((f for f in failures if f.startswith("forward")), failures[0]))


def candidates(model: Any) -> Iterator[dict[str, torch.Tensor]]:
    """Yield inputs that the model may take, by the names of its forward's parameters."""
    config, parameters = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(0)

    def floats(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    def words(*shape: int) -> torch.Tensor:
        vocabulary = sizes("vocab_size") or [VOCABULARY]
        low, high = (min(WORDS), VOCABULARY) if min(vocabulary) >= VOCABULARY else (3, max(4, min(vocabulary)))
        ids = torch.randint(low, high, shape, generator=generator)
        if isinstance(end := getattr(config.get_text_config(), "eos_token_id", None), int):
            ids[..., -1] = end
        return ids

    def sizes(*names: str) -> list[int]:
        subs = [config, *(getattr(config, sub, None) for sub in config.sub_configs)]
        found = [getattr(sub, name, None) for name in names for sub in subs]
        found = [max(value) if isinstance(value, (list, tuple)) else value for value in found]
        return [value for value in found if isinstance(value, int) and value > 0]

    image = [*sizes("image_size", "input_size", "img_size"), 64, 224]
    channels = [*sizes("num_channels", "in_channels", "in_chans"), 3][0]
    mels = [
        *sizes("num_mel_bins", "feature_size", "n_mels", "input_feat_per_channel", "input_dim", "input_channels"),
        80,
    ]
    frames = [2 * s for s in sizes("max_source_positions")] + [128, 64]
    known: dict[str, list[Any]] = {
        "input_ids": [words(2, 2, 8) if type(model).__name__.endswith("MultipleChoice") else words(2, 8)],
        "decoder_input_ids": [words(2, 8)],
        "pixel_values": [floats(2, channels, s, s) for s in image[:2]]
        + [floats(1, f, channels, image[0], image[0]) for f in (*sizes("num_frames", "frames_per_clip"), 2, 16)]
        + [floats(2, channels, 224, 224)],
        "pixel_values_videos": [floats(1, f, channels, image[0], image[0]) for f in (*sizes("frames_per_clip"), 2)],
        "input_values": [floats(2, 4000), floats(2, 1, 4000), floats(2, 1024, mels[0]), floats(2, 128, mels[0]), floats(2, 16000)],
        "input_features": [floats(2, m, f) for m in mels for f in frames] + [floats(2, f, m) for m in mels for f in frames],
        "audio_values": [floats(2, 1, 4000)],
        "bbox": [torch.zeros(2, 8, 4, dtype=torch.long)],
        "inputs": [words(2, 64), floats(2, channels, image[0], image[0])],
        "hidden_states": [floats(2, 8, h) for h in sizes("hidden_size", "d_model", "embed_dim")],
        "visual_feats": [floats(2, 4, s) for s in sizes("visual_feat_dim")],
        "visual_pos": [floats(2, 4, 4)],
        "past_values": [floats(2, s) for s in sizes("context_length")] + [floats(2, s, c) for s in sizes("context_length")
                        for c in sizes("num_input_channels")],
    }  # fmt: skip
    required = [n for n, p in parameters.items() if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
    base = dict.fromkeys(name for name in (model.main_input_name, *required) if name in parameters)
    if "decoder_input_ids" in parameters and config.is_encoder_decoder:
        base["decoder_input_ids"] = None
    more = {name: None for name in known if name in parameters and name != "hidden_states"}
    for names in (
        base,
        {**base, **{n: None for n in more if n in ("bbox", "pixel_values", "input_ids")}},
        {**base, **more},
    ):
        if all(name in known for name in names):
            for values in itertools.islice(itertools.product(*(known[name] for name in names)), 24):
                yield dict(zip(names, values, strict=True))


def tensors(output: Any) -> list[torch.Tensor]:
    """Return the floating-point tensors of a model's output, in order."""
    if isinstance(output, torch.Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, dict):
        output = list(output.values())
    return [tensor for item in output for tensor in tensors(item)] if isinstance(output, (list, tuple)) else []
