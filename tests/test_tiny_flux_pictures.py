"""The embedded model paints what captions say, also pairs it was never shown. Needs no font."""

import json
from pathlib import Path

import numpy as np
from PIL import Image
from tiny_flux.pictures import is_held_out

import flux_sd
from flux_sd import GenerationRequest

DATA = Path(__file__).parent / "data"
SIDE = 32
SEED = 0


def thumbnails() -> np.ndarray:
    """float32 [64,32,32,3] in 0..255, row by row of the stored sheet"""
    sheet = np.asarray(Image.open(DATA / "tiny_flux_thumbnails.png").convert("RGB"), np.float32)
    rows, columns = sheet.shape[0] // SIDE, sheet.shape[1] // SIDE
    return sheet.reshape(rows, SIDE, columns, SIDE, 3).transpose(0, 2, 1, 3, 4).reshape(-1, SIDE, SIDE, 3)


def listed() -> list[dict[str, object]]:
    """Caption of each thumbnail, and whether the pair was kept from training."""
    return json.loads((DATA / "tiny_flux_thumbnails.json").read_text(encoding="utf-8"))


def test_what_is_asked_for_was_kept_from_training() -> None:
    for row in (row for row in listed() if row["held_out"]):  # the others only stand beside them
        phrase, _, rest = str(row["caption"]).partition(" on a ")
        article, _, name = phrase.partition(" ")
        name = name if article in ("a", "an") else phrase
        assert is_held_out(name, rest.removesuffix(" background")), row["caption"]


def test_each_held_out_caption_is_nearest_to_its_own_thumbnail() -> None:
    stored, captions = thumbnails(), listed()
    assert len(stored) == len(captions) == 64
    asked = [i for i, row in enumerate(captions) if row["held_out"]]
    assert len(asked) == 16
    wrong = []
    with flux_sd.load_model("tiny-flux", keep_loaded=True) as model:
        for i in asked:
            request = GenerationRequest(prompt=str(captions[i]["caption"]), seed=SEED)
            picture = model.generate(request)[0].image
            small = np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
            nearest = int(((stored - small) ** 2).mean((1, 2, 3)).argmin())
            if nearest != i:
                wrong.append(f"{captions[i]['caption']}: nearest to {captions[nearest]['caption']}")
    assert not wrong, wrong
