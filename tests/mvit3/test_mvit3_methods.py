"""What users of timm, MindCV and ml-cvnets rely on: losses, class weights, teachers, frozen parts, rates by layer,
schedules, repeated augmentation, precision; each against its definition written out here."""

import copy
import math

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import mvit3_kernels
from mvit3 import checkpoint
from mvit3.config import (
    AugmentConfig,
    DistillConfig,
    LossConfig,
    OptimizerConfig,
    RunConfig,
    SamplerConfig,
    ScheduleConfig,
)
from mvit3.data import loaders
from mvit3.data.sampler import BatchSampler
from mvit3.distill import Teacher, open_teacher
from mvit3.distributed import World
from mvit3.errors import Failure, Stopped
from mvit3.loss import Criterion, class_weights
from mvit3.network import STAGES, build_model, train_mode
from mvit3.optimizer import build_optimizer
from mvit3.options import UsageError
from mvit3.progress import Listener
from mvit3.runtime import autocast, precision
from mvit3.schedule import Schedule
from mvit3.trainer import Trainer

from .conftest import small_config

CPU = torch.device("cpu")
FREE = {"model": {"drop_rate": 0.0, "proj_drop_rate": 0.0}}


def trainer(listener=None, **changes):
    config = small_config(**changes)
    return Trainer(config, loaders(config, seed=config.run.seed), World(CPU), listener)


def steps(one, count):
    one.config = copy.copy(one.config)
    object.__setattr__(
        one.config, "run", RunConfig(**{**one.config.run.__dict__, "max_steps": one.progress.step + count})
    )
    with pytest.raises(Stopped):
        one.train_epoch()


# Losses.


def test_binary_cross_entropy():
    """Each class by itself, targets smoothed or cut to 0 and 1, mean or sum over the classes."""
    logits, labels = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    targets = 0.9 * F.one_hot(labels, 4) + 0.1 / 4
    each = -(targets * logits.sigmoid().log() + (1 - targets) * (1 - logits.sigmoid()).log())
    torch.testing.assert_close(Criterion(LossConfig(name="bce"), 4)(logits, labels), each.mean())
    torch.testing.assert_close(Criterion(LossConfig(name="bce", bce_sum=True), 4)(logits, labels), each.sum(1).mean())
    cut = F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 4).float())
    torch.testing.assert_close(Criterion(LossConfig(name="bce", bce_target_thresh=0.2), 4)(logits, labels), cut)
    mixed = Criterion(LossConfig(name="bce", mixup_alpha=0.2, label_smoothing=0.1), 4)
    torch.testing.assert_close(mixed(logits, targets), each.mean())  # smoothed once


@pytest.mark.parametrize("name", ["cross_entropy", "bce"])
def test_class_weights(name):
    logits, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 0, 1])
    weights = (1.0, 3.0, 0.5)
    found = Criterion(LossConfig(name=name, class_weights=weights, label_smoothing=0.0), 3)(logits, labels)
    w = torch.tensor(weights)
    if name == "bce":
        expected = (
            F.binary_cross_entropy_with_logits(logits, F.one_hot(labels, 3).float(), reduction="none") * w
        ).mean()
    else:
        each = F.cross_entropy(logits, labels, reduction="none")
        expected = (each * w[labels]).sum() / w[labels].sum()
    torch.testing.assert_close(found, expected)


def test_balance():
    """To the power 1 each class weighs the same in all; the mean over the images is 1; a class without images weighs
    nothing."""
    labels = np.array([0] * 60 + [1] * 30 + [3] * 10)
    counts = torch.tensor([60.0, 30, 0, 10])
    weights = class_weights(LossConfig(class_balance=1.0), 4, labels)
    torch.testing.assert_close(weights * counts, torch.tensor([100 / 3, 100 / 3, 0, 100 / 3]))
    half = class_weights(LossConfig(class_balance=0.5), 4, labels)
    torch.testing.assert_close(half[1] / half[0], torch.tensor(2**0.5))
    torch.testing.assert_close((half * counts).sum() / 100, torch.tensor(1.0))
    assert class_weights(LossConfig(), 4, labels) is None
    one = trainer(loss={"class_balance": 1.0})
    counts = np.bincount(one.loaders.train.source.labels, minlength=10)
    assert np.ptp(one.criterion.weights.numpy() * counts) < 1e-4


