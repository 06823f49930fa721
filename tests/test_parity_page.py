"""docs/parity.md: every command and program on the page runs, in order, and ends as the page says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flux_sd.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "parity.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


def run_block(kind: str, text: str, said: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Runs a block of commands or a program, or writes the file that it shows."""
    if kind == "sh":
        for line in text.splitlines():
            _, _, code = line.partition("# exit code ")
            program, *words = shlex.split(line, comments=True)
            assert program == "flux-sd"
            assert main(words) == int(code or 0), line
            said.append(capsys.readouterr().out)
    elif kind == "python":
        exec(compile(text, "docs/parity.md", "exec"), {})
    elif kind == "toml":
        Path(text.splitlines()[0].removeprefix("# ")).write_text(text, "utf-8")
    else:
        assert kind in ("rust", "text")  # not run here


def test_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    for kind, text in BLOCKS:
        run_block(kind, text, said, capsys)
    assert {"ours.safetensors", "report.html", "pizza.png"} <= {path.name for path in tmp_path.iterdir()}
    first = re.compile(r"first divergence: step\.0\.double_blocks\.1\.img \(OVER")
    assert [bool(first.search(output)) for output in said].count(True) == 1
    (shown,) = [text for kind, text in BLOCKS if kind == "text"]
    (printed,) = [output for output in said if first.search(output)]
    stages = [line.split()[0] for line in printed.splitlines() if line.startswith("step.")]
    assert [line.split()[0] for line in shown.splitlines() if line.startswith("step.")] == stages
    assert first.search(shown)
