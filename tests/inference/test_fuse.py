"""`fuse` and `unfuse` for inference: the compiled program against the network's own code."""

from __future__ import annotations

import copy
import io
import threading

import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import _native, create_model, fuse, list_models, unfuse
from mvit3_kernels.inference import FusedMobileViT
from mvit3_kernels.models.network import MobileViT
from tests.bounds import assert_bound, each

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")

FEW = ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050")


def network(name: str, seed: int = 0, **options) -> nn.Module:
    """A network in evaluation whose norms have statistics of their own."""
    torch.manual_seed(seed)
    model = create_model(name, **options).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def images(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def check(model: nn.Module, x: torch.Tensor) -> None:
    """The fused network errs at most twice as much as the reference, both against float64."""
    outputs = lambda y: y if isinstance(y, list) else [y]  # noqa: E731
    exact = outputs(copy.deepcopy(unfuse(model)).double()(x.double()))
    with mvit3_kernels.backend("reference"):
        reference = outputs(model(x))
    assert type(model) is MobileViT
    found = outputs(fuse(model)(x))
    assert model._fused.why_not(model, x) is None
    assert all(t.dtype == torch.float32 for t in found)
    named = ({str(i): t for i, t in enumerate(of)} for of in (found, reference, exact))
    assert_bound(*named, 1e-6, group=each, least=0)


@pytest.mark.parametrize("name", list_models())
def test_every_network(name):
    check(network(name), images(2, 3, 64, 64))


@pytest.mark.parametrize("shape", [(1, 3, 96, 160), (5, 3, 72, 104), (9, 3, 33, 65), (1, 3, 256, 256), (2, 3, 1, 31)])
@pytest.mark.parametrize("name", FEW)
def test_sizes(name, shape):
    check(network(name), images(*shape))


@pytest.mark.parametrize("name", FEW)
@pytest.mark.parametrize(
    "options", [{"features_only": True}, {"features_only": True, "out_indices": (1, 3), "output_stride": 16}]
)
def test_feature_maps(name, options):
    check(network(name, **options), images(3, 3, 64, 96))


def test_options():
    for options in ({"num_classes": 0}, {"num_classes": 7}, {"in_chans": 1}):
        check(network("mobilevitv3_xxs", **options), images(2, options.get("in_chans", 3), 64, 64))


@torch.no_grad()
def test_memory_formats_and_strides():
    model, x = fuse(network("mobilevitv3_xxs")), images(3, 3, 64, 64)
    want = model(x)
    wide = torch.full((6, 4, 64, 130), float("nan"))
    wide[::2, 1:, :, ::2][..., :64] = x
    strided = wide[::2, 1:, :, ::2][..., :64]
    for other in (x.contiguous(memory_format=torch.channels_last), strided, x[:1].expand(3, -1, -1, -1)):
        got = model(other)
        assert torch.allclose(got, want if other.stride(0) else want[:1].expand_as(got), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_no_images():
    assert fuse(network("mobilevitv3_xxs"))(images(0, 3, 64, 64)).shape == (0, 1000)


@torch.no_grad()
def test_changed_weights_are_packed_again():
    model, x = network("mobilevitv3_xxs"), images(1, 3, 64, 64)
    fuse(model)
    before = model(x)
    other = network("mobilevitv3_xxs", seed=5)
    model.load_state_dict(other.state_dict())
    assert torch.allclose(model(x), other(x), rtol=1e-4, atol=1e-4) and not torch.allclose(model(x), before)
    model.classifier.fc.bias.data = model.classifier.fc.bias.data + 1  # replaces the memory, which counts no version
    assert torch.allclose(model(x), other(x) + 1, rtol=1e-4, atol=1e-4)
    model.reset_classifier(5)
    assert model(x).shape == (1, 5)


@torch.no_grad()
def test_the_program_is_kept():
    model, x = fuse(network("mobilevitv3_xxs")), images(1, 3, 64, 64)
    model(x)
    program = model._fused._program
    assert torch.equal(model(x), model(x)) and model._fused._program is program


def test_unfuse_and_state():
    model = network("mobilevitv3_xxs")
    keys = list(model.state_dict())
    assert fuse(model) is model and type(model) is FusedMobileViT
    assert fuse(model) is model and list(model.state_dict()) == keys
    assert unfuse(model) is model and type(model) is MobileViT
    assert unfuse(model) is model


def test_inside_another_module():
    model = nn.Sequential(nn.Identity(), network("mobilevitv3_xxs"))
    fuse(model)
    assert type(model[1]) is FusedMobileViT
    unfuse(model)
    assert type(model[1]) is MobileViT


@torch.no_grad()
def test_copy_and_pickle():
    model, x = fuse(network("mobilevitv3_xxs")), images(1, 3, 64, 64)
    want = model(x)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), want)
        assert other._fused._program is not model._fused._program
        other.classifier.fc.bias.add_(1)
        assert torch.equal(model(x), want)


