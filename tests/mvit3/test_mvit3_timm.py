"""Options by timm's names: each is what it is here, or is refused with the reason; none is silently another thing."""

import pytest
import yaml

from mvit3.cli import _arrange, main
from mvit3.config import TrainConfig, section_options
from mvit3.options import UsageError
from mvit3.parser import Parser
from mvit3.timm_names import ALREADY, EVALUATION, OTHER, SAME, SHORT
from mvit3.timm_options import DERIVED, MEANINGS, TRAINING, TimmOptions

# A command line, and the options of ours that it is.
TRANSLATED = {
    "--data-dir images": {"data.root": "images"},
    "--train-split a": {"data.train": "a"},
    "--val-split b": {"data.val": "b"},
    "--dataset-download": {"data.download": True},
    "--dataset torch/cifar10": {"data.source": "torchvision", "data.name": "cifar10"},
    "--dataset hfds/cifar10": {"data.source": "huggingface", "data.name": "cifar10"},
    "--dataset folder": {"data.source": "folder"},
    "--model mobilevitv2_050": {"model.name": "mobilevitv2_050"},
    "-m mobilevitv2_050": {"model.name": "mobilevitv2_050"},
    "--num-classes 7": {"model.num_classes": 7},
    "--initial-checkpoint x.pt": {"model.pretrained": "x.pt", "model.drop_head": False},
    "--pretrained-path x.pt": {"model.pretrained": "x.pt", "model.drop_head": True},
    "--drop 0.3": {"model.drop_rate": 0.3},
    "--drop-path 0.1": {"model.drop_path_rate": 0.1},
    "-b 64": {"data.batch_size": 64},
    "-b64": {"data.batch_size": 64},
    "--batch-size=64": {"data.batch_size": 64},
    "--batch_size 64": {"data.batch_size": 64},
    "-vb 16": {"data.eval_batch_size": 16},
    "--validation-batch-size 16": {"data.eval_batch_size": 16},
    "-j 3": {"data.workers": 3},
    "--workers 3": {"data.workers": 3},
    "--channels-last": {"run.channels_last": True},
    "--grad-accum-steps 4": {"run.accumulate": 4},
    "--device cpu": {"run.device": "cpu"},
    "--sync-bn": {"run.sync_bn": True},
    "--seed 5": {"run.seed": 5},
    "--resume last.pt": {"run.resume": "last.pt"},
    "--log-interval 10": {"run.log_steps": 10},
    "--val-interval 2": {"run.eval_epochs": 2},
    "--recovery-interval 100": {"run.save_steps": 100},
    "--checkpoint-hist 3": {"run.keep_best": 3},
    "--torchcompile": {"run.compile": True},
    "--torchcompile inductor": {"run.compile": True},
    "--amp --amp-dtype bfloat16": {"run.amp": "bf16"},
    "--amp-dtype float16 --amp": {"run.amp": "fp16"},
    "--output runs/a": {"run.output": "runs/a"},
    "--output runs --experiment a": {"run.output": "runs/a"},
    "--experiment a": {"run.output": "output/train/a"},
    "--opt sgd": {"optimizer.name": "sgd"},
    "--opt-eps 1e-6": {"optimizer.eps": 1e-6},
    "--opt-betas 0.9 0.98": {"optimizer.betas": [0.9, 0.98]},
    "--momentum 0.8": {"optimizer.momentum": 0.8},
    "--weight-decay 0.05": {"optimizer.weight_decay": 0.05, "optimizer.no_decay_1d": True},
    "--clip-grad 1 --clip-mode norm": {"optimizer.clip_grad": 1},
    "--lr 0.1": {"optimizer.lr": 0.1, "optimizer.lr_rule": "constant"},
    "--sched step": {"schedule.name": "step"},
    "--sched-on-updates": {"schedule.update": "iteration"},
    "--epochs 10": {"schedule.epochs": 10},
    "--warmup-epochs 3": {"schedule.warmup_epochs": 3, "schedule.warmup_iterations": 0},
    "--warmup-lr 1e-5": {"schedule.warmup_lr": 1e-5},
    "--min-lr 1e-6": {"schedule.min_lr": 1e-6},
    "--decay-epochs 2.4": {"schedule.decay_epochs": 2.4},
    "--decay-rate 0.97": {"schedule.decay_rate": 0.97},
    "--sched step --dr 0.97": {"schedule.name": "step", "schedule.decay_rate": 0.97},
    "--sched poly --decay-rate 0.5": {"schedule.name": "poly", "schedule.power": 0.5},
    "--decay-milestones 30 60": {"schedule.decay_milestones": [29, 59]},
    "--scale 0.2 1": {"augment.crop_scale": [0.2, 1]},
    "--ratio 0.5 2": {"augment.crop_ratio": [0.5, 2]},
    "--hflip 0": {"augment.flip": 0},
    "--color-jitter 0.4": {"augment.color_jitter": 0.4},
    "--aa rand-m9-mstd0.5-inc1": {"augment.policy": "rand-m9-mstd0.5-inc1", "augment.rand_augment": 0},
    "--aa rand-m9 --color-jitter 0.4": {"augment.policy": "rand-m9", "augment.color_jitter": 0},
    "--aa 3a --color-jitter 0.4": {"augment.policy": "3a", "augment.color_jitter": 0.4},
    "--aug-repeats 3": {"sampler.aug_repeats": 3},
    "--aug-repeats 0": {"sampler.aug_repeats": 1},
    "--reprob 0.25 --remode const": {"augment.erase": 0.25, "augment.erase_scale": [0.02, 1 / 3]},
    "--mixup 0.2": {"loss.mixup_alpha": 0.2},
    "--cutmix 1.0": {"loss.cutmix_alpha": 1.0},
    "--mixup-prob 0.7": {"loss.mix_probability": 0.7},
    "--mixup-switch-prob 0.4": {"loss.switch_probability": 0.4},
    "--mixup-off-epoch 8": {"loss.mixup_off_epoch": 8},
    "--smoothing 0.2": {"loss.label_smoothing": 0.2},
    "--bce-loss --bce-sum --bce-target-thresh 0.2": {
        "loss.name": "bce", "loss.bce_sum": True, "loss.bce_target_thresh": 0.2,
    },
    "--model-ema": {"ema.enabled": True},
    "--model-ema --model-ema-decay 0.9998 --model-ema-warmup": {"ema.momentum": 0.0002, "ema.warmup": True},
    "--img-size 128": {"sampler.size": 128, "sampler.sizes": [], "data.crop": 128, "data.resize": 144},
    "--img-size 224 --crop-pct 0.875": {"sampler.size": 224, "data.crop": 224, "data.resize": 256},
    "--crop-pct 0.9": {"data.crop": 256, "data.resize": 284},
    "--input-size 3 128 128": {"sampler.size": 128, "data.crop": 128, "data.resize": 144},
    "--img-size 128 --data.resize 130": {"data.crop": 128, "data.resize": 130},
    "--mean 0.4 0.5 0.6": {"data.mean": [0.4, 0.5, 0.6]},
    "--std 0.5": {"data.std": [0.5, 0.5, 0.5]},
    "--interpolation bicubic --train-interpolation bicubic": {"data.interpolation": "bicubic"},
    "--kd-model-name resnet50 --task-loss-weight 0.3": {
        "distill.teacher": "resnet50", "distill.weight": 0.7, "distill.temperature": 4, "distill.kind": "soft",
    },
    "--kd-model-name resnet50 --kd-temperature 2 --distill-loss-weight 0.6 --task-loss-weight 0.4": {
        "distill.weight": 0.6, "distill.temperature": 2,
    },
    # Of ours too, with the same value; of one name twice the last counts.
    "--lr 0.001 --optimizer.lr 1e-3": {"optimizer.lr": 0.001},
    "-b 64 --batch-size 32": {"data.batch_size": 32},
    "--weight-decay 0.05 --optimizer.no_decay_1d false": {
        "optimizer.weight_decay": 0.05, "optimizer.no_decay_1d": False,
    },
}  # fmt: skip
# Values that are what is done anyway.
NOTHING = {f"--{name} {values[0]}" if values else f"--{name}" for name, (values, _) in ALREADY.items()}
REFUSED = {  # whatever the other options are
    "--lr 0.2 --optimizer.lr 0.1": "timm's --lr 0.2 is --optimizer.lr=0.2 here, which --optimizer.lr=0.1 contradicts",
    "--crop-pct 0.5 --data.resize 300": "timm's --crop-pct 0.5 is --data.resize=512 here, which",
    "--initial-checkpoint a --pretrained-path b": "a and --pretrained-path b contradict each other",
    "--img-size 128 --input-size 3 96 96": "contradict each other",
    "--input-size 1 96 96": "images have three channels and equal sides",
    "--img-size big": "an image size must be a whole number of pixels, got 'big'",
    "--crop-pct 1.5": "--crop-pct must be above 0 and at most 1, got 1.5",
    "--warmup-lr fast": "--warmup-lr must be a number, got 'fast'",
    "--model-ema-decay high": "--model-ema-decay must be a number, got 'high'",
    "--epochs": "--epochs: expected one argument",
    "--opt-betas --epochs 3": "--opt-betas: expected at least one argument",
    "--model-ema=1": "--model-ema takes no value, got '1'",
    "--reprob 0.25": "give that too",
    "--reprob 0.25 --remode pixel": "an erased rectangle is filled with the mean, which is --remode const",
    "--clip-mode agc": "timm's --clip-mode agc is not to be had here: gradients are clipped by their norm",
    "--vflip 0.5": "images are not turned upside down",
    "--dataset wds/x": "tar files are --data.source shards",
    "--amp-dtype bfloat16": "does nothing without --amp",
    "--amp --amp-dtype int8": "--amp-dtype must be float16 or bfloat16, got 'int8'",
    "--torchcompile eager": "takes PyTorch's own backend",
    "--log-wandb": "needs --wandb-project here",
    "--wandb-project p": "does nothing without --log-wandb",
    "--kd-model-name resnet50": "give --task-loss-weight 0.5 too",
    "--distill-loss-weight 1": "give --task-loss-weight too",
    "--task-loss-weight 1 --distill-loss-weight 1": "the weights of labels and teacher, 1 and 1, must make 1 here",
    "--interpolation bicubic": "give timm's --interpolation and --train-interpolation with one value",
    "--min-lr 1e-5 --optimizer.lr_rule linear": "optimizer.lr_rule linear scales schedule.min_lr with the batch",
    "--decay-milestones 30 --schedule.update iteration": "by the step decays a step early",
}
VALIDATED = {
    "-b 16": {"data.eval_batch_size": 16},
    "--split test": {"data.val": "test"},
    "--interpolation bicubic": {"data.interpolation": "bicubic"},
    "--img-size 64 --crop-pct 0.8": {"data.crop": 64, "data.resize": 80},
    "--mean 0.4 0.5 0.6": {"data.mean": [0.4, 0.5, 0.6]},
    "--data-dir images -j 2 --amp": {"data.root": "images", "data.workers": 2, "run.amp": "auto"},
}


