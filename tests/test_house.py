"""What keeps the rooms light: short lines, files of one thing, functions that can be read, no circle of imports, and
each fact in one place."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import lizard
import pytest

from mvit3_kernels import ops
from mvit3_kernels.ops.registry import FORMS

ROOT = Path(__file__).parents[1]
FOLDERS = ("mvit3_kernels", "python", "csrc", "benchmarks", "tests")
LINE, PARAMETERS, FUNCTION, FILE = 120, 10, 80, 500
# A file may be longer where its first lines say why.
LONGER = "lines because "
# Signatures that users call and that stay as they are.
PUBLIC = {"mvit3_kernels/models/create.py: create_model", "mvit3_kernels/nn/mobilevit.py: __init__"}


def sources(*endings: str) -> list[Path]:
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*")) if path.suffix in endings]
    assert files
    return files + ([ROOT / "setup.py"] if ".py" in endings else [])


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


PYTHON, CPP = sources(".py"), sources(".cpp", ".h", ".cu")


def test_lines_are_short():
    long = [
        f"{name(path)}:{i}"
        for path in PYTHON + CPP
        for i, line in enumerate(path.read_text().splitlines(), 1)
        if len(line) > LINE
    ]
    assert not long


def test_files_are_of_one_thing():
    long = []
    for path in PYTHON + CPP:
        lines = path.read_text().splitlines()
        if len(lines) > FILE and LONGER not in " ".join(lines[:15]):
            long.append(f"{name(path)}: {len(lines)}")
    assert not long


def is_kernel(function: ast.FunctionDef) -> bool:
    """A Triton function: it cannot take a structure."""
    return any("jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def functions(path: Path) -> Iterator[tuple[str, int, int, bool]]:
    """Name, parameters but for self, lines but for the docstring, whether it is a Triton function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            a = node.args
            arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            own = [argument for argument in arguments if argument.arg not in ("self", "cls")]
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node):
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, len(own), lines, is_kernel(node)


def test_python_functions_can_be_read():
    many, long = [], []
    for path in PYTHON:
        for function, parameters, lines, kernel in functions(path):
            where = f"{name(path)}: {function}"
            if parameters > PARAMETERS and not kernel and where not in PUBLIC:
                many.append(f"{where}: {parameters} parameters")
            if lines > FUNCTION:
                long.append(f"{where}: {lines} lines")
    assert not many and not long


def test_cpp_functions_can_be_read():
    found = []
    for path in CPP:
        # lizard goes by the ending of the name
        analysis = lizard.analyze_file.analyze_source_code(f"{path.stem}.cpp", path.read_text())
        found += [
            f"{name(path)}: {f.name}: {f.parameter_count} parameters, {f.length} lines"
            for f in analysis.function_list
            if f.parameter_count > PARAMETERS or f.length > FUNCTION
        ]
    assert not found


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT / "python" if "python" in path.parts else ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in PYTHON if path.relative_to(ROOT).parts[0] in ("mvit3_kernels", "python")}


def imports(module: str) -> set[str]:
    """The project's modules that one imports, at any place but for type hints alone."""
    path, found = MODULES[module], set()
    package = module if path.stem == "__init__" else module.rpartition(".")[0]
    tree = ast.parse(path.read_text())
    hints = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for node in hints:
        tree.body.remove(node)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
    return {other for other in found if other in MODULES and other != module}


def test_no_circle_of_imports():
    """Each module can be put above all that it imports."""
    graph = {module: imports(module) for module in MODULES}
    while True:
        below = set().union(*graph.values())
        # what imports nothing that is left, or is imported by nothing that is left, is in no circle
        inside = {module for module, others in graph.items() if others and module in below}
        if len(inside) == len(graph):
            break
        graph = {module: graph[module] & inside for module in inside}
    assert not graph


@pytest.mark.parametrize("path", [p for p in PYTHON if "ops" in p.parts and p.name == "__init__.py"], ids=name)
def test_registration_is_by_name(path):
    """An op's registered forms read arguments by their names in the schema."""
    text = path.read_text()
    assert not re.search(r"\bargs\[|\(None,\) \*|\[\d*::\d\]", text.replace("call.layers[", "")), "a position of a list"
    assert "torch.library" not in text.replace("torch.library.opcheck", ""), "goes past ops/registry.py"


def test_every_form_names_its_outputs():
    assert len(FORMS) > 30
    form = re.compile(
        r"(\w+?)((_spread|_project|_tile|_image)?_inference"
        r"|(_layer|_separable_layer|_norm|_twice)?(_forward|_backward)|_filter"
        r"|_filter_backward)?(_cuda|_rounded)?"
    )
    for op, kind in FORMS.items():
        assert kind.outputs._fields
        assert op in ops.__all__ or form.fullmatch(op)[1] in ops.__all__, f"{op} belongs to no op"
