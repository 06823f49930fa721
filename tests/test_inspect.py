"""`flux-sd inspect`: what it prints of whole, partial, foreign and damaged files; it reads headers alone."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helpers_headers as header
import pytest
import torch
from safetensors.torch import save_file

from flux_sd.cli import main
from flux_sd.cli.arguments import COMPONENTS
from flux_sd.cli.console import printable
from flux_sd.cli.inspect import SHOWN_METADATA
from flux_sd.clip import ClipTextConfig
from flux_sd.unet import UNetConfig

FLUX = ["flux-schnell", "flux-dev", "flux-fill", "flux-canny", "flux-depth", "flux-kontext", "flux-krea"]
WITH_CLIP_L = ["sd15", "sdxl", "sdxl-turbo", "sd15-inpaint", "sdxl-inpaint"]
TINY_FLUX = Path(__file__).parent.parent / "flux_sd" / "models" / "tiny_flux"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def documents(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[dict[str, Any]]:
    """The JSON objects of `inspect WORDS --json`."""
    assert main(["inspect", *words, "--json"]) == code
    files: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["files"]
    return files


def lines(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> list[str]:
    assert main(["inspect", *words]) == code
    return capsys.readouterr().out.splitlines()


def cells(printed: list[str], component: str) -> list[str]:
    """The row of a component in the table, by column."""
    (row,) = (line for line in printed if line.strip().startswith(component + "  "))
    return [cell.strip() for cell in row.split("  ") if cell.strip()]


def test_a_whole_transformer_in_one_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = header.safetensors(folder / "flux1-dev.safetensors", header.flux("dev"), metadata={"format": "pt"})
    printed = lines(capsys, path.name)
    assert printed[0] == "flux1-dev.safetensors: 780 tensors, 23.8 GB"
    assert cells(printed, "component") == [
        "component", "family", "variant", "names", "behind", "tensors", "bytes", "types", "fits"
    ]  # fmt: skip
    assert cells(printed, "flux_mmdit") == [
        "flux_mmdit", "FLUX.1", "dev family", "bfl", "-", "780", "23.8 GB", "780 BF16",
        "flux-dev, flux-kontext, flux-krea",
    ]  # fmt: skip
    assert printed[-2:] == [
        "  metadata: format = pt",
        "  use it: flux-sd generate 'a prompt' --model flux-dev --transformer flux1-dev.safetensors",
    ]
    assert len(printed) == 5


def test_schnell_fits_schnell_alone_and_the_encoders_fit_both(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = {
        "transformer": header.gguf(folder / "a.gguf", header.flux("schnell"), "Q4_K"),
        "t5": header.safetensors(folder / "b.safetensors", header.t5_xxl(), "F8_E4M3"),
        "clip": header.safetensors(folder / "c.safetensors", header.clip_l(), "F16"),
        "vae": header.safetensors(folder / "d.safetensors", header.flux_vae(), "F32"),
    }
    for (role, path), document in zip(
        paths.items(), documents(capsys, *(str(path) for path in paths.values())), strict=True
    ):
        (part,) = document["parts"]
        every = [*FLUX, *WITH_CLIP_L] if role == "clip" else FLUX
        assert part["fits"] == (["flux-schnell"] if role == "transformer" else every)
        assert shlex.split(document["advice"])[3:] == ["--model", "flux-schnell", f"--{role}", str(path)]
        assert role in COMPONENTS and part["problems"] == []


def test_a_file_with_everything_is_advised_as_a_path(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = dict(reversed(header.all_in_one().items()))  # the encoders, which fit two models, come first
    path = header.safetensors(folder / "all in one.safetensors", shapes, "F8_E4M3")
    (document,) = documents(capsys, path.name)
    assert shlex.split(document["advice"])[3:] == ["--model", "flux-dev", "--path", path.name]
    parts = {part["component"]: part for part in document["parts"]}
    assert parts["t5"]["prefix"] == "text_encoders.t5xxl.transformer." and parts["t5"]["packing"] == "fp8"
    assert parts["other"]["tensors"] == 2 and document["bytes"] == path.stat().st_size - header_bytes(path)


def header_bytes(path: Path) -> int:
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


def test_what_does_not_fit_is_listed_with_the_nearest_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shapes = header.flux("dev") | {"img_in.weight": (3072, 385)}
    shapes.pop("final_layer.linear.bias")
    path = header.safetensors(folder / "odd.safetensors", shapes)
    printed = lines(capsys, path.name)
    assert cells(printed, "flux_mmdit")[-1] == "none"
    assert "  flux_mmdit: 2 problems with flux-dev, flux-kontext, flux-krea, the nearest" in printed
    assert "    missing: final_layer.linear.bias" in printed
    assert not any("use it" in line for line in printed)


@pytest.mark.parametrize(
    ("channels", "variant", "fits"),
    [(384, "Fill (384", ["flux-fill"]), (128, "Canny or Depth (128", ["flux-canny", "flux-depth"])],
)
def test_editing_models_are_told_by_their_input(
    channels: int, variant: str, fits: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.safetensors(folder / "x.safetensors", header.flux("dev", in_channels=channels))
    (document,) = documents(capsys, "x.safetensors")
    assert document["parts"][0]["fits"] == fits
    assert document["parts"][0]["variant"] == f"dev family, {variant} input channels)"


def test_many_problems_are_cut_and_json_has_all(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shapes = {
        name: shape for name, shape in header.flux("dev").items() if not name.startswith("double_blocks.3")
    }
    header.safetensors(folder / "x.safetensors", shapes)
    printed = lines(capsys, "x.safetensors")
    assert sum("missing: " in line for line in printed) == 6
    (document,) = documents(capsys, "x.safetensors")
    count = len(document["parts"][0]["problems"])
    assert count == 24 and f"    ... and {count - 6} more (--json lists all)" in printed


def test_blocks_are_listed_in_order_with_their_types(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.gguf(folder / "x.gguf", header.flux("schnell"), "Q8_0")
    printed = lines(capsys, "x.gguf", "--blocks")
    blocks = [line.split()[0] for line in printed if line.strip().startswith(("double_", "single_"))]
    assert blocks == [f"double_blocks.{i}" for i in range(19)] + [f"single_blocks.{i}" for i in range(38)]
    (row,) = (line for line in printed if line.strip().startswith("double_blocks.7 "))
    matrices = 2 * (18432 + 9216 + 3072) * 3072 + 4 * 12288 * 3072  # modulation, qkv, proj; the MLPs
    vectors = 2 * (18432 + 9216 + 3072 + 12288 + 3072) + 4 * 128  # their biases; the norms
    nbytes = matrices // 32 * 34 + 4 * vectors
    assert row.split() == ["double_blocks.7", "24", f"{nbytes / 1e6:.1f}", "MB", "10", "Q8_0,", "14", "F32"]
    (document,) = documents(capsys, "x.gguf", "--blocks")
    assert sum(block["tensors"] for block in document["parts"][0]["blocks"]) == 776
    (plain,) = documents(capsys, "x.gguf")
    assert "blocks" not in plain["parts"][0]


@pytest.mark.parametrize(
    ("kind", "family", "fits"),
    [
        ("sd15", "SD 1.x", ["sd15"]),
        ("sd21", "SD 2.x", ["sd21", "sd21-base"]),
        ("sdxl", "SDXL", ["sdxl", "sdxl-turbo"]),
    ],
)
def test_a_stable_diffusion_file_fits_the_models_with_its_shapes(
    kind: str, family: str, fits: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.safetensors(folder / "sd.safetensors", header.sd_single_file(kind), "F16")
    printed = lines(capsys, "sd.safetensors")
    assert cells(printed, "unet")[1] == family and cells(printed, "unet")[-1] == ", ".join(fits)
    assert "  of no component: betas, alphas_cumprod, model_ema.decay" in printed
    assert printed[-1] == f"  use it: flux-sd generate 'a prompt' --model {fits[0]} --path sd.safetensors"
    (document,) = documents(capsys, "sd.safetensors")
    for part in document["parts"]:
        assert part["problems"] == [] and (set(fits) <= set(part["fits"]) or part["component"] == "other")
    encoders = [part for part in document["parts"] if part["component"] == "clip"]
    assert len(encoders) == (2 if kind == "sdxl" else 1)
    assert ("flux-schnell" in encoders[0]["fits"]) == (kind != "sd21")  # the one that FLUX.1 has too


@pytest.mark.parametrize(
    ("component", "config", "model", "option"),
    [
        ("unet", UNetConfig.sd15(), "sd15", "--unet"),
        ("clip", ClipTextConfig.open_clip_bigg(), "sdxl", "--clip-2"),
        ("clip", ClipTextConfig.open_clip_h(), "sd21", "--clip"),
    ],
)
def test_a_part_of_stable_diffusion_is_given_by_its_own_option(
    component: str, config: Any, model: str, option: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.safetensors(folder / "part.safetensors", header.network(component, config), "F16")
    printed = lines(capsys, "part.safetensors")
    assert printed[-1] == f"  use it: flux-sd generate 'a prompt' --model {model} {option} part.safetensors"


def test_a_stable_diffusion_file_of_no_built_model_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.safetensors(folder / "sd.safetensors", header.sd_single_file("refiner"), "F16")
    printed = "\n".join(lines(capsys, "sd.safetensors"))
    assert "the UNet of the SDXL refiner, which is not built: this release does not load it" in printed
    assert "use it" not in printed


def test_an_adapter_takes_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name = "lora_unet_double_blocks_0_img_attn_qkv"
    shapes = {
        f"{name}.lora_down.weight": (16, 3072),
        f"{name}.lora_up.weight": (9216, 16),
        f"{name}.alpha": (),
    }
    header.safetensors(folder / "lora.safetensors", shapes)
    printed = lines(capsys, "lora.safetensors")
    what = "  a LoRA (kohya's names), FLUX, rank 16"
    assert printed[-1] == f"{what}: give it with --lora; `flux-sd lora` says which models it fits"


def test_packings_that_are_not_read_are_shown_with_the_reason(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "double_blocks.0.img_attn.qkv.weight"
    marker = f"{name}.quant_state.bitsandbytes__nf4"
    header.safetensors(folder / "nf4.safetensors", {name: (100, 1), marker: (80,)}, "U8")
    printed = lines(capsys, "nf4.safetensors")
    assert cells(printed, "flux_mmdit")[1] == "FLUX.1" and printed[-1].startswith("  not loaded: ")
    assert "NF4" in printed[-1]


def test_the_embedded_model_folder_is_listed_whole(capsys: pytest.CaptureFixture[str]) -> None:
    if not TINY_FLUX.is_dir():
        pytest.skip("flux_sd/models/tiny_flux is absent: train it with tools/train_tiny_flux.py")
    found = documents(capsys, str(TINY_FLUX))
    parts = [part for document in found for part in document["parts"]]
    assert {part["component"] for part in parts} == {"flux_mmdit", "autoencoder", "clip", "t5", "adapter"}
    assert all("tiny-flux" in part["fits"] for part in parts if part["component"] != "adapter")


def test_shards_are_one_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = list(header.clip_l().items())
    halves = {"model-00001-of-00002.safetensors": names[:90], "model-00002-of-00002.safetensors": names[90:]}
    for file, part in halves.items():
        header.safetensors(folder / "text_encoder" / file, dict(part))
    (document,) = documents(capsys, "text_encoder")
    assert document["files"] == 2 and document["parts"][0]["fits"] == [*FLUX, *WITH_CLIP_L]


def test_a_damaged_file_in_a_folder_hides_no_other(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "model" / "a").mkdir(parents=True)
    (folder / "model" / "a" / "x.gguf").write_bytes(b"GGUF")
    header.safetensors(folder / "model" / "b" / "x.safetensors", header.clip_l())
    damaged, whole = documents(capsys, "model", code=2)
    assert "x.gguf" in damaged["error"] and whole["file"].endswith("x.safetensors")


def test_every_file_is_reported_and_one_that_cannot_be_read_decides_the_code(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    header.safetensors(folder / "clip.safetensors", header.clip_l())
    (folder / "page.safetensors").write_text("<html>not found</html>")
    assert main(["inspect", "page.safetensors", "nothing.gguf", "clip.safetensors"]) == 2
    captured = capsys.readouterr()
    assert captured.out.startswith("clip.safetensors: 196 tensors") and captured.err.count("\n") == 2
    assert "page.safetensors is a text file" in captured.err and "nothing.gguf does not exist" in captured.err
    found = documents(capsys, "page.safetensors", "clip.safetensors", code=2)
    assert "text file" in found[0]["error"] and found[1]["parts"]


def test_a_folder_that_cannot_be_read_hides_no_other(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("locked", "open"):
        header.safetensors(folder / "model" / name / "x.safetensors", header.clip_l())
    listed = Path.iterdir

    def iterdir(path: Path) -> Iterator[Path]:
        if path.name == "locked":
            raise PermissionError(13, "Permission denied", str(path))
        return listed(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)  # root, who may run the tests, can read everything
    whole, locked = documents(capsys, "model", code=2)
    assert whole["file"].endswith("x.safetensors") and whole["parts"]
    assert locked == {
        "file": "model/locked", "error": "the folder model/locked cannot be read: Permission denied"
    }  # fmt: skip


def test_names_of_no_file_are_answered_in_a_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "loop.gguf").symlink_to("loop.gguf")
    (folder / "text.gguf").write_text("text")
    found = documents(capsys, "x" * 300, "loop.gguf", "text.gguf/x", code=2)
    assert [document["error"].partition(" cannot be read: ")[0] for document in found] == [
        "x" * 300, "loop.gguf", "text.gguf/x"
    ]  # fmt: skip
    assert not any("Errno" in document["error"] for document in found)


def test_nothing_out_of_a_file_controls_the_terminal(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evil = "\x1b[2J\u202e\r\nflux-sd: all is well\x07"
    metadata = {evil: evil, "long": "x" * 5000} | {f"key {i}": "v" for i in range(50)}
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.zeros(1)}, folder / "evil.safetensors", metadata)
    save_file({evil: torch.zeros(1)}, folder / "name.safetensors")
    (folder / f"{evil[:5]}.safetensors").write_text("text")
    words = ["evil.safetensors", "name.safetensors", f"{evil[:5]}.safetensors"]
    assert main(["inspect", *words, "--blocks"]) == 2
    captured = capsys.readouterr()
    for text in (captured.out, captured.err):
        assert all(char.isprintable() or char == "\n" for char in text)
    assert not any(line.startswith("flux-sd: all is well") for line in captured.out.splitlines())
    (shown,) = (line for line in captured.out.splitlines() if line.startswith("  metadata: "))
    assert len(shown) < 3000 and shown.count(" = ") <= SHOWN_METADATA


def test_escapes_are_readable_and_long_text_is_cut() -> None:
    assert printable("a\x1b[0m\nb\u202eü") == "a\\x1b[0m\\nb\\u202eü"
    assert printable("abcdef", 3) == "abc..."


def test_a_file_without_tensors_is_read(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({}, folder / "empty.safetensors")
    assert lines(capsys, "empty.safetensors") == ["empty.safetensors: 0 tensors, 0 MB", "  no tensors"]


def test_gguf_metadata_shows_the_architecture_first(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    header.gguf(folder / "x.gguf", header.clip_l(), "Q8_0", architecture="pig")
    assert "  metadata: general.architecture = pig" in lines(capsys, "x.gguf")
