"""The names that timm's train.py and validate.py have for options, by what becomes of them here (timm_options.py).

Source: github.com/huggingface/pytorch-image-models at aa4b585.
"""

SHORT = {"b": "batch-size", "vb": "validation-batch-size", "j": "workers", "m": "model", "dr": "decay-rate"}

_FLAGS = """
amp bce-loss bce-sum channels-last dataset-download log-wandb model-ema model-ema-warmup no-ddp-bb pin-mem
sched-on-updates sync-bn use-ema use-multi-epochs-loader
"""
FLAGS = frozenset(_FLAGS.split())
LISTS = frozenset(("decay-milestones", "input-size", "mean", "opt-betas", "ratio", "scale", "std"))

# timm's name: the option here that takes the same value. A flag sets it to true.
SAME = {
    "data-dir": "data.root",
    "train-split": "data.train",
    "val-split": "data.val",
    "dataset-download": "data.download",
    "model": "model.name",
    "num-classes": "model.num_classes",
    "drop": "model.drop_rate",
    "drop-path": "model.drop_path_rate",
    "batch-size": "data.batch_size",
    "validation-batch-size": "data.eval_batch_size",
    "workers": "data.workers",
    "channels-last": "run.channels_last",
    "grad-accum-steps": "run.accumulate",
    "device": "run.device",
    "seed": "run.seed",
    "resume": "run.resume",
    "sync-bn": "run.sync_bn",
    "log-interval": "run.log_steps",
    "val-interval": "run.eval_epochs",
    "recovery-interval": "run.save_steps",
    "checkpoint-hist": "run.keep_best",
    "opt": "optimizer.name",
    "opt-eps": "optimizer.eps",
    "opt-betas": "optimizer.betas",
    "momentum": "optimizer.momentum",
    "clip-grad": "optimizer.clip_grad",
    "sched": "schedule.name",
    "epochs": "schedule.epochs",
    "decay-epochs": "schedule.decay_epochs",
    "scale": "augment.crop_scale",
    "ratio": "augment.crop_ratio",
    "hflip": "augment.flip",
    "mixup": "loss.mixup_alpha",
    "cutmix": "loss.cutmix_alpha",
    "mixup-prob": "loss.mix_probability",
    "mixup-switch-prob": "loss.switch_probability",
    "mixup-off-epoch": "loss.mixup_off_epoch",
    "smoothing": "loss.label_smoothing",
    "bce-sum": "loss.bce_sum",
    "bce-target-thresh": "loss.bce_target_thresh",
    "model-ema": "ema.enabled",
    "model-ema-warmup": "ema.warmup",
    "kd-temperature": "distill.temperature",
}

# timm's name: values that name what is done here anyway, and what that is.
ALREADY = {
    "aug-splits": (("0",), "a batch is not split"),
    "clip-mode": (("norm",), "gradients are clipped by their norm"),
    "cooldown-epochs": (("0",), "training ends when the decay does"),
    "dist-bn": (("broadcast",), "the first process's running statistics are evaluated and saved"),
    "epoch-repeats": (("0", "0.0", "0."), "an epoch takes each image once"),
    "eval-metric": (("top1",), "the best epoch is that of the highest accuracy"),
    "gp": (("avg", "fast"), "the networks pool by the mean"),
    "in-chans": (("3",), "images have three channels"),
    "input-img-mode": (("RGB",), "images are read as RGB"),
    "kd-distill-type": (("logit",), "a teacher's logits are what is learnt"),
    "kd-loss-type": (("kl",), "distill.kind soft is the Kullback-Leibler divergence"),
    "lr-cycle-limit": (("1",), "the learning rate falls once"),
    "lr-k-decay": (("1", "1.0", "1."), "the decay is not bent"),
    "mixup-mode": (("batch",), "a batch is mixed in one way"),
    "model-dtype": (("float32",), "weights are float32"),
    "no-ddp-bb": ((), "running statistics are not broadcast in each step"),
    "pin-mem": ((), "memory is pinned where there is a GPU"),
    "recount": (("1",), "one rectangle is erased"),
    "train-crop-mode": (("rrc",), "crops are random in place, area and ratio, and resized"),
    "tta": (("0",), "an image is seen once"),
    "use-multi-epochs-loader": ((), "loading processes live as long as the run"),
    "vflip": (("0", "0.0", "0."), "images are not turned upside down"),
    "worker-seeding": (("all",), "each image has random numbers of its own"),
}

