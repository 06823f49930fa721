"""tools/make_synthetic_checkpoint.py: its files load, in every layout to the same numbers, and run."""

from __future__ import annotations

from pathlib import Path

import helpers_checkpoints as helpers
import make_synthetic_checkpoint as synthetic
import pytest
import torch
from torch import Tensor

from flux_sd.checkpoint import open_checkpoint
from flux_sd.load_plan import fill, plan_load


def load(component: str, path: Path) -> dict[str, Tensor]:
    module = helpers.build(component)
    with open_checkpoint(path) as checkpoint:
        fill(module, plan_load(component, module, helpers.CONFIGS[component], checkpoint))
    return dict(module.state_dict())


@pytest.mark.parametrize("component", helpers.CONFIGS)
def test_layouts_hold_the_same_numbers(component: str, tmp_path: Path) -> None:
    config = helpers.CONFIGS[component]
    found = []
    for layout, limit in (("bfl", None), ("diffusers", None), ("diffusers", 100_000)):
        folder = tmp_path / f"{layout}{limit}"
        dialect = synthetic.DIALECTS[layout][component]
        synthetic.write_component(component, config, dialect, folder / "m.safetensors", "f32", 3, limit)
        assert len(list(folder.glob("*.safetensors"))) == 1 or limit
        found.append(load(component, folder))
    for other in found[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in found[0].items())
    assert all(tensor.isfinite().all() for tensor in found[0].values())
    matrices = [tensor for tensor in found[0].values() if tensor.ndim > 1]
    assert all(tensor.std() > 0 for tensor in matrices)


def test_blocks_of_values_do_not_depend_on_where_reading_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synthetic, "BLOCK", 10)
    whole = torch.cat(list(synthetic.values("x.weight", (7, 5), 0, 35, seed=1)))
    part = torch.cat(list(synthetic.values("x.weight", (7, 5), 8, 21, seed=1)))
    assert whole.numel() == 35 and torch.equal(whole[8:29], part)
    assert not torch.equal(whole[:10], whole[10:20])


def test_a_sparse_file_takes_no_room(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    nbytes = synthetic.write_component("t5", helpers.CONFIGS["t5"], "hf", path, "bf16", seed=None)
    assert path.stat().st_size > nbytes and path.stat().st_blocks * 512 < nbytes
    assert not any(tensor.any() for tensor in load("t5", path).values())


def test_whole_folders_and_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["tiny-flux", str(tmp_path), "--layout", "diffusers", "--depth", "1", "1", "--zeros"]
    assert synthetic.main(arguments) == 0
    for folder in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        assert (tmp_path / folder / "config.json").is_file()
        assert len(list((tmp_path / folder).glob("*.safetensors"))) == 1
    for words, says in (
        (["sd15", "--layout", "bfl"], "sd15 comes as --layout diffusers or ldm, whole"),
        (["flux-dev", "--layout", "ldm"], "flux-dev comes as --layout bfl or diffusers"),
        (["sdxl-inpaint", "--layout", "ldm"], "sdxl-inpaint was never released as a single file"),
        (["sd15", "--container", "ckpt"], "--container ckpt goes with ldm"),
        (["sd15", "--layout", "ldm", "--shard-size", "1"], "a single file has no shards"),
    ):
        assert synthetic.main([words[0], str(tmp_path / "refused"), *words[1:]]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
