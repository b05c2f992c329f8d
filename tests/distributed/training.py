"""The one training run that every set-up repeats: transformers' Trainer, 20 steps of the same global batches."""

import os
from pathlib import Path

import torch
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from datasets import Dataset
from peft import get_peft_model
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hyperadapt_peft import HyperAdaptConfig, SurmConfig


CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
TUNERS = {"hyperadapt": HyperAdaptConfig, "surm": SurmConfig}
CLI_TUNERS = {"hyperadapt": "{peft_type: HYPERADAPT}", "lora": "{peft_type: LORA, r: 2}"}  # of recipes
STEPS, GLOBAL_BATCH = 20, 8


def launch_environment(config: str) -> dict[str, str]:
    """What `accelerate launch --config_file configs/accelerate/<config>.yaml` gives its processes."""
    command = ["--config_file", str(CONFIGS / f"{config}.yaml"), "--main_process_port", "0", "script.py"]
    args, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(command))
    if not args.use_deepspeed:
        return prepare_multi_gpu_env(args)
    args.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    return prepare_deepspeed_cmd_env(args)[1]


def data() -> Dataset:
    """Rows with different numbers of counted tokens, so that averaging per process would be seen."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 64, (64, 12), generator=generator)
    masked = torch.arange(12) < torch.randint(0, 9, (64, 1), generator=generator)
    return Dataset.from_dict({"input_ids": ids.tolist(), "labels": ids.masked_fill(masked, -100).tolist()})


def train(tuner: str, base: Path, directory: Path, resume: str | None = None, **arguments) -> None:
    """Adapt the model saved in `base` and train it, from the start or from the checkpoint `resume` in `directory`.

    The adapter is saved as `directory`/adapter (/resumed); `engine` and `weights` beside it tell what wrapped the model,
    and how many numbers this process held of the base weights when they were adapted.
    """
    arguments = TrainingArguments(
        str(directory),
        max_steps=STEPS,
        save_steps=STEPS // 2,
        learning_rate=1e-2,
        per_device_train_batch_size=GLOBAL_BATCH // int(os.environ.get("WORLD_SIZE", "1")),
        seed=0,
        disable_tqdm=True,
        report_to="none",
        logging_strategy="no",
        **arguments,
    )
    torch.manual_seed(0)
    # after the arguments: from then on transformers knows that ZeRO-3 shards a model while it is loaded
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), TUNERS[tuner](task_type="CAUSAL_LM"))
    if arguments.process_index == 0:
        weights = [
            module.get_base_layer().weight.numel() for module in model.modules() if hasattr(module, "get_base_layer")
        ]
        directory.mkdir(exist_ok=True)
        (directory / "weights").write_text(str(sum(weights)))
    trainer = Trainer(model, arguments, train_dataset=data())
    trainer.train(resume_from_checkpoint=str(directory / resume) if resume else None)
    trainer.save_model(str(directory / ("resumed" if resume else "adapter")))
    if arguments.process_index == 0:
        (directory / "engine").write_text(type(trainer.model_wrapped).__name__)
