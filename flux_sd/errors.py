"""Every failure a user can cause, one class each: what was found, what was expected, what to do.

Floor 0. The command line prints `str(error)` as one sentence (or one list) and exits with `exit_code`:
2 for bad input, 1 for a run that failed, 130 for one that was cancelled.
"""

from __future__ import annotations

from collections.abc import Sequence


class FluxSdError(Exception):
    """Base of all errors that this package raises on purpose."""

    exit_code = 2


class RequestError(FluxSdError):
    """A generation request that cannot be served: a bad size, a field the model cannot use, bad latents."""


class UnknownVersionError(FluxSdError):
    """A model name that no row of the version table answers to."""


class MissingFileError(FluxSdError):
    """A file that a model needs was not found; the message names its role and the accepted names."""


class AmbiguousFileError(FluxSdError):
    """Two files could play one role; the message names both."""


class CheckpointError(FluxSdError):
    """A file that is not the checkpoint it should be: truncated, not safetensors, a header that lies."""


class WeightMapError(FluxSdError):
    """Names or shapes of a checkpoint do not fit the model. `problems` holds every one found."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class AdapterError(FluxSdError):
    """An adapter (LoRA) that cannot be read or does not fit the model. `problems` holds every change that
    does not fit."""

    def __init__(self, message: str, problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class TokenizerError(FluxSdError):
    """A tokenizer file that cannot be read or is of another kind."""


class PromptTooLongError(FluxSdError):
    """A prompt that does not fit an encoder, under `strict_prompt`."""


class DownloadError(FluxSdError):
    """A download that could not start or finish."""

    exit_code = 1


class OfflineError(DownloadError):
    """Files are not in the cache and the network is off or away."""


class GatedRepositoryError(DownloadError):
    """A repository that wants a licence accepted and a token given."""

    exit_code = 2


class DiskSpaceError(DownloadError):
    """The announced size does not fit on the disk; nothing was fetched."""

    exit_code = 2


class NotEnoughMemoryError(FluxSdError):
    """A stage does not fit the memory of the chosen device; nothing was read."""


class DeviceError(FluxSdError):
    """A device or dtype that this machine or this model does not have."""


class OutputError(FluxSdError):
    """A picture or record that cannot be written or read back."""


class NonFiniteError(FluxSdError):
    """NaN or infinity appeared. Names the stage, the step and the dtype; no picture is written."""

    exit_code = 1

    def __init__(self, stage: str, dtype: str, step: int | None = None, detail: str = "") -> None:
        where = stage if step is None else f"{stage}, step {step}"
        advice = "try --dtype float32" if dtype != "float32" else "the weights or the inputs are damaged"
        super().__init__(
            f"{where} produced NaN or infinity in {dtype}{detail}: nothing was written; {advice}"
        )
        self.stage, self.step, self.dtype = stage, step, dtype


class Cancelled(FluxSdError):
    """The run was cancelled by its token or by Ctrl-C."""

    exit_code = 130

    def __init__(self, message: str = "cancelled: nothing was written") -> None:
        super().__init__(message)
