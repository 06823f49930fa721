"""Wrong files in every role: one sentence, exit code 2, at once, and nothing read but headers."""

from __future__ import annotations

import json
import resource
import shutil
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import helpers_gguf
import helpers_headers as header
import pytest

from flux_sd.cli import main
from flux_sd.errors import AmbiguousFileError, CheckpointError, FluxSdError, MissingFileError, WeightMapError
from flux_sd.model_files import FLUX, find_files
from flux_sd.versions import SDVersion

TOKENIZERS = Path(__file__).parent / "data" / "tokenizers"
ROLES = tuple(FLUX.maps)
TITLES = {
    "clip": "a CLIP text encoder", "t5": "a T5 encoder", "transformer": "a FLUX.1 transformer",
    "vae": "an autoencoder (VAE)",
}  # fmt: skip
PARTS: dict[str, Callable[[], header.Shapes]] = {
    "transformer": lambda: header.flux("schnell"),
    "vae": header.flux_vae,
    "clip": header.clip_l,
    "t5": header.t5_xxl,
}
FILES = {
    "transformer": "flux1-schnell.safetensors", "vae": "ae.safetensors", "clip": "clip_l.safetensors",
    "t5": "t5xxl_fp16.safetensors",
}  # fmt: skip
FAST = 1.0  # seconds of processor time, without the import of torch; measured: 0.05 to 0.15


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FLUX.1 schnell at its real size, 33 GB of holes: opening it is all that can be done with it."""
    folder = tmp_path_factory.mktemp("model")
    for role, name in FILES.items():
        header.safetensors(folder / name, PARTS[role]())
    shutil.copytree(TOKENIZERS / "clip", folder / "tokenizer")
    shutil.copytree(TOKENIZERS / "t5", folder / "tokenizer_2")
    return folder


def refusal(capsys: pytest.CaptureFixture[str], *words: str, model: str = "flux-schnell") -> str:
    """What `flux-sd generate` says to these words: one line on stderr and exit code 2, within a second."""
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    code = main(["generate", "a prompt", "--model", model, "--device", "cpu", "--quiet", *words])
    seconds, after = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    captured = capsys.readouterr()
    assert (code, captured.out) == (2, ""), captured.err
    assert captured.err.startswith("flux-sd: ") and captured.err.count("\n") == 1, captured.err
    assert "unexpected" not in captured.err and seconds < FAST
    assert after - before < 300_000  # KiB: the files have gigabytes
    return captured.err


@pytest.fixture(autouse=True)
def warm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules are imported before time is taken, and a picture would go to a folder of its own."""
    import flux_sd.generation_engine  # noqa: F401

    monkeypatch.chdir(tmp_path)


