"""CUDA graphs that `fuse` makes of a network's calls, with a recorder that replays PyTorch's operators in the place of
a GPU."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import explain, fuse, graphs, inference, refresh
from mvit3_kernels.inference import graphed
from tests.replay import FakeRecorder

SIDE = 64


@pytest.fixture
def recorder(monkeypatch) -> FakeRecorder:
    """Stands for CUDA graphs, on a machine where no program serves a call, as none does on a GPU."""
    made = FakeRecorder()
    monkeypatch.setattr(graphs, "_Cuda", lambda errors: made)
    monkeypatch.setattr(inference, "_call_why_not", lambda x: "x is not on the CPU")
    return made


def network(name: str = "mobilevitv3_xxs", **options) -> nn.Module:
    torch.manual_seed(0)
    return mvit3_kernels.create_model(name, **{"num_classes": 5, **options}).eval()


def images(number: int = 0, batch: int = 1, side: int = SIDE) -> torch.Tensor:
    return torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(number))


def served(model: nn.Module, peer: nn.Module, recorder: FakeRecorder, x: torch.Tensor | None = None) -> int:
    """Calls a fused model and the same network as it was written: they must agree. Returns the replays of the call."""
    before, x = recorder.replays, images(recorder.replays) if x is None else x
    with torch.no_grad():
        found, expected = model(x), peer(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return recorder.replays - before


def pair(recorder: FakeRecorder, **options) -> tuple[nn.Module, nn.Module]:
    """A fused network that has a graph of images(), and its peer."""
    peer = network(**options)
    model = fuse(copy.deepcopy(peer))
    assert [served(model, peer, recorder) for _ in range(3)] == [0, 0, 1]
    return model, peer


def reason(model: nn.Module, x: torch.Tensor) -> str | None:
    """Why the next call comes from no graph."""
    return model._fused.graphed.why_not(model, super(type(model), model).forward, x, model._fused)


def test_the_third_call_of_a_kind_is_a_graph(recorder):
    model, peer = pair(recorder)
    assert recorder.records == 1 and served(model, peer, recorder) == 1
    with torch.inference_mode():
        first = model(images(1))
        kept = first.clone()
        model(images(2))
    assert torch.equal(first, kept), "a later call wrote to the outputs of an earlier one"
    assert [served(model, peer, recorder, images(3, batch=2)) for _ in range(3)] == [0, 0, 1]
    assert [served(model, peer, recorder, images(4)) for _ in range(2)] == [1, 1] and recorder.records == 2


def test_weights_that_are_written_are_read(recorder):
    model, peer = pair(recorder)
    with torch.no_grad():
        for p, other in zip(model.parameters(), peer.parameters(), strict=True):
            other.copy_(p.mul_(1.1))
    model.layer_1[0].block.exp_1x1.block.conv.weight.data[0] = 2.0
    peer.layer_1[0].block.exp_1x1.block.conv.weight.data[0] = 2.0
    assert served(model, peer, recorder) == 1
    other = network(num_classes=5).state_dict()
    for each in (model, peer):
        each.load_state_dict({name: 0.9 * t if t.is_floating_point() else t for name, t in other.items()})
    assert served(model, peer, recorder) == 1 and recorder.records == 1


def replace_parameter(model: nn.Module) -> None:
    layer = model.classifier[-1]
    layer.weight = nn.Parameter(2 * layer.weight.detach())


def replace_data(model: nn.Module) -> None:
    model.classifier[-1].weight.data = 3 * model.classifier[-1].weight.data


def replace_module(model: nn.Module) -> None:
    model.reset_classifier(7)
    torch.manual_seed(3)
    nn.init.normal_(model.classifier[-1].weight)


@pytest.mark.parametrize("change", [replace_parameter, replace_data, replace_module], ids=lambda f: f.__name__)
def test_what_is_replaced_is_recorded_anew(recorder, change):
    model, peer = pair(recorder)
    for each in (model, peer):
        change(each)
    assert [served(model, peer, recorder) for _ in range(3)] == [0, 1, 1] and recorder.records == 2


def test_a_network_that_changes_each_time_is_never_recorded(recorder):
    model, peer = pair(recorder)
    for _ in range(4):
        for each in (model, peer):
            replace_data(each)
        assert served(model, peer, recorder) == 0
    assert recorder.records == 1


def test_a_hook_is_called(recorder):
    model, peer = pair(recorder)
    calls = []
    handle = model.layer_2.register_forward_hook(lambda *_: calls.append(1))
    assert served(model, peer, recorder) == 0 and calls == [1]
    assert "layer_2 has a hook" in reason(model, images())
    handle.remove()
    assert [served(model, peer, recorder) for _ in range(2)] == [0, 1]


def test_training_mode_and_gradients_run_as_they_are(recorder):
    model, peer = pair(recorder)
    assert "weights require grad" in reason(model, images())
    assert model(images()).requires_grad and recorder.replays == 1
    with torch.no_grad():
        assert reason(model, images()) is None
        assert "training mode" in reason(model.train(), images())
        before = recorder.replays
        model(images(1, batch=2)), peer.train()(images(1, batch=2))
        assert recorder.replays == before
    norms = [each.conv_1.block.norm.running_mean for each in (model, peer)]
    torch.testing.assert_close(*norms)
    model.requires_grad_(False).eval()
    assert reason(model, images()).startswith("no CUDA graph yet")
    x = images().requires_grad_()
    assert reason(model, x) == "no CUDA graph: x requires grad"
    assert model(x).requires_grad


def test_each_way_of_a_call_has_a_graph_of_its_own(recorder):
    """A dtype of autocast, a backend: the first call of each is not from another's graph."""
    model, peer = pair(recorder)
    for context in (lambda: torch.autocast("cpu", torch.bfloat16), lambda: mvit3_kernels.backend("reference")):
        with context(), torch.no_grad():
            before = recorder.replays
            found = [model(images()) for _ in range(3)]
            assert recorder.replays - before == 1 and found[0].dtype == found[2].dtype
            torch.testing.assert_close(found[2], peer(images()), rtol=2e-2, atol=2e-2)
    assert recorder.records == 3


