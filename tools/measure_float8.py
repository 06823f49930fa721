"""Compares ways to decode fp8 on a CPU: processor time per weight, one thread, the best of 25 runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flux_sd.float8 import decode_float8
from flux_sd.tensor_info import DTYPES, FLOAT8

COUNT, RUNS = 2**22, 25


def cast(codes: Tensor, dtype: torch.dtype) -> Tensor:
    return codes.view(dtype).to(torch.float32)


def look_up(codes: Tensor, table: Tensor) -> Tensor:
    return table.index_select(0, codes.int())


def nanoseconds(decode: Callable[[Tensor], Tensor], codes: Tensor) -> float:
    best = float("inf")
    for _ in range(RUNS):
        started = time.process_time()
        decode(codes)
        best = min(best, time.process_time() - started)
    return best / codes.numel() * 1e9


def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 127, (COUNT,), dtype=torch.uint8, generator=generator)  # weights hold no NaN
    for word in FLOAT8:
        table = torch.arange(256, dtype=torch.uint8).view(DTYPES[word]).to(torch.float32)
        ways: dict[str, Callable[[Tensor], Tensor]] = {
            "decode_float8": partial(decode_float8, word=word),
            "torch's cast": partial(cast, dtype=DTYPES[word]),
            "a table of 256": partial(look_up, table=table),
        }
        for name, decode in ways.items():
            print(f"{word}  {name:<16} {nanoseconds(decode, codes):.2f} ns")


if __name__ == "__main__":
    main()