# right files in wrong roles ---------------------------------------------------------------------------------


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("other", ROLES)
def test_a_part_in_the_role_of_another_is_told_its_own(
    role: str, other: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if role == other:
        return
    said = refusal(capsys, "--path", str(model), f"--{role}", str(model / FILES[other]))
    assert f"{role}: {model / FILES[other]} is {TITLES[other]}" in said and f"give it as --{other}" in said


def test_two_files_in_each_other_s_roles_are_one_sentence(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clip, t5 = str(model / FILES["clip"]), str(model / FILES["t5"])
    said = refusal(capsys, "--path", str(model), "--clip", t5, "--t5", clip)
    assert "give it as --t5; t5: " in said and said.endswith("give it as --clip\n")


def test_a_file_of_another_version_names_the_version(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dev = header.gguf(tmp_path / "x.gguf", header.flux("dev"), "Q4_K")
    said = refusal(capsys, "--path", str(model), "--transformer", str(dev))
    assert "is a FLUX.1 transformer, dev family, which flux-schnell does not take" in said
    assert "guidance_embed 1, expected 0" in said and said.endswith("choose --model flux-dev\n")
    said = refusal(capsys, "--path", str(model), model="flux-dev")
    assert "schnell, which flux-dev does not take" in said and said.endswith("choose --model flux-schnell\n")


@pytest.mark.parametrize(("channels", "what"), [(384, "Fill"), (128, "Canny or Depth")])
def test_editing_models_are_not_the_base_model(
    channels: int, what: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = header.flux("dev") | {"img_in.weight": (3072, channels)}
    path = header.safetensors(tmp_path / "flux1-dev.safetensors", shapes)
    said = refusal(capsys, "--path", str(model), "--transformer", str(path), model="flux-dev")
    assert f"{what} ({channels} input channels)" in said and "in_channels" in said


STRANGERS: dict[str, tuple[Callable[[], header.Shapes], str]] = {
    "sd unet": (lambda: header.reference("unet_sd15"), "a Stable Diffusion UNet, SD 1.x"),
    "sdxl file": (lambda: header.sd_single_file("sdxl"), "a Stable Diffusion UNet, SDXL"),
    "lora": (lambda: {"lora_unet_single_blocks_0_linear1.lora_up.weight": (9, 4)}, "a LoRA (kohya's names)"),
    "sd3": (lambda: header.reference("mmdit_tiny_sd3_f16"), "a Stable Diffusion 3 transformer"),
    "flux.2": (lambda: {"double_stream_modulation_img.lin.weight": (9, 9)}, "a FLUX.2 transformer"),
    "openclip": (lambda: header.open_clip(1280, 2), "a CLIP text encoder, OpenCLIP-bigG (SDXL)"),
    "unknown": (lambda: {"nothing.known": (1,)}, "names of no known layout"),
}


@pytest.mark.parametrize("name", STRANGERS)
@pytest.mark.parametrize("role", ROLES)
def test_files_of_other_models_are_called_by_their_names(
    role: str, name: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes, what = STRANGERS[name]
    path = header.safetensors(tmp_path / "x.safetensors", shapes(), "F16")
    if (name, role) == ("sdxl file", "clip"):
        return  # its first encoder is the one that FLUX.1 takes
    said = refusal(capsys, "--path", str(model), f"--{role}", str(path))
    if (name, role) == ("sdxl file", "vae"):
        assert "SD 1, 2 or XL" in said and "z_channels 4, expected 16" in said
    else:
        assert what in said and TITLES[role] in said


def test_encoders_of_stable_diffusion_are_not_those_of_flux(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae = header.safetensors(tmp_path / "vae.safetensors", header.reference("vae_sd"))
    said = refusal(capsys, "--path", str(model), "--vae", str(vae))
    assert "SD 1, 2 or XL" in said and "z_channels 4, expected 16" in said
    big = header.safetensors(tmp_path / "clip.safetensors", header.reference("clip_sdxl_2"))
    said = refusal(capsys, "--path", str(model), "--clip", str(big))
    assert "OpenCLIP-bigG (SDXL)" in said and "hidden_size 1280, expected 768" in said


# files that are no checkpoints ------------------------------------------------------------------------------


def lying(**entry: object) -> bytes:
    """A safetensors file whose one entry says these things."""
    text = json.dumps({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | entry}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def announced(tensors: int = 0, pairs: int = 0) -> bytes:
    """A GGUF file that promises more than it holds."""
    return helpers_gguf.File(tensor_count=tensors, pair_count=pairs).header()


HUGE = 2**62
GGUF_TENSOR = helpers_gguf.Described("x", (HUGE, HUGE), 0, b"")
DAMAGED: dict[str, bytes] = {
    "empty": b"",
    "text": b"not a checkpoint at all, although somebody called it one\n",
    "page": b"<!DOCTYPE html><html><body>404</body></html>",
    "pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "zeros": bytes(100_000),
    "ones": b"\xff" * 1000,
    "pickle": b"PK\x03\x04" + bytes(100),
    "a length beyond the file": struct.pack("<Q", 10**9) + b"{}",
    "a length beyond any file": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a cut header": lying()[:20],
    "cut values": lying()[:-1],
    "offsets beyond the file": lying(data_offsets=[HUGE, HUGE + 8]),
    "offsets backwards": lying(data_offsets=[8, 0]),
    "sizes that overflow": lying(shape=[2**32, 2**32]),
    "negative sizes": lying(shape=[-2]),
    "an unknown type": lying(dtype="F5"),
    "no json": struct.pack("<Q", 8) + b"{{{{{{{{",
    "nested json": struct.pack("<Q", 60_000) + b'{"a":' * 12_000,
    "gguf alone": b"GGUF",
    "gguf of a version to come": helpers_gguf.File(version=99).header(),
    "gguf with 2^62 tensors": announced(tensors=HUGE),
    "gguf with 2^62 pairs": announced(pairs=HUGE),
    "gguf with an endless array": helpers_gguf.File(pair_count=1).header()
    + helpers_gguf.text("k") + struct.pack("<IIQ", helpers_gguf.ARRAY, helpers_gguf.U8, 2**40),
    "gguf with sizes that overflow": helpers_gguf.File([GGUF_TENSOR]).header(),
    "gguf with an unknown type": helpers_gguf.File([replace(GGUF_TENSOR, sizes=(1,), kind=77)]).content(),
    "gguf with a tensor beyond the file": helpers_gguf.File(
        [helpers_gguf.float32("x", 1.0)], tensor_count=1
    ).content()[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("suffix", [".safetensors", ".gguf"])
def test_damaged_and_hostile_files_are_refused_in_one_sentence(
    name: str, suffix: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / f"x{suffix}"
    path.write_bytes(DAMAGED[name])
    said = refusal(capsys, "--path", str(model), "--transformer", str(path))
    assert str(path) in said and len(said) < 400 + len(str(path))
    assert main(["inspect", str(path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("role", ROLES)
def test_a_download_that_was_cut_is_refused_in_every_role(
    role: str, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = header.safetensors(tmp_path / "cut.safetensors", PARTS[role]())
    with whole.open("r+b") as file:
        file.truncate(whole.stat().st_size // 2)
    assert "is truncated" in refusal(capsys, "--path", str(model), f"--{role}", str(whole))


def test_folders_and_devices_in_place_of_files(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "holds no .safetensors or .gguf file" in refusal(
        capsys, "--path", str(model), "--vae", str(tmp_path)
    )
    assert "does not exist" in refusal(capsys, "--path", str(model), "--vae", str(tmp_path / "nothing"))
    assert "no regular file" in refusal(capsys, "--path", str(model), "--vae", "/dev/zero")
    assert "no regular file" in refusal(capsys, "--path", "/dev/zero")


def test_a_single_file_of_another_model_is_no_path(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = header.safetensors(tmp_path / "unet.safetensors", header.reference("unet_sdxl"))
    said = refusal(capsys, "--path", str(path))
    assert "holds a Stable Diffusion UNet, SDXL: a folder, or a file with" in said


def test_of_two_precisions_the_plain_one_is_taken_and_two_others_are_offered(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As diffusers takes them: a variant in the name has to be asked for."""
    names = {"transformer": "flux1-schnell.safetensors", "vae": "ae.safetensors", "t5": "t5xxl.safetensors"}
    for role, name in names.items():
        header.safetensors(tmp_path / name, PARTS[role]())
    for name in ("tokenizer", "tokenizer_2"):
        (tmp_path / name).mkdir()
    info, folder = SDVersion.FLUX_SCHNELL.info, tmp_path / "text_encoder"
    for name in ("model.fp16.safetensors", "model.safetensors", "model.bf16.safetensors"):
        header.safetensors(folder / name, header.clip_l())
    plain, half = folder / "model.safetensors", folder / "model.fp16.safetensors"
    for given in ({}, {"clip": folder}):
        assert find_files(info, tmp_path, given).networks["clip"] == plain
    assert find_files(info, tmp_path, {"clip": half}).networks["clip"] == half
    plain.unlink()
    said = refusal(capsys, "--path", str(tmp_path))
    assert "holds model.bf16.safetensors and model.fp16.safetensors for the clip" in said
    assert f"--clip {folder}/model.bf16.safetensors or --clip {folder}/model.fp16.safetensors" in said
    with pytest.raises(AmbiguousFileError, match=r"choose one with --clip"):
        find_files(info, tmp_path, {"clip": folder})


def test_every_refusal_is_of_a_kind_that_ends_with_code_2() -> None:
    kinds = (AmbiguousFileError, CheckpointError, MissingFileError, WeightMapError)
    assert {kind.exit_code for kind in kinds} == {2} and all(issubclass(kind, FluxSdError) for kind in kinds)
