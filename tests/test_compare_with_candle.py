"""tools/compare_with_candle.py, with a program in Candle's place that writes a record of ours."""

from __future__ import annotations

import json
import math
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import compare_with_candle as tool
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flux_sd import GenerationRequest
from flux_sd.numerics import candle
from flux_sd.sampling import get_noise
from flux_sd.trace import trace
from flux_sd.versions import SDVersion


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny-flux computes for the tool's request, in Candle's form: CLIP's ids end at the end token."""
    folder = tmp_path_factory.mktemp("record")
    subject = tool.tiny_flux(None)
    with subject.open("float32") as model:
        request = GenerationRequest(prompt=subject.spec["prompt"], latents=get_noise(0, 128, 128))
        trace(model, request, folder / "ours.safetensors", like_candle=True)
    tensors = load_file(folder / "ours.safetensors")
    end = int(tensors["clip.ids"].argmax())
    tensors["clip.ids"] = tensors["clip.ids"][:, : end + 1].contiguous()
    save_file(tensors, folder / "candle.safetensors")
    return folder / "candle.safetensors"


def program(
    folder: Path, record: Path, change: Callable[[dict[str, Tensor]], None] = lambda tensors: None,
    keep: str = "",
) -> Path:  # fmt: skip
    """A stand-in for candle_reference: keeps the specification (and the file `keep` beside it), and writes
    `record` with a change."""
    tensors = load_file(record)
    change(tensors)
    save_file(tensors, folder / "changed.safetensors")
    code = f"#!{sys.executable}\nimport shutil, sys\n"
    code += f"assert sys.argv[1] == 'run'\nshutil.copy(sys.argv[2], {str(folder / 'seen.json')!r})\n"
    if keep:
        code += f"shutil.copy(sys.argv[2].replace('spec.json', {keep!r}), {str(folder / keep)!r})\n"
    code += f"shutil.copy({str(folder / 'changed.safetensors')!r}, sys.argv[3])\n"
    path = folder / "program"
    path.write_text(code)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def run(monkeypatch: pytest.MonkeyPatch, program: Path) -> int:
    monkeypatch.setattr(sys, "argv", ["tool", str(program), "tiny-flux", "--dtype", "float32"])
    return tool.main()


def test_equal_records_pass(
    tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, program(tmp_path, record)) == 0
    out = capsys.readouterr().out
    assert "25 stages compared, 0 over their limit" in out and "OVER" not in out
    differences = {tuple(line.split()[2:4]): float(line.split()[4]) for line in out.splitlines()[:-1]}
    assert len(differences) == 25
    # From padded ids or without, the pooled vector is that of the end token; its last bits may differ.
    assert max(differences.values()) < 1e-6
    assert differences["run", "pixels"] == 0 and differences["forward", "image"] == 0
    spec = json.loads((tmp_path / "seen.json").read_text())
    assert spec["dtype"] == "f32" and os.path.isabs(spec["transformer"]) and Path(spec["t5"][0]).is_file()


@pytest.fixture(scope="module")
def sd_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What tiny-sd computes for the request of the tool, as Candle records it; a few steps."""
    subject, path = short_sd(None), tmp_path_factory.mktemp("sd") / "ours.safetensors"
    with subject.open("float32") as model:
        trace(model, replace(subject.request, latents=subject.noise(0)), path, like_candle=True)
    tensors = {name: tensor for name, tensor in load_file(path).items() if name != "ids"}
    save_file(tensors, path)
    return path


def short_sd(prompt: str | None) -> tool.Subject:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tool, "STEPS", 3)
        return tool.tiny_sd(prompt)


def run_sd(monkeypatch: pytest.MonkeyPatch, program: Path) -> int:
    monkeypatch.setitem(tool.SUBJECTS, "tiny-sd", lambda prompt, _: short_sd(prompt))
    monkeypatch.setattr(sys, "argv", ["tool", str(program), "tiny-sd"])
    return tool.main()


def test_equal_records_of_stable_diffusion_pass(
    tmp_path: Path, sd_record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In float32 alone, whatever is asked for; the specification names files that are there."""
    assert run_sd(monkeypatch, program(tmp_path, sd_record, keep="text.safetensors")) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines.pop()[:4] == [str(len(lines)), "stages", "compared,", "0"]
    assert {line[1] for line in lines} == {"float32"} and all(float(line[4]) < 1e-6 for line in lines)
    found = {(line[2], line[3]) for line in lines}
    assert {
        ("forward", "step.2.noise_pred"),
        ("forward", "image"),
        ("run", "hidden"),
        ("run", "pixels"),
    } < found
    spec = json.loads((tmp_path / "seen.json").read_text())
    assert all(Path(spec[key]).is_file() for key in ("unet", "unet_config", "vae", "vae_config"))
    assert spec["scheduler"] == {"kind": "ddim", "prediction": "epsilon", "spacing": "leading"}
    assert (spec["steps"], spec["guidance"], spec["dtype"]) == (3, SDVersion.TINY_SD.info.guidance, "f32")
    states, hidden = load_file(tmp_path / "text.safetensors"), load_file(sd_record)["hidden"]
    assert torch.equal(torch.cat([states["negative"], states["hidden"]]), hidden)


