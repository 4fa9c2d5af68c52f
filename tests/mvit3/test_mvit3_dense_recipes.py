"""Each recipe of dense prediction states what its publication states, as test_mvit3_recipes has it for classifiers."""

import pytest

from mvit3.config import TrainConfig
from mvit3.network import build_model
from mvit3.optimizer import build_optimizer
from mvit3_kernels import create_model

from .dense_recipe_sources import (
    DEFAULTS,
    NETWORK_PREFIXES,
    NO_DENSE_OPTION,
    SOURCES,
    detection,
    names,
    ours,
    segmentation,
)
from .recipe_sources import Reader, flat, load


def test_which_recipes_there_are():
    assert set(names()) == set(SOURCES) and len(SOURCES) == 29


@pytest.mark.parametrize("name", SOURCES)
def test_published_values(name):
    options = Reader(DEFAULTS | SOURCES[name])
    said = (detection if name.startswith("ssdlite") else segmentation)(options)
    unread = {
        key for key in SOURCES[name].keys() - options.read - NO_DENSE_OPTION if not key.startswith(NETWORK_PREFIXES)
    }
    without_effect = {key for key in unread if key.startswith(("optim.adamw.", "scheduler.warmup_init_lr"))}
    assert unread == (without_effect if options["optim.name"] == "sgd" else set())
    config, expected = flat(load(name)), ours(name, options) | said
    assert expected.keys() <= config.keys()
    expected |= {"model.name": name.rpartition("_")[0], "run.output": f"runs/{name}"}
    defaults = flat(TrainConfig())
    for key, value in config.items():
        want = expected[key] if key in expected else defaults[key]
        assert value == want, f"{name}: {key} is {value}, the source says {want}"
        assert key in expected or key.startswith("run.") or "sgd" in options["optim.name"], (
            f"{key} is not accounted for"
        )


@pytest.mark.parametrize(
    ("name", "outputs", "groups"),
    [
        ("ssdlite_mobilevitv3_s_coco", 81, {(1.0, 0.01): (262, 5547882)}),
        ("deeplabv3_mobilevitv3_s_voc", 21, {(1.0, 0.01): (210, 4493792), (10.0, 0.01): (20, 2711829)}),
        (
            "deeplabv3_mobilevitv3_100_voc",
            21,
            {(1.0, 0.05): (64 + 9, 4591776 + 9368704), (1.0, 0.0): (128 + 16, 34633 + 6442)},
        ),
    ],
)
def test_parameter_groups(name, outputs, groups):
    """Tensors and elements of each learning rate and decay, as the released configurations group them."""
    config = load(name)
    optimizer = build_optimizer(build_model(config, outputs, "cpu"), config.optimizer)
    found = {}
    for group in optimizer.param_groups:
        key = group.get("lr_scale", 1.0), group["weight_decay"]
        count, elements = found.get(key, (0, 0))
        found[key] = count + len(group["params"]), elements + sum(p.numel() for p in group["params"])
    assert found == groups


@pytest.mark.parametrize("name", ["deeplabv3_mobilevitv3_050_ade20k", "pspnet_mobilevitv3_100_voc"])
def test_head_of_the_network(name):
    """What a recipe says of the head is what create_model builds by itself for the output stride."""
    m = load(name).model
    built = create_model(m.name, 3, drop_rate=m.drop_rate, output_stride=m.output_stride)
    head = built.seg_head
    assert built.output_stride == m.output_stride and head.aux_head is not None
    assert {module.p for module in head.modules() if type(module).__name__.startswith("Dropout")} == {m.drop_rate}
    if name.startswith("deeplabv3"):
        rates = [conv.block.conv.dilation[0] for conv in list(head.aspp.aspp_layer["convs"])[1:4]]
        assert rates == SOURCES[name]["model.segmentation.deeplabv3.aspp_rates"]
    else:
        sizes = [branch[0].output_size for branch in head.psp_layer.psp_branches]
        assert sizes == SOURCES[name]["model.segmentation.pspnet.psp_pool_sizes"]
