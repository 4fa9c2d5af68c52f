"""The command line: `mvit3 train`, `finetune`, `evaluate`, `predict`, `export`, `models`, `bench`, `report`
and `demo`."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn, get_origin

import yaml

# Nothing here loads PyTorch: help and the answer to a misspelt option would wait for it.
from . import recipes
from .config import AMP, TrainConfig, check_names, section_options
from .errors import Failure
from .names import task_of
from .options import UsageError, form, nearest, nearest_options
from .parser import COMMANDS, EVERYTHING, Parser
from .results.command import report
from .screen import plain
from .signals import INTERRUPTED
from .streams import BROKEN_PIPE, guarded
from .timm_names import SAME
from .timm_options import TimmOptions


def _unknown(flag: str, parser: Parser) -> UsageError:
    if (ours := SAME.get(flag.lstrip("-"))) and f"--{ours}" in parser.flags:
        return UsageError(f"there is no option {flag!r}; timm's {flag} is --{ours} here")
    close = nearest_options(flag, [known for known in parser.flags if known.startswith("--")])
    return UsageError(
        f"there is no option {flag!r}; the nearest {'is' if len(close) == 1 else 'are'} {' and '.join(close)}"
    )


def _stray(words: Sequence[str], given: Sequence[str], kinds: dict[str, tuple[object, object]]) -> UsageError:
    """For words that follow no option; `given`: the options before them, with their values."""
    flag, _, value = given[-1].partition("=") if given else ("", "", "")
    kind, default = kinds.get(flag.removeprefix("--"), (None, None))
    if get_origin(kind) is tuple:
        return UsageError(f"{flag.removeprefix('--')} must be {form(kind, default)}, got {' '.join((value, *words))!r}")
    if words[0] in recipes.names() or words[0].endswith((".yaml", ".yml")):
        return UsageError(f"{words[0]!r} is no option; a recipe is chosen with --config {words[0]}")
    after = f" after {flag}" if flag else ""
    return UsageError(f"{words[0]!r}{after} is no option; options begin with --")


def _arrange(parser: Parser, arguments: Sequence[str], timm: TimmOptions) -> list[str]:
    """Files, options as --option=value, then what follows none: the command line wins over files, wherever they stand
    in it. --data D is --data.root=D, or --data.source=digits; recipes become files; options by timm's names go to
    `timm`, which adds what they are here.

    UsageError for an option that does not exist, and for a word too many.
    """
    flags, queue, files, options, rest = parser.flags, list(arguments), [], [], []
    while queue:
        word = queue.pop(0)
        if word == "--":
            rest += queue
            break
        if not re.match(r"--|-[A-Za-z]", word):
            rest.append(word)
            continue
        flag, equals, value = word.partition("=")
        if flag == "--amp" and parser.configured and not equals and (not queue or queue[0] not in AMP):
            options.append("--run.amp=auto")
            continue
        if flag not in flags and not (parser.configured and flag in ("--data", "--amp")):
            if timm.take(flag, value if equals else None, queue):
                continue
            raise _unknown(flag, parser)
        if flag in flags and flags[flag].nargs == 0:
            if equals:
                raise UsageError(f"{flag} takes no value, got {value!r}")
            options.append(flag)
            continue
        if not equals:
            if not queue or queue[0].startswith("--"):
                options.append(flag)  # without its value, which the parser refuses
                continue
            value = queue.pop(0)
        while value.count("[") > value.count("]") and queue and not queue[0].startswith("--"):
            value += f" {queue.pop(0)}"  # [160, 192] with a space
        if flag == "--data":
            flag = "--data.source" if value == "digits" else "--data.root"
        elif flag == "--amp":
            flag = "--run.amp"
        elif flag == "--config":
            files.append(f"{flag}={_recipe(value)}")
            continue
        options.append(f"{flag}={value}")
    if rest and not parser.takes_files:
        raise _stray(rest, options, _kinds(parser))
    return [*files, *timm.arguments(options), *rest]  # the parser lets the last one win


def _kinds(parser: Parser) -> dict[str, tuple[object, object]]:
    """Type and default of every option of training, and of the command's own, by name without dashes."""
    options = section_options() if parser.configured else ()
    kinds = {f"{section}.{key}": (kind, default) for section, key, kind, default, _ in options}
    return kinds | {
        name.lstrip("-"): (settings.get("type", str), None) for name, settings in COMMANDS[parser.name].extra.items()
    }


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


