"""The moving average of the policy's weights (Ouyang et al. 2022, App. C.4: decay 0.992)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from instructrl.trainers.sharding import gathered, is_partitioned, local, part_of

FILE = "ema.safetensors"


class EMA(TrainerCallback):
    """average <- decay * average + (1 - decay) * weights, after every `every` optimizer steps.

    The paper prints the decay and not how often it is applied: `every` is one step, or one iteration's steps. There is
    no bias correction: the average starts at the initial weights, so after n updates (1 - decay^n) of it is new.

    Only weights that train are averaged (of a LoRA policy, its adapter), in float32 at least: in bfloat16 a step of
    1 - decay = 0.008 would be rounded away. Of sharded weights each process averages its part.
    """

    def __init__(self, model: nn.Module, decay: float, every: int) -> None:
        self.decay, self.every = decay, every
        self.weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self.averages = {
            name: local(p).to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.weights.items()
        }

    def on_step_end(self, args, state, control, **_):
        if state.global_step % self.every == 0:
            self.update()

    @torch.no_grad()
    def update(self) -> None:
        """One step of the average towards the weights as they are now."""
        averages = list(self.averages.values())
        weights = [local(p).to(average.dtype) for p, average in zip(self.weights.values(), averages, strict=True)]
        torch._foreach_lerp_(averages, weights, 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model with the averages as its weights; afterwards with its own again."""
        own: dict[str, Tensor] = {}
        for name, p in self.weights.items():
            own[name] = put(p, self.averages[name].to(p.device, p.dtype))
        try:
            yield
        finally:
            for name, p in self.weights.items():
                put(p, own[name])

    def save(self, folder: Path) -> None:
        """Rank 0 writes. Collective if the weights are sharded."""
        if any(map(is_partitioned, self.weights.values())):
            with self.applied():
                averages = gathered(self.weights)
        else:
            averages = {name: like(average, self.weights[name]) for name, average in self.averages.items()}
        if any(isinstance(average, DTensor) for average in averages.values()):
            averages = gathered(averages)
        if averages:
            save_file({name: average.contiguous() for name, average in averages.items()}, folder / FILE)

    def load(self, folder: Path) -> None:
        for name, saved in load_file(folder / FILE).items():
            self.averages[name].copy_(local(part_of(saved, self.weights[name])))


@torch.no_grad()
def put(parameter: Tensor, values: Tensor) -> Tensor:
    """Give a parameter other values, this process's part of them, and return those that it had."""
    if not isinstance(parameter, DTensor) and not is_partitioned(parameter):
        before, parameter.data = parameter.data, values
        return before
    before = local(parameter).clone()
    local(parameter).copy_(values)  # FSDP and DeepSpeed keep the memory, not the tensor
    return before


def like(part: Tensor, parameter: Tensor) -> Tensor:
    """This process's part of a tensor that is sharded as the parameter is, as that tensor."""
    if not isinstance(parameter, DTensor):
        return part
    shape, stride = parameter.shape, parameter.stride()
    return DTensor.from_local(part, parameter.device_mesh, parameter.placements, shape=shape, stride=stride)
