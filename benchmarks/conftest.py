"""`pytest benchmarks/` measures, which the tests of the project leave out (pyproject.toml)."""

from __future__ import annotations

import pytest

from mvit3.runtime import usable_cpus

THREADS = 2


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--threads", type=int, default=THREADS, help=f"CPU threads of the benchmarks (default: {THREADS})")
    parser.addoption("--few", type=int, default=0, help="so many shapes of each op and mode (default: all)")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keeps a few shapes of each op and mode, from the first to the last of their list."""
    few = config.getoption("--few")
    if few < 1:
        return
    shapes: dict[tuple[str, str], list[str]] = {}
    for item in items:
        shape = item.callspec.id.rpartition("-")[0]
        same = shapes.setdefault((shape.partition("-")[0], shape.rpartition("-")[2]), [])
        same += [shape] if shape not in same else []
    kept = {same[i * (len(same) - 1) // max(few - 1, 1)] for same in shapes.values() for i in range(few)}
    out = [item for item in items if item.callspec.id.rpartition("-")[0] not in kept]
    config.hook.pytest_deselected(items=out)
    items[:] = [item for item in items if item not in out]


# What is recorded is for everyone: kinds of things, no name of a machine, no address of an object.
def pytest_benchmark_update_machine_info(machine_info: dict) -> None:
    cpu = machine_info.get("cpu", {})
    kept = {name: machine_info.get(name) for name in ("machine", "system", "python_implementation", "python_version")}
    machine_info.clear()
    machine_info.update(kept, cpu={name: cpu.get(name) for name in ("brand_raw", "count")})


def pytest_benchmark_update_json(output_json: dict) -> None:
    for one in output_json["benchmarks"]:
        one["params"] = {"candidate": one["extra_info"].get("candidate")}


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    threads, few = config.getoption("--threads"), config.getoption("--few")
    most = max(THREADS, usable_cpus())
    if not 1 <= threads <= most:
        raise pytest.UsageError(f"--threads must be at least 1 and at most {most}, got {threads}")
    if few < 0:
        raise pytest.UsageError(f"--few must be at least 0 (0: all), got {few}")
    config.option.benchmark_skip = False