def _one_line(error: Exception, parser: Parser) -> str:
    """The parser's error in the words of the others."""
    text, kinds = " ".join(str(error).split()), _kinds(parser)
    key = re.search(r'Parser key "([\w.]+)"', text)
    value = re.search(r"(?:Given value|Got value):(?: (.*))?$", text)
    if key and value:
        name = key[1] if "." in key[1] else f"--{key[1]}"
        return f"{name} must be {form(*kinds.get(key[1], (str, None)))}, got {value[1] or ''!r}"
    if choice := re.fullmatch(r"argument (\S+): invalid choice: (.*) \(choose from (.*)\)", text):
        return f"{choice[1]} must be one of {choice[3].replace(chr(39), '')}; got {choice[2]}"
    if missing := re.fullmatch(r"argument (\S+): expected one argument", text):
        name = missing[1].lstrip("-")
        return f"{missing[1]}: expected one argument{f', {form(*kinds[name])}' if name in kinds else ''}"
    if needed := re.search(r"arguments are required: (.*)$", text):
        names = [f"--{name}" if f"--{name}" in parser.flags else name for name in needed[1].split(", ")]
        return f"{' and '.join(names)} must be given"
    return text


def _parse(name: str, arguments: Sequence[str]) -> tuple[TrainConfig, argparse.Namespace]:
    """The configuration and the options beside it; those of a checkpoint come first, then files, then the command
    line."""
    command, parser, timm, base = COMMANDS[name], Parser(name), TimmOptions(name), {}
    arguments = _arrange(parser, arguments, timm)
    if command.recipe:
        arguments = [f"--config={_recipe(command.recipe)}", *arguments]
    try:
        args = parser.parse_args(arguments)
        if args.json and getattr(args, "csv", False):
            raise UsageError("--json and --csv exclude each other")
        if getattr(args, "top", 1) < 1:
            raise UsageError(f"--top must be at least 1, got {args.top}")
        if not 0 <= (getattr(args, "threshold", None) or 0) < 1:
            raise UsageError(f"--threshold must be at least 0 and below 1, got {args.threshold}")
        if name == "finetune":
            _check_values(args)
            arguments = _finetune_defaults(parser, arguments, args)
            args = parser.parse_args(arguments)
        if command.checkpoint:
            _check_checkpoint(Path(args.checkpoint))
        if command.checkpoint and not any(word.startswith("--config=") for word in arguments):
            _check_values(args)  # reading a checkpoint takes seconds
            _loading(args)
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
        raise UsageError(_one_line(error, parser)) from None
    values = args.as_dict()
    if not command.sections:
        return TrainConfig(), argparse.Namespace(**values)
    sections = {section: dict(values[section]) for section in EVERYTHING}
    _take_data(sections["data"], arguments, base)
    timm.settle(sections)
    if not args.quiet and os.environ.get("RANK", "0") == "0":
        for line in timm.lines:
            print(line, file=sys.stderr)
    config = TrainConfig.from_dict(sections)
    return config, argparse.Namespace(**{key: value for key, value in values.items() if key not in EVERYTHING})


def _take_data(data: dict[str, object], arguments: Sequence[str], base: Mapping[str, Mapping[str, object]]) -> None:
    """A folder that the command line names is what is read, though a recipe or a checkpoint has data that need none;
    and the limit of a training's validation images is no property of other images. `base`: the configuration of a
    checkpoint."""
    given = {word.partition("=")[0] for word in arguments}
    if "--data.root" in given and "--data.source" not in given and data["source"] == "digits":
        data["source"] = "folder"
    then = base.get("data", {})
    other = any(data[key] != then.get(key, data[key]) for key in ("source", "val")) or (
        os.path.realpath(str(data["root"])) != os.path.realpath(str(then.get("root", data["root"])))
    )
    if other and "--data.limit_val" not in given:
        data["limit_val"] = 0


