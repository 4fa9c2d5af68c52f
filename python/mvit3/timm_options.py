"""Options by the names that timm's train.py and validate.py give them.

Where the meaning is the same here an option is translated, and what it became is printed. Where it is not, it is
refused with the reason: an option never means silently something else than in timm.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation

from .options import UsageError, written
from .timm_names import ALREADY, EVALUATION, FLAGS, IN_EVALUATION, LISTS, OTHER, SAME, SHORT


@dataclass
class Given:
    """Options of timm on a command line: values by name, and each name as it was typed. Of a name that comes twice
    the last counts, as in timm."""

    values: dict[str, list[str]] = field(default_factory=dict)
    typed: dict[str, str] = field(default_factory=dict)

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def text(self, name: str) -> str:
        """The option as it was typed, with its value."""
        return " ".join((self.typed[name], *self.values[name]))

    def value(self, name: str) -> str:
        return self.values[name][0]

    def number(self, name: str, place: int = 0) -> float:
        try:
            return float(self.values[name][place])
        except ValueError:
            raise UsageError(f"{self.typed[name]} must be a number, got {self.values[name][place]!r}") from None


@dataclass(frozen=True)
class Meaning:
    """What an option of timm is here: options with their values, and `implied` ones, which give way to what the
    command line says of them."""

    options: Mapping[str, str]
    implied: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


def _lr(given: Given) -> Meaning:
    return Meaning({"optimizer.lr": given.value("lr")}, {"optimizer.lr_rule": "constant"})


def _weight_decay(given: Given) -> Meaning:
    return Meaning({"optimizer.weight_decay": given.value("weight-decay")}, {"optimizer.no_decay_1d": "true"})


def _warmup_epochs(given: Given) -> Meaning:
    return Meaning({"schedule.warmup_epochs": given.value("warmup-epochs")}, {"schedule.warmup_iterations": "0"})


def _sched_on_updates(given: Given) -> Meaning:
    return Meaning({"schedule.update": "iteration"})


def _dataset(given: Given) -> Meaning:
    kind, _, name = given.value("dataset").partition("/")
    if not name:
        if kind in ("", "folder", "image_folder"):
            return Meaning({"data.source": "folder"})
    elif kind.lower() == "torch":
        return Meaning({"data.source": "torchvision", "data.name": name})
    elif kind.lower() == "hfds":
        return Meaning({"data.source": "huggingface", "data.name": name})
    raise UsageError(
        f"timm's {given.text('dataset')} is not to be had here; torch/NAME is --data.source torchvision --data.name "
        "NAME, hfds/NAME --data.source huggingface, and tar files are --data.source shards"
    )


def _initial_checkpoint(given: Given) -> Meaning:
    return Meaning({"model.pretrained": given.value("initial-checkpoint"), "model.drop_head": "false"})


def _pretrained_path(given: Given) -> Meaning:
    return Meaning({"model.pretrained": given.value("pretrained-path"), "model.drop_head": "true"})


def _torchcompile(given: Given) -> Meaning:
    if given.values["torchcompile"] not in ([], ["inductor"]):
        raise UsageError(
            f"timm's {given.text('torchcompile')}: --run.compile true takes PyTorch's own backend, inductor"
        )
    return Meaning({"run.compile": "true"})


def _amp_dtype(given: Given) -> Meaning:
    kinds = {"float16": "fp16", "bfloat16": "bf16"}
    if given.value("amp-dtype") not in kinds:
        raise UsageError(f"{given.typed['amp-dtype']} must be float16 or bfloat16, got {given.value('amp-dtype')!r}")
    if "amp" not in given:
        raise UsageError(f"timm's {given.text('amp-dtype')} does nothing without --amp; --run.amp bf16 or fp16 is both")
    return Meaning({"run.amp": kinds[given.value("amp-dtype")]})


def _aa(given: Given) -> Meaning:
    policy = given.value("aa")
    implied = {"augment.rand_augment": "0"} | ({} if "3a" in policy else {"augment.color_jitter": "0"})
    return Meaning({"augment.policy": policy}, implied)


def _color_jitter(given: Given) -> Meaning:
    if "aa" in given and "3a" not in given.value("aa"):
        return Meaning({"augment.color_jitter": "0"}, note="timm leaves it out beside --aa")
    return Meaning({"augment.color_jitter": given.value("color-jitter")})


def _reprob(given: Given) -> Meaning:
    if given.number("reprob") and "remode" not in given:
        raise UsageError(
            f"timm's {given.text('reprob')} fills rectangles with noise; here they are filled with the mean, which is "
            "timm's --remode const: give that too"
        )
    area = {"augment.erase_scale": f"[0.02,{1 / 3}]", "augment.erase_ratio": f"[0.3,{1 / 0.3}]"}
    return Meaning({"augment.erase": given.value("reprob")}, area)


def _remode(given: Given) -> Meaning:
    if given.value("remode") != "const":
        raise UsageError(
            f"timm's {given.text('remode')}: an erased rectangle is filled with the mean, which is --remode const"
        )
    return Meaning({}, note="rectangles are filled with the mean")


def _aug_repeats(given: Given) -> Meaning:
    return Meaning({"sampler.aug_repeats": f"{max(given.number('aug-repeats'), 1):g}"})


def _bce_loss(given: Given) -> Meaning:
    return Meaning({"loss.name": "bce"})


def _model_ema_decay(given: Given) -> Meaning:
    try:
        return Meaning({"ema.momentum": str(1 - Decimal(given.value("model-ema-decay")))})
    except InvalidOperation:
        given.number("model-ema-decay")
        raise


def _output(given: Given) -> Meaning:
    folder = given.value("output")
    if "experiment" in given:
        return Meaning({"run.output": os.path.join(folder, given.value("experiment"))})
    return Meaning({"run.output": folder}, note="itself, not a folder in it that is named by the date")


def _experiment(given: Given) -> Meaning:
    if "output" in given:
        return Meaning({})
    return Meaning({"run.output": os.path.join("output", "train", given.value("experiment"))})


def _use_ema(given: Given) -> Meaning:
    return Meaning({"weights": "ema"})


def _log_wandb(given: Given) -> Meaning:
    if "wandb-project" not in given:
        raise UsageError("timm's --log-wandb needs --wandb-project here: --run.wandb is the name of the project")
    return Meaning({"run.wandb": given.value("wandb-project")})


def _wandb_project(given: Given) -> Meaning:
    if "log-wandb" not in given:
        raise UsageError(
            f"timm's {given.text('wandb-project')} does nothing without --log-wandb; --run.wandb PROJECT is both"
        )
    return Meaning({})


def _teacher(given: Given) -> Meaning:
    implied = {"distill.kind": "soft"} | ({} if "kd-temperature" in given else {"distill.temperature": "4"})
    if not {"task-loss-weight", "distill-loss-weight"} & given.values.keys():
        raise UsageError(
            "timm's --kd-model-name adds the losses of labels and teacher in full; here they have shares that make 1: "
            "give --task-loss-weight 0.5 too"
        )
    return Meaning({"distill.teacher": given.value("kd-model-name")}, implied)


def _task_loss_weight(given: Given) -> Meaning:
    labels = given.number("task-loss-weight")
    teacher = given.number("distill-loss-weight") if "distill-loss-weight" in given else 1 - labels
    if not math.isclose(labels + teacher, 1):
        raise UsageError(
            f"the weights of labels and teacher, {labels:g} and {teacher:g}, must make 1 here: --distill.weight is the "
            "teacher's share"
        )
    return Meaning({"distill.weight": f"{round(teacher, 12):g}"})


def _distill_loss_weight(given: Given) -> Meaning:
    if "task-loss-weight" in given:
        return Meaning({})
    raise UsageError(
        f"timm's {given.text('distill-loss-weight')} adds to the full loss of the labels; here they have shares that "
        "make 1: give --task-loss-weight too"
    )


def _interpolation(given: Given) -> Meaning:
    found = [given.value(name) for name in ("interpolation", "train-interpolation") if name in given]
    if len(found) < 2 or found[0] != found[1]:
        raise UsageError(
            "--data.interpolation is that of training and of validation: give timm's --interpolation and "
            "--train-interpolation with one value"
        )
    return Meaning({"data.interpolation": found[0]})


MEANINGS: dict[str, Callable[[Given], Meaning]] = {
    "lr": _lr,
    "weight-decay": _weight_decay,
    "warmup-epochs": _warmup_epochs,
    "sched-on-updates": _sched_on_updates,
    "dataset": _dataset,
    "initial-checkpoint": _initial_checkpoint,
    "pretrained-path": _pretrained_path,
    "torchcompile": _torchcompile,
    "amp-dtype": _amp_dtype,
    "aa": _aa,
    "color-jitter": _color_jitter,
    "reprob": _reprob,
    "remode": _remode,
    "aug-repeats": _aug_repeats,
    "bce-loss": _bce_loss,
    "model-ema-decay": _model_ema_decay,
    "output": _output,
    "experiment": _experiment,
    "use-ema": _use_ema,
    "log-wandb": _log_wandb,
    "wandb-project": _wandb_project,
    "kd-model-name": _teacher,
    "task-loss-weight": _task_loss_weight,
    "distill-loss-weight": _distill_loss_weight,
    "interpolation": _interpolation,
    "train-interpolation": _interpolation,
}

# What depends on the rest of the configuration, and is put into it when that is known.

Sections = Mapping[str, dict[str, object]]


def _img_size(given: Given, sections: Sections) -> dict[str, object]:
    """The side of training images and of the centre crop; validation resizes in the proportion that it had."""
    if "input-size" in given:
        channels, *sides = given.values["input-size"]
        if channels != "3" or len(sides) != 2 or len(set(sides)) != 1:
            raise UsageError(
                f"timm's {given.text('input-size')}: images have three channels and equal sides, such as 3 256 256"
            )
        if "img-size" in given and given.value("img-size") != sides[0]:
            raise UsageError(f"{given.text('img-size')} and {given.text('input-size')} contradict each other")
        text = sides[0]
    else:
        text = given.value("img-size")
    if not re.fullmatch(r"[1-9]\d*", text):
        raise UsageError(f"an image size must be a whole number of pixels, got {text!r}")
    side, data = int(text), sections["data"]
    found: dict[str, object] = {"sampler.size": side, "sampler.sizes": [], "data.crop": side}
    if "crop-pct" not in given:
        found["data.resize"] = round(side * data["resize"] / data["crop"])
    return found


def _crop_pct(given: Given, sections: Sections) -> dict[str, object]:
    share = given.number("crop-pct")
    if not 0 < share <= 1:
        raise UsageError(f"{given.typed['crop-pct']} must be above 0 and at most 1, got {share:g}")
    return {"data.resize": math.floor(sections["data"]["crop"] / share)}


def _statistics(name: str) -> Callable[[Given, Sections], dict[str, object]]:
    def found(given: Given, sections: Sections) -> dict[str, object]:
        values = [given.number(name, place) for place in range(len(given.values[name]))]
        values = values * 3 if len(values) == 1 else values
        # timm's are in the order RGB, those here in the order that the network reads.
        return {f"data.{name}": values[::-1] if sections["data"]["colors"] == "bgr" else values}

    return found


def _rate(name: str) -> Callable[[Given, Sections], dict[str, object]]:
    key = name.replace("-", "_")

    def found(given: Given, sections: Sections) -> dict[str, object]:
        rule = sections["optimizer"]["lr_rule"]
        if rule != "constant":
            raise UsageError(
                f"timm's {given.text(name)} is the rate itself, and optimizer.lr_rule {rule} scales schedule.{key} "
                f"with the batch: give --lr or --optimizer.lr_rule constant too, or --schedule.{key}"
            )
        return {f"schedule.{key}": given.number(name)}

    return found


def _decay_rate(given: Given, sections: Sections) -> dict[str, object]:
    """timm's poly takes it for its exponent."""
    key = "power" if sections["schedule"]["name"] == "poly" else "decay_rate"
    return {f"schedule.{key}": given.number("decay-rate")}


