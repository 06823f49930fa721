"""pyproject.toml, constraints.txt and the code say the same."""

from __future__ import annotations

import re
import sys
import tomllib
from typing import Any

from helpers_source import PACKAGE, ROOT, imports_of, modules
from packaging.requirements import Requirement

from flux_sd.version import __version__

RUN_TIME = {
    "torch",
    "safetensors",
    "tokenizers",
    "sentencepiece",
    "gguf",
    "numpy",
    "pillow",
    "huggingface-hub",
}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normal(name): version for name, version in pairs}


def test_the_run_time_needs_are_the_agreed_ones_with_open_ranges() -> None:
    wanted = [Requirement(text) for text in project()["project"]["dependencies"]]
    assert {normal(need.name) for need in wanted} == RUN_TIME
    for need in wanted:
        assert [bound.operator for bound in need.specifier] == [">="], need


def test_every_declared_need_has_a_tested_version_in_its_range() -> None:
    table, tested = project()["project"], constraints()
    texts = [
        *table["dependencies"],
        *table["optional-dependencies"]["test"],
        *table["optional-dependencies"]["dev"],
    ]
    for need in map(Requirement, texts):
        if normal(need.name) != "flux-sd":
            assert need.specifier.contains(tested[normal(need.name)]), need


def test_the_package_imports_only_what_it_declares() -> None:
    names = {name.partition(".")[0] for path in modules() for name in imports_of(path)}
    others = names - set(sys.stdlib_module_names) - {"flux_sd"}
    declared = RUN_TIME | {"tqdm"}  # tqdm comes with huggingface_hub, for good
    assert {normal(name) for name in others} <= {need.replace("pillow", "pil") for need in declared}


def test_every_folder_of_modules_is_in_the_wheel() -> None:
    folders = {".".join(path.parent.relative_to(ROOT).parts) for path in PACKAGE.rglob("*.py")}
    assert folders | {"flux_sd.weights_maps"} == set(project()["tool"]["setuptools"]["packages"])


def test_there_is_one_version() -> None:
    assert project()["project"]["dynamic"] == ["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert f"\n## {__version__} " in changelog
