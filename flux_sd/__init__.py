"""FLUX.1 and Stable Diffusion in plain PyTorch, checked stage by stage against Candle.

    import flux_sd

    with flux_sd.load_model("tiny-flux") as model:
        picture = model.generate(flux_sd.GenerationRequest(prompt="a pizza"))[0].image
    picture.save("pizza.png")

Names are imported when they are first used, so that `import flux_sd` and `flux-sd --help` do not wait for
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .errors import Cancelled, FluxSdError
    from .generation_engine import GenerationEngine
    from .lora.adapters import Lora
    from .model_loader import LoadedModel, check_request, load_model
    from .request import CancelToken, Complete, Error, GenerationRequest, Preview, Progress, Result, Step
    from .versions import SDVersion

_HOME = {
    "CancelToken": "request",
    "Cancelled": "errors",
    "Complete": "request",
    "Error": "request",
    "FluxSdError": "errors",
    "GenerationEngine": "generation_engine",
    "GenerationRequest": "request",
    "LoadedModel": "model_loader",
    "Lora": "lora.adapters",
    "Preview": "request",
    "Progress": "request",
    "Result": "request",
    "SDVersion": "versions",
    "Step": "request",
    "check_request": "model_loader",
    "load_model": "model_loader",
}

__all__ = [
    "CancelToken",
    "Cancelled",
    "Complete",
    "Error",
    "FluxSdError",
    "GenerationEngine",
    "GenerationRequest",
    "LoadedModel",
    "Lora",
    "Preview",
    "Progress",
    "Result",
    "SDVersion",
    "Step",
    "__version__",
    "check_request",
    "load_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'flux_sd' has no attribute {name!r}")
    return getattr(import_module(f".{_HOME[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
