"""Running statistics of several norms at once, against PyTorch's norms one by one."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from mvit3_kernels.ops.running_stats import update_all_running_stats
from mvit3_kernels.ops.types import Moments


def measured(norm: nn.BatchNorm2d, seed: int) -> tuple[torch.Tensor, tuple]:
    """A map (B, C, H, W), and what an op would return of it."""
    x = torch.randn(2, norm.num_features, 3, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x, (norm, Moments(x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)), x.movedim(1, -1))


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("momenta", [(0.1, 0.1, 0.1), (0.1, 0.3, 0.1), (None, None, None), (0.0, 0.0, 0.0)])
@pytest.mark.parametrize("same", [False, True], ids=["three norms", "one of them twice"])
def test_all_at_once_is_one_by_one(momenta, same):
    norms = [nn.BatchNorm2d(4, momentum=momentum).double() for momentum in momenta]
    if same:
        norms[2] = norms[0]
    wanted = copy.deepcopy(norms)
    for step in range(2):
        given = [measured(norm, 3 * step + i) for i, norm in enumerate(norms)]
        for norm, (x, _) in zip(wanted, given, strict=True):
            norm(x)
        update_all_running_stats(*(batch for _, batch in given))
    for norm, want in zip(norms, wanted, strict=True):
        for name, t in want.named_buffers():
            torch.testing.assert_close(norm.get_buffer(name), t, rtol=1e-12, atol=1e-12)


def test_launches_do_not_grow_with_the_norms():
    norms = [nn.BatchNorm2d(channels).double() for channels in (4, 5, 6)]
    given = [measured(norm, i)[1] for i, norm in enumerate(norms)]
    with Counted() as counted:
        update_all_running_stats(*given)
    assert counted.names == ["aten::_foreach_add_", "aten::_foreach_mul", "aten::_foreach_lerp_"]
