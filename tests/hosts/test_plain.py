"""Convolutions, batch norms and activations in a row in an nn.Sequential of anyone's model."""

from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from mvit3_kernels import _native, create_model, explain, fuse, fuse_report, unfuse
from mvit3_kernels.hosts.plain import FusedSequential

from .compare import distances, flat, images, pickled, prepare, results

EXACT = 1e-12


def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1, **options) -> list[nn.Module]:
    """A convolution without bias and its norm."""
    padding = options.pop("padding", (kernel - 1) // 2)
    options = {"bias": False, **options}
    return [nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, **options), nn.BatchNorm2d(outputs)]


class Halves(nn.Module):
    """A module of someone's own, which views its input."""

    def forward(self, x: Tensor) -> Tensor:
        return x.view(x.shape[0], 2, -1, *x.shape[2:]).sum(1)


class Keeps(Halves):
    def forward(self, x: Tensor) -> Tensor:
        self.seen = x
        return super().forward(x)


def stem() -> nn.Sequential:
    return nn.Sequential(
        *conv(3, 8, 3, 2),
        nn.ReLU(inplace=True),
        *conv(8, 8, 3, groups=8),
        nn.SiLU(),
        *conv(8, 6, 1),
        *conv(6, 6, 1, bias=True),
        nn.ReLU6(),
        Halves(),
        nn.Conv2d(3, 4, 1),
        nn.ReLU(),
        nn.Conv2d(4, 4, 3),
        nn.ReLU(),
        nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 5, (3, 1)), norm=nn.BatchNorm2d(5), act=nn.SiLU())),
    )


