"""Files that nobody else can make ours, and that are written completely or not at all. Local; without torch.

A name that a file brings is a plain name or an error (`is_plain`). What is written stands under a temporary name that
nobody can know before, is synced, and gets its own name in one step, which is synced, too. Directories that any user of
the machine may write are refused, for data and for runs; staging has a directory of the user's own.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import DataError

__all__ = [
    "NEW", "Disk", "append_line", "check_can_write", "is_leftover", "is_plain", "link_new", "make_own_directory", "names_in", "publish", "read_bytes", "refuse_world_writable", "remove_leftovers",
    "replacing", "sync_directory", "write_atomically",
]  # fmt: skip

_PLAIN = re.compile(r"[\w-][\w.-]*")
NEW = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_WRONLY
"""How a file is opened that must not be there yet, not as a link either."""
_MODE = 0o664
"""Of new files, less the umask: no umask lets every user of the machine write them."""
_UNSYNCED = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EACCES)
"""Errors of file systems that cannot sync a directory, and of a directory that may be written and not read."""
_UNLINKED = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)
"""Errors of file systems without hard links."""


# --- names and directories ----------------------------------------------------------------------------


def is_plain(name: object) -> bool:
    """Whether a name that comes from a file names something in its own directory: letters, digits, ``. _ -``, not hidden."""
    return isinstance(name, str) and len(name) < 256 and _PLAIN.fullmatch(name) is not None


def names_in(directory: str | os.PathLike) -> list[str]:
    """Return the sorted names in a directory; none where it is not there. One that cannot be read raises `OSError`."""
    try:
        return sorted(os.listdir(directory))
    except FileNotFoundError:
        return []


def refuse_world_writable(directory: str | os.PathLike, what: str) -> None:
    """Raise `DataError` if every user of the machine may write to a directory, if it is there; a group may."""
    with contextlib.suppress(FileNotFoundError):
        if os.stat(directory).st_mode & stat.S_IWOTH:
            rule = f"{what} {directory} may be written by every user, who could change what is read there"
            raise DataError(f"{rule}. Take the right away (chmod o-w {directory}), or use another directory")


def make_own_directory(directory: Path) -> None:
    """Make a directory, with those above it, that only this user can enter (mode 0700).

    One that is there must belong to this user, and no other user may be able to replace it: `DataError`.
    """
    directory = Path(os.path.realpath(directory))
    for path in (*reversed(directory.parents), directory):
        with contextlib.suppress(FileExistsError):
            path.mkdir(mode=0o700)
    trusted, me = {0, _nobody()}, os.getuid()
    for path in (directory, *directory.parents):
        found, is_last = os.stat(path), path == directory
        is_open = found.st_mode & stat.S_IWOTH and (is_last or not found.st_mode & stat.S_ISVTX)
        if is_open or found.st_uid not in ({me} if is_last else {me, *trusted}):
            who = "may be written by every user" if is_open else f"belongs to user {found.st_uid}"
            rule = f"{path} {who}, who could replace what is staged in {directory}"
            raise DataError(f"{rule}. Stage to a directory of your own: one under $TMPDIR, or a new name")
    if stat.S_IMODE(os.stat(directory).st_mode) != 0o700:
        directory.chmod(0o700)


def _nobody() -> int:
    """Return the user that a container shows for all users that it does not know, root of the host among them."""
    try:
        return int(Path("/proc/sys/kernel/overflowuid").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 65534


# --- reading and writing ------------------------------------------------------------------------------


def read_bytes(path: str | os.PathLike, what: str) -> bytes | None:
    """Return the content of a file; None where it is not there, `DataError` where it is and cannot be read."""
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(
            f"{what} {path} cannot be read ({error.strerror}), which does not mean that it is damaged: nothing was changed. "
            "Look at the file system and the rights, and try again"
        ) from error


def _new_beside(path: Path) -> Path:
    """Make an empty file beside a path, which is no link and whose name nobody knows before, and return its path."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    os.close(os.open(temporary, NEW, _MODE))
    return temporary


