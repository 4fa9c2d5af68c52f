"""The commands, and the options of each; nothing here loads PyTorch."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field

from jsonargparse import ArgumentParser, DefaultHelpFormatter

from .config import section_options
from .options import form, written
from .timm_options import takes_timm


@dataclass(frozen=True)
class Command:
    """What a command is, and the options that it has beside those of training; commands.py has the function of its
    name."""

    help: str
    # of the options of training that its --help lists; all are taken, so that every recipe is, but by a command that
    # lists none: it has no configuration
    sections: tuple[str, ...]
    parts: tuple[str, ...] = ()  # of the data that it reads
    recipe: str = ""  # where it begins
    checkpoint: bool = False
    torch: bool = True  # whether it needs PyTorch, which takes seconds to load
    extra: dict[str, dict[str, object]] = field(default_factory=dict)


WEIGHTS = {
    "default": "auto",
    "choices": ["auto", "ema", "raw"],
    "help": "the average or the trained ones; auto: the better ones of its last evaluation, which the checkpoint names "
    "(default: auto)",
}
CSV = {"action": "store_true", "help": "the result as CSV on stdout, a row for each class"}
PER_CLASS = {"action": "store_true", "help": "a table of all classes with their accuracy, IoU or AP"}
TOP = {"type": int, "default": 5, "help": "classes to name for each image (default: 5)"}
OUTPUT = {
    "default": None,
    "help": "segmentation, detection: folder for overlays and other files (default: predictions, beside run.output)",
}
PRODUCTS = {
    "default": "auto",
    "choices": ["auto", "float32", "bfloat16"],
    "help": "on a CPU: what the network's program multiplies; auto: bfloat16 where that is faster, else float32 "
    "(default: auto)",
}
THRESHOLD = {
    "type": float,
    "default": None,
    "help": "boxes of a higher score are told, in place of detection.score_threshold (default: 0.3)",
}
IMAGES = {"nargs": "+", "help": "images, or folders of images"}
START = {
    "default": "",
    "help": "where it starts: of mvit3 train, which tells network, pixels and augmentation, or with --config another",
}
SIZE = {"type": int, "default": 256, "help": "side of the image for which multiplications are counted, pixels"}
FORMATS = {
    "default": "onnx",
    "choices": ["onnx", "torch_export", "torchscript"],
    "help": "of the file (default: onnx)",
}
TO = {"default": None, "help": "the file (default: beside the checkpoint, by its name)"}
SIDE = {"type": int, "default": None, "help": "height and width of the images, pixels (default: data.crop)"}
OPEN_SIZE = {"action": "store_true", "help": "leave height and width open as the batch is; not for detectors"}
NAMES = {"nargs": "*", "default": [], "help": "names or patterns such as 'mobilevitv3*'; all networks without"}
BENCH = {
    "names": {"nargs": "*", "default": [], "help": "names or patterns of classifiers; mobilevitv3_s without"},
    "--mode": {
        "default": "infer",
        "choices": ["infer", "train"],
        "help": "calls, or steps with AdamW (default: infer)",
    },
    "--batch": {"type": int, "default": None, "help": "images in a call (default: 1, in training 8)"},
    "--size": {"type": int, "default": 256, "help": "height and width of the images, pixels (default: 256)"},
    "--dtype": {
        "default": "float32",
        "choices": ["float32", "bfloat16"],
        "help": "bfloat16: what computes in it too, ours and peers (default: float32)",
    },
    "--peers": {
        "default": "eager,channels_last,compile,onnxruntime,openvino",
        "help": "what is run beside it, with commas between; one that is not installed is left out, compile takes "
        "minutes (default: all)",
    },
    "--host": {
        "default": None,
        "choices": ["timm", "transformers"],
        "help": "the networks are this package's, and ours is fuse of them",
    },
    "--rounds": {"type": int, "default": None, "help": "turns of each candidate (default: 12, in training 5)"},
    "--threads": {"type": int, "default": 0, "help": "CPU threads; 0: one for each physical core (default: 0)"},
    "--no_memory": {"action": "store_true", "help": "no peak memory, which takes a process for each candidate"},
    "--output": {"default": None, "help": "a JSON file of the results, written after each network"},
}
REPORT = {
    "files": {"nargs": "+", "help": "JSON files of mvit3 bench, of benchmarks/results, or of pytest benchmarks/"},
    "--output": {"default": None, "help": "the page (default: report.html)"},
    "--png": {"default": None, "help": "a folder for pictures of the page, which need Chromium"},
}
EVERYTHING = (
    "model",
    "data",
    "augment",
    "sampler",
    "optimizer",
    "schedule",
    "loss",
    "distill",
    "detection",
    "ema",
    "run",
)
COMMANDS = {
    "train": Command("train a network: one process, or several under torchrun", EVERYTHING, ("train", "val")),
    "finetune": Command(
        "train a network on other, few images, from the weights of a checkpoint",
        EVERYTHING,
        ("train", "val"),
        extra={"--checkpoint": START},
    ),
    "evaluate": Command(
        "accuracy, mIoU or mAP of a checkpoint on the validation images",
        ("model", "data", "detection", "run"),
        ("val",),
        checkpoint=True,
        extra={"--weights": WEIGHTS, "--per_class": PER_CLASS, "--csv": CSV},
    ),
    "predict": Command(
        "classes of images, of their pixels, or of objects in them",
        ("model", "data", "detection", "run"),
        checkpoint=True,
        extra={
            "--weights": WEIGHTS,
            "--top": TOP,
            "--threshold": THRESHOLD,
            "--output": OUTPUT,
            "--dtype": PRODUCTS,
            "--csv": CSV,
            "images": IMAGES,
        },
    ),
    "export": Command(
        "the network of a checkpoint as a file for other programs, checked against the network",
        ("model", "data", "run"),
        checkpoint=True,
        extra={"--weights": WEIGHTS, "--format": FORMATS, "--to": TO, "--size": SIDE, "--open_size": OPEN_SIZE},
    ),
    "models": Command(
        "networks with their parameters, multiplications and input", (), extra={"--size": SIZE, "names": NAMES}
    ),
    "bench": Command("time whole networks on this machine's CPU beside what could be run instead", (), extra=BENCH),
    "report": Command("a page of charts and tables from files of benchmark results", (), extra=REPORT, torch=False),
    "demo": Command(
        "train on handwritten digits with reference ops, PyTorch's modules and fused ops, and compare",
        EVERYTHING,
        ("train", "val"),
        "digits",
    ),
}


class _Help(DefaultHelpFormatter):
    """Options are described in our words, which have the form of a value and the default."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help


