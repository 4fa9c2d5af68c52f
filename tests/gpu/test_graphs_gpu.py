"""CUDA graphs against the same steps without: tests/test_graphs.py on a real GPU, with the networks of this library."""

import copy

import pytest
import torch
import torch.nn.functional as F

from mvit3_kernels import cuda_graph, cuda_graph_step, explain, fuse

from .test_networks_gpu import data, network

NAMES = ("mobilevitv3_xxs", "mobilevitv3_050")
SIDES = (96, 128)  # of a multi-scale sampler


def optimizer_of(model):
    return torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)


def batches(number):
    for i in range(number):
        images, targets = data(8, SIDES[i % 2])
        yield images + 0.1 * i, targets


@pytest.mark.parametrize("scaled", [False, True], ids=["bfloat16", "float16-scaled"])
@pytest.mark.parametrize("name", NAMES)
def test_learns_what_eager_steps_learn(name, scaled, poisoned):
    """Bit by bit: the same kernels on the same data, two sizes in turns, the learning rate changing."""
    dtype = torch.float16 if scaled else torch.bfloat16
    model = network(name)
    peer = copy.deepcopy(model)
    optimizer, eager = optimizer_of(model), optimizer_of(peer)
    scaler, other = (torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=scaled) for _ in range(2))
    step = cuda_graph_step(model, F.cross_entropy, optimizer, autocast=dtype, scaler=scaler, max_norm=1.0)
    # The same rates as the graph reads: tensors of float32.
    eager.param_groups[0]["lr"] = torch.tensor(1e-3, device="cuda")
    eager.param_groups[0]["capturable"] = True
    for number, (images, targets) in enumerate(batches(14)):
        optimizer.param_groups[0]["lr"] = 1e-3 / (number + 1)
        eager.param_groups[0]["lr"].fill_(1e-3 / (number + 1))
        found = step(images, targets)
        with torch.autocast("cuda", dtype, cache_enabled=False):
            loss = F.cross_entropy(peer(images), targets)
        eager.zero_grad()
        other.scale(loss).backward()
        other.unscale_(eager)
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        other.step(eager)
        other.update()
        torch.testing.assert_close(found, loss.detach(), rtol=1e-3, atol=1e-4)
    for (key, t), value in zip(model.state_dict().items(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(t, value, rtol=2e-2, atol=2e-3, msg=key)
    assert len(step) == 2


def test_dropout_differs_and_is_reproducible():
    def losses():
        model = network("mobilevitv3_xxs", drop_rate=0.2, proj_drop_rate=0.2)
        step = cuda_graph_step(model, F.cross_entropy, optimizer_of(model), warmup=1)
        step.optimizer.param_groups[0]["lr"] = 0.0
        images, targets = data(8, 96)
        step(images, targets)
        step(images, targets)
        torch.manual_seed(3)
        return [float(step(images, targets)) for _ in range(5)]

    first = losses()
    assert len(set(first)) == 5
    torch.testing.assert_close(losses(), first, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_inference(name):
    model = network(name, training=False)
    run = cuda_graph(model, autocast=torch.bfloat16)
    kept = []
    for i in range(4):
        images, _ = data(1 + i % 2, SIDES[i // 2])
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            kept.append((run(images.cpu() if i == 3 else images), model(images)))
    for found, expected in kept:
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.9)  # in place: the graph reads it
        images, _ = data(1, SIDES[0])
        with torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(run(images), model(images), rtol=1e-2, atol=1e-2)


def test_graphs_share_memory():
    """Four sizes take about what the largest takes, not the sum."""
    model = network("mobilevitv3_xxs")
    step = cuda_graph_step(model, F.cross_entropy, optimizer_of(model), warmup=1)
    taken = []
    for side in (256, 224, 192, 160):
        for _ in range(2):
            step(*data(16, side))
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        taken.append(torch.cuda.memory_reserved())
    gradients = sum(p.numel() * 4 for p in model.parameters())
    assert taken[3] - taken[0] <= 0.3 * taken[0] + 3 * gradients + 64 * 2**20, taken


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_network_makes_its_own(name, poisoned):
    """From the third call of a size on; weights that are written are read, those that are moved are recorded anew."""
    peer = network(name, False)
    model = fuse(copy.deepcopy(peer))

    def ran(images):
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            torch.testing.assert_close(model(images), peer(images), rtol=1e-3, atol=1e-3)
            return explain(model, images).rows[0]

    small, large = (data(2, side)[0] for side in SIDES)
    ways = [ran(images).ran for images in (small, small, large, small, large, large)]
    assert ways == ["ordinary path", "CUDA graph", "ordinary path", "CUDA graph", "CUDA graph", "CUDA graph"]
    with torch.no_grad():
        for p, other in zip(model.parameters(), peer.parameters(), strict=True):
            other.copy_(p.mul_(1.01))
    assert ran(small).ran == "CUDA graph"
    with torch.no_grad():
        for each in (model, peer):
            for p in each.parameters():
                p.data = 0.99 * p.data
    assert [ran(small).ran, ran(small).ran] == ["CUDA graph"] * 2
    with torch.cuda.stream(torch.cuda.Stream()):
        assert "another stream" in ran(small).reason
    graph = torch.cuda.CUDAGraph()
    static = small.clone()
    with torch.no_grad(), torch.cuda.graph(graph):  # the caller's own
        found = model(static)
    graph.replay()
    with torch.no_grad():
        torch.testing.assert_close(found, peer(static), rtol=1e-3, atol=1e-3)