@pytest.fixture(scope="module")
def parsers():
    return {name: Parser(name) for name in ("train", "evaluate")}


def translated(parser, arguments):
    """The default configuration with what a command line says, and what each option of timm became."""
    timm, sections = TimmOptions(parser.name), TrainConfig().to_dict()
    for word in _arrange(parser, arguments.split(), timm):
        option, _, value = word.removeprefix("--").partition("=")
        section, _, key = option.partition(".")
        if key:
            text = not isinstance(sections[section][key], str) and yaml.safe_load(value)
            number = isinstance(text, str)  # YAML reads 1e-5 as text
            sections[section][key] = float(value) if number else value if text is False and value != "false" else text
    timm.settle(sections)
    return {
        f"{section}.{key}": value for section, values in sections.items() for key, value in values.items()
    }, timm.lines


PLAIN = {
    f"{section}.{key}": value for section, values in TrainConfig().to_dict().items() for key, value in values.items()
}


@pytest.mark.parametrize("arguments", TRANSLATED)
def test_translated(parsers, arguments):
    """Into exactly these options; whatever else changes is said."""
    expected = TRANSLATED[arguments]
    found, lines = translated(parsers["train"], arguments)
    assert {option: found[option] for option in expected} == expected
    words = [part for line in lines for part in line.split()] + arguments.split()
    changed = {option for option, value in found.items() if value != PLAIN[option]}
    assert changed <= {word.removeprefix("--").partition("=")[0] for word in words}
    assert all(line.startswith("timm's -") and " is " in line for line in lines) and lines


