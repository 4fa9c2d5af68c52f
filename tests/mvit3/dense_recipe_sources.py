"""What the publications say of training for dense prediction, as options of ours: see recipe_sources."""

from mvit3 import recipes

from .recipe_sources import (
    CVNETS_DEFAULTS,
    NO_ERASING,
    NO_MIXING,
    NO_OPTION,
    OPENCV,
    OURS,
    PIL,
    PIXELS,
    PUBLISHED,
)

XXS = {"model.classification.mit.dropout": 0.05, "model.classification.mit.mode": "xx_small_v3"}
XS = {"model.classification.mit.mode": "x_small_v3"}
SLOWER = {"scheduler.cosine.max_lr": 0.0009}
MOBILEVIT = {"model.classification.name": "mobilevit"}
MOBILEVIT_VOC = MOBILEVIT | {"dataset.train_batch_size0": 32, "dataset.val_batch_size0": 16}
MOBILEVIT_V2 = {"model.classification.name": "mobilevit_v2"}
ADE20K = {
    "dataset.name": "ade20k", "dataset.train_batch_size0": 4, "dataset.val_batch_size0": 4,
    "image_augmentation.random_crop.mask_fill": 0, "image_augmentation.random_rotate.mask_fill": 0,
    "loss.ignore_idx": -1, "optim.name": "sgd", "optim.weight_decay": 1e-4, "optim.sgd.momentum": 0.9,
    "optim.sgd.nesterov": False, "scheduler.max_epochs": 120, "scheduler.warmup_iterations": 0,
    "scheduler.cosine.max_lr": 0.02, "scheduler.cosine.min_lr": 2e-4, "model.segmentation.output_stride": 8,
}  # fmt: skip
RATES_8 = {"model.segmentation.deeplabv3.aspp_rates": [12, 24, 36]}

SSD, SSD_V2 = PUBLISHED["ssd_mobilevitv3_small_v3"], PUBLISHED["ssd_mobilevitv3_1.00"]
DEEPLAB, DEEPLAB_V2 = PUBLISHED["deeplabv3_mobilevitv3_small_v3"], PUBLISHED["deeplabv3_mobilevitv3_1.00"]
PSPNET = PUBLISHED["pspnet_mobilevitv3_1.00"]
# Recipe -> what its file says. The complete files of five recipes are in recipes.json; the others are those with
# these changes (golden/dense/DENSE.md, sections 4 and 7; ml-cvnets d38a116 and 0c0f798, config).
SOURCES = {
    "ssdlite_mobilevitv3_s_coco": SSD,
    "ssdlite_mobilevitv3_xs_coco": SSD | SLOWER | XS,
    "ssdlite_mobilevitv3_xxs_coco": SSD
    | SLOWER
    | XXS
    | {"dataset.train_batch_size0": 64, "dataset.val_batch_size0": 64},
    "ssdlite_mobilevit_s_coco": SSD | SLOWER | MOBILEVIT,
    "ssdlite_mobilevit_xs_coco": SSD | SLOWER | MOBILEVIT,
    "ssdlite_mobilevit_xxs_coco": SSD | SLOWER | XXS | MOBILEVIT,
    **{f"ssdlite_mobilevitv3_{width}_coco": SSD_V2 for width in ("100", "075", "050")},
    "ssdlite_mobilevitv2_100_coco": SSD_V2 | MOBILEVIT_V2,
    "deeplabv3_mobilevitv3_s_voc": DEEPLAB,
    "deeplabv3_mobilevitv3_xs_voc": DEEPLAB | XS,
    "deeplabv3_mobilevitv3_xxs_voc": DEEPLAB | XXS | {"dataset.train_batch_size0": 16, "dataset.val_batch_size0": 16},
    "deeplabv3_mobilevit_s_voc": DEEPLAB | MOBILEVIT_VOC,
    "deeplabv3_mobilevit_xs_voc": DEEPLAB | MOBILEVIT_VOC,
    "deeplabv3_mobilevit_xxs_voc": DEEPLAB | XXS | MOBILEVIT_VOC,
    **{f"deeplabv3_mobilevitv3_{width}_voc": DEEPLAB_V2 for width in ("100", "050")},
    "deeplabv3_mobilevitv2_100_voc": DEEPLAB_V2 | MOBILEVIT_V2,
    "pspnet_mobilevitv3_100_voc": PSPNET,
    "pspnet_mobilevitv2_100_voc": PSPNET | MOBILEVIT_V2,
    **{f"deeplabv3_mobilevitv3_{width}_ade20k": DEEPLAB_V2 | ADE20K | RATES_8 for width in ("100", "075", "050")},
    "deeplabv3_mobilevitv2_100_ade20k": DEEPLAB_V2 | ADE20K | RATES_8 | MOBILEVIT_V2,
    **{f"pspnet_mobilevitv3_{width}_ade20k": PSPNET | ADE20K for width in ("100", "075", "050")},
    "pspnet_mobilevitv2_100_ade20k": PSPNET | ADE20K | MOBILEVIT_V2,
}
DEFAULTS = CVNETS_DEFAULTS | {
    "image_augmentation.random_gaussian_noise.p": 0.5,
    "image_augmentation.photo_metric_distort.enable": True,  # detection has it whatever the file says
    "model.detection.ssd.top_k": 400,
}
EMBEDDED = {"digits_detection", "digits_segmentation"}


