"""The rules of ARCHITECTURE.md that a program can check."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from helpers_source import (
    PACKAGE,
    ROOT,
    imports,
    imports_of,
    modules,
    outside_type_checking,
    package_of,
    project_files,
    tree,
)

NETWORKS = ("clip.py", "t5.py", "flux_mmdit.py", "unet.py", "autoencoder.py")
FORBIDDEN = {"accelerate", "diffusers", "einops", "peft", "torchvision", "transformers", "pickle"}
OPENS_CONNECTIONS = {
    "ftplib",
    "http",
    "httpx",
    "httpx2",
    "huggingface_hub",
    "requests",
    "socket",
    "urllib",
    "urllib3",
}
MAX_LINE, MAX_FUNCTION, MAX_FILE = 110, 40, 700
MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|home/\w+|Users/\w+)/")


def floors() -> dict[str, int]:
    """File name (or `folder/`) to floor, from the table in ARCHITECTURE.md."""
    rows = re.findall(
        r"^\| (\d+) \| `([^`]+)` \|", (ROOT / "ARCHITECTURE.md").read_text("utf-8"), re.MULTILINE
    )
    names = [name for _, name in rows]
    assert len(names) == len(set(names)), "ARCHITECTURE.md lists a file twice"
    return {name: int(floor) for floor, name in rows}


def row_of(path: Path) -> str:
    """The table's name for a file: its own, or that of its folder."""
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) == 1 else f"{parts[0]}/"


def row_of_import(name: str, rows: set[str]) -> str | None:
    """The table's name for an imported dotted name, None for what is not ours."""
    parts = name.split(".")
    if parts[0] != "flux_sd":
        return None
    if len(parts) > 1:
        for row in (f"{parts[1]}.py", f"{parts[1]}/"):
            if row in rows:
                return row
    return "__init__.py"


def floor_problems(path: Path, imported: set[str], table: dict[str, int]) -> list[str]:
    own = row_of(path)
    found = {row_of_import(name, set(table)) for name in imported} - {None, own, "errors.py"}
    return [
        f"{own} (floor {table[own]}) imports {row} (floor {table[row]})"
        for row in sorted(filter(None, found))
        if table[row] >= table[own]
    ]


def test_the_table_lists_exactly_the_files_that_exist() -> None:
    assert {row_of(path) for path in modules()} == set(floors())


def test_imports_go_down() -> None:
    table = floors()
    problems = [problem for path in modules() for problem in floor_problems(path, imports_of(path), table)]
    assert not problems, "\n".join(problems)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("from .hub import fetch", "hub.py"),
        ("from . import hub", "hub.py"),
        ("def f():\n    from .hub import fetch", "hub.py"),
        ("import flux_sd.hub", "hub.py"),
        ("from flux_sd import hub as h", "hub.py"),
        ("if TYPE_CHECKING:\n    from .hub import fetch", "hub.py"),
        ("import_module('flux_sd.hub')", "hub.py"),
        ("from . import load_model", "__init__.py"),
        ("from .clip import ClipTextEncoder", "clip.py"),
        ("from .errors import FluxSdError\nfrom .ops import attention\nimport torch", None),
    ],
)
def test_every_way_to_import_is_seen(source: str, problem: str | None) -> None:
    found = floor_problems(PACKAGE / "t5.py", set(imports(ast.parse(source), ("flux_sd",))), floors())
    assert (problem is None and not found) or (len(found) == 1 and f"imports {problem} " in found[0])


def test_relative_imports_in_a_folder_are_resolved() -> None:
    source = ast.parse("from . import a\nfrom ..ops import attention\nfrom .. import hub")
    assert set(imports(source, ("flux_sd", "schedulers"))) == {
        "flux_sd.schedulers.a",
        "flux_sd.ops.attention",
        "flux_sd.hub",
    }


def test_networks_import_nothing_of_the_package_but_ops() -> None:
    for name in NETWORKS:
        ours = {row_of_import(imported, set(floors())) for imported in imports_of(PACKAGE / name)}
        assert ours <= {None, "ops.py"}, name


