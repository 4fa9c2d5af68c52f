"""What a command can be told: every option with its type, default, help text and bounds, in one place.

The command line is built from these classes (cli.py); a configuration is checked as soon as it exists, before any work.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Annotated

import torch
from timm.optim import list_optimizers

from mvit3_kernels import list_models

from .data import DATASETS, AugmentConfig, DataConfig, SamplerConfig
from .options import Option, Section, UsageError, nearest, options


def _check_device(option: str, name: str) -> None:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", name):
        close = nearest(name, ("auto", "cpu", "cuda"))
        raise UsageError(f"{option} must be auto, cpu, cuda or cuda:N; got {name!r}, the nearest is {close!r}")
    if name.startswith("cuda") and int(name[5:] or 0) >= torch.cuda.device_count():
        present = ", ".join(["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))])
        raise UsageError(f"{option} {name} does not exist here; there is {present}")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options that all commands share."""

    device: Annotated[str, Option("where to run: cpu, cuda or cuda:N; auto takes a GPU where there is one")] = "auto"
    threads: Annotated[int, Option("CPU threads; 0: one for each physical core that this process may use", minimum=0)] = 0

    def __post_init__(self) -> None:
        for (flag, _, _, option), f in zip(options(type(self)), fields(self), strict=True):
            option.check(flag, getattr(self, f.name))
        _check_device("--device", self.device)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Options):
    """Options of `mvit3 train`; the defaults are the demonstration on handwritten digits."""

    data: Annotated[str, Option("data set", tuple(DATASETS))] = "digits"
    model: Annotated[str, Option("network", list_models())] = "mobilevitv3_xxs"
    ops: Annotated[str, Option("fused ops, reference ops, or both from the same seed", ("fused", "reference", "both"))] = "both"
    epochs: Annotated[int, Option("passes over the training images", minimum=1)] = 20
    batch_size: Annotated[int, Option("images per step; a ragged last batch is left out", minimum=2)] = 64
    lr: Annotated[float, Option("peak of AdamW's learning rate: linear warm-up, then half a cosine", minimum=1e-7, below=1)] = 3e-3
    warmup_epochs: Annotated[float, Option("epochs of warm-up", minimum=0)] = 2.0
    weight_decay: Annotated[float, Option("decay of matrices and filters, not of norms and biases", minimum=0)] = 0.05
    label_smoothing: Annotated[float, Option("share of the target spread over all classes", minimum=0, below=1)] = 0.1
    drop_rate: Annotated[float, Option("dropout before the classifier; the short demo needs none", minimum=0, below=1)] = 0.0
    proj_drop_rate: Annotated[float, Option("dropout behind attention and feed-forward; the demo needs none", minimum=0, below=1)] = 0.0
    seed: Annotated[int, Option("of weights, batches, augmentation, dropout; the split is fixed", minimum=0, below=2**31)] = 0
    limit_train: Annotated[int, Option("use only so many training images; 0: all", minimum=0)] = 0
    output: Annotated[Path, Option("folder for checkpoints, curves.png and report.json")] = Path("runs/digits")

    def __post_init__(self) -> None:
        super().__post_init__()
        existing = self.output.absolute()
        while not existing.exists():
            existing = existing.parent
        if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
            raise UsageError(f"--output {self.output}: {existing} is not a folder that can be written")

    @property
    def runs(self) -> tuple[str, ...]:
        return ("reference", "fused") if self.ops == "both" else (self.ops,)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(Options):
    """Options of `mvit3 evaluate`."""

    checkpoint: Annotated[Path, Option("checkpoint that `mvit3 train` wrote")]
    data: Annotated[str, Option("data set, whose validation part is used", tuple(DATASETS))] = "digits"
    ops: Annotated[str, Option("trained: those of the checkpoint's training", ("trained", "fused", "reference"))] = "trained"


