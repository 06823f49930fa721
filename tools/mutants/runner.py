"""Runs tests against mutants, each in a fork of one process that has imported torch already, which saves more
than half of the time."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mutants.mutant import Mutant

PATIENCE = 180.0  # seconds for one mutant; some loop for ever


@dataclass(frozen=True)
class Outcome:
    """What became of one mutant."""

    survived: bool
    test: str = ""  # the first that failed
    crash: bool = False  # it raised something else than a failed assertion


def run_all(
    copies: Sequence[Path],
    root: Path,
    mutants: Mapping[str, Mutant],
    tests: Mapping[str, Sequence[str]],
    report: Callable[[str, Outcome], None],
) -> None:
    """Runs `tests[key]` against each mutant, one at a time in each copy of the project.

    Raises RuntimeError if the tests fail on the project as it is.
    """
    _warm_up()
    for files in dict.fromkeys(tuple(tests[key]) for key in mutants):
        outcome = _collect(*_start(copies[0], files))
        if not outcome.survived:
            raise RuntimeError(f"{outcome.test} fails without any mutant")
    waiting, free = list(mutants), list(copies)
    running: dict[int, tuple[str, Path, Path, float]] = {}
    while waiting or running:
        while waiting and free:
            key, copy = waiting.pop(0), free.pop()
            mutants[key].apply(root / mutants[key].file, copy / mutants[key].file)
            process, answer = _start(copy, tests[key])
            running[process] = (key, copy, answer, time.monotonic())
        for process in _ended(running):
            key, copy, answer, _ = running.pop(process)
            report(key, _read(answer))
            mutated = copy / mutants[key].file
            mutated.write_bytes((root / mutants[key].file).read_bytes())
            free.append(copy)
        time.sleep(0.02)


def _warm_up() -> None:
    """Imports what every test imports; nothing of flux_sd, and no thread is started."""
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    import gguf  # noqa: F401
    import numpy  # noqa: F401
    import PIL.Image  # noqa: F401
    import pytest  # noqa: F401
    import safetensors.torch  # noqa: F401
    import torch

    torch.set_num_threads(1)
    gc.freeze()


def _start(copy: Path, files: Sequence[str]) -> tuple[int, Path]:
    """(process, where it will write what it found)"""
    answer = copy / "outcome.json"
    answer.unlink(missing_ok=True)
    process = os.fork()
    if process == 0:
        try:
            os.setsid()
            _child(copy, files, answer)
        finally:
            os._exit(0)
    return process, answer


def _child(copy: Path, files: Sequence[str], answer: Path) -> None:
    import pytest

    silent = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(silent, stream)
    os.chdir(copy)
    sys.dont_write_bytecode = True  # an edit may leave size and second of a file as they were
    sys.path[:] = [str(copy), *(path for path in sys.path if Path(path).name != "tools")]
    listener = _Listener()
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(copy)]
    code = pytest.main([*options, *files], plugins=[listener])
    if code == 0:
        outcome = Outcome(survived=True)
    else:
        outcome = Outcome(False, listener.test or "collection", listener.crash or not listener.test)
    answer.write_text(json.dumps(vars(outcome)), encoding="utf-8")


class _Listener:
    """A pytest plugin that remembers the first failure."""

    test = ""
    crash = False

    def pytest_runtest_makereport(self, item: Any, call: Any) -> None:
        if call.excinfo is not None and not self.test and call.excinfo.typename != "Skipped":
            self.test = item.nodeid.removeprefix("tests/")
            self.crash = call.excinfo.typename not in ("AssertionError", "Failed")


def _ended(running: Mapping[int, tuple[str, Path, Path, float]]) -> list[int]:
    ended = []
    for process, (_, _, _, begun) in running.items():
        if time.monotonic() - begun > PATIENCE:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            ended.append(process)
        elif os.waitpid(process, os.WNOHANG)[0]:
            ended.append(process)
    return ended


def _collect(process: int, answer: Path) -> Outcome:
    os.waitpid(process, 0)
    return _read(answer)


def _read(answer: Path) -> Outcome:
    if not answer.exists():
        return Outcome(False, f"no end within {PATIENCE:.0f} s, or the process died", crash=True)
    return Outcome(**json.loads(answer.read_text(encoding="utf-8")))
