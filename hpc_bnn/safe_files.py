"""Write files completely or not at all, and HDF5 files on a disk that may be full."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

__all__ = ["Disk", "replacing", "write_atomically"]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file under the temporary name that this gives; sync and rename it when the block succeeds. Local."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that fits into memory. Local."""
    with replacing(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


class Disk(io.FileIO):
    """A file for h5py that records the first error of a write and ignores later writes.

    HDF5 does not handle a full disk: it tries to write again whenever a handle is released, and ends the process with a
    segmentation fault (1.14, measured). As a context around that of the HDF5 file it raises the first write error::

        with Disk(path) as disk, h5py.File(disk, "w") as file:
            ...

    Attributes
    ----------
    error : OSError or None
        The first error; call `check` after each long write.
    """

    def __init__(self, path: Path):
        super().__init__(path, "w+b")
        self.error: OSError | None = None
        self._end = 0

    @contextlib.contextmanager
    def _recording(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.error = error

    def write(self, content: Any) -> int:
        content, done = memoryview(content), 0
        self._end = max(self._end, self.tell() + len(content))
        while self.error is None and done < len(content):
            with self._recording():
                done += super().write(content[done:])
        return len(content)

    def readinto(self, buffer: Any) -> int:
        buffer = memoryview(buffer)
        count = super().readinto(buffer) or 0
        buffer[count:] = bytes(len(buffer) - count)  # as if every write had succeeded
        return len(buffer)

    def truncate(self, size: int | None = None) -> int:
        self._end = size = self.tell() if size is None else size
        if self.error is None:
            with self._recording():
                super().truncate(size)
        return size

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if whence == os.SEEK_END:
            offset, whence = self._end + offset, os.SEEK_SET
        return super().seek(offset, whence)

    def close(self) -> None:
        """Bring everything to the disk."""
        if not self.closed and self.error is None:
            with self._recording():
                os.fsync(self.fileno())
        super().close()

    def check(self) -> None:
        """Raise the first error, if there was one."""
        if self.error is not None:
            raise self.error

    def __exit__(self, *error: object) -> None:
        self.close()
        self.check()
