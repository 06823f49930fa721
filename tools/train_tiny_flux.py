"""Trains the embedded model tiny-flux from nothing but a colour emoji font. Stages: ae, flow, export.

    python tools/train_tiny_flux.py --state DIR --stage ae --minutes 30
    python tools/train_tiny_flux.py --state DIR --stage flow --minutes 50
    python tools/train_tiny_flux.py --state DIR --stage export

Every stage resumes from what it finds in DIR. The shipped weights took these times on two Zen 4 cores: 1,006
steps of 8 whole pictures, then 1,983 steps of 64 captions.
"""

from tiny_flux import ae_stage, export_stage, flow_stage
from tiny_flux.command import ROOT, begin, parse_arguments

from flux_sd.autoencoder import AutoEncoderConfig


def main() -> None:
    """Run one stage."""
    arguments = parse_arguments("tiny-flux", ("ae", "flow", "export"))
    shown, log = begin(arguments)
    state, minutes, device = arguments.state, arguments.minutes, arguments.device
    if arguments.stage == "ae":
        config, batch, rate = AutoEncoderConfig.tiny_flux(), arguments.batch or 8, arguments.rate or 2e-3
        ae_stage.train(shown, config, state / "ae.pt", minutes, batch, rate, device, log)
    elif arguments.stage == "flow":
        batch, rate = arguments.batch or 64, arguments.rate or 1.5e-3
        flow_stage.train(shown, state, minutes, batch, rate, device, log)
    else:
        export_stage.export(shown, state, arguments.out, ROOT / "tests" / "data", log)


if __name__ == "__main__":
    main()
