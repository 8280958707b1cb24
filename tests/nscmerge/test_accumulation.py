"""A sum of losses whose graphs exist one at a time has the value and the gradient of the sum."""

import pytest
import torch
from torch import nn

from nscmerge.accumulation import sum_one_by_one


def test_only_one_graph_exists_at_a_time():
    parameter = nn.Parameter(torch.tensor([0.5, 2.0]))
    unused = nn.Parameter(torch.ones(1))
    seen = []

    def losses():
        for k in range(3):
            loss = (parameter**k).exp().sum()
            yield loss
            if k:
                with pytest.raises(RuntimeError, match="second time"):
                    loss.backward()
            seen.append(loss.detach())

    total = sum_one_by_one(losses(), [parameter, unused])
    assert len(seen) == 3
    assert torch.equal(total, torch.stack(seen).sum())
    (2 * total).backward()
    x = parameter.detach()
    torch.testing.assert_close(parameter.grad, 2 * (x.exp() + 2 * x * (x**2).exp()))
    assert not unused.grad.any()
