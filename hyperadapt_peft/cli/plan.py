"""What training will need, from a config alone: no weight is loaded, and no memory of the model's size is used."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model, get_peft_model_state_dict
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig, PreTrainedModel

from .errors import RecipeError, errors_about, first_line
from .memory import SavedTensors, safetensors_bytes, stored_bytes
from .models import build, load_config, make_batch
from .recipe import read_tuner
from .tasks import find_task


@dataclass(frozen=True)
class Plan:
    """What training a model with a method needs.

    Args:
        model: the class of the base model.
        parameters: of the base model and the adapter.
        trainable: the parameters that are trained.
        adapter_bytes: the size of `adapter_model.safetensors`; None when all of the model is trained.
        weights_bytes: parameters and buffers, of the adapter as well, tied ones once.
        gradient_bytes: the gradients of the trained parameters, in their dtype.
        optimizer_bytes: AdamW's two moments of each trained parameter, in its dtype.
        activation_bytes: what autograd keeps for the backward pass of one batch, by the kernels of the CPU.
    """

    model: str
    parameters: int
    trainable: int
    adapter_bytes: int | None
    weights_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int

    @property
    def total_bytes(self) -> int:
        """The least that training needs; what the backward pass holds for a moment comes on top."""
        return self.weights_bytes + self.gradient_bytes + self.optimizer_bytes + self.activation_bytes

    def __str__(self) -> str:
        adapter = "none, the model is saved whole" if self.adapter_bytes is None else f"{self.adapter_bytes:,} bytes"
        rows = [
            ("model", f"{self.model}, {self.parameters:,} parameters"),
            ("trainable parameters", f"{self.trainable:,} ({self.trainable / self.parameters:.4%})"),
            ("adapter weights on disk", adapter),
        ]
        sizes = {
            "weights": self.weights_bytes,
            "gradients": self.gradient_bytes,
            "AdamW's states": self.optimizer_bytes,
            "activations kept": self.activation_bytes,
            "in all, at least": self.total_bytes,
        }
        rows += [(name, f"{size / 2**20:,.1f} MiB") for name, size in sizes.items()]
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)


def plan(
    model: str | PretrainedConfig,
    tuner: Mapping[str, Any] | str,
    task: str = "causal-lm",
    batch_size: int = 4,
    sequence_length: int = 256,
    dtype: str = "float32",
) -> Plan:
    """Plan one training set-up; it takes seconds for any size.

    Gradient checkpointing, sharding and quantization are not taken into account, nor, in image classification, the
    head that `hyperadapt train` trains beside the tuner: name it in the tuner's `modules_to_save`.

    `tuner` is a recipe's section or its YAML, `model` what `load_config` takes, or a config; the other arguments are those
    of `hyperadapt plan --help`. PEFT makes adapters in float32 whatever `dtype` the base model has.

    Raises:
        RecipeError: the config or the tuner is wrong, or the method adapts no layers, or reads the weights' values.
    """
    kind = find_task(task)
    section, peft_config = read_tuner(tuner, kind)
    peft_type = section["peft_type"]
    if peft_type == "NONE":
        raise RecipeError("tuner.peft_type: NONE has no adapter; there is nothing to plan")
    if peft_config is not None and peft_config.is_prompt_learning:
        raise RecipeError(f"tuner.peft_type: {peft_type} adapts no layers; only methods that do can be planned")
    config = load_config(model) if isinstance(model, str) else model
    try:
        with torch.device("meta"):
            base = build(config, kind, dtype)
            with errors_about("tuner"):
                adapted: Any = get_peft_model(base, peft_config).train() if peft_config else base.requires_grad_(True)
        activations = _activation_bytes(adapted, base, batch_size, sequence_length)
    except RuntimeError as error:
        raise RecipeError(f"tuner: {peft_type} cannot be planned without weights: {first_line(error)}") from error
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    gradients = sum(parameter.nbytes for parameter in trained)
    return Plan(
        model=type(base).__name__,
        parameters=sum(parameter.numel() for parameter in adapted.parameters()),
        trainable=sum(parameter.numel() for parameter in trained),
        adapter_bytes=safetensors_bytes(get_peft_model_state_dict(adapted)) if peft_config else None,
        weights_bytes=stored_bytes(adapted),
        gradient_bytes=gradients,
        optimizer_bytes=2 * gradients,
        activation_bytes=activations,
    )


def _activation_bytes(model: Any, base: PreTrainedModel, batch_size: int, sequence_length: int) -> int:
    """What autograd keeps of one forward pass on fake tensors that say they are on the CPU.

    On the meta device itself, attention would take another way than the fused kernel and keep all of its scores.
    """
    with FakeTensorMode():
        fakes: dict[int, torch.Tensor] = {}  # one for each tensor, so that tied ones stay tied
        state = {}
        for named in (model.named_parameters, model.named_buffers):
            for name, tensor in named(remove_duplicate=False):
                fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                state[name] = fakes.setdefault(id(tensor), fake.requires_grad_(tensor.requires_grad))
        batch = make_batch(base, batch_size, sequence_length)
        saved = SavedTensors(state.values())
        with saved:
            output = torch.func.functional_call(model, state, (), batch, tie_weights=False)
        assert output.loss is not None, "the graph hangs on it"
        return saved.nbytes()