# What fine-tuning takes from a checkpoint: the network, and images as it knows them.
TAKEN = {
    "model": (
        "name",
        "drop_rate",
        "proj_drop_rate",
        "attn_drop_rate",
        "ffn_drop_rate",
        "drop_path_rate",
        "output_stride",
    ),
    "data": ("resize", "crop", "interpolation", "antialias", "exif_orientation", "colors", "mean", "std"),
    "augment": (),  # all of it
    "sampler": ("size",),
    "loss": ("auxiliary_weight",),
    "detection": (),
    "run": ("ops", "channels_last"),
}


def _finetune_defaults(parser: Parser, arguments: list[str], args: argparse.Namespace) -> list[str]:
    """Sets the defaults of `mvit3 finetune`; returns the arguments that are left to lie over them.

    Lowest is a recipe that was given by its name (network and images), then the recipe `finetune`, then what the
    checkpoint tells; files and options of the user win. Where the recipe or the user names a network of another task,
    the checkpoint is that of a backbone, and tells nothing else.
    """
    named = [
        word for word in arguments if word.startswith("--config=") and recipes.is_recipe(Path(word.partition("=")[2]))
    ]
    layers = [yaml.safe_load(Path(word.partition("=")[2]).read_text()) for word in named]
    layers = [
        {section: layer[section] for section in ("model", "data", "augment", "sampler") if section in layer}
        for layer in layers
    ]
    for layer in layers:
        layer.get("sampler", {}).pop("sizes", None)
    layers.append(yaml.safe_load(recipes.path("finetune").read_text()))
    if layers[:-1]:
        for section in ("model", "data", "augment"):  # are the named recipe's
            layers[-1][section] = {
                key: value for key, value in layers[-1].get(section, {}).items() if key in ("drop_head", "batch_size")
            }
    if args.checkpoint:
        _check_checkpoint(Path(args.checkpoint))
        _loading(args)
        content = _checkpoint_config(Path(args.checkpoint), optional=bool(named))
        taken = {
            section: {key: value for key, value in content[section].items() if not keys or key in keys}
            for section, keys in TAKEN.items()
            if section in content
        }
        wanted = [word.partition("=")[2] for word in arguments if word.startswith("--model.name=")]
        wanted += [layer["model"]["name"] for layer in layers[:-1] if "name" in layer.get("model", {})][::-1]
        if taken and wanted and task_of(wanted[0]) != task_of(taken["model"]["name"]):
            taken = {}
        layers += [taken, {"model": {"pretrained": args.checkpoint}}]
    parser.set_defaults({
        f"{section}.{key}": value
        for layer in layers
        for section, values in layer.items()
        for key, value in values.items()
        if f"--{section}.{key}" in parser.flags
    })  # fmt: skip
    return [word for word in arguments if word not in named]


def _check_values(args: argparse.Namespace) -> None:
    for section, key, _, _, option in section_options():
        option.check(f"{section}.{key}", args[f"{section}.{key}"])


def _check_checkpoint(path: Path) -> None:
    if path.is_dir():
        inside = next((name for name in ("best.pt", "last.pt") if (path / name).is_file()), "")
        raise Failure(f"--checkpoint {path} is a folder" + (f"; its checkpoint is {path / inside}" if inside else ""))
    if not path.is_file():
        raise Failure(f"--checkpoint {path}: there is no such file")


def _checkpoint_config(path: Path, optional: bool = False) -> dict[str, dict[str, object]]:
    """The configuration that a checkpoint was made with; `optional`: nothing where it is of another origin."""
    from . import checkpoint  # loads PyTorch

    try:
        return checkpoint.load(path)["config"]
    except checkpoint.Foreign as error:
        if optional:
            return {}
        raise Failure(f"{error}; a checkpoint of another origin needs --config with its recipe") from None
    except checkpoint.CheckpointError as error:
        raise Failure(str(error)) from None


