"""Trains the embedded model tiny-sd from nothing but a colour emoji font. Stages: ae, diffusion, export.

    python tools/train_tiny_sd.py --state DIR --stage ae --minutes 20
    python tools/train_tiny_sd.py --state DIR --stage diffusion --minutes 48
    python tools/train_tiny_sd.py --state DIR --stage export

Every stage resumes from what it finds in DIR. The shipped weights took 20 minutes on two Zen 4 cores and 48
on one of them, beside other work: 1,116 steps of 8 whole pictures, then 1,954 steps of 96 captions. (The
first 220 of these gave the noisiest steps more weight still.)
"""

from tiny_flux import ae_stage
from tiny_flux.command import begin, parse_arguments
from tiny_sd import diffusion_stage, export_stage

from flux_sd.autoencoder import AutoEncoderConfig


def main() -> None:
    """Run one stage."""
    arguments = parse_arguments("tiny-sd", ("ae", "diffusion", "export"))
    shown, log = begin(arguments)
    state, minutes, device = arguments.state, arguments.minutes, arguments.device
    if arguments.stage == "ae":
        config, batch, rate = AutoEncoderConfig.tiny_sd(), arguments.batch or 8, arguments.rate or 2e-3
        ae_stage.train(shown, config, state / "ae.pt", minutes, batch, rate, device, log)
    elif arguments.stage == "diffusion":
        batch, rate = arguments.batch or 96, arguments.rate or 2e-3
        diffusion_stage.train(shown, state, minutes, batch, rate, device, log)
    else:
        export_stage.export(shown, state, arguments.out, log)


if __name__ == "__main__":
    main()
