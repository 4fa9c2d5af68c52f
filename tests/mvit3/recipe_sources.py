"""What the publications say of training, as options of ours: each value with its source, or with the reason for it."""

import json
from pathlib import Path

import yaml

from mvit3 import recipes
from mvit3.config import TrainConfig
from tests.golden import MODELS

DATA = Path(__file__).parents[1] / "data"
MANIFEST = DATA.parents[2] / "shared" / "golden" / "manifest.json"
PUBLISHED = json.loads((DATA / "recipes.json").read_text())
SOURCES = {
    ours: PUBLISHED[theirs] for theirs, ours in MODELS.items() if theirs in PUBLISHED and ours in recipes.names()
}
V1_STYLE = [name for name, options in SOURCES.items() if "model.classification.mit.mode" in options]
V2_STYLE = [name for name in SOURCES if name not in V1_STYLE]
MINDCV = [f"mindcv_mobilevit_{size}" for size in ("xxs", "xs", "s")]
FINE_TUNED = "mobilevitv2_200_384"


def load(name):
    return TrainConfig.from_dict(yaml.safe_load(recipes.path(name).read_text()))


def flat(config):
    return {f"{section}.{key}": value for section, values in config.to_dict().items() for key, value in values.items()}


# What ml-cvnets' files leave to its code (golden/README.md, section 6): the defaults of its options at the revisions
# that are named.
CVNETS_DEFAULTS = {
    "optim.adamw.eps": 1e-8,
    "image_augmentation.random_resized_crop.scale": [0.08, 1.0],
    "image_augmentation.random_resized_crop.aspect_ratio": [3 / 4, 4 / 3],
    "image_augmentation.random_horizontal_flip.p": 0.5,
    "scheduler.cosine.after_warmup": False,  # the warm-up is not subtracted
    "ema.warmup": False,
}
V1_DEFAULTS = CVNETS_DEFAULTS | {"image_augmentation.resize.size": 288, "image_augmentation.center_crop.size": 256}
V2_DEFAULTS = CVNETS_DEFAULTS | {
    "image_augmentation.mixup.p": 0.5,  # of the one of the two that a batch draws: half of the batches are mixed
    "image_augmentation.cutmix.p": 0.5,
    "image_augmentation.rand_augment.num_ops": 2,
    "image_augmentation.rand_augment.magnitude": 9,
    "image_augmentation.random_erase.scale": [0.02, 0.33],
    "image_augmentation.random_erase.ratio": [0.3, 3.3],
}


class Reader(dict):
    """Options of a source; remembers which were read."""

    def __init__(self, options):
        super().__init__(options)
        self.read = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default):
        self.read.add(key)
        return super().get(key, default)

    def same(self, *keys):
        """The one value that all of these have."""
        (value,) = {json.dumps(self[key]) for key in keys}
        return json.loads(value)


