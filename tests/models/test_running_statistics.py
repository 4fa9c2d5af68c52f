"""Running statistics of a network's norms, which are written together where nobody can tell."""

import copy

import pytest
import torch

from mvit3_kernels import create_model

from ..ops.test_running_stats import Counted


def network():
    torch.manual_seed(0)
    return create_model("mobilevitv3_xxs", num_classes=4, drop_rate=0.0, proj_drop_rate=0.0).train()


def images():
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def buffers(model):
    return {name: t.clone() for name, t in model.named_buffers()}


def writes(model):
    with Counted() as counted:
        model(images())
    return [name for name in counted.names if name.startswith("aten::_foreach")]


def test_together_is_one_by_one():
    model = network()
    hooked = copy.deepcopy(model)
    hooked.layer_2.register_forward_hook(lambda *_: None)  # might read them
    for _ in range(2):
        together, apart = writes(model), writes(hooked)
        assert together == ["aten::_foreach_add_", "aten::_foreach_mul", "aten::_foreach_lerp_"]
        assert len(apart) > 10 * len(together)
        for name, t in buffers(hooked).items():
            assert torch.equal(t, model.get_buffer(name)), name


def test_a_hook_reads_what_was_measured_before_it():
    model, found = network(), []
    writes(model)
    before = buffers(model)
    norm = model.conv_1.block.norm
    handle = model.layer_1.register_forward_hook(lambda *_: found.append(int(norm.num_batches_tracked)))
    writes(model)
    handle.remove()
    assert found == [int(before["conv_1.block.norm.num_batches_tracked"]) + 1]
    assert len(writes(model)) == 3


def test_a_norm_in_two_places_is_written_in_turn():
    model = network()
    model.layer_2[1].block.red_1x1.block.norm = model.layer_2[2].block.red_1x1.block.norm
    for _ in range(2):
        assert len(writes(model)) > 3


def test_an_error_leaves_what_was_measured():
    model = network()
    writes(model)
    model.classifier.fc.weight = torch.nn.Parameter(torch.zeros(4, 5))  # refuses the pooled features
    with pytest.raises(RuntimeError):
        model(images())
    assert {int(t) for name, t in model.named_buffers() if name.endswith("tracked")} == {2}
