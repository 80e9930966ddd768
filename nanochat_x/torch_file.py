"""Read what `torch.save` wrote without running anything of it and without believing a damaged file.

`torch.load(weights_only=True)` runs no code, but it loads a file with a flipped bit silently: nothing in torch looks
at the CRC-32s of the zip archive that such a file is. Here each is checked first.
"""

from __future__ import annotations

import hashlib
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

import torch

from nanochat_x.errors import CheckpointError
from nanochat_x.quoting import quoted
from nanochat_x.regular_file import open_regular

_BLOCK = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s5H3L2H")  # of a zip member, in front of its data
_DESCRIPTOR = struct.Struct("<4sL")  # behind the data where flag bit 3 is set: signature, CRC-32 (then the sizes)
_HAS_DESCRIPTOR = 0x08


def read_torch_file(path: Path, error_type: type[CheckpointError] = CheckpointError) -> object:
    """The object that `torch.save` put into `path`; its tensors stay memory-mapped, on the CPU.

    Raises `error_type` if the file cannot be read, is not torch's zip format, was cut short or changed (CRC-32 of
    every member), or holds anything but tensors and plain containers. Nothing in the file is ever run.
    """
    _check_archive(path, error_type)
    try:
        return torch.load(path, weights_only=True, mmap=True, map_location="cpu")
    # Not broad by neglect: a hostile pickle makes torch's unpickler raise what it likes, and all of it means the same.
    except Exception as error:
        reason = str(error)
        # torch's message goes on to advise weights_only=False: the one thing not to do.
        unsafe = "Unsupported" in reason or "Weights only load failed" in reason
        raise error_type(
            f"{path}: holds something other than tensors, or not as torch.save writes them"
            if unsafe
            else f"{path}: torch cannot read it ({quoted(reason)})",
            remedy="it is not a file of nanochat's: nothing of it was run; get a fresh copy from where you trust it",
        ) from error


def sha256_of(path: Path) -> str:
    """Lower-case hex SHA-256 of a file, read in blocks."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check_archive(path: Path, error_type: type[CheckpointError]) -> None:
    """Reads every member once; raises `error_type` unless the archive is whole."""
    fresh = "copy it again from where it was made"
    try:
        with open_regular(path) as file:
            if file.read(2) != b"PK":
                raise error_type(f"{path}: not a file of torch.save (no zip archive)", remedy=fresh)
            with zipfile.ZipFile(file) as archive:
                members = archive.infolist()
                if len({member.filename for member in members}) != len(members):
                    raise error_type(f"{path}: damaged (a member is there twice)", remedy=fresh)
                for member in members:
                    _check_member(archive, file, member)
    except FileNotFoundError as error:
        raise error_type(f"{path}: no such file") from error
    except OSError as error:
        raise error_type(f"{path}: cannot be read ({error.strerror or error})") from error
    # zipfile raises any of these for bytes that are no archive, by where the damage is.
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error) as error:
        raise error_type(f"{path}: cut short or damaged ({quoted(error)})", remedy=fresh) from error


def _check_member(archive: zipfile.ZipFile, file: BinaryIO, member: zipfile.ZipInfo) -> None:
    """CRC-32 of the data, and that the two places that describe a member agree. Raises BadZipFile."""
    if member.compress_type != zipfile.ZIP_STORED:  # torch compresses nothing, and maps what it reads
        raise zipfile.BadZipFile(f"{member.filename} is compressed")
    with archive.open(member) as data:  # checks the header's signature and name
        while data.read(_BLOCK):  # raises at the end if the CRC-32 differs
            pass
    file.seek(member.header_offset)
    header = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    _, _, flags, method, _, _, crc, _, _, name_length, extra_length = header
    if flags & _HAS_DESCRIPTOR:
        file.seek(name_length + extra_length + member.file_size, 1)
        signature, crc = _DESCRIPTOR.unpack(file.read(_DESCRIPTOR.size))
        if signature != b"PK\x07\x08":
            raise zipfile.BadZipFile(f"no descriptor behind {member.filename}")
    if (flags, method, crc) != (member.flag_bits, member.compress_type, member.CRC):
        raise zipfile.BadZipFile(f"the two descriptions of {member.filename} differ")
