"""What the programs that train the embedded models share: options, pictures, a log."""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch

from tiny_flux.pictures import Pictures, render

ROOT = Path(__file__).resolve().parent.parent.parent
Log = Callable[[str], None]


def parse_arguments(model: str, stages: tuple[str, ...]) -> argparse.Namespace:
    """The command line of a program that trains `model` in `stages`, the last of which exports it."""
    parser = argparse.ArgumentParser(description=f"Train the embedded model {model}.")
    parser.add_argument(
        "--state", type=Path, required=True, help="folder for everything that a later run resumes from"
    )
    parser.add_argument("--stage", choices=stages, required=True)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where Debian puts it")
    parser.add_argument(
        "--minutes", type=float, default=55.0, help="time budget of the stage, over all its runs"
    )
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    out = ROOT / "flux_sd" / "models" / "_".join(model.split("-"))
    parser.add_argument("--out", type=Path, default=out, help="export: the checkpoint folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def begin(arguments: argparse.Namespace) -> tuple[Pictures, Log]:
    """Threads, the state folder, the pictures, and a log that is printed and kept there."""
    torch.set_num_threads(arguments.threads)
    arguments.state.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        stamped = f"{time.strftime('%H:%M:%S', time.gmtime())} {line}"
        print(stamped, flush=True)
        with (arguments.state / "log.txt").open("a") as file:
            file.write(stamped + "\n")

    return render(arguments.font, arguments.state / "pictures.pt"), log