def _check_folders(config: TrainConfig, parts: Sequence[str]) -> None:
    """Failure where a folder of images is not there; before PyTorch is loaded."""
    data = config.data
    if data.source != "folder" or not parts:
        return
    if not data.root:
        raise UsageError("data.root must name the folder of the images for data.source folder: --data FOLDER")
    root = Path(data.root)
    if not root.is_dir():
        raise Failure(f"--data {root}: {'that is no folder' if root.exists() else 'there is no such folder'}")
    for part in parts:
        name = getattr(data, part)
        if not (root / name).is_dir():
            there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
            held = (
                f"it has {', '.join(there[:5])}{' and more' if len(there) > 5 else ''}"
                if there
                else "it has no folders"
            )
            raise Failure(f"--data {root} has no folder {name!r}, which --data.{part} names; {held}")


def _message(error: Exception) -> str:
    """The message of an error; of the system's ones what failed and why, without a number."""
    if isinstance(error, OSError) and error.strerror:
        return ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    return str(error)


def _refuse(program: str, message: str) -> NoReturn:
    print(f"{program}: error: {plain(message)} (see {program} --help)", file=sys.stderr)
    raise SystemExit(2)


def _choose(arguments: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command, and what follows it."""
    if not arguments:
        _refuse("mvit3", f"a command is needed: {', '.join(COMMANDS)}")
    if arguments[0] in ("-h", "--help"):
        lines = [f"  {name:10}{command.help}" for name, command in COMMANDS.items()]
        print("usage: mvit3 COMMAND [--config RECIPE] [--section.key VALUE ...]\n")
        print("Train, evaluate and use networks of the MobileViT family with fused ops.\n")
        print(
            "\n".join(lines),
            f"\n\nmvit3 COMMAND --help lists every option. Recipes: {', '.join(recipes.names())}.",
            sep="",
        )
        raise SystemExit(0)
    if arguments[0] not in COMMANDS:
        close = nearest(arguments[0], COMMANDS)
        _refuse(
            "mvit3", f"there is no command {arguments[0]!r}; there are {', '.join(COMMANDS)}, the nearest is {close}"
        )
    return arguments[0], arguments[1:]


def _loading(args: argparse.Namespace) -> None:
    """A line for the seconds in which nothing else is to be seen."""
    if "torch" not in sys.modules and not args.quiet and os.environ.get("RANK", "0") == "0":
        print("loading PyTorch", file=sys.stderr, flush=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns its exit status: 0, 1 for a failure, 2 for a wrong option, 130 after Ctrl-C, 141 where
    nobody reads what it prints."""
    with guarded() as (stdout, stderr):
        status, stopped = 0, None
        try:
            status = _main(sys.argv[1:] if argv is None else argv)
        except (BrokenPipeError, SystemExit) as error:
            stopped = error
    if stdout.lost or stderr.lost:
        return BROKEN_PIPE
    if stopped is not None:
        raise stopped
    return status


def _main(argv: Sequence[str]) -> int:
    name, arguments = _choose(argv)
    program = f"mvit3 {name}"
    try:
        config, args = _parse(name, arguments)
        if getattr(args, "print_config", False):
            print(yaml.safe_dump(config.to_dict(), sort_keys=False), end="")
            return 0
        _check_folders(config, COMMANDS[name].parts)
        if not COMMANDS[name].torch:
            return report(args)
        _loading(args)
        from . import commands  # loads PyTorch and all that stands on it

        args.command = shlex.join(["mvit3", *argv])
        return commands.run(name, config, args)
    except UsageError as error:
        _refuse(program, str(error))
    except BrokenPipeError:
        raise
    except (Failure, OSError) as error:
        print(f"{program}: error: {plain(_message(error))}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{program}: interrupted", file=sys.stderr)
        return INTERRUPTED
