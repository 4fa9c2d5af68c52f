"""The command line: `mvit3 train`, `evaluate`, `predict` and `demo`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import yaml
from jsonargparse import ArgumentParser

# Nothing here loads PyTorch: help and the answer to a misspelt option would wait for it.
from . import recipes
from .config import TrainConfig, check_names, section_options
from .errors import Failure
from .options import UsageError, nearest


@dataclass(frozen=True)
class Command:
    """What a command is, and the options that it has beside those of training; commands.py has the function of its name."""

    help: str
    sections: tuple[str, ...]  # of the options of training that its --help lists; all are taken, so that every recipe is
    recipe: str = ""  # where it begins
    checkpoint: bool = False
    extra: dict[str, dict[str, object]] = field(default_factory=dict)


WEIGHTS = {
    "default": "auto",
    "choices": ["auto", "ema", "raw"],
    "help": "the average or the trained ones; auto: the better ones of its last evaluation, which the checkpoint names",
}
TOP = {"type": int, "default": 5, "help": "classes to name for each image"}
IMAGES = {"nargs": "+", "help": "images, or folders of images"}
EVERYTHING = ("model", "data", "augment", "sampler", "optimizer", "schedule", "loss", "ema", "run")
COMMANDS = {
    "train": Command("train a network: one process, or several under torchrun", EVERYTHING),
    "evaluate": Command("accuracy of a checkpoint on the validation images", ("model", "data", "run"), "", True, {"--weights": WEIGHTS}),
    "predict": Command("classes of images", ("model", "data", "run"), "", True, {"--weights": WEIGHTS, "--top": TOP, "images": IMAGES}),
    "demo": Command("train on handwritten digits with reference and with fused ops, and compare", EVERYTHING, "digits"),
}


class _Parser(ArgumentParser):
    """Errors of an option's type come as exceptions; `main` makes one line of them."""

    def __init__(self, name: str) -> None:
        super().__init__(
            prog=f"mvit3 {name}",
            description=f"{COMMANDS[name].help}. --data D is short for --data.root D, --data digits for --data.source digits.",
            exit_on_error=False,
            print_config=None,
            allow_abbrev=False,
        )
        command = COMMANDS[name]
        if command.checkpoint:
            self.add_argument("--checkpoint", required=True, help="of mvit3 train, or with --config one of another origin")
        for option, settings in command.extra.items():
            self.add_argument(option, **settings)
        self.add_argument("--config", action="config", help="a recipe's name or a YAML file; may be given again, later ones win")
        self.add_argument("--print_config", action="store_true", help="print the whole configuration as YAML, and stop")
        self.add_argument("--quiet", action="store_true", help="no progress, only the result")
        self.add_argument("--json", action="store_true", help="the result as JSON on stdout; progress stays on stderr")
        groups = {}
        for section, key, kind, default, option in section_options():
            if section not in groups:
                groups[section] = self.add_argument_group(f"{section} options") if section in command.sections else self
            choices = f"; one of {', '.join(option.choices)}" if 0 < len(option.choices) <= 20 else ""
            text = f"{option.help}{choices}" if section in command.sections else argparse.SUPPRESS
            groups[section].add_argument(f"--{section}.{key}", type=kind, default=default, help=text)

    @property
    def flags(self) -> list[str]:
        return [flag for action in self._actions for flag in action.option_strings]


def _known(parser: _Parser, arguments: Sequence[str]) -> None:
    """UsageError for an option that does not exist, with the nearest."""
    for argument in arguments:
        flag = argument.partition("=")[0]
        if flag.startswith("--") and flag not in parser.flags:
            raise UsageError(f"there is no option {flag!r}; the nearest is {nearest(flag, parser.flags)}")


def _expand(arguments: Sequence[str]) -> list[str]:
    """Each --option and its value apart; --data D becomes --data.root D, or --data.source digits; recipes become files."""
    expanded = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        expanded += [flag, value] if equals and argument.startswith("--") else [argument]
    for i, flag in enumerate(expanded[:-1]):
        if flag == "--data":
            expanded[i] = "--data.source" if expanded[i + 1] == "digits" else "--data.root"
        elif flag == "--config":
            expanded[i + 1] = _recipe(expanded[i + 1])
    return expanded


