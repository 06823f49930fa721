"""A safetensors file that is written tensor by tensor, before it is known what it will hold. Floor 2.

The format wants the table of all tensors first. Room is left for it, the values stream in behind, and the
table is filled in at the end, padded with spaces (which the format allows); a table that has outgrown its
room moves the values back, piece by piece. At no time is more than one tensor in memory. Source: the
safetensors README (format section).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import BinaryIO

import torch
from torch import Tensor

from .checkpoint_writer import SAFETENSORS_ALIGNMENT, Entry, padding, safetensors_header
from .errors import OutputError
from .safetensors_header import MAX_HEADER
from .tensor_info import DTYPES

PIECE = 16 * 2**20  # bytes moved at a time
# In the metadata: the tensors lie in the order in which they were computed, whatever their names.
ORDER_KEY, ORDER_OF_RUN = "order", "as computed"
ROOM = 65_536  # bytes left for the header, where nothing better is known
WORDS = {dtype: word for word, dtype in DTYPES.items()}


class RecordWriter:
    """Fills `file`, opened for writing and reading: `add` tensors, then `finish`."""

    def __init__(self, file: BinaryIO, room: int = ROOM) -> None:
        self._file, self._room = file, room + padding(room, SAFETENSORS_ALIGNMENT)
        self._entries: dict[str, Entry] = {}
        self._end = 0  # bytes of values so far
        file.seek(self._room)

    @property
    def count(self) -> int:
        """Tensors so far."""
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of values so far."""
        return self._end

    def add(self, name: str, tensor: Tensor) -> None:
        """Writes one tensor of any device and layout, now. Raises ValueError for a name that was used.

        Every tensor begins at a multiple of 8 bytes, as readers that map the file like it. One whose bytes
        are no such multiple (a single float32) is widened to 64 bits, which changes no value.
        """
        if name in self._entries:
            raise ValueError(f"the record has a tensor {name!r} already")
        data = tensor.detach().to("cpu").contiguous()
        if padding(data.nbytes, SAFETENSORS_ALIGNMENT):
            data = data.to(torch.float64 if data.is_floating_point() else torch.int64)
        if data.numel():  # torch gives no view of nothing, nor of one element whose stride is not 1
            self._file.write(data.as_strided((data.numel(),), (1,)).view(torch.uint8).numpy().data)
        self._entries[name] = Entry(name, tuple(data.shape), WORDS[data.dtype])
        self._end += data.nbytes

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Writes the header, `metadata` in it. Raises OutputError where no reader takes one so long."""
        metadata = {ORDER_KEY: ORDER_OF_RUN, **metadata}
        header = safetensors_header(list(self._entries.values()), metadata)
        if len(header) > MAX_HEADER:
            found = f"a record of {self.count} tensors needs a header of {len(header)} bytes"
            raise OutputError(f"{found}, over the limit of {MAX_HEADER}: choose fewer stages")
        if len(header) > self._room:
            self._move(len(header) - self._room)
        text = header[8:].ljust(self._room - 8)
        self._file.seek(0)
        self._file.write(struct.pack("<Q", len(text)) + text)

    def _move(self, distance: int) -> None:
        """Moves all values towards the end of the file, the last ones first."""
        for end in range(self._end, 0, -PIECE):
            begin = max(0, end - PIECE)
            self._file.seek(self._room + begin)
            piece = self._file.read(end - begin)
            self._file.seek(self._room + distance + begin)
            self._file.write(piece)
        self._room += distance
