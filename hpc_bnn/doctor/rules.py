"""Derive the problems of a job and their remedies from the facts of its ranks.

Pure: nothing here communicates or examines the machine; every function is Local.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

from .backend_choice import Carrier, why_no_horovod
from .facts import RankFacts
from .problems import SEVERITIES, Problem
from .summarise import Finding, by_host, counted, merged, plural, ranges, ranks_in_words, same


def diagnose(ranks: Sequence[RankFacts], carrier: Carrier) -> list[Problem]:
    """Return the problems of a job, the worst first: one for each kind and observation, for any number of nodes."""
    found = [problem for rule in RULES for problem in rule(ranks, carrier)]
    return sorted(found, key=lambda problem: SEVERITIES.index(problem.severity))


# --- rules ---------------------------------------------------------------------------------------------


def _failures(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for what in dict.fromkeys(name for r in ranks for name in r.failures):
        for error, where in same(ranks, lambda r, what=what: r.failures.get(what)):
            yield Problem("check_failed", f"{what}: {error}, on {where}")


def _mpi(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    if ranks[0].launcher.needs_no_mpi:
        return
    with_horovod = carrier.library == "horovod"
    for libraries, where in same(ranks, lambda r: len(r.mpi_libraries) > 1 and r.mpi_libraries):
        yield Problem("mixed_mpi" if with_horovod else "second_mpi", f"{' and '.join(libraries)}, on {where}")
    for error, where in same(ranks, lambda r: r.mpi and r.mpi.error):
        is_needed = len(ranks) > 1 or ranks[0].launcher.least_size > 1
        yield Problem("mpi_missing" if is_needed else "no_mpi", f"{error}, on {where}")
    low = ("single", "funneled", "serialized") if with_horovod else ()
    for level, where in same(ranks, lambda r: r.mpi and r.mpi.thread_level in low and r.mpi.thread_level):
        yield Problem("mpi_threads", f"MPI gives the thread level {level}, on {where}")


def _launcher(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for r in ranks:
        launcher, mpi = r.launcher, r.mpi
        if launcher.least_size > 1 and mpi and mpi.error is None and mpi.world_size == 1:
            number = launcher.size or f"at least {launcher.least_size}"
            on_path = f"; mpirun on the PATH is {r.mpirun}" if r.mpirun else ""
            library = mpi.library or "the MPI of mpi4py"
            started = f"{launcher.name} started {number} ranks ({launcher.signs})"
            seen = f"{started}, and {library} sees one, on {r.host}{on_path}"
            yield Problem("foreign_launcher", seen, {"library": library})
            return
    first = ranks[0]
    tasks = next((n for n in TASKS if first.environment.get(n, "").isdigit()), None)
    if first.launcher.least_size == 1 and len(ranks) == 1 and tasks and int(first.environment[tasks]) > 1:
        yield Problem("batch_step", f"{tasks}={first.environment[tasks]}, and this process is alone")
    if len(ranks) > 1:
        for _, where in same(ranks, lambda r: not (r.has_runner or r.launcher.needs_no_mpi)):
            yield Problem("plain_python", f"plain python, on {where}")


TASKS = ("SLURM_NTASKS", "PBS_NP", "LSB_DJOB_NUMPROC")
"""Variables by which batch systems say how many tasks a job has."""


def _libraries(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    """Check the communication library, and a Horovod that is installed and not used."""
    if carrier.library != "torch" and ranks[0].launcher.needs_no_mpi:
        yield Problem("mpi_under_torchrun", f"torchrun started these ranks ({ranks[0].launcher.signs})")
        return
    looks = {
        "horovod": [_horovod_of_rank],
        "torch": [_distributed_of_rank, _unused_horovod_of_rank],
        "mpi": [lambda r: ("gpu_without_nccl", "MPI") if r.gpu is not None else None, _unused_horovod_of_rank],
    }[carrier.library]
    for (code, seen), where in (finding for look in looks for finding in same(ranks, look)):
        yield Problem(code, f"{seen}, on {where}")


def _horovod_of_rank(r: RankFacts) -> tuple[str, str] | None:
    horovod = r.horovod
    if horovod is None:
        return None  # the look failed, and that is a problem of its own
    version = f"Horovod {horovod.version}"
    if not horovod.is_installed:
        return "horovod_missing", horovod.error or "not installed"
    if horovod.error:
        return "horovod_broken", horovod.error
    if not horovod.process_sets:
        return "horovod_without_process_sets", version
    if not horovod.mpi:
        return "horovod_without_mpi", version
    return ("gpu_without_nccl", version) if r.gpu is not None and not horovod.nccl else None


def _distributed_of_rank(r: RankFacts) -> tuple[str, str] | None:
    if problem := r.distributed.why_not():
        return "distributed_missing", problem
    return ("gpu_without_nccl", "torch.distributed") if r.gpu is not None and not r.distributed.nccl else None


def _unused_horovod_of_rank(r: RankFacts) -> tuple[str, str] | None:
    problem = why_no_horovod(r)
    if problem is None or r.horovod is None:
        return None
    if r.horovod.is_installed:
        return "horovod_unusable", f"Horovod {r.horovod.version}: {problem}"
    return "no_horovod", problem


def _versions(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    unused = {"mpi4py": ranks[0].launcher.needs_no_mpi, "horovod": carrier.library != "horovod"}
    for name in sorted({name for r in ranks for name in r.versions if not unused.get(name)}):
        found = list(same(ranks, lambda r, name=name: r.versions.get(name, "none")))
        if len(found) > 1:
            yield Problem("versions_differ", f"{name} {'; '.join(f'{version} on {where}' for version, where in found)}")


def _hdf5(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for error, where in same(ranks, lambda r: r.hdf5.error):
        yield Problem("hdf5_missing", f"{error}, on {where}")
    environment = ranks[0].environment
    if "HDF5_USE_FILE_LOCKING" not in environment and (len(by_host(ranks)) > 1 or "SLURM_JOB_ID" in environment):
        yield Problem("file_locking", "HDF5_USE_FILE_LOCKING is not set")


def _gpus(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    without = [r for r in ranks if r.gpu is None]
    if 0 < len(without) < len(ranks):
        yield Problem("mixed_devices", f"no GPU for {ranks_in_words(without)}")
    yield from merged(by_host(ranks), lambda node: _gpus_of_node(node, carrier.transport == "NCCL"))


def _gpus_of_node(node: list[RankFacts], nccl: bool) -> Iterator[Finding]:
    visible = {gpu.uuid: gpu for r in node for gpu in r.gpus}
    users = defaultdict(list)
    for r in node:
        if r.gpu is not None:
            users[r.gpus[r.gpu].uuid].append(r)
    given = node[0].environment.get("SLURM_GPUS_ON_NODE", "")
    allocated = max(len(visible), int(given) if given.isdigit() else 0)
    present = max(node[0].node_gpus, allocated)
    shared = {uuid: sharers for uuid, sharers in users.items() if len(sharers) > 1}
    for uuid, sharers in list(shared.items())[:1]:
        code = "shared_gpu_nccl" if nccl else "shared_gpu"
        seen = f"{len(shared)} of {plural(allocated, 'GPU')} for several ranks"
        example = f"ranks {ranges(r.rank for r in sharers)} on {uuid}"
        yield Problem(code, seen, {"gpus": allocated}), example
    buses = defaultdict(set)
    for uuid in users:
        buses[visible[uuid].bus].add(uuid)
    for bus, slices in buses.items():
        if bus is not None and len(slices) > 1 and nccl:
            yield Problem("mig_slices", f"{len(slices)} slices of the GPU at {bus}"), ""
    if users and len(users) < allocated:
        yield Problem("idle_gpus", f"{len(users)} of {allocated} GPUs are used", {"gpus": allocated}), ""
    if not visible and present:
        built = f"torch is built for {node[0].accelerator or 'CPUs only'}"
        yield Problem("hidden_gpus", f"{plural(present, 'GPU')}, and {built}"), ""


def _cpus(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    nodes = by_host(ranks)
    yield from merged(nodes, _cpus_of_node)
    if len({len(node) for node in nodes.values()}) > 1:
        counts = counted(f"{len(node)} on {host}" for host, node in nodes.items())
        yield Problem("uneven_nodes", f"ranks: {counts}")
    full = [r for node in nodes.values() if len(node) >= len({cpu for r in node for cpu in r.cpus}) for r in node]
    if len(ranks) > 1 and full and carrier.library == "horovod" and full[0].mpi:
        environment = full[0].environment
        yields = environment.get("OMPI_MCA_mpi_yield_when_idle", "").lower() not in ("", "0", "false", "no")
        if "Open MPI" in full[0].mpi.library and not yields:
            yield Problem("spinning", "OMPI_MCA_mpi_yield_when_idle is not set")
        if "HOROVOD_CYCLE_TIME" not in environment and len(nodes) > 1:  # on one node comm sets it
            yield Problem("cycle_time", "HOROVOD_CYCLE_TIME is not set")


def _cpus_of_node(node: list[RankFacts]) -> Iterator[Finding]:
    """Compare each set of CPUs with the ranks that can run nowhere else: it must hold them and their threads."""
    everywhere = frozenset(cpu for r in node for cpu in r.cpus)
    worst: dict[str, tuple[float, Finding]] = {}

    def see(load: float, code: str, seen: str, example: str, **values: int) -> None:
        if load > worst.get(code, (1.0, None))[0]:
            worst[code] = load, (Problem(code, seen, values), example)

    sets = {frozenset(r.cpus) for r in node} | {everywhere}
    for cpus in sorted(filter(None, sets), key=lambda s: (-len(s), sorted(s))):  # of equal loads the widest is said
        inside = [r for r in node if cpus.issuperset(r.cpus)]
        number, threads = len(inside), sum(r.torch_threads for r in inside)
        place, example = plural(len(cpus), "CPU"), f"ranks {ranges(r.rank for r in inside)} on {ranges(cpus)}"
        code = "more_ranks_than_cpus" if cpus == everywhere else "shared_cpus"
        see(number / len(cpus), code, f"{number} ranks on {place}", example, cpus=len(cpus))
        if threads > number:  # with one thread each there are too many ranks, and that is said already
            each = "/".join(map(str, sorted({r.torch_threads for r in inside})))
            seen = f"{plural(number, 'rank')} with {each} threads each on {place}"
            see(threads / len(cpus), "oversubscribed_threads", seen, example, threads=max(1, len(cpus) // number))
    if "more_ranks_than_cpus" in worst:  # whatever the binding
        worst.pop("shared_cpus", None)
    yield from (finding for _, finding in worst.values())


Rule = Callable[[Sequence[RankFacts], Carrier], Iterator[Problem]]
RULES: tuple[Rule, ...] = (_failures, _mpi, _launcher, _libraries, _versions, _hdf5, _gpus, _cpus)