def test_a_wrong_stage_of_stable_diffusion_is_over_its_limit(
    tmp_path: Path, sd_record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["step.1.noise_pred"] *= 1.00005  # more than a forward may differ, less than a run
        tensors["hidden"][0, 5] *= 1.01  # the negative prompt's, which every prediction alone is given

    assert run_sd(monkeypatch, program(tmp_path, sd_record, change)) == 1
    over = [line.split()[2:4] for line in capsys.readouterr().out.splitlines() if "OVER" in line]
    assert ["run", "hidden"] in over and ["forward", "step.1.noise_pred"] in over
    assert ["forward", "image"] not in over and ["run", "step.1.noise_pred"] not in over


def test_a_wrong_stage_is_over_its_limit(
    tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["step.2.velocity"] *= 1.00005  # more than a forward may differ, less than a run
        tensors["pixels"][0, 0, 0, 0] ^= 2
        tensors["t5.ids"][0, 0] += 1  # changes what T5 alone is given, and so its states too

    assert run(monkeypatch, program(tmp_path, record, change)) == 1
    over = [line.split()[2:4] for line in capsys.readouterr().out.splitlines() if "OVER" in line]
    assert over == [
        ["forward", "t5.hidden"],
        ["forward", "step.2.velocity"],
        ["run", "t5.ids"],
        ["run", "pixels"],
    ]


def test_nan_is_over_every_limit() -> None:
    line = tool.Line("m", "bfloat16", "run", "latents", math.nan, math.inf)
    assert not line.passes and not replace(line, difference=math.inf, limit=1.0).passes
    assert replace(line, difference=3.0).passes


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "limit"),
    [
        ("step.0.velocity", "float32", "forward", 2e-5),
        ("image", "float32", "forward", 2e-5),
        ("t5.hidden", "float32", "run", 2e-5),  # a single forward there too
        ("step.3.velocity", "float32", "run", 1e-4),
        ("latents", "float32", "run", 1e-4),
        ("pixels", "float32", "run", 1.0),
        ("pixels", "bfloat16", "run", math.inf),
        ("latents", "bfloat16", "run", math.inf),
        ("clip.ids", "bfloat16", "run", 0.0),
        ("noise", "bfloat16", "run", 0.0),
    ],
)
def test_limits(name: str, dtype: str, kind: str, limit: float) -> None:
    assert tool.limit_of(name, dtype, kind) == limit


def test_the_full_width_specification_has_the_fields_that_candle_reads(tmp_path: Path) -> None:
    """The same as that of tiny-flux, which Candle's program has read (the shipped candle.json)."""
    info = SDVersion.FLUX_DEV.info
    assert info.flux is not None
    spec = tool.full_width_spec(replace(info, width=256, height=256), info.flux, tmp_path, None)
    known = json.loads((tool.TINY / "candle.json").read_text())
    assert set(known) - set(spec) == {"dtype", "latents"}  # which are the run's
    for config in ("transformer_config", "ae_config"):
        assert set(spec[config]) == set(known[config])
    tiny_t5 = json.loads((tool.TINY / known["t5_config"]).read_text())
    assert set(asdict(info.flux.t5)) <= set(spec["t5_config"]) & set(tiny_t5)
    assert spec["transformer_config"]["guidance_embed"] and spec["guidance"] == candle().guidance
    assert (spec["t5_length"], spec["shift"]) == (256, [0.5, 1.15])
    json.dumps(spec)


def test_an_unknown_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        tool.parse_arguments(["program", "flux-pro"])
    assert "model 'flux-pro' is unknown: choose tiny-flux or tiny-sd or full-width" in capsys.readouterr().err
    assert tool.parse_arguments(["program"]).models == []


def test_stages_come_in_the_order_of_a_run() -> None:
    run = ["clip.ids", "t5.ids", "clip.pooled", "t5.hidden", "noise", "packed", "timesteps"]
    run += ["step.0.latents", "step.0.velocity", "step.1.latents", "latents", "image", "pixels"]
    assert sorted(reversed(run), key=tool.place) == run