@pytest.mark.parametrize(("options", "message"), [
    ({"class_weights": (1.0, 2.0)}, "loss.class_weights must be a number for each of the 10 classes, got 2"),
    ({"class_weights": (1.0,), "class_balance": 1.0}, "loss.class_weights and loss.class_balance exclude each other"),
    ({"class_weights": (0.0,) * 10}, "loss.class_weights must have a weight above 0"),
    ({"class_balance": 2.0}, "loss.class_balance must be at least 0"),
    ({"name": "bec"}, "loss.name must be one of cross_entropy, bce; got 'bec', the nearest is 'bce'"),
])  # fmt: skip
def test_impossible_losses(options, message):
    with pytest.raises(UsageError, match=message):
        trainer(loss=options)


def test_mixing_ends():
    """From the epoch that loss.mixup_off_epoch names: images stay, targets keep their shape and smoothing."""
    criterion = Criterion(LossConfig(mixup_alpha=1.0, cutmix_alpha=1.0, mixup_off_epoch=2, label_smoothing=0.1), 3)
    labels, images = torch.tensor([0, 1, 2, 0]), torch.rand(4, 3, 8, 8)
    for epoch, changed in ((0, True), (1, True), (2, False), (3, False)):
        criterion.begin_epoch(epoch)
        mixed, targets = criterion.mix(images.clone(), labels)
        assert torch.equal(mixed, images) != changed and targets.shape == (4, 3)
    torch.testing.assert_close(targets, 0.9 * F.one_hot(labels, 3) + 0.1 / 3)
    one = trainer(loss={"mixup_alpha": 1.0, "mixup_off_epoch": 1})
    one.train_epoch()
    assert one.criterion.mixup.mixup_enabled
    one.progress.epoch, one.progress.batch = 1, 0
    one.train_epoch()
    assert not one.criterion.mixup.mixup_enabled


# Teachers.


@pytest.mark.parametrize("kind", ["soft", "hard"])
@pytest.mark.parametrize("mixing", [0.0, 1.0])
def test_loss_of_a_teacher(kind, mixing):
    """(1 - weight) * labels + weight * teacher; the teacher sees the mixed images."""
    seen = []
    taught = torch.randn(4, 3)
    distill = DistillConfig(teacher="x", kind=kind, weight=0.3, temperature=2.0)
    loss = LossConfig(mixup_alpha=mixing)
    criterion = Criterion(loss, 3, distill=distill, teacher=lambda images: seen.append(images.clone()) or taught)
    labels, images, logits = torch.tensor([0, 1, 2, 0]), torch.rand(4, 3, 8, 8), torch.randn(4, 3)
    np.random.seed(0)  # noqa: NPY002 -- timm draws from it
    mixed, targets = criterion.mix(images.clone(), labels)
    assert torch.equal(seen[0], mixed) and targets.shape == (4, 6 if mixing else 4)
    plain = Criterion(loss, 3)
    np.random.seed(0)  # noqa: NPY002
    same, own = plain.mix(images.clone(), labels)
    assert torch.equal(same, mixed)
    p = (taught / 2).softmax(1)
    soft = 4 * (p * (p.log() - (logits / 2).log_softmax(1))).sum(1).mean()
    hard = F.cross_entropy(logits, taught.argmax(1))
    expected = 0.7 * plain(logits, own) + 0.3 * (soft if kind == "soft" else hard)
    torch.testing.assert_close(criterion(logits, targets), expected)


def test_a_teacher_reads_images_as_it_learnt_them():
    """From the student's BGR in [0, 1] to a teacher's normalised RGB, and back."""
    student = small_config(data={"colors": "bgr", "mean": [0.1, 0.2, 0.3], "std": [0.5, 0.6, 0.7]}).data
    identity = Teacher(nn.Identity(), student, "rgb", (0.4, 0.5, 0.6), (0.2, 0.25, 0.3), RunConfig(), CPU)
    rgb = torch.rand(2, 3, 4, 4)
    shape = (3, 1, 1)
    bgr = (rgb.flip(1) - torch.tensor(student.mean).view(shape)) / torch.tensor(student.std).view(shape)
    expected = (rgb - torch.tensor([0.4, 0.5, 0.6]).view(shape)) / torch.tensor([0.2, 0.25, 0.3]).view(shape)
    torch.testing.assert_close(identity(bgr), expected)
    same = Teacher(nn.Identity(), student, "bgr", student.mean, student.std, RunConfig(), CPU)
    assert torch.equal(same(bgr), bgr)


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory):
    """A checkpoint of a small run."""
    folder = tmp_path_factory.mktemp("teacher")
    one = trainer(run={"output": str(folder), "max_steps": 1})
    one.fit()
    return folder / "last.pt"


