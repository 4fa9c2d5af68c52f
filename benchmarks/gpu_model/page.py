"""docs/gpu_model.md: the predictions as tables."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu_model import budgets, device, record

PAGE = Path(__file__).resolve().parents[2] / "docs" / "gpu_model.md"
SHOWN = ("mobilevitv3_s", "mobilevitv3_100")  # whose kernels are listed
INTRODUCTION = """# How fast the GPU kernels should be: predicted, not measured
Written by `python -m benchmarks.gpu_model --page` from `benchmarks/results/gpu_model.json`; do not edit it.

Nothing on this page was run on a GPU. Every launch of a training step (forward, cross-entropy, backward, fused AdamW)
and of an inference call is traced on tensors without contents, its kernel is compiled for sm_90, and its time on an
H200 is taken for the longest of

- **memory**: the bytes of its tensors, each counted once, at {memory:.1f} TB/s;
- **l2**: all bytes that its programs ask for, at {l2:.1f} TB/s;
- **tensor cores**: its products, at {wgmma:.0f} TFLOP/s (`wgmma`) or {mma:.0f} (`mma.sync`);
- **issue**: the instructions of its machine code, loop by loop, at what its warps can issue;
- **latency**: what one block waits and computes, where few run at once,

and {start:.1f} us from one launch to the next. A step lasts as long as the GPU works or as the CPU launches, whichever
is longer; *graph* is the GPU's part with {graph:.1f} us a launch. The peers are eager PyTorch op by op, and compiled
code counted on the graph that it would be generated from, at shares of the rates that PyTorch's kernels usually reach:
guesses of unknown error. The constants are in `benchmarks/gpu_model/device.py` and `peers.py`; the first measurement
replaces them.
"""


def table(header: list[str], lines: list[list[str]]) -> str:
    return "".join(f"| {' | '.join(line)} |\n" for line in [header, ["---"] * len(header), *lines])


def write() -> None:
    rows = record.read(record.ROWS).get("rows", [])
    kernels = record.read(record.KERNELS).get("kernels", {})
    text = INTRODUCTION.format(
        memory=device.MEMORY / 1e12, l2=device.L2 / 1e12, wgmma=device.WGMMA / 1e12, mma=device.MMA_SYNC / 1e12,
        start=device.START * 1e6, graph=device.START_IN_GRAPH * 1e6,
    )  # fmt: skip
    PAGE.write_text(f"{text}\n{networks(rows)}\n{parts(rows)}\n{over_budget(kernels, rows)}")


def networks(rows: list[dict[str, Any]]) -> str:
    groups: dict[tuple[str, str, int], dict[str, dict]] = {}
    for row in rows:
        groups.setdefault((row["network"], row["mode"], row["batch"]), {})[row["candidate"]] = row
    lines = []
    for (network, mode, batch), found in groups.items():
        ours = found.get("ours")
        if ours is None:
            continue
        peers = [found.get("compile"), found.get("eager")]
        times = [f"{row['predicted_ms']:.2f} ({row['graph_ms']:.2f})" if row else "" for row in (ours, *peers)]
        ratios = [f"{row['predicted_ms'] / ours['predicted_ms']:.2f}x" if row else "" for row in peers]
        work = "training step" if mode == "train" else "inference"
        cells = [f"`{network}`", f"{work} {batch}", *times, *ratios, str(ours["launches"]), f"{ours['floor_ms']:.2f}"]
        lines.append([*cells, ours["limit"]])
    header = ["network", "work, batch at 256x256", "ours, ms (graph)", "compiled", "eager"]
    header += ["against compiled", "against eager", "launches", "bytes alone, ms", "limit"]
    return f"## Networks\n\n{table(header, lines)}"


def parts(rows: list[dict[str, Any]], count: int = 14) -> str:
    text = "## Where the time goes\n"
    for row in rows:
        if row["candidate"] != "ours" or row["batch"] != 256 or row["network"] not in SHOWN:
            continue
        lines = [
            [
                f"`{k['kernel']}`", str(k["launches"]), f"{k['ms']:.2f}", f"{k['floor_ms']:.2f}", k["limit"],
                str(k["resident"] or ""), f"{k['giga_instructions']:.1f}" if k["giga_instructions"] else "",
            ]
            for k in row["kernels"][:count]
        ]  # fmt: skip
        header = ["kernel", "launches", "ms", "floor, ms", "limit of the longest", "blocks a multiprocessor"]
        header.append("instructions of threads, 10^9")
        text += f"\n`{row['network']}`, {row['mode']}, batch 256:\n\n{table(header, lines)}"
    return text


def over_budget(kernels: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """The budgets, and each kernel that has a reason to exceed one."""
    groups: dict[tuple[str, str, str], list[str]] = {}
    for excess in budgets.excesses(kernels, rows):
        name = excess.kernel.partition("[")[0]
        groups.setdefault((excess.budget, name, budgets.reason(excess) or "none"), []).append(excess.found)
    lines = [[budget, f"`{name}`", str(len(found)), why] for (budget, name, why), found in sorted(groups.items())]
    return (
        "## Budgets\nChecked by `tests/test_gpu_model.py` on every recorded kernel: at most "
        f"{budgets.REGISTERS:,} registers a block (two blocks a multiprocessor), no spill, loads in loops copied "
        f"ahead, no launch of fewer than {budgets.LEAST_BLOCKS} blocks above {budgets.MOST_MICROSECONDS:.0f} us; and "
        f"in every network: at most {budgets.MOST_FLOORS} times what a kernel's bytes, products and start alone take, "
        f"where it takes {budgets.LEAST_SHARE:.0%} of a step or more. "
        f"{len(kernels)} kernels are recorded; those over a budget, and why:\n\n"
        + table(["budget", "kernel", "variants", "reason"], lines)
    )
