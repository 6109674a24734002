"""Check the files of a shard directory against its manifest."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import DataError
from .manifest import MANIFEST, STAGED, Manifest, sha256_of_file


def verify_shards(directory: str | os.PathLike, progress: Callable[[Iterable], Iterable] = iter) -> list[str]:
    """Compare every file of a shard directory with its manifest. Local.

    Returns
    -------
    list of str
        One sentence per problem: missing, truncated, changed and unknown files, swapped files, or a manifest that
        cannot be used. Empty if there is no problem.
    """
    directory = Path(directory)
    try:
        manifest = Manifest.read(directory)
    except DataError as error:
        return [str(error)]
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
    known = {MANIFEST, STAGED, *(shard.file for shard in manifest.shards)}
    foreign = sorted(path.name for path in directory.iterdir() if path.name not in known)
    return problems + [f"{directory / name} is foreign: the manifest does not name it. Remove it" for name in foreign]