def _recipe(name: str) -> str:
    """The file of a configuration that was given by path or by name; UsageError where a name in it is none of ours."""
    path = Path(name) if Path(name).suffix in (".yaml", ".yml") or Path(name).exists() else recipes.path(name)
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"--config {name} cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UsageError(f"--config {name} is not YAML: {' '.join(str(error).split())}") from None
    try:
        check_names(values)
    except UsageError as error:
        raise UsageError(f"--config {name}: {error}") from None
    return str(path)


def _one_line(error: Exception) -> str:
    """jsonargparse's error about a value in the words of the others."""
    text = " ".join(str(error).split())
    if (key := re.search(r'Parser key "([\w.]+)"', text)) and (value := re.search(r"(?:Given value|Got value): (.*)$", text)):
        kinds = {f"{section}.{name}": kind for section, name, kind, *_ in section_options()}
        kind = kinds.get(key[1])
        return f"{key[1]} must be {getattr(kind, '__name__', None) if isinstance(kind, type) else kind}, got {value[1]!r}"
    return text


def _parse(name: str, arguments: Sequence[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The configuration and the options beside it; those of a checkpoint come first, then files, then the command line."""
    command, parser = COMMANDS[name], _Parser(name)
    arguments = _expand(arguments)
    _known(parser, arguments)
    if command.recipe:
        arguments = ["--config", _recipe(command.recipe), *arguments]
    try:
        args = parser.parse_args(arguments)
        if command.checkpoint and "--config" not in arguments:
            base = _checkpoint_config(Path(args.checkpoint))
            kept = {"amp", "ops", "channels_last"}
            parser.set_defaults({
                f"{section}.{key}": value
                for section, values in base.items()
                for key, value in values.items()
                if (section != "run" or key in kept) and f"--{section}.{key}" in parser.flags
            })  # fmt: skip
            args = parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise UsageError(_one_line(error)) from None
    values = args.as_dict()
    config = TrainConfig.from_dict({section: dict(values[section]) for section in EVERYTHING})
    return config, argparse.Namespace(**{key: value for key, value in values.items() if key not in EVERYTHING})


def _checkpoint_config(path: Path) -> dict[str, dict[str, object]]:
    from . import checkpoint  # loads PyTorch

    try:
        return checkpoint.load(path)["config"]
    except checkpoint.Foreign as error:
        raise Failure(f"{error}; a checkpoint of another origin needs --config with its recipe") from None
    except checkpoint.CheckpointError as error:
        raise Failure(str(error)) from None


def _refuse(program: str, message: str) -> NoReturn:
    print(f"{program}: error: {message} (see {program} --help)", file=sys.stderr)
    raise SystemExit(2)


def _choose(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, and what follows it."""
    if not arguments:
        _refuse("mvit3", f"a command is needed: {', '.join(COMMANDS)}")
    if arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10}{command.help}" for name, command in COMMANDS.items()]
        print("usage: mvit3 COMMAND [--config RECIPE] [--section.key VALUE ...]\n")
        print("Train, evaluate and use networks of the MobileViT family with fused ops.\n")
        print("\n".join(lines), f"\n\nmvit3 COMMAND --help lists every option. Recipes: {', '.join(recipes.names())}.", sep="")
        raise SystemExit(0)
    if arguments[0] not in COMMANDS:
        close = nearest(arguments[0], COMMANDS)
        _refuse("mvit3", f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}, the nearest is {close}")
    return arguments[0], arguments[1:]


def _loading(args: argparse.Namespace) -> None:
    """A line for the seconds in which nothing else is to be seen."""
    if "torch" not in sys.modules and not args.quiet and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 for a failure, 2 for a wrong option, 130 when interrupted."""
    name, arguments = _choose(sys.argv[1:] if argv is None else argv)
    program = f"mvit3 {name}"
    try:
        config, args = _parse(name, arguments)
        if args.print_config:
            print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
            return 0
        _loading(args)
        from . import commands  # loads PyTorch and all that stands on it

        commands.run(name, config, args)
    except UsageError as error:
        _refuse(program, str(error))
    except (Failure, OSError) as error:
        print(f"{program}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return 130
    return 0
