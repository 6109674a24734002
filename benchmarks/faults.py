#!/usr/bin/env python3
"""Campaigns of faults: nothing may be lost, and no wrong number may be used in silence.

    python benchmarks/faults.py CAMPAIGN --output OUT [--every N] [--trials N] [--seed N]

A campaign counts its trials and how they ended, and writes OUT/CAMPAIGN.json. A trial is good if the final parameters and
predictions have the bits of a run that was left alone, or if the command ends with a code other than 0 and names the file.

* ``operations``: the process is killed at every file operation of start, training, resume, prediction and staging (every
  N-th with ``--every N``), and the same command is given again.
* ``errors``: EIO, ENOSPC, EACCES and ESTALE at every file operation of a resume.
* ``flips``: one bit is flipped in a checkpoint, note, manifest or shard, ``--trials`` of each; then the run is resumed, evaluated
  and predicted from. With ``--without-checks`` hpc_bnn does not compare its checksums: this shows what they are for.
* ``fuzz``: malformed manifests, configs and shards whose checksums fit, ``--trials`` of each. None may crash, hang, or read
  what is outside of its directory.
* ``ranks``: a random rank of a job is killed at a random time, with each library of ``--backends``, ``--trials`` of each.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import h5py
import numpy as np
import psutil
import torch
import yaml
from file_faults import (
    ERRORS,
    KILLED,
    Faults,
    failing,
    in_child,
    is_same,
    kill,
    predict,
    result,
    train,
    words,
    write_data,
)

import hpc_bnn.data.files
import hpc_bnn.data.manifest
import hpc_bnn.run.checkpoint
from hpc_bnn.cli.commands import main as hpc_bnn_main
from hpc_bnn.comm import connect_for_files
from hpc_bnn.data import ShardDataset, stage_shards, unstage_shards, verify_shards
from hpc_bnn.data.manifest import sha256_of_json
from hpc_bnn.errors import HpcBnnError

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from prepared import start as start_prepared

Counts = collections.Counter


def in_time(options: argparse.Namespace, numbers: range) -> Iterator[int]:
    """Yield numbers for as long as the time of one kind of trials is not used up."""
    end = time.monotonic() + options.max_seconds
    for number in numbers:
        if time.monotonic() > end:
            print(f"the time is over at {number} of {numbers}", file=sys.stderr)
            return
        yield number


def count_operations(directory: Path, work: Callable[[], object]) -> int:
    """Return how many file operations below a directory some work has."""
    faults = Faults(directory)
    with faults.watching():
        work()
    return len(faults.seen)


def killed_at(directory: Path, number: int, work: Callable[[], int]) -> tuple[int, str]:
    """Do some work in a process that is killed at a file operation."""

    def run() -> int:
        with Faults(directory, number, kill).watching():
            return work()

    return in_child(run)


# --- every file operation -------------------------------------------------------------------------------


def campaign_of_operations(options: argparse.Namespace, place: Path) -> Counts:
    """Kill at every file operation, and go on."""
    counts: Counts = Counts()
    expected = result(place / "whole", place / "whole.h5")

    def trial(kind: str, number: int, work: Callable[[], int], again: Callable[[], bool]) -> None:
        code, said = killed_at(place, number, work)
        if code != KILLED:
            counts[f"{kind}: not reached"] += 1
            return
        good, said = in_child(lambda: 0 if again() else 3)
        counts[f"{kind}: {'same bits' if good == 0 else 'WRONG'}"] += 1
        if good:
            print(f"{kind} {number}: {good}\n{said}", file=sys.stderr)

    def same(run_dir: Path, output: Path | None = None) -> bool:
        found = result(run_dir, output)
        return is_same(found, {name: expected[name] for name in found})

    begun = place / "begun"
    train(place / "data", begun, "--max_steps", "4")
    total = {"start": count_operations(place, lambda: train(place / "data", place / "count", "--resume", "true"))}
    shutil.copytree(begun, place / "count2")
    total["resume"] = count_operations(place, lambda: train(place / "data", place / "count2", "--resume", "true"))
    total["predict"] = count_operations(place, lambda: predict(place / "whole", place / "count.h5"))
    for kind in ("start", "resume"):
        for number in in_time(options, range(1 + options.offset, total[kind] + 1, options.every)):
            run_dir = place / f"{kind}-{number}"
            if kind == "resume":
                shutil.copytree(begun, run_dir)
            command = (place / "data", run_dir, "--resume", "true")
            trial(kind, number, lambda: train(*command), lambda: train(*command) == 0 and same(run_dir))  # noqa: B023
            litter = [path for path in place.glob(f".{run_dir.name}.*")] + list(run_dir.rglob(".step*"))
            counts[f"{kind}: litter"] += bool(litter)
            shutil.rmtree(run_dir, ignore_errors=True)
    for number in in_time(options, range(1 + options.offset, total["predict"] + 1, options.every)):
        output = place / f"{number}.h5"

        def again(output: Path = output) -> bool:
            return (output.exists() or predict(place / "whole", output) == 0) and same(place / "whole", output)

        trial("predict", number, lambda: predict(place / "whole", output), again)  # noqa: B023
    comm = connect_for_files()

    def stage(node: Path) -> int:
        stage_shards(place / "data", node, comm)
        return 0

    total["stage"] = count_operations(place, lambda: stage(place / "node"))
    for number in in_time(options, range(1 + options.offset, total["stage"] + 1, options.every)):
        node = place / f"node-{number}"

        def again(node: Path = node) -> bool:
            return stage(node) == 0 and not verify_shards(node) and not unstage_shards(node, comm) and not node.exists()

        trial("stage", number, lambda: stage(node), again)  # noqa: B023
    return counts + Counts({f"{kind}: file operations": number for kind, number in total.items()})


def campaign_of_errors(options: argparse.Namespace, place: Path) -> Counts:
    """Let every file operation of a resume fail."""
    counts: Counts = Counts()
    begun, expected = place / "begun", result(place / "whole")
    train(place / "data", begun, "--max_steps", "4")
    shutil.copytree(begun, place / "count")
    total = count_operations(place, lambda: train(place / "data", place / "count", "--resume", "true"))
    for number in in_time(options, range(1 + options.offset, total + 1, options.every)):
        for name, error in ERRORS.items():
            run_dir = place / f"run-{number}-{name}"
            shutil.copytree(begun, run_dir)

            def resume(run_dir: Path = run_dir) -> int:
                return train(place / "data", run_dir, "--resume", "true")

            def fail(number: int = number, error: int = error) -> int:
                with Faults(place, number, failing(error)).watching():
                    return resume()

            code, said = in_child(fail)
            kind = "ended in order" if code == 1 else "no harm" if code == 0 else f"CODE {code}"
            if "Traceback" in said or (code and str(place) not in said):
                kind = "NO MESSAGE"
            if code:
                good, said = in_child(lambda: 0 if resume() == 0 and is_same(result(run_dir), expected) else 3)  # noqa: B023
            else:
                good = 0 if is_same(result(run_dir), expected) else 3
            counts[f"{name}: {kind}, {'then the same bits' if good == 0 else 'then WRONG'}"] += 1
            if good or kind.isupper():
                print(f"{name} at {number}: {kind} {good}\n{said}", file=sys.stderr)
            shutil.rmtree(run_dir)
    return counts + Counts({"file operations": total})


# --- flipped bits ---------------------------------------------------------------------------------------


class _Anything(str):
    """A digest that equals every other one."""

    def __eq__(self, other: object) -> bool:
        return True

    def __ne__(self, other: object) -> bool:
        return False

    __hash__ = str.__hash__


class _NoDigest:
    def update(self, content: bytes) -> None:
        pass

    def hexdigest(self) -> str:
        return _Anything("0" * 64)


@contextlib.contextmanager
def without_checks() -> Iterator[None]:
    """Let hpc_bnn accept every checksum of its own; those of HDF5 and zip stay."""
    fake = type("hashlib", (), {"sha256": staticmethod(lambda content=b"": _NoDigest())})
    modules = (hpc_bnn.run.checkpoint, hpc_bnn.data.manifest, hpc_bnn.data.files)
    former = [module.hashlib for module in modules]
    check = hpc_bnn.data.files._check_examples
    for module in modules:
        module.hashlib = fake  # type: ignore[assignment]
    hpc_bnn.data.files._check_examples = lambda *_: None
    try:
        yield
    finally:
        for module, usual in zip(modules, former):
            module.hashlib = usual
        hpc_bnn.data.files._check_examples = check


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file, each with the same probability."""
    content = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


