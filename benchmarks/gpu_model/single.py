"""The launches of single kernels in a step, printed and not recorded: for work on one kernel, in seconds."""

from __future__ import annotations

from collections import Counter

from benchmarks.gpu_model import cuda_kernels, model, trace
from benchmarks.gpu_model.device import START
from benchmarks.gpu_model.model import Code, Prediction
from benchmarks.gpu_model.trace import Launch

Line = tuple[str, float]  # what is said of a launch; its microseconds


def lines(network: str, training: bool, batch: int, only: str) -> list[Line]:
    """A line for each launch of a kernel with `only` in its name."""
    found = trace.trace(network, training, batch, only=only)
    made = [of_triton(launch) for launch in found.launches]
    for op in found.cuda:
        for launch in cuda_kernels.launches(op.name, op.call):
            if only in launch.name:
                prediction = model.cuda(launch, op.call.stride)
                code = None if launch.code is None else cuda_kernels.find(launch.code, op.call.stride)
                made.append(_line(prediction, "" if code is None else _registers(code.registers, launch.shared)))
    return made


def of_triton(launch: Launch) -> Line:
    code, prediction = model.code_of(launch.compiled), model.triton(launch)
    widths = " ".join(f"{name}={v}" for name, v in launch.values.items() if name.isupper() and isinstance(v, int))
    return _line(prediction, f"{_registers(code.registers, code.shared, code.stack)} {_loops(code)} {widths}")


def _line(p: Prediction, more: str) -> Line:
    microseconds = (p.seconds - START) * 1e6
    each = f"{p.name:36} {microseconds:8.1f} us  {p.limit:12} {p.blocks:6} blocks, {p.resident} at once"
    return f"{each}, {p.instructions / 1e9:6.2f}e9 instructions, {p.bytes / 1e6:7.1f} MB {more}", microseconds


def _registers(registers: int, shared: int, stack: int = 0) -> str:
    return f"{registers} registers, {shared} bytes{f', SPILLS {stack}' if stack else ''}"


def _loops(code: Code) -> str:
    """Of each loop its instructions, and those of its tensor cores."""
    return " ".join(
        f"[{loop.counts['all']}: {loop.counts['mma'] + loop.counts['wgmma']}]" for loop in code.loop.walk()[1:]
    )


def write(network: str, training: bool, batch: int, only: str) -> None:
    made = lines(network, training, batch, only)
    print(f"{network}, {'training step' if training else 'inference'}, batch {batch}: predicted, not measured")
    for (text, _), times in Counter(made).items():
        print(f"{times} x {text}")
    print(
        f"{len(made)} launches, {sum(us for _, us in made) / 1e3:.3f} ms without the time between launches", flush=True
    )
