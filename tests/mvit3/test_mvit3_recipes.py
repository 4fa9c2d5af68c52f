"""Each recipe states what its publication states."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from mvit3 import recipes
from mvit3.config import TrainConfig, UsageError
from mvit3_kernels import create_model
from tests.golden import MODELS

DATA = Path(__file__).parents[1] / "data"
MANIFEST = DATA.parents[2] / "shared" / "golden" / "manifest.json"
PUBLISHED = json.loads((DATA / "recipes.json").read_text())
RECIPES = {ours: PUBLISHED[theirs] for theirs, ours in MODELS.items() if theirs in PUBLISHED and ours in recipes.names()}
V1_STYLE = [name for name, options in RECIPES.items() if "model.classification.mit.mode" in options]
V2_STYLE = [name for name in RECIPES if name not in V1_STYLE]


def load(name):
    return TrainConfig.from_dict(yaml.safe_load(recipes.path(name).read_text()))


def test_which_recipes_there_are():
    assert len(V1_STYLE) == 6 and len(V2_STYLE) == 10
    others = {"digits", "mindcv_mobilevit_xxs", "mindcv_mobilevit_xs", "mindcv_mobilevit_s", "mobilevitv2_200_384"}
    assert set(recipes.names()) == {*V1_STYLE, *V2_STYLE, *others}
    with pytest.raises(UsageError, match="there is no recipe 'mobilevitv3_xss', the nearest is 'mobilevitv3_xs'"):
        recipes.path("mobilevitv3_xss")


@pytest.mark.skipif(not MANIFEST.exists(), reason="the complete manifest is not here")
def test_copy_of_the_manifest():
    spec = importlib.util.spec_from_file_location("make", DATA / "make.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    manifest = json.loads(MANIFEST.read_text())
    assert {name: make.recipe_options(entry) for name, entry in manifest.items() if make.is_classifier(name)} == PUBLISHED


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe(name):
    """It says where it comes from, names each option once, and sets the dropout that the network has by itself."""
    text = recipes.path(name).read_text()
    assert "\n# Source: " in text and yaml.safe_load(text).keys() <= TrainConfig().to_dict().keys()
    config = load(name)
    assert config.run.output == f"runs/{name}"
    if name != "digits":
        assert (config.data.source, config.data.root) == ("folder", "imagenet")
        assert config.model.name == name.removeprefix("mindcv_").removesuffix("_384")
        model = create_model(config.model.name, 2)
        rates = {module.p for module in model.modules() if type(module).__name__ == "Dropout"}
        assert {config.model.drop_rate, config.model.proj_drop_rate} - {None} <= {*rates, 0.0}


@pytest.mark.parametrize("name", RECIPES)
def test_published_values(name):
    options, config = RECIPES[name], load(name)

    def option(key, default=None):
        return options.get(key, default)

    assert config.data.batch_size == option("dataset.train_batch_size0")
    assert config.optimizer.name == option("optim.name") == "adamw"
    assert config.optimizer.lr == option("scheduler.cosine.max_lr")
    assert config.optimizer.betas == (option("optim.adamw.beta1"), option("optim.adamw.beta2"))
    assert config.optimizer.eps == 1e-8
    assert config.optimizer.weight_decay == option("optim.weight_decay")
    assert config.optimizer.no_decay_1d == option("optim.no_decay_bn_filter_bias")
    assert config.optimizer.clip_grad == option("common.grad_clip", 0)
    assert config.schedule.epochs == option("scheduler.max_epochs")
    assert config.schedule.warmup_iterations == option("scheduler.warmup_iterations")
    assert config.schedule.warmup_lr == option("scheduler.warmup_init_lr")
    assert config.schedule.min_lr == option("scheduler.cosine.min_lr")
    assert (config.schedule.update == "epoch") == (not option("scheduler.is_iteration_based"))
    assert not config.schedule.cosine_after_warmup
    smoothing = "loss.classification.label_smoothing"
    assert config.loss.label_smoothing == option(smoothing, option(f"{smoothing}_factor"))
    augmentation = {key.removeprefix("image_augmentation."): value for key, value in options.items() if "image_augmentation." in key}
    assert config.loss.mixup_alpha == augmentation.get("mixup.alpha", 0)
    assert config.loss.cutmix_alpha == augmentation.get("cutmix.alpha", 0)
    assert config.augment.crop == augmentation["random_resized_crop.enable"]
    assert config.data.interpolation == augmentation["random_resized_crop.interpolation"]
    assert config.augment.flip == 0.5 * augmentation["random_horizontal_flip.enable"]
    assert config.augment.rand_augment == 2 * augmentation.get("rand_augment.enable", 0)
    assert config.augment.erase == augmentation.get("random_erase.p", 0)
    assert (config.data.resize, config.data.crop) == (augmentation.get("resize.size", 288), augmentation.get("center_crop.size", 256))
    assert config.ema.enabled == option("ema.enable") and config.ema.momentum == option("ema.momentum")
    assert (config.run.amp != "none") == option("common.mixed_precision")


@pytest.mark.parametrize("name", V1_STYLE)
def test_v1_style(name):
    """Images as OpenCV reads and shrinks them, several sizes, dropout."""
    options, config = RECIPES[name], load(name)
    assert (config.data.colors, config.data.antialias) == ("bgr", False)
    assert config.sampler.size == options["sampler.vbs.crop_size_height"] == options["sampler.vbs.crop_size_width"]
    low, high, count, unit = (
        options[f"sampler.vbs.{key}"] for key in ("min_crop_size_width", "max_crop_size_width", "max_n_scales", "check_scale")
    )
    spaced = [low + (high - low) * i / (count - 1) for i in range(count)]
    assert config.sampler.sizes == tuple(int(size / unit + 0.5) * unit for size in spaced)  # to the nearest multiple
    assert config.model.drop_rate == options["model.classification.classifier_dropout"]
    assert config.model.proj_drop_rate == options["model.classification.mit.dropout"]
    assert config.model.attn_drop_rate == options["model.classification.mit.attn_dropout"]
    assert config.model.ffn_drop_rate == options["model.classification.mit.ffn_dropout"]


@pytest.mark.parametrize("name", V2_STYLE)
def test_v2_style(name):
    """Images as PIL reads and shrinks them, one size, no dropout."""
    options, config = RECIPES[name], load(name)
    assert (config.data.colors, config.data.antialias) == ("rgb", True)
    assert (config.sampler.size, config.sampler.sizes) == (options["sampler.bs.crop_size_width"], ())
    assert config.augment.rand_augment_magnitude == 9  # and two operations: the release's defaults
    model = config.model
    assert (model.drop_rate, model.proj_drop_rate, model.attn_drop_rate, model.ffn_drop_rate) == (0, 0, 0, 0)


@pytest.mark.parametrize("name", RECIPES)
def test_neither_normalises(name):
    assert (load(name).data.mean, load(name).data.std) == ((0, 0, 0), (1, 1, 1))


@pytest.mark.parametrize(("size", "warmup"), [("xxs", 40), ("xs", 20), ("s", 20)])
def test_mindcv(size, warmup):
    """Values of configs/mobilevit/mobilevit_*_ascend.yaml."""
    config = load(f"mindcv_mobilevit_{size}")
    assert (config.data.batch_size, config.data.interpolation, config.data.colors) == (64, "bilinear", "rgb")
    assert (config.data.crop, config.data.resize) == (256, int(256 / 0.875))
    assert config.augment.crop_scale == (0.08, 1) and config.augment.crop_ratio == (0.75, 1.333)
    assert (config.augment.flip, config.augment.color_jitter, config.augment.erase, config.augment.rand_augment) == (0.5, 0.4, 1, 0)
    assert (config.data.mean, config.data.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    optimizer, schedule = config.optimizer, config.schedule
    assert (optimizer.name, optimizer.lr, optimizer.weight_decay, optimizer.no_decay_1d) == ("adamw", 2e-3, 0.01, True)
    assert (schedule.epochs, schedule.warmup_epochs, schedule.warmup_iterations, schedule.min_lr) == (450, warmup, 0, 2e-6)
    assert schedule.cosine_after_warmup  # decay_epochs is what the warm-up leaves of 450
    assert (config.loss.label_smoothing, config.loss.mixup_alpha, config.ema.enabled) == (0.1, 0, False)


def test_fine_tuning_at_384_pixels():
    """Values of config/classification/finetune_higher_res_in1k/mobilevit_v2.yaml."""
    config = load("mobilevitv2_200_384")
    assert (config.sampler.size, config.data.resize, config.data.crop, config.data.batch_size) == (384, 384, 384, 64)
    assert (config.data.interpolation, config.augment.rand_augment, config.augment.erase) == ("bicubic", 0, 0)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay, optimizer.no_decay_1d, optimizer.clip_grad) == (
        "sgd", 0.9, 4e-5, True, 10)  # fmt: skip
    assert config.schedule.epochs == 10 and config.schedule.warmup_iterations == 0
    assert config.optimizer.lr == config.schedule.min_lr == 1e-3  # fixed
    assert (config.loss.label_smoothing, config.ema.momentum) == (0.1, 5e-5)
