"""Learning rate and moving average against the published definitions, written out here."""

import math

import pytest
import torch
from torch import nn

from mvit3.config import OptimizerConfig, ScheduleConfig, TrainConfig
from mvit3.ema import Ema
from mvit3.schedule import Schedule, rate_factor


def rates(config, peak, steps_per_epoch, factor=1.0):
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=factor * peak)
    schedule = Schedule(config, optimizer, steps_per_epoch, factor)
    found = []
    for step in range(config.epochs * steps_per_epoch):
        assert schedule.set(step) == optimizer.param_groups[0]["lr"]
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize(("warmup", "first", "last"), [(25, 2e-4, 2e-4), (37, 1e-6, 2e-4), (0, 1e-6, 0.0)])
def test_published_schedule(warmup, first, last):
    """ml-cvnets and the MobileViTv3 release: warm-up by the iteration, then a cosine by the epoch over all epochs."""
    epochs, per_epoch, peak = 8, 10, 2e-3
    config = ScheduleConfig(epochs=epochs, warmup_iterations=warmup, warmup_lr=first, min_lr=last, update="epoch")
    expected = []
    for iteration in range(epochs * per_epoch):
        if iteration < warmup:
            expected.append(first + iteration * (peak - first) / warmup)
        else:
            epoch = iteration // per_epoch
            expected.append(last + 0.5 * (peak - last) * (1 + math.cos(math.pi * epoch / epochs)))
    assert rates(config, peak, per_epoch) == pytest.approx(expected, rel=1e-9)


def test_cosine_by_the_step_after_warmup():
    """MindCV: some epochs of warm-up, the cosine over the others."""
    epochs, per_epoch, peak = 9, 7, 2e-3
    config = ScheduleConfig(
        epochs=epochs,
        warmup_iterations=0,
        warmup_epochs=2,
        warmup_lr=0.0,
        min_lr=2e-6,
        update="iteration",
        cosine_after_warmup=True,
    )
    warmup, total = 2 * per_epoch, epochs * per_epoch
    expected = [i * peak / warmup for i in range(warmup)]
    expected += [
        2e-6 + 0.5 * (peak - 2e-6) * (1 + math.cos(math.pi * i / (total - warmup))) for i in range(total - warmup)
    ]
    assert rates(config, peak, per_epoch) == pytest.approx(expected, rel=1e-9)


def test_warmup_longer_than_the_training():
    config = ScheduleConfig(
        epochs=2, warmup_iterations=100, warmup_lr=0.0, update="iteration", cosine_after_warmup=True
    )
    assert rates(config, 1.0, 5) == pytest.approx([i / 100 for i in range(10)])


def test_rate_follows_the_batch():
    linear = OptimizerConfig(lr=1e-3, lr_rule="linear", lr_batch=512)
    assert rate_factor(linear, 2048) == 4
    assert rate_factor(OptimizerConfig(lr_rule="sqrt", lr_batch=512), 2048) == 2
    assert rate_factor(OptimizerConfig(lr_rule="constant", lr_batch=512), 2048) == 1
    config = ScheduleConfig(epochs=2, warmup_iterations=2, warmup_lr=1e-4, min_lr=1e-5, update="iteration")
    once, thrice = rates(config, 1e-3, 4), rates(config, 1e-3, 4, factor=3.0)
    assert thrice == pytest.approx([3 * rate for rate in once])


def test_recipe_of_mobilevitv3_s():
    """300 epochs of 10 steps stand for those of ImageNet, so the warm-up of 3000 steps is all; without it the cosine
    passes its middle."""
    import yaml

    from mvit3 import recipes

    config = TrainConfig.from_dict(yaml.safe_load(recipes.path("mobilevitv3_s").read_text()))
    found = rates(config.schedule, config.optimizer.lr, 20)
    assert found[0] == pytest.approx(2e-4) and found[1500] == pytest.approx(1.1e-3)
    assert found[3000] == found[3019] == pytest.approx(2e-4 + 1.8e-3 * (1 + math.cos(math.pi / 2)) / 2)
    assert found[-1] == pytest.approx(2e-4 + 1.8e-3 * (1 + math.cos(math.pi * 299 / 300)) / 2)


def test_average_of_the_whole_state():
    """average = (1 - m) * average + m * network, for running statistics too; counters are truncated after each
    update."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3))
    momentum = 0.25
    ema = Ema(model, momentum)
    expected = {name: value.double().clone() for name, value in model.state_dict().items()}
    assert any(not value.is_floating_point() for value in model.state_dict().values())
    for _ in range(9):
        model(torch.randn(4, 2, 3, 3))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.1 * torch.randn_like(p)
        ema.update()
        for name, value in model.state_dict().items():
            expected[name] = (1 - momentum) * expected[name] + momentum * value.double()
            if not value.is_floating_point():
                expected[name] = expected[name].trunc()
    found = ema.module.state_dict()
    assert found.keys() == expected.keys() and found["1.num_batches_tracked"] == expected["1.num_batches_tracked"] == 6
    for name, value in expected.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-6, atol=1e-7)
    assert not ema.module.training and not any(p.requires_grad for p in ema.module.parameters())
