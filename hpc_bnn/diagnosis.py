"""From facts about the ranks of a job to its problems and their remedies (floor 6).

Pure: facts in, problems out. Nothing here communicates or looks at the machine; every function is Local.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from string import Formatter
from typing import Any, Literal

from .comm import Backend
from .facts import RankFacts

Severity = Literal["error", "warning", "hint"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "hint")


@dataclass(frozen=True)
class Kind:
    """A kind of problem: how bad, why it matters, what to do."""

    severity: Severity
    title: str
    why: str
    remedy: str
    """``{name}`` is filled in from the `Problem`."""


KINDS = {
    "mixed_mpi": Kind(
        "error",
        "Two MPI libraries in one process",
        "mpi4py and Horovod talk to different MPIs: wrong ranks, crashes, or hangs.",
        "Build both for the MPI of one module (tools/install_horovod.sh), and load no other MPI beside it; "
        "or use --backend torch, which leaves Horovod out",
    ),
    "foreign_launcher": Kind(
        "error",
        "A launcher of another MPI",
        "Every rank believes that it is alone: the same work is done several times, into the same files.",
        "Start with the mpirun of {library}, or under Slurm with srun --mpi=pmix (Open MPI) or --mpi=pmi2 (MPICH)",
    ),
    "mpi_missing": Kind(
        "error",
        "MPI cannot be started",
        "Ranks of mpirun and srun need it; those of torchrun do not.",
        "Load the module of an MPI and install mpi4py for it (tools/setup.sh brings both without root), "
        "or start with torchrun",
    ),
    "horovod_missing": Kind(
        "error",
        "No Horovod, with --backend horovod",
        "Sums of tensors over several ranks go through it; one process needs none.",
        "Build it for this torch and MPI with tools/install_horovod.sh, or use --backend torch",
    ),
    "horovod_broken": Kind(
        "error",
        "Horovod cannot be imported, with --backend horovod",
        "It was built for another torch or MPI, or its libraries are not found.",
        "Build it again with tools/install_horovod.sh, with the modules loaded that are loaded in the job, "
        "or use --backend torch",
    ),
    "horovod_without_mpi": Kind(
        "error",
        "Horovod was built without MPI, with --backend horovod",
        "hpc_bnn starts Horovod on the communicators of MPI.",
        "Build it with HOROVOD_WITH_MPI=1 (tools/install_horovod.sh), or use --backend torch",
    ),
    "horovod_without_process_sets": Kind(
        "error",
        "A Horovod without process sets, with --backend horovod",
        "Sums over one axis of the process grid need them; they came with Horovod 0.23.",
        "Install Horovod 0.28.1 with tools/install_horovod.sh, or use --backend torch",
    ),
    "horovod_under_torchrun": Kind(
        "error",
        "torchrun, with --backend horovod",
        "torchrun starts ranks without MPI, which Horovod needs.",
        "Start with mpirun or srun, or use --backend torch",
    ),
    "distributed_missing": Kind(
        "error",
        "A torch without torch.distributed or Gloo, where they carry the tensors",
        "Sums of tensors over several ranks go through them; one process needs none.",
        "Install a torch that has them, as the wheels of PyTorch have, or use --backend horovod with mpirun or srun",
    ),
    "mpi_threads": Kind(
        "error",
        "MPI does not allow several threads",
        "Horovod calls MPI from a thread of its own while mpi4py calls it from another: crashes or hangs.",
        "Use an MPI that gives MPI_THREAD_MULTIPLE, and unset MPI4PY_RC_THREADS and MPI4PY_RC_THREAD_LEVEL; "
        "or use --backend torch",
    ),
    "shared_gpu_nccl": Kind(
        "error",
        "Two ranks on one GPU, with the NCCL of Horovod",
        "NCCL refuses it.",
        "Start {gpus} ranks on each node, one for each GPU, or check CUDA_VISIBLE_DEVICES; for a trial, --backend torch",
    ),
    "mixed_devices": Kind(
        "error",
        "Some ranks have a GPU, others none",
        "All ranks must compute on one kind of device.",
        "Ask for as many GPUs on each node as there are ranks, or use --device cpu",
    ),
    "versions_differ": Kind(
        "error",
        "Ranks with different versions",
        "Their numbers differ, and objects that they exchange may not be understood.",
        "Use one environment on a file system that all nodes see, and load the same modules everywhere",
    ),
    "hdf5_missing": Kind(
        "error",
        "h5py cannot be imported",
        "Shards are HDF5 files.",
        "pip install h5py, without a HDF5 module of another version in LD_LIBRARY_PATH",
    ),
    "grid_failed": Kind(
        "error",
        "The process grid does not start",
        "Training would end the same way.",
        "Read the message; where it is of the network, try on one node first, then {debug}",
    ),
    "self_test_failed": Kind(
        "error",
        "A sum over the grid is wrong",
        "Training would give wrong numbers.",
        "Try {another}, and with several nodes one of them first; a Horovod that sums wrongly is to be built again "
        "for this MPI (tools/install_horovod.sh)",
    ),
    "hung": Kind(
        "error",
        "A step does not end",
        "A rank is stuck, or the nodes do not reach each other.",
        "Try on one node; name the network (OMPI_MCA_btl_tcp_if_include, GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME), "
        "or give more --seconds",
    ),
    "check_failed": Kind(
        "error",
        "A check could not be made",
        "What it looks at may be broken.",
        "Read the message; where it is no fault of the installation, report it",
    ),
    "shared_gpu": Kind(
        "warning",
        "Two ranks on one GPU",
        "Right for a trial, slow for work; tensors go through host memory.",
        "Start {gpus} ranks on each node, one for each GPU, or check CUDA_VISIBLE_DEVICES",
    ),
    "mig_slices": Kind(
        "warning",
        "Ranks on slices of one GPU, with NCCL",
        "NCCL tells GPUs by their place on the bus, which slices share, and may refuse them.",
        "Use whole GPUs for several ranks, or --backend horovod with one that was built without NCCL",
    ),
    "idle_gpus": Kind(
        "warning",
        "GPUs that no rank uses",
        "They are paid for.",
        "Start {gpus} ranks on each node, or ask for fewer GPUs",
    ),
    "hidden_gpus": Kind(
        "warning",
        "GPUs that torch does not see",
        "Ranks compute on the CPU.",
        "Ask the batch system for GPUs, check CUDA_VISIBLE_DEVICES, and install a torch for this GPU and driver",
    ),
    "gpu_without_nccl": Kind(
        "warning",
        "GPUs, and no NCCL in what carries the tensors",
        "Tensors go through host memory.",
        "Use --backend torch and a torch that has NCCL, or HOROVOD_GPU_OPERATIONS=NCCL tools/install_horovod.sh",
    ),
    "horovod_unusable": Kind(
        "warning",
        "A Horovod that cannot be used",
        "torch.distributed carries the tensors instead, with the same results to rounding; but someone installed this Horovod to be used.",
        "Build it again with tools/install_horovod.sh (on GPUs with HOROVOD_GPU_OPERATIONS=NCCL) and the modules of "
        "the job, or use --backend torch, which does not look for it",
    ),
    "second_mpi": Kind(
        "warning",
        "A second MPI library beside that of mpi4py",
        "Nothing here should call it, but symbols of the two can be mixed up: crashes or hangs.",
        "Load the module of one MPI only, check LD_PRELOAD, and what torch was built with",
    ),
    "more_ranks_than_cpus": Kind(
        "warning",
        "More ranks than CPUs",
        "Ranks wait for each other while they wait for a CPU.",
        "Start at most {cpus} ranks on such a node, or ask for more CPUs (--cpus-per-task)",
    ),
    "shared_cpus": Kind(
        "warning",
        "Several ranks bound to the same CPUs",
        "They take turns, while other CPUs stand idle.",
        "Give each rank its own: mpirun --map-by slot:PE=N --bind-to core, srun --cpus-per-task=N, or bind to none",
    ),
    "oversubscribed_threads": Kind(
        "warning",
        "More threads than CPUs",
        "Threads push each other off the CPUs, and steps are slow.",
        "export OMP_NUM_THREADS={threads}, or give each rank more CPUs",
    ),
    "uneven_nodes": Kind(
        "warning",
        "Different numbers of ranks on the nodes",
        "Sample groups cross nodes, and the fullest node sets the pace.",
        "Start the same number on each (--ntasks-per-node, --map-by ppr:N:node)",
    ),
    "spinning": Kind(
        "hint",
        "Waiting ranks spin",
        "Ranks fill the CPUs, Horovod adds a thread to each, and Open MPI spins while it waits.",
        "export OMPI_MCA_mpi_yield_when_idle=1 before mpirun",
    ),
    "cycle_time": Kind(
        "hint",
        "Horovod looks for work every millisecond",
        "Ranks fill the CPUs of several nodes: a small sum costs a cycle at least.",
        "Measure with HOROVOD_CYCLE_TIME=0.1 and with 1",
    ),
    "no_mpi": Kind(
        "hint",
        "No MPI, and one process",
        "One process needs none, nor do ranks of torchrun; those of mpirun and srun do.",
        "For these, load the module of an MPI and install mpi4py for it; tools/setup.sh brings both without root",
    ),
    "no_horovod": Kind(
        "hint",
        "No Horovod is installed",
        "torch.distributed carries the tensors, with the same results to rounding; which of the two is faster depends on the machine.",
        "Nothing need be done, and --backend torch says that none is wanted; tools/install_horovod.sh builds one to compare",
    ),
    "batch_step": Kind(
        "hint",
        "A job of several tasks, and one process",
        "In a batch script a command without a launcher runs once.",
        "Put srun, mpirun or torchrun in front of it",
    ),
    "plain_python": Kind(
        "hint",
        "Started without the runner of mpi4py",
        "An exception of one rank can leave the others waiting.",
        "Start with hpc-bnn, or python -m mpi4py -m hpc_bnn",
    ),
    "file_locking": Kind(
        "hint",
        "HDF5 locks files",
        "Some parallel file systems refuse locks, and opening a shard fails.",
        "export HDF5_USE_FILE_LOCKING=FALSE where that happens",
    ),
}


@dataclass(frozen=True)
class Problem:
    """Something that is wrong with a job."""

    code: str
    """A key of `KINDS`."""
    seen: str
    """What was seen, and where."""
    values: dict[str, Any] = field(default_factory=dict)
    """For the remedy."""

    @property
    def severity(self) -> Severity:
        return KINDS[self.code].severity

    @property
    def why(self) -> str:
        return KINDS[self.code].why

    @property
    def remedy(self) -> str:
        return KINDS[self.code].remedy.format(**self.values)


@dataclass(frozen=True)
class Carrier:
    """What carries the tensors between the ranks."""

    backend: Backend
    """What was asked for."""
    library: Literal["horovod", "torch"]
    transport: Literal["NCCL", "Gloo", "MPI"]
    """By which this library sends them."""
    why: str
    """Why this library."""

    @property
    def name(self) -> str:
        return LIBRARY_NAMES[self.library]

    def __str__(self) -> str:
        return f"{self.name} ({self.transport})"


LIBRARY_NAMES = {"horovod": "Horovod", "torch": "torch.distributed"}


def carrier_of(ranks: Sequence[RankFacts], backend: Backend) -> Carrier:
    """Return what `hpc_bnn.connect` takes for the tensors of these ranks, or would take if there were several."""
    unusable = list(_same(ranks, lambda r: [w for w in (_why_no_horovod(r),) if w]))
    if backend != "auto":
        library, why = backend, f"--backend {backend}"
    elif ranks[0].launcher.needs_no_mpi:
        library, why = "torch", "torchrun starts ranks without MPI, which Horovod needs"
    elif unusable:
        problem, where = unusable[0]
        library, why = "torch", f"Horovod cannot be used on {where} ({problem})"
    else:
        library, why = "horovod", "all ranks can use it"
    gpus = [(r.host, r.gpus[r.gpu].uuid) for r in ranks if r.gpu is not None]
    if library == "torch":
        has_nccl = len(set(gpus)) == len(ranks) and all(r.distributed.nccl for r in ranks)
        return Carrier(backend, library, "NCCL" if has_nccl else "Gloo", why)
    has_nccl = bool(gpus) and all(r.horovod and r.horovod.nccl for r in ranks)
    return Carrier(backend, library, "NCCL" if has_nccl else "MPI", why)


def _why_no_horovod(r: RankFacts) -> str | None:
    """Return why --backend auto does not take Horovod for this rank."""
    if r.horovod is None:
        return "it was not looked at"
    return r.horovod.why_not(needs_nccl=r.gpu is not None and r.distributed.nccl is not None)


def diagnose(ranks: Sequence[RankFacts], carrier: Carrier) -> list[Problem]:
    """Return the problems of a job, the worst first, one for each kind and sight however many nodes have it."""
    found = [problem for rule in RULES for problem in rule(ranks, carrier)]
    return sorted(found, key=lambda problem: SEVERITIES.index(problem.severity))


def has_errors(problems: Iterable[Problem]) -> bool:
    """Whether training would fail."""
    return any(problem.severity == "error" for problem in problems)


def table_of_kinds() -> str:
    """Return all kinds of problems as a table in Markdown, for docs/doctor.md."""
    lines = ["| | problem | why it matters | remedy |", "|---|---|---|---|"]
    for code, kind in KINDS.items():
        names = {name: f"*{name}*" for _, name, _, _ in Formatter().parse(kind.remedy) if name}
        cells = (
            f"{kind.severity}, `{code}`",
            kind.title,
            kind.why.rstrip("."),
            kind.remedy.format(**names),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@dataclass(frozen=True)
class Sight:
    """A problem of one node."""

    problem: Problem
    host: str
    example: str = ""
    """What is of this node alone."""


# --- rules ---------------------------------------------------------------------------------------------


def _failures(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for (what, error), where in _same(ranks, lambda r: r.failures.items()):
        yield Problem("check_failed", f"{what}: {error}, on {where}")


def _mpi(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    if ranks[0].launcher.needs_no_mpi:
        return
    with_horovod = carrier.library == "horovod"
    for libraries, where in _same(ranks, lambda r: [r.mpi_libraries] if len(r.mpi_libraries) > 1 else []):
        code = "mixed_mpi" if with_horovod else "second_mpi"
        yield Problem(code, f"{' and '.join(libraries)}, on {where}")
    for error, where in _same(ranks, lambda r: [r.mpi.error] if r.mpi and r.mpi.error else []):
        is_needed = len(ranks) > 1 or ranks[0].launcher.least_size > 1
        yield Problem("mpi_missing" if is_needed else "no_mpi", f"{error}, on {where}")
    low = ("single", "funneled", "serialized") if with_horovod else ()
    for level, where in _same(
        ranks, lambda r: [r.mpi.thread_level] if r.mpi and r.mpi.thread_level in low else []
    ):
        yield Problem("mpi_threads", f"MPI gives the thread level {level}, on {where}")


def _launcher(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for r in ranks:
        launcher, mpi = r.launcher, r.mpi
        if launcher.least_size > 1 and mpi and mpi.error is None and mpi.world_size == 1:
            number = launcher.size or f"at least {launcher.least_size}"
            signs = ", ".join(f"{name}={value}" for name, value in launcher.variables.items())
            on_path = f"; mpirun on the PATH is {r.mpirun}" if r.mpirun else ""
            library = mpi.library or "the MPI of mpi4py"
            yield Problem(
                "foreign_launcher",
                f"{launcher.name} started {number} ranks ({signs}), and {library} sees one, on {r.host}{on_path}",
                {"library": library},
            )
            return
    first = ranks[0]
    tasks = next((n for n in TASKS if first.environment.get(n, "").isdigit()), None)
    if first.launcher.least_size == 1 and len(ranks) == 1 and tasks and int(first.environment[tasks]) > 1:
        yield Problem("batch_step", f"{tasks}={first.environment[tasks]}, and this process is alone")
    for _, where in _same(ranks, lambda r: [] if r.has_runner or r.launcher.needs_no_mpi else [True]):
        if len(ranks) > 1:
            yield Problem("plain_python", f"plain python, on {where}")


TASKS = ("SLURM_NTASKS", "PBS_NP", "LSB_DJOB_NUMPROC")
"""Variables by which batch systems say how many tasks a job has."""


def _libraries(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    """Look at what carries the tensors, and at a Horovod that could and does not."""
    if carrier.library == "horovod" and ranks[0].launcher.needs_no_mpi:
        signs = ", ".join(f"{name}={value}" for name, value in ranks[0].launcher.variables.items())
        yield Problem("horovod_under_torchrun", f"torchrun started these ranks ({signs})")
        return
    looks = [_horovod_of_rank if carrier.library == "horovod" else _distributed_of_rank]
    if carrier.library == "torch":
        looks.append(_unused_horovod_of_rank)
    for (code, seen), where in (sight for look in looks for sight in _same(ranks, look)):
        yield Problem(code, f"{seen}, on {where}")


def _horovod_of_rank(r: RankFacts) -> Iterator[tuple[str, str]]:
    horovod = r.horovod
    if horovod is None:
        return  # the look failed, and that is said
    if not horovod.is_installed:
        yield "horovod_missing", horovod.error or "not installed"
    elif horovod.error:
        yield "horovod_broken", horovod.error
    elif not horovod.process_sets:
        yield "horovod_without_process_sets", f"Horovod {horovod.version}"
    elif not horovod.mpi:
        yield "horovod_without_mpi", f"Horovod {horovod.version}"
    elif r.gpu is not None and not horovod.nccl:
        yield "gpu_without_nccl", f"Horovod {horovod.version}"


def _distributed_of_rank(r: RankFacts) -> Iterator[tuple[str, str]]:
    if problem := r.distributed.why_not():
        yield "distributed_missing", problem
    elif r.gpu is not None and not r.distributed.nccl:
        yield "gpu_without_nccl", "torch.distributed"


def _unused_horovod_of_rank(r: RankFacts) -> Iterator[tuple[str, str]]:
    problem = _why_no_horovod(r)
    if problem is None or r.horovod is None or r.distributed.why_not():
        return
    if r.horovod.is_installed:
        yield "horovod_unusable", f"Horovod {r.horovod.version}: {problem}"
    else:
        yield "no_horovod", problem


def _versions(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    unused = {"mpi4py": ranks[0].launcher.needs_no_mpi, "horovod": carrier.library != "horovod"}
    for name in sorted({name for r in ranks for name in r.versions if not unused.get(name)}):
        found = list(_same(ranks, lambda r, name=name: [r.versions.get(name, "none")]))
        if len(found) > 1:
            yield Problem(
                "versions_differ", f"{name} {'; '.join(f'{version} on {where}' for version, where in found)}"
            )


def _hdf5(ranks: Sequence[RankFacts], _: Carrier) -> Iterator[Problem]:
    for error, where in _same(ranks, lambda r: [r.hdf5.error] if r.hdf5.error else []):
        yield Problem("hdf5_missing", f"{error}, on {where}")
    environment = ranks[0].environment
    if "HDF5_USE_FILE_LOCKING" not in environment and (
        len(by_host(ranks)) > 1 or "SLURM_JOB_ID" in environment
    ):
        yield Problem("file_locking", "HDF5_USE_FILE_LOCKING is not set")


def _gpus(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    without = [r for r in ranks if r.gpu is None]
    if 0 < len(without) < len(ranks):
        yield Problem("mixed_devices", f"no GPU for {ranks_in_words(without)}")
    yield from _merged(_gpus_of_node(node, carrier.transport == "NCCL") for node in by_host(ranks).values())


def _gpus_of_node(node: list[RankFacts], nccl: bool) -> Iterator[Sight]:
    host = node[0].host
    visible = {gpu.uuid: gpu for r in node for gpu in r.gpus}
    users = defaultdict(list)
    for r in node:
        if r.gpu is not None:
            users[r.gpus[r.gpu].uuid].append(r)
    allocated = max(len(visible), _number(node[0].environment.get("SLURM_GPUS_ON_NODE")))
    shared = {uuid: sharers for uuid, sharers in users.items() if len(sharers) > 1}
    for uuid, sharers in list(shared.items())[:1]:
        code = "shared_gpu_nccl" if nccl else "shared_gpu"
        seen = f"{len(shared)} of {plural(allocated, 'GPU')} for several ranks"
        example = f"ranks {ranges(r.rank for r in sharers)} on {uuid}"
        yield Sight(Problem(code, seen, {"gpus": allocated}), host, example)
    buses = defaultdict(set)
    for uuid in users:
        buses[visible[uuid].bus].add(uuid)
    for bus, slices in buses.items():
        if bus is not None and len(slices) > 1 and nccl:
            yield Sight(Problem("mig_slices", f"{len(slices)} slices of the GPU at {bus}"), host)
    if users and len(users) < allocated:
        seen = f"{len(users)} of {allocated} GPUs are used"
        yield Sight(Problem("idle_gpus", seen, {"gpus": allocated}), host)
    if not visible and max(node[0].node_gpus, allocated):
        built = f"torch is built for {node[0].accelerator or 'CPUs only'}"
        number = max(node[0].node_gpus, allocated)
        yield Sight(Problem("hidden_gpus", f"{plural(number, 'GPU')}, and {built}"), host)


def _cpus(ranks: Sequence[RankFacts], carrier: Carrier) -> Iterator[Problem]:
    yield from _merged(_cpus_of_node(node) for node in by_host(ranks).values())
    nodes = by_host(ranks)
    if len({len(node) for node in nodes.values()}) > 1:
        counts = _counted(f"{len(node)} on {host}" for host, node in nodes.items())
        yield Problem("uneven_nodes", f"ranks: {counts}")
    full = [r for node in nodes.values() if _is_full(node) for r in node]
    if len(ranks) > 1 and full and carrier.library == "horovod" and full[0].mpi:
        environment = full[0].environment
        if "Open MPI" in full[0].mpi.library and not _is_on(environment.get("OMPI_MCA_mpi_yield_when_idle")):
            yield Problem("spinning", "OMPI_MCA_mpi_yield_when_idle is not set")
        if "HOROVOD_CYCLE_TIME" not in environment and len(nodes) > 1:  # on one node comm sets it
            yield Problem("cycle_time", "HOROVOD_CYCLE_TIME is not set")


def _cpus_of_node(node: list[RankFacts]) -> Iterator[Sight]:
    """Compare each set of CPUs with the ranks that can run nowhere else: it must hold them and their threads."""
    everywhere = frozenset(cpu for r in node for cpu in r.cpus)
    worst: dict[str, tuple[float, Sight]] = {}

    def see(load: float, code: str, seen: str, example: str, **values: int) -> None:
        if load > worst.get(code, (1.0, None))[0]:
            worst[code] = (load, Sight(Problem(code, seen, values), node[0].host, example))

    sets = {frozenset(r.cpus) for r in node} | {everywhere}
    for cpus in sorted(sets, key=lambda s: (-len(s), sorted(s))):  # of equal loads the widest is said
        inside = [r for r in node if cpus.issuperset(r.cpus)]
        if not cpus:
            continue
        number, threads = len(inside), sum(r.torch_threads for r in inside)
        place, example = (
            plural(len(cpus), "CPU"),
            f"ranks {ranges(r.rank for r in inside)} on {ranges(cpus)}",
        )
        code = "more_ranks_than_cpus" if cpus == everywhere else "shared_cpus"
        see(number / len(cpus), code, f"{number} ranks on {place}", example, cpus=len(cpus))
        if threads > number:  # with one thread each there are too many ranks, and that is said already
            each = "/".join(map(str, sorted({r.torch_threads for r in inside})))
            seen = f"{plural(number, 'rank')} with {each} threads each on {place}"
            see(
                threads / len(cpus),
                "oversubscribed_threads",
                seen,
                example,
                threads=max(1, len(cpus) // number),
            )
    if "more_ranks_than_cpus" in worst:  # whatever the binding
        worst.pop("shared_cpus", None)
    yield from (sight for _, sight in worst.values())


RULES: tuple[Callable[[Sequence[RankFacts], Carrier], Iterator[Problem]], ...] = (
    _failures,
    _mpi,
    _launcher,
    _libraries,
    _versions,
    _hdf5,
    _gpus,
    _cpus,
)


# --- words ---------------------------------------------------------------------------------------------


def by_host(ranks: Iterable[RankFacts]) -> dict[str, list[RankFacts]]:
    """Return the ranks of each node, in the order in which nodes first appear."""
    nodes = defaultdict(list)
    for r in ranks:
        nodes[r.host].append(r)
    return dict(nodes)


def ranges(numbers: Iterable[int]) -> str:
    """Return numbers in the way of "0-3,8"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)