@contextlib.contextmanager
def replacing(path: Path, *, overwrites: bool = True) -> Iterator[Path]:
    """Write a file under the temporary name that this gives (`_new_beside`); `publish` it when the block succeeds."""
    temporary = _new_beside(path)
    try:
        yield temporary
        publish(temporary, path, overwrites=overwrites)
    finally:
        temporary.unlink(missing_ok=True)


def publish(temporary: Path, path: Path, *, overwrites: bool = True) -> None:
    """Sync a complete file and give it its name; `FileExistsError` if that is taken and ``overwrites`` is False."""
    with open(temporary, "rb+") as file:
        os.fsync(file.fileno())
    if overwrites or not link_new(temporary, path):
        if not overwrites and os.path.lexists(path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        os.replace(temporary, path)
    else:
        temporary.unlink()
    sync_directory(path.parent)


def link_new(temporary: Path, path: Path) -> bool:
    """Give a file a second name, `FileExistsError` if that is taken; return False where the file system has no links."""
    try:
        os.link(temporary, path)
    except OSError as error:
        if error.errno in _UNLINKED:
            return False
        if not (error.errno == errno.EEXIST and os.stat(temporary).st_nlink == 2):  # NFS repeats what has succeeded
            raise
    return True


def sync_directory(directory: Path) -> None:
    """Bring the names in a directory to the disk, where the file system can."""
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSYNCED:
            raise


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a file that fits into memory; a pipe or a device such as /dev/null takes the content, and is not replaced."""
    content = content.encode() if isinstance(content, str) else content
    if _is_device(path):
        path.write_bytes(content)
        return
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def _is_device(path: Path) -> bool:
    """Whether a path names a pipe, a terminal or another device; `OSError` for a name in /dev that stands for a file."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            return True
    if os.path.realpath(path.parent) == "/dev":  # such as /dev/stdout: nobody may put a file in its place
        raise OSError(errno.EINVAL, "it is the name of a device, and stands for a file: name that", str(path))
    return False


def check_can_write(path: Path, flag: str) -> None:
    """Raise `DataError` where no file can be written in the place of a path, which a flag names. It is not touched."""
    try:
        if _is_device(path):
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        _new_beside(path).unlink()
    except OSError as error:
        raise DataError(f"{path} cannot be written ({error.strerror}). Name another file with {flag}") from error


def append_line(path: Path, line: str) -> None:
    """Add a line to a file and sync it; what a killed process left of a line is ended before."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, _MODE)
    with open(descriptor, "rb+") as file:
        length = file.seek(0, os.SEEK_END)
        if length and os.pread(descriptor, 1, length - 1) != b"\n":
            line = f"\n{line}"
        file.write(f"{line}\n".encode())
        file.flush()
        os.fsync(descriptor)


def is_leftover(name: str, of: re.Pattern[str]) -> bool:
    """Whether a name is that of a temporary file, of one whose name matches."""
    found = re.fullmatch(r"\.(.+)\.(?:[0-9a-f]{16}|\d{1,10})", name)  # hpc_bnn 0.1: the number of the process
    return found is not None and of.fullmatch(found[1]) is not None


def remove_leftovers(directory: Path, of: re.Pattern[str]) -> None:
    """Remove temporary files that killed processes left of the files whose names match; nobody may write there now."""
    for name in names_in(directory):
        if is_leftover(name, of):
            (directory / name).unlink(missing_ok=True)


class Disk(io.FileIO):
    """A file for h5py that records the first error of a write and ignores later writes.

    HDF5 does not handle a full disk: it tries to write again whenever a handle is released, and ends the process with a
    segmentation fault (1.14, measured). As a context around that of the HDF5 file it raises the first write error; call
    `check` after each long write::

        with Disk(path) as disk, h5py.File(disk, "w") as file:
            ...
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