def top_level(path: Path, at_run_time: bool = False) -> set[str]:
    module = outside_type_checking(tree(path)) if at_run_time else tree(path)
    return {name.partition(".")[0] for name in imports(module, package_of(path))}


def test_no_forbidden_imports() -> None:
    found = {path.name: sorted(top_level(path) & FORBIDDEN) for path in modules()}
    assert not any(found.values()), found


def test_only_hub_opens_connections() -> None:
    found = {path.name for path in modules() if top_level(path, at_run_time=True) & OPENS_CONNECTIONS}
    assert found <= {"hub.py"}


def test_only_image_knows_picture_formats() -> None:
    found = {path.name for path in modules() if "PIL" in top_level(path, at_run_time=True)}
    assert found <= {"image.py"}


def calls(path: Path) -> list[ast.Call]:
    return [node for node in ast.walk(tree(path)) if isinstance(node, ast.Call)]


def test_nothing_is_loaded_loosely() -> None:
    """No strict=False, and torch.load in one place and weights-only: a load is exact, no file is executed."""
    for path in modules():
        for call in calls(path):
            loose = [k for k in call.keywords if k.arg == "strict" and ast.unparse(k.value) == "False"]
            is_zip = ast.unparse(call.func) == "zip"
            assert is_zip or not loose, f"{path.name}:{call.lineno} passes strict=False"
            if ast.unparse(call.func) == "torch.load":
                assert path.name == "pickle_reader.py", f"{path.name}:{call.lineno}"
                options = {k.arg: ast.unparse(k.value) for k in call.keywords}
                assert options.get("weights_only") == "True", f"{path.name}:{call.lineno}"


def test_no_key_is_rewritten_in_code() -> None:
    """Loaders and the map reader replace no part of a string and use no regular expression on keys."""
    readers = [
        *PACKAGE.glob("*_loader.py"),
        PACKAGE / "weight_map.py",
        PACKAGE / "load_plan.py",
        PACKAGE / "checkpoint.py",
    ]
    for path in readers:
        for call in calls(path):
            if isinstance(call.func, ast.Attribute) and call.func.attr == "replace":
                allowed = ast.unparse(call.func.value) in ("os", "dataclasses")
                assert allowed, f"{path.name}:{call.lineno} calls .replace()"
        if path.name != "weight_map.py":  # it parses rows, not keys
            assert "re" not in top_level(path), f"{path.name} imports re"


def test_no_failure_is_swallowed() -> None:
    for path in modules():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.ExceptHandler) and [type(line) for line in node.body] == [ast.Pass]:
                kind = ast.unparse(node.type) if node.type else "everything"
                swallows = kind in ("everything", "Exception", "BaseException")
                assert not swallows, f"{path.name}:{node.lineno} drops {kind}"


def test_functions_are_short() -> None:
    long = [
        f"{path.name}:{node.lineno} {node.name}: {length} lines"
        for path in modules()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION
    ]
    assert not long, f"over {MAX_FUNCTION} lines:\n" + "\n".join(long)


def test_lines_and_files_are_short() -> None:
    problems, counts = [], {}
    for path in [*modules(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "tools").rglob("*.py")]:
        lines = path.read_text("utf-8").splitlines()
        counts[str(path.relative_to(ROOT))] = len(lines)
        problems += [f"{path.name}:{i}" for i, line in enumerate(lines, 1) if len(line) > MAX_LINE]
    for name, count in sorted(counts.items(), key=lambda item: -item[1]):  # shown by `pytest -s`
        print(f"{count:6d}  {name}")
    assert not problems, f"lines over {MAX_LINE}: {problems}"
    assert max(counts[f"flux_sd/{p.relative_to(PACKAGE)}"] for p in modules()) <= MAX_FILE, (
        "split the longest file"
    )


def test_no_machine_path_in_any_file() -> None:
    problems = []
    for path in project_files():
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # weights, pictures, sentencepiece models
        problems += [f"{path.relative_to(ROOT)}: {match[0]}" for match in MACHINE_PATH.finditer(text)]
    assert not problems, problems
