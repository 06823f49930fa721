"""`flux-sd trace`: records what happens inside a run, or inside one network. Floor 10."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError, NotBuiltError, RequestError
from . import arguments
from .console import Console, Interrupt, ProgressBars
from .generate import read_latents

if TYPE_CHECKING:
    from ..model_loader import LoadedModel
    from ..request import CancelToken, GenerationRequest
    from ..trace import Traced
    from ..versions import SDVersion

EPILOG = """examples:
  flux-sd trace "a slice of pizza" -o run.safetensors
      paints with the small built-in model and records ids, text states, noise, every block of every step, the
      latents and the picture
  flux-sd trace "a slice of pizza" -o block.safetensors --stages default --stages 'step.0.double_blocks.1.*'
      the same, and all that happens inside one block at the first step
  flux-sd trace --list --stages 'vae.decoder.up.*' --model flux-dev
      which stages a pattern selects; nothing is loaded
  flux-sd trace --stage transformer --inputs run.safetensors --step 2 -o step.safetensors
      the transformer alone, on what it was given at the third step of a recorded run
  flux-sd trace "a cat" -o ours.safetensors --like-candle --numerics candle --latents-in noise.safetensors
      what `candle_reference run` records, under the same names, from the same noise

Patterns are those of a shell (* ? [...]); * matches dots too. `flux-sd compare` compares two records."""
RUN_OPTIONS = ("size", "steps", "t5_len", "seed", "latents_in")  # that a single stage has no use for


def register(commands: Any) -> None:
    """Adds the command's parser."""
    parser = commands.add_parser(
        "trace",
        usage="flux-sd trace PROMPT -o FILE [options]\n"
        "       flux-sd trace --stage NAME --inputs FILE -o FILE [options]",
        help="record what happens inside a run",
        description="Records named activations of a run in one safetensors file, as they are computed.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(run=run)
    add = parser.add_argument
    add("prompt", metavar="PROMPT", nargs="?", type=arguments.prompt, help="what to paint, in quotes")
    add("--model", metavar="NAME", help="one that `flux-sd models` lists (default: tiny-flux)")
    _add_choices(parser)
    _add_run_options(parser)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", type=Path, metavar="FILE.safetensors", help="the record")
    add("--overwrite", action="store_true", help="replace a file that exists (default: refuse)")
    add("--quiet", action="store_true", help="print nothing but errors")
    add("--json", action="store_true", help="print one JSON object with what was recorded on stdout")
    arguments.add_model_options(parser)


def _add_choices(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what is recorded").add_argument
    add("--stages", action="append", metavar="PATTERN",
        help="record the stages that match, such as 'step.0.double_blocks.*'; may be given several times; "
        "'default' stands for every block and all that is no module's output (default: that)")  # fmt: skip
    add("--like-candle", action="store_true", help="exactly what `candle_reference run` writes")
    add("--list", action="store_true", help="print the names of the stages that would be recorded, and end")
    add(
        "--stage",
        choices=("clip", "t5", "transformer", "vae-decode"),
        help="run one network alone, on --inputs",
    )
    add("--inputs", type=Path, metavar="FILE",
        help="safetensors: 'ids', 'latents' or the transformer's arguments; or a record")  # fmt: skip
    add(
        "--step",
        type=arguments.seed,
        metavar="N",
        help="which step of a record, from 0 (default: 0)",
    )


def _add_run_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("the picture (defaults: the model's own)").add_argument
    add("--size", type=arguments.size, metavar="N|WxH", help="pixels: 512, or width x height as 512x768")
    add("--steps", type=arguments.whole, metavar="N", help="how many denoising steps")
    add("--guidance", type=float, metavar="X", help="how closely to follow the text (flux-dev)")
    add("--t5-len", type=arguments.whole, metavar="N", help="length of the T5 text input in tokens")
    add("--seed", type=arguments.seed, metavar="N", help="of the noise (default: 0)")
    add("--latents-in", type=Path, metavar="FILE",
        help="this noise in place of the seed's: safetensors, 'latents' [1,C,H/8,W/8]; a record")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Carries out the command."""
    console = Console(args.quiet, args.json)
    version = arguments.chosen_version(args, args.model)
    if args.list:
        return _list(args, version, console)
    _check(args)
    with Interrupt() as interrupt:
        from .. import image

        cancel = interrupt.token()
        image.check_output(args.output, args.overwrite, ".safetensors")
        carry_out = _trace_stage if args.stage else _trace
        try:
            traced = carry_out(args, version, console, cancel)
        except NonFiniteError:
            console.note(f"note: no picture was written; what was computed until then is in {args.output}")
            raise
    console.line(f"{traced.path}: {traced.tensors} tensors, {traced.nbytes / 1e6:.1f} MB")
    for note in traced.result.notes if traced.result else []:
        console.note(f"note: {note}")
    console.document({"file": str(traced.path), "tensors": traced.tensors, "bytes": traced.nbytes})
    return 0


def _check(args: argparse.Namespace) -> None:
    """Refuses words that do not go together. Raises RequestError."""
    if args.output is None:
        raise RequestError("where should the record go: give -o FILE.safetensors")
    if (args.prompt is None) == (args.stage is None):
        raise RequestError("give either a PROMPT, to trace a whole run, or --stage, to trace one network")
    if (args.stage is None) != (args.inputs is None):
        raise RequestError("--stage and --inputs belong together: which network, and what it is given")
    if args.like_candle and (args.stages or args.stage):
        raise RequestError("--like-candle says which stages are recorded: leave out --stages and --stage")
    unused = [name for name in RUN_OPTIONS if getattr(args, name) is not None] if args.stage else []
    if unused:
        raise RequestError(f"--{unused[0].replace('_', '-')} is of no use to --stage: it is about whole runs")
    if args.step is not None and args.stage != "transformer":
        raise RequestError(
            "--step is of use to --stage transformer only: it says which step's inputs to take"
        )
    if args.guidance is not None and args.stage not in (None, "transformer"):
        raise RequestError(f"--guidance is of no use to --stage {args.stage}")


def _list(args: argparse.Namespace, version: SDVersion, console: Console) -> int:
    from ..model_loader import check_request
    from ..trace import Selection, stages, stages_of

    check_request(version, _request(args, "a prompt"), args.numerics)
    if args.stage:
        known = list(stages_of(args.stage, version.info, args.step or 0))
    else:
        known = list(stages(version.info, args.steps or version.info.steps))
    selection = Selection(_patterns(args))
    selection.check(known)
    names = [stage.name for stage in known if selection.takes(stage)]
    for name in names:
        console.line(name)
    console.document({"stages": names})
    return 0


def _patterns(args: argparse.Namespace) -> tuple[str, ...]:
    from ..trace import CANDLE, DEFAULT

    return CANDLE if args.like_candle else tuple(args.stages or (DEFAULT,))


def _request(args: argparse.Namespace, prompt: str) -> GenerationRequest:
    from ..request import GenerationRequest

    width, height = args.size or (None, None)
    latents = None if args.latents_in is None else read_latents(args.latents_in)
    return GenerationRequest(
        prompt=prompt, width=width, height=height, steps=args.steps, guidance=args.guidance,
        seed=args.seed or 0, t5_length=args.t5_len, latents=latents,
    )  # fmt: skip


def _trace(args: argparse.Namespace, version: SDVersion, console: Console, cancel: CancelToken) -> Traced:
    from ..model_loader import check_request
    from ..trace import trace

    request = _request(args, args.prompt)
    check_request(version, request, args.numerics)
    bars = ProgressBars(console)
    try:
        with closing(_load(args, version, cancel, bars)) as model:
            return trace(
                model, request, args.output, patterns=args.stages or ("default",),
                like_candle=args.like_candle, overwrite=args.overwrite, on_event=bars, cancel=cancel,
            )  # fmt: skip
    finally:
        bars.close()


def _trace_stage(
    args: argparse.Namespace, version: SDVersion, console: Console, cancel: CancelToken
) -> Traced:
    from ..checkpoint import open_checkpoint
    from ..model_loader import FluxModel
    from ..stage_inputs import StageInputs
    from ..trace import trace_stage

    bars = ProgressBars(console)
    try:
        with open_checkpoint(args.inputs) as given, closing(_load(args, version, cancel, bars)) as model:
            if not isinstance(model, FluxModel) or version.info.flux is None:
                raise NotBuiltError(
                    f"single stages of {version.info.key} cannot be run yet: trace a whole run"
                )
            inputs = StageInputs(given, version.info.flux, args.step or 0)
            return trace_stage(
                model.components, args.stage, inputs, args.output, guidance=args.guidance,
                patterns=args.stages or ("default",), overwrite=args.overwrite, on_event=bars, cancel=cancel,
            )  # fmt: skip
    finally:
        bars.close()


def _load(
    args: argparse.Namespace, version: SDVersion, cancel: CancelToken, bars: ProgressBars
) -> LoadedModel:
    computing = arguments.Computing(args.device, args.dtype, args.numerics)
    return arguments.load(args, version, computing, cancel, bars)
