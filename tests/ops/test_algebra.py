"""The identities of the design, each against autograd through the ops' references, forward and backward, in float64."""

import pytest
import torch
from torch import Tensor

from mvit3_kernels.ops import BatchNorm, LayerNorm, Linear
from mvit3_kernels.ops.norm_linear.reference import layer_norm, norm_linear
from mvit3_kernels.ops.patch_attention.reference import patch_attention
from mvit3_kernels.ops.pointwise_conv.reference import pointwise_conv
from mvit3_kernels.ops.pointwise_fusion.reference import pointwise_fusion
from mvit3_kernels.ops.random import random_words
from mvit3_kernels.ops.separable_attention.reference import separable_attention

from .inputs import Draw

CONDITIONS = ("ordinary", "large-mean", "constant-channel", "batch-one", "one-position")


def feature_map(draw: Draw, condition: str, channels: int = 5) -> Tensor:
    """(B, H, W, C); H and W are even unless there is one position only."""
    size = {"batch-one": (1, 4, 6), "one-position": (7, 1, 1)}.get(condition, (2, 4, 6))
    x = draw(*size, channels)
    if condition == "large-mean":
        x = x + 50 * torch.arange(1, channels + 1)
    if condition == "constant-channel":
        x[..., 0] = 3.0
    return x.requires_grad_()


def parameter(t: Tensor) -> Tensor:
    return t.requires_grad_()


def close(got: Tensor | tuple, want: Tensor | tuple, size: float = 1.0) -> None:
    """Equal but for rounding; `size` is that of the terms that cancel in the result."""
    for g, w in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        torch.testing.assert_close(g, w, rtol=1e-10, atol=1e-11 * size)


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (C,) and centred second moments (C, C) of rows (M, C)."""
    mean = x.mean(0)
    return mean, (x - mean).T @ (x - mean) / len(x)


def product_norm(draw: Draw, condition: str) -> tuple[Tensor, Tensor, BatchNorm]:
    x, weight = feature_map(draw, condition), draw(6, 5, scale=0.5)
    weight[0, 1:] = 0  # with a constant channel, a product of variance 0
    return (
        x,
        parameter(weight),
        BatchNorm(parameter(draw(6, mean=1, scale=0.3)), parameter(draw(6)), None, None, True, 1e-5),
    )


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_statistics_of_a_product_from_moments_of_its_input(condition):
    x, weight, norm = product_norm(Draw(), condition)
    want = pointwise_conv(x, Linear(weight), norm, "identity", None)[1]
    mean, s = moments(x.detach().flatten(0, 2))
    close((weight @ mean, ((weight @ s) * weight).sum(1)), tuple(want), size=want.var.max().item())


def test_a_moments_of_two_halves_reduce():
    """Synchronised batch norm sums the moments of the processes, not the products' statistics."""
    rows = Draw()(48, 5, mean=20)
    (m1, s1), (m2, s2) = moments(rows[:16]), moments(rows[16:])
    mean = (m1 + 2 * m2) / 3
    s = (s1 + 2 * s2) / 3 + torch.outer(m1 - mean, m1 - mean) / 3 + 2 * torch.outer(m2 - mean, m2 - mean) / 3
    close((mean, s), moments(rows))


