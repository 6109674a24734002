"""The batch scripts of jobscripts/, submitted to a real Slurm of two nodes that tools/slurm.sh starts on this machine."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from conftest import JOB_SECONDS, REPOSITORY, free_port, launch_environment, patience, prepared, write_program

SCRIPTS = REPOSITORY / "jobscripts"
CONFIG = REPOSITORY / "configs/digits.yaml"
LONG = ("--num_epochs", "100000")
EPOCHS = ("--num_epochs", "10")
"""Long enough to be stopped after the first epoch, before the end."""


EXACT = ("--num_epochs", "8", "--dtype", "float64", "--num_samples", "16", "--num_test_samples", "5")


class Cluster:
    """Submits jobs from a working directory of its own, and looks at them."""

    def __init__(self, directory: Path):
        self.work = directory / "work"
        self.local = directory / "slurm/local"
        self.python = directory / "venv/bin/python"
        self.work.mkdir()
        self.environment = launch_environment() | {
            "SLURM_CONF": str(directory / "slurm/slurm.conf"),
            "HPC_BNN_ROOT": str(REPOSITORY),
            "HPC_BNN_VENV": str(directory / "venv"),
            "HPC_BNN_LOCAL_DIR": str(self.local),
            # Where the nodes cannot have host names of their own, shared memory between them would crash
            "OMPI_MCA_btl": "tcp,self",
            "OMPI_MCA_btl_tcp_if_include": "lo",
            "SLURM_PMIX_FENCE": "ring",  # docs/slurm.md
        }

    def prepare_python(self, slurm: Path) -> None:
        """An environment as that of these tests, but its Python has done its imports: one on each node.

        The ranks are forked there, with its host name, storage and network; srun starts, signals and kills who waits for them.
        """
        of_nodes = []
        for node in ("n1", "n2"):
            pid = (slurm / f"slurmd-{node}.pid").read_text().strip()
            there = ("nsenter", "--target", pid, "--mount", "--uts", "--net") if self.has_real_nodes else ()
            command = shlex.join(prepared(*there))
            of_nodes.append(f'{node}:-[!c]*) exec {command} "$@" ;;')
        plain = f'*) exec {shlex.quote(sys.executable)} "$@" ;;'
        write_program(self.python, "\n".join(['case "${SLURMD_NODENAME:-}:${1:-}" in', *of_nodes, plain, "esac"]))
        (self.python.parent / "activate").write_text(f". {sys.prefix}/bin/activate; PATH={self.python.parent}:$PATH\n")

    def run(self, *command, **environment) -> str:
        """Run a command of Slurm; ask a controller again that is too busy to answer a query within its ten seconds."""
        end = time.monotonic() + patience(300)
        while True:
            done = subprocess.run(
                list(map(str, command)),
                cwd=self.work,
                env=self.environment | environment,
                capture_output=True,
                text=True,
                timeout=patience(JOB_SECONDS),
            )
            is_query = command[:2] == ("scontrol", "show") or command[0] in ("sacct", "squeue", "sinfo")
            if not (is_query and "Socket timed out" in done.stderr and time.monotonic() < end):
                break
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout

    def srun(self, *command, **environment) -> subprocess.CompletedProcess:
        environment = self.environment | {"PYTHONPATH": str(REPOSITORY)} | environment
        return subprocess.run(
            ["srun", *map(str, command)],
            cwd=self.work,
            env=environment,
            capture_output=True,
            text=True,
            timeout=patience(JOB_SECONDS),
        )

    def submit(self, script, *arguments, nodes=2, tasks=1, options=(), **environment) -> str:
        shape = (f"--nodes={nodes}", f"--ntasks-per-node={tasks}", "--cpus-per-task=1", "--gres=none")
        command = ("sbatch", "--parsable", *shape, *options, SCRIPTS / "slurm" / script, *arguments)
        return self.run(*command, **environment).strip()

    def show(self, job) -> list[dict[str, str]]:
        """What Slurm knows of a job; of an array, of each of its tasks."""
        lines = self.run("scontrol", "show", "job", "-o", job).splitlines()
        return [dict(re.findall(r"(\w+)=(\S*)", line)) for line in lines]

    def wait(self, job, seconds=JOB_SECONDS) -> list[dict[str, str]]:
        end = time.time() + patience(seconds)
        while True:
            tasks = self.show(job)
            if all(task["JobState"] not in ("PENDING", "RUNNING", "COMPLETING") for task in tasks):
                return tasks
            assert time.time() < end, (tasks, self.output(job))
            time.sleep(0.3)

    def ended(self, job) -> tuple[str, str, str]:
        """Wait for a job; its state, exit code, and how often it was requeued."""
        (task,) = self.wait(job)
        return task["JobState"], task["ExitCode"], task["Restarts"]

    def output(self, job) -> str:
        return "".join(path.read_text() for path in sorted(self.work.glob(f"hpc_bnn_{job}*.out")))

    def wait_for(self, path: Path, job, seconds=JOB_SECONDS) -> None:
        end = time.time() + patience(seconds)
        while not path.exists():
            (task,) = self.show(job)
            is_alive = task["JobState"] in ("PENDING", "RUNNING")
            assert is_alive and time.time() < end, (task["JobState"], self.output(job))
            time.sleep(0.1)


@pytest.fixture(scope="module")
def cluster():
    """A Slurm of two nodes. Whatever needs it carries the marker `slow`, by conftest.py."""
    directory = Path(tempfile.mkdtemp(prefix="hpc_bnn-"))  # a short name: it holds a socket
    directory.chmod(0o755)
    tool, place = str(REPOSITORY / "tools/slurm.sh"), str(directory / "slurm")
    environment = os.environ | {"CPUS": "2", "WITH_PID": str(os.getpid())}
    started = subprocess.run(
        [tool, "start", place], env=environment, capture_output=True, text=True, timeout=patience(JOB_SECONDS)
    )
    try:
        if started.returncode == 3:
            pytest.skip(f"no Slurm: {started.stderr.strip()}")
        assert started.returncode == 0, started.stderr
        cluster = Cluster(directory)
        cluster.has_real_nodes = "unshare is not allowed" not in started.stderr
        cluster.has_networks = "share the network" not in started.stderr and cluster.has_real_nodes
        cluster.prepare_python(directory / "slurm")
        if cluster.has_networks:
            cluster.environment["OMPI_MCA_btl_tcp_if_include"] = "eth0"
            # As Docker leaves it, the same address on all nodes; by its name it is the first to be tried
            bridge = "ip link add ib0 type bridge; ip address add 203.0.113.1/24 dev ib0; ip link set ib0 up"
            cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "sh", "-ec", bridge)
        yield cluster
    finally:
        subprocess.run([tool, "stop", place], timeout=patience(120), check=False)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module")
def jobs(cluster, digits):
    """All jobs are submitted at once, as users do: while one waits to begin again, others run."""
    data = ("--data.shards", digits)
    names = {}
    names["stopped"] = cluster.submit("requeue.sbatch", CONFIG, *data, *EPOCHS, tasks=2, HPC_BNN_SAMPLE_SIZE="2")
    names["whole"] = cluster.submit("train.sbatch", CONFIG, *data, *EPOCHS, tasks=2, HPC_BNN_SAMPLE_SIZE="2")
    names["evaluate"] = cluster.submit(
        "evaluate.sbatch", f"runs/{names['whole']}", "--num_test_samples", 16, nodes=1,
        options=(f"--dependency=afterok:{names['whole']}",),
    )  # fmt: skip
    for library in ("torch", "mpi"):
        names[library] = cluster.submit(
            "train.sbatch", CONFIG, *data, *EXACT, "--backend", library, tasks=2, HPC_BNN_SAMPLE_SIZE="2"
        )
    names["killed"] = cluster.submit("train.sbatch", CONFIG, *data, *LONG)
    names["staged"] = cluster.submit("stage_train.sbatch", digits, CONFIG, "--max_steps", 5)
    seeds = ("--array=0-1",)
    names["seeds"] = cluster.submit("seeds.sbatch", CONFIG, *data, "--max_steps", 5, nodes=1, options=seeds)
    names["limited"] = cluster.submit(
        "requeue.sbatch", CONFIG, *data, "--max_seconds", 1e-9, nodes=1, HPC_BNN_MAX_REQUEUES="1"
    )
    names["wrong"] = cluster.submit("requeue.sbatch", CONFIG, *data, "--num_epochs", 0, nodes=1)
    return names


def final_state(run_dir: Path):
    summary = json.loads((run_dir / "summary.json").read_text())
    checkpoint = max((run_dir / "checkpoints").glob("*.pt"))
    metrics = {name: value for name, value in summary.items() if name.startswith(("test/", "train/"))}
    return summary, metrics, torch.load(checkpoint, weights_only=True)["model"]


def test_a_signalled_job_is_requeued_and_ends_as_an_uninterrupted_one(cluster, jobs):
    job, run_dir = jobs["stopped"], cluster.work / "runs" / jobs["stopped"]
    cluster.wait_for(run_dir / "metrics.jsonl", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)  # what #SBATCH --signal=B:USR1@300 sends
    assert cluster.ended(job) == ("COMPLETED", "0:0", "1"), cluster.output(job)
    output = cluster.output(job)
    assert output.count("hpc-bnn: stopped: after step") == 1 and "requeue 1 of at most 20" in output
    step = int(re.search(r"going on from the checkpoint of step (\d+)", output)[1])
    assert cluster.ended(jobs["whole"]) == ("COMPLETED", "0:0", "0"), cluster.output(jobs["whole"])
    summary, metrics, model = final_state(run_dir)
    expected, expected_metrics, whole = final_state(cluster.work / "runs" / jobs["whole"])
    assert 0 < step < summary["num_steps"] == expected["num_steps"]
    assert summary["grid"] == expected["grid"] and expected["grid"]["sample_size"] == 2
    assert expected["grid"]["data_size"] == 2  # two nodes with a sample group each
    assert metrics == expected_metrics and metrics["test/accuracy"] > 0.9
    assert model.keys() == whole.keys()
    assert all(torch.equal(value, whole[name]) for name, value in model.items())


def test_evaluate(cluster, jobs):
    assert cluster.ended(jobs["evaluate"]) == ("COMPLETED", "0:0", "0"), cluster.output(jobs["evaluate"])
    evaluated = json.loads((cluster.work / "runs" / jobs["whole"] / "evaluation.json").read_text())
    assert f"accuracy {evaluated['metrics']['accuracy']:.6g}" in cluster.output(jobs["evaluate"])


def test_a_killed_rank_ends_the_job(cluster, jobs):
    job = jobs["killed"]
    cluster.wait_for(cluster.work / "runs" / job / "metrics.jsonl", job)
    (_, victim) = rank_processes(cluster, job)
    os.kill(victim, signal.SIGKILL)
    start = time.time()
    state, code, restarts = cluster.ended(job)
    assert state == "FAILED" and code != "0:0" and restarts == "0" and time.time() - start < patience(40)


def test_a_job_that_lost_a_rank_comes_back_by_itself(cluster, jobs, digits):
    """And ends with the bits of an uninterrupted one; what fails before its first checkpoint is not retried (below: wrong)."""
    flags = ("--data.shards", digits, *EPOCHS)
    job = cluster.submit("requeue.sbatch", CONFIG, *flags, tasks=2, HPC_BNN_SAMPLE_SIZE="2")
    run_dir = cluster.work / "runs" / job
    cluster.wait_for(run_dir / "metrics.jsonl", job)
    while not list(run_dir.glob("checkpoints/step-*.json")):
        time.sleep(0.05)
    os.kill(rank_processes(cluster, job)[-1], signal.SIGBUS)
    assert cluster.ended(job) == ("COMPLETED", "0:0", "1"), cluster.output(job)
    assert re.search(
        r"failed with status \d+ after the checkpoint step-\d+.json in .*requeue 1 of", cluster.output(job)
    )
    kept = r"Bus error on n\d: it stays, gpu has 1 other nodes of its kind, the job needs 2"
    assert re.search(kept, cluster.output(job)) and cluster.show(job)[0]["ExcNodeList"] == "(null)"
    assert cluster.ended(jobs["whole"]) == ("COMPLETED", "0:0", "0"), cluster.output(jobs["whole"])
    (_, metrics, model), (_, expected, whole) = (
        final_state(cluster.work / "runs" / name) for name in (job, jobs["whole"])
    )
    assert metrics == expected and all(torch.equal(value, whole[name]) for name, value in model.items())


def test_a_job_comes_back_without_the_node_that_failed_if_there_are_others(cluster, digits):
    cluster.run("scontrol", "create", "PartitionName=one", "Nodes=n1")
    jobs = {}
    for partition in ("gpu", "one"):
        options = (f"--partition={partition}",)
        jobs[partition] = cluster.submit(
            "requeue.sbatch", CONFIG, "--data.shards", digits, *EPOCHS, nodes=1, options=options
        )
    failed = {}
    for partition, job in jobs.items():
        while not list((cluster.work / "runs" / job).glob("checkpoints/step-*.json")):
            time.sleep(0.05)
        (failed[partition],) = (task["NodeList"] for task in cluster.show(job))
        os.kill(rank_processes(cluster, job)[-1], signal.SIGKILL)
    for partition, job in jobs.items():
        assert cluster.ended(job) == ("COMPLETED", "0:0", "1"), cluster.output(job)
        (task,), node, is_away = cluster.show(job), failed[partition], partition == "gpu"
        assert (task["NodeList"] != node) == is_away
        assert task["ExcNodeList"] == (node if is_away else "(null)")
        said = "the job goes on without it, 1 nodes" if is_away else "it stays, one has 0 other nodes of its kind"
        assert f"Killed on {node}: {said}" in cluster.output(job)


def rank_processes(cluster, job) -> list[int]:
    """The ranks of a job, by their environment: never a process of anybody else."""
    ours = {f"SLURM_CONF={cluster.environment['SLURM_CONF']}", f"SLURM_JOB_ID={job}"}
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            program = Path((entry / "cmdline").read_bytes().decode().split("\0")[0]).name
            environment = set((entry / "environ").read_bytes().decode(errors="replace").split("\0"))
        except OSError:
            continue
        if program.startswith("python") and ours <= environment:
            found.append(int(entry.name))
    return found


def test_staging_copies_once_to_every_node_and_trains_from_there(cluster, jobs):
    if not cluster.has_real_nodes:
        pytest.skip("unshare is not allowed here: the nodes have no storage of their own")
    job = jobs["staged"]
    assert cluster.ended(job) == ("COMPLETED", "0:0", "0"), cluster.output(job)
    place, output = cluster.local / f"hpc_bnn-{job}" / "digits", cluster.output(job)
    copied = re.findall(rf"(\w+): {place}, 2 files copied", output)
    assert sorted(copied) == ["n1", "n2"] and output.count(f"nothing that was staged is left in {place}") == 2
    config = (cluster.work / "runs" / job / "config.yaml").read_text()
    assert f"shards: {place}" in config and "sample_size: 2" in config  # over both nodes: there are 8 samples


def test_an_array_trains_a_seed_per_job(cluster, jobs):
    tasks = cluster.wait(jobs["seeds"])
    assert [task["ExitCode"] for task in tasks] == ["0:0"] * 2, cluster.output(jobs["seeds"])
    runs = [final_state(cluster.work / "runs" / jobs["seeds"] / f"seed-{seed}") for seed in (0, 1)]
    assert runs[0][1] != runs[1][1]  # the mirror: other seeds, other numbers


def test_requeues_are_limited_and_the_exit_code_is_the_programs(cluster, jobs):
    assert cluster.ended(jobs["limited"]) == ("FAILED", "75:0", "1"), cluster.output(jobs["limited"])
    assert "HPC_BNN_MAX_REQUEUES allows no more" in cluster.output(jobs["limited"])
    assert cluster.ended(jobs["wrong"]) == ("FAILED", "2:0", "0"), cluster.output(jobs["wrong"])
    assert cluster.output(jobs["wrong"]).count("--num_epochs 0") == 1


FAULTY = """
import os, sys, time, torch, hpc_bnn, hpc_bnn.comm.stall
hpc_bnn.comm.stall.STALL_SECONDS = 3.0
comm = hpc_bnn.connect(2, "cpu", backend="{backend}")
assert comm.local_size == 2 and comm.library == "{backend}"
comm.sum_(torch.ones(3))
if comm.grid.rank == 3:
    print("FAULT", time.time(), flush=True)
    {fault}
