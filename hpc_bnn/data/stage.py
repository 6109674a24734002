"""Copying a shard directory to the local storage of every node, once per node, and checking one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from ..comm import GridComm
from ..errors import ConfigError, DataError, Fault
from ..safe_files import make_own_directory, names_in, read_bytes, remove_leftovers, replacing, write_atomically
from ..safe_files.locks import LOCK, Lock
from .manifest import MANIFEST, OURS, PREPARATION, SHARD, STAGED, Manifest, ShardFile, sha256_of_file

BLOCK_BYTES = 8 * 2**20
"""Bytes that are copied at once."""


@dataclass(frozen=True)
class Staged:
    """What `stage_shards` did on this rank's node."""

    num_copied: int
    num_kept: int
    """Files that were already present and sound."""
    num_bytes_read: int
    """Bytes read from the source by the ranks of the node."""


def stage_shards(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    comm: GridComm,
    *,
    verify: bool = True,
    progress: Callable[[Iterable], Iterable] = iter,
) -> Staged:
    """Copy a shard directory to local storage, once per node. Collective over the world.

    The ranks of a node divide the files among themselves. An interrupted copy continues where it stopped; the
    manifest is copied last, so a directory with a manifest is complete. Staged files are marked, and nothing else is
    replaced. The directory is this user's alone (`make_own_directory`), and locked. `DataError` where the source is not sound or there is too little space; on all ranks, with the node that
    saw it.

    Parameters
    ----------
    source, destination : path
        Shard directory that all ranks see, and directory on storage of the node; created if it is missing.
    comm, progress : GridComm, callable
        The ranks of the job (`hpc_bnn.comm.connect_for_files`); what wraps this rank's files, for a progress bar.
    verify : bool
        Compare the SHA-256 of every file, copied or kept, with the manifest; otherwise only sizes.
    """
    source, destination = Path(source), Path(destination)
    with comm.agree(f"reading {source}"):
        here, there = source.resolve(), destination.resolve()
        if here == there or here in there.parents or there in here.parents:
            rule = "it is SRC itself, in it, or around it"
            raise ConfigError(Fault("DST", destination, rule, "Name a directory on the node"))
        is_first = comm.grid.is_first("world")
        found = (Manifest.read(source), (source / MANIFEST).read_text()) if is_first else None
    manifest, text = comm.broadcast_object(found)
    # One number for all ranks of the node, wherever they are placed: they divide one list
    files = in_turn(manifest.shards, min(comm.gather_objects(comm.grid.rank, "node")), comm.grid.world_size)
    files = files[comm.local_rank :: comm.local_size]
    with contextlib.ExitStack() as held:
        with comm.agree(f"opening {destination}"):
            if comm.local_rank == 0:
                make_own_directory(destination)
                held.enter_context(Lock(destination, "DST"))
                remove_leftovers(destination, OURS)
                if read_bytes(destination / MANIFEST, "the manifest") != text.encode():
                    names = [shard.file for shard in manifest.shards]
                    _remove_staged(destination, but=names)
                    mark = {"directory": _identity(destination), "files": names}
                    write_atomically(destination / STAGED, json.dumps(mark))
        missing = sum(shard.num_bytes for shard in files if not _has_size(destination / shard.file, shard))
        missing = sum(comm.gather_objects(missing, "node"))
        with comm.agree(f"staging to {destination}"):
            free = shutil.disk_usage(destination).free
            if missing > free:
                raise DataError(
                    f"{missing / 1e9:.2f} GB are to be copied and {free / 1e9:.2f} GB are free on "
                    f"{socket.gethostname()}. Stage to a larger file system, or train with <data.shards> {source}"
                )
            copied = [shard for shard in progress(files) if _bring(shard, source, destination, verify)]
        with comm.agree(f"writing {destination / MANIFEST}"):
            if comm.local_rank == 0:
                write_atomically(destination / MANIFEST, text)
    mine = (len(copied), len(files) - len(copied), sum(shard.num_bytes for shard in copied))
    return Staged(*map(sum, zip(*comm.gather_objects(mine, "node"))))


def in_turn(shards: list[ShardFile], first_rank: int, world_size: int) -> list[ShardFile]:
    """Return the files in the order in which a node copies them: large ones first, and each node begins at another place. Local.

    So the ranks of a node, to which they are dealt round, have about the same to do, and the nodes do not all read the same
    file of a parallel file system, from the same server, at the same time. ``first_rank`` is that of the node.
    """
    files = sorted(shards, key=lambda shard: -shard.num_bytes)
    start = first_rank * len(files) // world_size
    return files[start:] + files[:start]


