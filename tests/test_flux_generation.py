"""From a request to pictures, on a small FLUX of random weights."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers_flux import open_model, small_info, write_folder

from flux_sd import device, model_loader
from flux_sd.components import Components
from flux_sd.errors import (
    Cancelled,
    NonFiniteError,
    NotEnoughMemoryError,
    PromptTooLongError,
    RequestError,
    UnknownVersionError,
)
from flux_sd.flux_generation import plan_flux
from flux_sd.image import pixel_hash
from flux_sd.model_loader import Model, check_request, load_model
from flux_sd.numerics import candle, reference
from flux_sd.request import CancelToken, Complete, Event, GenerationRequest, Preview, Progress
from flux_sd.stages import preview_pixels
from flux_sd.versions import SDVersion

INFO = small_info()
REQUEST = GenerationRequest(prompt="a red kite over the sea", seed=5, steps=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("small"), INFO)


@pytest.fixture
def model(folder: Path) -> Model:
    return open_model(folder, INFO)


def test_a_picture_of_the_asked_size_and_its_record(model: Model) -> None:
    (result,) = model.generate(replace(REQUEST, width=32, height=16))
    assert result.image.size == (32, 16) and result.image.mode == "RGB"
    assert result.latents.shape == (16, 2, 4)
    record = result.metadata
    assert (record["seed"], record["steps"], record["guidance"], record["width"]) == (5, 3, None, 32)
    assert (
        record["prompt"] == REQUEST.prompt
        and record["dtype"] == "float32"
        and record["numerics"] == "reference"
    )
    assert record["files"]["transformer"][0]["name"] == "flux1-small.safetensors"
    assert "/" not in json.dumps(record["files"])
    assert {"load", "encode", "denoise", "decode"} <= set(result.timings)


def test_the_same_seed_gives_the_same_bytes_alone_and_in_a_batch(folder: Path) -> None:
    model = open_model(folder, INFO, keep_loaded=True)
    alone = [model.generate(replace(REQUEST, seed=5 + i))[0] for i in range(3)]
    again = model.generate(REQUEST)[0]
    batch = model.generate(replace(REQUEST, batch=3))
    assert pixel_hash(again.image) == pixel_hash(alone[0].image)
    assert [pixel_hash(r.image) for r in batch] == [pixel_hash(r.image) for r in alone]
    assert [r.metadata["seed"] for r in batch] == [5, 6, 7]
    assert pixel_hash(alone[0].image) != pixel_hash(alone[1].image)


def test_images_run_together_agree_with_images_alone(model: Model) -> None:
    alone = model.generate(replace(REQUEST, batch=3))
    together = model.generate(replace(REQUEST, batch=3, batched=True))
    for one, other in zip(alone, together, strict=True):
        assert (one.latents - other.latents).norm() / one.latents.norm() < 1e-4
    assert together[0].metadata["batched"] == 3 and alone[0].metadata["batched"] == 1


def test_steps_yield_latents_and_predictions_and_leave_no_mode_behind(model: Model) -> None:
    seen = []
    for step in model.steps(REQUEST):
        assert not torch.is_inference_mode_enabled()
        seen.append(step)
    assert [(s.index, s.total) for s in seen] == [(0, 3), (1, 3), (2, 3)]
    assert seen[-1].sigma == 0.0 and seen[0].x0.shape == (1, 16, 6, 4)
    assert torch.allclose(seen[-1].x0, seen[-1].latents, atol=1e-5)
    (picture,) = model.decode(seen[-1].latents)
    assert pixel_hash(picture) == pixel_hash(model.generate(REQUEST)[0].image)


def test_encoders_are_gone_before_the_transformer_is_loaded(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[torch.nn.Module]] = []
    load: Callable[..., torch.nn.Module] = Components.network

    def watch(self: Components, role: str, *rest: object) -> torch.nn.Module:
        if role == "transformer":
            assert [ref() for ref in alive] == [None, None], "an encoder is still in memory"
        network = load(self, role, *rest)
        if role in ("clip", "t5"):
            alive.append(weakref.ref(network))
        return network

    monkeypatch.setattr(Components, "network", watch)
    model.generate(REQUEST)
    assert len(alive) == 2 and model.components.loaded == set()


def test_keep_loaded_keeps_and_a_prompt_is_encoded_once(folder: Path) -> None:
    model = open_model(folder, INFO, keep_loaded=True)
    calls = []
    model.components.network("t5").register_forward_hook(lambda *_: calls.append(1))
    first = model.generate(REQUEST)[0]
    second = model.generate(REQUEST)[0]
    model.generate(replace(REQUEST, prompt="something else"))
    assert len(calls) == 2
    assert pixel_hash(first.image) == pixel_hash(second.image)
    assert model.components.loaded == {"clip", "t5", "transformer", "vae"}


def test_given_latents_replace_the_noise(model: Model) -> None:
    taken: dict[str, torch.Tensor] = {}
    expected = model.generate(REQUEST, tap=lambda name, tensor: taken.update({name: tensor}))[0]
    result = model.generate(replace(REQUEST, seed=999, latents=taken["noise"]))[0]
    assert torch.equal(result.latents, expected.latents)
    assert result.metadata["latents"] == "given"
    text = {"t5.ids", "t5.hidden", "clip.ids", "clip.pooled"}
    assert text | {"noise", "packed", "timesteps", "step.0.latents", "step.2.velocity", "image"} <= set(taken)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"width": 1000}, "multiples of 16; the nearest are 992x48 and 1008x48"),
        ({"height": 0}, "the least is 16x16"),
        ({"guidance": 3.5}, "guidance is not used by tiny-flux"),
        ({"steps": 0}, "steps 0 is outside 1..1000"),
        ({"batch": 0}, "batch 0 is outside"),
        ({"seed": -1}, "seed -1 is outside"),
        ({"t5_length": 513}, "t5_length 513 is outside 1..512"),
        ({"preview_every": 0}, "preview_every 0"),
        ({"negative_prompt": ""}, "negative_prompt is not used by tiny-flux: leave it out"),
        ({"sampler": "euler"}, "sampler is not used by tiny-flux"),
        ({"strength": 0.5}, "strength is given and init_image is not"),
        ({"fit": "crop"}, "fit is given and init_image is not"),
        (
            {"latents": torch.zeros(1, 16, 4, 4)},
            r"shape \[1, 16, 4, 4\].*needs floats of shape \[1, 16, 6, 4\]",
        ),
        ({"latents": torch.full((1, 16, 6, 4), float("nan"))}, "NaN or infinity"),
    ],
)
def test_a_request_that_cannot_be_served_is_refused_by_name(change: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        plan_flux(INFO, replace(REQUEST, **change), reference())


def test_a_bad_size_is_refused_before_any_file_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_loader, "fetch", lambda *a, **k: pytest.fail("a file was looked for"))
    with pytest.raises(RequestError, match="the nearest are 992x992 and 1008x1008"):
        check_request("flux-dev", GenerationRequest(prompt="x", width=1000, height=1000))
    check_request("flux-dev", GenerationRequest(prompt="x", width=1000, height=1000), numerics="candle")


def test_candle_rounds_sizes_up_and_cuts_dev_to_256() -> None:
    plan = plan_flux(SDVersion.FLUX_DEV.info, GenerationRequest("x", width=1000, height=1000), candle())
    assert (plan.width, plan.height, plan.t5_length) == (1008, 1008, 256)
    assert plan_flux(SDVersion.FLUX_DEV.info, GenerationRequest("x"), reference()).t5_length == 512
    assert plan_flux(SDVersion.FLUX_SCHNELL.info, GenerationRequest("x"), reference()).t5_length == 256


def test_a_cut_prompt_is_reported_and_strict_refuses(model: Model) -> None:
    long = "one two three four five six seven eight nine ten " * 8
    (result,) = model.generate(replace(REQUEST, prompt=long))
    assert "T5 reads the first 32 of" in result.notes[0]
    with pytest.raises(PromptTooLongError, match="T5 reads the first 32"):
        model.generate(replace(REQUEST, prompt=long, strict_prompt=True))


@pytest.mark.parametrize(("role", "stage"), [("t5", "T5"), ("clip", "CLIP"), ("vae", "the autoencoder")])
def test_nan_is_reported_with_its_stage(folder: Path, role: str, stage: str) -> None:
    model = open_model(folder, INFO, keep_loaded=True)
    parameter = list(model.components.network(role).parameters())[-1]
    parameter.data.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=f"{stage} produced NaN or infinity in float32"):
        model.generate(REQUEST)


def test_weights_in_a_prompt_are_noted(model: Model) -> None:
    (result,) = model.generate(replace(REQUEST, prompt="a (red:1.3) kite", steps=1))
    assert result.notes == [
        "weights are not interpreted: '(red:1.3)' is read as text, parentheses and number included"
    ]


def test_nan_in_the_loop_is_reported_with_its_step(folder: Path) -> None:
    model = open_model(folder, INFO, keep_loaded=True)
    calls = []

    def poison(_module: object, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return output * float("nan") if len(calls) == 2 else output

    model.components.network("transformer").register_forward_hook(poison)
    with pytest.raises(NonFiniteError, match="the transformer, step 2 produced") as caught:
        model.generate(REQUEST)
    assert caught.value.exit_code == 1


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("transformer", "double_blocks.0.img_mlp"),
        ("t5", "encoder.block.0.layer.1"),
        ("clip", "text_model.encoder.layers.0"),
        ("vae", "decoder.up.1"),
    ],
)
def test_cancel_takes_effect_within_one_block_and_leaves_the_model_well(
    folder: Path, role: str, block: str
) -> None:
    model = open_model(folder, INFO, keep_loaded=True)
    expected = model.generate(replace(REQUEST, prompt="before"))[0]
    token = CancelToken()
    network = model.components.network(role)
    ran: list[str] = []
    handles = [
        part.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, part in network.named_modules()
    ]
    handles.append(network.get_submodule(block).register_forward_pre_hook(lambda *_: token.cancel()))
    with pytest.raises(Cancelled):
        model.generate(REQUEST, cancel=token)
    after = ran[ran.index(ran[-1]) :]
    assert len(after) <= 1 and "" not in ran[-1:], "the network ran on to its end"
    for handle in handles:
        handle.remove()
    again = model.generate(replace(REQUEST, prompt="before"), cancel=CancelToken())[0]
    assert pixel_hash(again.image) == pixel_hash(expected.image)
    assert not any(part._forward_pre_hooks for part in network.modules()), "a cancel hook stayed behind"


def test_cancel_while_loading_takes_one_tensor(model: Model) -> None:
    token, seen = CancelToken(), []

    def on_event(event: Event) -> None:
        if isinstance(event, Progress) and event.stage == "load transformer":
            seen.append(event.index)
            token.cancel()

    with pytest.raises(Cancelled):
        model.generate(REQUEST, on_event=on_event, cancel=token)
    assert len(seen) == 1
    assert model.components.loaded == set()
    model.generate(REQUEST)


def test_events_come_in_order_and_end_with_complete(model: Model) -> None:
    events: list[Event] = []
    results = model.generate(replace(REQUEST, batch=2, preview_every=2), on_event=events.append)
    stages = [e.stage for e in events if isinstance(e, Progress)]
    assert [s for i, s in enumerate(stages) if i == 0 or stages[i - 1] != s] == [
        "load clip", "load t5", "load transformer", "denoise", "load vae", "decode",
    ]  # fmt: skip
    previews = [e for e in events if isinstance(e, Preview)]
    assert [(p.index, p.image) for p in previews] == [(2, 0), (2, 1)]
    assert previews[0].picture.size == results[0].image.size
    assert isinstance(events[-1], Complete) and events[-1].results == results


def test_preview_is_a_linear_map_of_the_prediction() -> None:
    x0 = torch.zeros(16, 2, 2)
    x0[6] = 1.0
    pixels = preview_pixels(INFO, x0)
    assert pixels.shape == (3, 16, 16)
    assert torch.allclose(pixels[:, 0, 0], torch.tensor(INFO.preview[6]))


def test_bfloat16_is_close_to_float32(folder: Path) -> None:
    exact = open_model(folder, INFO).generate(REQUEST)[0]
    rough = open_model(folder, INFO, dtype=torch.bfloat16).generate(REQUEST)[0]
    assert rough.metadata["dtype"] == "bfloat16"
    assert (rough.latents - exact.latents).norm() / exact.latents.norm() < 0.05


def test_guidance_and_shift_reach_the_loop(tmp_path: Path) -> None:
    info = small_info(guidance=True)
    model = open_model(write_folder(tmp_path, info), info)
    taken: dict[str, torch.Tensor] = {}
    weak = model.generate(replace(REQUEST, guidance=1.0), tap=lambda n, t: taken.update({n: t}))[0]
    strong = model.generate(replace(REQUEST, guidance=9.0))[0]
    assert not torch.equal(weak.latents, strong.latents)
    assert taken["timesteps"][1] > 2 / 3 - 0.2 and taken["timesteps"][1] != 2 / 3
    assert model.generate(REQUEST)[0].metadata["guidance"] == 3.5


def test_an_unknown_version_is_refused() -> None:
    with pytest.raises(UnknownVersionError):
        load_model("sd9")


def test_files_that_no_model_takes_are_refused_by_what_they_are(folder: Path) -> None:
    with pytest.raises(RequestError, match="schnell, 128 wide, which no model that is built takes"):
        load_model(path=folder)


@pytest.mark.parametrize("role", ["clip", "t5", "transformer", "vae"])
def test_nothing_stays_loaded_after_a_run_that_failed(folder: Path, role: str) -> None:
    model = open_model(folder, INFO)
    load: Callable[..., torch.nn.Module] = model.components.network

    def damaged(asked: str, *rest: object) -> torch.nn.Module:
        network = load(asked, *rest)
        if asked == role:
            for parameter in network.parameters():
                parameter.data.fill_(float("nan"))
        return network

    model.components.network = damaged  # type: ignore[method-assign]
    with pytest.raises(NonFiniteError):
        model.generate(REQUEST)
    assert model.components.loaded == set()


def test_nothing_stays_loaded_after_leaving_the_loop(model: Model) -> None:
    steps = model.steps(REQUEST)
    next(steps)
    assert model.components.loaded == {"transformer"}
    steps.close()  # type: ignore[attr-defined]
    assert model.components.loaded == set()


def test_a_request_too_large_for_the_memory_is_refused_before_a_weight_is_read(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "available_memory", lambda _: 2 * 10**9)
    model.generate(REQUEST)
    with pytest.raises(NotEnoughMemoryError, match="ask for a smaller picture"):
        model.generate(replace(REQUEST, width=8192, height=8192))
    assert model.components.loaded == set()
    with pytest.raises(RequestError, match=r"width 100000 is outside 1\.\.16384"):
        model.generate(replace(REQUEST, width=100_000))


def test_the_model_states_its_defaults(model: Model) -> None:
    wanted = model.defaults
    assert (wanted.width, wanted.height, wanted.steps, wanted.guidance, wanted.t5_length) == (
        128,
        128,
        4,
        None,
        32,
    )
