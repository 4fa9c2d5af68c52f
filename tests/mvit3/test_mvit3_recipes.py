"""Each recipe states what its publication states: every value of the source is compared with ours, and every value of
ours is one of the source's or stands here with its reason."""

import importlib.util
import json

import pytest
import torch
import yaml
from torch import nn

from mvit3 import recipes
from mvit3.config import TrainConfig, UsageError, section_options
from mvit3.optimizer import build_optimizer
from mvit3_kernels import create_model

from . import dense_recipe_sources
from .recipe_sources import (
    CVNETS_DEFAULTS,
    DATA,
    FINE_TUNED,
    FINE_TUNED_SOURCE,
    MANIFEST,
    MINDCV,
    MINDCV_NO_OPTION,
    MINDCV_SOURCE,
    NO_OPTION,
    OURS_OF,
    PUBLISHED,
    SOURCES,
    V1_DEFAULTS,
    V1_STYLE,
    V2_DEFAULTS,
    V2_STYLE,
    WARMUP,
    Reader,
    cvnets,
    fine_tuned,
    flat,
    load,
    mindcv,
)


def test_which_recipes_there_are():
    assert len(V1_STYLE) == 6 and len(V2_STYLE) == 10
    own = {"digits", "digits_detection", "digits_segmentation", "finetune"}
    assert set(recipes.names()) == {*V1_STYLE, *V2_STYLE, *MINDCV, FINE_TUNED, *dense_recipe_sources.names(), *own}
    with pytest.raises(UsageError, match="there is no recipe 'mobilevitv3_xss', the nearest is 'mobilevitv3_xs'"):
        recipes.path("mobilevitv3_xss")


@pytest.mark.skipif(not MANIFEST.exists(), reason="the complete manifest is not here")
def test_copy_of_the_manifest():
    spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    assert make.recipe_options(json.loads(MANIFEST.read_text())) == PUBLISHED


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe(name):
    """It says where it comes from and names each option once."""
    text = recipes.path(name).read_text()
    assert "\n# Source: " in text and yaml.safe_load(text).keys() <= TrainConfig().to_dict().keys()
    config = load(name)
    assert config.run.output == f"runs/{name}"


def check(name, said, read, source, no_option):
    """Every value of the source is read, every value of ours is the source's or listed."""
    assert source - read == set(no_option) & source - read, (
        f"{source - read - set(no_option)} of the source are compared with nothing"
    )
    config, listed = flat(load(name)), OURS_OF[name]
    network = name.removeprefix("mindcv_").removesuffix("_384")
    fixed = {"model.name": network, "run.output": f"runs/{name}"}
    free = (
        {key for key in config if key.startswith("run.")}
        - {key for key in listed if key.startswith("run.")}
        - said.keys()
    )
    expected = fixed | {key: value for key, (value, _) in listed.items()} | said
    assert all(reason for _, reason in listed.values())
    assert expected.keys() <= config.keys(), f"{expected.keys() - config.keys()} are no options"
    assert config.keys() - expected.keys() <= free, (
        f"{config.keys() - expected.keys() - free} are neither the source's nor listed"
    )
    defaults = flat(TrainConfig())
    for key, value in config.items():
        want = expected[key] if key in expected else defaults[key]
        assert value == want, f"{name}: {key} is {value}, the source says {want}"


@pytest.mark.parametrize("name", SOURCES)
def test_published_values(name):
    options = Reader((V1_DEFAULTS if name in V1_STYLE else V2_DEFAULTS) | SOURCES[name])
    said = cvnets(options)
    check(name, said, options.read, set(options), NO_OPTION)


def test_fine_tuning_at_384_pixels():
    options = Reader(CVNETS_DEFAULTS | FINE_TUNED_SOURCE)
    del options["optim.adamw.eps"], options["scheduler.cosine.after_warmup"]
    said = fine_tuned(options)
    check(FINE_TUNED, said, options.read, set(options), NO_OPTION)
    optimizer = build_optimizer(nn.Linear(2, 2), load(FINE_TUNED).optimizer)
    assert isinstance(optimizer, torch.optim.SGD) and {g["nesterov"] for g in optimizer.param_groups} == {False}


@pytest.mark.parametrize("name", MINDCV)
def test_mindcv(name):
    warmup, decay = WARMUP[name]
    options = Reader(MINDCV_SOURCE | {"warmup_epochs": warmup, "decay_epochs": decay})
    said = mindcv(options)
    check(name, said, options.read, set(options), MINDCV_NO_OPTION)
    assert "# Source: MindCV 49a2ed4" in recipes.path(name).read_text()


@pytest.mark.parametrize("name", [*SOURCES, *MINDCV, FINE_TUNED])
def test_dropout_of_the_network(name):
    """What a recipe says is what the network is built with; the published rates are also create_model's own, but for
    MindCV's XXS."""
    m = load(name).model
    rates = {"drop_rate": m.drop_rate, "proj_drop_rate": m.proj_drop_rate}
    built = create_model(m.name, 2, **rates)
    found = {module.p for module in built.modules() if type(module).__name__ == "Dropout"}
    assert {rate for rate in rates.values() if rate} <= {*found, 0.0} and found <= {*rates.values(), 0.0}


def test_no_option_is_left_out():
    """An option that is added appears in the comparison, or it fails."""
    known = {f"{section}.{key}" for section, key, *_ in section_options()}
    assert known == flat(TrainConfig()).keys()