def is_v1(options):
    return "model.classification.mit.mode" in options


def training(o):
    """The part that says how it is trained."""
    assert o["sampler.name"] == "batch_sampler"
    said = {
        "data.batch_size": o["dataset.train_batch_size0"],
        "data.eval_batch_size": o["dataset.val_batch_size0"],
        "sampler.size": o.same("sampler.bs.crop_size_width", "sampler.bs.crop_size_height"),
        "augment.flip": o["image_augmentation.random_horizontal_flip.p"],
        "optimizer.lr": o["scheduler.cosine.max_lr"],
        "optimizer.weight_decay": o["optim.weight_decay"],
        "optimizer.no_decay_1d": o["optim.no_decay_bn_filter_bias"],
        "optimizer.clip_grad": o.get("common.grad_clip", 0),
        "schedule.name": o["scheduler.name"],
        "schedule.epochs": o["scheduler.max_epochs"],
        "schedule.warmup_iterations": o["scheduler.warmup_iterations"],
        "schedule.min_lr": o["scheduler.cosine.min_lr"],
        "schedule.update": "iteration" if o["scheduler.is_iteration_based"] else "epoch",
        "schedule.cosine_after_warmup": o["scheduler.cosine.after_warmup"],
        "ema.enabled": o["ema.enable"],
        "ema.momentum": o["ema.momentum"],
        "ema.warmup": o["ema.warmup"],
        "run.amp": "auto" if o["common.mixed_precision"] else "none",
        "run.accumulate": o["common.accum_freq"],
        "model.proj_drop_rate": o.get("model.classification.mit.dropout", 0),
        "model.attn_drop_rate": o.get("model.classification.mit.attn_dropout", 0),
        "model.ffn_drop_rate": o.get("model.classification.mit.ffn_dropout", 0),
    }
    if said["schedule.warmup_iterations"]:
        said["schedule.warmup_lr"] = o["scheduler.warmup_init_lr"]
    if o["optim.name"] == "sgd":
        assert not o["optim.sgd.nesterov"]
        return said | {"optimizer.name": "momentum", "optimizer.momentum": o["optim.sgd.momentum"]}
    betas = [o["optim.adamw.beta1"], o["optim.adamw.beta2"]]
    return said | {"optimizer.name": o["optim.name"], "optimizer.betas": betas, "optimizer.eps": o["optim.adamw.eps"]}


def validation_size(o, size):
    """The square that whole images become."""
    if "image_augmentation.resize.size" in o:
        assert o["image_augmentation.resize.enable"] and o["image_augmentation.resize.size"] == [size, size]
        return {"data.interpolation": o["image_augmentation.resize.interpolation"]}
    return {"data.interpolation": "bilinear"}


def detection(o):
    said = training(o)
    ratio, overlap = o["loss.detection.ssd_multibox_loss.neg_pos_ratio"], o["model.detection.ssd.nms_iou_threshold"]
    assert (ratio, o["dataset.name"], o["loss.detection.name"]) == (3, "coco_ssd", "ssd_multibox_loss")
    return said | validation_size(o, said["sampler.size"]) | {
        "augment.photometric": o["image_augmentation.photo_metric_distort.enable"],
        "detection.iou_threshold": overlap,
        "data.source": "coco",
    }  # fmt: skip


