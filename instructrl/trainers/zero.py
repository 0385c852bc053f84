"""Adam's moments, gradients and weights that the processes of a training share, by DeepSpeed's ZeRO
(Rajbhandari et al. 2020, arXiv 1910.02054): stage 1, 2 and 3 in this order, each with what the stages before it share.

`accelerate` has DeepSpeed, too, for one model and one backward pass a micro-batch, of which DeepSpeed counts when to
step. PPO has two models, whose gradients are clipped each by itself, and PPO-ptx's two losses go backward one after the
other. So each trained network gets a DeepSpeed engine of its own here, which is told that it does not own the boundary
of a step (`managed_gradient_accumulation`, DeepSpeed 0.19): any number of backward passes, then one step.

https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_optimizer_state,
    safe_set_full_optimizer_state,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn
from trl.models.utils import add_hooks, remove_hooks

from instructrl.trainers.sharding import ENGINE, engine_of, is_partitioned

MOMENTS = ("exp_avg", "exp_avg_sq")


def settings(stage: int, bf16: bool = False, max_grad_norm: float = 0.0) -> dict[str, Any]:
    """DeepSpeed's configuration. Batches are the trainer's: DeepSpeed reads none."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": max_grad_norm,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": False,  # with stage 1 it does not go with managed_gradient_accumulation
            "reduce_bucket_size": 50_000_000,
            # Gathered weights are dropped after use. By default a gigabyte and more of them stays.
            "stage3_max_live_parameters": 50_000_000,
            "stage3_max_reuse_distance": 50_000_000,
            "stage3_prefetch_bucket_size": 50_000_000,
            "stage3_param_persistence_threshold": 0,
            "memory_efficient_linear": False,  # it puts a function of DeepSpeed's in place of torch's, for all models
        },
        # As without DeepSpeed: products in bfloat16, weights and what is sent of gradients in float32.
        "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        "steps_per_print": None,
    }


def partition(model: nn.Module) -> None:
    """Stage 3: of each parameter this process keeps an equal part."""
    deepspeed.zero.Init(module=model, config_dict_or_path=settings(3))
    rank = torch.distributed.get_rank()
    for parameter in model.parameters():
        part = parameter.ds_tensor
        filled = max(0, parameter.ds_numel - rank * part.numel())
        part.data[filled:].zero_()  # DeepSpeed leaves there what was in memory: a nan, if it happens so


class ZeroOptimizer(torch.optim.Optimizer):
    """AdamW, of whose moments each process has a part.

    Its `step` does nothing: DeepSpeed clips gradients within its own, and Trainer clips before it steps; see
    `clip_and_step`.

    Args:
        optimizer: what one process would have: its groups are taken over. No network has a group with another.
        networks: each is clipped by itself.
        max_grad_norm: what their gradients are clipped to; 0: not.

    Raises:
        ValueError: it is another optimizer than AdamW, which would see weights without their shapes.
    """

    def __init__(
        self,
        optimizer: torch.optim.AdamW,
        networks: Sequence[nn.Module],
        stage: int,
        bf16: bool,
        max_grad_norm: float,
    ) -> None:
        if type(optimizer) is not torch.optim.AdamW or optimizer.defaults["amsgrad"]:
            raise ValueError(f"DeepSpeed shares the moments of torch's AdamW here, not of {type(optimizer).__name__}")
        self.parameters = [group["params"] for group in optimizer.param_groups]
        self.engines, shared = [], {}  # the groups that DeepSpeed steps, by their numbers
        for network in networks:
            own = set(network.parameters())
            numbers = [number for number, parameters in enumerate(self.parameters) if own.intersection(parameters)]
            groups = type(optimizer)([dict(optimizer.param_groups[number]) for number in numbers])
            config = settings(stage, bf16, max_grad_norm)
            engine = deepspeed.initialize(model=network, optimizer=groups, config=config)[0]
            vars(engine)["no_sync"] = nullcontext  # Trainer asks for it, and stages 2 and 3 send each pass's gradients
            vars(network)[ENGINE] = engine  # no submodule: the engine holds the network
            self.engines.append(engine)
            shared |= zip(numbers, engine.optimizer.param_groups, strict=True)
        super().__init__([{"params": [torch.zeros(0)]}], optimizer.defaults)
        # Those with nothing in them stay: a scheduler counts all, and sets DeepSpeed's learning rates.
        self.param_groups = [shared.get(number, group) for number, group in enumerate(optimizer.param_groups)]

    def clip_and_step(self) -> list[Tensor]:
        """Every network's step -> the norm of each one's gradients before clipping.

        Where it is not finite, DeepSpeed leaves that network as it was.
        """
        for engine in self.engines:
            engine.step()
        norms = [(engine.get_global_grad_norm(), engine.device) for engine in self.engines]
        return [torch.as_tensor(norm, dtype=torch.float32, device=device) for norm, device in norms]

    def step(self, closure: Any = None) -> None: ...

    def zero_grad(self, set_to_none: bool = True) -> None:
        """DeepSpeed does, within its step."""

    # ---- checkpoints: as AdamW has it in one process

    def state_dict(self) -> dict[str, Any]:
        """The groups; `whole_state` has the moments, too."""
        numbers = iter(range(sum(map(len, self.parameters))))
        groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": [next(numbers) for _ in own]}
            for group, own in zip(self.param_groups, self.parameters, strict=True)
        ]
        return {"state": {}, "param_groups": groups}

    def whole_state(self) -> dict[str, Any]:
        """What AdamW's `state_dict` would be, on the CPU, on rank 0; without moments on all others. Collective."""
        for engine in self.engines:
            link(engine.optimizer)
        keeps, found, number = torch.distributed.get_rank() == 0, {}, 0
        for engine, own in self.owned():
            for parameter in own:
                moments = {name: safe_get_full_optimizer_state(parameter, name) for name in MOMENTS}
                if keeps:
                    step = next(iter(engine.optimizer.optimizer.state.values()))["step"]
                    step = torch.as_tensor(step).to("cpu", copy=True)  # one's own: AdamW counts in place
                    found[number] = {"step": step} | {name: moment.cpu() for name, moment in moments.items()}
                number += 1
        return self.state_dict() | {"state": found}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of what `whole_state` gives; no communication."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        if not state_dict["state"]:
            return
        steps = next(iter(state_dict["state"].values()))["step"]
        for engine in self.engines:
            begin(engine.optimizer, steps)
            link(engine.optimizer)
        every = [parameter for _, own in self.owned() for parameter in own]
        for number, moments in state_dict["state"].items():  # none of a weight that never had a gradient
            for name in MOMENTS:
                give_moment(every[number], name, moments[name].to(self.engines[0].device))

    def owned(self) -> Iterator[tuple[Any, list[nn.Parameter]]]:
        """Each group's engine and parameters."""
        engines = {parameter: engine for engine in self.engines for parameter in engine.module.parameters()}
        return ((engines[own[0]], own) for own in self.parameters if own)