_NO_NOISE = "the learning rate has neither noise nor cycles"
_BASE = "timm scales the peak alone, --optimizer.lr_rule scales warmup_lr and min_lr with it, for --optimizer.lr_batch"
_NO_PART = "there is no such part in these networks"
_FEATURES = "a teacher's logits are learnt, not its features: --distill.teacher"
_SIZES = "--sampler.sizes draws one size per batch, and --sampler.shrink says how many images it then holds"
_SEQUENCES = "these networks read maps, not sequences"
OTHER = {
    "aot-autograd": "--run.compile true compiles the network",
    "bce-pos-weight": "--loss.class_weights weighs classes, their positives and negatives alike",
    "bn-eps": "batch norms are the published ones",
    "bn-momentum": "batch norms are the published ones",
    "class-map": "classes of folders are their names in order; --data.class_map names the classes of shards",
    "color-jitter-prob": "--augment.color_jitter changes every image",
    "crop-border-pixels": "--data.resize and --data.crop say what validation sees",
    "crop-mode": "validation sees the centre: --data.resize and --data.crop",
    "cutmix-minmax": "--loss.cutmix_alpha draws the area",
    "dataset-trust-remote-code": "code of a data set is not run",
    "device-modules": "--run.device is cpu or cuda",
    "drop-block": _NO_PART,
    "drop-connect": "timm itself has --drop-path in its place, which is --model.drop_path_rate",
    "fast-norm": "norms are fused with what follows them; --run.ops reference computes them in plain PyTorch",
    "fuser": "--run.compile true compiles the network",
    "gaussian-blur-prob": "there is no such augmentation here",
    "grad-checkpointing": "the fused ops keep little for the backward pass; --run.accumulate allows smaller batches",
    "grayscale-prob": "there is no such augmentation here",
    "head-init-bias": "the classifier begins as published",
    "head-init-scale": "the classifier begins as published",
    "input-key": "images and labels of a data set of Hugging Face are found by their types",
    "jsd-loss": "--loss.name is cross_entropy or bce",
    "kd-student-feature-dim": _FEATURES,
    "kd-teacher-feature-dim": _FEATURES,
    "kd-token-distill-type": _FEATURES,
    "layer-decay": "timm's goes from block to block, --optimizer.layer_decay from stage to stage",
    "layer-decay-min-scale": "--optimizer.layer_decay goes from stage to stage, without a limit",
    "layer-decay-no-opt-scale": "--model.freeze_stages keeps stages as they are",
    "local-rank": "torchrun tells a process its number",
    "log-freq": "a bar shows how far an evaluation is",
    "lr-base": _BASE,
    "lr-base-scale": _BASE,
    "lr-base-size": _BASE,
    "lr-cycle-decay": _NO_NOISE,
    "lr-cycle-mul": _NO_NOISE,
    "lr-noise": _NO_NOISE,
    "lr-noise-pct": _NO_NOISE,
    "lr-noise-std": _NO_NOISE,
    "metrics-avg": "accuracy is that of all images; --per_class shows classes",
    "model-ema-force-cpu": "the average is kept on the device of the network",
    "model-kwargs": "--model.* has what these networks can be told",
    "no-aug": "timm then crops the centre of the resized image, --augment.crop false sees it as validation does; "
    "--augment.flip 0 and the others end the rest",
    "no-prefetcher": "there is none to switch off",
    "no-resume-opt": "--model.pretrained FILE begins with the weights alone",
    "num-gpu": "torchrun starts a process for each GPU",
    "num-samples": "--data.limit_val takes a part of the images",
    "opt-kwargs": "--optimizer.* has what an optimiser can be told",
    "patience-epochs": "there is no schedule that waits for a plateau",
    "pretrained": "no weights are shipped; --model.pretrained FILE begins with those of a file",
    "real-labels": "images are judged by the labels that they come with",
    "reparam": _NO_PART,
    "resplit": "a batch is not split",
    "results-file": "--json and --csv write the result to stdout",
    "results-format": "--json and --csv write the result to stdout",
    "retry": "--data.eval_batch_size says how many images are evaluated at once",
    "save-images": "report.html shows images with predictions",
    "split-bn": "a batch is not split",
    "start-epoch": "a run goes on where its checkpoint is: --run.resume",
    "synchronize-step": "a GPU is waited for where the loss is read: --run.log_steps",
    "target-key": "images and labels of a data set of Hugging Face are found by their types",
    "test-pool": "--data.crop says what validation sees",
    "tf-preprocessing": "--data.* says how images are read",
    "torchcompile-mode": "--run.compile true takes PyTorch's own mode",
    "torchscript": "--run.compile true compiles the network",
    "train-batch-sizes": _SIZES,
    "train-batches-per-epoch": "an epoch is as long as the training images; --data.limit_train takes a part of them",
    "train-img-sizes": _SIZES,
    "train-num-samples": "shards are indexed, so their number is known; --data.limit_train takes a part",
    "train-size-probs": _SIZES,
    "train-size-random-mix": _SIZES,
    "train-size-schedule": _SIZES,
    "train-size-schedule-spread": _SIZES,
    "train-steps-per-epoch": "an epoch is as long as the training images; --data.limit_train takes a part of them",
    "use-train-size": "--data.crop says what validation sees",
    "val-num-samples": "shards are indexed, so their number is known; --data.limit_val takes a part",
    "valid-labels": "an evaluation maps classes by their names",
    "variable-batch-loss-scale": "the loss is the mean over the images of a step",
    "naflex-loader": _SEQUENCES,
    "naflex-loss-scale": _SEQUENCES,
    "naflex-max-seq-len": _SEQUENCES,
    "naflex-patch-size-probs": _SEQUENCES,
    "naflex-patch-sizes": _SEQUENCES,
    "naflex-patchify-channels-first": _SEQUENCES,
    "naflex-train-seq-lens": _SEQUENCES,
    "wandb-resume-id": "a run that goes on logs to a new run of Weights & Biases",
    "wandb-tags": "--run.wandb names the project alone",
    "warmup-prefix": "timm adds the warm-up to --epochs; --schedule.cosine_after_warmup true begins the decay behind "
    "it but adds nothing",
}  # fmt: skip

# The names of validate.py, and what is another option here than in training.
_EVALUATION = """
amp-dtype aot-autograd batch-size channels-last class-map crop-border-pixels crop-mode crop-pct data-dir dataset
dataset-download dataset-trust-remote-code device fast-norm fuser gp img-size in-chans input-img-mode input-key
input-size interpolation log-freq mean metrics-avg model model-dtype model-kwargs no-prefetcher num-classes num-gpu
num-samples pin-mem pretrained real-labels reparam results-file results-format retry seed split std target-key
test-pool tf-preprocessing torchcompile-mode torchscript use-ema use-train-size valid-labels workers
"""
EVALUATION = frozenset(_EVALUATION.split())
IN_EVALUATION = {"batch-size": "data.eval_batch_size", "split": "data.val", "interpolation": "data.interpolation"}