class Model(nn.Module):
    """Sequentials of every kind between code of its own; the last is not one of maps alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = stem()
        self.shortcut = nn.Sequential(*conv(3, 5, 1, 2, padding=0))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(5, 4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.stem(x)
        return self.head(y + self.shortcut(x)[..., : y.shape[2], : y.shape[3]])


def model() -> Model:
    torch.manual_seed(0)
    return prepare(Model())


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_exact(training, layout):
    found = distances(model().to(memory_format=layout), images(3, 3, 21, 17).to(memory_format=layout), training)
    assert all(distance <= EXACT for distance in found.values()), found


def test_what_becomes_of_each():
    fused, host = fuse(model(), "training"), model()
    report = {row.name: row for row in fuse_report(fused)}
    assert report.keys() == {"stem", "stem.16", "shortcut"}
    assert report["stem"].became == report["stem.16"].became == "FusedSequential"
    assert report["shortcut"].became == "" and "a norm without activation is as fast" in report["shortcut"].reason
    kinds = [[type(m).__name__ for m in s.modules] for s in fused.stem.describe().stretches()]
    assert [len(row) for row in kinds] == [10, 2] and kinds[1] == ["Conv2d", "ReLU"]
    assert [id(p) for p in fused.parameters()] == [id(p) for p in unfuse(fused).parameters()]
    assert [type(m) for m in fused.modules()] == [type(m) for m in host.modules()]
    assert [vars(m).keys() for m in fused.modules()] == [vars(m).keys() for m in host.modules()]
    assert "fuse has not been called" in fuse_report(fused).rows[0].reason


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_results_lie_in_memory_as_the_hosts_do(layout, weights):
    for shape in ((2, 3, 9, 7), (2, 3, 1, 1), (1, 3, 1, 5)):
        rows = (*conv(3, 6), nn.ReLU(), *conv(6, 6, 1), *conv(6, 4, 1))
        host = nn.Sequential(*rows).double().eval().to(memory_format=weights)
        for x in (images(*shape).to(memory_format=layout), images(*shape[:3], 2 * shape[3])[..., ::2]):
            got, want = fuse(copy.deepcopy(host))(x), host(x)
            for layout_ in (torch.contiguous_format, torch.channels_last):
                assert got.is_contiguous(memory_format=layout_) == want.is_contiguous(memory_format=layout_)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_unusual_sequences(training):
    shared = nn.BatchNorm2d(3)
    cases = {
        "a shared norm": nn.Sequential(nn.Conv2d(3, 3, 1), shared, nn.ReLU(), nn.Conv2d(3, 3, 3), shared, nn.SiLU()),
        "no statistics": nn.Sequential(*conv(3, 4, 1)[:1], nn.BatchNorm2d(4, track_running_stats=False)),
        "cumulative": nn.Sequential(*conv(3, 4, 1)[:1], nn.BatchNorm2d(4, momentum=None), *conv(4, 4, 1)),
        "frozen": nn.Sequential(*conv(3, 4, 1), nn.ReLU(), *conv(4, 4, 1)),
        "odd paddings": nn.Sequential(*conv(3, 4, 5, padding=(1, 0), dilation=2), nn.ReLU(), nn.Conv2d(4, 4, 2)),
        "in place": nn.Sequential(
            *conv(3, 4, 1), nn.ReLU6(inplace=True), *conv(4, 4, 3, groups=4), nn.Hardtanh(inplace=True)
        ),
        "groups": nn.Sequential(*conv(3, 6, 3, groups=3), nn.ReLU(), *conv(6, 6, 1, groups=2), nn.SiLU()),
    }
    x = images(2, 3, 9, 12).to(memory_format=torch.channels_last)
    for name, case in cases.items():
        found = distances(_frozen(prepare(case)) if name == "frozen" else prepare(case), x, training)
        assert all(distance <= EXACT for distance in found.values()), (name, found)


class _AlwaysEvaluates(nn.BatchNorm2d):
    def train(self, mode: bool = True) -> nn.Module:
        return super().train(False)


def _frozen(sequence: nn.Sequential) -> nn.Sequential:
    """Parameters that are not trained, and a norm of another class, which keeps its flag."""
    sequence[0].requires_grad_(False)
    sequence[1].__class__ = _AlwaysEvaluates
    return sequence


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_results_may_be_written_to(layout, kernel):
    """As code with `y += x` behind it does."""

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branch = nn.Sequential(*conv(3, 3, kernel), nn.SiLU(), *conv(3, 4, 1), *conv(4, 3, 1))

        def forward(self, x: Tensor) -> Tensor:
            y = self.branch(x)
            y += x
            return y.mul_(2)

    host, x = prepare(Residual()), images(2, 3, 9, 7).to(memory_format=layout)
    found = distances(host, x, training=True)
    assert all(distance <= EXACT for distance in found.values()), found
    found = distances(host.float(), x.float(), training=True)  # the kernels
    assert all(distance <= 1e-5 for distance in found.values()), found


def test_inputs_that_are_no_maps():
    sequence = fuse(prepare(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(0))), "training")
    x = images(2, 3, 4, 5)
    assert torch.allclose(sequence(x[0]), sequence(x)[: 4 * 4 * 5], rtol=EXACT)  # one image, without a batch
    unflatten = prepare(nn.Sequential(nn.Unflatten(1, (3, 2, 2)), *conv(3, 4, 1), nn.ReLU()))
    found = distances(unflatten, images(4, 12), training=True)
    assert all(distance <= EXACT for distance in found.values()), found
    assert fuse(nn.Sequential(*conv(3, 4, 1)).eval())(input=torch.zeros(0, 3, 2, 2)).shape == (0, 4, 2, 2)


def test_an_empty_batch_counts_and_changes_no_average():
    host = prepare(nn.Sequential(*conv(3, 4, 3)[:1], nn.BatchNorm2d(4, momentum=None), nn.ReLU())).train()
    host.to(memory_format=torch.channels_last)
    fused, x = fuse(copy.deepcopy(host), "training"), images(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for part in (x[:0], x, x[:0], 2 * x):
        host(part), fused(part)
        assert fused[1].num_batches_tracked == host[1].num_batches_tracked
        assert torch.allclose(flat(fused.buffers()), flat(host.buffers()), rtol=EXACT)
    assert all(explain(fused, part).rows[0].ran == "fused" for part in (x, x[:0]))


LEFT = {
    "none": (lambda: [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Linear(5, 5)], "2 |1 Conv2d"),
    "norm": (lambda: conv(3, 4, 3), "a norm without activation is as fast as it is"),
    "reflect": (lambda: [*conv(3, 4, 1, padding_mode="reflect"), nn.ReLU()], "in mode 'reflect'"),
    "affine": (lambda: [nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.ReLU()], "no weight or no bias"),
    "subclass": (lambda: [nn.Conv2d(3, 4, 1), _AlwaysEvaluates(4), nn.ReLU()], "1 Conv2d"),
    "apart": (lambda: [nn.Conv2d(3, 4, 1), nn.Dropout(), nn.BatchNorm2d(4)], "1 Conv2d"),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_is_left(case):
    make, reason = LEFT[case]
    sequence = nn.Sequential(*make())
    with pytest.raises(ValueError, match=reason):
        fuse(sequence)
    assert type(sequence) is nn.Sequential
    rows = fuse_report(sequence).left()
    assert [row.name for row in rows] == ([""] if "Conv2d" not in reason else [])


class Mine(nn.Sequential):
    pass


def test_subclasses_are_left():
    with pytest.raises(ValueError, match="got Mine without one"):
        fuse(Mine(*conv(3, 4, 1), nn.ReLU()))


@pytest.mark.parametrize("mode", ["training", "inference"])
def test_our_own_networks_and_blocks_stay_as_they_are(mode):
    for name in ("mobilevit_xxs", "mobilevitv3_050", "ssdlite_mobilevitv2_050"):
        host = create_model(name)
        fused = fuse(copy.deepcopy(host), mode)
        kinds = [(type(a), type(b)) for a, b in zip(host.modules(), fused.modules(), strict=True)]
        assert not any(b is FusedSequential for _, b in kinds)
        assert mode == "inference" or all(a is b for a, b in kinds)
        assert not any(row.kind == "Sequential" for row in (*fuse_report(host), *fuse_report(fused)))


def test_every_hook_fires():
    host, x = model().eval(), images(1, 3, 21, 17)
    fused, counts = fuse(copy.deepcopy(host), "training"), {"host": 0, "fused": 0}
    for name, m in (("host", host), ("fused", fused)):
        for module in m.modules():
            module.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
        assert m(x).shape == (1, 4)
    assert counts["fused"] == counts["host"] == len(list(host.modules()))


CHANGES = {
    "hook": (lambda s: s[1].register_forward_hook(lambda module, inputs, output: 2 * output), "1 has a hook"),
    "pruned": (lambda s: prune.l1_unstructured(s[3], "weight", 0.5), "3 has a hook"),
    "forward": (lambda s: setattr(s[2], "forward", lambda x: 2 * x), "2 has a forward of its own"),
    "own": (lambda s: setattr(s, "forward", lambda x: 2 * x), None),
    "padding": (lambda s: setattr(s[0], "padding_mode", "circular"), None),
    "other": (lambda s: s[10].register_forward_hook(lambda module, inputs, output: 2 * output), None),
    "replaced": (lambda s: s.__setitem__(5, nn.GELU()), None),
    "removed": (lambda s: s.__delitem__(5), None),
    "added": (lambda s: s.append(nn.Tanh()), None),
    "frozen": (lambda s: s[4].eval(), None),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_take_effect(change):
    make, reason = CHANGES[change]
    host, x = model().train().stem, images(2, 3, 21, 17)
    fused = fuse(copy.deepcopy(host), "training")
    before = fused(x)
    for sequence in (host, fused):
        if sequence is host:
            host(x)
        make(sequence)
    want, got = host(x), fused(x)
    assert got.shape == want.shape and (got - want).norm() <= EXACT * want.norm()
    assert before.shape != got.shape or (got - before).norm() > 1e-6 * want.norm()
    rows = [row for row in explain(fused, x) if row.kind == "block" and row.what == "FusedSequential"]
    reasons = [row.reason for row in rows if "PyTorch's modules are as fast" not in row.reason]
    assert all(reason in found for found in reasons) if reason else not any(reasons)
    assert type(unfuse(fused)) is nn.Sequential


def test_layouts_that_gain_nothing_run_the_modules():
    fused, x = fuse(model().eval(), "training").stem, images(2, 3, 21, 17)
    for part, gains in ((fused[:3], False), (fused[:6], False), (fused[:9], True)):
        for layout in (torch.contiguous_format, torch.channels_last):
            reasons = explain(part, x.to(memory_format=layout)).reasons()
            left = any(reason.startswith("PyTorch's modules are as fast") for reason in reasons)
            assert left == (layout is torch.contiguous_format and not gains)


@pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")
@torch.no_grad()
def test_a_program_has_steps_for_them():
    host = timm.create_model("mobilevit_xxs", num_classes=5)
    host.final_conv = nn.Sequential(*conv(80, 16, 3), nn.SiLU(), *conv(16, 320, 1), nn.ReLU())
    host, x = prepare(host).eval(), images(1, 3, 64, 64)
    want = host(x)
    fused = fuse(host.float())
    assert torch.allclose(fused(x.float()).double(), want, rtol=1e-4, atol=1e-4 * want.abs().max())
    assert type(fused.final_conv) is FusedSequential and explain(fused, x.float()).rows[0].ran == "fused"


def test_modules_between_keep_no_block_from_its_answer():
    """A module that writes to itself at each call is not watched."""
    fused, x = fuse(model(), "training"), images(2, 3, 21, 17)
    fused.stem[11].__class__ = Keeps
    fused(x)
    plan = fused.stem.plan()
    fused(x)
    assert fused.stem.plan() is plan


@torch.no_grad()
def test_slices_copies_and_pickles():
    fused, x = fuse(model().eval(), "training"), images(1, 3, 21, 17)
    want = fused(x)
    for other in (copy.deepcopy(fused), pickled(fused)):
        assert type(other.stem) is FusedSequential and other(x).equal(want)
    for part, y in ((fused.stem[:3], x), (fused.stem[12:], images(1, 3, 9, 9))):
        assert torch.allclose(part(y), unfuse(copy.deepcopy(part))(y), rtol=EXACT)


def test_checkpoints_count_every_batch_once_more_as_pytorch_does():
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem = stem()

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.stem, x, use_reentrant=False)

    found = distances(prepare(Checkpointed()), images(2, 3, 21, 17), training=True)
    assert all(distance <= EXACT for distance in found.values()), found


def test_exporters_and_compilers():
    host, x = model().eval(), images(2, 3, 21, 17)
    want, fused = host(x), fuse(copy.deepcopy(host), "training")
    batch = {0: torch.export.Dim("batch")}
    exported = torch.export.export(fused, (x,), dynamic_shapes=(batch,)).module()
    traced = torch.jit.trace(fused, x)
    compiled = torch.compile(fused, backend="eager", fullgraph=True)
    for run in (exported, traced, compiled):
        assert torch.allclose(run(x), want, rtol=EXACT, atol=EXACT)
    assert torch.allclose(exported(x[:1]), want[:1], rtol=EXACT, atol=EXACT)
    part = fuse(copy.deepcopy(host.stem[:11]))
    for of in (torch.fx.symbolic_trace, torch.jit.script):
        assert type(part) is FusedSequential
        assert torch.allclose(of(part)(x), host.stem[:11](x), rtol=EXACT, atol=EXACT)


def test_float32_is_as_near_as_the_host():
    host, x = model(), images(4, 3, 41, 33)
    exact = results(copy.deepcopy(host), x, training=True)
    host = host.float()
    fused = fuse(copy.deepcopy(host), "training")
    theirs, ours = (results(m, x.float(), training=True) for m in (host, fused))
    for name, t in exact.items():
        error, bound = ((flat(found[name]) - t).norm() / t.norm() for found in (ours, theirs))
        assert error <= 2 * bound + 1e-6, name


def test_a_trace_has_the_parameters_in_their_order():
    """What a guard looks at is nothing that the network computes."""
    host = nn.Sequential(nn.Sequential(*conv(3, 8, 3, bias=True), nn.SiLU()), nn.Flatten())
    fused = fuse(copy.deepcopy(host), mode="training")
    graphs = [torch.fx.symbolic_trace(model) for model in (host, fused)]
    want, got = ([name for name, _ in graph.named_parameters()] for graph in graphs)
    assert got == want
    want, got = ([str(node) for node in graph.graph.nodes] for graph in graphs)
    assert got == want