def cvnets(options):
    """What a file of ml-cvnets or of the MobileViTv3 release says, as options of ours."""
    o, augmentation = options, "image_augmentation."
    crop, flip = augmentation + "random_resized_crop.", augmentation + "random_horizontal_flip."
    assert o["scheduler.name"] in ("cosine", "fixed") and o["optim.name"] in ("adamw", "sgd")
    assert o["loss.classification.name"] in ("label_smoothing", "cross_entropy")  # two names of one loss
    said = {
        "data.batch_size": o["dataset.train_batch_size0"],
        "data.eval_batch_size": o["dataset.val_batch_size0"],
        "data.resize": o[augmentation + "resize.size"],
        "data.crop": o[augmentation + "center_crop.size"],
        "data.interpolation": o[crop + "interpolation"],
        "augment.crop": o[crop + "enable"],
        "augment.crop_scale": o[crop + "scale"],
        "augment.crop_ratio": o[crop + "aspect_ratio"],
        "augment.flip": o[flip + "p"] * o[flip + "enable"],
        "optimizer.weight_decay": o["optim.weight_decay"],
        "optimizer.no_decay_1d": o["optim.no_decay_bn_filter_bias"],
        "optimizer.clip_grad": o.get("common.grad_clip", 0),
        "schedule.epochs": o["scheduler.max_epochs"],
        "loss.label_smoothing": next(
            o[key]
            for key in ("loss.classification.label_smoothing", "loss.classification.label_smoothing_factor")
            if key in o
        ),
        "ema.enabled": o["ema.enable"],
        "ema.momentum": o["ema.momentum"],
        "ema.warmup": o["ema.warmup"],
        "run.amp": "auto" if o["common.mixed_precision"] else "none",
    }
    if augmentation + "resize.interpolation" in o:
        assert o[augmentation + "resize.interpolation"] == said["data.interpolation"]
        assert o[augmentation + "resize.enable"] and o[augmentation + "center_crop.enable"]
    if "common.channels_last" in o:
        said["run.channels_last"] = o["common.channels_last"]
    if o["optim.name"] == "adamw":
        said |= {
            "optimizer.name": "adamw",
            "optimizer.betas": [o["optim.adamw.beta1"], o["optim.adamw.beta2"]],
            "optimizer.eps": o["optim.adamw.eps"],
        }
    if o["scheduler.name"] == "cosine":
        said |= {
            "optimizer.lr": o["scheduler.cosine.max_lr"],
            "schedule.name": "cosine",
            "schedule.min_lr": o["scheduler.cosine.min_lr"],
            "schedule.warmup_iterations": o["scheduler.warmup_iterations"],
            "schedule.warmup_lr": o["scheduler.warmup_init_lr"],
            "schedule.update": "iteration" if o["scheduler.is_iteration_based"] else "epoch",
            "schedule.cosine_after_warmup": o["scheduler.cosine.after_warmup"],
        }
    if o["sampler.name"] == "variable_batch_sampler":
        low, high = (
            o.same(f"sampler.vbs.{end}_crop_size_width", f"sampler.vbs.{end}_crop_size_height")
            for end in ("min", "max")
        )
        count, unit = o["sampler.vbs.max_n_scales"], o["sampler.vbs.check_scale"]
        spaced = [low + (high - low) * i / (count - 1) for i in range(count)]
        said["sampler.size"] = o.same("sampler.vbs.crop_size_width", "sampler.vbs.crop_size_height")
        said["sampler.sizes"] = [int(size / unit + 0.5) * unit for size in spaced]  # to the nearest multiple
    else:
        assert o["sampler.name"] == "batch_sampler"
        said["sampler.size"] = o.same("sampler.bs.crop_size_width", "sampler.bs.crop_size_height")
        said["sampler.sizes"] = []
    dropout = "model.classification."
    if dropout + "classifier_dropout" in o:
        said |= {
            "model.drop_rate": o[dropout + "classifier_dropout"],
            "model.proj_drop_rate": o[dropout + "mit.dropout"],
            "model.attn_drop_rate": o[dropout + "mit.attn_dropout"],
            "model.ffn_drop_rate": o[dropout + "mit.ffn_dropout"],
        }
    return said | cvnets_mixing(o)


def cvnets_mixing(o):
    """The part of the v2-style files that mixes and changes images."""
    if "image_augmentation.mixup.enable" not in o:
        return {}
    return {
        "loss.mixup_alpha": o["image_augmentation.mixup.alpha"] * o["image_augmentation.mixup.enable"],
        "loss.cutmix_alpha": o["image_augmentation.cutmix.alpha"] * o["image_augmentation.cutmix.enable"],
        "loss.mix_probability": o.same("image_augmentation.mixup.p", "image_augmentation.cutmix.p"),
        "augment.rand_augment": o["image_augmentation.rand_augment.num_ops"]
        * o["image_augmentation.rand_augment.enable"],
        "augment.rand_augment_magnitude": o["image_augmentation.rand_augment.magnitude"],
        "augment.erase": o["image_augmentation.random_erase.p"] * o["image_augmentation.random_erase.enable"],
        "augment.erase_scale": o["image_augmentation.random_erase.scale"],
        "augment.erase_ratio": o["image_augmentation.random_erase.ratio"],
    }


