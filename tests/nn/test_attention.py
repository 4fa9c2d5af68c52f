from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mvit3_kernels.nn import GlobalRepresentation, MultiHeadAttention, SeparableLayer, TransformerLayer


def unfold(x: torch.Tensor) -> torch.Tensor:
    """(B, D, H, W) to (B * 4, N, D), as MobileViT's paper has it: patches of 2x2, position inside the patch first."""
    b, d, h, w = x.shape
    x = x.reshape(b * d * (h // 2), 2, w // 2, 2).transpose(1, 2).reshape(b, d, (h // 2) * (w // 2), 4)
    return x.permute(0, 3, 2, 1).reshape(b * 4, -1, d)


def fold(t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    b, d, h, w = like.shape
    t = t.reshape(b, 4, -1, d).permute(0, 3, 2, 1)
    return t.reshape(b * d * (h // 2), w // 2, 2, 2).transpose(1, 2).reshape(b, d, h, w)


def randomise(module: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for p in module.parameters():
        nn.init.normal_(p, std=0.5)
    return module.double()


def test_transformer_layer_is_a_pre_norm_transformer_on_unfolded_tokens():
    layer = randomise(TransformerLayer(12, 20, num_heads=4)).eval()
    (norm1, attention, _), ffn = layer.pre_norm_mha, layer.pre_norm_ffn
    host = nn.MultiheadAttention(12, 4, batch_first=True).double().eval()
    host.load_state_dict(
        {
            "in_proj_weight": attention.qkv_proj.weight,
            "in_proj_bias": attention.qkv_proj.bias,
            "out_proj.weight": attention.out_proj.weight,
            "out_proj.bias": attention.out_proj.bias,
        }
    )
    x = torch.randn(2, 12, 6, 8, dtype=torch.float64)
    t = unfold(x)
    n = norm1(t)
    t = t + host(n, n, n, need_weights=False)[0]
    t = t + ffn(t)
    assert torch.allclose(layer(x), fold(t, x), rtol=0, atol=1e-12)


def test_separable_layer_is_mobilevitv2s():
    layer = randomise(SeparableLayer(10, 16)).eval()
    (norm1, attention, _), (norm2, fc1, _, fc2, _) = layer.pre_norm_attn, layer.pre_norm_ffn
    x = torch.randn(2, 10, 4, 6, dtype=torch.float64)
    t = unfold(x).reshape(2, 4, -1, 10).permute(0, 3, 1, 2)  # (B, D, P, N)
    q, k, v = attention.qkv_proj.block(norm1(t)).split([1, 10, 10], 1)
    context = (k * F.softmax(q, -1)).sum(-1, keepdim=True)
    t = t + attention.out_proj.block(F.relu(v) * context)
    t = t + fc2.block(F.silu(fc1.block(norm2(t))))
    assert torch.allclose(layer(x), fold(t.permute(0, 2, 3, 1).reshape(8, -1, 10), x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer, norm", [(TransformerLayer, nn.LayerNorm(8)), (SeparableLayer, nn.GroupNorm(1, 8))])
def test_global_representation_is_its_layers_and_norm(layer, norm):
    stack = randomise(GlobalRepresentation([layer(8, 12), layer(8, 12)], norm)).eval()
    x = torch.randn(3, 8, 4, 4, dtype=torch.float64)
    want = stack[1](stack[0](x))
    want = norm(want) if isinstance(norm, nn.GroupNorm) else norm(want.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    assert torch.allclose(stack(x), want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layer", [TransformerLayer, SeparableLayer])
@pytest.mark.parametrize("site", ["dropout", "attn_dropout", "ffn_dropout"])
def test_dropout_obeys_manual_seed_and_eval(layer, site):
    module = randomise(layer(8, 12, **{site: 0.5}))
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return module(x)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    assert torch.equal(module.eval()(x), randomise(layer(8, 12)).eval()(x))


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="num_heads must be positive and divide dim 10, got 4"):
        MultiHeadAttention(10, 4)