def _milestones(given: Given, sections: Sections) -> dict[str, object]:
    """timm's multistep decays in the epoch before the milestone, by the step in the step before."""
    if sections["schedule"]["update"] != "epoch":
        raise UsageError(
            f"timm's {given.text('decay-milestones')} by the step decays a step early; --schedule.decay_milestones "
            "decays in time"
        )
    epochs = [given.number("decay-milestones", place) for place in range(len(given.values["decay-milestones"]))]
    return {"schedule.decay_milestones": [int(epoch) - 1 for epoch in epochs]}


DERIVED: dict[str, Callable[[Given, Sections], dict[str, object]]] = {
    "img-size": _img_size,
    "input-size": _img_size,
    "crop-pct": _crop_pct,  # behind the crop
    "mean": _statistics("mean"),
    "std": _statistics("std"),
    "warmup-lr": _rate("warmup-lr"),
    "min-lr": _rate("min-lr"),
    "decay-rate": _decay_rate,
    "decay-milestones": _milestones,
}

TRAINING = frozenset((*SAME, *ALREADY, *OTHER, *MEANINGS, *DERIVED)) - {"use-ema"}


COMMANDS = {"train": TRAINING, "finetune": TRAINING, "evaluate": EVALUATION}


def takes_timm(command: str) -> bool:
    """Whether a command knows options by timm's names."""
    return command in COMMANDS