def test_a_checkpoint_teaches(teacher_file):
    """In training; the network learns its outputs where the labels weigh nothing."""
    one = trainer(distill={"teacher": str(teacher_file), "weight": 1.0}, **FREE)
    model = mvit3_kernels.create_model("mobilevitv3_xxs", 10).eval()
    content = checkpoint.load(teacher_file)
    model.load_state_dict(content[checkpoint.ENTRIES[checkpoint.better_weights(content)]])
    images, labels = next(iter(one.loaders.train.epoch(0)))
    _, targets = one.criterion.mix(images, labels)
    with torch.no_grad():
        torch.testing.assert_close(targets[:, 1:], model(images), rtol=1e-4, atol=1e-4)
    assert torch.equal(targets[:, 0].long(), labels)
    one.train_epoch()
    assert math.isfinite(one.last_loss) and not any(p.requires_grad for p in one.criterion.teacher.model.parameters())


def test_a_network_of_timm_teaches(tmp_path):
    """By its name, with the weights in a file; it reads its own mean and deviation."""
    model = timm.create_model("mobilevitv2_050", num_classes=10)
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    settings = small_config(distill={"teacher": "mobilevit_s.cvnets_in1k", "checkpoint": str(tmp_path / "weights.pth")})
    with pytest.raises(Failure, match=r"distill.teacher mobilevit_s.cvnets_in1k: its weights cannot be had"):
        open_teacher(settings, 10, (), CPU)
    timm_model = timm.create_model("resnet10t", num_classes=10).eval()
    torch.save(timm_model.state_dict(), tmp_path / "weights.pth")
    settings = small_config(distill={"teacher": "resnet10t", "checkpoint": str(tmp_path / "weights.pth")})
    teacher = open_teacher(settings, 10, (), CPU)
    images = torch.rand(2, 3, 32, 32)
    mean, std = (torch.tensor(timm_model.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), timm_model((images - mean) / std), rtol=1e-4, atol=1e-4)


