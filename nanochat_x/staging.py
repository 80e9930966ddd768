"""Folders that appear whole or not at all."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from nanochat_x.errors import BundleError


@contextmanager
def only_writer(target: Path) -> Iterator[None]:
    """While the block runs, no other process gets into a block for the same `target`.

    The lock is the operating system's, on a hidden file beside `target`: it ends with the process, however that ends.
    The file goes at the end of the block, and so do parents that were made for it and hold nothing else. Unfinished
    folders that a killed process left for the same `target` go at the beginning. Raises BundleError at once if another
    process is in its block, OSError from the file system.
    """
    made_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    target.parent.mkdir(parents=True, exist_ok=True)
    path = target.parent / f".{target.name}.lock"
    try:
        with FileLock(path, timeout=0):
            try:
                _remove_leftovers(target)
                yield
            finally:
                # While it is still held: who waits for it opens the file anew. Windows keeps a file that is open.
                with suppress(OSError):
                    path.unlink()
    except Timeout:
        raise BundleError(
            f"{target} is being written by another process", remedy="wait for that, or choose another --output"
        ) from None
    finally:
        for parent in made_parents:
            with suppress(OSError):  # what was written for is in it
                parent.rmdir()


def _remove_leftovers(target: Path) -> None:
    """Removes what a `staged_folder` of this target left when its process was killed; the target's lock is held."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.unfinished")
    for path in list(target.parent.iterdir()):
        if name.fullmatch(path.name) and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def staged_folder(target: Path, replace: Callable[[Path], bool] | None = None) -> Iterator[Path]:
    """Gives a new folder beside `target` to write into, and renames it to `target` at the end of the block.

    Whatever leaves the block as an exception, Ctrl-C included, takes the folder with it, and the parents that were made
    for it. If `target` is there, before the block or after it, it is replaced where `replace(target)` says that it may
    be, else FileExistsError is raised. Raises OSError from the file system.
    """
    _refuse_existing(target, replace)
    made_parents = [parent for parent in target.parents if not parent.exists()]  # innermost first
    # Beside the target: a rename between file systems would be a copy, which can end half-way.
    staging = target.parent / f".{target.name}.{secrets.token_hex(4)}.unfinished"
    try:
        staging.mkdir(parents=True)
        yield staging
        if _refuse_existing(target, replace):
            _exchange(staging, target)
            shutil.rmtree(staging)  # what was there before
        else:
            staging.rename(target)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        for parent in made_parents:
            with suppress(OSError):  # someone else's file is in it by now
                parent.rmdir()
        raise


def _refuse_existing(target: Path, replace: Callable[[Path], bool] | None) -> bool:
    """True if `target` is there and may be replaced; FileExistsError if it may not."""
    if not target.exists() and not target.is_symlink():
        return False
    if replace is None or target.is_symlink() or not replace(target):
        raise FileExistsError(f"{target} exists already")
    return True


def _exchange(new: Path, old: Path) -> None:
    """Swaps two folders. On Linux in one step, so that a kill at any moment leaves the old one or the new one."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        at_cwd, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
        if libc.renameat2(at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), exchange) == 0:
            return
        # A file system without it (EINVAL): the two renames below.
    aside = new.with_name(new.name + ".old")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)