@pytest.mark.parametrize("arguments", sorted(NOTHING))
def test_already(parsers, arguments):
    """What is done here anyway is accepted, and said."""
    found, lines = translated(parsers["train"], arguments)
    name = arguments.split()[0].removeprefix("--")
    assert found == PLAIN and lines == [f"timm's {arguments} is so already ({ALREADY[name][1]})"]


@pytest.mark.parametrize("arguments", REFUSED)
def test_refused(parsers, arguments):
    with pytest.raises(UsageError) as stop:
        translated(parsers["train"], arguments)
    assert REFUSED[arguments] in str(stop.value)


@pytest.mark.parametrize("name", sorted(OTHER))
def test_not_to_be_had(parsers, name):
    for command in {name in TRAINING: "train", name in EVALUATION: "evaluate"}.values():
        with pytest.raises(UsageError) as stop:
            translated(parsers[command], f"--{name} 1")
        assert name not in TRAINING & EVALUATION or str(stop.value).endswith(OTHER[name])


@pytest.mark.parametrize(("arguments", "expected"), VALIDATED.items())
def test_names_of_validate(parsers, arguments, expected):
    found, lines = translated(parsers["evaluate"], arguments)
    assert {option: found[option] for option in expected} == expected and lines


def test_every_name_is_tried():
    words = {word.partition("=")[0] for line in (*TRANSLATED, *NOTHING, *REFUSED, *VALIDATED) for word in line.split()}
    tried = {SHORT.get(word.lstrip("-"), word.lstrip("-")) for word in words}
    assert (set(SAME) | set(MEANINGS) | set(DERIVED) | set(ALREADY)) - {"use-ema"} <= tried
    ours = {f"{section}.{key}" for section, key, *_ in section_options()}
    assert set(SAME.values()) <= ours and not EVALUATION - TRAINING - {"split", "use-ema"}