# Values of the sources that no option of ours stands for, and why.
MACHINE = "where and how it ran"
NETWORK = "the network itself, which golden values hold to the published one"
NO_OPTION = {
    "common.run_label": MACHINE, "common.log_freq": MACHINE, "common.auto_resume": MACHINE,
    "common.tensorboard_logging": MACHINE,
    "dataset.workers": MACHINE, "dataset.prefetch_factor": MACHINE, "dataset.persistent_workers": MACHINE,
    "dataset.pin_memory": MACHINE,
    "dataset.eval_batch_size0": "batches of a separate evaluation; val_batch_size0 is that of training's",
    "dataset.name": "ImageNet-1k, data.root", "dataset.category": "classification", "loss.category": "classification",
    "model.classification.name": NETWORK, "model.classification.activation.name": NETWORK,
    "model.activation.name": NETWORK,
    "model.classification.mit.mode": NETWORK, "model.classification.mit.number_heads": NETWORK,
    "model.classification.mit.no_fuse_local_global_features": NETWORK,
    "model.classification.mit.conv_kernel_size": NETWORK,
    "model.classification.mitv2.width_multiplier": NETWORK, "model.classification.mitv2.attn_norm_layer": NETWORK,
    "model.classification.mitv3.width_multiplier": NETWORK, "model.classification.mitv3.attn_norm_layer": NETWORK,
    "model.normalization.name": NETWORK, "model.normalization.momentum": NETWORK, "model.layer.global_pool": NETWORK,
    "model.layer.conv_init": NETWORK, "model.layer.conv_init_std_dev": NETWORK, "model.layer.linear_init": NETWORK,
    "model.layer.linear_init_std_dev": NETWORK,
}  # fmt: skip