def campaign_of_flips(options: argparse.Namespace, place: Path) -> Counts:
    """Flip a bit, and use what it is in."""
    counts: Counts = Counts()
    rng = random.Random(options.seed)
    begun, data = place / "begun", place / "data"
    train(data, begun, "--max_steps", "4", "--checkpoint.keep_last", "3")
    reading = ("--data.reading", "rank")
    shutil.copytree(begun, place / "other")
    assert train(data, place / "other", "--resume", "true") == 0
    expected = result(place / "whole", place / "whole.h5")
    whole = place / "whole"
    targets = {
        "checkpoint": (begun, lambda d: sorted(d.glob("checkpoints/*.pt"))),
        "note": (begun, lambda d: sorted(d.glob("checkpoints/*.json"))),
        "manifest": (data, lambda d: [d / "manifest.json"]),
        "shard": (data, lambda d: sorted(d.glob("*.h5"))),
        "manifest of the run": (whole, lambda d: [d / "manifest.json"]),
        "checkpoint to predict from": (whole, lambda d: sorted(d.glob("checkpoints/*.pt"))),
        "note to predict from": (whole, lambda d: sorted(d.glob("checkpoints/*.json"))),
    }
    checks = without_checks if options.without_checks else contextlib.nullcontext
    for kind, (source, files) in targets.items():
        for number in in_time(options, range(options.trials)):
            trial = place / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(source, trial)
            path = rng.choice(files(trial))
            flip(path, rng)
            output = place / "trial.h5"
            output.unlink(missing_ok=True)
            run_dir = place / "of-trial"
            shutil.rmtree(run_dir, ignore_errors=True)

            def use(kind: str = kind, trial: Path = trial, number: int = number) -> int:
                with checks():
                    if source == begun:  # noqa: B023
                        return train(data, trial, "--resume", "true")
                    if source == data:  # noqa: B023
                        return train(trial, run_dir, *(reading if number % 2 else ()))  # noqa: B023
                    return predict(trial, output)  # noqa: B023

            code, said = in_child(use)
            if code != 0:
                named = path.name in said or trial.name in said
                how = (
                    "refused, and named" if code in (1, 2) and named and "Traceback" not in said else f"BAD END {code}"
                )
            else:
                where = {begun: trial, data: run_dir, whole: whole}[source]
                with without_checks():  # the result is what counts, also of a run that left a damaged file
                    found = result(where, output if source == whole else None)
                right = is_same(found, {name: expected[name] for name in found})
                damaged = "damaged" in said or "cannot be read" in said
                how = ("same bits, said" if damaged else "same bits, no harm") if right else "WRONG NUMBERS"
            counts[f"{kind}: {how}"] += 1
            if how.startswith(("BAD", "WRONG")) and not options.without_checks:
                print(f"{kind} {number} {path}: {how}\n{said}", file=sys.stderr)
    return counts