def test_teachers_that_do_not_fit(teacher_file, tmp_path):
    for options, count, names, message in (
        (
            {"teacher": "resnet50q"},
            10,
            (),
            "must be a checkpoint of mvit3 or a network of timm, got 'resnet50q'; the nearest is 'resnet50",
        ),
        ({"teacher": "mobilevitv3_s"}, 10, (), "distill.teacher mobilevitv3_s needs its weights in distill.checkpoint"),
        ({"teacher": str(teacher_file)}, 5, (), "has 10 classes, the data 5"),
        (
            {"teacher": str(teacher_file)},
            10,
            tuple("abcdefghij"),
            "has other classes than the data: its '0' is 'a' there",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            open_teacher(small_config(distill=options), count, names, CPU)
    with pytest.raises(checkpoint.CheckpointError, match="no such file"):
        open_teacher(small_config(distill={"teacher": "nowhere.pt"}), 10, (), CPU)
    with pytest.raises(UsageError, match=r"distill.checkpoint needs the name of the network in distill.teacher"):
        DistillConfig(checkpoint="x.pt")


# Parts that stay, and rates by layer.


def test_frozen_stages():
    """Parameters and statistics stay bit by bit, nothing is dropped there; the rest learns."""
    one = trainer(model={"freeze_stages": 3, "drop_rate": 0.0, "proj_drop_rate": 0.0}, ema={"enabled": False})
    before = copy.deepcopy(one.model.state_dict())
    steps(one, 2)
    after = one.model.state_dict()
    frozen = STAGES[:3]
    for name, value in before.items():
        same = torch.equal(value, after[name])
        assert same if name.partition(".")[0] in frozen else not same or name.endswith("bias"), name
    assert len({id(p) for group in one.optimizer.param_groups for p in group["params"]}) == sum(
        p.requires_grad for p in one.model.parameters()
    )
    assert not one.model.layer_1.training and one.model.layer_3.training


def test_frozen_batch_norms():
    """Statistics and parameters of all batch norms stay, and the network computes with them; filters learn."""
    one = trainer(model={"freeze_bn": True, "drop_rate": 0.0, "proj_drop_rate": 0.0}, ema={"enabled": False})
    norms = {name for name, module in one.model.named_modules() if isinstance(module, nn.BatchNorm2d)}
    before = copy.deepcopy(one.model.state_dict())
    train_mode(one.model, one.config.model)
    images, _ = next(iter(one.loaders.train.epoch(0)))
    with torch.no_grad():
        expected = copy.deepcopy(one.model).eval()(images)
        torch.testing.assert_close(one.model(images), expected, rtol=1e-4, atol=1e-4)
    steps(one, 2)
    after = one.model.state_dict()
    assert norms and all(torch.equal(before[name], after[name]) for name in before if name.rpartition(".")[0] in norms)
    assert not torch.equal(before["conv_1.block.conv.weight"], after["conv_1.block.conv.weight"])


def test_everything_frozen_but_the_classifier():
    one = trainer(model={"freeze_stages": 7}, ema={"enabled": False})
    before = copy.deepcopy(one.model.state_dict())
    steps(one, 1)
    changed = {name for name, value in one.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"classifier.fc.weight", "classifier.fc.bias"}


def test_rates_by_layer():
    """layer_decay to the power of the distance from the classifier, the classifier times head_lr_scale, at every step
    of the schedule."""
    model = build_model(small_config(), 10, CPU)
    config = OptimizerConfig(lr=0.1, weight_decay=0.05, no_decay_1d=True, layer_decay=0.5, head_lr_scale=4.0)
    optimizer = build_optimizer(model, config, factor=2.0)
    schedule = Schedule(
        ScheduleConfig(epochs=4, warmup_iterations=2, warmup_lr=0.02, min_lr=0.0, update="iteration"), optimizer, 2, 1.0
    )
    for step, rate in ((0, 0.02), (1, 0.11), (4, 0.1)):
        assert schedule.set(step) == pytest.approx(rate)
        found = {id(p): group for group in optimizer.param_groups for p in group["params"]}
        assert len(found) == len(list(model.parameters()))
        for name, p in model.named_parameters():
            stage = STAGES.index(name.partition(".")[0])
            scale = 4.0 if stage == 7 else 0.5 ** (7 - stage)
            assert found[id(p)]["lr"] == pytest.approx(rate * scale), name
            assert found[id(p)]["weight_decay"] == (0.05 if p.ndim > 1 else 0.0)


def test_rates_by_layer_in_training(tmp_path):
    """What is recorded is the rate without a scale; a run goes on with the same rates."""
    changes = {"optimizer": {"layer_decay": 0.7, "head_lr_scale": 3.0}, "run": {"output": str(tmp_path)}}
    one = trainer(**changes)
    one.train_epoch()
    one.evaluate_epoch()
    assert one.progress.history[0]["lr"] == pytest.approx(one.schedule.rate) and one.schedule.rate > 1e-4
    again = trainer(**changes)
    again.load(checkpoint.load(tmp_path / "last.pt"))
    again.schedule.set(5), one.schedule.set(5)
    assert [group["lr"] for group in again.optimizer.param_groups] == [
        group["lr"] for group in one.optimizer.param_groups
    ]


# Schedules.


def rates(config, steps_per_epoch=4, peak=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    schedule = Schedule(config, optimizer, steps_per_epoch)
    return [schedule.set(step) for step in range(config.epochs * steps_per_epoch)], schedule.note


@pytest.mark.parametrize("update", ["epoch", "iteration"])
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["constant", "step", "multistep", "poly", "cosine"])
def test_schedules(name, after, update):
    """Written out, with a warm-up of one epoch."""
    options = {"decay_epochs": 2.0, "decay_rate": 0.1, "decay_milestones": (1, 4), "power": 2.0, "min_lr": 0.1}
    config = ScheduleConfig(
        name=name,
        epochs=6,
        warmup_iterations=0,
        warmup_epochs=1,
        warmup_lr=0.0,
        update=update,
        cosine_after_warmup=after,
        **options,
    )
    found, note = rates(config)
    expected = [step / 4 for step in range(4)]
    for step in range(4, 24):
        e = (step // 4 if update == "epoch" else step / 4) - after
        t = e / (6 - after)
        expected.append({
            "constant": 1.0,
            "step": 0.1 ** (e // 2),
            "multistep": 0.1 ** sum(e >= milestone for milestone in (1, 4)),
            "poly": 0.1 + 0.9 * (1 - t) ** 2,
            "cosine": 0.1 + 0.9 * (1 + math.cos(math.pi * t)) / 2,
        }[name])  # fmt: skip
    assert found == pytest.approx(expected) and not note


def test_a_warmup_longer_than_the_training_is_said():
    """And shortened only when asked."""
    config = dict(epochs=2, warmup_iterations=3000, warmup_lr=0.0, min_lr=0.0)
    found, note = rates(ScheduleConfig(**config))
    assert found == pytest.approx([step / 3000 for step in range(8)])
    assert note == (
        "the warm-up of 3000 steps is as long as the training of 8 or longer: the learning rate only rises, to 0.0023 "
        "of 1; set "
        "schedule.warmup_iterations or schedule.warmup_epochs, or --schedule.shorten_warmup true"
    )
    found, note = rates(ScheduleConfig(**config, shorten_warmup=True))
    assert found[1] == 1.0 and note.endswith("shortened to 1, as schedule.shorten_warmup asks")
    found, _ = rates(ScheduleConfig(**{**config, "epochs": 25}, shorten_warmup=True))
    assert found[:11] == pytest.approx([step / 10 for step in range(11)], rel=0.02)
    said = []
    listener = Listener()
    listener.say = said.append
    trainer(listener, schedule={"warmup_iterations": 8})
    assert any("the warm-up of 8 steps is as long as the training of 8 or longer" in text for text in said)
    said.clear()
    trainer(listener, schedule={"warmup_iterations": 7})
    assert not said


# Repeated augmentation, policies, precision.


def test_repeated_augmentation():
    """Each image of an epoch comes three times, with other randomness; the epoch stays as long; any number of processes
    sees the same."""

    def drawn(repeats, world=1, epoch=0):
        samplers = [
            BatchSampler(SamplerConfig(size=8, aug_repeats=repeats), 12 // world, 120, 0, rank, world)
            for rank in range(world)
        ]
        for sampler in samplers:
            sampler.epoch = epoch
        return [[sample for part in parts for sample in part] for parts in zip(*samplers, strict=True)]

    batches = drawn(3)
    indices = [index for batch in batches for index, *_ in batch]
    assert len(batches) == 10 and len(set(indices)) == 40 and all(indices.count(index) == 3 for index in set(indices))
    assert [position for batch in batches for *_, position in batch] == list(range(120))
    assert drawn(3, world=2) == batches
    assert {index for batch in drawn(3, epoch=1) for index, *_ in batch} != set(indices)
    assert len({index for batch in drawn(1) for index, *_ in batch}) == 120
    config = small_config(sampler={"aug_repeats": 2})
    labels = torch.cat([labels for _, labels in loaders(config).train.epoch(0)])
    assert torch.equal(labels[::2], labels[1::2])
    with pytest.raises(UsageError, match=r"sampler.aug_repeats must be at most the training images, 64, got 65"):
        loaders(small_config(sampler={"aug_repeats": 65}))


@pytest.mark.parametrize("policy", [
    "rand-m9-mstd0.5-inc1", "rand", "rand-m7-n3-p0.5-mmax10-tweights", "augmix-m5-w4-d2", "original-mstd0.5", "v0",
    "3a",
])  # fmt: skip
def test_policies_of_timm(policy):
    assert AugmentConfig(policy=policy).policy == policy


@pytest.mark.parametrize(("policy", "message"), [
    ("rnd-m9",
     "must be one of timm's, which begin with rand, augmix, .*; got 'rnd-m9', the nearest beginning is 'rand'"),
    ("randaug-m9", "the nearest beginning is 'rand'"),
    ("rand-m9-mst0.5", "'mst0.5' is no part of a policy 'rand'; its parts are m, n, p, mstd, mmax, inc, t"),
    ("rand-m9-mstd", "'mstd' is no part"),
    ("rand-m9-inc2", "'inc2' is no part"),
    ("rand-m9,n2", "'m9,n2' is no part"),
    ("rand-m9-", "'' is no part"),
    ("rand-m9-tweight", "'tweight' is no part"),
    ("augmix-m3-n2", "'n2' is no part of a policy 'augmix'"),
    ("original-m9", "'m9' is no part of a policy 'original'"),
])  # fmt: skip
def test_misspelt_policies(policy, message):
    """timm passes over most of them without a word."""
    with pytest.raises(UsageError, match=message):
        AugmentConfig(policy=policy)


def test_precision_of_the_releases():
    """fp16 with a scaled loss on a GPU, bf16 on a CPU."""
    auto = RunConfig(amp="auto")
    assert precision(auto, torch.device("cuda")) is torch.float16 and precision(auto, CPU) is torch.bfloat16
    assert precision(RunConfig(), CPU) is None
    with autocast(auto, CPU):
        assert torch.get_autocast_dtype("cpu") is torch.bfloat16 and torch.is_autocast_enabled("cpu")
    assert not trainer(run={"amp": "auto"}).scaler.is_enabled()
