"""`flux-sd trace`: what is recorded, under which names, bit-equal to the run, and never held in memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import weakref
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import TINY_FLUX
from helpers_flux import open_model, small_info, write_folder
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_sd import image, record_file
from flux_sd.checkpoint import open_checkpoint
from flux_sd.cli import main
from flux_sd.errors import NonFiniteError, OutputError, RequestError
from flux_sd.model_loader import Model
from flux_sd.numerics import reference
from flux_sd.outline import FLUX_ALONE
from flux_sd.record_file import RecordWriter
from flux_sd.request import GenerationRequest
from flux_sd.sampling import get_noise
from flux_sd.stage_inputs import StageInputs
from flux_sd.trace import Selection, Stage, stages, stages_of, trace, trace_stage

ORDER = GenerationRequest("a slice of pizza on a blue background", seed=1, steps=2)
# Everything that `run` in tools/candle_reference/src/run/flux.rs inserts into its record, for two steps.
CANDLE_NAMES = {
    "t5.ids", "t5.hidden", "clip.ids", "clip.pooled", "noise", "packed", "latents", "image", "pixels",
    "timesteps", "step.0.latents", "step.0.velocity", "step.1.latents", "step.1.velocity",
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_flux: Model) -> Model:
    return tiny_flux


@pytest.fixture(scope="module")
def record(model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every stage there is, of two steps of tiny-flux."""
    path = tmp_path_factory.mktemp("trace") / "run.safetensors"
    trace(model, ORDER, path, patterns=["*"])
    return path


def names_in_order(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.offset_keys())


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


# ------------------------------------------------------------------------------------------ the file


def written(path: Path, tensors: Mapping[str, Tensor], room: int) -> None:
    with path.open("w+b") as file:
        writer = RecordWriter(file, room)
        for name, tensor in tensors.items():
            writer.add(name, tensor)
        writer.finish({"prompt": 'a "quoted" ö'})


