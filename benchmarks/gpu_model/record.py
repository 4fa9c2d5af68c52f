"""What is recorded: rows of predictions, and every compiled kernel with its resources and loops, for the budgets."""

from __future__ import annotations

import ast
import hashlib
import json
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.gpu_model import device
from benchmarks.gpu_model.model import Code, Prediction, code_of, cuda_kernels, key_of
from benchmarks.gpu_model.trace import Launch, name_of, triton_modules

RESULTS = Path(__file__).resolve().parents[1] / "results"
ROWS, KERNELS = RESULTS / "gpu_model.json", RESULTS / "gpu_kernels.json"


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def write(path: Path, head: dict[str, Any], name: str, entries: list[Any] | dict[str, Any]) -> None:
    """A file of one entry a line, so that a change of one is a change of a line."""
    if isinstance(entries, dict):
        lines = [f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(entries.items())]
        ends = "{}"
    else:
        lines, ends = [f"  {json.dumps(entry)}" for entry in entries], "[]"
    body = ",\n".join(lines)
    path.write_text(f"{json.dumps(head)[:-1]}, {json.dumps(name)}: {ends[0]}\n{body}\n{ends[1]}}}\n")


def _loops(code: Code) -> list[dict[str, int]]:
    kinds = ("all", "loads", "copies", "mma", "wgmma", "special")
    return [{kind: loop.counts[kind] for kind in kinds if loop.counts[kind]} for loop in code.loop.walk()[1:]]


def kernel(code: Code, source: str) -> dict[str, Any]:
    return {
        "registers": code.registers,
        "stack": code.stack,
        "shared": code.shared,
        "warps": code.warps,
        "resident": device.occupancy(code.registers, code.warps, code.shared).blocks,
        "loops": _loops(code),
        "source": source,
    }


def add(kernels: dict[str, Any], launches: list[Launch], made: list[Prediction], where: str) -> None:
    """Adds kernels of launches; of those that fill too little of a GPU, the longest launch."""
    for launch, prediction in zip(launches, made, strict=False):
        key = key_of(launch)
        entry = kernels.setdefault(key, {})
        longest = entry.get("few")
        entry |= kernel(code_of(launch.compiled), source_of(launch.function))
        if longest:
            entry["few"] = longest
        microseconds = round((prediction.seconds - device.START) * 1e6, 1)
        if prediction.blocks < 64 and microseconds > (longest or {"us": 5.0})["us"]:
            entry["few"] = {"blocks": prediction.blocks, "us": microseconds, "where": where}


def extension() -> dict[str, Any]:
    """The kernels of the built CUDA extension, by their short names."""
    return {
        cuda_kernels.short_name(name): kernel(Code(code.registers, code.stack, 0, cuda_kernels.WARPS, code.loop), "")
        for name, code in cuda_kernels.codes().items()
    }


@cache
def functions() -> dict[str, Any]:
    """The Triton kernels of the library by the names of `name_of`."""
    from triton.runtime.jit import JITFunction

    found = [v for module in triton_modules() for v in vars(module).values() if isinstance(v, JITFunction)]
    return {name_of(function): function for function in found}


def changed(kernels: dict[str, Any]) -> list[str]:
    """The recorded kernels whose source is another one now, or gone."""
    now = functions()

    def same(key: str, entry: dict[str, Any]) -> bool:
        name = key.partition("[")[0]
        return name.startswith("cuda.") or (name in now and source_of(now[name]) == entry["source"])

    return [key for key, entry in kernels.items() if not same(key, entry)]


def source_of(function: Any) -> str:
    """A hash of what a kernel and all that it calls say, but for comments and docstrings."""
    return _source_of(function.fn.__module__, function.fn.__name__, function)


@cache
def _source_of(module: str, name: str, function: Any) -> str:
    from triton.runtime.jit import JITFunction

    parts, seen, waiting = [], set(), [function]
    while waiting:
        now = waiting.pop()
        if id(now) in seen:
            continue
        seen.add(id(now))
        tree = ast.parse(textwrap.dedent(now.src))
        body = tree.body[0].body
        if isinstance(body[0], ast.Expr) and isinstance(getattr(body[0], "value", None), ast.Constant):
            del body[0]
        parts.append(ast.dump(tree))
        known = now.fn.__globals__
        named = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        waiting += [known[n] for n in sorted(named) if isinstance(known.get(n), JITFunction)]
    return hashlib.sha256("\n".join(sorted(parts)).encode()).hexdigest()[:12]
