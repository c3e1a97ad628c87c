"""Frames between a worker and its parser processes: four bytes of length, then the payload."""

import struct
from typing import BinaryIO, Final

LENGTH: Final = struct.Struct(">I")


def read_frame(stream: BinaryIO) -> bytes | None:
    """Read the next frame; None at the end of the stream."""
    head = stream.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    return stream.read(length)


def write_frame(stream: BinaryIO, frame: bytes) -> None:
    """Write a frame and flush."""
    stream.write(LENGTH.pack(len(frame)) + frame)
    stream.flush()
