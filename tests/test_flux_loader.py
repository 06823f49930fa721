"""Finding the files of a model, checking them before anything is loaded, fitting them into memory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from helpers_flux import INFO_FOLDERS, open_model, small_info, write_folder
from helpers_layouts import as_gguf, by_candle, cast_to
from safetensors.torch import load_file, save_file

from flux_sd import device
from flux_sd.checkpoint import Checkpoint
from flux_sd.components import Components, LoadOptions, describe_file, need
from flux_sd.device import GB, StageNeed, choose_device, choose_dtype, place
from flux_sd.errors import (
    AmbiguousFileError,
    CheckpointError,
    DeviceError,
    MissingFileError,
    NotEnoughMemoryError,
    WeightMapError,
)
from flux_sd.flux_loader import load_flux, networks_of
from flux_sd.load_plan import DECODES
from flux_sd.model_files import find_files
from flux_sd.model_loader import flux_model
from flux_sd.numerics import reference
from flux_sd.quantized import PackedRows, QuantizedEmbedding, QuantizedLinear
from flux_sd.request import GenerationRequest
from flux_sd.versions import SDVersion

INFO = small_info()
CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_folder(tmp_path / "model", INFO)


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


TOKENIZER_FILES = ("tokenizer/vocab.json", "tokenizer_2/spiece.model")


@pytest.mark.parametrize(("names", "expected"), INFO_FOLDERS)
def test_layouts_people_have(tmp_path: Path, names: tuple[str, ...], expected: dict[str, str]) -> None:
    files = find_files(INFO, touch(tmp_path, *names, *TOKENIZER_FILES), {})
    found = {role: str(files.networks[role].relative_to(tmp_path)) for role in expected}
    assert found == expected
    assert (
        files.tokenizers["clip"] == tmp_path / "tokenizer"
        and files.tokenizers["t5"] == tmp_path / "tokenizer_2"
    )


def test_two_candidates_for_one_role_are_both_named(folder: Path) -> None:
    touch(folder, "flux1-other.safetensors")
    with pytest.raises(
        AmbiguousFileError, match=r"flux1-other.safetensors and flux1-small.safetensors.*--transformer"
    ):
        find_files(INFO, folder, {})
    files = find_files(INFO, folder, {"transformer": folder / "flux1-small.safetensors"})
    assert files.networks["transformer"].name == "flux1-small.safetensors"


@pytest.mark.parametrize("role", ["transformer", "vae", "clip", "t5"])
def test_a_missing_role_is_named_with_what_is_accepted(folder: Path, role: str) -> None:
    gone = {
        "transformer": "flux1-small.safetensors",
        "vae": "ae.safetensors",
        "clip": "text_encoder",
        "t5": "text_encoder_2",
    }
    path = folder / gone[role]
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(MissingFileError, match=f"holds no {role}: expected .* or give --{role}"):
        find_files(INFO, folder, {})


def test_separate_files_find_tokenizers_beside_their_encoders(folder: Path) -> None:
    given = {
        "transformer": folder / "flux1-small.safetensors",
        "vae": folder / "ae.safetensors",
        "clip": folder / "text_encoder" / "model.safetensors",
        "t5": folder / "text_encoder_2" / "model.safetensors",
    }
    assert find_files(INFO, None, given).tokenizers["t5"] == folder / "tokenizer_2"
    with pytest.raises(MissingFileError, match="no file for the t5: give --t5 FILE"):
        find_files(INFO, None, {role: path for role, path in given.items() if role != "t5"})
    shutil.rmtree(folder / "tokenizer_2")
    with pytest.raises(
        MissingFileError, match="no tokenizer for the t5 encoder: expected a folder tokenizer_2/"
    ):
        find_files(INFO, None, given)


def test_a_path_that_is_no_folder_and_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError, match=r"path: .* does not exist"):
        find_files(INFO, tmp_path / "nothing", {})
    with pytest.raises(MissingFileError, match=r"vae: .* does not exist"):
        find_files(INFO, tmp_path, {"vae": tmp_path / "nothing"})


def load(folder: Path, automatic: bool = False, dtype: torch.dtype = torch.float32) -> Components:
    options = LoadOptions(automatic=automatic)
    return load_flux(INFO, find_files(INFO, folder, {}), CPU, dtype, reference(), options)


def test_a_tensor_too_few_is_named_before_anything_is_loaded(folder: Path) -> None:
    file = folder / "flux1-small.safetensors"
    tensors = load_file(file)
    tensors.pop("double_blocks.0.img_attn.qkv.weight")
    save_file(tensors, file)
    with pytest.raises(WeightMapError, match=r"double_blocks.0.img_attn.qkv.weight"):
        load(folder)


def test_swapped_encoders_are_refused(folder: Path) -> None:
    clip, t5 = folder / "text_encoder/model.safetensors", folder / "text_encoder_2/model.safetensors"
    with pytest.raises(WeightMapError):
        load_flux(INFO, find_files(INFO, folder, {"clip": t5, "t5": clip}), CPU, torch.float32, reference())


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "ae.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"ae.safetensors"):
        load(folder)


def test_no_parameter_is_left_on_meta_and_values_are_the_files(folder: Path) -> None:
    transformer = load(folder).network("transformer")
    stored = load_file(folder / "flux1-small.safetensors")
    for name, parameter in transformer.named_parameters():
        assert torch.equal(parameter, stored[name]), name
        assert not parameter.requires_grad


def test_weights_kept_as_stored_give_the_picture_of_widened_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_folder(tmp_path / "half", INFO, dtype=torch.bfloat16)
    request = GenerationRequest(prompt="a kite", seed=1, steps=2)
    expected = open_model(folder, INFO).generate(request)[0]
    largest = max(
        (need(role, INFO, network) for role, network in networks_of(INFO, reference()).items()),
        key=lambda need: need.parameters,
    )
    room = 4 * largest.parameters + largest.activations + device.OVERHEAD - 1  # a byte too few for float32
    monkeypatch.setattr(device, "available_memory", lambda _: room)
    components = load(folder, automatic=True)
    assert components.placement.stored == {largest.role}
    network = components.network(largest.role)
    kept = [part for part in network.modules() if isinstance(part, (QuantizedLinear, QuantizedEmbedding))]
    assert kept and all(rows.type == "BF16" for part in kept for rows in part.weight.parts)
    assert "widened as they are used" in components.placement.notes[0]
    result = flux_model(SDVersion.TINY_FLUX, components).generate(request)[0]
    assert torch.equal(result.latents, expected.latents)
    assert result.metadata["stored_dtype_kept"] and result.notes


def test_stored_embedding_widens_its_rows() -> None:
    weight = torch.randn(4, 3).bfloat16()
    embedding = QuantizedEmbedding([PackedRows(weight, "BF16", None, (4, 3))], torch.float32)
    rows = embedding(torch.tensor([[1, 3]]))
    assert rows.dtype == torch.float32 and torch.equal(rows[0, 1], weight[3].float())


def test_what_does_not_fit_is_refused_and_the_file_that_would_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "available_memory", lambda _: int(16 * GB))
    needs = [StageNeed("transformer", 11_901_408_320, 23_802_816_640, int(0.5 * GB))]
    with pytest.raises(
        NotEnoughMemoryError, match=r"transformer stage needs 2\d.\d GB.*16.0 GB are available.*Q8_0 GGUF"
    ):
        place(needs, CPU, torch.bfloat16, automatic=True, together=False)


def test_packed_weights_count_as_the_file_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """11.9 G parameters in Q8_0 with a few in float32: 13 GB where bfloat16 needs 24."""
    total, packed = 11_901_408_320, 11_800_000_000
    wanted = StageNeed(
        "transformer", total, 12_700_000_000, int(0.5 * GB), packed=packed, packed_bytes=12_540_000_000
    )
    assert wanted.weight_bytes(torch.float32) == 4 * (total - packed) + 12_540_000_000
    monkeypatch.setattr(device, "available_memory", lambda _: int(14.3 * GB))
    assert not place([wanted], CPU, torch.float32, automatic=True, together=False).stored
    monkeypatch.setattr(device, "available_memory", lambda _: int(10 * GB))
    with pytest.raises(NotEnoughMemoryError, match=r"a Q5_K GGUF \(8.2 GB\) would fit$"):
        place([wanted], CPU, torch.bfloat16, automatic=True, together=False)


def test_decoding_at_load_that_does_not_fit_names_the_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda _: int(16 * GB))
    wanted = StageNeed("transformer", 11_901_408_320, 12_700_000_000, 0, widens=False, unpacks=True)
    with pytest.raises(NotEnoughMemoryError, match=r"leave packed weights packed \(--decode on-use\)"):
        place([wanted], CPU, torch.bfloat16, automatic=True, together=False)


def packed_folder(folder: Path) -> Path:
    """The same model with a transformer in blocks, as flux1-small.gguf."""
    file = folder / "flux1-small.safetensors"
    as_gguf(by_candle)(load_file(file), folder / "flux1-small.gguf")
    file.unlink()
    return folder


def test_both_times_of_decoding_paint_the_same_picture_and_say_what_they_take(folder: Path) -> None:
    packed_folder(folder)
    results, tables = {}, {}
    for decode in DECODES:
        options = LoadOptions(decode=decode)
        components = load_flux(INFO, find_files(INFO, folder, {}), CPU, torch.float32, reference(), options)
        network = components.network("transformer")
        assert any(isinstance(layer, QuantizedLinear) for layer in network.modules())
        results[decode] = flux_model(SDVersion.TINY_FLUX, components).generate(
            GenerationRequest(prompt="a kite", seed=1, steps=2)
        )[0]
        tables[decode] = results[decode].metadata["weights"]["transformer"]
        held = sum(tensor.nbytes for tensor in network.state_dict().values())
        assert tables[decode]["memory"] == held
    assert torch.equal(results["on_use"].latents, results["on_load"].latents)
    assert set(tables["on_use"]["types"]) == {"F32", "Q4_0"}
    assert tables["on_use"]["memory"] == tables["on_use"]["stored"] < tables["on_load"]["memory"] / 3
    assert not results["on_use"].notes and "decoded at load" in results["on_load"].notes[0]


def test_packed_convolutions_are_decoded_and_that_is_told(folder: Path) -> None:
    cast_to(torch.float8_e4m3fn)(load_file(folder / "ae.safetensors"), folder / "ae.safetensors")
    components = load(folder)
    (note,) = components.placement.notes
    assert "vae: " in note and "as only linears and embeddings can stay packed: " in note
    table = components.describe_weights()["vae"]
    assert set(table["types"]) == {"F8_E4M3"} and table["memory"] == 4 * table["stored"]


def test_the_pages_of_a_file_are_given_back_after_its_stage(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    components = load(packed_folder(folder))
    network, released = components.network("transformer"), []
    monkeypatch.setattr(Checkpoint, "release", lambda self, name=None: released.append(self.files[0].name))
    components.free("transformer")
    assert network is not None and released == ["flux1-small.gguf"]


def test_float32_that_does_not_fit_stays_as_stored_only_when_dtype_was_automatic(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(device, "available_memory", lambda _: int(30 * GB))
    needs = [StageNeed("transformer", 11_901_408_320, 23_802_816_640, int(0.5 * GB))]
    assert place(needs, CPU, torch.float32, automatic=True, together=False).stored == {"transformer"}
    with pytest.raises(NotEnoughMemoryError):
        place(needs, CPU, torch.float32, automatic=False, together=False)


def test_keeping_everything_loaded_needs_room_for_the_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [StageNeed("transformer", 10**9, 4 * 10**9, 0), StageNeed("t5", 10**9, 4 * 10**9, 0)]
    monkeypatch.setattr(device, "available_memory", lambda _: int(6 * GB))
    assert not place(needs, CPU, torch.float32, automatic=False, together=False).stored
    with pytest.raises(NotEnoughMemoryError):
        place(needs, CPU, torch.float32, automatic=False, together=True)


def test_dtypes_and_devices() -> None:
    assert choose_dtype("bf16", CPU) == torch.bfloat16
    assert choose_dtype("auto", CPU, "float32") == torch.float32
    assert choose_dtype("auto", CPU) in (torch.float32, torch.bfloat16)
    with pytest.raises(DeviceError, match="dtype 'int7' is unknown"):
        choose_dtype("int7", CPU)
    with pytest.raises(DeviceError, match="device 'cuda:77' is not usable here"):
        choose_device("cuda:77")
    with pytest.raises(DeviceError, match="device 'gpu' is unknown: choose auto, cpu, cuda or mps"):
        choose_device("gpu")


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [({"avx512_bf16": True}, True), ({"amx_bf16": True}, True), ({"avx2": True}, False)],
)
def test_bfloat16_is_chosen_by_what_the_processor_says(
    monkeypatch: pytest.MonkeyPatch, abilities: dict[str, bool], expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: abilities, raising=False)
    assert device.multiplies_bfloat16(CPU) is expected


def test_fingerprints_tell_files_apart(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"x" * 3_000_000)
    (tmp_path / "b").write_bytes(b"x" * 2_999_999 + b"y")
    one, other = describe_file(tmp_path / "a"), describe_file(tmp_path / "b")
    assert one["fingerprint"] != other["fingerprint"] and one["name"] == "a" and one["bytes"] == 3_000_000


def test_the_refusal_states_what_is_really_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "available_memory", lambda _: int(32 * GB))
    needs = [StageNeed("transformer", 11_901_408_320, 23_802_816_640, int(0.5 * GB))]
    with pytest.raises(NotEnoughMemoryError, match=r"needs 48.7 GB.*leave the dtype to be chosen"):
        place(needs, CPU, torch.float32, automatic=False, together=False)


def test_components_kept_together_widen_only_as_far_as_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = [
        StageNeed("transformer", 10**9, 2 * 10**9, 0),
        StageNeed("t5", 6 * 10**8, 12 * 10**8, 0),
        StageNeed("vae", 10**8, 10**8, 0, widens=False),
    ]
    monkeypatch.setattr(device, "available_memory", lambda _: int(5.5 * GB))
    assert place(needs, CPU, torch.float32, automatic=True, together=True).stored == {"transformer"}
    monkeypatch.setattr(device, "available_memory", lambda _: int(4.3 * GB))
    assert place(needs, CPU, torch.float32, automatic=True, together=True).stored == {"transformer", "t5"}
    monkeypatch.setattr(device, "available_memory", lambda _: int(4.1 * GB))
    with pytest.raises(NotEnoughMemoryError):
        place(needs, CPU, torch.float32, automatic=True, together=True)
