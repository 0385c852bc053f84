"""Weights, gradients and optimizer state that the processes of a training share: FSDP2, on CPUs (gloo) as on GPUs.

A model is sharded here, before a Trainer sees it (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html):
accelerate has FSDP for accelerators only, and takes one model, where PPO has four. `sharded_trainer.py` tells Trainer.

Every process gathers a layer's weights in each forward and backward pass, so all must make the same number of passes.
Where they need not (sampling, scoring, evaluation), a model is gathered once and as a whole: `unsharded`.

Checkpoints hold whole weights and whole optimizer state, as without sharding: with another number of processes, or
without sharding, a training goes on from the same files.
"""

import functools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

ZERO, ENGINE = "zero_stage", "zero_engine"
"""What a model is told of DeepSpeed, beside its parameters and submodules."""


def shard(model: PreTrainedModel | PeftModel, device: torch.device, sharding: str = "fsdp") -> None:
    """Share the model as `runtime.sharding` says, and move this process's part to the device.

    With `fsdp` and `zero3` each process then has a part of each weight. With `zero1` and `zero2` it has all, and the
    trainer will share the optimizer. To be called last of all that changes the model's form or its parameters; the
    processes must have met, and have the same weights.

    Raises:
        ValueError: this torch is too old.
    """
    if sharding == "fsdp":
        fully_shard_layers(model, device)
        return
    vars(model)[ZERO] = int(sharding.removeprefix("zero"))
    model.to(device)
    if zero_stage(model) == 3:
        from instructrl.trainers import zero  # DeepSpeed is installed where it is asked for

        zero.partition(model)


def zero_stage(model: nn.Module) -> int:
    """DeepSpeed's stage, with which the model is trained; 0 without DeepSpeed."""
    return vars(model).get(ZERO, 0)


def engine_of(model: nn.Module) -> nn.Module | None:
    """DeepSpeed's engine, through which the model is called; None before training and without DeepSpeed."""
    return vars(model).get(ENGINE)


def fully_shard_layers(model: PreTrainedModel | PeftModel, device: torch.device) -> None:
    """Share the model's parameters among all processes, layer by layer, and move this one's part to the device.

    Of each parameter a process keeps an equal part of its rows.

    Raises:
        ValueError: this torch is too old.
    """
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise ValueError(f"sharding=fsdp needs torch 2.13 or newer; this is {torch.__version__}")
    network = model.get_base_model() if isinstance(model, PeftModel) else model
    layers = set(network._no_split_modules or ())
    for module in list(network.modules()):
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh(device.type))
    fully_shard(model, mesh=mesh(device.type))
    with torch.no_grad():  # a layer that is called before the model would take itself for one
        as_forward(model, model, lambda: None)
        model.reset_iter_state()


@functools.cache
def mesh(device_type: str) -> DeviceMesh:
    """All processes, in one row."""
    return init_device_mesh(device_type, (torch.distributed.get_world_size(),))


def is_sharded(model: nn.Module) -> bool:
    """Whether each process has a part of the model's weights."""
    return isinstance(model, FSDPModule) or zero_stage(model) == 3


def unsharded_class(model: nn.Module) -> Any:
    """The model's class: `fully_shard` puts one of its own in its place."""
    return next(kind for kind in type(model).__mro__ if not issubclass(kind, FSDPModule))


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """The model with all of its weights, for passes without gradient, of which each process may make any number.

    Collective. A model that is not sharded stays as it is.
    """
    if not is_sharded(model):
        yield
        return
    if zero_stage(model):
        from instructrl.trainers import zero

        with zero.gathered(model):
            yield
        return
    layers = [module for module in model.modules() if is_sharded(module)]
    for layer in layers:
        layer.unshard()
        layer.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_reshard_after_forward(layer is not model, recurse=False)
        model.reset_iter_state()  # shards them again, and forgets the order of passes that no backward pass follows


def as_forward(wrapped: nn.Module, inner: nn.Module, work: Callable[..., Any], *args: Any) -> Any:
    """`work(*args)` as the one forward pass of a model, called through what wraps it.

    DDP makes ready for the backward pass in the wrapper's forward pass, and needs one for each; so does FSDP, whose
    wrapper is the model itself, and which gathers the weights outside of layers for it. `work` may call the model's
    parts; under FSDP as often as other processes do, otherwise as often as it likes.
    """
    wrapped = engine_of(inner) or wrapped
    if wrapped is inner and not is_sharded(inner):
        return work(*args)
    before = vars(inner).get("forward")

    def forward(*given: Any) -> Any:
        restore()
        return work(*given)

    def restore() -> None:
        if before is None:
            vars(inner).pop("forward", None)
        else:
            inner.forward = before

    inner.forward = forward
    try:
        return wrapped(*args)
    finally:
        restore()


# ---- whole tensors and parts of them ---------------------------------------------------------------------------------


def local(tensor: Tensor) -> Tensor:
    """This process's part, in the same memory; of a tensor that is not sharded all of it. Without gradient."""
    if isinstance(tensor, DTensor):
        return tensor.detach().to_local()
    return getattr(tensor, "ds_tensor", tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process; what is no sharded tensor, as it is. Collective if it is one."""
    if is_partitioned(tensor):
        from instructrl.trainers import zero

        return zero.whole(tensor)
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def is_partitioned(tensor: Tensor) -> bool:
    """Whether it is a parameter of which each process has a part for DeepSpeed: `ds_tensor`."""
    return hasattr(tensor, "ds_tensor")


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, sharded as `like` is; no communication."""
    if is_partitioned(like):
        from instructrl.trainers import zero

        return zero.part_of(tensor.to(like.device), like)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def gathered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, on rank 0; {} on all others. Collective.

    One at a time is whole on a device. What is the same tensor under two names stays so.
    """
    found: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    keeps = torch.distributed.get_rank() == 0
    for name, tensor in tensors.items():
        first = names.setdefault(id(tensor), name)
        all_of_it = None if first != name else whole(tensor).detach()
        if keeps:
            found[name] = found[first] if all_of_it is None else all_of_it.cpu()
    return found


def whole_weights(model: PreTrainedModel | PeftModel) -> dict[str, Tensor] | None:
    """What `save_pretrained` is to be given as `state_dict`: as `gathered`, of an adapter's model only what is trained;
    None for a model that is not sharded."""
    if not is_sharded(model):
        return None
    every = model.state_dict(keep_vars=True)
    trained = isinstance(model, PeftModel)
    return gathered({name: tensor for name, tensor in every.items() if tensor.requires_grad or not trained})


@torch.no_grad()
def load(tensors: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Give tensors, sharded or not, the values of whole ones of the same names. What was not saved, as the second of
    two names of a weight, stays."""
    for name, tensor in saved.items():
        local(tensors[name]).copy_(local(part_of(tensor, tensors[name])))


def whole_state(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's `state_dict` with whole tensors, on the CPU, on rank 0; without any on all others. Collective."""
    return state | {"state": {number: gathered(of_one) for number, of_one in state["state"].items()}}


def part_of_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole `state_dict` as the optimizer's `load_state_dict` takes it: what has the shape of its parameter is
    sharded as that is; no communication."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    numbers = [number for group in state["param_groups"] for number in group["params"]]
    parts = {}
    for number, parameter in zip(numbers, parameters, strict=True):
        of_one = state["state"].get(number, {})
        parts[number] = {
            name: part_of(value, parameter).clone() if value.shape == parameter.shape else value
            for name, value in of_one.items()
        }
    return state | {"state": {number: part for number, part in parts.items() if part}}