def ranks_in_words(ranks: Sequence[RankFacts]) -> str:
    """Return which ranks these are, and where: "ranks 0-3 (n1, n2)"."""
    noun = "rank" if len(ranks) == 1 else "ranks"
    return f"{noun} {ranges(r.rank for r in ranks)} ({_counted(by_host(ranks))})"


def _same(
    ranks: Sequence[RankFacts], look: Callable[[RankFacts], Iterable[Any]]
) -> Iterator[tuple[Any, str]]:
    """Yield what ranks show, each once, with the ranks that show it."""
    seen = defaultdict(list)
    for r in ranks:
        for sight in look(r):
            seen[sight].append(r)
    for sight, showing in seen.items():
        yield sight, ranks_in_words(showing)


def _merged(nodes: Iterable[Iterable[Sight]]) -> Iterator[Problem]:
    """Yield the problems of nodes, one for those that look alike, with the example of the first."""
    alike: dict[tuple[str, str], list[Sight]] = defaultdict(list)
    for sight in (sight for node in nodes for sight in node):
        alike[sight.problem.code, sight.problem.seen].append(sight)
    for sights in alike.values():
        problem, example = sights[0].problem, f" ({sights[0].example})" if sights[0].example else ""
        hosts = _counted(sight.host for sight in sights)
        yield Problem(problem.code, f"{problem.seen}, on {hosts}{example}", problem.values)


def _counted(items: Iterable[str]) -> str:
    """Return the first items, and how many more there are."""
    items = list(items)
    more = f" and {len(items) - 4} more" if len(items) > 4 else ""
    return ", ".join(items[:4]) + more


def plural(number: int, noun: str) -> str:
    """Return a number of things: "1 rank", "2 ranks"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _is_full(node: list[RankFacts]) -> bool:
    return len(node) >= len({cpu for r in node for cpu in r.cpus})


def _is_on(value: str | None) -> bool:
    return value is not None and value.lower() not in ("", "0", "false", "no")


def _number(text: str | None) -> int:
    return int(text) if text and text.isdigit() else 0
