"""LARS and LAMB: inner optimizers for the large batches of a site with many GPUs, with warm-up and linear scaling.

Both scale each tensor's step by |w| / |step| (the trust ratio), so that no layer is thrown far by a batch that is large
for it. Ordinary torch optimizers, for any loop: they step the same with and without a session.

    optimizer = Lamb(model.parameters(), lr=scaled_rate(3e-3, batch=4096, base_batch=256))
    warm_up(optimizer, steps=500)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


def scaled_rate(rate: float, *, batch: int, base_batch: int) -> float:
    """Return the learning rate for `batch` where `rate` suits `base_batch`: in proportion (arXiv 1706.02677, 2.1).

    Beyond the gradient noise scale (`session.metrics.noise_scale_samples`) proportion overshoots.
    """
    return rate * batch / base_batch


def warm_up(optimizer: torch.optim.Optimizer, *, steps: int) -> None:
    """Let the rate rise linearly over the first `steps` steps (arXiv 1706.02677, 2.2), by the optimizer's own count.

    The count is in the optimizer's state, so it survives a checkpoint and a join.
    """
    for group in optimizer.param_groups:
        group["steps_taken"], group["full_lr"] = 0, float(group["lr"])

    def before(stepping: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ANN401, ARG001 - torch's hook
        for group in stepping.param_groups:
            group["steps_taken"] += 1
            group["lr"] = group["full_lr"] * min(1.0, group["steps_taken"] / steps)

    optimizer.register_step_pre_hook(before)


class Lars(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling of SGD with momentum (arXiv 1708.03888, Alg. 1).

    v <- momentum v + lr * trust * (g + weight_decay w), w <- w - v, with
    trust = coefficient |w| / (|g| + weight_decay |w|). Vectors (biases, norms) are neither decayed nor scaled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 1e-4,
        coefficient: float = 1e-3,
    ) -> None:
        """Optimise `params`."""
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "coefficient": coefficient}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's own signature
        """Take one step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                gradient, rate = weight.grad, group["lr"]
                if weight.dim() > 1:
                    size, slope = weight.norm(), gradient.norm()
                    reach = slope + group["weight_decay"] * size
                    trust = torch.where((size > 0) & (reach > 0), group["coefficient"] * size / reach, 1.0)
                    gradient = (gradient + group["weight_decay"] * weight) * trust
                velocity = self.state[weight].setdefault("momentum_buffer", torch.zeros_like(weight))
                velocity.mul_(group["momentum"]).add_(gradient, alpha=rate)
                weight.sub_(velocity)
        return loss


class Lamb(torch.optim.Optimizer):
    """Layer-wise adaptive Adam (arXiv 1904.00962, Alg. 2): Adam's step, scaled to the tensor's own length.

    r = m^ / (sqrt(v^) + eps) + weight_decay w, w <- w - lr * (|w| / |r|) r. Vectors are neither decayed nor scaled.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
    ) -> None:
        """Optimise `params`."""
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401 - torch's own signature
        """Take one step."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            first, second = group["betas"]
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(weight)
                    state["exp_avg_sq"] = torch.zeros_like(weight)
                state["step"] += 1
                count = float(state["step"])
                state["exp_avg"].lerp_(weight.grad, 1 - first)
                state["exp_avg_sq"].mul_(second).addcmul_(weight.grad, weight.grad, value=1 - second)
                mean = state["exp_avg"] / (1 - first**count)
                spread = (state["exp_avg_sq"] / (1 - second**count)).sqrt_().add_(group["eps"])
                direction = mean / spread
                trust: torch.Tensor | float = 1.0
                if weight.dim() > 1:
                    direction = direction + group["weight_decay"] * weight
                    size, reach = weight.norm(), direction.norm()
                    trust = torch.where((size > 0) & (reach > 0), size / reach, 1.0)
                weight.sub_(group["lr"] * trust * direction)
        return loss