# Values of ours that the sources do not state, and why they are what they are.
IMAGENET = "ImageNet-1k as folders"
OFF = "what the publications do not have"
HERE = "where and how it runs, nothing of what is computed"
DENSE = "of dense prediction"
OURS = {
    "data.masks": ("", DENSE),
    "data.annotations": ("annotations/instances_{part}.json", DENSE),
    "data.native_labels": (False, DENSE),
    "data.keep_aspect": (False, DENSE),
    "augment.style": ("v2", DENSE),
    "augment.photometric": (False, DENSE),
    "augment.short_side": ([], DENSE),
    "augment.long_side": (0, DENSE),
    "augment.max_class_share": (1, DENSE),
    "augment.blur": (0, DENSE),
    "model.output_stride": (None, "of the task, 32"),
    "loss.auxiliary_weight": (0.4, DENSE),
    "detection.score_threshold": (0.01, DENSE),
    "detection.iou_threshold": (0.5, DENSE),
    "detection.candidates": (400, DENSE),
    "detection.per_class": (0, DENSE),
    "detection.per_image": (200, DENSE),
    "model.num_classes": (None, "as many as the data has"),
    "model.pretrained": ("", OFF),
    "model.drop_head": (False, OFF),
    "model.drop_path_rate": (0, OFF),
    "model.freeze_stages": (0, OFF),
    "model.freeze_bn": (False, OFF),
    "data.source": ("folder", IMAGENET),
    "data.name": ("", IMAGENET),
    "data.root": ("imagenet", IMAGENET),
    "data.train": ("train", IMAGENET),
    "data.val": ("val", IMAGENET),
    "data.download": (False, IMAGENET),
    "data.cache": ("", IMAGENET),
    "data.num_classes": (0, IMAGENET),
    "data.class_map": ("", IMAGENET),
    "data.limit_train": (0, "all images"),
    "data.limit_val": (0, "all images"),
    "data.exif_orientation": (
        True,
        "OpenCV turns images, PIL does not; it concerns a user's photographs, hardly ImageNet",
    ),
    "data.decoder": ("auto", "every decoder gives the same pixels"),
    "data.scaled_decoding": (False, OFF),
    "data.workers": (-1, HERE),
    "data.prefetch": (2, HERE),
    "data.max_corrupt": (0.01, HERE),
    "augment.rotate": (0, OFF),
    "augment.zoom": (0, OFF),
    "augment.shift": (0, OFF),
    "augment.policy": ("", OFF),
    "sampler.aug_repeats": (1, OFF),
    "optimizer.lr_rule": ("constant", "the rate of a recipe is that of its batch"),
    "optimizer.lr_batch": (1024, "without effect where lr_rule is constant"),
    "optimizer.momentum": (0.9, "without effect on AdamW"),
    "optimizer.head_lr_scale": (1, OFF),
    "optimizer.layer_decay": (1, OFF),
    "schedule.shorten_warmup": (False, OFF),
    "schedule.decay_epochs": (30, "without effect on a cosine"),
    "schedule.decay_rate": (0.1, "without effect on a cosine"),
    "schedule.decay_milestones": ([30, 60, 90], "without effect on a cosine"),
    "schedule.power": (0.9, "without effect on a cosine"),
    "loss.name": ("cross_entropy", "the loss of all"),
    "loss.bce_target_thresh": (None, OFF),
    "loss.bce_sum": (False, OFF),
    "loss.class_weights": ([], OFF),
    "loss.class_balance": (0, OFF),
    "loss.mixup_off_epoch": (0, OFF),
    "loss.switch_probability": (0.5, "mixup and cutmix are as likely"),
    "distill.teacher": ("", OFF),
    "distill.checkpoint": ("", OFF),
    "distill.kind": ("soft", "without effect where there is no teacher"),
    "distill.weight": (0.5, "without effect where there is no teacher"),
    "distill.temperature": (1, "without effect where there is no teacher"),
    "run.channels_last": (True, "a layout, not a number; the v1-style files say nothing of it"),
    "run.accumulate": (1, "one batch a step"),
    "run.sync_bn": (False, OFF),
    "run.seed": (0, HERE),
    "run.compile": (False, HERE),
}
# Where a family differs: images as OpenCV or as PIL read and shrink them, no mean and deviation, what one family lacks.
PIXELS = {
    "data.mean": ([0, 0, 0], "pixels go in as they are, in [0, 1]"),
    "data.std": ([1, 1, 1], "pixels go in as they are, in [0, 1]"),
    "augment.color_jitter": (0, OFF),
    "schedule.warmup_epochs": (0, "the warm-up is told in iterations"),
}
NO_MIXING = {
    "loss.mixup_alpha": (0, OFF),
    "loss.cutmix_alpha": (0, OFF),
    "loss.mix_probability": (1, "without effect where nothing is mixed"),
    "augment.rand_augment": (0, OFF),
    "augment.rand_augment_magnitude": (9, "without effect where there is no RandAugment"),
}
NO_ERASING = {
    "augment.erase": (0, OFF),
    "augment.erase_scale": ([0.02, 0.33], "without effect where nothing is erased"),
    "augment.erase_ratio": ([0.3, 3.3], "without effect where nothing is erased"),
}
OPENCV = {
    "data.colors": ("bgr", "as OpenCV reads images"),
    "data.antialias": (False, "OpenCV does not filter before it shrinks"),
    "sampler.shrink": (False, "the release never goes below batch_size"),
}
NO_DROPOUT = {
    f"model.{kind}_drop_rate": (0, "no dropout anywhere in the published files") for kind in ("proj", "attn", "ffn")
} | {"model.drop_rate": (0, "no dropout anywhere in the published files")}
PIL = {
    "data.colors": ("rgb", "as PIL reads images"),
    "data.antialias": (True, "PIL filters before it shrinks"),
    "sampler.shrink": (True, "without effect at one size"),
}
OURS_OF = {
    **dict.fromkeys(V1_STYLE, OURS | PIXELS | NO_MIXING | NO_ERASING | OPENCV),
    **dict.fromkeys(V2_STYLE, OURS | PIXELS | NO_DROPOUT | PIL),
    FINE_TUNED: OURS
    | PIXELS
    | NO_MIXING
    | NO_ERASING
    | NO_DROPOUT
    | PIL
    | {
        "optimizer.betas": ([0.9, 0.999], "without effect on SGD"),
        "optimizer.eps": (1e-8, "without effect on SGD"),
        "schedule.warmup_iterations": (0, "the file names none"),
        "schedule.warmup_lr": (2e-4, "without effect where there is no warm-up"),
        "schedule.min_lr": (2e-4, "without effect on a fixed rate"),
        "schedule.update": ("epoch", "without effect on a fixed rate"),
        "schedule.cosine_after_warmup": (False, "without effect on a fixed rate"),
    },
    **{name: OURS | {"sampler.shrink": (True, "without effect at one size")} for name in MINDCV},
}

