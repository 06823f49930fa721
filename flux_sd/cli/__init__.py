"""The command `flux-sd`: one file per command, and here what they share. Floor 10.

A command is a module with `register(commands)`, which adds its parser and names its function as `run`; that
function takes the parsed arguments and returns the exit code. Nothing here imports torch: `--help` and
`--version` answer at once, and a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import sys
import traceback
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version

from ..errors import FluxSdError, RequestError
from ..version import __version__
from . import arguments, compare, convert, generate, inspect, lora, maps, models, numerics, replay, trace

COMMANDS = (generate, replay, models, inspect, lora, maps, convert, trace, compare, numerics)

DESCRIPTION = """Paints pictures from text, and from pictures, with FLUX.1 and Stable Diffusion models.

A first picture, with the small model that is built in (nothing is downloaded):
  flux-sd generate "a slice of pizza on a blue background" -o pizza.png
"""
EPILOG = """`flux-sd COMMAND --help` explains a command, with examples.

exit codes: 0 done; 1 a run that failed, or a replay or comparison that differs; 2 bad input;
130 cancelled with Ctrl-C"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code: 0, 1, 2 or 130, see EPILOG."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    wants_traceback = "--traceback" in argv
    try:
        args = _parse(parser, argv)
        if args.run is None:
            parser.print_help()
            return 0
        code: int = args.run(args)
        sys.stdout.flush()  # a reader that went away shows here, not at the interpreter's exit
        return code
    except RequestError as error:
        return _fail(arguments.spelled(str(error)), error.exit_code, wants_traceback)
    except FluxSdError as error:
        return _fail(str(error), error.exit_code, wants_traceback)
    except KeyboardInterrupt:
        return _fail("cancelled", 130, wants_traceback)
    except BrokenPipeError:
        _silence_stdout()
        return 1
    except MemoryError as error:
        return _out_of_memory(error, wants_traceback)
    except Exception as error:  # noqa: BLE001 - the last resort: one line, and the way to more
        if type(error).__name__ == "OutOfMemoryError":  # torch's; torch itself may not be imported yet
            return _out_of_memory(error, wants_traceback)
        first_line = (str(error).splitlines() or [""])[0]
        hint = "" if wants_traceback else "; this is a defect: --traceback shows where it happened"
        return _fail(f"unexpected {type(error).__name__}: {first_line}{hint}", 1, wants_traceback)


def _out_of_memory(error: BaseException, traceback: bool) -> int:
    advice = "try a smaller --size, --no-batched, or another --device"
    return _fail(f"the memory ran out ({type(error).__name__}): nothing was written; {advice}", 1, traceback)


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        "flux-sd",
        usage="flux-sd COMMAND [options]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=raw,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=version_line())
    parser.add_argument(
        "--traceback", action="store_true", help="after an error, show where in the program it happened"
    )
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(prog="flux-sd", title="commands", metavar="COMMAND", dest="command")
    for module in COMMANDS:
        module.register(commands)
    for command in commands.choices.values():
        command.set_defaults(parser=command)
    return parser


def version_line() -> str:
    """Package, torch and Python; read from their records, importing nothing."""
    try:
        torch_version = version("torch")
    except PackageNotFoundError:
        torch_version = "not installed"
    return f"flux-sd {__version__} (torch {torch_version}, Python {platform.python_version()})"


def _parse(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    args, extra = parser.parse_known_args([word for word in argv if word != "--traceback"])
    if extra:
        words = " ".join(extra)
        plain = args.command == "generate" and not any(word.startswith("-") for word in extra)
        hint = ": put a prompt of several words in quotes" if plain else ""
        getattr(args, "parser", parser).error(f"unrecognized arguments: {words}{hint}")
    return args


def _fail(sentence: str, code: int, with_traceback: bool) -> int:
    if with_traceback:
        traceback.print_exc()
    print(f"flux-sd: {sentence}", file=sys.stderr)
    return code


def _silence_stdout() -> None:
    """Nobody reads on (`flux-sd models | head -1`): what is still buffered goes nowhere."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError:
        return  # stdout is no real file: nothing is left to flush