def segmentation(o):
    said = training(o) | {"augment.crop": o["image_augmentation.random_crop.enable"]}
    assert o["loss.segmentation.name"] == "cross_entropy" and o["image_augmentation.random_horizontal_flip.enable"]
    source = {"pascal": "voc", "ade20k": "ade20k"}[o["dataset.name"]]
    fill = o["image_augmentation.random_crop.mask_fill"]
    assert (o["loss.ignore_idx"], fill) == {"voc": (255, 255), "ade20k": (-1, 0)}[source]
    head = o["model.segmentation.seg_head"]
    key = {"deeplabv3": "aspp", "pspnet": "psp"}[head]
    said |= validation_size(o, said["sampler.size"]) | {
        "data.source": source,
        "model.output_stride": o["model.segmentation.output_stride"],
        "model.drop_rate": o[f"model.segmentation.{head}.{key}_dropout"],
        "optimizer.head_lr_scale": o["model.segmentation.lr_multiplier"],
        "loss.auxiliary_weight": o.get("loss.segmentation.cross_entropy.aux_weight", 0),
    }
    augmentation = "image_augmentation."
    if is_v1(o):
        assert o[augmentation + "random_resize.enable"] and o[augmentation + "random_crop.resize_if_needed"]
        sizes = [o[f"{augmentation}random_resize.{end}_size"] for end in ("min", "max")]
        return said | {"augment.style": "v1", "augment.short_side": sizes}
    short = augmentation + "random_short_size_resize."
    assert o[short + "enable"] and o[augmentation + "random_rotate.enable"] and o["model.segmentation.use_aux_head"]
    assert o[augmentation + "random_rotate.mask_fill"] == fill and o[augmentation + "random_crop.pad_if_needed"]
    assert o[short + "interpolation"] == said["data.interpolation"]
    return said | {
        "augment.style": "v2",
        "augment.short_side": [o[short + "short_side_min"], o[short + "short_side_max"]],
        "augment.long_side": o[short + "max_img_dim"],
        "augment.max_class_share": o[augmentation + "random_crop.seg_class_max_ratio"],
        "augment.rotate": o[augmentation + "random_rotate.angle"],
        "augment.photometric": o[augmentation + "photo_metric_distort.enable"],
        "augment.blur": o[augmentation + "random_gaussian_noise.enable"] * o[augmentation + "random_gaussian_noise.p"],
    }


NO_DENSE_OPTION = {*NO_OPTION} | {
    "common.accum_after_epoch",  # without effect where nothing is accumulated
    "dataset.pascal.use_coco_data",  # in the recipe's comment
    "model.classification.classifier_dropout",  # the classifier is not there
    "model.classification.pretrained",  # in the recipe's comment
    "model.segmentation.classifier_dropout",  # that of ASPP, 0.1 as well
}
# The network itself, its anchors and its targets, which golden values hold to the published ones.
NETWORK_PREFIXES = (
    "model.detection.ssd.", "model.detection.name", "anchor_generator.", "matcher.", "model.segmentation.",
    "model.layer.", "model.activation.", "model.classification.",
)  # fmt: skip

DATA = {
    "coco": {"data.root": "coco", "data.train": "train2017", "data.val": "val2017"},
    "voc": {"data.root": "VOCdevkit", "data.train": "trainaug", "data.val": "val"},
    "ade20k": {"data.root": "ADEChallengeData2016", "data.train": "training", "data.val": "validation"},
}
FAMILY = {
    True: OPENCV | {"data.interpolation": ("bilinear", "OpenCV's default")},
    False: PIL,
}
LIMITS = {  # golden/dense/DENSE.md, section 3
    True: {"score_threshold": 0.05, "candidates": 0, "per_class": 200, "per_image": 0},
    False: {"score_threshold": 0.01, "candidates": 400, "per_class": 0, "per_image": 200},
}


def ours(name, options):
    """Values that the sources do not state, or state elsewhere."""
    v1, task = is_v1(options), "detection" if name.startswith("ssdlite") else "segmentation"
    size = 320 if task == "detection" else 512
    values = {key: value for key, (value, _) in (OURS | PIXELS | NO_MIXING | NO_ERASING | FAMILY[v1]).items()}
    values |= {"loss.mix_probability": 1, "loss.label_smoothing": 0, "data.resize": size, "data.crop": size}
    values |= {"augment.style": "v1" if v1 else "v2", "sampler.sizes": [], "augment.crop": True, "sampler.shrink": True}
    values |= {"augment.crop_scale": [0.08, 1], "augment.crop_ratio": [3 / 4, 4 / 3], "model.drop_rate": 0}
    values |= DATA[name.rpartition("_")[2]]
    if task == "detection":
        values |= {f"detection.{key}": value for key, value in LIMITS[v1].items()}
    return values


def names():
    return [name for name in recipes.names() if name.startswith(("ssdlite_", "deeplabv3_", "pspnet_"))]
