"""What training can be told: every option with its type, default, help text and bounds, in one place.

The command line is built from these classes (cli.py); a configuration is checked as soon as it exists, before any work.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated, get_args, get_type_hints

from .data.config import AugmentConfig, DataConfig, SamplerConfig
from .names import NETWORKS, OPTIMIZERS, task_of
from .options import Option, Section, UsageError, nearest, written


def check_output(folder: str, option: str = "run.output") -> None:
    """Raises UsageError where files cannot be written below `folder`, which need not exist yet."""
    existing = Path(folder).absolute()
    while not existing.exists():
        existing = existing.parent
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UsageError(f"{option} {folder}: {existing} is not a folder that can be written")


def _check_device(option: str, name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        close = nearest(name, ("auto", "cpu", "cuda"))
        raise UsageError(f"{option} must be auto, cpu, cuda or cuda:N; got {name!r}, the nearest is {close!r}")
    if name.startswith("cuda"):
        count = _gpus()
        if int(name[5:] or 0) >= count:
            present = ", ".join(["cpu", *(f"cuda:{i}" for i in range(count))])
            raise UsageError(f"{option} {name} does not exist here; there is {present}")


def _gpus() -> int:
    import torch  # takes a second, which only those wait who name a GPU

    return torch.cuda.device_count()


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # a module without a specification
        return False


AMP = ("none", "bf16", "fp16", "auto")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network."""

    name: Annotated[str, Option("network", NETWORKS)] = "mobilevitv3_s"
    num_classes: Annotated[
        int | None,
        Option("outputs, of detection with the background; null: as many as the data has classes", minimum=1),
    ] = None
    drop_rate: Annotated[
        float | None, Option("dropout before the classifier; null: as published", minimum=0, below=1)
    ] = None
    proj_drop_rate: Annotated[
        float | None, Option("dropout behind attention and feed-forward; null: as published", minimum=0, below=1)
    ] = None
    attn_drop_rate: Annotated[float, Option("dropout on attention probabilities", minimum=0, below=1)] = 0.0
    ffn_drop_rate: Annotated[float, Option("dropout inside the feed-forward network", minimum=0, below=1)] = 0.0
    drop_path_rate: Annotated[
        float,
        Option(
            "stochastic depth: share of images that leave out a branch of the last block; earlier blocks less",
            minimum=0,
            below=1,
        ),
    ] = 0.0
    pretrained: Annotated[str, Option("checkpoint whose weights training starts from; empty: fresh weights")] = ""
    drop_head: Annotated[bool, Option("keep the fresh classifier when pretrained is loaded, for other classes")] = False
    freeze_stages: Annotated[
        int,
        Option(
            "stages that stay as they are: the first so many of stem, layer_1 to layer_5, last convolution",
            minimum=0,
            below=8,
        ),
    ] = 0
    freeze_bn: Annotated[bool, Option("batch norms keep their running statistics and their parameters")] = False
    output_stride: Annotated[
        int | None,
        Option(
            "side of an image over that of the backbone's last map: 8, 16 or 32; null: 16 for segmentation, else 32"
        ),
    ] = None

    def __post_init__(self) -> None:
        super().__post_init__()
        task = task_of(self.name)
        possible = (None, 32) if task == "detection" else (None, 8, 16, 32)
        if self.output_stride not in possible:
            valid = ", ".join(map(written, possible))
            raise UsageError(f"model.output_stride of {self.name} must be one of {valid}; got {self.output_stride}")
        if task != "classification" and self.freeze_stages > 6:
            raise UsageError(
                f"model.freeze_stages of {self.name} must be at most 6, the stages of its backbone; got "
                f"{self.freeze_stages}"
            )


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update of the weights."""

    name: Annotated[str, Option("optimiser, as timm names it", OPTIMIZERS)] = "adamw"
    lr: Annotated[
        float, Option("peak of the learning rate, for the batch that lr_batch names", minimum=0, below=100)
    ] = 2e-3
    lr_rule: Annotated[
        str, Option("how lr, warmup_lr and min_lr grow with effective batch / lr_batch", ("constant", "linear", "sqrt"))
    ] = "constant"
    lr_batch: Annotated[
        int, Option("effective batch that lr is meant for, where lr_rule is not constant", minimum=1)
    ] = 1024
    momentum: Annotated[float, Option("of optimisers that have one; the others take betas", minimum=0, below=1)] = 0.9
    betas: Annotated[tuple[float, ...], Option("decay rates of the averages of Adam's kind", minimum=0, below=1)] = (
        0.9,
        0.999,
    )
    eps: Annotated[float, Option("added to the denominator of Adam's kind", minimum=0, below=1)] = 1e-8
    weight_decay: Annotated[float, Option("weight decay", minimum=0, below=100)] = 0.01
    no_decay_1d: Annotated[bool, Option("norms and biases do not decay")] = False
    clip_grad: Annotated[float, Option("largest norm of the gradient; 0: not clipped", minimum=0)] = 0.0
    head_lr_scale: Annotated[
        float,
        Option("learning rate of the classifier, or of the dense head, over that of the rest", minimum=0, below=1e4),
    ] = 1.0
    layer_decay: Annotated[
        float,
        Option(
            "factor of the learning rate from each stage to the one before; 1: all alike", minimum=1e-3, below=1.001
        ),
    ] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UsageError(f"optimizer.betas must be two numbers, got {list(self.betas)}; write them as [0.9,0.999]")


SCHEDULES = ("cosine", "step", "multistep", "poly", "constant")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The learning rate: a linear warm-up by the step, then a decay, half a cosine unless `name` says another.

    In step i of the warm-up's n steps it is warmup_lr + i / n * (lr - warmup_lr). After that, where t runs from 0 to 1
    over the training, by the step or by the epoch (`update`), from the first step or from the end of the warm-up on
    (`cosine_after_warmup`), and e is the number of epochs in that time, it is

    - cosine: min_lr + (lr - min_lr) * (1 + cos(pi * t)) / 2
    - poly: min_lr + (lr - min_lr) * (1 - t) ** power
    - step: lr * decay_rate ** floor(e / decay_epochs)
    - multistep: lr * decay_rate ** (how many of decay_milestones are at most e)
    - constant: lr
    """

    name: Annotated[str, Option("how the learning rate falls after the warm-up", SCHEDULES)] = "cosine"
    epochs: Annotated[int, Option("passes over the training images", minimum=1)] = 300
    warmup_iterations: Annotated[int, Option("steps of the warm-up", minimum=0)] = 3000
    warmup_epochs: Annotated[
        float, Option("length of the warm-up in epochs, in place of warmup_iterations", minimum=0)
    ] = 0.0
    shorten_warmup: Annotated[
        bool, Option("a warm-up as long as the training or longer becomes a tenth of the training")
    ] = False
    warmup_lr: Annotated[float, Option("learning rate of the first step", minimum=0, below=100)] = 2e-4
    min_lr: Annotated[float, Option("learning rate at the end of cosine and poly", minimum=0, below=100)] = 2e-4
    update: Annotated[str, Option("whether the decay moves by the step or by the epoch", ("iteration", "epoch"))] = (
        "epoch"
    )
    cosine_after_warmup: Annotated[bool, Option("the decay begins when the warm-up ends, not in the first step")] = (
        False
    )
    decay_epochs: Annotated[float, Option("step: epochs between two decays", minimum=1e-3)] = 30.0
    decay_rate: Annotated[float, Option("step, multistep: factor of each decay", minimum=0, below=1.001)] = 0.1
    decay_milestones: Annotated[tuple[int, ...], Option("multistep: epochs of the decays", minimum=0)] = (30, 60, 90)
    power: Annotated[float, Option("poly: exponent", minimum=0, below=100)] = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_iterations and self.warmup_epochs:
            raise UsageError(
                "schedule.warmup_iterations and schedule.warmup_epochs exclude each other: set one of them to 0"
            )
        if self.cosine_after_warmup and self.update == "epoch" and self.warmup_iterations:
            raise UsageError("schedule.cosine_after_warmup by the epoch needs the warm-up in schedule.warmup_epochs")