def config(arguments, capsys, command="train"):
    """The configuration of a command line, and what was said."""
    assert main([command, *arguments.split(), "--print_config"]) == 0
    captured = capsys.readouterr()
    return yaml.safe_load(captured.out), captured.err


def test_over_recipes(capsys):
    """Wherever the options stand; a mean is in the order in which the network of the recipe reads colours."""
    found, said = config("--mean 0.1 0.2 0.3 --warmup-epochs 5 --config mobilevitv3_s --img-size 192 --lr 1e-4", capsys)
    assert found["data"]["mean"] == [0.3, 0.2, 0.1] and (found["data"]["crop"], found["data"]["resize"]) == (192, 216)
    assert (found["sampler"]["size"], found["sampler"]["sizes"]) == (192, [])
    assert (found["schedule"]["warmup_epochs"], found["schedule"]["warmup_iterations"]) == (5, 0)
    assert found["optimizer"]["lr"] == 1e-4
    assert said.splitlines() == [
        "timm's --warmup-epochs 5 is --schedule.warmup_epochs=5 --schedule.warmup_iterations=0",
        "timm's --lr 1e-4 is --optimizer.lr=1e-4 --optimizer.lr_rule=constant",
        "timm's --img-size 192 is --sampler.size=192 --sampler.sizes=[] --data.crop=192 --data.resize=216",
        "timm's --mean 0.1 0.2 0.3 is --data.mean=[0.3,0.2,0.1]",
    ]
    found, said = config("--epochs 3 --amp --amp-dtype bfloat16 --quiet", capsys, "finetune")
    assert (found["schedule"]["epochs"], found["optimizer"]["layer_decay"], found["run"]["amp"], said) == (
        3,
        0.8,
        "bf16",
        "",
    )


@pytest.mark.parametrize(("arguments", "message"), [
    ("--lr fast", "optimizer.lr must be a number, got 'fast'"),
    ("--sched plateau", "schedule.name must be one of cosine, step, multistep, poly, constant; got 'plateau'"),
    ("--opt sgdd", "optimizer.name must be one of"),
    ("--decay-milestones 0", "schedule.decay_milestones must be at least 0"),
    ("--img-size 128 --data.crop 64",
     "timm's --img-size 128 is --data.crop=128 here, which --data.crop=64 contradicts"),
    ("--use-ema", "there is no option '--use-ema'"),
])  # fmt: skip
def test_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["train", *arguments.split()])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and message in captured.err.splitlines()[-1] and captured.err.count("error") == 1


def test_the_average_of_validate(capsys):
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint=x", "--use-ema", "--weights=raw"])
    assert "timm's --use-ema is --weights=ema here, which --weights=raw contradicts" in capsys.readouterr().err
