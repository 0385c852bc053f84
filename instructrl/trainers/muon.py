"""One optimizer for small models trained from scratch: Muon for the trunk's matrices, AdamW for everything else."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from instructrl.trainers.sharding import part_of, whole

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # https://kellerjordan.github.io/posts/muon/
NEWTON_SCHULZ_STEPS = 5


class MuonAdamW(Optimizer):
    """Muon (Jordan et al. 2024) and AdamW as one optimizer: one schedule, one clip and one checkpoint hold both.

    Muon's step is that of `torch.optim.Muon` with its defaults (Nesterov momentum; learning rate times
    sqrt(max(1, rows / columns))), but on a CPU the orthogonalisation runs in the gradient's own precision: without
    hardware support bfloat16 products are some fifteen times slower than float32.

    Args:
        params: groups made by `parameter_groups`; each has `muon: bool`, a learning rate and a weight decay.
        momentum: Muon's.
        betas, eps: AdamW's.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        groups = list(params)
        rest = [group for group in groups if not group["muon"]]
        self._adamw = AdamW(rest, betas=betas, eps=eps) if rest else None
        super().__init__(groups, {"momentum": momentum})
        if any(param.ndim != 2 for group in self._groups(muon=True) for param in group["params"]):
            raise ValueError("Muon takes matrices only")
        self._share()

    @torch.no_grad()
    def step(self, closure=None):
        """One step on all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self._groups(muon=True):
            for param in group["params"]:
                if param.grad is not None:
                    self._muon(param, group)
        if self._adamw:
            self._adamw.step()
        return loss

    def _muon(self, param: Tensor, group: dict[str, Any]) -> None:
        state = self.state[param]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(param)
        momentum = state["momentum_buffer"]
        momentum.lerp_(param.grad, 1 - group["momentum"])
        update = param.grad.lerp(momentum, group["momentum"])
        update = part_of(orthogonalise(whole(update)), like=update)  # of a sharded matrix every process does all of it
        rows, columns = param.shape
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * max(1, rows / columns) ** 0.5)

    def _groups(self, muon: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["muon"] == muon]

    def _share(self) -> None:
        """AdamW works on this optimizer's own groups and state: a schedule or a loaded checkpoint reaches it, too."""
        if self._adamw:
            self._adamw.param_groups = self._groups(muon=False)
            self._adamw.state = self.state

    def __setstate__(self, state: dict[str, Any]) -> None:  # load_state_dict puts new groups and a new state in place
        super().__setstate__(state)
        self._share()


def orthogonalise(matrix: Tensor) -> Tensor:
    """U V^T of the matrix's singular value decomposition, approximately: singular values end between .5 and 1.5.

    matrix [rows, columns] -> [rows, columns]. Five Newton-Schulz steps, x <- a x + (b s + c s^2) x with s = x x^T.
    """
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)  # spectral norm at most 1
    for _ in range(NEWTON_SCHULZ_STEPS):
        s = x @ x.T
        x = torch.addmm(x, torch.addmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.T if tall else x).to(matrix.dtype)


def parameter_groups(
    model: nn.Module, learning_rate: float, muon_learning_rate: float, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """The model's parameters for `MuonAdamW`: matrices of the trunk; embeddings and heads; norms and biases (no decay).

    A head is a linear layer that is no part of the trunk: the unembedding, or a reward model's scalar projection.
    """
    trunk = getattr(model, getattr(model, "base_model_prefix", ""), model)
    embeddings = {id(module.weight) for module in trunk.modules() if isinstance(module, nn.Embedding)}
    inner = {id(param) for param in trunk.parameters()} - embeddings
    matrices, heads, vectors = [], [], []
    for param in model.parameters():  # tied weights come once
        if not param.requires_grad:
            continue
        kind = vectors if param.ndim < 2 else matrices if param.ndim == 2 and id(param) in inner else heads
        kind.append(param)
    groups = [
        {"params": matrices, "muon": True, "lr": muon_learning_rate, "weight_decay": weight_decay},
        {"params": heads, "muon": False, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": vectors, "muon": False, "lr": learning_rate, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