LOSSES = ("cross_entropy", "bce")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """The loss and what mixes the images of a batch."""

    name: Annotated[
        str, Option("of a classifier cross-entropy, or binary cross-entropy of every class by itself", LOSSES)
    ] = "cross_entropy"
    label_smoothing: Annotated[float, Option("share of the target spread over all classes", minimum=0, below=1)] = 0.1
    bce_target_thresh: Annotated[
        float | None,
        Option("bce: targets above it become 1, others 0; null: they stay as they are mixed", minimum=0, below=1),
    ] = None
    bce_sum: Annotated[bool, Option("bce: sum over the classes, not their mean")] = False
    class_weights: Annotated[
        tuple[float, ...], Option("weight of each class, in their order; none: all weigh 1", minimum=0)
    ] = ()
    class_balance: Annotated[
        float,
        Option(
            "weigh classes by (mean / own number of images) to this power; 0: not, 1: all classes alike",
            minimum=0,
            below=1.001,
        ),
    ] = 0.0
    auxiliary_weight: Annotated[
        float, Option("segmentation: of the auxiliary head's loss, where the network has one", minimum=0)
    ] = 0.4
    mixup_alpha: Annotated[float, Option("mixup: weights drawn from Beta(alpha, alpha); 0: no mixup", minimum=0)] = 0.0
    cutmix_alpha: Annotated[float, Option("cutmix: areas drawn from Beta(alpha, alpha); 0: no cutmix", minimum=0)] = 0.0
    mix_probability: Annotated[float, Option("of mixing a batch at all", minimum=0, below=1.001)] = 1.0
    switch_probability: Annotated[
        float, Option("of cutmix instead of mixup where both are on", minimum=0, below=1.001)
    ] = 0.5
    mixup_off_epoch: Annotated[
        int, Option("from this epoch on, counted from 0, nothing is mixed; 0: mixed to the end", minimum=0)
    ] = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.class_weights and self.class_balance:
            raise UsageError("loss.class_weights and loss.class_balance exclude each other")
        if self.class_weights and not any(self.class_weights):
            raise UsageError("loss.class_weights must have a weight above 0")