comm.sum_(torch.ones(3))
"""


RAISES, IS_KILLED = "raise RuntimeError('deliberate')", "os.kill(os.getpid(), 9)"


@pytest.mark.parametrize(
    ("launcher", "backend", "fault", "said"),
    [
        ("srun", "horovod", RAISES, "RuntimeError: deliberate"),
        ("srun", "torch", RAISES, "RuntimeError: deliberate"),
        ("srun", "mpi", RAISES, "RuntimeError: deliberate"),
        ("srun", "mpi", "time.sleep(1000)", "has waited 3 s in reduce over data"),
        ("torchrun", "torch", IS_KILLED, "rank 3 on n2 ended with code 137"),
    ],
    ids=["horovod", "torch", "mpi", "mpi_hangs", "torchrun"],
)
def test_a_rank_that_fails_on_the_other_node_ends_the_job(cluster, tmp_path, launcher, backend, fault, said):
    (program := tmp_path / "program.py").write_text(FAULTY.format(fault=fault, backend=backend))
    tasks, runner = 2, ("--mpi=pmix", cluster.python, "-m", "mpi4py")
    if launcher == "torchrun":
        agent = (SCRIPTS / "torchrun.py", "--nnodes", 2, "--nproc-per-node", 2, "--master-port", free_port())
        tasks, runner = 1, (sys.executable, *agent, "--master-addr", node_address(cluster))
    done = cluster.srun("--nodes=2", f"--ntasks-per-node={tasks}", *runner, program)
    ended = time.time()
    assert done.returncode != 0
    assert ended - float(done.stdout.split("FAULT")[1].split()[0]) < patience(10), done.stderr
    assert said in done.stderr


def node_address(cluster) -> str:
    return re.search(r"NodeAddr=(\S+)", cluster.run("scontrol", "show", "node", "-o", "n1"))[1]


def test_nodes_that_do_not_reach_each_other_are_an_error_with_a_remedy(cluster, digits):
    if not cluster.has_networks:
        pytest.skip("unshare --net or ip link is not allowed here: the nodes share the network")
    command = ("-m", "hpc_bnn", "train", "--config", CONFIG, "--data.shards", digits, "--backend", "torch")
    done = cluster.srun(
        "--nodes=2", "--ntasks-per-node=1", "--mpi=pmix", cluster.python, "-m", "mpi4py", *command,
        GLOO_SOCKET_IFNAME="ib0",
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("203.0.113.1 not from rank 1 on n2") == 1
    assert "GLOO_SOCKET_IFNAME=ib0 allows no others" in done.stderr


STOPPING = """
import os, signal, sys, time
from mpi4py import MPI
rank, stopped = MPI.COMM_WORLD.rank, []
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda *_: stopped.append(1))
open(f"ready-{rank}", "w").close()
while not stopped: time.sleep(0.05)
MPI.Finalize()
for number in (signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, signal.SIG_DFL)
time.sleep(2 * rank)
os._exit(75)
"""
"""In the place of hpc_bnn: ranks that leave in order, but not in the same moment."""


@pytest.mark.parametrize("how", ["signalled", "cancelled"])
def test_ranks_that_leave_one_after_another(cluster, tmp_path, how):
    """Signalled, the job's code is theirs; cancelled, it is not requeued, although they leave with code 75."""
    (tmp_path / "hpc_bnn").mkdir()
    (tmp_path / "hpc_bnn/__init__.py").touch()
    (tmp_path / "hpc_bnn/__main__.py").write_text(STOPPING)
    limit = "0" if how == "signalled" else "3"
    there = (f"--chdir={tmp_path}", f"--output={cluster.work}/hpc_bnn_%j.out")
    job = cluster.submit("requeue.sbatch", CONFIG, options=there, HPC_BNN_MAX_REQUEUES=limit, HPC_BNN_VENV=sys.prefix)
    for rank in (0, 1):
        cluster.wait_for(tmp_path / f"ready-{rank}", job)
    if how == "signalled":
        cluster.run("scancel", "--batch", "--signal=USR1", job)
        assert cluster.ended(job) == ("FAILED", "75:0", "0"), cluster.output(job)
    else:
        cluster.run("scancel", job)
        (task,) = cluster.wait(job, 40)
        assert (task["JobState"], task["Restarts"]) == ("CANCELLED", "0"), cluster.output(job)


