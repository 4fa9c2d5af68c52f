"""The logic around CUDA graphs, with a recorder that needs no GPU; tests/gpu/test_graphs_gpu.py holds real graphs to
the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mvit3_kernels
from mvit3_kernels import CudaGraphError, cuda_graph, cuda_graph_step

from .replay import FakeRecorder

SHAPES = ((4, 3, 8, 8), (2, 3, 12, 8))  # of a multi-scale sampler


def network(dropout=0.0):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, bias=False),
        nn.BatchNorm2d(8),
        nn.SiLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(8, 5),
    )


def adamw(model, **options):
    return torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True, **options)


def batch(number, shape=SHAPES[0]):
    draw = torch.Generator().manual_seed(number)
    return torch.randn(shape, generator=draw), torch.randint(5, shape[:1], generator=draw)


def eager_step(model, optimizer, images, targets):
    loss = F.cross_entropy(model(images), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.detach()


def make(model, optimizer, **options):
    recorder = FakeRecorder()
    return cuda_graph_step(model, F.cross_entropy, optimizer, recorder=recorder, **options), recorder


def assert_same(model, peer):
    for (name, t), other in zip(model.state_dict().items(), peer.state_dict().values(), strict=True):
        torch.testing.assert_close(t, other, msg=name)


@pytest.mark.parametrize(
    "build", [adamw, lambda m: torch.optim.SGD(m.parameters(), 0.1, momentum=0.9, fused=True)], ids=["adamw", "sgd"]
)
def test_learns_what_eager_steps_learn(build):
    """Weights, running statistics, losses and gradients, with two shapes in turns and a learning rate that is set as a
    number."""
    model = network()
    peer = copy.deepcopy(model)
    optimizer, eager = build(model), build(peer)
    step, recorder = make(model, optimizer, warmup=2)
    losses = []
    for number in range(10):
        data = batch(number, SHAPES[number % 2])
        for group in (optimizer.param_groups[0], eager.param_groups[0]):
            group["lr"] = 1e-2 / (number + 1)
        losses.append((step(*data), eager_step(peer, eager, *data)))
        for p, other in zip(model.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(p.grad, other.grad)
        assert_same(model, peer)
    for found, expected in losses:  # a loss is not overwritten by the next step
        torch.testing.assert_close(found, expected)
    assert (recorder.asides, recorder.records, recorder.replays) == (4, 2, 6)


def test_scheduler():
    model = network()
    peer = copy.deepcopy(model)
    optimizer, eager = adamw(model), adamw(peer)
    step, _ = make(model, optimizer, warmup=1)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, 6) for o in (optimizer, eager)]
    for number in range(6):
        data = batch(number)
        step(*data)
        eager_step(peer, eager, *data)
        for scheduler in schedulers:
            scheduler.step()
    assert_same(model, peer)


def test_optimizer_that_has_already_stepped_without_graphs():
    model = network()
    peer = copy.deepcopy(model)
    optimizer, eager = adamw(model), adamw(peer)
    for m, o in ((model, optimizer), (peer, eager)):
        eager_step(m, o, *batch(0))
    step, _ = make(model, optimizer, warmup=1)
    for number in range(1, 4):
        step(*batch(number))
        eager_step(peer, eager, *batch(number))
    assert_same(model, peer)


def test_clipping():
    model = network()
    peer = copy.deepcopy(model)
    optimizer, eager = adamw(model), adamw(peer)
    step, _ = make(model, optimizer, warmup=1, max_norm=0.01)
    for number in range(4):
        images, targets = batch(number)
        step(images, targets)
        eager.zero_grad()
        F.cross_entropy(peer(images), targets).backward()
        nn.utils.clip_grad_norm_(peer.parameters(), 0.01)
        eager.step()
    assert_same(model, peer)


def test_dropout_differs_from_replay_to_replay():
    step, _ = make(model := network(0.5), adamw(model), warmup=1)
    optimizer = step.optimizer
    optimizer.param_groups[0]["lr"] = 0.0
    assert len({float(step(*batch(0))) for _ in range(6)}) == 6


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv2_050"])
def test_networks(name):
    """The ops of this library in a graph, dropout and autocast included."""
    torch.manual_seed(0)
    model = mvit3_kernels.create_model(name, num_classes=5, drop_rate=0.1, proj_drop_rate=0.1)
    step, recorder = make(model, adamw(model), warmup=1, autocast=torch.bfloat16)
    losses = [float(step(*batch(0, (2, 3, 32, 32)))) for _ in range(4)]
    assert recorder.replays == 3 and all(torch.tensor(losses).isfinite()) and len(set(losses)) == 4
    run = cuda_graph(model.eval(), recorder=FakeRecorder())
    images = batch(1, (2, 3, 32, 32))[0]
    with torch.no_grad():
        torch.testing.assert_close(run(images), model(images))


def test_inference():
    model = network().eval()
    recorder = FakeRecorder()
    run = cuda_graph(model, max_graphs=2, recorder=recorder)
    first = run(batch(0)[0])
    with torch.no_grad():
        for number, shape in enumerate((*SHAPES, (1, 3, 8, 8), SHAPES[0])):
            images = batch(number, shape)[0].contiguous(memory_format=torch.channels_last)
            torch.testing.assert_close(run(images), model(images))
        torch.testing.assert_close(first, model(batch(0)[0]))
    assert recorder.records == 4 and len(run) == 2  # the first shape was dropped for the third
    run.reset()
    assert len(run) == 0


@pytest.mark.parametrize("first", [True, False], ids=["first inside", "first outside"])
def test_a_graph_serves_in_inference_mode_and_outside(first):
    model = network().eval()
    recorder = FakeRecorder()
    run = cuda_graph(model, recorder=recorder)
    for number, inside in enumerate((first, not first, first)):
        with torch.inference_mode(inside):
            images = batch(number)[0]
            found = run(images)
        with torch.no_grad():
            torch.testing.assert_close(found.clone(), model(images))
    assert recorder.records == 1


def test_a_backend_has_a_graph_of_its_own():
    recorder = FakeRecorder()
    run = cuda_graph(network().eval(), recorder=recorder)
    run(batch(0)[0])
    with mvit3_kernels.backend("reference"):
        run(batch(0)[0])
    assert recorder.records == 2


def test_without_a_gpu():
    model = network()
    reason = "sees no GPU" if not torch.cuda.is_available() else "the model is on cpu"
    optimizer = adamw(model)
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(CudaGraphError, match=reason):
        cuda_graph_step(model, F.cross_entropy, optimizer)
    assert str(optimizer.param_groups) == str(before)
    with pytest.raises(CudaGraphError, match=reason):
        cuda_graph(model)


def test_a_loss_that_reads_from_the_gpu():
    def loss(logits, targets):
        value = F.cross_entropy(logits, targets)
        return value if float(value.detach()) >= 0 else -value

    model = network()
    step = cuda_graph_step(model, loss, adamw(model), warmup=1, recorder=FakeRecorder())
    step(*batch(0))
    with pytest.raises(CudaGraphError, match="does it wait for the GPU"):
        step(*batch(0))


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"warmup": 0}, "warmup must be at least 1, got 0"),
        ({"max_graphs": 0}, "max_graphs must be at least 1, got 0"),
        ({"autocast": torch.float64}, "autocast must be"),
    ],
)
def test_bad_options(options, error):
    model = network()
    with pytest.raises(ValueError, match=error):
        make(model, adamw(model), **options)


def test_bad_optimizers_and_scalers():
    model = network()
    with pytest.raises(ValueError, match="optimizer must have the option capturable"):
        make(model, torch.optim.Adagrad(model.parameters()))
    with pytest.raises(ValueError, match="SGD with fused=True"):
        make(model, torch.optim.SGD(model.parameters()))
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(ValueError, match="fused=True"):
        make(model, torch.optim.AdamW(model.parameters()), scaler=scaler)
    make(model, torch.optim.AdamW(model.parameters()), scaler=torch.amp.GradScaler("cpu", enabled=False))


def test_bad_calls():
    model = network()
    step, _ = make(model, adamw(model), warmup=1)
    with pytest.raises(TypeError, match="targets must be a Tensor, got list"):
        step(batch(0)[0], [1])
    step(*batch(0))
    step.optimizer.param_groups[0]["weight_decay"] = 0.5
    with pytest.raises(ValueError, match=r"only lr may change.* weight_decay 0.01 -> 0.5"):
        step(*batch(0))
    model.eval()
    with pytest.raises(ValueError, match=r"model.train\(\)"):
        step(*batch(0))
    with pytest.raises(ValueError, match=r"model.eval\(\)"):
        cuda_graph(model.train(), recorder=FakeRecorder())(batch(0)[0])


def test_gradient_scaler():
    """Scaled losses, a scale that grows, and a step that is skipped because of an infinity, inside the graph."""
    model = network()
    peer = copy.deepcopy(model)
    optimizer, eager = adamw(model), adamw(peer)
    scaler, other = (torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2) for _ in range(2))
    step, _ = make(model, optimizer, warmup=1, scaler=scaler)
    for number in range(6):
        images, targets = batch(number)
        if number == 4:
            images[0, 0, 0, 0] = float("inf")
        step(images, targets)
        eager.zero_grad()
        other.scale(F.cross_entropy(peer(images), targets)).backward()
        other.step(eager)
        other.update()
        assert scaler.get_scale() == other.get_scale()
        assert all(torch.isfinite(p).all() for p in model.parameters())
        for p, q in zip(model.parameters(), peer.parameters(), strict=True):
            torch.testing.assert_close(p, q)
