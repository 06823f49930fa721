"""What commands say and where: results on stdout, all else on stderr; progress bars; Ctrl-C. Floor 10."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import dataclass
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm  # type: ignore[import-untyped, unused-ignore]

    from ..request import CancelToken, Event


@dataclass(frozen=True)
class Console:
    """`quiet` leaves errors only; `json` keeps stdout for one JSON object."""

    quiet: bool = False
    json: bool = False

    def line(self, text: str) -> None:
        """A result, on stdout."""
        if not self.quiet and not self.json:
            print(text)

    def note(self, text: str) -> None:
        """What a person should know, on stderr."""
        if not self.quiet:
            print(text, file=sys.stderr)

    def document(self, content: dict[str, Any]) -> None:
        """The one JSON object, on stdout, where it was asked for."""
        if self.json:
            print(json.dumps(content, indent=2, ensure_ascii=False))


def table(rows: list[list[str]]) -> str:
    """Columns as wide as their widest cell; the first row is the header."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def printable(text: str, limit: int = 2000) -> str:
    """Text out of a file as a terminal may show it: control and invisible characters as escapes, cut."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text)
    return shown if len(shown) <= limit else shown[:limit] + "..."


def gigabytes(count: float) -> str:
    """12_300_000_000 -> "12.3 GB"; below a gigabyte in MB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


class Interrupt:
    """While open, the first Ctrl-C cancels the token and the second ends the process at once.

    The token may come later (it lives in a module that imports torch): a Ctrl-C before that is not lost.
    """

    def __init__(self) -> None:
        self._pressed = False
        self._token: CancelToken | None = None
        self._before: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():  # others may not set signals
            self._before = signal.signal(signal.SIGINT, self._first)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def token(self) -> CancelToken:
        """A token that Ctrl-C cancels."""
        from ..request import CancelToken

        self._token = CancelToken()
        if self._pressed:
            self._token.cancel()
        return self._token

    def _first(self, number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        self._pressed = True
        if self._token is not None:
            self._token.cancel()


class ProgressBars:
    """Shows Progress events as one bar per stage on stderr; silent where stderr is no terminal."""

    def __init__(self, console: Console) -> None:
        self._shown = not console.quiet and sys.stderr.isatty()
        self._bar: tqdm[Any] | None = None
        self._key: tuple[str, int] | None = None

    def __call__(self, event: Event) -> None:
        from ..request import Progress

        if not self._shown or not isinstance(event, Progress):
            return
        key = (event.stage, event.image)
        if key != self._key:
            self.close()
            self._key, self._bar = key, self._open(event)
        assert self._bar is not None
        if event.stage == "denoise":
            self._bar.set_postfix_str(f"{event.seconds:.2f} s/step", refresh=False)
        self._bar.update(event.index - self._bar.n)

    def close(self) -> None:
        """Ends the bar on screen, so that the next line starts at the left edge."""
        if self._bar is not None:
            self._bar.close()
        self._bar, self._key = None, None

    @staticmethod
    def _open(event: Any) -> tqdm[Any]:
        from tqdm import tqdm

        name = event.stage
        if event.images > 1:
            name = f"{name}, image {event.image + 1}/{event.images}"
        in_bytes = event.stage.startswith(("download", "convert"))
        plain = "{l_bar}{bar:24}| {n_fmt}/{total_fmt} {elapsed}{postfix}"
        return tqdm(
            total=event.total or None,
            desc=name,
            file=sys.stderr,
            leave=event.stage == "denoise",
            unit="B" if in_bytes else "",
            unit_scale=in_bytes,
            bar_format=None if in_bytes else plain,
            ncols=_columns(),
            nrows=20,  # more than are used; a terminal that reports no size would hide the bar
        )


def _columns() -> int:
    """Width of the terminal on stderr; 80 where it does not say (some containers report 0)."""
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