class TimmOptions:
    """Options of timm on the command line of a command: `take` collects them, `arguments` writes what they are here,
    `settle` puts in what depends on the rest. `lines` say what each became."""

    def __init__(self, command: str) -> None:
        self.names = COMMANDS.get(command, frozenset())
        self.same = SAME | (IN_EVALUATION if command == "evaluate" else {})
        self.given, self.lines = Given(), []
        self._ours: dict[str, str] = {}  # options of ours on the command line

    def take(self, flag: str, value: str | None, queue: list[str]) -> bool:
        """Whether `flag` is an option of timm; its values are then taken from `value` and the front of `queue`.

        Raises:
            UsageError: it is one that is not to be had here, or it lacks a value.
        """
        name = flag.lstrip("-").replace("_", "-")
        if attached := re.fullmatch(r"-([bj])(\d+)", flag):  # -b64
            name, flag, value = attached[1], f"-{attached[1]}", attached[2]
        elif not flag.startswith("--") and name not in SHORT:
            return False
        name = SHORT.get(name, name)
        if name not in self.names:
            return False
        if name in OTHER:
            raise UsageError(f"timm's {flag} is not to be had here: {OTHER[name]}")
        self.given.typed[name], self.given.values[name] = flag, _values(name, flag, value, queue)
        return True

    def arguments(self, ours: list[str]) -> list[str]:
        """The command line's options of this project, `ours` as --option=value, with what those of timm mean.

        Raises:
            UsageError: one of timm means something else here, or contradicts another option.
        """
        if "amp-dtype" in self.given and "--run.amp=auto" in ours:
            self.given.values["amp"] = []
            ours = [word for word in ours if word != "--run.amp=auto"]
        self._ours = dict(word[2:].split("=", 1) for word in ours if "=" in word)
        found: dict[str, tuple[str, str]] = {}  # value, and which option of timm it comes from
        implied: dict[str, str] = {}
        for name in self.given.typed:
            meaning, text = self._meaning(name), self.given.text(name)
            for option, value in meaning.options.items():
                if option in found and not _alike(found[option][0], value):
                    raise UsageError(f"{found[option][1]} and {text} contradict each other")
                self._check(option, value, text)
                found[option] = value, text
            more = {option: value for option, value in meaning.implied.items() if option not in self._ours}
            implied |= more
            if name not in DERIVED:
                self._say(text, meaning.options | more, meaning.note)
        return [
            *(f"--{option}={value}" for option, value in implied.items() if option not in found),
            *(f"--{option}={value}" for option, (value, _) in found.items()),
            *ours,
        ]

    def settle(self, sections: Sections) -> None:
        """Puts in what depends on the rest of the configuration. UsageError as `arguments`."""
        for name, derive in DERIVED.items():
            if name not in self.given or (name == "input-size" and "img-size" in self.given):
                continue
            text, kept = self.given.text(name), {}
            for option, value in derive(self.given, sections).items():
                if option in GIVE_WAY and option in self._ours and "crop-pct" not in self.given:
                    continue
                self._check(option, written(value), text)
                kept[option] = written(value)
                section, key = option.split(".")
                sections[section][key] = value
            self._say(text, kept)

    def _meaning(self, name: str) -> Meaning:
        if name in DERIVED:
            return Meaning({})
        if name in self.same:
            values = self.given.values[name]
            text = f"[{','.join(values)}]" if name in LISTS else "".join(values) or "true"
            return Meaning({self.same[name]: text})
        if name in ALREADY:
            accepted, reason = ALREADY[name]
            if accepted and self.given.value(name) not in accepted:
                raise UsageError(f"timm's {self.given.text(name)} is not to be had here: {reason}")
            return Meaning({}, note=reason)
        return MEANINGS[name](self.given)

    def _check(self, option: str, value: str, text: str) -> None:
        if option in self._ours and not _alike(self._ours[option], value):
            raise UsageError(
                f"timm's {text} is --{option}={value} here, which --{option}={self._ours[option]} contradicts"
            )

    def _say(self, text: str, options: Mapping[str, str], note: str = "") -> None:
        what = " ".join(f"--{option}={value}" for option, value in options.items())
        if what or note:
            self.lines.append(f"timm's {text} is {what or 'so already'}{f' ({note})' if note else ''}")


# Parts of an image size that an option of ours takes the place of.
GIVE_WAY = ("sampler.sizes", "data.resize")


def _values(name: str, flag: str, value: str | None, queue: list[str]) -> list[str]:
    """The values of an option, taken from the front of `queue` where `value` is none of them."""
    if name in FLAGS:
        if value is not None:
            raise UsageError(f"{flag} takes no value, got {value!r}")
        return []
    values, many = [] if value is None else [value], name in LISTS
    while queue and not queue[0].startswith("-") and (many or not values):
        values.append(queue.pop(0))
    if not values and name != "torchcompile":
        raise UsageError(f"{flag}: expected {'at least one argument' if many else 'one argument'}")
    return values


def _alike(one: str, other: str) -> bool:
    """Whether two values as a command line writes them are the same: 1e-3 and 0.001, [1, 2] and [1,2]."""

    def parsed(text: str) -> object:
        if text.startswith("["):
            return [parsed(item.strip()) for item in text.strip("[]").split(",")]
        try:
            return float(text)
        except ValueError:
            return text.lower() if text.lower() in ("true", "false", "null") else text

    return parsed(one) == parsed(other)
