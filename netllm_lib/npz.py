"""Arrays in an `.npz` file that can be memory-mapped: written uncompressed and aligned, read with every size checked first.

`np.load` reads these files too, but maps nothing, and takes the memory that a file asks for before it looks what is there.
"""

from __future__ import annotations

import io
import math
import struct
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import IO

import numpy as np

from netllm_lib.runs import blocks

ABOUT = "about.json"
"""Member with a text on the arrays; for `np.load` it is bytes."""

ALIGN = 64  # bytes; what NumPy aligns the data after a header to
MAX_PACKING = 100
"""Experience pools are packed to an eighth of their size or so; a file that unpacks to more than this many times its own size
is not read, unless that is little."""
LITTLE_BYTES = 2**26

_LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a zip member: signature, …, lengths of name and extra field
_EXTRA = struct.Struct("<HH")  # kind and length of an extra field
_PADDING = 0xD935  # a kind that readers skip; zipalign uses it for the same purpose
_ZIP64_BYTES = 20  # of the extra field that zipfile adds for sizes beyond 4 GB


def write(path: Path, arrays: Mapping[str, np.ndarray], about: str) -> None:
    """Write `arrays` by name and the text `about` to `path`; no more than a block of an array is in memory."""
    with open(path, "wb") as stream, zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, array in arrays.items():
            header = io.BytesIO()
            layout = {"descr": np.lib.format.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
            np.lib.format.write_array_header_1_0(header, layout)
            member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980: the same arrays give the same file
            before = stream.tell() + _LOCAL_HEADER.size + len(member.filename) + _EXTRA.size + _ZIP64_BYTES
            padding = -before % ALIGN
            member.extra = _EXTRA.pack(_PADDING, padding) + bytes(padding)
            with archive.open(member, "w", force_zip64=True) as target:
                target.write(header.getvalue())
                for _, part in blocks(array):
                    target.write(np.ascontiguousarray(part).data)
        archive.writestr(zipfile.ZipInfo(ABOUT), about)


def read(path: Path, names: Iterable[str], mapped: bool | None = None) -> tuple[dict[str, np.ndarray], str | None]:
    """The arrays of an .npz file by name, and its text `about` if it has one.

    `mapped` leaves the data on disk, in read-only memory maps; None decides by their size; packed files are always unpacked
    into memory. Checksums are compared in either case. Raises ValueError, KeyError, OSError or zipfile.BadZipFile for
    anything that is not such a file, before it has taken more memory than `MAX_PACKING` allows.
    """
    arrays = {}
    with open(path, "rb") as stream, zipfile.ZipFile(stream) as archive:
        size = path.stat().st_size
        members = {name: archive.getinfo(f"{name}.npy") for name in names}
        unpacked = sum(member.file_size for member in members.values())
        if unpacked > max(MAX_PACKING * size, LITTLE_BYTES):
            raise ValueError(f"{unpacked} bytes packed into {size}, more than any pool")
        if mapped is None:
            mapped = unpacked > LITTLE_BYTES // 2
        for name, member in members.items():
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise ValueError(f"{name} is packed in an unknown way")  # others take the memory that the file asks for
            with archive.open(member) as data:
                shape, fortran, dtype = _read_header(name, data)
                header_bytes = data.tell()
                if dtype.hasobject or dtype.itemsize * math.prod(shape) != member.file_size - header_bytes:
                    there = member.file_size - header_bytes
                    raise ValueError(f"{name}: shape {shape} and type {dtype} do not fit its {there} bytes")
                order = "F" if fortran else "C"
                if mapped and member.compress_type == zipfile.ZIP_STORED and member.file_size > header_bytes:
                    offset = _offset(stream, member, size)
                    memory = np.memmap(path, dtype, "r", offset + header_bytes, shape, order)  # type: ignore[call-overload]
                    arrays[name] = np.asarray(memory)
                    _check_sum(name, np.memmap(path, np.uint8, "r", offset, member.file_size), member.CRC)
                else:
                    arrays[name] = _read_whole(name, data, dtype, shape, order)
        about = None
        if ABOUT in archive.namelist() and archive.getinfo(ABOUT).file_size < LITTLE_BYTES:
            about = archive.read(ABOUT).decode()
    return arrays, about


def _read_header(name: str, data: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    version = np.lib.format.read_magic(data)
    if version != (1, 0):
        raise ValueError(f"{name} has a header of version {version}")
    return np.lib.format.read_array_header_1_0(data, max_header_size=1000)


def _offset(stream: IO[bytes], member: zipfile.ZipInfo, size: int) -> int:
    """Where in the file the bytes of a stored member begin."""
    stream.seek(member.header_offset)
    signature, name_bytes, extra_bytes = _LOCAL_HEADER.unpack(stream.read(_LOCAL_HEADER.size))
    offset = stream.tell() + name_bytes + extra_bytes
    whole = member.compress_size == member.file_size and offset + member.file_size <= size
    if signature != b"PK\x03\x04" or not whole:
        raise ValueError(f"{member.filename} is said to have {member.file_size} bytes that are not there")
    return offset


def _check_sum(name: str, content: np.ndarray, expected: int) -> None:
    found = 0
    for _, part in blocks(content):
        found = zlib.crc32(part.data, found)
    if found != expected:
        raise ValueError(f"{name}: its checksum is wrong, the file was damaged")


def _read_whole(name: str, data: IO[bytes], dtype: np.dtype, shape: tuple[int, ...], order: str) -> np.ndarray:
    values = np.empty(math.prod(shape), dtype)
    target = values.view(np.uint8)
    filled = 0
    while filled < len(target):
        part = data.read(min(2**20, len(target) - filled))
        if not part:
            raise ValueError(f"{name} ends after {filled} of {len(target)} bytes")
        target[filled : filled + len(part)] = np.frombuffer(part, np.uint8)
        filled += len(part)
    if data.read(1):  # also makes zipfile compare the checksum
        raise ValueError(f"{name} goes on after its {filled} bytes")
    return values.reshape(shape, order=order)  # type: ignore[call-overload]
