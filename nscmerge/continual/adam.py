"""Adam on one tensor with gradients by hand: no autograd, no parameter groups, in place."""

from __future__ import annotations

import torch
from torch import Tensor


class Adam:
    """Kingma and Ba, arXiv:1412.6980, as ``torch.optim.Adam``: betas (0.9, 0.999), eps 1e-8, no decay, no schedule.

    Args:
        parameter: Changed in place by :meth:`step`.
        lr: Step size.
    """

    BETAS = (0.9, 0.999)
    EPS = 1e-8

    def __init__(self, parameter: Tensor, lr: float) -> None:
        self.parameter, self.lr, self.t = parameter, lr, 0
        self.mean = torch.zeros_like(parameter)
        self.square = torch.zeros_like(parameter)
        self._work = torch.empty_like(parameter)

    def step(self, gradient: Tensor) -> None:
        """Take one step down ``gradient``, of the parameter's shape."""
        self.t += 1
        first, second = self.BETAS
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        torch.sqrt(self.square, out=self._work)
        self._work.div_((1 - second**self.t) ** 0.5).add_(self.EPS)
        self.parameter.addcdiv_(self.mean, self._work, value=-self.lr / (1 - first**self.t))
