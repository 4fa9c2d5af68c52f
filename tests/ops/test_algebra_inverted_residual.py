"""Identity G: the inverted residual in training, forward and backward, with x and z kept and the expanded tensor
recomputed."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_input, conv2d_weight

from mvit3_kernels.ops import BatchNorm, ConvNorm
from mvit3_kernels.ops.inverted_residual.reference import inverted_residual

from .inputs import Draw
from .plain import nchw, nhwc
from .test_algebra import CONDITIONS, close, feature_map, moments, parameter


def silu_slope(n: Tensor) -> Tensor:
    sigmoid = n.sigmoid()
    return sigmoid * (1 + n * (1 - sigmoid))


class Affine:
    """A batch norm whose statistics are known: n = scale * v + shift."""

    def __init__(self, norm: BatchNorm, mean: Tensor, var: Tensor):
        self.mean, self.r = mean, (var + norm.eps).rsqrt()
        self.scale = norm.weight * self.r
        self.shift = norm.bias - self.scale * mean

    def __call__(self, v: Tensor) -> Tensor:
        return self.scale * v + self.shift

    def backward(self, dn: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """From the gradient of n: those of v, weight and bias. The two sums come first, then one more pass."""
        normal = (v - self.mean) * self.r
        dbias, dweight = dn.sum(0), (dn * normal).sum(0)
        return self.scale * (dn - dbias / len(v) - normal * dweight / len(v)), dweight, dbias


def statistics(v: Tensor) -> tuple[Tensor, Tensor]:
    return v.mean(0), v.var(0, correction=0)


class Step:
    """Forward and backward. Rows are (pixels, channels); only `x` and `z` outlive the forward pass."""

    def __init__(self, x: Tensor, expand: ConvNorm, depthwise: ConvNorm, project: ConvNorm, stride: int):
        self.shape, self.x, self.stride = x.shape, x.flatten(0, 2), stride
        self.w1, self.w2, self.w3 = expand.weight, depthwise.weight, project.weight
        self.mu, self.s = moments(self.x)
        self.bn1 = Affine(expand.norm, self.w1 @ self.mu, ((self.w1 @ self.s) * self.w1).sum(1))  # A
        z = nhwc(self.filter(self.expanded()))
        self.z, self.out_shape = z.flatten(0, 2), (*z.shape[:3], self.w3.shape[0])
        self.bn2 = Affine(depthwise.norm, *statistics(self.z))
        p = F.silu(self.bn2(self.z)) @ self.w3.T
        self.bn3 = Affine(project.norm, *statistics(p))
        self.y = self.bn3(p).view(self.out_shape)
        if stride == 1 and self.y.shape == x.shape:
            self.y = self.y + x

    def expanded(self) -> Tensor:
        """The wide tensor, made again from x wherever it is needed; NCHW for the convolution."""
        return nchw(F.silu(self.bn1(self.x @ self.w1.T)).view(*self.shape[:3], -1))

    def filter(self, wide: Tensor) -> Tensor:
        return F.conv2d(wide, self.w2, None, self.stride, 1, 1, wide.shape[1])

    def backward(self, dy: Tensor) -> tuple[Tensor, ...]:
        # First pass over z: the projection.
        g, n2 = dy.flatten(0, 2), self.bn2(self.z)
        hidden = F.silu(n2)
        dp, dgamma3, dbeta3 = self.bn3.backward(g, hidden @ self.w3.T)
        dw3 = dp.T @ hidden
        # Second pass over z: depth-wise convolution and expansion, by B.
        dz, dgamma2, dbeta2 = self.bn2.backward(dp @ self.w3 * silu_slope(n2), self.z)
        dz, wide = nchw(dz.view(*self.out_shape[:3], -1)), self.expanded()
        dw2 = conv2d_weight(wide, self.w2.shape, dz, self.stride, 1, 1, wide.shape[1])
        dwide = nhwc(conv2d_input(wide.shape, self.w2, dz, self.stride, 1, 1, wide.shape[1])).flatten(0, 2)
        g = dwide * silu_slope(self.bn1(self.x @ self.w1.T))
        r, scale, count = self.bn1.r, self.bn1.scale, len(self.x)
        n1, g1, dx = g.T @ self.x, g.sum(0), (g * scale) @ self.w1
        dgamma1 = r * ((self.w1 * n1).sum(1) - self.bn1.mean * g1)
        dw1 = scale[:, None] * (n1 - torch.outer(g1, self.mu) - (dgamma1 * r)[:, None] * (self.w1 @ self.s))
        k = self.w1.T @ ((scale * r * dgamma1 / count)[:, None] * self.w1)
        dx = (dx - (scale * g1 / count) @ self.w1 - (self.x - self.mu) @ k).view(self.shape)
        if self.stride == 1 and self.y.shape == self.shape:
            dx = dx + dy
        return dx, dw1, dgamma1, g1, dw2, dgamma2, dbeta2, dw3, dgamma3, dbeta3


@pytest.mark.parametrize("outputs", [5, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_g_inverted_residual_without_its_wide_tensors(condition, stride, outputs):
    draw = Draw()

    def part(*weight: int) -> ConvNorm:
        norm = BatchNorm(
            parameter(draw(weight[0], mean=1, scale=0.3)), parameter(draw(weight[0])), None, None, True, 1e-5
        )
        return ConvNorm(parameter(draw(*weight, scale=0.5)), norm)

    x, expand, depthwise, project = feature_map(draw, condition), part(6, 5), part(6, 1, 3, 3), part(outputs, 6)
    y, measured = inverted_residual(x, expand, depthwise, project, stride, 1, "silu", stride == 1 and outputs == 5)
    dy = draw(*y.shape)
    inputs = (x, *(t for weight, norm in (expand, depthwise, project) for t in (weight, norm.weight, norm.bias)))
    want = torch.autograd.grad(y, inputs, dy)
    with torch.no_grad():
        step = Step(x, expand, depthwise, project, stride)
        close(step.y, y.detach(), size=1.0)
        for affine, moment in zip((step.bn1, step.bn2, step.bn3), measured, strict=True):
            close(affine.mean, moment.mean, size=1.0)
        close(step.backward(dy), want, size=10 * max(1.0, x.abs().max().item()))