# ml-cvnets 0c0f798, config/classification/finetune_higher_res_in1k/mobilevit_v2.yaml.
FINE_TUNED_SOURCE = {
    "common.run_label": "train", "common.log_freq": 500, "common.auto_resume": True, "common.mixed_precision": True,
    "common.channels_last": True, "common.tensorboard_logging": False, "common.grad_clip": 10.0,
    "dataset.name": "imagenet", "dataset.category": "classification", "dataset.train_batch_size0": 64,
    "dataset.val_batch_size0": 50,
    "dataset.eval_batch_size0": 50, "dataset.workers": 8, "dataset.persistent_workers": False,
    "dataset.pin_memory": True,
    "image_augmentation.random_resized_crop.enable": True,
    "image_augmentation.random_resized_crop.interpolation": "bicubic",
    "image_augmentation.random_horizontal_flip.enable": True, "image_augmentation.resize.enable": True,
    "image_augmentation.resize.size": 384, "image_augmentation.resize.interpolation": "bicubic",
    "image_augmentation.center_crop.enable": True, "image_augmentation.center_crop.size": 384,
    "sampler.name": "batch_sampler", "sampler.bs.crop_size_width": 384, "sampler.bs.crop_size_height": 384,
    "loss.category": "classification", "loss.classification.name": "cross_entropy",
    "loss.classification.label_smoothing": 0.1,
    "optim.name": "sgd", "optim.weight_decay": 4e-5, "optim.no_decay_bn_filter_bias": True, "optim.sgd.momentum": 0.9,
    "optim.sgd.nesterov": False,  # its code's default
    "scheduler.name": "fixed", "scheduler.max_epochs": 10, "scheduler.fixed.lr": 1e-3,
    "model.classification.name": "mobilevit_v2", "model.classification.mitv2.width_multiplier": 2.0,
    "model.classification.mitv2.attn_norm_layer": "layer_norm_2d", "model.classification.activation.name": "swish",
    "model.normalization.name": "batch_norm", "model.normalization.momentum": 0.1, "model.activation.name": "swish",
    "ema.enable": True, "ema.momentum": 5e-5,
}  # fmt: skip


def fine_tuned(options):
    said = cvnets(options)
    assert not options["optim.sgd.nesterov"]
    return said | {
        "optimizer.name": "momentum",  # timm's name of SGD without Nesterov's momentum; its sgd has it
        "optimizer.momentum": options["optim.sgd.momentum"],
        "optimizer.lr": options["scheduler.fixed.lr"],
        "schedule.name": "constant",
    }