def test_casts_of_weights_are_in_the_graph(recorder):
    """Not in autocast's cache, which ends with the context."""
    model, peer = pair(recorder)
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            model(images())
    with torch.no_grad():
        for each in (model, peer):
            each.classifier[-1].weight.mul_(-2)
        with torch.autocast("cpu", torch.bfloat16):
            before = recorder.replays
            torch.testing.assert_close(model(images()), peer(images()), rtol=2e-2, atol=2e-2)
    assert recorder.replays == before + 1


def test_graphs_are_bounded(recorder, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_GRAPHS", 2)
    model, peer = pair(recorder)
    for side in (96, 128):
        assert [served(model, peer, recorder, images(side, side=side)) for _ in range(3)] == [0, 0, 1]
    held = [kind for kind in model._fused.graphed._kinds.values() if kind.replay is not None]
    assert len(held) == 2
    assert served(model, peer, recorder) == 1 and recorder.records == 4  # the first one's was dropped, and made again


def test_images_that_keep_a_gpu_busy_run_as_they_are(recorder, monkeypatch):
    monkeypatch.setattr(graphed, "MOST_VALUES", 3 * SIDE * SIDE)
    model, peer = pair(recorder)
    x = images(batch=2)
    assert [served(model, peer, recorder, x) for _ in range(4)] == [0] * 4
    with torch.no_grad():
        assert "launches are not what takes time" in reason(model, x)


class Refusing(FakeRecorder):
    def record(self, device, run):
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_recorded_runs_as_it_is(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "_Cuda", lambda errors: Refusing())
    peer = network()
    model = fuse(copy.deepcopy(peer))
    assert [served(model, peer, recorder) for _ in range(4)] == [0] * 4
    with torch.no_grad():
        assert "cannot be recorded: operation not permitted" in reason(model, images())


def test_another_stream_runs_as_it_is(recorder, monkeypatch):
    model, peer = pair(recorder)
    monkeypatch.setattr(graphed, "_stream", lambda device: 7)
    assert served(model, peer, recorder) == 0
    with torch.no_grad():
        assert "belong to another stream" in reason(model, images())


def test_a_callers_graph_and_an_inner_network_have_none(recorder):
    peer = network("deeplabv3_mobilevitv3_xxs")
    model = fuse(copy.deepcopy(peer))
    assert [served(model, peer, recorder) for _ in range(3)] == [0, 0, 1] and recorder.records == 1
    assert not model.encoder._fused.graphed._kinds
    model = fuse(network())
    run = graphs.cuda_graph(model, recorder=FakeRecorder())
    for _ in range(5):
        run(images())
    assert not model._fused.graphed._kinds


def test_without_a_gpu_nothing_is_said_and_nothing_is_kept(monkeypatch):
    monkeypatch.setattr(inference, "_call_why_not", lambda x: "x is not on the CPU")
    model = fuse(network())
    with torch.no_grad():
        for _ in range(3):
            model(images())
    assert not model._fused.graphed._kinds


def test_switched_off(recorder):
    peer = network()
    model = fuse(copy.deepcopy(peer), graphs=False)
    assert [served(model, peer, recorder) for _ in range(4)] == [0] * 4
    assert [served(fuse(model), peer, recorder) for _ in range(3)] == [0, 0, 1]
    assert pickle.loads(pickle.dumps(fuse(model, graphs=False)))._fused.makes_graphs is False


def test_copies_and_refresh_begin_anew(recorder):
    model, peer = pair(recorder)
    refresh(model)
    assert [served(model, peer, recorder) for _ in range(2)] == [0, 1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert [served(other, peer, recorder) for _ in range(3)] == [0, 0, 1]


def test_explain_says_that_a_graph_serves(recorder, monkeypatch):
    """The rows are of a call that runs as it would without."""
    monkeypatch.setattr(inference, "_on_cpu", lambda x: False)
    model, _ = pair(recorder)
    with torch.no_grad():
        rows = list(explain(model, images()))
        other = list(explain(model, images(batch=2)))
    assert (rows[0].ran, rows[0].reason) == ("CUDA graph", "") and any(row.kind == "op" for row in rows)
    assert other[0].ran == "ordinary path" and "no CUDA graph yet" in other[0].reason


def test_threads_get_their_own_results(recorder):
    model, peer = pair(recorder)
    inputs = [images(number) for number in range(4)]
    found: dict[int, list[torch.Tensor]] = {number: [] for number in range(4)}

    def work(number: int) -> None:
        with torch.no_grad():
            for _ in range(4):
                found[number].append(model(inputs[number]))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.no_grad():
        for number, results in found.items():
            for result in results:
                torch.testing.assert_close(result, peer(inputs[number]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("options", [{"num_classes": 5}, {"features_only": True}], ids=str)
def test_a_network_of_timm_has_graphs(recorder, options):
    """Of its features; the head is called as the module that it is, and may be hooked."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    peer = timm.create_model("mobilevit_xxs", **options).eval()
    model = fuse(copy.deepcopy(peer))
    assert [served(model, peer, recorder) for _ in range(3)] == [0, 0, 1]
    if "num_classes" in options:
        seen: list[torch.Size] = []
        model.head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
        assert [served(model, peer, recorder) for _ in range(2)] == [0, 1] and len(seen) == 2
        with torch.no_grad():
            before = recorder.replays
            torch.testing.assert_close(model.forward_features(images(9)), peer.forward_features(images(9)))
        assert recorder.replays == before + 1
    model.stem.register_forward_hook(lambda *_: None)
    assert served(model, peer, recorder) == 0
