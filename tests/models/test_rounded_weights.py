"""When the weights of a network are rounded together: where nobody could change them in between."""

import copy

import pytest
import torch

from mvit3_kernels import create_model
from mvit3_kernels.nn.attention import SeparableLayer, TransformerLayer
from mvit3_kernels.nn.weights import weights_of_products
from mvit3_kernels.ops import rounded_weights


@pytest.fixture
def asked(monkeypatch):
    """What ops find on a CPU as if it were a GPU, without its kernels: they go on as if nothing was found."""
    found = []

    def note(self, x, weights, find=rounded_weights._Pass.find):
        places = find(self, x, weights)
        for place in places or ():
            assert torch.equal(place.rounded, place.weight.to(x.dtype)), "another weight's"
            assert not place.rounded.requires_grad and place.begin % 64 == 0
        found.append(places)

    monkeypatch.setattr(rounded_weights, "_launches", lambda x: True)
    monkeypatch.setattr(rounded_weights._Pass, "find", note)
    return found


def network(name="mobilevitv3_xxs"):
    torch.manual_seed(0)
    return create_model(name, num_classes=4, drop_rate=0.0, proj_drop_rate=0.0).train()


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def run(model):
    with torch.autocast("cpu", torch.bfloat16):
        return model(images())


def served(asked):
    return [places is not None for places in asked]


def test_all_ops_find_theirs_in_one_buffer(asked):
    run(network())
    assert len(asked) >= 10 and all(served(asked))
    assert len({place.rounded.untyped_storage().data_ptr() for places in asked for place in places}) == 1


def test_every_pass_rounds_anew(asked):
    model = network()
    run(model).sum().backward()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1)
    run(model)
    assert all(served(asked))


def doubles(layer, _):
    layer[1].conv_proj.block.conv.weight.data.mul_(2)


def parametrised(model):
    torch.nn.utils.parametrizations.weight_norm(model.layer_1[0].block.exp_1x1.block.conv)


CHANGES = {
    "a hook": lambda model: model.layer_2.register_forward_hook(lambda *_: None),
    "a hook that changes a weight": lambda model: model.layer_3.register_forward_pre_hook(doubles),
    "another class": lambda model: setattr(model, "layer_2", Wrapped(model.layer_2)),
    "a parametrisation": parametrised,
}


class Wrapped(torch.nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("change", CHANGES)
def test_nothing_is_found_where_a_weight_could_change(asked, change):
    model = network()
    run(model)
    assert all(served(asked))
    asked.clear()
    CHANGES[change](model)
    run(model)
    assert not any(served(asked))


def test_a_weight_that_was_replaced_is_the_one_that_is_found(asked):
    model = network()
    run(model)
    conv = model.layer_3[1].conv_proj.block.conv
    conv.weight = torch.nn.Parameter(conv.weight.detach() * 2)
    asked.clear()
    run(model)
    assert all(served(asked)) and any(place.weight is conv.weight for places in asked for place in places)


def test_functional_calls_find_the_tensors_that_they_are_given(asked):
    model = network()
    given = {name: t.detach() * 2 for name, t in model.named_parameters()}
    with torch.autocast("cpu", torch.bfloat16):
        torch.func.functional_call(model, given, (images(),))
    assert all(served(asked))
    assert {id(place.weight) for places in asked for place in places} <= {id(t) for t in given.values()}


def test_a_network_that_checkpoints_rounds_each_by_itself(asked):
    model = network()
    model.set_grad_checkpointing()
    run(model).sum().backward()
    assert not any(served(asked))


def test_weights_that_another_layer_shares_are_rounded_once():
    model = network()
    first, second = (model.layer_2[i].block.exp_1x1.block.conv for i in (1, 2))
    second.weight = first.weight
    found = []
    with rounded_weights.rounded_together(lambda: weights_of_products(model)):
        state = rounded_weights._current.get()
        found = state.find(torch.empty(1, dtype=torch.bfloat16), (first.weight, second.weight))
    assert found[0] is found[1]


@pytest.mark.parametrize("name", ["mobilevitv3_xxs", "mobilevitv3_050", "mobilevit_xxs"])
@pytest.mark.parametrize("training", [True, False])
def test_weights_of_a_layer_stand_one_behind_the_other(name, training):
    model = network(name).train(training)
    weights = [id(t) for t in weights_of_products(model)]
    layers = [m for m in model.modules() if isinstance(m, TransformerLayer | SeparableLayer)]
    assert layers and len(weights) == len(set(weights))
    for module in layers:
        layer = module.layer()
        own = [id(linear.weight) for linear in (layer.qkv, layer.out_proj, layer.fc1, layer.fc2)]
        if isinstance(module, SeparableLayer) and training:
            assert not set(own) & set(weights)
        else:
            at = weights.index(own[0])
            assert weights[at : at + 4] == own
    assert id(model.get_classifier().weight) not in weights


def test_a_copy_has_its_own(asked):
    model = network()
    run(model)
    copied = copy.deepcopy(model)
    asked.clear()
    run(copied)
    assert all(served(asked))
    own = {id(t) for t in copied.parameters()}
    assert all(id(place.weight) in own for places in asked for place in places)
