from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

import mvit3_kernels
from mvit3_kernels import create_model, list_models
from tests.networks import SAME_OPERATORS, structure

SMALL = ("mobilevit_xxs", "mobilevitv2_050", "mobilevitv3_xxs", "mobilevitv3_050")


def test_list_models_filters():
    assert len(list_models()) == 20
    assert list_models("mobilevitv3_*_fast") == ["mobilevitv3_s_fast", "mobilevitv3_xs_fast", "mobilevitv3_xxs_fast"]


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "mobilevitv3_sx"}, "got 'mobilevitv3_sx'; the nearest are .*mobilevitv3_s"),
        ({"num_classes": -1}, "num_classes must be at least 0"),
        ({"in_chans": 0}, "in_chans at least 1"),
        ({"drop_rate": 1.0}, "drop_rate must be at least 0 and below 1, got 1.0"),
        ({"proj_drop_rate": -0.1}, "proj_drop_rate must be"),
        ({"output_stride": 4}, "output_stride must be 8, 16 or 32, got 4"),
        ({"out_indices": (0,)}, "out_indices needs features_only=True"),
        ({"features_only": True, "out_indices": (5,)}, "out_indices must name stages 0 to 4"),
        ({"features_only": True, "num_classes": 10}, "num_classes has no meaning"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_model(**{"name": "mobilevitv3_xxs", **options})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(32, 32), (57, 83), (96, 64)])
def test_any_image_size_and_layout(name, size):
    model = create_model(name, num_classes=7, in_chans=4).eval()
    x = torch.randn(2, 4, *size)
    with torch.no_grad():
        y = model(x)
        assert y.shape == (2, 7) and y.isfinite().all()
        assert torch.allclose(model(x.to(memory_format=torch.channels_last)), y, atol=1e-5)
        assert torch.allclose(model(x[:1]), y[:1], atol=1e-4)
        assert model(x[:0]).shape == (0, 7)


@pytest.mark.parametrize("name", SMALL)
def test_features_only(name):
    model = create_model(name, features_only=True, out_indices=(1, -1)).eval()
    maps = model(torch.randn(1, 3, 64, 128))
    assert (
        [m.shape[1] for m in maps]
        == model.feature_info.channels()
        == [model.feature_info.channels(1), model.feature_info.channels(4)]
    )
    assert (
        [(64 // m.shape[2], 128 // m.shape[3]) for m in maps]
        == [(r, r) for r in model.feature_info.reduction()]
        == [(4, 4), (32, 32)]
    )
    assert model.feature_info.module_name() == ["layer_2", "layer_5"]
    assert not any(key.startswith(("classifier", "conv_1x1_exp")) for key in model.state_dict())
    with pytest.raises(ValueError, match="features_only model has no classifier"):
        model.reset_classifier(10)


@pytest.mark.parametrize("name", SMALL)
def test_head(name):
    model = create_model(name, num_classes=5).eval().double()
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    features = model.forward_features(x)
    pooled = model.forward_head(features, pre_logits=True)
    assert features.shape[1] == model.num_features and torch.allclose(pooled, features.mean((2, 3)))
    assert torch.allclose(model(x), model.get_classifier()(pooled))
    keys = list(model.state_dict())
    model.reset_classifier(9)
    assert model(x).shape == (1, 9) and model.num_classes == 9 and list(model.state_dict()) == keys
    model.reset_classifier(0)
    assert torch.equal(model(x), pooled)
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -2"):
        model.reset_classifier(-2)


@pytest.mark.parametrize("name", SMALL)
def test_a_whole_model_can_be_saved_and_copied(name, tmp_path):
    model = create_model(name, num_classes=3).eval()
    torch.save(model, tmp_path / "model.pt")
    x = torch.randn(1, 3, 32, 32)
    want = model(x)
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(x), want)
    assert torch.equal(copy.deepcopy(model)(x), want)


def test_published_dropouts_and_overrides():
    def rates(model: nn.Module) -> set[float]:
        return {m.p for m in model.modules() if isinstance(m, nn.Dropout)}

    assert rates(create_model("mobilevitv3_s")) == {0.0, 0.1}
    assert rates(create_model("mobilevitv3_xxs")) == {0.0, 0.05, 0.1}
    assert rates(create_model("mobilevitv3_100")) == {0.0}
    model = create_model("mobilevitv3_100", drop_rate=0.3, proj_drop_rate=0.2, attn_drop_rate=0.4, ffn_drop_rate=0.6)
    assert rates(model) == {0.2, 0.3, 0.4, 0.6}
    assert list(model.state_dict()) == list(create_model("mobilevitv3_100").state_dict())
    x = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    first = copy.deepcopy(model).train()(x)
    torch.manual_seed(1)
    assert torch.equal(copy.deepcopy(model).train()(x), first)
    assert not torch.equal(copy.deepcopy(model).train()(x), first)


def test_initialisation_of_the_softmax_family():
    torch.manual_seed(0)
    model = create_model("mobilevitv3_s")
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            fan_out = m.weight.shape[0] * m.weight[0, 0].numel()
            assert m.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.2), name
        if isinstance(m, nn.Linear):
            assert m.weight.std().item() == pytest.approx(0.02, rel=0.05) and not m.bias.any(), name
    assert not any(b.any() for n, b in model.named_parameters() if n.endswith("bias"))