def test_two_nodes_are_one_rank(cluster, jobs, digits):
    """Each library under srun; torchrun, stopped after the first epoch, requeued and gone on. float64, uneven samples."""
    job = cluster.submit("torchrun.sbatch", CONFIG, "--data.shards", digits, *EXACT, tasks=2, HPC_BNN_SAMPLE_SIZE="2")
    cluster.wait_for(cluster.work / "runs" / job / "metrics.jsonl", job)
    cluster.run("scancel", "--batch", "--signal=USR1", job)
    command = (sys.executable, "-m", "hpc_bnn", "train", "--config", CONFIG, "--data.shards", digits, *EXACT)
    cluster.run(*command, "--run_dir", "one", PYTHONPATH=str(REPOSITORY))
    _, expected_metrics, expected = final_state(cluster.work / "one")
    of_srun = [(jobs[library], library, "0") for library in ("torch", "mpi")]
    for name, library, requeues in (*of_srun, (job, "torch", "1")):
        assert cluster.ended(name) == ("COMPLETED", "0:0", requeues), cluster.output(name)
        summary, metrics, model = final_state(cluster.work / "runs" / name)
        assert summary["grid"]["data_size"] == summary["grid"]["sample_size"] == 2
        assert summary["communication"]["library"] == library
        assert metrics["test/nll"] == pytest.approx(expected_metrics["test/nll"], rel=1e-12)
        for key, value in model.items():
            assert (value - expected[key]).norm() <= 1e-12 * expected[key].norm(), (name, key)
    assert cluster.output(job).count("hpc-bnn: stopped: after step") == 1
    assert "going on from the checkpoint of step" in cluster.output(job)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """An environment with the packages of this one, which are not copied; its Python says where it is from."""
    directory = tmp_path_factory.mktemp("packed")
    venv, archive = directory / "venv", directory / "environment.tar"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    (site,) = venv.glob("lib/*/site-packages")
    says = 'import os, sys; print("PYTHON", sys.prefix, "on", os.environ.get("SLURMD_NODENAME"), file=sys.stderr)'
    (site / "here.pth").write_text(f"{Path(pytest.__file__).parents[1]}\n{says}\n")
    subprocess.run([REPOSITORY / "tools/pack_environment.sh", archive, venv], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(venv)
    return archive


def test_a_packed_environment_runs_from_each_node(cluster, digits, packed):
    data = ("--data.shards", digits, "--max_steps", 2, "--num_test_samples", 2)
    with_mpi = {"LD_LIBRARY_PATH": f"{sys.prefix}/lib"}  # of a wheel
    job = cluster.submit("train.sbatch", CONFIG, *data, HPC_BNN_PACKED_VENV=str(packed), **with_mpi)
    assert cluster.ended(job) == ("COMPLETED", "0:0", "0"), cluster.output(job)
    there = cluster.local / f"hpc_bnn-environment-{job}"
    assert set(re.findall(rf"PYTHON {there} on (\w+)", cluster.output(job))) == {"n1", "n2"}
    left = cluster.run("srun", "--nodes=2", "--ntasks-per-node=1", "ls", "-A", cluster.local)
    assert there.name not in left


def test_a_packed_environment_without_slurm(packed, tmp_path):
    own = {"SLURM_JOB_ID": "", "HPC_BNN_LOCAL_DIR": str(tmp_path / "local"), "HPC_BNN_PACKED_VENV": str(packed)}
    done = library(
        "hpc_bnn_environment && cd / && python -c 'import hpc_bnn; print(hpc_bnn.__file__)'; hpc_bnn_end $?", **own
    )
    assert done.returncode == 0 and done.stdout.startswith(f"{tmp_path}/local/hpc_bnn-environment-"), done.stderr
    assert not os.listdir(tmp_path / "local")
    done = library("hpc_bnn_environment", **own | {"HPC_BNN_PACKED_VENV": "nothing.tar"})
    assert done.returncode == 2 and "HPC_BNN_PACKED_VENV nothing.tar" in done.stderr
    done = subprocess.run([REPOSITORY / "tools/pack_environment.sh", tmp_path / "a.tar", tmp_path], capture_output=True)
    assert done.returncode == 2 and b"is no virtual environment" in done.stderr and not (tmp_path / "a.tar").exists()


def test_a_script_far_from_the_repository_says_so(cluster):
    job = cluster.submit("train.sbatch", CONFIG, nodes=1, HPC_BNN_ROOT="/nowhere")
    assert cluster.ended(job) == ("FAILED", "2:0", "0")
    assert "export HPC_BNN_ROOT=/path/of/it" in cluster.output(job)


OURS = sorted(
    [SCRIPTS / "lib.sh", *(path for part in ("slurm", "pbs", "lsf", "sites") for path in (SCRIPTS / part).iterdir())]
)


@pytest.mark.parametrize("script", OURS, ids=lambda path: path.name)
def test_scripts_are_clean(script):
    if script.suffix == ".md":
        return
    subprocess.run(["bash", "-n", script], check=True)
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run(["shellcheck", "-x", script], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


NUMBERS = (
    "HPC_BNN_RANKS", "HPC_BNN_RANKS_PER_NODE", "HPC_BNN_SAMPLE_SIZE", "HPC_BNN_MASTER_PORT", "HPC_BNN_MAX_REQUEUES",
    "HPC_BNN_TIME_LIMIT", "HPC_BNN_STOP_SECONDS", "SLURM_NTASKS", "SLURM_JOB_NUM_NODES", "SLURM_JOB_ID", "SLURM_RESTART_COUNT",
)  # fmt: skip


def library(command, **variables):
    """Source lib.sh as a batch script does, and run a command."""
    environment = {"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7", **variables}
    script = f"source {SCRIPTS}/lib.sh && {command}"
    return subprocess.run(["bash", "-c", script], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("value", ["a[$(touch PWNED)]", "1+1", "-1", "08x", "PATH", "1;id"])
def test_no_variable_is_evaluated(tmp_path, value, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in NUMBERS:
        done = library("echo ran", **{name: value})
        assert (
            done.returncode == 2
            and f"{name} {value}: must be a whole number" in done.stderr
            and "ran" not in done.stdout
        )
    assert not os.listdir(tmp_path)
    assert library("echo ran", HPC_BNN_RANKS="4", HPC_BNN_TIME_LIMIT="").stdout == "ran\n"


BUS, OTHERS = "srun: error: n2: task 2: Bus error", "srun: error: n1: tasks 0-1: Killed"
ECC = "AcceleratorError: CUDA error: uncorrectable ECC error encountered"


@pytest.mark.parametrize(
    ("said", "failed"),
    [
        ([OTHERS, BUS], "n2 Bus error"),
        (["srun: error: n2: task 2: Segmentation fault (core dumped)"], "n2 Segmentation fault"),
        ([BUS, "srun: error: n1: task 0: Aborted"], ""),
        ([OTHERS, "srun: error: n2: task 2: Exited with exit code 14"], "n1 Killed"),
        ([OTHERS, "srun: error: n2: tasks 2-3: Killed"], ""),
        ([OTHERS, "srun: error: n2: task 2: Exited with exit code 1"], ""),
        ([OTHERS, f"hpc-bnn: error: rank 2 on n2: {ECC}"], "n2 CUDA error: ECC"),
        ([f"hpc-bnn: error: rank 2 on n2.site (and 1 other ranks), writing: {ECC}"], "n2 CUDA error: ECC"),
        ([OTHERS, "hpc-bnn: error: rank 2 on n2: AcceleratorError: CUDA error: device-side assert triggered"], ""),
        (["torchrun: rank 3 on n2 ended with code 137", "torchrun: rank 0 on n1 ended with code 1"], "n2 code 137"),
    ],
)
def test_which_node_failed(tmp_path, said, failed):
    (tmp_path / "out").write_text(
        "\n".join([BUS.replace("n2", "n9"), *said, ""])
    )  # the first line is of a former attempt
    before = len(BUS) + 1
    done = library(f"hpc_bnn_output={tmp_path}/out; hpc_bnn_output_before={before}; hpc_bnn_failed_node")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, failed, "")


OF_SLURM = """
scontrol() {
    case "$1 $2" in
        "show hostnames") echo "$3" | tr , '\\n' ;;
        "show job") echo "JobId=7 ReqNodeList=${NAMED:-(null)} ExcNodeList=${FORMER:-(null)} Features=(null)" ;;
    esac
}
sinfo() { for n in 1 2 3 4; do echo "n$n idle a|(null)|2|4000"; done; echo "n5 drain a|(null)|2|4000"; echo "n6 idle b|(null)|2|4000"; }
hpc_bnn_failed_node() { echo "$FAILED"; }
"""


@pytest.mark.parametrize(
    ("facts", "excluded", "said"),
    [
        ({}, "n2", "the job goes on without it, 3 nodes of its kind are left"),
        ({"FORMER": "n3"}, "n3,n2", "2 nodes of its kind are left"),
        ({"FORMER": "n3,n4"}, "", "it stays, gpu has 1 other nodes of its kind, the job needs 2"),
        ({"FAILED": "n4 Bus error"}, "", None),  # none of this job
        ({"FAILED": "n[1-2] Killed"}, "", None),
        ({"FAILED": "$(id) Bus error"}, "", None),
        ({"FAILED": ""}, "", None),
        ({"NAMED": "n[1-2]"}, "", "asks for nodes by name"),
        ({"record": "n1 Bus error\nn1 Bus error\nn3 Aborted\n"}, "n2", "the job goes on"),
        ({"record": "n1 Bus error\nn3 Bus error\n"}, "", "it seems to be the program"),
    ],
)
def test_which_nodes_are_excluded(tmp_path, facts, excluded, said):
    (tmp_path / "run.failed").write_text(facts.pop("record", ""))
    facts = {"FAILED": "n2 Bus error", "HPC_BNN_RUN_DIR": str(tmp_path / "run"), **facts}
    of_job = {"SLURM_JOB_NODELIST": "n1,n2", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_PARTITION": "gpu"}
    done = library(f"{OF_SLURM} hpc_bnn_nodes_to_exclude", **facts, **of_job)
    assert (done.returncode, done.stdout.strip()) == (0, excluded), done.stderr
    assert said in done.stderr if said else not done.stderr


@pytest.mark.parametrize("shards", ["..", ".", "/", "data/..", "data/."])
def test_shards_are_staged_into_a_directory_of_their_own(shards):
    done = library(f"hpc_bnn_launch() {{ echo launched; }}; hpc_bnn_stage '{shards}'")
    assert done.returncode == 2 and "HPC_BNN_STAGE" in done.stderr and not done.stdout


def test_a_signal_while_the_script_begins_is_remembered():
    assert library("kill -USR1 $$; hpc_bnn_launch train").returncode == 75
