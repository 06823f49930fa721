"""Stable Diffusion's samplers and noise schedules. Floor 2.

In reading order: `noise.py` has the noise levels that a model was trained on; `spacing.py` picks those that a
run steps through; `prediction.py` turns what the network says into a clean picture; one file per solver says
how to step on with it; `sampler.py` joins the four. Mirrors candle-transformers' `models/stable_diffusion/`
schedulers; the published formulas are cited where they stand.
"""

from .noise import NoiseSchedule
from .prediction import PREDICTIONS, Prediction
from .sampler import SAMPLERS, Sampler, SamplerStep, check_pair, make_sampler
from .spacing import SCHEDULES

__all__ = [
    "PREDICTIONS",
    "SAMPLERS",
    "SCHEDULES",
    "NoiseSchedule",
    "Prediction",
    "Sampler",
    "SamplerStep",
    "check_pair",
    "make_sampler",
]
