"""--shard: a student too large for one device, with FSDP2 and distributed checkpoints.

A process holds its part of every layer's weights, gradients and optimiser state. It gathers the weights of one layer at
a time, while it computes that layer, so every pass through a layer is a pass of all processes.
"""

import pickle
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import state_dict as states
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import distribute_tensor

from data.cli import one_line
from dss.batch import segments
from dss.model import T5
from dss.run.parallel import highest, is_first, layers, size, wait_for_all
from dss.student import Student

DONE, DECODE, ENCODE = range(3)  # what a process does next


@dataclass
class ShardedStudent(Student):
    """A Student whose weights lie in parts on all processes. They call its methods together."""

    @classmethod
    def part_of(cls, student: Student, device: torch.device) -> "ShardedStudent":
        """This process's part of a whole student: one unit a layer, and one of what lies outside the layers."""
        if not dist.is_initialized():  # alone, but what it saves can go on with others
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        with torch.device("meta"):
            model = T5(student.model.config)
        model.load_state_dict(student.model.state_dict(), assign=True)  # not copied: what is in a file stays there
        mesh = init_device_mesh(device.type, (size(),))
        # Layers are gathered in bfloat16 if they compute in it: autocast would keep a copy of each until its backward.
        half = dict(param_dtype=torch.bfloat16, reduce_dtype=torch.float32) if student.dtype == "bfloat16" else {}
        for layer in layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=MixedPrecisionPolicy(**half, cast_forward_inputs=False))
        for unit in [*layers(model), fully_shard(model, mesh=mesh)]:
            unit.set_gradient_divide_factor(1.0)  # gradients are summed, not averaged
            unit.set_force_sum_reduction_for_comms(True)  # which gloo needs to be told
        model.gathered = lambda work: work()
        register_fsdp_forward_method(model, "gathered")
        return cls(**vars(student) | dict(model=model.float()))

    def save(self, directory: Path) -> None:
        """`Student.save` by the first process, which gathers the weights in the CPU's memory."""
        self.model.reshard()
        options = states.StateDictOptions(full_state_dict=True, cpu_offload=True)
        weights = states.get_model_state_dict(self.model, options=options)  # empty in the others
        if is_first():
            with torch.device("meta"):
                whole = T5(self.model.config)
            whole.load_state_dict(weights, assign=True)
            Student(**vars(self) | dict(model=whole)).save(directory)

    def load_weights(self, source: T5) -> None:
        """Take over the weights of a whole model on the CPU, one tensor at a time."""
        self.model.reshard()
        with torch.no_grad():
            for mine, whole in zip(self.model.parameters(), source.parameters(), strict=True):
                whole = whole.to(mine.device, mine.dtype)
                mine.copy_(distribute_tensor(whole, mine.device_mesh, mine.placements, src_data_rank=None))

    def write(self, *asked: object) -> list[list[int]]:
        """`Student.write`, in which each process calls encoder and decoder as often as it needs.

        Before every pass the processes agree on what it is. One that wants another, or is done, takes part with a token
        of no importance.
        """
        model, device = self.model, next(self.model.parameters()).device
        token, one = torch.zeros(1, dtype=torch.int64, device=device), segments([1], device)
        memory = torch.zeros(1, model.config.d_model, device=device)
        passes = {ENCODE: model.encode, DECODE: model.decode}
        idle = {ENCODE: (token, one), DECODE: (token, one, memory, one)}

        def wait_to(wanted: int) -> None:
            while (chosen := highest(wanted)) != wanted:
                with torch.no_grad(), self.autocast():
                    passes[chosen](*idle[chosen])

        def in_turn(wanted: int, *inputs: object) -> torch.Tensor:
            wait_to(wanted)
            return passes[wanted](*inputs)

        def write_and_wait() -> list[list[int]]:
            result = super(ShardedStudent, self).write(*asked)
            wait_to(DONE)
            return result

        model.encode, model.decode = partial(in_turn, ENCODE), partial(in_turn, DECODE)
        try:
            return model.gathered(write_and_wait)  # what lies outside the layers is gathered once
        finally:
            del model.encode, model.decode


# ---- The state: a directory, to which each process writes its part --------------------------------------------------


def save_state(path: Path, model: T5, optimizer: torch.optim.Optimizer, progress: dict) -> None:
    """Write `path`, complete or not at all. Raises OSError if it cannot be written."""
    new, before = path.with_name("state.new"), path.with_name("state.before")
    if is_first():
        shutil.rmtree(new, ignore_errors=True)
    wait_for_all()
    try:
        dcp.save(tensors_of(model, optimizer), checkpoint_id=new)
    except CheckpointException as problem:
        raise OSError(f"{path}: cannot be written ({one_line(problem)})") from None
    if is_first():
        torch.save(progress, new / "progress.pt")
        shutil.rmtree(before, ignore_errors=True)
        if path.exists():
            path.rename(before)
        new.rename(path)
        shutil.rmtree(before, ignore_errors=True)


def load_state(path: Path, model: T5, optimizer: torch.optim.Optimizer) -> dict:
    """Put back what `save_state` wrote, if anything. Raises ValueError if it is damaged."""
    path = next((p for p in (path, path.with_name("state.before")) if p.exists()), None)
    if not path:
        return {}
    tensors = tensors_of(model, optimizer)
    try:
        progress = torch.load(path / "progress.pt", weights_only=True)
        dcp.load(tensors, checkpoint_id=path)
    except (CheckpointException, OSError, RuntimeError, pickle.UnpicklingError) as problem:
        raise ValueError(f"{path}: not the state of this run ({one_line(problem)})") from None
    states.set_state_dict(model, optimizer, model_state_dict=tensors["model"], optim_state_dict=tensors["optimizer"])
    return progress


def tensors_of(model: T5, optimizer: torch.optim.Optimizer) -> dict:
    model.reshard()
    return dict(zip(("model", "optimizer"), states.get_state_dict(model, optimizer)))