def begin(shared: Any, steps: Tensor) -> None:
    """Give DeepSpeed's optimizer the moments, all 0, that it makes in its first step."""
    fused = any(shared.optimizer.param_groups[0].get(name) for name in ("fused", "capturable"))
    for flat in flat_weights(shared):
        step = steps.to(flat.device if fused else "cpu", copy=True)  # where AdamW wants it
        shared.optimizer.state[flat] = {"step": step} | {name: torch.zeros_like(flat) for name in MOMENTS}


def flat_weights(shared: Any) -> list[Tensor]:
    """What DeepSpeed's optimizer steps: this process's part of each group's weights, one after the other."""
    stage_3 = hasattr(shared, "fp32_partitioned_groups_flat")
    return shared.fp32_partitioned_groups_flat if stage_3 else shared.single_partition_of_fp32_groups


def link(shared: Any) -> None:
    """Tell stages 1 and 2 where each weight's moments are: they look once, when the first group alone has some."""
    for flat, weights in zip(flat_weights(shared), getattr(shared, "bit16_groups", ()), strict=False):
        for weight in weights:
            if weight._hp_mapping is not None:  # this process has a part of it
                weight._hp_mapping.set_optim_state_fragment(flat, shared.optimizer.state[flat])


def give_moment(parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Set this process's part of a moment."""
    if is_partitioned(parameter):
        safe_set_local_optimizer_state(parameter, part_of(value, parameter), name)
    else:
        safe_set_full_optimizer_state(parameter, value, name)


# ---- stage 3: weights ------------------------------------------------------------------------------------------------


def part_of(whole: Tensor, parameter: nn.Parameter) -> Tensor:
    """This process's part of a tensor of the parameter's shape: flat, the last one's filled up."""
    size, rank = parameter.ds_tensor.numel(), torch.distributed.get_rank()
    flat = whole.flatten()[rank * size : (rank + 1) * size]
    return torch.cat([flat, flat.new_zeros(size - len(flat))])


def whole(parameter: nn.Parameter) -> Tensor:
    """A copy of all of it. Collective."""
    with GatheredParameters([parameter]):
        return parameter.detach().clone()


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """The model with all of its weights, and without what gathers and drops them layer by layer. Collective."""
    engine = engine_of(model)
    with GatheredParameters(list(model.parameters())):
        if engine is not None:
            remove_hooks(engine)
        try:
            yield
        finally:
            if engine is not None:
                add_hooks(engine)
