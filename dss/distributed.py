"""One run on several devices, by torch.distributed: `torchrun --nproc_per_node=N train.py ...`.

Every process goes through the same steps. It computes a part of each step's rows; losses and
gradients are summed over all processes, and all take the same optimiser step. The first process
alone writes files and prints. If a process dies, torchrun ends the others.

A student is placed in one of two ways, and `Replicas` and `Shards` have the same methods for both:

    Replicas   Each process has the whole student, as plain tensors. Gradients are summed once a
               step.
    Shards     With --shard: FSDP2. Each process has a part of every layer's weights, gradients and
               optimiser state. It gathers the weights of a layer while it computes that layer.
"""

import contextlib
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from data.cli import Stop, one_line
from data.files import reason, replacing
from dss.config import TrainConfig
from dss.linear import cast_weights
from dss.model import T5


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def is_first() -> bool:
    return rank() == 0


@contextlib.contextmanager
def process_group() -> Iterator[TextIO]:
    """Be one of the processes that torchrun started, if it did, for the block. All but the first
    are silent.

    Yields this process's own standard error, for an error that the first process does not have. The
    block ends in all processes together, unless it raises.
    """
    own_stderr = sys.stderr
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        yield own_stderr
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    with contextlib.ExitStack() as silenced:
        if not is_first():
            nowhere = silenced.enter_context(open(os.devnull, "w"))
            silenced.enter_context(contextlib.redirect_stdout(nowhere))
            silenced.enter_context(contextlib.redirect_stderr(nowhere))
        yield own_stderr
    dist.barrier()
    dist.destroy_process_group()


def wait_for_all() -> None:
    if size() > 1:
        dist.barrier()


def anyone(condition: bool) -> bool:
    """Whether the condition holds in any process."""
    if size() == 1:
        return condition
    agreed = torch.tensor(int(condition))
    dist.all_reduce(agreed, dist.ReduceOp.MAX)
    return bool(agreed)


def check(stop: Stop) -> None:
    """`stop.check()`, but all processes stop when one of them is asked to."""
    stop.requested = anyone(stop.requested)
    stop.check()


def seed(number: int, step: int) -> None:
    """Seed the dropout of a step: each process has its own, the same whenever the step is
    computed."""
    drawn = np.random.SeedSequence([number, step, rank()]).generate_state(1, np.uint64)
    torch.default_generator.manual_seed(int(drawn[0]))  # of the CPU
    if torch.cuda.is_initialized():  # else torch keeps the call with a stack trace: a millisecond
        torch.cuda.manual_seed_all(int(drawn[0]))


def sum_up(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes."""
    if size() > 1:
        started = [dist.all_reduce(tensor, async_op=True) for tensor in tensors]
        for work in started:
            work.wait()


def share_out(work: Callable[[list], list], items: list) -> list:
    """work(items), a result for each item: each process works on some items and gets the results of
    all."""
    n = size()
    if n == 1:
        return work(items)
    parts = [None] * n
    dist.all_gather_object(parts, work(items[rank() :: n]))
    return [parts[i % n][i // n] for i in range(len(items))]


def has_lost_a_process(error: BaseException | None) -> bool:
    """Whether an error says that the connection to another process has ended."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


# ---- Devices -------------------------------------------------------------------------------------


def choose_device(name: str) -> torch.device:
    """The device for "auto", "cpu" or "cuda"; under torchrun each process of a machine has a GPU of
    its own.

    Raises ValueError for cuda where there is none, or none for this process.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch sees no GPU here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda")
    if "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"{torch.cuda.device_count()} GPUs here, too few for torchrun's --nproc_per_node"
            )
        torch.cuda.set_device(device)
    return device


def choose_dtype(asked: str, device: torch.device) -> str:
    """ "float32" or "bfloat16", as asked; for "auto" bfloat16 where a GPU computes it."""
    if asked != "auto":
        return asked
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


def require_memory(parameters: int, config: TrainConfig, device: torch.device) -> float:
    """The bytes that weights, gradients and optimiser state take on each device, in fp32.

    Raises ValueError if the device has less. Activations come on top.
    """
    needed = parameters * (4 + 4 + 8)  # AdamW keeps two moments
    if config.shard:
        needed /= size()
    if device.type == "cuda":
        available = torch.cuda.get_device_properties(device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        available = memory / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if needed > available:
        raise ValueError(
            f"weights, gradients and optimiser state take {needed / 1e9:.1f} GB, and "
            f"the {device.type} has {available / 1e9:.1f} GB: take a smaller student, "
            "or --shard on more devices"
        )
    return needed


# ---- Where the student's weights are -------------------------------------------------------------


@dataclass
class Replicas:
    """The whole student on each device."""

    config: TrainConfig
    device: torch.device

    state_name = "state.pt"  # in OUT/METHOD: what torch.save writes

    def place(self, model: T5) -> T5:
        """The model, a CPU model that nobody else uses, ready to train."""
        return self.checkpointed(model.to(self.device))

    def checkpointed(self, model: T5) -> T5:
        """With --checkpoint-activations: keep a layer's input alone, and compute the layer again in
        backward."""
        if self.config.checkpoint_activations:
            for layer in layers(model):
                layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
        return model

    def cast(self, model: T5) -> contextlib.AbstractContextManager:
        """Around one forward and backward pass: the weights in the dtype of products."""
        if self.config.dtype == "bfloat16":
            return cast_weights(model)
        return contextlib.nullcontext()

    def sum_gradients(self, model: T5, losses: torch.Tensor) -> None:
        """Sum losses and gradients, each of a part of the rows, over all processes."""
        sum_up([losses, *(parameter.grad for parameter in model.parameters())])

    def clip(self, model: T5, largest: float) -> torch.Tensor:
        """Scale the gradient down to a norm of at most `largest`. Returns the norm before."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), largest)

    def whole(self, model: T5) -> T5:
        """A plain T5 with all weights, on the device, to evaluate and to save."""
        return model

    def save_state(
        self, path: Path, model: T5, optimizer: torch.optim.Optimizer, progress: dict
    ) -> None:
        """Write the state of training, complete or not at all. A step seeds its own dropout, so
        that no generator is kept. Raises OSError if it cannot be written."""
        if is_first():
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "progress": progress,
            }
            try:
                with replacing(path) as file:
                    torch.save(state, file)
            except RuntimeError as problem:  # torch's error for a full disk
                raise OSError(f"{path}: cannot be written ({reason(problem)})") from None
        wait_for_all()

    def load_state(self, path: Path, model: T5, optimizer: torch.optim.Optimizer) -> dict:
        """Put back what `save_state` wrote. Returns its `progress`, {} if there is no state. Raises
        ValueError if the state is damaged or of another model."""
        if not path.exists():  # perhaps the run was killed while one state replaced another
            path = path.with_name("state.before")
        if not path.exists():
            return {}
        try:
            return self.read_state(path, model, optimizer)
        except Exception as problem:  # torch documents no closed set of errors for a damaged file
            raise ValueError(
                f"{path}: not the state of this run ({reason(problem)}); --overwrite starts anew"
            ) from None

    def read_state(self, path: Path, model: T5, optimizer: torch.optim.Optimizer) -> dict:
        if zipfile.ZipFile(path).testzip():  # torch.load does not check the CRCs
            raise ValueError("damaged")
        state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        return state["progress"]


