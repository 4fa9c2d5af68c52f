"""The plain networks that benchmarks compare with compute the same function."""

from __future__ import annotations

import pytest
import torch

from mvit3.bench.plain import plain, plain_dense
from mvit3_kernels import create_model


@pytest.mark.parametrize("name", ["mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050"])
@pytest.mark.parametrize("training", [True, False])
def test_plain_network_is_the_network(name, training):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, drop_rate=0.0, proj_drop_rate=0.0).double().train(training)
    peer = plain(model)
    x = torch.randn(2, 3, 72, 104, dtype=torch.float64)
    want, got = model(x), peer(x)
    assert torch.allclose(got, want, rtol=0, atol=1e-10 * want.abs().max().item())
    want.square().sum().backward(), got.square().sum().backward()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-7, atol=1e-8)
    for b, c in zip(model.buffers(), peer.buffers(), strict=True):
        assert torch.allclose(b.double(), c.double(), rtol=1e-9)


def test_plain_network_on_the_modules_of_the_network():
    model = create_model("mobilevitv3_xxs", num_classes=5)
    peer = plain(model.eval(), copies=False)
    assert [id(p) for p in peer.parameters()] == [id(p) for p in model.parameters()]
    assert [id(b) for b in peer.buffers()] == [id(b) for b in model.buffers()]
    model.train()
    before = model.conv_1.block.norm.running_mean.clone()
    peer(torch.randn(2, 3, 64, 64))
    assert not torch.equal(model.conv_1.block.norm.running_mean, before)


@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv3_xxs", "pspnet_mobilevitv3_050", "ssdlite_mobilevitv3_xxs"])
def test_plain_network_of_dense_prediction_is_the_network(name):
    torch.manual_seed(0)
    model = create_model(name, num_classes=5, drop_rate=0.0, proj_drop_rate=0.0).double()
    if getattr(getattr(model, "seg_head", None), "aux_head", None) is not None:
        model.seg_head.aux_head = None  # the peer has none
    peer, x = plain_dense(model.train()), torch.randn(2, 3, 64, 96, dtype=torch.float64)
    outputs = [[y] if isinstance(y, torch.Tensor) else list(y) for y in (model(x), peer(x))]
    for want, got in zip(*outputs, strict=True):
        assert torch.allclose(got, want, rtol=0, atol=1e-10 * want.abs().max().item())
    for each in outputs:
        sum(y.square().sum() for y in each).backward()
    for p, q in zip(model.parameters(), peer.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-6, atol=1e-7 * p.grad.norm().item() + 1e-8)
    model.eval()
    with torch.no_grad():
        peer = plain_dense(model, (64, 96))
        if name.startswith("ssdlite"):
            for got, want in zip(peer(x), model.predict(x), strict=True):
                assert torch.allclose(got, want, rtol=1e-6, atol=1e-9)
        else:
            assert torch.equal(peer(x), model.label_map(x))
