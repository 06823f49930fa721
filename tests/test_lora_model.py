"""Adapters on whole models: loaded, unloaded, cancelled, broken, recorded, and at the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import helpers_flux
import helpers_sd
import pytest
import torch
from helpers_lora import flat, kohya, pairs, peft, save
from PIL import Image
from safetensors.torch import load_file

import flux_sd
from flux_sd import device
from flux_sd.cli import main
from flux_sd.cli.arguments import lora as parse
from flux_sd.errors import AdapterError, Cancelled, CheckpointError, MissingFileError, NotEnoughMemoryError
from flux_sd.generation_engine import GenerationEngine
from flux_sd.image import pixel_hash, read_record, save_png
from flux_sd.lora.side_branch import AdaptedLinear
from flux_sd.model_loader import Model
from flux_sd.request import CancelToken, Event, GenerationRequest, Progress
from flux_sd.versions import SDVersion

REQUEST = GenerationRequest(prompt="a red kite over the sea", seed=5, steps=2)
SMALL = {"flux": helpers_flux.small_info(), "sd": helpers_sd.small_info(SDVersion.SDXL)}
Opened = Callable[..., Model]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "flux": helpers_flux.write_folder(tmp_path_factory.mktemp("flux"), SMALL["flux"]),
        "sd": helpers_sd.write_folder(tmp_path_factory.mktemp("sd"), SMALL["sd"]),
    }


@pytest.fixture
def opened(folders: dict[str, Path]) -> Opened:
    helpers = {"flux": helpers_flux, "sd": helpers_sd}
    return lambda family, **how: helpers[family].open_model(folders[family], SMALL[family], **how)


def adapter(folder: Path, family: str, text: bool = True, seed: int = 0) -> Path:
    """Changes the denoiser and, with `text`, each text encoder, by a visible amount."""
    if family == "flux":
        shapes = {"lora_unet_double_blocks_0_img_attn_qkv": (384, 128)}
        encoders = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": CLIP_FC1,
                    "lora_te3_encoder_block_0_layer_0_SelfAttention_q": T5_Q}  # fmt: skip
    else:
        shapes = {"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q": (64, 64)}
        encoders = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": (128, 64),
                    "lora_te2_text_model_encoder_layers_0_mlp_fc1": (192, 96)}  # fmt: skip
    changes = pairs(shapes | (encoders if text else {}), seed, size=0.3)
    return save(kohya(changes, str), folder / f"{family}-{seed}.safetensors")


def _shape(role: str, name: str) -> tuple[int, int]:
    rows, columns = helpers_flux.networks(SMALL["flux"])[role].state_dict()[name].shape
    return rows, columns


CLIP_FC1 = _shape("clip", "text_model.encoder.layers.0.mlp.fc1.weight")
T5_Q = _shape("t5", "encoder.block.0.layer.0.SelfAttention.q.weight")


def bits(model: Model) -> torch.Tensor:
    return model.generate(REQUEST)[0].latents


# loading and unloading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_loaded", [False, True])
@pytest.mark.parametrize("family", ["flux", "sd"])
def test_loading_unloading_and_strength_0_leave_every_bit(
    family: str, keep_loaded: bool, opened: Opened, tmp_path: Path
) -> None:
    model = opened(family, keep_loaded=keep_loaded)
    before = bits(model)
    file = adapter(tmp_path, family)
    (applied,) = model.load_adapters([file])
    roles = {"flux": ["transformer", "clip", "t5"], "sd": ["unet", "clip", "clip_2"]}[family]
    assert applied.plan.counts() == {role: (1, 1) for role in roles}
    changed = bits(model)
    assert not torch.equal(changed, before)
    model.load_adapters([(file, 0.0)])
    assert torch.equal(bits(model), before)
    model.load_adapters([flux_sd.Lora(file, 1.0)])
    assert torch.equal(bits(model), changed)
    assert model.load_adapters([]) == () and torch.equal(bits(model), before)
    model.close()


@pytest.mark.parametrize("family", ["flux", "sd"])
def test_a_change_of_text_encoders_alone_is_seen_though_the_prompt_was_encoded(
    family: str, opened: Opened, tmp_path: Path
) -> None:
    model = opened(family)
    before = bits(model)
    tensors = load_file(adapter(tmp_path, family))
    only = {name: tensor for name, tensor in tensors.items() if name.startswith("lora_te1_")}
    model.load_adapters([save(only, tmp_path / "te.safetensors")])
    assert not torch.equal(bits(model), before)


def test_weights_of_a_model_are_what_the_definition_says(opened: Opened, tmp_path: Path) -> None:
    model = opened("flux", keep_loaded=True)
    plain = model.components.network("transformer").state_dict()
    file = adapter(tmp_path, "flux", text=False)
    model.load_adapters([(file, 0.5)])
    path = "double_blocks.0.img_attn.qkv"
    change = pairs({"lora_unet_double_blocks_0_img_attn_qkv": (384, 128)}, size=0.3)
    ((up, down),) = change.values()
    got = model.components.network("transformer").state_dict()
    assert (got[f"{path}.weight"] - plain[f"{path}.weight"] - 0.5 * up @ down).abs().max() < 1e-6
    assert all(torch.equal(got[name], plain[name]) for name in plain if name != f"{path}.weight")


def test_a_bad_adapter_leaves_those_before_in_place(opened: Opened, tmp_path: Path) -> None:
    model = opened("flux")
    model.load_adapters([adapter(tmp_path, "flux")])
    changed = bits(model)
    wrong = save(kohya(pairs({"x": (4, 4)}), lambda p: f"lora_unet_{p}"), tmp_path / "wrong.safetensors")
    for bad, error in ((wrong, AdapterError), (tmp_path / "none.safetensors", MissingFileError)):
        with pytest.raises(error):
            model.load_adapters([adapter(tmp_path, "flux", seed=1), bad])
        assert torch.equal(bits(model), changed)


def test_files_are_let_go(opened: Opened, tmp_path: Path) -> None:
    model = opened("flux")
    (first,) = model.load_adapters([adapter(tmp_path, "flux")])
    (second,) = model.load_adapters([adapter(tmp_path, "flux", seed=1)])
    with pytest.raises(CheckpointError, match="was closed"):
        first.plan.file.read(first.plan.file.changes[0])
    second.plan.file.read(second.plan.file.changes[0])
    model.close()
    with pytest.raises(CheckpointError, match="was closed"):
        second.plan.file.read(second.plan.file.changes[0])


def test_load_model_takes_adapters_and_refuses_before_it_opens_anything(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(MissingFileError, match=r"none\.safetensors"):
        flux_sd.load_model("flux-dev", tmp_path / "absent", loras=[tmp_path / "none.safetensors"])
    odd = save({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "odd.safetensors")
    with pytest.raises(AdapterError, match="is no adapter of a known kind"):
        flux_sd.load_model("flux-dev", tmp_path / "absent", loras=[odd])


# cancelled and failed runs ----------------------------------------------------------------------------------


@pytest.mark.parametrize("keep_loaded", [False, True])
def test_a_run_cancelled_while_an_adapter_is_applied_leaves_nothing(
    keep_loaded: bool, opened: Opened, tmp_path: Path
) -> None:
    model = opened("flux", keep_loaded=keep_loaded)
    model.load_adapters([adapter(tmp_path, "flux")])
    fresh = bits(model)
    model.load_adapters([adapter(tmp_path, "flux")])  # networks are read again
    for stage in ("adapt clip", "adapt t5", "adapt transformer"):
        token = CancelToken()
        seen: list[str] = []

        def listen(
            event: Event, stage: str = stage, token: CancelToken = token, seen: list[str] = seen
        ) -> None:
            if isinstance(event, Progress):
                seen.append(event.stage)
                if event.stage == stage:
                    token.cancel()

        with pytest.raises(Cancelled):
            model.generate(REQUEST, on_event=listen, cancel=token)
        assert seen[-1] == stage and stage.split()[1] not in model.components.loaded
        assert keep_loaded or model.components.loaded == set()
    assert torch.equal(bits(model), fresh)


def test_a_damaged_adapter_fails_the_run_and_not_the_model(opened: Opened, tmp_path: Path) -> None:
    model = opened("flux")
    before = bits(model)
    tensors = load_file(adapter(tmp_path, "flux", text=False))
    tensors["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"][3, 0] = torch.nan
    model.load_adapters([save(tensors, tmp_path / "nan.safetensors")])
    with pytest.raises(AdapterError, match="holds NaN or infinity"):
        model.generate(REQUEST)
    assert model.components.loaded == set()
    model.load_adapters([])
    assert torch.equal(bits(model), before)


def test_the_engine_runs_a_model_with_adapters(opened: Opened, tmp_path: Path) -> None:
    model = opened("flux")
    model.load_adapters([adapter(tmp_path, "flux")])
    fresh = bits(model)
    with GenerationEngine(model) as engine:
        jobs = [engine.submit(REQUEST) for _ in range(3)]
        jobs[1].cancel()
        assert torch.equal(jobs[2].result()[0].latents, fresh) and torch.equal(
            jobs[0].result()[0].latents, fresh
        )


# packed weights ---------------------------------------------------------------------------------------------


def big(folder: Path, rank: int = 4, size: float = 0.05) -> Path:
    """An adapter for tiny-flux."""
    hidden = SDVersion.TINY_FLUX.info.flux.transformer.hidden_size  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(3 * hidden, rank, generator=generator) * size
    down = torch.randn(rank, hidden, generator=generator)
    names = {f"double_blocks.{i}.img_attn.qkv": (up, down) for i in range(2)}
    return save(kohya(names, lambda path: f"lora_unet_{flat(path)}"), folder / "big.safetensors")


def test_a_quantised_model_keeps_its_rows_and_gets_branches(tmp_path: Path) -> None:
    with flux_sd.load_model(
        "tiny-flux", device="cpu", dtype="float32", quantized=True, keep_loaded=True
    ) as model:
        assert isinstance(model, Model)
        plain = {name: buffer for name, buffer in model.components.network("transformer").named_buffers()}
        needed = model.components._still_needed("transformer", model.components._needs["transformer"])
        model.load_adapters([big(tmp_path)])
        network = model.components.network("transformer")
        adapted = [layer for layer in network.modules() if isinstance(layer, AdaptedLinear)]
        assert len(adapted) == 2
        for name, buffer in network.named_buffers():
            assert torch.equal(buffer, plain[name.replace(".base.", ".")]), name
        held = sum(delta.nbytes for layer in adapted for _, delta in layer.branches)
        beside = model.components._beside["transformer"]
        assert beside == held == 2 * 4 * 4 * (4 * adapted[0].weight.shape[1])
        model.components.free("transformer")
        model.components._networks.clear()
        more = model.components._still_needed("transformer", model.components._needs["transformer"])
        assert more.packed_bytes == needed.packed_bytes + beside or needed.packed_bytes == 0


def test_what_lies_beside_packed_weights_counts_when_memory_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with flux_sd.load_model("tiny-flux", device="cpu", dtype="float32", quantized=True) as model:
        assert isinstance(model, Model)
        monkeypatch.setattr(model.components, "_beside", {"transformer": 10**15})
        with pytest.raises(NotEnoughMemoryError, match="transformer"):
            model.generate(GenerationRequest("x"))
    assert device.available_memory(torch.device("cpu")) < 10**15


# records and the command line -------------------------------------------------------------------------------


def test_the_record_names_the_file_its_fingerprint_and_strength_and_no_path(
    opened: Opened, tmp_path: Path
) -> None:
    model = opened("flux")
    file = adapter(tmp_path, "flux")
    model.load_adapters([(file, 0.25)])
    (result,) = model.generate(REQUEST)
    ((entry),) = result.metadata["loras"]
    assert entry["name"] == file.name and entry["strength"] == 0.25 and len(entry["fingerprint"]) == 32
    assert entry["applied"] == {"transformer": [1, 1], "clip": [1, 1], "t5": [1, 1]}
    assert str(tmp_path) not in json.dumps(result.metadata)
    assert "flux-0.safetensors at 0.25: clip 1/1, t5 1/1, transformer 1/1" in result.notes
    model.load_adapters([])
    assert "loras" not in model.generate(REQUEST)[0].metadata


@pytest.mark.parametrize(
    ("text", "file", "strength"),
    [
        ("a.safetensors", "a.safetensors", None),
        ("a.safetensors:0.8", "a.safetensors", 0.8),
        ("a.safetensors:-1", "a.safetensors", -1.0),
        ("C:\\a.safetensors", "C:\\a.safetensors", None),
        ("C:\\a.safetensors:1e-1", "C:\\a.safetensors", 0.1),
        ("a:b", "a:b", None),
        (":2", ":2", None),
    ],
)
def test_file_and_strength_in_one_word(text: str, file: str, strength: float | None) -> None:
    assert parse(text) == (Path(file), strength)


def test_a_file_that_is_called_like_a_strength_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a:2").touch()
    assert parse("a:2") == (Path("a:2"), None) and parse("a:3") == (Path("a"), 3.0)


def test_a_name_that_is_too_long_is_one_sentence(run: Any) -> None:
    name = "a" * 300
    assert parse(f"{name}:1") == (Path(name), 1.0)
    code, _, err = run("generate", "a pizza", "-o", "a.png", "--lora", f"{name}:1")
    assert code == 2 and name in err and err.count("\n") == 1


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.chdir(tmp_path)

    def command(*words: str) -> tuple[int, str, str]:
        code = main(list(words))
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


def test_generate_and_replay_with_adapters(run: Any, tmp_path: Path) -> None:
    big(tmp_path)
    paint = ("generate", "a pizza", "--seed", "3", "--steps", "1", "--device", "cpu", "--dtype", "float32")
    assert run(*paint, "-o", "plain.png")[0] == 0
    code, _, err = run(*paint, "-o", "a.png", "--lora", "big.safetensors:0.5", "--lora", "big.safetensors")
    assert code == 0 and "big.safetensors at 0.5: transformer 2/2" in err
    records = read_record(tmp_path / "a.png")["loras"]
    assert [entry["strength"] for entry in records] == [0.5, 1.0]
    hashes = [pixel_hash_of(tmp_path / name) for name in ("plain.png", "a.png")]
    assert hashes[0] != hashes[1]
    code, _, err = run("replay", "a.png")
    assert code == 2 and "with the adapter big.safetensors at the strength 0.5: give it with --lora" in err
    code, out, _ = run("replay", "a.png", "--lora", "big.safetensors")
    assert (code, out) == (0, "a.png: bit-equal\n")
    code, _, err = run("replay", "a.png", "--lora", "big.safetensors:0.7")
    assert code == 2 and "leave the strength out" in err
    code, _, err = run("replay", "plain.png", "--lora", "big.safetensors")
    assert code == 2 and "was painted without the adapter" in err
    other = load_file("big.safetensors")
    next(iter(other.values())).mul_(2)
    save(other, tmp_path / "big.safetensors")
    code, _, err = run("replay", "a.png", "--lora", "big.safetensors")
    assert code == 2 and "give it with --lora" in err


@pytest.mark.parametrize("second", ["big.safetensors:0.8", "big.safetensors"])
def test_one_adapter_at_two_strengths_is_replayed_by_the_words_it_was_made_with(
    run: Any, second: str, tmp_path: Path
) -> None:
    big(tmp_path)
    words = ("--lora", "big.safetensors:0.5", "--lora", second)
    paint = ("generate", "a pizza", "--seed", "3", "--steps", "1", "--device", "cpu", "--dtype", "float32")
    assert run(*paint, "-o", "a.png", *words)[0] == 0
    assert run("replay", "a.png", *words)[:2] == (0, "a.png: bit-equal\n")
    code, _, err = run("replay", "a.png", *words[:2])
    assert code == 2 and "leave the strength out" in err


GOOD = {"name": "a", "fingerprint": "b", "strength": 1.0, "applied": {"transformer": [1, 1]}}


@pytest.mark.parametrize(
    "loras",
    [
        "a",
        {"name": "a"},
        [None],
        *([{key: value for key, value in GOOD.items() if key != name}] for name in GOOD),
        *([GOOD | change] for change in ({"strength": "1"}, {"strength": True}, {"name": 1}, {"applied": [1]},
                                         {"applied": {"unet": 1}}, {"applied": {"unet": [1, None]}},
                                         {"applied": {"unet": [1]}})),
    ],
)  # fmt: skip
def test_a_record_whose_adapters_were_edited_is_refused_in_one_sentence(
    run: Any, loras: object, tmp_path: Path
) -> None:
    record = {"prompt": "a", "model": "tiny-flux", "seed": 1, "width": 16, "height": 16, "steps": 1}
    save_png(Image.new("RGB", (16, 16)), tmp_path / "a.png", record | {"loras": [GOOD]})
    assert "give it with --lora" in run("replay", "a.png")[2]
    save_png(Image.new("RGB", (16, 16)), tmp_path / "b.png", record | {"loras": loras})
    code, _, err = run("replay", "b.png")
    assert code == 2 and "'loras' that are no list of adapters" in err and err.count("\n") == 1


def pixel_hash_of(path: Path) -> str:
    from flux_sd.image import open_picture

    return pixel_hash(open_picture(path))


def test_what_does_not_fit_stops_the_command_unless_a_part_will_do(run: Any, tmp_path: Path) -> None:
    tensors = load_file(big(tmp_path)) | peft(pairs({"odd": (4, 4)}), lambda p: f"transformer.{p}")
    save(tensors, tmp_path / "odd.safetensors")
    paint = ("generate", "a pizza", "--seed", "3", "--steps", "1", "-o", "a.png", "--lora", "odd.safetensors")
    code, _, err = run(*paint)
    assert code == 2 and "2 of 3 changes fit" in err and "names of PEFT behind 'transformer.' (1)" in err
    assert not (tmp_path / "a.png").exists()
    code, _, err = run(*paint, "--lora-partial")
    assert code == 0 and "odd.safetensors: transformer 2/3" in err
    assert run("replay", "a.png", "--lora", "odd.safetensors")[0] == 0


def test_the_command_lora_says_what_a_file_is_and_what_it_fits(run: Any, tmp_path: Path) -> None:
    big(tmp_path)
    code, out, _ = run("lora", "big.safetensors")
    assert code == 0
    assert out.startswith("big.safetensors: LoRA, rank 4, alpha 2, 2 changes, ")
    assert "  names of  kohya behind 'lora_unet_'\n  made for  FLUX\n" in out
    assert (
        "  changes   transformer, 2 in double_blocks.0 (1), double_blocks.1 (1)\n  fits      tiny-flux\n"
        in out
    )
    assert out.endswith("--model tiny-flux --lora big.safetensors\n")
    code, out, _ = run("lora", "big.safetensors", "--model", "sd15")
    assert code == 2 and "fits      none completely" in out and "the unet has no layer of this name" in out
    code, out, _ = run("lora", "big.safetensors", "--json", "--model", "tiny-flux")
    document = json.loads(out)
    assert code == 0 and document["fits"] == ["tiny-flux"] and document["changes"] == 2
    assert document["blocks"] == {"transformer": {"double_blocks.0": 1, "double_blocks.1": 1}}


def test_what_the_command_lora_shows_cannot_move_the_cursor(run: Any, tmp_path: Path) -> None:
    tensors = kohya(pairs({"\x1b[2J": (4, 4)}), lambda path: f"lora_unet_{path}")
    save(tensors, tmp_path / "evil.safetensors")
    code, out, err = run("lora", "evil.safetensors", "--model", "tiny-flux")
    assert code == 2 and "\x1b" not in out + err


def test_the_request_stays_as_it_was() -> None:
    """Adapters belong to a model, not to a request: the same request runs with them and without."""
    assert "lora" not in {name for name in vars(replace(REQUEST))}
