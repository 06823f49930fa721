"""The README's table of versions: what the code says, and nothing that no test covers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import helpers_checkpoints as write
import helpers_headers as header
import pytest
import sd_names
import versions_table
from helpers_sd import half_mask, open_model, picture, small_info, write_folder
from make_synthetic_checkpoint import shapes_of
from torch import nn

from flux_sd import GenerationRequest
from flux_sd.checkpoint import open_checkpoint
from flux_sd.load_plan import plan_load
from flux_sd.lora.names import Target, names_of
from flux_sd.model_files import config_of, layout_of
from flux_sd.model_loader import Model, check_request
from flux_sd.schedulers import SAMPLERS
from flux_sd.versions import SDVersion

README = Path(__file__).parent.parent / "README.md"
RELEASED = versions_table.RELEASED
FLUX = [version for version in RELEASED if version.info.flux is not None]
SD = [version for version in RELEASED if version.info.sd is not None]


def key_of(version: SDVersion) -> str:
    return version.info.key


def flux_shapes(version: SDVersion, spelled: str = "") -> header.Shapes:
    """The transformer of a released FLUX version, in our names or as another dialect spells them."""
    config = version.info.flux and version.info.flux.transformer
    assert config is not None
    name = "dev" if config.guidance_embed else "schnell"
    return header.flux(name, spelled, in_channels=config.in_channels)


def plan(path: Path, version: SDVersion) -> int:
    """How many parameters of the version's denoiser a file makes; fails where one problem is left."""
    info = version.info
    component, config = (
        ("unet", info.sd.unet) if info.sd else ("flux_mmdit", info.flux and info.flux.transformer)
    )
    with open_checkpoint(path) as checkpoint:
        module = write.build(component, config)
        made = plan_load(component, module, config, checkpoint)
        assert not made.ignored
        return len(made.parameters)


@pytest.mark.parametrize("version", RELEASED, ids=key_of)
def test_a_gguf_of_the_real_shapes_loads(version: SDVersion, tmp_path: Path) -> None:
    """Sparse, under the names that GGUF files have: the authors'."""
    info = version.info
    if info.sd is not None:
        ours = shapes_of("unet", info.sd.unet)
        shapes = {sd_names.unet_ldm(name, ours): shape for name, shape in ours.items()}
    else:
        shapes = flux_shapes(version)
    assert plan(header.gguf(tmp_path / "m.gguf", shapes), version) == len(shapes)


@pytest.mark.parametrize("dialect", ["bfl", "diffusers"])
@pytest.mark.parametrize("version", FLUX, ids=key_of)
def test_a_transformer_of_the_real_shapes_loads(version: SDVersion, dialect: str, tmp_path: Path) -> None:
    theirs = flux_shapes(version, "flux_diffusers" if dialect == "diffusers" else "")
    assert plan(header.safetensors(tmp_path / "m.safetensors", theirs), version) == len(flux_shapes(version))


@functools.cache  # versions share their networks
def unfound_layers(component: str, config: object) -> list[str]:
    """The linears of a denoiser that an adapter's name with underscores does not lead to, in our names and in
    those of single files."""
    module = write.build(component, config)
    names, parameters = names_of(Target.of(component, config, module)), module.state_dict().keys()
    unfound = []
    for path, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            theirs = (
                sd_names.unet_ldm(f"{path}.weight", parameters) if component == "unet" else f"{path}.weight"
            )
            for spelled in {path, theirs.removesuffix(".weight")}:
                found = names.find("_".join(spelled.split(".")), flat=True)
                parts = set() if found is None else {p.parameter for s in found.weight for p in s.parts}
                unfound += [] if parts == {f"{path}.weight"} else [spelled]
    return unfound


@pytest.mark.parametrize("version", RELEASED, ids=key_of)
def test_an_adapter_finds_every_layer(version: SDVersion) -> None:
    """At the released sizes."""
    layout = layout_of(version.info)
    assert not unfound_layers(layout.maps[layout.denoiser], config_of(layout.denoiser, version.info))


@pytest.fixture(scope="module")
def model_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[SDVersion], Model]]:
    """A small model of a version's kind, opened once."""
    opened: dict[str, Model] = {}

    def find(version: SDVersion) -> Model:
        info = small_info(version)
        if info.key not in opened:
            folder = write_folder(tmp_path_factory.mktemp(info.key), info)
            opened[info.key] = open_model(folder, info, keep_loaded=True)
        return opened[info.key]

    yield find
    for model in opened.values():
        model.close()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("version", SD, ids=key_of)
def test_every_sampler_runs_on_every_version(
    version: SDVersion, name: str, model_of: Callable[[SDVersion], Model]
) -> None:
    """The released version takes it, and two steps of a small model of its kind leave finite numbers."""
    request = versions_table.request_for(version.info, name)
    check_request(version, request)
    pictures = {"init_image": picture(), "mask": half_mask()} if version.info.is_inpainting else {}
    asked = GenerationRequest("a", seed=0, steps=2, sampler=name, **pictures)  # type: ignore[arg-type]
    (result,) = model_of(version).generate(asked)
    assert result.metadata["sampler"] == name and result.latents.isfinite().all()


def test_the_readme_has_the_table() -> None:
    """`python tools/versions_table.py` writes it."""
    begin, end = versions_table.BEGIN, versions_table.END
    written = README.read_text(encoding="utf-8").partition(begin)[2].partition(end)[0]
    assert written.strip() == versions_table.table().strip()


@pytest.fixture(scope="module")
def existing(request: pytest.FixtureRequest) -> set[str]:
    """The tests that there are: those of this run, where they include every file that is wanted."""
    wanted = [test for version in RELEASED for test in versions_table.evidence(version)]
    running = {item.nodeid for item in request.session.items}
    files = {test.partition("::")[0] for test in wanted}
    if files <= {name.partition("::")[0] for name in running}:
        return running
    return versions_table.collected(wanted)


def test_every_claim_has_its_test(existing: set[str]) -> None:
    """The tests are those that pytest finds, by their names."""
    wanted = [test for version in RELEASED for test in versions_table.evidence(version)]
    assert len(set(wanted)) > 100
    assert set(wanted) <= existing, set(wanted) - existing


def test_a_claim_without_a_test_is_noticed(existing: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    invented = {**versions_table.EVIDENCE, ("sd", "text"): "tests/test_versions.py::test_nothing[{key}]"}
    monkeypatch.setattr(versions_table, "EVIDENCE", invented)
    lacking = set(versions_table.evidence(SDVersion.SD15)) - existing
    assert lacking == {"tests/test_versions.py::test_nothing[sd15]"}


def test_what_a_version_cannot_do_is_not_claimed() -> None:
    """An inpainting model paints from no text alone; FLUX has one sampler."""
    assert versions_table.claims(SDVersion.SD15_INPAINT).tasks == ("inpaint",)
    assert versions_table.claims(SDVersion.SD15).tasks == ("text", "picture", "inpaint")
    assert versions_table.claims(SDVersion.FLUX_DEV).samplers == (versions_table.FLUX_SAMPLER,)
    assert "single" not in versions_table.claims(SDVersion.SDXL_INPAINT).layouts
