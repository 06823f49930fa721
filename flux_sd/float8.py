"""Weights in 8-bit floats: decoding them without a device that has the type, and the layouts that scale them.

Floor 1. An fp8 checkpoint holds weights alone, or beside each a scale that lets it use all of fp8's narrow
range: W = scale * fp8. Three layouts do: ComfyUI's of 2024 (`X.scale_weight` and one marker `scaled_fp8`),
its later one (`X.weight_scale` and `X.comfy_quant`, or the metadata `_quantization_metadata`), and
`X.weight_scale` alone. `find_scales` connects each weight with its scale and takes tensors that are no
parameters out of sight. Other low-bit layouts are refused by name: read as plain numbers they would make
noise. Candle reads F8_E4M3 without scales. Sources: ComfyUI's QUANTIZATION.md, quant_ops.py and ops.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from .errors import CheckpointError
from .tensor_info import FLOAT8, MAX_NAME, TensorInfo

FORMATS: Mapping[str, str] = {"float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2"}  # ComfyUI's words
MARKER = "scaled_fp8"
SCALES = (".scale_weight", ".weight_scale")
INPUT_SCALES = (".scale_input", ".input_scale")
CONFIG = ".comfy_quant"
CONFIG_TABLE = "_quantization_metadata"
MAX_CONFIG = 2**16  # bytes of one layer's JSON; a layer has 30 to 100
MAX_TABLE = 2**22  # characters of the JSON for all layers
INSTEAD = "give the model in bfloat16, in fp8 or as GGUF"
# Endings of tensor names that give a layout away which is not read. The first that fits names it.
FOREIGN: tuple[tuple[str, str], ...] = (
    (".quant_state.bitsandbytes__nf4", "4-bit weights of bitsandbytes (NF4)"),
    (".quant_state.bitsandbytes__fp4", "4-bit weights of bitsandbytes (FP4)"),
    (".absmax", "4-bit weights of bitsandbytes"),
    (".SCB", "8-bit weights of bitsandbytes (LLM.int8)"),
    (".wscales", "4-bit weights of Nunchaku (SVDQuant)"),
    (".qweight", "integer weights of GPTQ or AWQ"),
    (".weight_packed", "packed weights of compressed-tensors"),
    (".weight_scale_inv", "fp8 weights scaled in blocks"),
    (":qdata", "weights of torchao"),
    (":_data", "weights of torchao"),
    ("_weight_qdata", "weights of torchao"),
    (".weight._data", "weights of Quanto"),
    (".W_q", "weights of HQQ"),
    (".weight_scale_2", "4-bit weights of the format nvfp4"),
    (".sign_mantissa", "compressed weights of DFloat11"),
)


def decode_float8(stored: Tensor, word: str) -> Tensor:
    """Codes of the type `word` ("F8_E4M3" or "F8_E5M2"), as uint8 or torch's type, to float32 of that shape.

    Exact for all 256 codes, by operations that every device has. A weight in E4M3 takes 0.9 ns on one core of
    an AVX-512 Xeon, 3.1 by torch's cast, 0.8 by a table of 256 numbers; in E5M2 0.4, 0.6 and 0.9
    (tools/measure_float8.py). E5M2 is the upper byte of a float16. The 7 bits of E4M3 fit a float16 from bit
    7 on, where an exponent's bias of 15 instead of 7 makes each number too small by 2**8.
    """
    codes = stored.view(torch.uint8)
    if word == "F8_E5M2":
        return codes.to(torch.int16).bitwise_left_shift_(8).view(torch.float16).to(torch.float32)
    bits = codes.view(torch.int8).to(torch.int16)  # the sign bit fills the upper byte
    bits.bitwise_left_shift_(7).bitwise_and_(-0x4001)  # sign, 0 instead of the sign's copy, the 7 bits, zeros
    values = bits.view(torch.float16).to(torch.float32).mul_(256.0)
    nan = codes.bitwise_and(0x7F)
    if codes.numel() and int(nan.max()) == 0x7F:  # E4M3 has no infinity and one NaN of either sign
        values[nan == 0x7F] = math.nan
    return values


# the layouts ----------------------------------------------------------------------------------------------


def find_scales(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[TensorInfo], bytes],
    label: str,
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """(the tensors that are weights, each with its scale's name; what was taken out, with the reason).

    `read` gives the bytes of a small tensor, `label` calls the checkpoint in messages. Raises CheckpointError
    for layouts and formats that are not read, and for scales that do not fit their weight.
    """
    _refuse_foreign(infos, label)
    for layer, word in _declared(infos, metadata, read, label).items():
        weight = infos.get(layer + ".weight")
        if weight is not None and weight.dtype != word:
            found = f"{label}: {weight.name} is {weight.dtype}, its configuration says {word}"
            raise CheckpointError(found + ": the file is damaged")
    scaled: dict[str, str] = {}
    absorbed: dict[str, str] = {}
    for name, info in infos.items():
        layer, kind = _part(name)
        weight = infos.get(layer + ".weight")
        if kind == MARKER:
            absorbed[name] = "says that fp8 weights have scales"
        elif weight is None or not kind:
            continue
        elif kind in SCALES:
            _check_scale(weight, info, scaled.get(weight.name), label)
            scaled[weight.name] = name
            absorbed[name] = f"the scale of {weight.name}"
        else:
            absorbed[name] = f"for products in fp8 only; {weight.name} is decoded"
    weights = {name: info for name, info in infos.items() if name not in absorbed}
    weights |= {name: replace(infos[name], scale=scale) for name, scale in scaled.items()}
    return weights, absorbed


def _part(name: str) -> tuple[str, str]:
    """("X", ".weight_scale") for X.weight_scale, and so on; ("", "") for what belongs to no layout."""
    if name == MARKER or name.endswith("." + MARKER):
        return "", MARKER
    for kind in (*SCALES, *INPUT_SCALES, CONFIG):
        if name.endswith(kind):
            return name[: -len(kind)], kind
    return "", ""


def _refuse_foreign(names: Iterable[str], label: str) -> None:
    for ending, what in FOREIGN:
        for name in names:
            if name.endswith(ending):
                raise CheckpointError(f"{label} holds {what} ({name}), which are not read: {INSTEAD}")


def _check_scale(weight: TensorInfo, scale: TensorInfo, other: str | None, label: str) -> None:
    if other is not None:
        raise CheckpointError(f"{label}: {weight.name} has two scales, {other} and {scale.name}: damaged")
    if weight.dtype not in FLOAT8:
        found = f"{label}: {scale.name} scales {weight.name}, which is {weight.dtype}"
        raise CheckpointError(f"{found}; only fp8 weights are read with scales: {INSTEAD}")
    rows = weight.shape[0] if weight.shape else 1
    per_row = scale.shape in ((rows,), (rows, 1))
    if scale.dtype not in ("F32", "F16", "BF16") or not (scale.numel == 1 or per_row):
        found = f"{label}: {scale.name} is {scale.dtype} {list(scale.shape)}"
        raise CheckpointError(f"{found}; one number or one for each of {rows} rows was expected: {INSTEAD}")


def _declared(
    infos: Mapping[str, TensorInfo],
    metadata: Mapping[str, str],
    read: Callable[[TensorInfo], bytes],
    label: str,
) -> dict[str, str]:
    """layer -> our word for the type that a configuration in the file declares for it."""
    configs: dict[str, object] = {}
    if CONFIG_TABLE in metadata:
        if len(metadata[CONFIG_TABLE]) > MAX_TABLE:
            raise CheckpointError(
                f"{label}: the metadata {CONFIG_TABLE} is larger than {MAX_TABLE} characters"
            )
        table = _json(metadata[CONFIG_TABLE], f"{label}: the metadata {CONFIG_TABLE}").get("layers")
        if not isinstance(table, dict):
            raise CheckpointError(f"{label}: the metadata {CONFIG_TABLE} has no table of layers")
        configs.update(table)
    for name, info in infos.items():
        if name.endswith(CONFIG):
            if info.nbytes > MAX_CONFIG:
                raise CheckpointError(f"{label}: {name} has {info.nbytes} bytes, a few were expected")
            configs[name[: -len(CONFIG)]] = _json(read(info), f"{label}: {name}")
    return {layer: _format(config, layer, label) for layer, config in configs.items()}


def _json(text: str | bytes, what: str) -> dict[str, object]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{what} is no valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} is no JSON table")
    return content


def _format(config: object, layer: str, label: str) -> str:
    found = config.get("format") if isinstance(config, dict) else None
    if not isinstance(found, str) or found not in FORMATS:
        stored = f"{label} stores the layer {layer[:MAX_NAME]!r} in the format {str(found)[:60]!r}"
        raise CheckpointError(f"{stored}, which is not read ({' and '.join(FORMATS)} are): {INSTEAD}")
    return FORMATS[found]