# MindCV 49a2ed4, configs/mobilevit/mobilevit_*_ascend.yaml, and what its code adds where the files are silent.
MINDCV_SOURCE = {
    "mode": 0, "distribute": True, "num_parallel_workers": 8, "val_while_train": True, "dataset": "imagenet",
    "shuffle": True,
    "dataset_download": False, "batch_size": 64, "drop_remainder": True, "image_resize": 256, "scale": [0.08, 1.0],
    "ratio": [0.75, 1.333], "hflip": 0.5, "interpolation": "bilinear", "crop_pct": 0.875,
    "color_jitter": [0.4, 0.4, 0.4], "re_prob": 1.0,
    "num_classes": 1000, "pretrained": False, "keep_checkpoint_max": 10, "epoch_size": 450, "dataset_sink_mode": True,
    "amp_level": "O3",
    "loss": "ce", "label_smoothing": 0.1, "scheduler": "cosine_decay", "min_lr": 2e-6, "lr": 2e-3, "opt": "adamw",
    "filter_bias_and_bn": True, "momentum": 0.9, "weight_decay": 0.01, "use_nesterov": False,
    "loss_scale_type": "dynamic",
    "drop_overflow_update": True, "loss_scale": 1024,
    # The code's: config.py, mindcv/models/mobilevit.py, mindcv/data/transforms_factory.py.
    "eps": 1e-10, "betas": [0.9, 0.999], "warmup_factor": 0.0, "lr_epoch_stair": False, "clip_grad": False,
    "ema": False, "mixup": 0.0,
    "cutmix": 0.0, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "re_scale": [0.02, 0.33],
    "re_ratio": [0.3, 3.3],
    "cls_dropout": 0.1, "dropout": 0.1, "ffn_dropout": 0.0, "attn_dropout": 0.0, "auto_augment": None,
}  # fmt: skip
WARMUP = {"mindcv_mobilevit_xxs": (40, 410), "mindcv_mobilevit_xs": (20, 430), "mindcv_mobilevit_s": (20, 430)}
MINDCV_NO_OPTION = {
    "mode", "distribute", "num_parallel_workers", "val_while_train", "dataset", "shuffle", "dataset_download",
    "drop_remainder",
    # how it runs
    "num_classes", "pretrained", "keep_checkpoint_max", "dataset_sink_mode", "loss_scale", "drop_overflow_update",
    "momentum", "use_nesterov",  # without effect on AdamW
}  # fmt: skip


def mindcv(o):
    """What MindCV's files and code say, as options of ours."""
    assert (o["loss"], o["scheduler"], o["amp_level"], o["loss_scale_type"]) == ("ce", "cosine_decay", "O3", "dynamic")
    assert o["warmup_epochs"] + o["decay_epochs"] == o["epoch_size"]  # the cosine takes what the warm-up leaves
    assert o["auto_augment"] is None and not o["clip_grad"] and not o["ema"] and not o["lr_epoch_stair"]
    (jitter,) = set(o["color_jitter"])
    return {
        "model.drop_rate": o["cls_dropout"],
        "model.proj_drop_rate": o["dropout"],
        "model.attn_drop_rate": o["attn_dropout"],
        "model.ffn_drop_rate": o["ffn_dropout"],
        "data.batch_size": o["batch_size"],
        "data.eval_batch_size": o["batch_size"],
        "data.resize": int(o["image_resize"] / o["crop_pct"]),
        "data.crop": o["image_resize"],
        "data.interpolation": o["interpolation"],
        "data.antialias": False,  # MindSpore's resizing is OpenCV's
        "data.colors": "rgb",
        "data.mean": o["mean"],
        "data.std": o["std"],
        "augment.crop": True,
        "augment.crop_scale": o["scale"],
        "augment.crop_ratio": o["ratio"],
        "augment.flip": o["hflip"],
        "augment.color_jitter": jitter,
        "augment.rand_augment": 0,
        "augment.rand_augment_magnitude": 9,
        "augment.erase": o["re_prob"],
        "augment.erase_scale": o["re_scale"],
        "augment.erase_ratio": o["re_ratio"],
        "sampler.size": o["image_resize"],
        "sampler.sizes": [],
        "optimizer.name": o["opt"],
        "optimizer.lr": o["lr"],
        "optimizer.betas": o["betas"],
        "optimizer.eps": o["eps"],
        "optimizer.weight_decay": o["weight_decay"],
        "optimizer.no_decay_1d": o["filter_bias_and_bn"],
        "optimizer.clip_grad": 0,
        "schedule.name": "cosine",
        "schedule.epochs": o["epoch_size"],
        "schedule.warmup_epochs": o["warmup_epochs"],
        "schedule.warmup_iterations": 0,
        "schedule.warmup_lr": o["warmup_factor"] * o["lr"],
        "schedule.min_lr": o["min_lr"],
        "schedule.update": "iteration",
        "schedule.cosine_after_warmup": True,
        "loss.label_smoothing": o["label_smoothing"],
        "loss.mixup_alpha": o["mixup"],
        "loss.cutmix_alpha": o["cutmix"],
        "loss.mix_probability": 1,
        "ema.enabled": False,
        "ema.warmup": True,  # as the next, without effect
        "ema.momentum": 5e-4,  # without effect where there is no average
        "run.amp": "auto",
    }