# --- malformed files ------------------------------------------------------------------------------------

JUNK = (
    None, True, -1, 0, 2**70, 1.5, float("nan"), float("inf"), "", "x", "../x", "/etc/passwd", "a\0b", "é" * 300, [], [[]], {}, {"a": 1},
    [None], "$(touch PWNED)", "<script>", "!!python/object/apply:os.system [id]", "-1", "1e400", [1] * 1000,
)  # fmt: skip


def spoilt(tree: Any, rng: random.Random) -> Any:
    """Return nested dicts and lists with one place replaced by junk, removed, doubled, or given another name."""
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in list(node) if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
            places.append((node, key))
            walk(node[key])

    tree = json.loads(json.dumps(tree))
    walk(tree)
    node, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0 and isinstance(node, dict):
        node[rng.choice(["", "x", "../x", "y", "é"])] = node.pop(key)
    elif how == 1:
        del node[key]
    elif how == 2 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = rng.choice(JUNK)
    return tree


def fuzzed_shard(path: Path, rng: random.Random, secret: Path) -> None:
    """Make a shard of the same names that is malformed: other datasets, or flipped bytes."""
    if rng.random() < 0.5:
        content = bytearray(path.read_bytes())
        for _ in range(rng.choice([1, 4, 64])):
            content[rng.randrange(min(len(content), rng.choice([96, 4096, len(content)])))] = rng.randrange(256)
        path.write_bytes(content[: rng.choice([len(content), len(content), rng.randrange(len(content))])])
        return
    with h5py.File(path, "a") as file:
        name = rng.choice(["x", "y", "crc32"])
        values = file[name][()]
        del file[name]
        how = rng.randrange(8)
        shape = (*values.shape[:-1], values.shape[-1] * rng.choice([0, 1, 2, 2**40])) if how == 0 else values.shape
        if how == 0:
            file.create_dataset(name, shape, values.dtype, chunks=True)
        elif how == 1:
            file.create_dataset(name, shape, values.dtype, external=[(str(secret), 0, values.nbytes)])
        elif how == 2:
            file[name] = h5py.ExternalLink(str(secret), "/x")
        elif how == 3:
            file[name] = h5py.SoftLink(rng.choice(["/y", "/x", "/", "/nowhere"]))
        elif how == 4:
            layout = h5py.VirtualLayout(shape, values.dtype)
            layout[...] = h5py.VirtualSource(rng.choice([str(secret), ".", "nowhere.h5"]), name, shape)
            file.create_virtual_dataset(name, layout)
        elif how == 5:
            file.create_dataset(name, data=np.array(["text"] * len(values), dtype=object), dtype=h5py.string_dtype())
        elif how == 6:
            file.create_group(name)
        else:
            file.create_dataset(name, shape, rng.choice(["f8", "c8", ">f4", "V8", "i1"]))


