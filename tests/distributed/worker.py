"""What each of two processes does, started once by torchrun: every set-up in turn, results into the directory given.

python -m torch.distributed.run --nproc_per_node 2 -m tests.distributed.worker DIRECTORY
"""

import json
import os
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from peft import IA3Config, LoraConfig, RoadConfig, VeraConfig, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from torch import distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainingArguments

from hyperadapt_cli import main as hyperadapt
from hyperadapt_peft import HyperAdaptConfig, SurmConfig
from hyperadapt_peft.cli import train as cli
from hyperadapt_peft.cli.tasks import EncodedData
from tests import tiny

from .training import CLI_TUNERS, TUNERS, launch_environment, train


def fsdp_on_cpu():
    """Accelerate turns FSDP on for GPUs alone; told that these processes have some, it runs on gloo as it is."""
    start = PartialState.__init__

    def init(self, *args, **kwargs):
        start(self, *args, **kwargs)
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.distributed_type == DistributedType.MULTI_CPU:
            self._shared_state["distributed_type"] = DistributedType.MULTI_GPU

    return mock.patch.object(PartialState, "__init__", init)


def engines(directory: Path) -> None:
    """Train, resume from a checkpoint and save, with the environment of the shipped configs."""
    for name in ("ddp", "fsdp2"):
        train_twice(name, directory, use_cpu=True)


def deepspeed(directory: Path) -> None:
    """The same with DeepSpeed, if it is installed."""
    if not is_deepspeed_available():
        return
    from deepspeed.ops import __compatible_ops__

    __compatible_ops__.clear()  # gloo needs none of its kernels, and their compilation takes minutes
    backend = ("gloo", DistributedType.MULTI_CPU)  # accelerate takes it from the kind of GPU
    with mock.patch.object(PartialState, "_prepare_backend", lambda *args, **kwargs: backend):
        for name in ("deepspeed_zero2", "deepspeed_zero3"):
            train_twice(name, directory)


def train_twice(config: str, directory: Path, **arguments) -> None:
    with mock.patch.dict(os.environ, launch_environment(config)):
        for tuner in TUNERS:
            for resume in (None, "checkpoint-10"):
                train(tuner, directory / "base", directory / f"{config}-{tuner}", resume, **arguments)


def fsdp1(directory: Path) -> None:
    """Wrap with PEFT's policy, run forward and backward; what torch says per method and `use_orig_params`."""
    methods = {
        "hyperadapt": HyperAdaptConfig(),
        "surm": SurmConfig(),
        "lora": LoraConfig(target_modules="all-linear"),
        "ia3": IA3Config(target_modules=["k_proj", "v_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "road": RoadConfig(target_modules="all-linear", group_size=8),
        "vera": VeraConfig(target_modules=["q_proj", "o_proj"], r=4),
    }
    said = {}
    for method, config in methods.items():
        for original in (True, False):
            base, batch, _ = tiny.build("llama")
            model = get_peft_model(base, config)
            wrap = partial(FullyShardedDataParallel, use_orig_params=original, device_id=torch.device("cpu"))
            try:
                wrapped = wrap(model, auto_wrap_policy=fsdp_auto_wrap_policy(model))
                if method in TUNERS:
                    wrapped(**batch).loss.backward()
            except (RuntimeError, ValueError) as error:
                said[f"{method} {original}"] = str(error)
            else:
                said[f"{method} {original}"] = "ran"
    write(directory / "fsdp1.json", said)


def meshes(directory: Path) -> None:
    """Adapt layers that are sharded already; what they say, or the size of their scales and the error of the output."""
    said = {}
    torch.manual_seed(0)
    x, weight = torch.randn(3, 8), torch.randn(6, 8)

    def adapt(name, shard):
        model = nn.ModuleDict({"layer": nn.Linear(8, 6)})
        model["layer"].weight.data.copy_(weight)
        expected = model["layer"](x)
        shard(model["layer"])
        try:
            adapted = get_peft_model(model, HyperAdaptConfig(target_modules=["layer"])).base_model.model["layer"]
        except NotImplementedError as error:
            said[name] = str(error)
        else:
            sizes = [
                adapted.hyperadapt_row["default"].weight.numel(),
                adapted.hyperadapt_column["default"].weight.numel(),
            ]
            said[name] = [*sizes, (adapted(x) - expected).abs().max().item()]

    def tensor_parallel(mesh):
        def shard(layer):
            layer.weight = nn.Parameter(distribute_tensor(layer.weight.data, mesh, [Shard(0)]))

        return shard

    adapt("tp", tensor_parallel(init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))))
    adapt("unnamed", fully_shard)
    for names in (("fsdp",), ("dp_shard_cp",), ("dp_replicate", "fsdp"), ("dp_replicate", "dp_shard_cp")):
        mesh = init_device_mesh("cpu", (1, 2)[-len(names) :], mesh_dim_names=names)
        adapt(" ".join(names), partial(fully_shard, mesh=mesh))
    write(directory / "meshes.json", said)


def order(directory: Path) -> None:
    """The rows each process would train on in an epoch, when its random numbers are not the other's."""
    rows = [{"input_ids": [3] * (1 + i % 7), "labels": i} for i in range(48)]
    data = EncodedData(
        {"train": rows}, lambda batch: {"labels": torch.tensor([row["labels"] for row in batch])}, None, {}
    )
    arguments = TrainingArguments(
        str(directory / "order"),
        use_cpu=True,
        per_device_train_batch_size=4,
        train_sampling_strategy="group_by_length",
        remove_unused_columns=False,
    )
    recipe = SimpleNamespace(arguments=arguments, task=SimpleNamespace(has_head=False))
    trainer = cli._trainer(recipe, nn.Linear(1, 1), data)
    torch.manual_seed(dist.get_rank())
    mine = torch.cat([batch["labels"] for batch in trainer.get_train_dataloader()])
    everyone = [torch.empty_like(mine) for _ in range(2)]
    dist.all_gather(everyone, mine)
    write(directory / "order.json", [rows.tolist() for rows in everyone])


def command_line(directory: Path) -> None:
    """`hyperadapt train` of a recipe that the test wrote: under DDP, once more, from the start; under FSDP2."""
    path = str(directory / "recipe.yaml")
    ddp = f"training.output_dir={directory / 'recipe-ddp'}"
    codes = [hyperadapt(["train", path, ddp, "training.max_steps=2"]), hyperadapt(["train", path, ddp])]
    codes.append(hyperadapt(["train", path, ddp, "--overwrite", "--verify"]))
    with mock.patch.dict(os.environ, launch_environment("fsdp2")):
        for name, tuner in CLI_TUNERS.items():
            fsdp2 = f"training.output_dir={directory / f'recipe-fsdp2-{name}'}"
            codes.append(hyperadapt(["train", path, fsdp2, f"tuner={tuner}"]))
        codes.append(hyperadapt(["train", path, f"training.output_dir={directory / 'verified'}", "--verify"]))
    write(directory / "codes.json", codes)


def write(path: Path, content) -> None:
    if dist.get_rank() == 0:
        path.write_text(json.dumps(content))


PARTS = (engines, fsdp1, meshes, order, command_line, deepspeed)

if __name__ == "__main__":
    dist.init_process_group("gloo")
    with fsdp_on_cpu():
        for part in PARTS:
            part(Path(sys.argv[1]))
    dist.destroy_process_group()
