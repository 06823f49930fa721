"""What a network predicts, as the clean picture that it means.

epsilon is the noise (Ho et al. 2020); v_prediction is sqrt(abar) noise - sqrt(1 - abar) clean (Salimans and
Ho 2022); sample is the clean picture itself.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

Prediction = Literal["epsilon", "v_prediction", "sample"]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def to_clean(prediction: Prediction, output: Tensor, x: Tensor, abar: float) -> Tensor:
    """The network's output for its input x (variance preserving) -> clean [B,C,H,W]."""
    signal, noise = abar**0.5, (1 - abar) ** 0.5
    match prediction:
        case "epsilon":
            return (x - noise * output) / signal
        case "v_prediction":
            return signal * x - noise * output
        case "sample":
            return output