def test_calls_that_the_program_cannot_serve():
    model, x = fuse(network("mobilevitv3_xxs")), images(2, 3, 64, 64)

    def why_not(x: torch.Tensor) -> str | None:
        return model._fused.why_not(model, x)

    assert "weights of the network require grad" in why_not(x)
    with torch.no_grad():
        assert why_not(x) is None
        assert "training mode" in model.train()._fused.why_not(model, x)
        assert model.eval()._fused.why_not(model, x) is None
        with mvit3_kernels.backend("cpu"):
            assert why_not(x) is None
    assert "x requires grad" in why_not(x.clone().requires_grad_())
    assert "float64" in why_not(x.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in why_not(x)
        assert model(x).dtype == torch.bfloat16
    with mvit3_kernels.backend("reference"):
        assert "forced" in why_not(x)
    given = x.clone().requires_grad_()
    model(given).sum().backward()
    assert given.grad.isfinite().all()
    assert model.double()(x.double()).dtype == torch.float64
    model.float().train()(x).sum().backward()
    assert model.conv_1.block.conv.weight.grad.isfinite().all()


def test_training_between_calls():
    model, x = fuse(network("mobilevitv3_xxs", drop_rate=0.0, proj_drop_rate=0.0)), images(4, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(2):
        model.train()
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        model.eval()
        with torch.no_grad():
            got = model(x)
            unfuse(model)
            assert torch.allclose(got, model(x), rtol=1e-4, atol=1e-4)
            fuse(model)


@torch.no_grad()
def test_threads_do_not_disturb_each_other():
    models = [fuse(network(name, seed)) for seed, name in enumerate(FEW)]
    batches = [images(1 + i, 3, 64 + 32 * i, 64) for i in range(3)]
    want = [[model(x) for x in batches] for model in models]
    wrong: list[str] = []

    def work(k: int) -> None:
        for _ in range(5):
            for i, x in enumerate(batches):
                with torch.no_grad():
                    if not torch.allclose(models[k % len(models)](x), want[k % len(models)][i], rtol=1e-5, atol=1e-5):
                        wrong.append(f"{k} {i}")

    workers = [threading.Thread(target=work, args=(k,)) for k in range(2 * len(models))]
    [w.start() for w in workers], [w.join() for w in workers]
    assert not wrong


@torch.no_grad()
def test_number_of_threads():
    model, x = fuse(network("mobilevitv3_050")), images(3, 3, 64, 96)
    want, threads = model(x), torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            assert torch.allclose(model(x), want, rtol=1e-4, atol=1e-5)
    finally:
        torch.set_num_threads(threads)


def test_compile_and_export_see_the_network(compiler="aot_eager"):
    model, x = fuse(network("mobilevitv3_xxs")), images(1, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        assert torch.allclose(torch.compile(model, backend=compiler)(x), want, rtol=1e-4, atol=1e-4)
        program = torch.export.export(model, (x,))
        assert torch.allclose(program.module()(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "error, call, words",
    [
        (ValueError, lambda: fuse(nn.Linear(2, 2)), "model must be or contain a network .* got Linear"),
        (
            ValueError,
            lambda: fuse(network("mobilevitv3_xxs"), mode="both"),
            "mode must be one of inference, training, got 'both'",
        ),
        (
            RuntimeError,
            lambda: fuse(network("mobilevitv3_xxs"))(images(1, 4, 64, 64)),
            r"x must be images \(B, 3, H, W\)",
        ),
    ],
)
def test_errors(error, call, words):
    with torch.no_grad(), pytest.raises(error, match=words):
        call()