def campaign_of_fuzz(options: argparse.Namespace, place: Path) -> Counts:
    """Read malformed files whose checksums fit."""
    counts: Counts = Counts()
    rng = random.Random(options.seed)
    data, secret = place / "data", place / "secret.h5"
    shutil.copy(data / "train-00000.h5", secret)
    truth = {reading: ShardDataset(data, "train", reading=reading).fetch(slice(None)) for reading in ("node", "rank")}
    config = yaml.safe_load((place / "whole/config.yaml").read_text())
    for kind in ("manifest", "shard", "config"):
        for number in in_time(options, range(options.trials)):
            trial = place / "trial"
            shutil.rmtree(trial, ignore_errors=True)
            shutil.copytree(data, trial)
            content = json.loads((trial / "manifest.json").read_text())
            del content["sha256"]
            if kind == "shard":
                path = trial / "train-00000.h5"
                fuzzed_shard(path, rng, secret)
                size, digest = path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
                content["splits"]["train"][0] |= {"num_bytes": size, "sha256": digest}
            elif kind == "manifest":
                content = spoilt(content, rng)
            (trial / "manifest.json").write_text(json.dumps(content | {"sha256": sha256_of_json(content)}))
            path = place / "config.yaml"
            path.write_text(yaml.safe_dump(spoilt(config, rng)) if kind == "config" else "")
            before = {p: p.read_bytes() for p in place.glob("*.h5")}

            def use(kind: str = kind, trial: Path = trial, path: Path = path, number: int = number) -> int:
                if kind == "config":
                    flags = ["--run_dir", str(place / "fuzzed"), "--data.shards", str(data), "--max_steps", "1"]
                    return hpc_bnn_main(["train", "--config", str(path), *flags])
                try:
                    reading = ("node", "rank")[number % 2]
                    got = ShardDataset(trial, "train", reading=reading).fetch(slice(None))
                    verify_shards(trial)
                    stage_shards(trial, place / "fuzzed-node", connect_for_files())
                except HpcBnnError as error:
                    print(error, file=sys.stderr)
                    return 1
                # A manifest that is signed may have other statistics, or fewer of its files
                same_numbers = all(torch.equal(a, b) for a, b in zip(got, truth[reading]))
                return 0 if same_numbers or kind == "manifest" else 3

            code, said = in_child(use, seconds=60)
            message = said.strip().splitlines()[-1] if said.strip() else ""
            if code in (1, 2) and message and "Traceback" not in said:
                how = "refused with a message"
            elif code == 0:
                how = "accepted"
            else:
                how = {3: "WRONG NUMBERS", 124: "HANGS"}.get(code, f"ENDS WITH {code}")
            lost = [p for p, c in before.items() if not p.exists() or p.read_bytes() != c]
            if lost or list(place.glob("PWNED")):
                how = "TOUCHED WHAT IS OUTSIDE"
            counts[f"{kind}: {how}"] += 1
            if how.isupper() or "Traceback" in said:
                print(f"{kind} {number}: {how}\n{said[-2000:]}", file=sys.stderr)
            for name in ("fuzzed", "fuzzed-node"):
                shutil.rmtree(place / name, ignore_errors=True)
    return counts


