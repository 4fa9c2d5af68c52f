"""Networks of transformers as programs of the engine: the host's outputs, under the conditions of the ordinary path."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvit3_kernels import _native, explain, fuse
from tests.bounds import assert_bound, together

from .transformers_models import FAMILIES, KINDS, distance, images, network, outputs, results

pytestmark = pytest.mark.skipif(_native.why_not() is not None, reason="the compiled kernels are not built")


def ran(model: nn.Module, x: torch.Tensor) -> dict[str, str]:
    """How each network ran, with the reason."""
    return {row.what: row.reason or row.ran for row in explain(model, x) if row.kind == "network"}


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_outputs_are_the_hosts(name):
    """At 97 pixels MobileViTV2's maps have pixels that are in no patch."""
    host = network(name, **({"output_stride": 16} if name.endswith("masks") else {}))
    fused, exact = fuse(copy.deepcopy(host)), copy.deepcopy(host).double()
    networks = KINDS[name].__name__ if "masks" not in name else {"v1": "mobilevit", "v2": "mobilevitv2"}[name[:2]]
    for shape in ((1, 3, 64, 96), (5, 3, 97, 97)):
        x = images(*shape)
        assert ran(fused, x) == {networks: "fused", **({"segmentation_head": "fused"} if "masks" in name else {})}
        for hidden in (False, True):
            found, want = outputs(fused, x, hidden), outputs(host, x, hidden)
            assert list(found) == list(want)
            assert_bound(found, want, outputs(exact, x.double(), hidden), 1e-6, least=0, group=together)


@torch.no_grad()
@pytest.mark.parametrize("name", KINDS)
def test_tuples_and_losses(name):
    host = network(name)
    fused, x = fuse(copy.deepcopy(host)), images(2, 3, 64, 64)
    labels = {} if " " not in name else {"labels": torch.ones((2,) if "classes" in name else (2, 64, 64)).long()}
    for options in ({"return_dict": False}, {"return_dict": False, "output_hidden_states": True}):
        found, want = fused(x, **options, **labels), host(x, **options, **labels)
        assert type(found) is type(want) is tuple and len(found) == len(want)
        for a, b in zip(found, want, strict=True):
            assert type(a) is type(b)
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    fused.config.output_hidden_states = host.config.output_hidden_states = True
    assert list(outputs(fused, x, None)) == list(outputs(host, x, None))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_trainable_head_learns_on_a_frozen_model(name):
    """The program serves below it; with one trainable weight below, gradients flow as in the host."""
    host = network(name)
    for p in host.base_model.parameters():
        p.requires_grad_(False)
    fused, x = fuse(copy.deepcopy(host)), images(2, 3, 64, 64)
    classifier, model = ran(fused, x).values()
    assert "require grad" in classifier and model == "fused"
    losses = [model(x, labels=torch.tensor([1, 2])).loss for model in (host, fused)]
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(fused.classifier.weight.grad, host.classifier.weight.grad, rtol=1e-3, atol=1e-4)
    for model in (host, fused):
        model.zero_grad()
        next(model.base_model.parameters()).requires_grad_(True)
    assert all("require grad" in how for how in ran(fused, x).values())
    want, found = results(host, x), results(fused, x)
    assert distance(found, want) <= 1e-4


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_a_classifier_follows_its_parts(name):
    """Other heads run behind the program of the model below; a hook on that is called."""
    host = network(name)
    fused, x = fuse(copy.deepcopy(host)), images(2, 3, 64, 64)
    model, classifier = host.base_model_prefix, type(host).__name__
    for head in (nn.Linear(host.classifier.in_features, 3), nn.Identity(), nn.Sequential(nn.Tanh())):
        for each in (host, fused):
            each.classifier = head
        assert distance(outputs(fused, x), outputs(host, x)) <= 1e-5
        assert ran(fused, x)[classifier] == "fused" or ran(fused, x)[model] == "fused"
    assert "Tanh" in ran(fused, x)[classifier]
    for each in (host, fused):
        each.classifier = nn.Identity()
        each.base_model.register_forward_hook(lambda module, inputs, found: type(found)(found[0], 2 * found[1]))
    assert distance(outputs(fused, x, False), outputs(host, x, False)) <= 1e-5
    assert "has a hook" in ran(fused, x)[classifier] and ran(fused, x)[model] == "fused"


@torch.no_grad()
@pytest.mark.parametrize("name", ["v1 masks", "v2 masks"])
def test_what_a_program_cannot_serve(name):
    host = network(name, hidden_dropout_prob=0.1) if name.startswith("v1") else network(name, ffn_dropout=0.1)
    fused, x = fuse(copy.deepcopy(host)), images(2, 3, 64, 64)
    model = f"mobilevit{'v2' if name.startswith('v2') else ''}"
    assert set(ran(fused, x).values()) == {"fused"}
    fused.train()
    assert "training mode" in ran(fused, x)[model]
    fused.eval()
    fused.load_state_dict(host.state_dict())
    layer, head = fused.base_model.encoder.layer[4], fused.segmentation_head
    for weight in (layer.conv_kxk.convolution.weight, head.classifier.convolution.bias):
        weight.mul_(1.5)
        host.load_state_dict(fused.state_dict())
        assert distance(outputs(fused, x), outputs(host, x)) <= 1e-5
    for network_ in (host, fused):
        block = network_.segmentation_head.aspp.convs[1]
        block.activation = nn.Tanh()
    assert ran(fused, x)[model] == "fused" and "Tanh" in ran(fused, x)["segmentation_head"]
    assert distance(outputs(fused, x), outputs(host, x)) <= 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in ran(fused, x)[model]
    assert "ordinary" not in ran(fused.double(), x.double()) and "float64" in ran(fused, x.double())[model]


@torch.no_grad()
def test_a_map_without_a_patch_is_refused_by_program_and_host():
    host = network("v2")
    for model in (host, fuse(copy.deepcopy(host))):
        with pytest.raises(RuntimeError):
            model(images(1, 3, 32, 32))
