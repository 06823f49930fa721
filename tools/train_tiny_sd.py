"""Trains the embedded model tiny-sd from nothing but a colour emoji font. Stages: ae, diffusion, export.

    python tools/train_tiny_sd.py --state DIR --stage ae --minutes 20
    python tools/train_tiny_sd.py --state DIR --stage diffusion --minutes 48
    python tools/train_tiny_sd.py --state DIR --stage export

Every stage resumes from what it finds in DIR. The shipped weights took 20 minutes on two Zen 4 cores and 48
on one of them, beside other work: 1,116 steps of 8 whole pictures, then 1,954 steps of 96 captions. (The
first 220 of these gave the noisiest steps more weight still.)
"""

import argparse
import time
from pathlib import Path

import torch
from tiny_flux import ae_stage, pictures
from tiny_sd import diffusion_stage, export_stage

from flux_sd.autoencoder import AutoEncoderConfig

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train the embedded model tiny-sd.")
    parser.add_argument(
        "--state", type=Path, required=True, help="folder for everything that a later run resumes from"
    )
    parser.add_argument("--stage", choices=("ae", "diffusion", "export"), required=True)
    parser.add_argument("--font", type=Path, help="NotoColorEmoji.ttf; default: where Debian puts it")
    parser.add_argument(
        "--minutes", type=float, default=55.0, help="time budget of the stage, over all its runs"
    )
    parser.add_argument("--batch", type=int, help="pictures per step")
    parser.add_argument("--rate", type=float, help="peak learning rate")
    out = ROOT / "flux_sd" / "models" / "tiny_sd"
    parser.add_argument("--out", type=Path, default=out, help="export: the checkpoint folder")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def main() -> None:
    """Run one stage."""
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    arguments.state.mkdir(parents=True, exist_ok=True)

    def log(line: str) -> None:
        stamped = f"{time.strftime('%H:%M:%S', time.gmtime())} {line}"
        print(stamped, flush=True)
        with (arguments.state / "log.txt").open("a") as file:
            file.write(stamped + "\n")

    shown = pictures.render(arguments.font, arguments.state / "pictures.pt")
    if arguments.stage == "ae":
        config = AutoEncoderConfig.tiny_sd()
        batch, rate = arguments.batch or 8, arguments.rate or 2e-3
        ae_stage.train(
            shown, config, arguments.state / "ae.pt", arguments.minutes, batch, rate, arguments.device, log
        )
    elif arguments.stage == "diffusion":
        batch, rate = arguments.batch or 96, arguments.rate or 2e-3
        diffusion_stage.train(shown, arguments.state, arguments.minutes, batch, rate, arguments.device, log)
    else:
        export_stage.export(shown, arguments.state, arguments.out, log)


if __name__ == "__main__":
    main()
