"""`mvit3 export`: the network of a checkpoint as a file that other programs run, checked against the network."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

import mvit3_kernels

from .config import TrainConfig
from .errors import Failure
from .inference import Network
from .names import task_of
from .options import UsageError

SUFFIXES = {"onnx": ".onnx", "torch_export": ".pt2", "torchscript": ".pt"}
# What an exported network may differ by from its own, as a share of the largest output: roundings of float32, in sums
# of another order.
TOLERANCE = 1e-5
METADATA = "mvit3.json"  # its name inside of files of PyTorch
STEP = 32  # of sizes of which a network takes only multiples
Run = Callable[[Tensor], list[Tensor]]


class Boxes(nn.Module):
    """A detector as a function of images that gives probabilities (B, A, classes) and boxes (B, A, 4)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return self.network.predict(images)


def export(
    network: Network, form: str, side: int, open_size: bool, target: Path, say: Callable[[str], None]
) -> dict[str, object]:
    """Writes a network to `target` and runs what was written, on batches and sizes other than those it was made with.

    Returns what was written and its largest difference from the network's own output, as a share of the largest one.

    Raises:
        UsageError: the network takes no open size.
        Failure: a library is missing, or the exported network computes something else; then there is no file.
    """
    model, task = network.model, task_of(network.config.model.name)
    if task == "detection":
        if open_size:
            raise UsageError("--open_size: the anchors of a detector are those of one size of images")
        model = Boxes(model)
    if open_size and form == "torchscript":
        raise UsageError(
            "--open_size: torchscript records the sizes of one call; onnx and torch_export leave them open"
        )
    say(f"exporting {network.config.model.name} as {form}")
    facts = _facts(network, side)
    beside = target.with_name(f".{target.name}.part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with torch.no_grad():
            facts["sizes"], step = _write(model, form, side, open_size, beside, facts)
            difference = _difference(_load(form, beside), model, list(_shapes(side, step)))
        if not difference <= TOLERANCE:
            raise Failure(
                f"the exported network differs from {network.config.model.name} by {difference:.1e} of its largest "
                f"output, more than {TOLERANCE:.0e}; nothing was written"
            )
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)
    return {"file": str(target), "format": form, "weights": network.weights, **facts, "difference": difference}


def _facts(network: Network, side: int) -> dict[str, object]:
    """What a program must know to use the file."""
    data = network.config.data
    outputs = {"detection": ["probabilities", "boxes"]}.get(task_of(network.config.model.name), ["logits"])
    return {
        "network": network.config.model.name,
        "input": f"images, float32 (batch, 3, {side}, {side})",
        "outputs": outputs,
        "classes": list(network.class_names),
        "preprocessing": {
            "resize": data.resize,
            "crop": data.crop,
            "interpolation": data.interpolation,
            "antialias": data.antialias,
            "channels": data.colors,
            "scale": 1 / 255,
            "mean": list(data.mean),
            "std": list(data.std),
        },
        "made_by": f"mvit3_kernels {mvit3_kernels.__version__}, torch {torch.__version__}",
    }


def _shapes(side: int, step: int | None) -> Iterator[tuple[int, ...]]:
    """Of batches that an exported network is tried on; `step` between sizes, where they are open."""
    yield from ((1, 3, side, side), (3, 3, side, side))
    if step is not None:
        yield (2, 3, side + step, side + 2 * step)


def _write(
    model: nn.Module, form: str, side: int, open_size: bool, file: Path, facts: dict[str, object]
) -> tuple[str, int | None]:
    """Writes the file; which sizes it takes, in words, and a step to another one."""
    images = torch.zeros(2, 3, side, side)
    fixed = f"{side}x{side}"
    if form == "torchscript":
        torch.jit.save(
            torch.jit.trace(model, images), file, _extra_files={METADATA: json.dumps(facts | {"sizes": fixed})}
        )
        return fixed, None
    program, sizes, step = _program(model, images, open_size)
    text = json.dumps(facts | {"sizes": sizes})
    if form == "torch_export":
        torch.export.save(program, file, extra_files={METADATA: text})
    else:
        _write_onnx(program, file, facts | {"sizes": sizes})
    return sizes, step


def _program(model: nn.Module, images: Tensor, open_size: bool) -> tuple[ExportedProgram, str, int | None]:
    """The network as a program of open batch; with an open size, of any, or of multiples of STEP where it takes only
    these."""
    batch = {0: Dim("batch")}
    if not open_size:
        return (
            torch.export.export(model, (images,), dynamic_shapes=(batch,)),
            "x".join(map(str, images.shape[2:])),
            None,
        )
    multiples = {**batch, 2: STEP * Dim("height", min=3), 3: STEP * Dim("width", min=3)}
    try:
        free = dict.fromkeys((0, 2, 3), Dim.DYNAMIC)
        return torch.export.export(model, (images,), dynamic_shapes=(free,)), "any from 65x65", 1
    except Exception:  # torch names the sizes that it would need by errors of several kinds
        program = torch.export.export(model, (images,), dynamic_shapes=(multiples,))
        return program, f"multiples of {STEP} from {3 * STEP}x{3 * STEP}", STEP


def _write_onnx(program: ExportedProgram, file: Path, facts: dict[str, object]) -> None:
    try:
        import onnxscript  # noqa: F401 -- torch.onnx needs it, and says so at length
    except ImportError:
        raise Failure("--format onnx needs onnxscript and onnxruntime: pip install onnxscript onnxruntime") from None
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["images"], output_names=list(facts["outputs"])
    )
    for name, value in facts.items():
        written.model.metadata_props[name] = value if isinstance(value, str) else json.dumps(value)
    written.save(file)


def _load(form: str, file: Path) -> Run:
    """What was written, as a function that another program would call."""
    if form == "onnx":
        try:
            import onnxruntime
        except ImportError:
            raise Failure("--format onnx is checked in onnxruntime: pip install onnxruntime") from None
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        return lambda x: [torch.from_numpy(t) for t in session.run(None, {session.get_inputs()[0].name: x.numpy()})]
    loaded = torch.export.load(file).module() if form == "torch_export" else torch.jit.load(file)

    def run(x: Tensor) -> list[Tensor]:
        outputs = loaded(x)
        return [outputs] if isinstance(outputs, Tensor) else list(outputs)

    return run


def _difference(run: Run, model: nn.Module, shapes: list[tuple[int, ...]]) -> float:
    """The largest difference of an output, as a share of the largest value of that output."""
    found = 0.0
    for shape in shapes:
        images = torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))
        with mvit3_kernels.backend("reference"):
            wanted = model(images)
        for got, want in zip(run(images), [wanted] if isinstance(wanted, Tensor) else wanted, strict=True):
            found = max(found, float((got - want).abs().max() / want.abs().max().clamp_min(1e-30)))
            if got.shape != want.shape or not bool(got.isfinite().all()):
                return float("inf")
    return found


def exported(
    path: Path, config: TrainConfig, args: argparse.Namespace, say: Callable[[str], None]
) -> dict[str, object]:
    """The command: its options, their defaults, what it did."""
    target = Path(args.to) if args.to else path.with_suffix(SUFFIXES[args.format])
    if target.resolve() == path.resolve():
        raise UsageError(f"--to {target} is the checkpoint itself")
    if target.is_dir():
        raise Failure(f"--to {target} is a folder")
    side = args.size or config.data.crop
    if side < STEP:
        raise UsageError(f"--size must be at least {STEP}, got {args.size}")
    network = Network.open(path, config, args.weights, torch.device("cpu"))
    return export(network, args.format, side, args.open_size, target, say)