def unstage_shards(destination: str | os.PathLike, comm: GridComm) -> list[str]:
    """Remove a staged shard directory from every node, and return the names of other files, which stay on this node.

    Collective over the world. It raises `ConfigError` where the directory holds shards that were not staged.
    """
    destination = Path(destination)
    with comm.agree(f"removing {destination}"):
        if comm.local_rank == 0 and destination.exists():
            make_own_directory(destination)
            with Lock(destination, "DST"):
                remove_leftovers(destination, OURS)
                _remove_staged(destination)
                (destination / STAGED).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                destination.rmdir()
    with comm.agree(f"looking at {destination}"):  # after the first rank of the node
        return sorted(path.name for path in destination.iterdir()) if destination.exists() else []


def _remove_staged(destination: Path, but: Iterable[str] = ()) -> None:
    """Remove the shards of a staged directory, whose mark says that it is this one; refuse any other with shards."""
    text = read_bytes(destination / STAGED, "the mark")
    mark = None
    with contextlib.suppress(ValueError, KeyError, TypeError):
        content = json.loads(text or b"")
        if content["directory"] == _identity(destination) and all(map(SHARD.fullmatch, content["files"])):
            mark = content["files"]
    if mark is None:
        names = names_in(destination)
        if any(name == MANIFEST or name.endswith(".h5") for name in names):
            rule = "it holds shards that hpc-bnn stage has not put there"
            raise ConfigError(Fault("DST", destination, rule, "Name another directory, or remove them yourself"))
        return
    for file in (MANIFEST, *(file for file in mark if file not in but)):
        (destination / file).unlink(missing_ok=True)


def _identity(directory: Path) -> list:
    """Return what tells a directory from its copies, and from one that was moved."""
    return [os.path.realpath(directory), os.stat(directory).st_ino]


def _has_size(path: Path, shard: ShardFile) -> bool:
    try:
        return path.stat().st_size == shard.num_bytes
    except OSError:
        return False


def _bring(shard: ShardFile, source: Path, destination: Path, verify: bool) -> bool:
    """Make sure that a file is at the destination; return whether it was copied."""
    target = destination / shard.file
    if _has_size(target, shard) and (not verify or sha256_of_file(target) == shard.sha256):
        return False
    digest = hashlib.sha256()
    with replacing(target) as temporary:
        try:
            with open(source / shard.file, "rb") as file, open(temporary, "wb") as copy:
                while block := file.read(BLOCK_BYTES):
                    digest.update(block)
                    copy.write(block)
        except FileNotFoundError as error:
            raise DataError(f"{error.filename} is missing. Prepare the shards again") from error
        if not _has_size(temporary, shard) or (verify and digest.hexdigest() != shard.sha256):
            rule = f"{source / shard.file} is not the file that the manifest describes"
            raise DataError(f"{rule}. See hpc-bnn verify {source}")
    return True


def verify_shards(directory: str | os.PathLike, progress: Callable[[Iterable], Iterable] = iter) -> list[str]:
    """Compare every file of a shard directory with its manifest; return one sentence for each problem. Local."""
    directory = Path(directory)
    try:
        manifest = Manifest.read(directory)
    except DataError as error:
        return [str(error)]
    if (directory / "config.yaml").exists():
        return [f"{directory} is the directory of a run. Name the shards that it was trained on, or its predictions"]
    owners = {shard.sha256: shard.file for shard in manifest.shards}
    problems = []
    for shard in progress(manifest.shards):
        path = directory / shard.file
        try:
            num_bytes, found = path.stat().st_size, sha256_of_file(path)
        except OSError as error:
            problems.append(f"{path} is missing or cannot be read ({error.strerror})")
            continue
        if found == shard.sha256:
            continue
        if found in owners:
            problems.append(f"{path} holds what belongs to {owners[found]}")
        elif num_bytes != shard.num_bytes:
            what = "truncated" if num_bytes < shard.num_bytes else "too long"
            problems.append(f"{path} is {what}: {num_bytes} bytes, the manifest says {shard.num_bytes}")
        else:
            problems.append(f"{path} was changed: its SHA-256 is not that of the manifest")
    known = {MANIFEST, STAGED, LOCK, PREPARATION, *(shard.file for shard in manifest.shards)}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return problems + [f"{directory / name} is foreign: the manifest does not name it. Remove it" for name in foreign]