# --- killed ranks ---------------------------------------------------------------------------------------


def campaign_of_ranks(options: argparse.Namespace, place: Path) -> Counts:
    """Kill a random rank at a random time, resume until the end, and compare; each library by itself."""
    counts: Counts = Counts()
    rng = random.Random(options.seed)
    server, python = start_prepared()  # ranks are its children: the imports would take most of the time
    for backend in options.backends:

        def command(run_dir: Path, backend: str = backend) -> list[str]:
            flags = ["--num_epochs", str(options.num_epochs), "--checkpoint.keep_last", "2", "--resume", "true"]
            job = ["mpirun", "-np", str(options.num_ranks), *python, "-m", "mpi4py", "-m", "hpc_bnn"]
            return [*job, *words(place / "data", run_dir, *flags, "--backend", backend, "--grid.sample_size", "2")]

        whole, begun = place / f"whole-{backend}", time.monotonic()
        subprocess.run(command(whole), check=True, capture_output=True)
        length = time.monotonic() - begun
        expected, seconds, num_kills, num_runs = result(whole), [], 0, 0
        end_of_time = time.monotonic() + options.max_seconds
        while num_kills < options.trials and time.monotonic() < end_of_time:
            run_dir, code, num_runs = place / f"{backend}-{num_runs}", None, num_runs + 1
            while code != 0:
                job = subprocess.Popen(command(run_dir), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
                end = time.monotonic() + rng.uniform(0, length)
                while job.poll() is None and time.monotonic() < end:
                    time.sleep(0.02)
                ranks = psutil.Process(server.pid).children()
                if job.poll() is None and ranks and num_kills < options.trials:
                    killed_at = time.monotonic()
                    os.kill(rng.choice(ranks).pid, signal.SIGKILL)
                    num_kills += 1
                try:
                    error = job.communicate(timeout=300)[1]
                except subprocess.TimeoutExpired:
                    job.kill()
                    counts[f"{backend}: HANGS"] += 1
                    break
                if ranks and job.returncode:
                    while any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks):
                        time.sleep(0.02)
                    seconds.append(time.monotonic() - killed_at)
                counts[f"{backend}: damaged"] += "damaged" in error
                code = job.returncode
            counts[f"{backend}: {'same bits' if is_same(result(run_dir), expected) else 'WRONG'}"] += 1
            shutil.rmtree(run_dir)
        counts[f"{backend}: kills"] = num_kills
        print(f"{backend}: from kill to end {median(seconds):.2f} s (median), {max(seconds):.2f} s (longest)")
    return counts


CAMPAIGNS = {
    "operations": campaign_of_operations,
    "errors": campaign_of_errors,
    "flips": campaign_of_flips,
    "fuzz": campaign_of_fuzz,
    "ranks": campaign_of_ranks,
}


def main() -> None:
    """Run a campaign and print its counts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaign", choices=CAMPAIGNS)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--every", type=int, default=1, help="of operations and errors: every N-th")
    parser.add_argument("--offset", type=int, default=0, help="the first of them")
    parser.add_argument("--trials", type=int, default=100, help="of flips, fuzz and ranks, of each kind")
    parser.add_argument("--without-checks", action="store_true", help="of flips: accept every checksum")
    parser.add_argument("--backends", nargs="+", default=["horovod", "torch", "mpi"])
    parser.add_argument("--num-ranks", type=int, default=2)
    parser.add_argument("--num-epochs", type=int, default=300, help="of ranks: length of the run")
    parser.add_argument(
        "--max-seconds", type=float, default=1e9, help="for each kind of trials; what is done is counted"
    )
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults.") as directory:
        place = Path(directory)
        write_data(place / "data")
        assert train(place / "data", place / "whole") == 0 and predict(place / "whole", place / "whole.h5") == 0
        counts = CAMPAIGNS[options.campaign](options, place)
    seconds = time.monotonic() - begun
    content = {"campaign": options.campaign, "seconds": seconds, "counts": dict(sorted(counts.items()))}
    (options.output / f"{options.campaign}.json").write_text(json.dumps(content, indent=1) + "\n")
    print("\n".join(f"{name}: {number}" for name, number in sorted(counts.items())), f"{seconds:.0f} s", sep="\n")


if __name__ == "__main__":
    main()