class Parser(ArgumentParser):
    """Errors of an option's type come as exceptions; `main` makes one line of them."""

    def __init__(self, name: str) -> None:
        own = COMMANDS[name]
        short = (
            ". --data D is short for --data.root D, --data digits for --data.source digits, --amp for --run.amp auto"
            + ("; options by timm's names are taken where they mean the same here." if takes_timm(name) else ".")
        )
        words = ["--checkpoint FILE"] * own.checkpoint + ["[--config RECIPE] [--section.key VALUE ...]"] * bool(
            own.sections
        )
        words += [f"{word} ..." for word in ("images", "[names]", "files") if word.strip("[]") in own.extra]
        super().__init__(
            prog=f"mvit3 {name}",
            description=own.help + (short if own.sections else "."),
            exit_on_error=False,
            formatter_class=_Help,
            print_config=None,
            allow_abbrev=False,
            usage=" ".join((f"mvit3 {name}", *words)),
        )
        self.name, command = name, COMMANDS[name]
        if command.checkpoint:
            self.add_argument(
                "--checkpoint", required=True, help="of mvit3 train, or with --config one of another origin"
            )
        for option, settings in command.extra.items():
            self.add_argument(option, **settings)
        self.add_argument("--quiet", action="store_true", help="no progress, only the result")
        self.add_argument("--json", action="store_true", help="the result as JSON on stdout; progress stays on stderr")
        if command.sections:
            self._add_configuration(command)

    def _add_configuration(self, command: Command) -> None:
        self.add_argument(
            "--config", action="config", help="a recipe's name or a YAML file; may be given again, later ones win"
        )
        self.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML, and stop")
        groups = {}
        for section, key, kind, default, option in section_options():
            if section not in groups:
                groups[section] = self.add_argument_group(f"{section} options") if section in command.sections else self
            choices = f"; one of {', '.join(option.choices)}" if 0 < len(option.choices) <= 20 else ""
            text = argparse.SUPPRESS
            if section in command.sections:
                value = "" if option.choices else f"{form(kind, default)}; "
                text = f"{option.help}{choices} ({value}default: {written(default)})"
            groups[section].add_argument(f"--{section}.{key}", type=kind, default=default, help=text)

    @property
    def flags(self) -> dict[str, argparse.Action]:
        return {flag: action for action in self._actions for flag in action.option_strings}

    @property
    def configured(self) -> bool:
        """Whether the command has a configuration of training."""
        return bool(COMMANDS[self.name].sections)

    @property
    def takes_files(self) -> bool:
        """Whether there are arguments that follow no option."""
        return any(not action.option_strings for action in self._actions)