AMP = ("none", "bf16", "fp16")


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """The network."""

    name: Annotated[str, Option("network", list_models())] = "mobilevitv3_s"
    num_classes: Annotated[int | None, Option("outputs of the classifier; null: as many classes as the data has", minimum=1)] = None
    drop_rate: Annotated[float | None, Option("dropout before the classifier; null: as published", minimum=0, below=1)] = None
    proj_drop_rate: Annotated[float | None, Option("dropout behind attention and feed-forward; null: as published", minimum=0, below=1)] = (
        None
    )
    attn_drop_rate: Annotated[float, Option("dropout on attention probabilities", minimum=0, below=1)] = 0.0
    ffn_drop_rate: Annotated[float, Option("dropout inside the feed-forward network", minimum=0, below=1)] = 0.0
    pretrained: Annotated[str, Option("checkpoint whose weights training starts from; empty: fresh weights")] = ""
    drop_head: Annotated[bool, Option("keep the fresh classifier when pretrained is loaded, for other classes")] = False


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Section):
    """The update of the weights."""

    name: Annotated[str, Option("optimiser, as timm names it", list_optimizers())] = "adamw"
    lr: Annotated[float, Option("peak of the learning rate, for the batch that lr_batch names", minimum=0, below=100)] = 2e-3
    lr_rule: Annotated[str, Option("how lr, warmup_lr and min_lr grow with effective batch / lr_batch", ("constant", "linear", "sqrt"))] = (
        "constant"
    )
    lr_batch: Annotated[int, Option("effective batch that lr is meant for, where lr_rule is not constant", minimum=1)] = 1024
    momentum: Annotated[float, Option("of optimisers that have one; the others take betas", minimum=0, below=1)] = 0.9
    betas: Annotated[tuple[float, ...], Option("decay rates of the averages of Adam's kind", minimum=0, below=1)] = (0.9, 0.999)
    eps: Annotated[float, Option("added to the denominator of Adam's kind", minimum=0, below=1)] = 1e-8
    weight_decay: Annotated[float, Option("weight decay", minimum=0, below=100)] = 0.01
    no_decay_1d: Annotated[bool, Option("norms and biases do not decay")] = False
    clip_grad: Annotated[float, Option("largest norm of the gradient; 0: not clipped", minimum=0)] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.betas) != 2:
            raise UsageError(f"optimizer.betas must be two numbers, got {list(self.betas)}")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig(Section):
    """The learning rate: a linear warm-up by the step, then half a cosine.

    In step i of the warm-up's n steps it is warmup_lr + i / n * (lr - warmup_lr). After that it is
    min_lr + (lr - min_lr) * (1 + cos(pi * t)) / 2, where t runs from 0 to 1 over the training: by the step or by the epoch (`update`), from
    the first step or from the end of the warm-up on (`cosine_after_warmup`).
    """

    epochs: Annotated[int, Option("passes over the training images", minimum=1)] = 300
    warmup_iterations: Annotated[int, Option("steps of the warm-up", minimum=0)] = 3000
    warmup_epochs: Annotated[float, Option("length of the warm-up in epochs, in place of warmup_iterations", minimum=0)] = 0.0
    warmup_lr: Annotated[float, Option("learning rate of the first step", minimum=0, below=100)] = 2e-4
    min_lr: Annotated[float, Option("learning rate at the end of the cosine", minimum=0, below=100)] = 2e-4
    update: Annotated[str, Option("whether the cosine moves by the step or by the epoch", ("iteration", "epoch"))] = "epoch"
    cosine_after_warmup: Annotated[bool, Option("the cosine begins when the warm-up ends, not in the first step")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.warmup_iterations and self.warmup_epochs:
            raise UsageError("schedule.warmup_iterations and schedule.warmup_epochs exclude each other: set one of them to 0")
        if self.cosine_after_warmup and self.update == "epoch" and self.warmup_iterations:
            raise UsageError("schedule.cosine_after_warmup by the epoch needs the warm-up in schedule.warmup_epochs")


@dataclass(frozen=True, kw_only=True)
class LossConfig(Section):
    """Cross-entropy and what mixes the images of a batch."""

    label_smoothing: Annotated[float, Option("share of the target spread over all classes", minimum=0, below=1)] = 0.1
    mixup_alpha: Annotated[float, Option("mixup: weights drawn from Beta(alpha, alpha); 0: no mixup", minimum=0)] = 0.0
    cutmix_alpha: Annotated[float, Option("cutmix: areas drawn from Beta(alpha, alpha); 0: no cutmix", minimum=0)] = 0.0
    mix_probability: Annotated[float, Option("of mixing a batch at all", minimum=0, below=1.001)] = 1.0
    switch_probability: Annotated[float, Option("of cutmix instead of mixup where both are on", minimum=0, below=1.001)] = 0.5


@dataclass(frozen=True, kw_only=True)
class EmaConfig(Section):
    """Moving average of the whole state of the network: after each step, average = (1 - momentum) * average + momentum * network."""

    enabled: Annotated[bool, Option("keep the average, evaluate it and save it")] = True
    momentum: Annotated[float, Option("share of the network in each update", minimum=0, below=1.001)] = 5e-4


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """Where and how it runs; nothing here changes what is computed, but for precision, the seed and the batch."""

    output: Annotated[str, Option("folder for checkpoints, logs and the report")] = "runs/train"
    device: Annotated[str, Option("cpu, cuda or cuda:N; auto takes a GPU where there is one, under torchrun one for each process")] = "auto"
    threads: Annotated[int, Option("CPU threads; 0: one for each physical core that this process may use", minimum=0)] = 0
    ops: Annotated[str, Option("fused kernels, or plain PyTorch", ("fused", "reference"))] = "fused"
    seed: Annotated[int, Option("of weights, batches, augmentation, mixing, dropout", minimum=0, below=2**31)] = 0
    deterministic: Annotated[bool, Option("only operations whose result is the same each time; slower on a GPU")] = False
    amp: Annotated[str, Option("precision of autocast; fp16 scales the loss", AMP)] = "none"
    channels_last: Annotated[bool, Option("memory layout of images and filters, the one the fused ops work on")] = True
    compile: Annotated[bool, Option("torch.compile the network; the first steps take minutes")] = False
    cuda_graph: Annotated[bool, Option("replay the step as one CUDA graph; needs a GPU and one image size")] = False
    accumulate: Annotated[int, Option("batches whose gradients make one step", minimum=1)] = 1
    sync_bn: Annotated[bool, Option("batch norm over the batches of all processes (GPU)")] = False
    resume: Annotated[str, Option("auto: go on with the checkpoint in output, if any; never: start anew; or a checkpoint's path")] = "auto"
    max_steps: Annotated[int, Option("stop after so many steps, as SIGTERM would; 0: no limit", minimum=0)] = 0
    save_epochs: Annotated[int, Option("keep a checkpoint of every so many epochs; 0: only the last two and the best", minimum=0)] = 0
    save_steps: Annotated[int, Option("also save the last checkpoint every so many steps; 0: after each epoch", minimum=0)] = 0
    eval_epochs: Annotated[int, Option("evaluate every so many epochs, and at the end", minimum=1)] = 1
    max_bad_steps: Annotated[int, Option("steps in a row with a loss or gradient that is not finite before it stops", minimum=1)] = 20
    log_steps: Annotated[int, Option("steps between two records of the loss, and looks at it on a GPU", minimum=1)] = 50
    tensorboard: Annotated[bool, Option("write TensorBoard events into output")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_device("run.device", self.device)
        if self.sync_bn and self.device == "cpu":
            raise UsageError("run.sync_bn needs a GPU: PyTorch has no synchronised batch norm on the CPU")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that training can be told, in sections; the command line writes `--section.key value`, a YAML file nests them."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    @classmethod
    def from_dict(cls, values: Mapping[str, Mapping[str, object]]) -> TrainConfig:
        """From nested plain values, as YAML files and checkpoints hold them; what is not there keeps its default.

        Raises:
            UsageError: an unknown name (the nearest is told) or an impossible value.
        """
        sections = {f.name: f.default_factory for f in fields(cls)}
        for name, content in values.items():
            if name not in sections:
                raise UsageError(f"there is no section {name!r}; the nearest is {nearest(name, sections)!r}")
            known = [f.name for f in fields(sections[name])]
            for key in content:
                if key not in known:
                    raise UsageError(f"there is no option '{name}.{key}'; the nearest is '{name}.{nearest(key, known)}'")
        lists = {name: {key: tuple(v) if isinstance(v, list) else v for key, v in content.items()} for name, content in values.items()}
        return cls(**{name: section(**lists.get(name, {})) for name, section in sections.items()})

    def to_dict(self) -> dict[str, dict[str, object]]:
        """Nested plain values."""
        return asdict(self)
