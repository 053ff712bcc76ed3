"""Writes large events to TensorBoard's files with a checksum of vectorized operations."""

from __future__ import annotations

import struct
from functools import cache, partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["crc32c", "fast_checksums", "usual_checksums"]

_POLYNOMIAL = 0x82F63B78  # Castagnoli, bits reversed
_ROW = 64  # bytes
_LARGE = 1024  # bytes; TensorBoard's own checksum is as fast for less


def crc32c(data: bytes) -> int:
    """Computes the CRC-32C checksum of at least 4 bytes.

    TensorBoard computes it in a loop over the bytes in Python: 17 ms for an event of 1,200 values,
    which is several times slower than this function. The data is split into rows, whose checksums
    are computed side by side and combined in pairs; a checksum that starts with 0 is linear, and
    zeros in front do not change it.

    Args:
        data: The bytes.

    Example:
        >>> hex(crc32c(b"123456789"))
        '0xe3069283'
    """
    import numpy as np  # which tensorboard needs, too

    rows = 1 << max(0, (len(data) - 1) // _ROW).bit_length()
    padded = bytearray(rows * _ROW)
    padded[-len(data) :] = data
    # A start value of all ones is the same as inverted first 32 bits.
    first = len(padded) - len(data)
    padded[first : first + 4] = bytes(byte ^ 0xFF for byte in data[:4])
    values = np.frombuffer(padded, dtype="<u2").reshape(rows, _ROW // 2)
    columns = np.ascontiguousarray(values.T)
    states, table = np.zeros(rows, dtype=np.uint32), _two_byte_table()
    for column in columns:
        states = table[(states ^ column) & 0xFFFF] ^ (states >> 16)
    level = 0
    while len(states) > 1:
        states = _shifted(states[0::2], _shift_tables(level)) ^ states[1::2]
        level += 1
    return int(states[0]) ^ 0xFFFFFFFF


@cache
def _two_byte_table() -> NDArray[Any]:
    """Returns the state after 16 bits, for each value of these bits."""
    import numpy as np

    states = np.arange(1 << 16, dtype=np.uint32)
    for _ in range(16):
        states = (states >> 1) ^ (states & 1) * np.uint32(_POLYNOMIAL)
    return states


@cache
def _shift_tables(level: int) -> NDArray[Any]:
    """Returns the state after 2^level rows of zeros, for each value of each of its 4 bytes."""
    import numpy as np

    if level:
        before = _shift_tables(level - 1)
        return _shifted(before, before)
    states = np.arange(256, dtype=np.uint32) << np.arange(0, 32, 8, dtype=np.uint32)[:, None]
    table = _two_byte_table()
    for _ in range(_ROW // 2):
        states = table[states & 0xFFFF] ^ (states >> 16)
    return states


def _shifted(states: NDArray[Any], tables: NDArray[Any]) -> NDArray[Any]:
    low: NDArray[Any] = tables[0][states & 0xFF] ^ tables[1][(states >> 8) & 0xFF]
    high: NDArray[Any] = tables[2][(states >> 16) & 0xFF] ^ tables[3][states >> 24]
    both: NDArray[Any] = low ^ high
    return both


def _write(records: Any, data: bytes) -> None:
    """Writes a record as ``RecordWriter.write`` does."""
    if len(data) < _LARGE:
        type(records).write(records, data)
        return
    # Of 8 bytes, for which the loop is faster.
    from tensorboard.summary.writer.record_writer import masked_crc32c

    header = struct.pack("<Q", len(data))
    parts = (header, struct.pack("<I", masked_crc32c(header)), data, _masked(data))
    records._writer.write(b"".join(parts))  # noqa: SLF001


def _masked(data: bytes) -> bytes:
    """Returns the checksum in the form that TensorBoard's files contain."""
    checksum = crc32c(data)
    rotated = (checksum >> 15) | (checksum << 17 & 0xFFFFFFFF)
    return struct.pack("<I", (rotated + 0xA282EAD8) & 0xFFFFFFFF)


def fast_checksums(event_writer: Any) -> None:
    """Makes an event writer compute the checksums of its large records here; the files are equal.

    Writers of another kind, such as those of tensorboardX, are left unchanged.
    """
    records = _records(event_writer)
    if records is not None and "write" not in vars(records):
        records.write = partial(_write, records)


def usual_checksums(event_writer: Any) -> None:
    """Undoes :func:`fast_checksums`."""
    records = _records(event_writer)
    if records is not None:
        vars(records).pop("write", None)


def _records(event_writer: Any) -> Any:
    """Returns the RecordWriter of TensorBoard that a thread of an event writer uses, or None."""
    records = getattr(getattr(event_writer, "_async_writer", None), "_writer", None)
    is_known = type(records).__name__ == "RecordWriter" and hasattr(records, "_writer")
    return records if is_known else None