def test_initialisation_of_the_separable_family():
    torch.manual_seed(0)
    model = create_model("mobilevitv3_100")
    for name, m in model.named_modules():
        if isinstance(m, nn.Conv2d):
            bound = 1 / math.sqrt(m.weight[0].numel())
            assert 0.9 * bound < m.weight.abs().max() <= bound, name
            assert m.bias is None or m.bias.any(), name
    classifier = model.get_classifier()
    assert classifier.weight.abs().max() <= math.sqrt(6 / (512 + 1000)) and not classifier.bias.any()


@pytest.mark.parametrize("name", SMALL)
def test_low_precision(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert (model(x) - want).abs().max() < 0.1 * want.abs().max()
        half = copy.deepcopy(model).bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16 and (half - want).abs().max() < 0.1 * want.abs().max()


def test_autocast_training_keeps_parameter_gradients_in_float32():
    model = create_model("mobilevitv3_xxs", num_classes=4).train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 64, 64)).square().mean()
    loss.backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
def test_compile_fullgraph(name):
    torch.manual_seed(0)
    model = create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True)
        assert torch.allclose(compiled(x), want, rtol=0, atol=1e-5 * want.abs().max().item())
        with torch.compiler.set_stance("fail_on_recompile"):
            compiled(x)


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
def test_compiled_training_step_updates_what_eager_updates(name):
    torch.manual_seed(0)
    eager = create_model(name, drop_rate=0.0, proj_drop_rate=0.0).train().double()
    traced = copy.deepcopy(eager)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    eager(x).square().sum().backward()
    torch.compile(traced, fullgraph=True, backend="aot_eager")(x).square().sum().backward()
    for (key, p), q in zip(eager.named_parameters(), traced.parameters(), strict=True):
        assert torch.allclose(p.grad, q.grad, rtol=1e-9, atol=1e-9), key
    for (key, p), q in zip(eager.named_buffers(), traced.buffers(), strict=True):
        # the mean behind a normalised map is 0 but for rounding
        assert torch.allclose(p, q, rtol=1e-9, atol=1e-15), key


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050"])
def test_export_is_plain_aten(name):
    model = create_model(name).eval()
    x = torch.randn(2, 3, 64, 64)
    program = torch.export.export(model, (x,))
    called = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert called and all(target.startswith("aten.") or target == "<built-in function getitem>" for target in called), (
        called
    )
    with torch.no_grad(), mvit3_kernels.backend("reference"):
        want = model(x)
    assert torch.allclose(program.module()(x), want, rtol=0, atol=1e-5 * want.abs().max().item())


@pytest.mark.parametrize("name", SAME_OPERATORS)
def test_networks_that_differ_in_widths_alone(name):
    """What tests of the distinct networks rely on."""
    assert structure(name) == structure(SAME_OPERATORS[name])
