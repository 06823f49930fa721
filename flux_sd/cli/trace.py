"""`flux-sd trace`: records what happens inside a run, or inside one network. Floor 10."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import NonFiniteError, RequestError
from . import arguments
from .console import Console, Interrupt, ProgressBars

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
  flux-sd trace --stage unet --inputs run.safetensors --step 2 -o step.safetensors --model sd15
      the same for Stable Diffusion: its record says how it was guided, or --guidance does
  flux-sd trace "a cat" -o ours.safetensors --like-candle --numerics candle --latents-in noise.safetensors
      what `candle_reference run` records, under the same names, from the same noise

Patterns are those of a shell (* ? [...]); * matches dots too. `flux-sd compare` compares two records."""
RUN_OPTIONS = (  # that a single stage has no use for
    "size", "steps", "t5_len", "seed", "latents_in", "negative_prompt", "sampler", "schedule",
    "guidance_rescale", *arguments.ORIGINALS, "strength", "composite", "fit", "vae_tiling",
)  # fmt: skip
STAGES = ("clip", "clip_2", "t5", "transformer", "unet", "vae-encode", "vae-decode")
DENOISERS = ("transformer", "unet")  # have steps and guidance


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
    add("--model", metavar="NAME",
        help="one that `flux-sd models` lists (default: that of the files, else tiny-flux)")  # fmt: skip
    add("--seed", type=arguments.seed, metavar="N", help="of the noise (default: 0)")
    _add_choices(parser)
    arguments.add_picture_options(parser)
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
        choices=STAGES,
        help="run one network of the model alone, on --inputs",
    )
    add("--inputs", type=Path, metavar="FILE",
        help="safetensors: 'ids', 'latents', 'image', or the arguments of transformer or UNet by their "
        "names; or a record")  # fmt: skip
    add(
        "--step",
        type=arguments.seed,
        metavar="N",
        help="which step of a record, from 0 (default: 0)",
    )


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
        raise RequestError(
            f"{arguments.option_of(unused[0])} is of no use to --stage: it is about whole runs"
        )
    if args.step is not None and args.stage not in DENOISERS:
        named = " and ".join(DENOISERS)
        raise RequestError(f"--step is of use to --stage {named} only: it says which step's inputs to take")
    if args.guidance is not None and args.stage not in (None, *DENOISERS):
        raise RequestError(f"--guidance is of no use to --stage {args.stage}")


def _list(args: argparse.Namespace, version: SDVersion, console: Console) -> int:
    from ..lora.adapters import as_loras, with_adapters
    from ..numerics import parse
    from ..trace import Selection, candle_names, stages, stages_of

    info, numerics = with_adapters(version.info, as_loras(args.lora)), parse(args.numerics)
    if args.stage:
        known = list(stages_of(args.stage, info, numerics, args.step or 0))
    else:
        known = list(stages(info, _request(args, "a prompt"), numerics))
    selection = Selection(tuple(args.stages or ("default",)))
    names = candle_names(info.family, known) if args.like_candle else selection.names(known)
    for name in names:
        console.line(name)
    console.document({"stages": names})
    return 0


def _request(args: argparse.Namespace, prompt: str) -> GenerationRequest:
    from ..request import GenerationRequest

    return GenerationRequest(prompt=prompt, seed=args.seed or 0, **arguments.request_fields(args))


def _trace(args: argparse.Namespace, version: SDVersion, console: Console, cancel: CancelToken) -> Traced:
    from ..model_loader import check_request
    from ..trace import trace

    request = _request(args, args.prompt)
    check_request(version, request, args.numerics, args.lora)
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
    from ..stage_inputs import StageInputs
    from ..trace import stage_named, trace_stage

    stage_named(args.stage, version.info)
    bars = ProgressBars(console)
    try:
        with open_checkpoint(args.inputs) as given, closing(_load(args, version, cancel, bars)) as model:
            inputs = StageInputs(given, model.components.config, args.step or 0, args.guidance)
            return trace_stage(
                model.components, args.stage, inputs, args.output,
                patterns=args.stages or ("default",), overwrite=args.overwrite, on_event=bars, cancel=cancel,
            )  # fmt: skip
    finally:
        bars.close()


def _load(
    args: argparse.Namespace, version: SDVersion, cancel: CancelToken, bars: ProgressBars
) -> LoadedModel:
    return arguments.load(args, version, arguments.computing(args), cancel, bars)