class Shards(Replicas):
    """A part of the student on each device."""

    state_name = "state"  # a directory, to which each process writes its part

    def place(self, model: T5) -> T5:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

        if not dist.is_initialized():  # one process, whose state others can go on from
            dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
        mesh = init_device_mesh(self.device.type, (size(),))
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        if self.config.dtype == "bfloat16":  # autocast would keep a copy of each fp32 layer
            policy = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        for layer in layers(model):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(model, mesh=mesh)
        for unit in (*layers(model), model):
            unit.set_gradient_divide_factor(1.0)  # gradients are summed, not averaged
            unit.set_force_sum_reduction_for_comms(True)  # gloo has no other reduction
        return self.checkpointed(model)

    def cast(self, model: T5) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext()  # FSDP2 casts what it gathers

    def sum_gradients(self, model: T5, losses: torch.Tensor) -> None:
        sum_up([losses])  # FSDP2 sums gradients in the backward pass

    def clip(self, model: T5, largest: float) -> torch.Tensor:
        return super().clip(model, largest).full_tensor()

    def whole(self, model: T5) -> T5:
        """As in Replicas: gathered from all processes, in every process."""
        model.reshard()
        with torch.device("meta"):
            whole = T5(model.config)
        weights = {name: p.detach().full_tensor() for name, p in model.named_parameters()}
        whole.load_state_dict(weights, assign=True)
        return whole

    def save_state(
        self, path: Path, model: T5, optimizer: torch.optim.Optimizer, progress: dict
    ) -> None:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.api import CheckpointException

        new = path.with_name("state.new")
        before = path.with_name("state.before")
        if is_first():
            shutil.rmtree(new, ignore_errors=True)
        wait_for_all()
        try:
            dcp.save(sharded_tensors(model, optimizer), checkpoint_id=new)
        except CheckpointException as problem:
            raise OSError(f"{path}: cannot be written ({one_line(problem)})") from None
        if is_first():
            torch.save(progress, new / "progress.pt")
            shutil.rmtree(before, ignore_errors=True)
            if path.exists():
                path.rename(before)
            new.rename(path)
            shutil.rmtree(before, ignore_errors=True)
        wait_for_all()

    def read_state(self, path: Path, model: T5, optimizer: torch.optim.Optimizer) -> dict:
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict import set_state_dict

        progress = torch.load(path / "progress.pt", weights_only=True)
        tensors = sharded_tensors(model, optimizer)
        dcp.load(tensors, checkpoint_id=path)
        set_state_dict(
            model,
            optimizer,
            model_state_dict=tensors["model"],
            optim_state_dict=tensors["optimizer"],
        )
        return progress


def placement(config: TrainConfig, device: torch.device) -> Replicas:
    return Shards(config, device) if config.shard else Replicas(config, device)


def sharded_tensors(model: T5, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    model.reshard()
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": moments}


def layers(model: T5) -> list[torch.nn.Module]:
    return [*model.encoder.layers, *model.decoder.layers]