@pytest.mark.parametrize("condition", CONDITIONS)
def test_b_one_pass_over_the_wide_gradient(condition):
    draw = Draw()
    x, weight, norm = product_norm(draw, condition)
    y = pointwise_conv(x, Linear(weight), norm, "identity", None)[0]
    g = draw(*y.shape)
    want = torch.autograd.grad(y, (x, weight, norm.weight, norm.bias), g)
    with torch.no_grad():
        rows, g = x.flatten(0, 2), g.flatten(0, 2)
        mu, s = moments(rows)
        r = (((weight @ s) * weight).sum(1) + norm.eps).rsqrt()
        scale, count = norm.weight * r, len(rows)
        n1, g1, dx0 = g.T @ rows, g.sum(0), (g * scale) @ weight  # the one pass
        dgamma = r * ((weight * n1).sum(1) - (weight @ mu) * g1)
        dweight = scale[:, None] * (n1 - torch.outer(g1, mu) - (dgamma * r)[:, None] * (weight @ s))
        k = weight.T @ ((scale * r * dgamma / count)[:, None] * weight)
        dx = dx0 - (scale * g1 / count) @ weight - (rows - mu) @ k
    close((dx.view_as(x), dweight, dgamma, g1), want, size=(n1.abs().max() * scale.abs().max()).item())


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_c_norm_before_a_linear_map_is_an_epilogue(condition, per_sample):
    draw = Draw()
    x = feature_map(draw, condition)
    norm = LayerNorm(parameter(draw(5, mean=1, scale=0.3)), parameter(draw(5)), 1e-5, per_sample)
    weight, bias = parameter(draw(4, 5)), parameter(draw(4))
    y = norm_linear(x, norm, Linear(weight, bias))
    g = draw(*y.shape)
    want = torch.autograd.grad(y, (x, *norm[:2], weight, bias), g)
    with torch.no_grad():
        dims = (1, 2, 3) if per_sample else (3,)
        mu, r = x.mean(dims, keepdim=True), (x.var(dims, correction=0, keepdim=True) + norm.eps).rsqrt()
        folded = weight * norm.weight
        close(
            r * (x @ folded.T) - r * mu * folded.sum(1) + (weight @ norm.bias + bias),
            y,
            size=(r * x.abs()).max().item(),
        )
        # Backward: q is the one product over g; the rest is on the small side.
        q = (g * r).flatten(0, 2).T @ x.flatten(0, 2) - (g * r * mu).flatten(0, 2).sum(0)[:, None]
        g1, p, normal = g.sum((0, 1, 2)), g @ folded, (x - mu) * r
        dx = r * (p - p.mean(dims, keepdim=True) - normal * (p * normal).mean(dims, keepdim=True))
        grads = dx, (weight * q).sum(0), weight.T @ g1, q * norm.weight + torch.outer(g1, norm.bias), g1
    close(grads, want, size=(r * x.abs()).max().item() * g.abs().sum().item())


def positions(x: Tensor, ph: int, pw: int) -> list[Tensor]:
    """Views of the pixels that share their position inside a patch."""
    return [x[:, i::ph, j::pw] for i in range(ph) for j in range(pw)]


def patch_size_of(condition: str) -> tuple[int, int]:
    return (1, 1) if condition == "one-position" else (2, 2)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("condition", CONDITIONS)