@dataclass(frozen=True, kw_only=True)
class DistillConfig(Section):
    """A teacher whose outputs are learnt beside the labels; it sees the images as the network does, mixed ones too.

    The loss is (1 - weight) * the loss of the labels + weight * that of the teacher: soft, temperature ** 2 times the
    Kullback-Leibler divergence of the outputs at that temperature (Hinton et al. 2015); hard, the cross-entropy with
    the teacher's first guess (Touvron et al. 2021).
    """

    teacher: Annotated[str, Option("checkpoint of mvit3, a network of timm or of this project; empty: no teacher")] = ""
    checkpoint: Annotated[
        str, Option("file with the weights of a teacher that is named; empty: those that timm fetches")
    ] = ""
    kind: Annotated[str, Option("learn the teacher's probabilities, or its first guess", ("soft", "hard"))] = "soft"
    weight: Annotated[float, Option("of the teacher in the loss; the labels have the rest", minimum=0, below=1.001)] = (
        0.5
    )
    temperature: Annotated[float, Option("soft: what logits are divided by", minimum=0.01, below=1000)] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.checkpoint and not self.teacher:
            raise UsageError("distill.checkpoint needs the name of the network in distill.teacher")


@dataclass(frozen=True, kw_only=True)
class DetectionConfig(Section):
    """Which boxes a detector's outputs become: of each class those above a score, the best of them, without those that
    overlap a better one.

    The defaults are the released ones of MobileViTv2 and MobileViTv3-w; those of MobileViTv1 and MobileViTv3-XXS, XS, S
    are score_threshold 0.05, candidates 0, per_class 200 and per_image 0.
    """

    score_threshold: Annotated[float, Option("probability that a box must exceed", minimum=0, below=1)] = 0.01
    iou_threshold: Annotated[
        float, Option("overlap with a better box of its class beyond which a box is dropped", minimum=0, below=1.001)
    ] = 0.5
    candidates: Annotated[int, Option("best boxes of a class that are compared at all; 0: all", minimum=0)] = 400
    per_class: Annotated[int, Option("best boxes of a class and image that are kept; 0: all", minimum=0)] = 0
    per_image: Annotated[int, Option("best boxes of an image that are kept; 0: all", minimum=0)] = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.iou_threshold <= 1:
            raise UsageError(f"detection.iou_threshold must be above 0 and at most 1, got {self.iou_threshold}")

    def limits(self) -> dict[str, float | int | None]:
        """The arguments of `mvit3_kernels.tasks.detections`."""
        return {
            "score_threshold": self.score_threshold,
            "iou_threshold": self.iou_threshold,
            "candidates": self.candidates or None,
            "per_class": self.per_class or None,
            "per_image": self.per_image or None,
        }


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    """Moving average of the whole state of the network: after each step, average = (1 - m) * average + m * network.

    m is momentum. With warmup it is (1 + i)^(-2/3) in step i where that is more, timm's warm-up: a short training is
    not averaged with the weights that it began with. The publications average without one.
    """

    enabled: Annotated[bool, Option("keep the average, evaluate it and save it")] = True
    momentum: Annotated[float, Option("share of the network in each update", minimum=0, below=1.001)] = 5e-4
    warmup: Annotated[bool, Option("the share begins at 1, as in timm, so that the initial weights are forgotten")] = (
        True
    )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where and how it runs; nothing here changes what is computed, but for precision, the seed and the batch."""

    output: Annotated[str, Option("folder for checkpoints, logs and the report")] = "runs/train"
    device: Annotated[
        str, Option("cpu, cuda or cuda:N; auto takes a GPU where there is one, under torchrun one for each process")
    ] = "auto"
    threads: Annotated[
        int, Option("CPU threads; 0: one for each physical core that this process may use", minimum=0)
    ] = 0
    ops: Annotated[str, Option("fused kernels, or plain PyTorch", ("fused", "reference"))] = "fused"
    seed: Annotated[int, Option("of weights, batches, augmentation, mixing, dropout", minimum=0, below=2**31)] = 0
    deterministic: Annotated[bool, Option("only operations whose result is the same each time; slower on a GPU")] = (
        False
    )
    amp: Annotated[
        str, Option("precision of autocast; fp16 scales the loss; auto: fp16 on a GPU, bf16 on a CPU", AMP)
    ] = "none"
    channels_last: Annotated[bool, Option("memory layout of images and filters, the one the fused ops work on")] = True
    compile: Annotated[bool, Option("torch.compile the network; the first steps take minutes")] = False
    cuda_graph: Annotated[bool, Option("replay the step as one CUDA graph; needs a GPU and one image size")] = False
    accumulate: Annotated[int, Option("batches whose gradients make one step", minimum=1)] = 1
    sync_bn: Annotated[bool, Option("batch norm over the batches of all processes (GPU)")] = False
    resume: Annotated[
        str, Option("auto: go on with the checkpoint in output, if any; never: start anew; or a checkpoint's path")
    ] = "auto"
    max_steps: Annotated[int, Option("stop after so many steps, as SIGTERM would; 0: no limit", minimum=0)] = 0
    save_epochs: Annotated[
        int, Option("keep a checkpoint of every so many epochs; 0: only the last two and the best", minimum=0)
    ] = 0
    save_steps: Annotated[
        int, Option("also save the last checkpoint every so many steps; 0: after each epoch", minimum=0)
    ] = 0
    keep_best: Annotated[
        int, Option("checkpoints of the best epochs to keep; beyond one they are best_NNNN.pt, by epoch", minimum=1)
    ] = 1
    eval_epochs: Annotated[int, Option("evaluate every so many epochs, and at the end", minimum=1)] = 1
    max_bad_steps: Annotated[
        int, Option("steps in a row with a loss or gradient that is not finite before it stops", minimum=1)
    ] = 20
    log_steps: Annotated[int, Option("steps between two records of the loss, and looks at it on a GPU", minimum=1)] = 50
    tensorboard: Annotated[bool, Option("write TensorBoard events into output")] = False
    wandb: Annotated[str, Option("project of Weights & Biases to log to, where wandb is installed; empty: none")] = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_device("run.device", self.device)
        if self.wandb and not _installed("wandb"):
            raise UsageError(
                f"run.wandb {self.wandb} needs Weights & Biases, which is not installed: pip install wandb"
            )
        needs_gpu = self.sync_bn or self.cuda_graph
        on_gpu = needs_gpu and (self.device.startswith("cuda") or (self.device == "auto" and _gpus() > 0))
        if self.sync_bn and not on_gpu:
            raise UsageError("run.sync_bn needs a GPU: PyTorch has no synchronised batch norm on the CPU")
        if self.cuda_graph and not on_gpu:
            raise UsageError("run.cuda_graph needs a GPU")
        if self.cuda_graph and self.accumulate > 1:
            raise UsageError("run.cuda_graph records one batch as one step: it excludes run.accumulate above 1")


# Options of dense prediction that another of its tasks alone looks at; no keys: the whole section.
OF_OTHER_TASK = {
    "segmentation": {"data": ("annotations",), "detection": ()},
    "detection": {"data": ("native_labels", "keep_aspect", "masks"), "loss": ("auxiliary_weight",)},
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that training can be told, in sections; the command line writes `--section.key value`, a YAML file nests
    them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    detection: DetectionConfig = field(default_factory=DetectionConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def __post_init__(self) -> None:
        task = task_of(self.model.name)
        if task == "classification":
            return
        for option, given in self._of_classifiers(task).items():
            if given:
                raise UsageError(
                    f"{option} is for classifiers, {self.model.name} is a network for {task}: leave it out"
                )
        self._check_of_other_task(task)

    def _of_classifiers(self, task: str) -> dict[str, bool]:
        """Options that a network for dense prediction cannot take, and whether they are given."""
        loss = self.loss
        return {
            "loss.mixup_alpha": loss.mixup_alpha > 0,
            "loss.cutmix_alpha": loss.cutmix_alpha > 0,
            f"loss.name {loss.name}": loss.name != "cross_entropy",
            "loss.class_balance": loss.class_balance > 0,
            "loss.class_weights": bool(loss.class_weights) and task == "detection",
            "distill.teacher": bool(self.distill.teacher),
        }

    def _check_of_other_task(self, task: str) -> None:
        """UsageError where an option has a value that dense prediction of this kind would not look at."""
        for name, keys in OF_OTHER_TASK[task].items():
            section = getattr(self, name)
            for f in fields(section):
                value = getattr(section, f.name)
                if f.name in (keys or (f.name,)) and value != f.default:
                    raise UsageError(
                        f"{name}.{f.name} has no meaning for {task}, got {written(value)}; leave it at "
                        f"{written(f.default)}"
                    )
        data = self.data
        if data.resize not in (data.crop, DataConfig.resize):
            raise UsageError(
                f"data.resize has no meaning for {task}, which sees the whole image at data.crop: set it to that, "
                f"{data.crop}, too; got {data.resize}"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, object]]) -> TrainConfig:
        """From nested plain values, as YAML files and checkpoints hold them; what is not there keeps its default.

        Raises:
            UsageError: an unknown name (the nearest is told) or an impossible value.
        """
        check_names(values)
        sections = {f.name: f.default_factory for f in fields(cls)}
        return cls(**{
            name: section(**{key: tuple(v) if isinstance(v, list) else v for key, v in values.get(name, {}).items()})
            for name, section in sections.items()
        })  # fmt: skip

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Nested plain values."""
        return {
            section: {key: list(v) if isinstance(v, tuple) else v for key, v in content.items()}
            for section, content in asdict(self).items()
        }


def section_options() -> Iterator[tuple[str, str, type, object, Option]]:
    """Section, key, type, default and `Option` of every option of training."""
    for section in fields(TrainConfig):
        hints = get_type_hints(section.default_factory, include_extras=True)
        for f in fields(section.default_factory):
            kind, option = get_args(hints[f.name])
            yield section.name, f.name, kind, f.default, option


def check_names(values: object) -> None:
    """Raises UsageError where nested plain values have a name that is no option of training; the nearest is told."""
    names: dict[str, list[str]] = {}
    for section, key, *_ in section_options():
        names.setdefault(section, []).append(key)
    if not isinstance(values, Mapping):
        raise UsageError(f"a configuration maps sections ({', '.join(names)}) to options, got {values!r}")
    for section, content in values.items():
        if section not in names:
            raise UsageError(f"there is no section {section!r}; the nearest is {nearest(str(section), names)!r}")
        if not isinstance(content, Mapping):
            raise UsageError(f"{section} must map options to values, got {content!r}")
        for key in content:
            if key not in names[section]:
                raise UsageError(
                    f"there is no option '{section}.{key}'; the nearest is "
                    f"'{section}.{nearest(str(key), names[section])}'"
                )
