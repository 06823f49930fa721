"""The places where Candle's arithmetic parts from the published models', one named field each. Floor 0.

`reference()` is what the models' authors published and the default; `candle()` is what Candle 0.11 computes.
A field is copied into the config of whatever it concerns; no network asks which preset is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import RequestError


@dataclass(frozen=True)
class Numerics:
    """One field per known difference; see each comment for what either value does."""

    name: str
    # "float32": ids, angles and rotation in float32 or better (BFL). "model": all of them in the dtype of the
    # weights, as Candle does; in bfloat16 at 1024 px that turns angles by up to 0.2 rad.
    rope_dtype: Literal["float32", "model"]
    # T5 ids of FLUX dev: 512 as published, 256 in Candle's worker. None leaves the version's own length.
    t5_length: int | None
    # Whether a T5 prompt that is cut keeps its end token in the last place (BFL) or loses it (Candle).
    t5_keep_end_token: bool
    # A size that is no multiple of 16: "refuse" it naming the neighbours, or round it "up" as Candle does.
    size: Literal["refuse", "up"]
    # float image -> 8 bits: "round" to nearest, or "truncate" as Candle's and BFL's programs do.
    to_bytes: Literal["round", "truncate"]


def reference() -> Numerics:
    """What the authors published; but bytes are rounded to nearest, where BFL's program truncates."""
    return Numerics("reference", "float32", None, True, "refuse", "round")


def candle() -> Numerics:
    """What Candle 0.11 computes (candle-transformers `models/flux`, and the FLUX example)."""
    return Numerics("candle", "model", 256, False, "up", "truncate")


PRESETS = {"reference": reference, "candle": candle}


def parse(name: str) -> Numerics:
    """The preset called `name`. Raises RequestError for another word."""
    if name not in PRESETS:
        raise RequestError(f"numerics {name!r} is unknown: choose {' or '.join(PRESETS)}")
    return PRESETS[name]()