def test_d_separable_attention_without_keys(condition, dropout):
    draw, seed = Draw(), torch.tensor(11)
    t = feature_map(draw, condition)
    patch_size = patch_size_of(condition)
    norm = LayerNorm(parameter(draw(5, mean=1, scale=0.3)), parameter(draw(5)), 1e-5, True)
    qkv, out_proj = (Linear(parameter(draw(n, 5)), parameter(draw(n))) for n in (11, 5))
    y = separable_attention(t, norm, qkv, out_proj, patch_size, dropout, 0.0, seed)
    g = draw(*y.shape)
    want = torch.autograd.grad(y, (*qkv, *out_proj, t), g)
    x = layer_norm(t, norm)
    (wq, wk, wv), (bq, bk, bv) = (p.detach().split((1, 5, 5)) for p in qkv)
    tokens = t.shape[1] * t.shape[2] // (patch_size[0] * patch_size[1])
    words = random_words(seed, 0, len(t), patch_size[0] * patch_size[1] * tokens).view(len(t), -1, tokens)
    keep = (words >= int(dropout * 2**32)).double() / (1 - dropout)  # (B, positions, tokens); without dropout all ones
    dwq, dwk, dwv = (torch.zeros_like(w) for w in (wq, wk, wv))
    dbq, dbk, dbv = (torch.zeros_like(b) for b in (bq, bk, bv))
    dwo, dbo = torch.zeros_like(out_proj.weight), torch.zeros_like(out_proj.bias)
    dx = torch.zeros_like(x)
    out = torch.empty_like(x)
    with torch.no_grad():
        for i, (xs, gs, dxs, ys) in enumerate(
            zip(*(positions(m, *patch_size) for m in (x.detach(), g, dx, out)), strict=True)
        ):
            n = xs.flatten(1, 2)  # tokens (B, N, D)
            p = (n @ wq.T + bq).softmax(1)
            s = p * keep[:, i, :, None]
            pooled, total = (s * n).sum(1, keepdim=True), s.sum(1, keepdim=True)
            context = pooled @ wk.T + bk * total  # one matrix-vector product per sample and position
            value = n @ wv.T + bv
            attended = value.relu() * context
            ys.copy_((attended @ out_proj.weight.T + out_proj.bias).view_as(ys))
            go = gs.flatten(1, 2)
            da = go @ out_proj.weight
            dwo += go.flatten(0, 1).T @ attended.flatten(0, 1)
            dbo += go.sum((0, 1))
            dcontext, dv = (da * value.relu()).sum(1, keepdim=True), da * context * (value > 0)
            dwk += dcontext.squeeze(1).T @ pooled.squeeze(1)
            dbk += (dcontext * total).sum((0, 1))
            dwv += dv.flatten(0, 1).T @ n.flatten(0, 1)
            dbv += dv.sum((0, 1))
            dpooled = dcontext @ wk
            dp = (n @ dpooled.transpose(1, 2) + dcontext @ bk[:, None]) * keep[:, i, :, None]
            dscore = p * (dp - (p * dp).sum(1, keepdim=True))
            dwq += dscore.flatten(0, 1).T @ n.flatten(0, 1)
            dbq += dscore.sum((0, 1))
            dxs.copy_((dscore @ wq + dv @ wv + s * dpooled).view_as(dxs))
    dt = g + torch.autograd.grad(x, t, dx)[0]
    close(t + out, y)
    close((torch.cat((dwq, dwk, dwv)), torch.cat((dbq, dbk, dbv)), dwo, dbo, dt), want)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_f_attention_by_strides(condition):
    """Forward keeps the log-sum-exp, backward recomputes the probabilities from it; every tensor stays where it is."""
    draw, patch_size = Draw(), patch_size_of(condition)
    x, project, heads, dim = feature_map(draw, condition), draw(12, 5, scale=0.02), 2, 2
    qkv = (x @ project.T).detach().requires_grad_()
    out = patch_attention(qkv, heads, patch_size, 0.0, None)
    g = draw(*out.shape)
    [want] = torch.autograd.grad(out, qkv, g)
    got, dqkv = torch.empty_like(out), torch.empty_like(qkv)
    with torch.no_grad():
        for token, y, dy, dtoken in zip(*(positions(t, *patch_size) for t in (qkv, got, g, dqkv)), strict=True):
            for h in range(heads):
                q, k, v = (token[..., i * 4 + h * dim :][..., :dim].flatten(1, 2) for i in range(3))
                scores = q @ k.transpose(1, 2) * dim**-0.5
                lse = scores.logsumexp(-1, keepdim=True)
                o = (scores - lse).exp() @ v
                y[..., h * dim : (h + 1) * dim] = o.view(*y.shape[:-1], dim)
                do = dy[..., h * dim : (h + 1) * dim].flatten(1, 2)
                p = (scores - lse).exp()
                ds = p * (do @ v.transpose(1, 2) - (do * o).sum(-1, keepdim=True)) * dim**-0.5
                for i, d in enumerate((ds @ k, ds.transpose(1, 2) @ q, p.transpose(1, 2) @ do)):
                    dtoken[..., i * 4 + h * dim :][..., :dim] = d.view(*y.shape[:-1], dim)
    close((got, dqkv), (out.detach(), want), size=10.0)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_f_no_concat(condition):
    """W concat(norm(t), b) = W_t norm(t) + W_b b, where by C the norm is an epilogue of the first product."""
    draw = Draw()
    t = feature_map(draw, condition)
    b = parameter(draw(*t.shape[:-1], 3))
    norm = LayerNorm(parameter(draw(5, mean=1, scale=0.3)), parameter(draw(5)), 1e-5, True)
    weight, (zero, one) = parameter(draw(4, 8)), torch.tensor([[0.0], [1.0]], dtype=torch.float64).repeat(1, 4)
    identity = BatchNorm(one, zero, zero, one, False, 0.0)
    y, _ = pointwise_fusion(layer_norm(t, norm), b, weight, identity, "identity", None)
    inputs, g = (t, b, weight, *norm[:2]), draw(*y.shape)
    mu, r = t.mean((1, 2, 3), keepdim=True), (t.var((1, 2, 3), correction=0, keepdim=True) + norm.eps).rsqrt()
    folded = weight[:, :5] * norm.weight
    split = r * (t @ folded.T) - r * mu * folded.sum(1) + weight[:, :5] @ norm.bias + b @ weight[:, 5:].T
    size = (r * t.abs()).max().item() * g.abs().sum().item()
    close((split, *torch.autograd.grad(split, inputs, g)), (y, *torch.autograd.grad(y, inputs, g)), size=size)
