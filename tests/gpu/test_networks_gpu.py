"""Whole networks of each family on a GPU, held to the float64 reference and to what eager PyTorch does in the same
precision."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F

import mvit3_kernels
from mvit3_kernels import backend
from tests.bounds import assert_bound, each, largest

FAMILIES = ("mobilevitv3_xxs", "mobilevitv3_050", "mobilevitv2_050", "mobilevit_xxs")
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
SIDE, BATCH = 256, 16


def network(name, training=True, **dropouts):
    torch.manual_seed(0)
    rates = {"drop_rate": 0.0, "proj_drop_rate": 0.0, **dropouts}
    model = mvit3_kernels.create_model(name, num_classes=10, **rates)
    if not training:  # statistics that are not those of a fresh network
        draw = torch.Generator().manual_seed(2)
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=draw)
                module.running_var.uniform_(0.5, 1.5, generator=draw)
    return model.cuda().to(memory_format=torch.channels_last).train(training)


def data(batch=BATCH, side=SIDE):
    draw = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, side, side, generator=draw).cuda().contiguous(memory_format=torch.channels_last)
    return images, torch.arange(batch, device="cuda") % 10


def run(model, images, targets, dtype=None, on=None):
    """Logits, the gradient of all parameters, and the buffers after the step."""
    with (
        torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None),
        backend(on) if on else contextlib.nullcontext(),
    ):
        logits = model(images)
    loss = F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
    scale = 2.0**10 if dtype is torch.float16 else 1.0  # its smallest gradients would vanish, in eager PyTorch too
    (loss * scale).backward()
    gradients = torch.cat([p.grad.double().flatten() / scale for p in model.parameters()])
    statistics = torch.cat([b.double().flatten() for b in model.buffers()])
    return {"logits": logits.detach().double(), "gradients": gradients, "statistics": statistics}


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", FAMILIES)
def test_bound(name, precision, training):
    """Logits, gradients and running statistics: ours may err twice as much as eager PyTorch in the same precision."""
    (images, targets), dtype = data(), PRECISIONS[precision]
    exact = run(network(name, training).double(), images.double(), targets, on="reference")
    eager = run(network(name, training), images, targets, dtype, on="reference")
    ours = run(network(name, training), images, targets, dtype)
    assert_bound(ours, eager, exact, 1e-7, group=each, least=0)


@pytest.mark.parametrize("side", [224, 250], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_other_sizes(name, side):
    """Maps that patches divide, and that they do not."""
    (images, targets) = data(3, side)
    exact = run(network(name).double(), images.double(), targets, on="reference")
    eager, ours = (run(network(name), images, targets, torch.bfloat16, on=on) for on in ("reference", None))
    assert_bound(ours, eager, exact, 0.0, group=each, least=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_element_is_written(name, poisoned):
    """torch.empty is full of NaN; on odd sizes, with dropout."""
    images, targets = data(3, 96)
    found = run(
        network(name, drop_rate=0.1, proj_drop_rate=0.1, attn_drop_rate=0.1, ffn_drop_rate=0.1),
        images,
        targets,
        torch.bfloat16,
    )
    assert all(t.isfinite().all() for t in found.values())


@pytest.mark.parametrize("name", FAMILIES)
def test_runs_are_identical_on_request(name, poisoned):
    images, targets = data()
    first = run(network(name), images, targets, torch.bfloat16)
    for _ in range(2):
        for part, t in run(network(name), images, targets, torch.bfloat16).items():
            assert torch.equal(t, first[part]), part


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
def test_training_follows_the_reference(name):
    """200 steps on the digits in bfloat16: the loss keeps as close to that of float32 as eager bfloat16 does."""
    pytest.importorskip("sklearn")
    from mvit3.data import load_digits, train_batches

    split = load_digits().train.to(torch.device("cuda"))

    def losses(on, dtype):
        model = network(name)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
        found = []
        with backend(on) if on else contextlib.nullcontext():
            for epoch in range(9):
                for images, targets in train_batches(split, 64, epoch):
                    with torch.autocast("cuda", dtype or torch.bfloat16, enabled=dtype is not None):
                        loss = F.cross_entropy(model(images), targets)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    found.append(loss.detach())
        return torch.stack(found[:200]).float().unfold(0, 20, 5).mean(1)  # of 20 steps

    exact, eager, ours = losses("reference", None), losses("reference", torch.bfloat16), losses(None, torch.bfloat16)
    assert ours[-1] < 0.5 * ours[0]
    floor = 0.05 / exact.abs().max().item()
    assert_bound({"losses": ours}, {"losses": eager}, {"losses": exact}, floor, size=largest, least=0)


def test_compiled_network():
    """torch.compile takes the network whole, and a second size does not compile the kernels again."""
    model = network("mobilevitv3_xxs")
    images, targets = data()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True)
    want, found = (run(m, images, targets, torch.bfloat16) for m in (model, compiled))
    exact = run(network("mobilevitv3_xxs").double(), images.double(), targets, on="reference")
    assert_bound(found, want, exact, 0.0, group=each, least=0)