@pytest.mark.parametrize("room", [16, 4096])
def test_a_file_written_as_it_comes_reads_back(
    room: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every layout and dtype, with more than enough room for the header and with too little."""
    monkeypatch.setattr(record_file, "PIECE", 100)
    tensors = {
        "z.last name first": torch.randn(3, 4, 5).transpose(0, 2),
        "half": torch.randn(7, 3).bfloat16(),
        "ids": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "none": torch.empty(0, 3),
        "expanded": torch.ones(1, 4).expand(6, 4),
        "one": torch.ones(()).expand(1),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "a": torch.randn(64),
    }
    path = tmp_path / "record.safetensors"
    written(path, tensors, room)
    read = load_file(path)
    assert names_in_order(path) == list(tensors)
    for name, tensor in tensors.items():
        assert read[name].shape == tensor.shape
        assert torch.equal(read[name].double(), tensor.double()), name
    assert read["half"].dtype == torch.float64  # 42 bytes would leave what follows misaligned
    assert read["a"].dtype == torch.float32
    assert metadata(path)["prompt"] == 'a "quoted" ö'
    with open_checkpoint(path) as ours:
        assert all(info.offset % 8 == 0 for info in ours.infos.values())
        assert torch.equal(ours.read("a"), tensors["a"])


def test_a_name_is_used_once_and_a_header_has_a_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with (tmp_path / "x").open("w+b") as file:
        writer = RecordWriter(file)
        writer.add("a", torch.ones(2))
        with pytest.raises(ValueError, match="'a' already"):
            writer.add("a", torch.ones(2))
        monkeypatch.setattr(record_file, "MAX_HEADER", 40)
        with pytest.raises(OutputError, match="choose fewer stages"):
            writer.finish({})


def test_the_writer_lets_every_tensor_go(tmp_path: Path) -> None:
    with (tmp_path / "x").open("w+b") as file:
        writer = RecordWriter(file)
        tensors = [torch.randn(8) for _ in range(3)]
        ends = [weakref.ref(tensor) for tensor in tensors]
        for i, tensor in enumerate(tensors):
            writer.add(str(i), tensor)
        del tensor, tensors
        assert [end() for end in ends] == [None] * 3
        assert writer.count == 3 and writer.nbytes == 96


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts peak memory as Linux reports it")
def test_memory_does_not_grow_with_the_record(tmp_path: Path) -> None:
    """Two records of 128 MB, whose headers outgrow their room, are written and compared in under 100 MB."""
    program = f"""
        import resource, torch
        from pathlib import Path
        from flux_sd.checkpoint import open_checkpoint
        from flux_sd.compare import compare
        from flux_sd.record_file import RecordWriter
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        def write(path, factor, size=16):
            with path.open("w+b") as file:
                writer = RecordWriter(file, 64)
                for i in range(size):
                    writer.add(f"block.{{i}}", torch.full((1, 512, 4096), i + factor))
                writer.finish({{}})
        folder = Path({str(tmp_path)!r})
        torch.set_num_threads(1)
        write(folder / "warm.safetensors", 0.25, 1)
        (folder / "warm.safetensors").unlink()
        torch.ones(4_000_000).square().sum()
        before = peak()
        for name, factor in (("a", 1.0), ("b", 1.001)):
            write(folder / name, factor)
        with open_checkpoint(folder / "a") as a, open_checkpoint(folder / "b") as b:
            found = compare(a, b)
        print(len(found.rows), found.first_over.name, peak() - before)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, timeout=100,
        cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    count, first, megabytes = done.stdout.split()
    assert (count, first) == ("16", "block.0")
    assert float(megabytes) < 100


# ------------------------------------------------------------------------------------------ names


def test_the_list_is_what_a_run_records(model: Model, record: Path) -> None:
    """`stages` looks at networks on the meta device; the record comes from a run."""
    expected = [stage.name for stage in stages(model.version.info, ORDER, reference())]
    assert len(set(expected)) == len(expected) > 400
    assert set(names_in_order(record)) == set(expected)


def test_the_usual_record_holds_every_block(model: Model) -> None:
    usual = [stage.name for stage in stages(model.version.info, ORDER, reference()) if stage.default]
    for name in (
        "clip.ids", "clip.text_model.encoder.layers.1", "t5.encoder.block.1", "t5.hidden", "noise",
        "timesteps", "step.0.latents", "step.0.inputs.vec", "step.0.time_in", "step.1.double_blocks.1.img",
        "step.1.double_blocks.1.txt", "step.1.single_blocks.3", "step.1.velocity", "vae.decoder.mid.attn_1",
        "vae.decoder.up.3.block.0", "vae.decoder.up.0", "image", "pixels",
    ):  # fmt: skip
        assert name in usual
    assert not any("img_attn" in name or "linear1" in name or "encoder.down" in name for name in usual)


def test_a_released_model_is_listed_without_its_files(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["trace", "--list", "--model", "flux-dev", "--stages", "step.0.inputs.*"]
    assert main([*words, "--stages", "step.0.double_blocks.18.???_mod*"]) == 0
    listed = capsys.readouterr().out.split()
    assert listed[6] == "step.0.inputs.guidance" and listed[7] == "step.0.double_blocks.18.img_mod.0.shift"
    assert listed[-1] == "step.0.double_blocks.18.txt_mod.lin"
    assert len(listed) == 7 + 2 * (6 + 1)


@pytest.mark.parametrize(
    ("pattern", "taken"),
    [
        ("step.*.double_blocks.*", True),
        ("step.0.double_blocks.3", True),
        ("step.0.double_blocks.3.txt", False),
        ("*.img", True),
        ("default", True),
        ("double_blocks.3.img", False),
    ],
)
def test_patterns(pattern: str, taken: bool) -> None:
    stage = Stage("step.0.double_blocks.3.img", "step.0.double_blocks.3", default=True)
    assert Selection(("nothing", pattern)).takes(stage) is taken


def test_stages_lie_in_the_order_of_the_run(record: Path) -> None:
    order = names_in_order(record)
    wanted = [
        "clip.ids", "clip.text_model.encoder.layers.0", "t5.encoder.block.0", "t5.hidden", "noise",
        "step.0.latents", "step.0.img_in", "step.0.double_blocks.0.img_attn.qkv",
        "step.0.double_blocks.0.img",
        "step.0.single_blocks.0.linear1", "step.0.single_blocks.0", "step.0.velocity", "step.1.latents",
        "step.1.velocity", "latents", "vae.decoder.up.3", "vae.decoder.up.0", "image", "pixels",
    ]  # fmt: skip
    assert sorted(wanted, key=order.index) == wanted


# ------------------------------------------------------------------------------------------ values


def test_the_record_is_the_run(model: Model, record: Path) -> None:
    """Values of the record against the same numbers by another way; the picture against an untraced one."""
    read = load_file(record)
    (result,) = model.generate(ORDER)
    assert torch.equal(read["noise"], get_noise(1, 128, 128))
    assert torch.equal(read["latents"][0], result.latents)
    pixels = torch.tensor(list(result.image.tobytes()), dtype=torch.uint8).view(128, 128, 3)
    assert torch.equal(read["pixels"][0].permute(1, 2, 0), pixels)
    steps = [step.latents for step in model.steps(ORDER)]
    assert torch.equal(read["latents"], steps[-1])
    times = read["timesteps"]
    stepped = read["step.0.latents"] + read["step.0.velocity"] * float(times[1] - times[0])
    assert torch.equal(read["step.1.latents"], stepped)
    said = metadata(record)
    assert said["prompt"] == ORDER.prompt and said["seed"] == "1" and said["numerics"] == "reference"
    assert json.loads(said["files"]).keys() >= {"transformer", "t5", "clip", "vae"}


def test_what_lies_inside_a_block_makes_the_block(model: Model, record: Path) -> None:
    read = load_file(record)
    inside = "step.0.single_blocks.0"
    before = torch.cat([read[f"step.0.double_blocks.1.{part}"] for part in ("txt", "img")], dim=1)
    after = before + read[f"{inside}.modulation.0.gate"] * read[f"{inside}.linear2"]
    assert torch.allclose(after, read[inside], rtol=0, atol=1e-5 * float(after.abs().max()))


def test_nothing_is_left_on_the_model(model: Model, record: Path) -> None:
    assert record.exists() and not model.components.watchers
    for role in model.components.roles:
        for part in model.components.network(role).modules():
            assert not part._forward_hooks and not part._forward_pre_hooks


def test_like_candle_writes_what_candle_writes(tmp_path: Path) -> None:
    """In bfloat16, which Candle's program widens when it writes."""
    info = small_info()
    with open_model(write_folder(tmp_path / "model", info), info, torch.bfloat16) as model:
        noise = torch.randn(1, 16, 6, 4)
        request = GenerationRequest("a cat", steps=2, latents=noise)
        done = trace(model, request, tmp_path / "ours.safetensors", like_candle=True)
        plain = trace(model, request, tmp_path / "plain.safetensors", patterns=["t5.hidden"])
    read = load_file(done.path)
    assert set(read) == CANDLE_NAMES and done.tensors == len(CANDLE_NAMES)
    floats = {name for name, tensor in read.items() if tensor.is_floating_point()}
    assert {read[name].dtype for name in floats - {"timesteps"}} == {torch.float32}
    assert read["timesteps"].dtype == torch.float64 and read["pixels"].dtype == torch.uint8
    assert read["pixels"].shape == read["image"].shape == (1, 3, 48, 32)
    assert torch.equal(read["noise"], noise)
    assert read["clip.ids"].shape[1] < 10 and read["clip.ids"].argmax() == read["clip.ids"].numel() - 1
    assert load_file(plain.path)["t5.hidden"].dtype == torch.bfloat16


@pytest.mark.parametrize("stage", [name for name in FLUX_ALONE if name != "vae-encode"])
def test_a_stage_alone_is_bit_equal_to_the_run(
    stage: str, model: Model, record: Path, tmp_path: Path
) -> None:
    with open_checkpoint(record) as given:
        inputs = StageInputs(given, model.components.config, step=1 if stage == "transformer" else 0)
        done = trace_stage(model.components, stage, inputs, tmp_path / "stage.safetensors", patterns=["*"])
    whole, alone = load_file(record), load_file(done.path)
    last = {"clip": "clip.pooled", "t5": "t5.hidden", "transformer": "step.1.velocity", "vae-decode": "image"}
    assert last[stage] in alone and len(alone) > 20
    assert set(alone) == {
        known.name for known in stages_of(stage, model.version.info, reference(), inputs.step)
    }
    for name, tensor in alone.items():
        assert torch.equal(tensor, whole[name]), name
    assert metadata(done.path)["stage"] == stage


def test_inputs_may_be_made_by_hand_or_come_from_candle(model: Model, record: Path, tmp_path: Path) -> None:
    """The transformer at the second step: from its arguments, and from a run's latents and text states."""
    whole = load_file(record)
    by_hand = {
        name: whole[f"step.1.inputs.{name}"].float()
        for name in ("img", "img_ids", "txt", "txt_ids", "timesteps", "vec")
    }
    save_file(by_hand, tmp_path / "hand.safetensors")
    save_file({name: whole[name] for name in CANDLE_NAMES}, tmp_path / "candle.safetensors")
    for file, step in (("hand", 0), ("candle", 1)):
        with open_checkpoint(tmp_path / f"{file}.safetensors") as given:
            inputs = StageInputs(given, model.components.config, step)
            done = trace_stage(model.components, "transformer", inputs, tmp_path / f"{file}_out.safetensors")
        assert torch.equal(load_file(done.path)[f"step.{step}.velocity"], whole["step.1.velocity"]), file


def test_a_run_that_breaks_keeps_what_was_recorded(tmp_path: Path) -> None:
    info = small_info(depth=2)
    with open_model(write_folder(tmp_path / "model", info), info, keep_loaded=True) as model:
        block = model.components.network("transformer").double_blocks[1]
        with torch.no_grad():
            block.txt_mlp[2].weight[3, 3] = torch.nan
        with pytest.raises(NonFiniteError, match="the transformer, step 1"):
            trace(model, ORDER, tmp_path / "broken.safetensors")
        assert not any(part._forward_hooks for part in model.components.network("transformer").modules())
    read = load_file(tmp_path / "broken.safetensors")
    broken = [n for n in names_in_order(tmp_path / "broken.safetensors") if not torch.isfinite(read[n]).all()]
    assert broken[:2] == ["step.0.double_blocks.1.txt", "step.0.single_blocks.0"]
    said = metadata(tmp_path / "broken.safetensors")
    assert said["prompt"] == ORDER.prompt and "NaN" in said["failed"]


def test_a_traced_run_encodes_again(tmp_path: Path) -> None:
    """Encoded prompts are remembered; a record of the second run must hold the encoders all the same."""
    info = small_info()
    with open_model(write_folder(tmp_path / "model", info), info, keep_loaded=True) as model:
        model.generate(ORDER)
        done = trace(model, ORDER, tmp_path / "second.safetensors", patterns=["t5.*"])
    assert "t5.encoder.block.0" in load_file(done.path)


# ------------------------------------------------------------------------------------ command line


def test_the_command_takes_noise_from_a_record(record: Path, tmp_path: Path) -> None:
    """From the noise of a record the run is repeated, whatever the seed."""
    again = tmp_path / "again.safetensors"
    words = ["trace", ORDER.prompt, "--steps", "2", "--seed", "99", "--latents-in", str(record), "--quiet"]
    assert main([*words, "--stages", "image", "-o", str(again)]) == 0
    assert torch.equal(load_file(again)["image"], load_file(record)["image"])


def test_the_command_runs_one_stage(record: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "stage.safetensors"
    words = ["trace", "--stage", "transformer", "--inputs", str(record), "--step", "1", "-o", str(out)]
    assert main([*words, "--stages", "step.1.single_blocks.*", "--stages", "step.1.velocity", "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == str(out) and answer["tensors"] == len(load_file(out)) > 4
    assert torch.equal(load_file(out)["step.1.velocity"], load_file(record)["step.1.velocity"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["a cat"], "give -o FILE"),
        (["-o", "x.safetensors"], "give either a PROMPT"),
        (["a cat", "-o", "x.safetensors", "--stage", "t5", "--inputs", "i"], "give either a PROMPT"),
        (["-o", "x.safetensors", "--stage", "t5"], "--stage and --inputs belong together"),
        (["a cat", "-o", "x.png"], "expected .safetensors"),
        (["a cat", "-o", "x.safetensors", "--stages", "stp.*"], "no stage of this run matches 'stp.*'"),
        (["a cat", "-o", "x.safetensors", "--like-candle", "--stages", "*"], "leave out --stages"),
        (["a cat", "-o", "x.safetensors", "--size", "100"], "the nearest are"),
        (["--stage", "t5", "--inputs", "i", "-o", "x.safetensors", "--seed", "1"], "--seed is of no use"),
        (["--stage", "t5", "--inputs", "i", "-o", "x.safetensors", "--step", "1"], "--step is of use to"),
        (["--stage", "t5", "--inputs", "i", "-o", "x.safetensors"], "i does not exist"),
        (
            ["--stage", "t5", "--inputs", "in.safetensors", "-o", "x.safetensors"],
            "no tensor 'ids' or 't5.ids'",
        ),
    ],
)
def test_words_that_do_not_go_together(
    words: list[str], sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    save_file({"x": torch.ones(1)}, "in.safetensors")
    assert main(["trace", *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not list(tmp_path.glob("x.*"))


INPUTS = {
    "img": torch.ones(1, 4, 64), "img_ids": torch.ones(1, 4, 3), "txt": torch.ones(1, 5, 256),
    "txt_ids": torch.ones(1, 5, 3), "timesteps": torch.ones(1), "vec": torch.ones(1, 256),
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"img": torch.ones(1, 4, 65)}, r"img in .* has shape \[1, 4, 65\], expected \[B, S, 64\]"),
        ({"txt_ids": torch.ones(1, 6, 3)}, r"txt_ids in .* expected \[B, L, 3\], B = 1, S = 4, L = 5"),
        ({"vec": torch.ones(2, 256)}, r"vec in .* expected \[B, 256\], B = 1"),
        ({"vec": None, "txt": None}, "lacks txt, vec for the transformer"),
    ],
)
def test_inputs_that_do_not_fit_the_transformer(
    change: dict[str, Tensor | None], sentence: str, model: Model, tmp_path: Path
) -> None:
    changed = {name: tensor for name, tensor in {**INPUTS, **change}.items() if tensor is not None}
    save_file(changed, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as given, pytest.raises(RequestError, match=sentence):
        StageInputs(given, model.components.config).transformer()


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (torch.ones(1, 78, dtype=torch.int64), "CLIP takes 77 at most"),
        (torch.tensor([[3, 1024]]), "outside 0..1023"),
        (torch.tensor([[-1]]), "outside 0..1023"),
        (torch.ones(1, 7), "whole numbers"),
        (torch.ones(1, 1, 7, dtype=torch.int64), "expected"),
    ],
)
def test_ids_that_do_not_fit(ids: Tensor, sentence: str, model: Model, tmp_path: Path) -> None:
    save_file({"ids": ids}, tmp_path / "in.safetensors")
    with open_checkpoint(tmp_path / "in.safetensors") as given, pytest.raises(RequestError, match=sentence):
        StageInputs(given, model.components.config).ids("clip")


def test_a_trace_is_of_one_picture(model: Model, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="of one picture, not of 2"):
        trace(model, GenerationRequest("a cat", batch=2), tmp_path / "x.safetensors")
    with pytest.raises(RequestError, match="embeds no guidance"), open_checkpoint(_saved(tmp_path)) as given:
        StageInputs(given, model.components.config, guidance=3.5).transformer()


def _saved(folder: Path) -> Path:
    save_file(INPUTS, folder / "in.safetensors")
    return folder / "in.safetensors"


def test_a_record_is_not_overwritten_unasked(model: Model, record: Path) -> None:
    before = record.stat().st_mtime_ns
    with pytest.raises(OutputError, match="exists"):
        trace(model, ORDER, record)
    assert record.stat().st_mtime_ns == before
    assert image.check_output(record, True, ".safetensors") == record


def test_the_command_says_what_a_broken_run_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A network of the user's, damaged: exit code 1, the stage that broke first in the record."""
    monkeypatch.chdir(tmp_path)
    weights = load_file(TINY_FLUX / "flux1-tiny.safetensors")
    weights["single_blocks.1.linear2.bias"][0] = torch.inf
    save_file(weights, "damaged.safetensors")
    words = ["trace", "a cat", "--model", "tiny-flux", "--path", str(TINY_FLUX), "-o", "out.safetensors"]
    assert main([*words, "--transformer", "damaged.safetensors"]) == 1
    said = capsys.readouterr().err
    assert "until then is in out.safetensors" in said and "the transformer, step 1 produced NaN" in said
    read = load_file("out.safetensors")
    bad = [name for name in names_in_order(Path("out.safetensors")) if not torch.isfinite(read[name]).all()]
    assert bad[0] == "step.0.single_blocks.1"
