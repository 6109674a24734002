"""Every file operation of a small run fails, or is the last of its process; `benchmarks/faults.py` tries all of them."""

import contextlib
import ctypes
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from conftest import REPOSITORY, patience

import hpc_bnn.models
from hpc_bnn.cli.commands import main
from hpc_bnn.comm import connect_for_files
from hpc_bnn.data import stage_shards, unstage_shards, verify_shards
from hpc_bnn.errors import ConfigError, HpcBnnError
from hpc_bnn.run.checkpoint import CheckpointStore, read_identity, write_identity
from hpc_bnn.run.run_dir import RunDir
from hpc_bnn.safe_files.locks import Lock

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import file_faults
from file_faults import ERRORS, KILLED, Faults, failing, in_child, is_same, kill, predict, result, train

ONE_EPOCH = ("--num_epochs", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The data, and the run and predictions that were left alone."""
    directory = tmp_path_factory.mktemp("faults")
    file_faults.write_data(directory / "data")
    assert train(directory / "data", directory / "whole", *ONE_EPOCH) == 0
    assert predict(directory / "whole", directory / "whole.h5") == 0
    return directory


def operations(directory, work, most=12, of=r".*"):
    """Return numbers of the file operations of some work, each different in more than a random name or a step."""
    faults = Faults(directory)
    with faults.watching():
        work()
    kinds = {}
    for number, (name, path) in enumerate(faults.seen, 1):
        kinds[name, re.sub(r"[0-9a-f]{16,}|step-\d+", "", path)] = number
    found = sorted(number for (name, path), number in kinds.items() if re.fullmatch(of, f"{name} {path}"))
    assert len(found) >= 2
    return found[:: -(-len(found) // most)]


def at(directory, number, act, work):
    with Faults(directory, number, act).watching():
        return work()


def kill_at(directory, number, work, *arguments):
    """Do some work in a process that is killed at a file operation."""
    code, said = in_child(lambda: at(directory, number, kill, lambda: work(*arguments)))
    assert code == KILLED, (number, code, said)


def contents(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def test_a_run_that_is_killed_at_a_file_operation_goes_on_to_the_same_bits(place, tmp_path):
    expected = result(place / "whole")
    numbers = operations(tmp_path, lambda: train(place / "data", tmp_path / "count", *ONE_EPOCH))
    for number in numbers:
        run = tmp_path / f"run-{number}"
        words = (place / "data", run, *ONE_EPOCH, "--resume", "true")
        kill_at(tmp_path, number, train, *words)
        assert train(*words) == 0, number
        assert is_same(result(run), expected), number
        assert not list(tmp_path.glob(f".{run.name}.*")) and not list(run.rglob(".step*"))
        shutil.rmtree(run)


def test_an_error_at_a_file_operation_of_a_resume_is_said_and_loses_nothing(place, tmp_path, capsys):
    """Code 0 and the right numbers, or another code, the name of a file, and a resume that goes on as if nothing had been."""
    begun, expected = tmp_path / "begun", result(place / "whole")
    assert train(place / "data", begun, *ONE_EPOCH, "--max_steps", "2") == 0
    shutil.copytree(begun, tmp_path / "count")

    def resume(run):
        return train(place / "data", run, *ONE_EPOCH, "--resume", "true")

    numbers = operations(tmp_path, lambda: resume(tmp_path / "count"))
    for number, (name, error) in zip(numbers, itertools.cycle(ERRORS.items())):
        run = tmp_path / f"run-{number}"
        shutil.copytree(begun, run)
        capsys.readouterr()
        code = at(tmp_path, number, failing(error), lambda run=run: resume(run))
        said = capsys.readouterr().err
        assert code in (0, 1) and "Traceback" not in said, (number, name, said)
        assert code == 0 or f"run-{number}" in said, (number, name, said)
        if code:
            assert {path.name for path in (run / "checkpoints").glob("*.json")}, (number, name)
            assert resume(run) == 0
        assert is_same(result(run), expected), (number, name)
        shutil.rmtree(run)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("file", ["step-00000002.pt", "step-00000002.json", "checkpoints", "run.json", "config.yaml"])
def test_what_cannot_be_read_ends_a_resume_and_changes_nothing(place, tmp_path, capsys, file, error):
    run = tmp_path / "run"
    assert train(place / "data", run, *ONE_EPOCH, "--max_steps", "2", "--checkpoint.keep_last", "3") == 0
    before = contents(run)
    faults = Faults(run)

    def fail(operation, path):
        if path.endswith(file) and operation in ("open", "listdir"):
            faults._is_inside = False
            raise OSError(ERRORS[error], "injected", path)

    faults._at = lambda operation, path, half=None: fail(operation, str(path))
    with faults.watching():
        assert train(place / "data", run, *ONE_EPOCH, "--resume", "true") == 1
    assert file in capsys.readouterr().err
    assert contents(run) == before
    assert train(place / "data", run, *ONE_EPOCH, "--resume", "true") == 0
    assert is_same(result(run), result(place / "whole"))


def test_a_start_in_an_empty_directory_that_is_killed_goes_on_there(place, tmp_path):
    """The directory stays, with the rights and the striping that the user has given it."""

    def begin(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return train(place / "data", tmp_path / name, *ONE_EPOCH, "--resume", "true")

    for number in operations(tmp_path, lambda: begin("count"), 8, r"\w+ /count/\.?(lock|run|manifest|config).*"):
        run = tmp_path / str(number)
        run.mkdir()
        inode = run.stat().st_ino
        kill_at(tmp_path, number, begin, run.name)
        assert begin(run.name) == 0 and run.stat().st_ino == inode
        assert is_same(result(run), result(place / "whole"))
        assert {path.name for path in run.iterdir()} == {path.name for path in (place / "whole").iterdir()}


ROWS = {
    "half a row": lambda rows: [*rows, b'{"epoch": 4, "st'],
    "NUL bytes": lambda rows: [*rows, b"\0" * 100],
    "half a row in the middle": lambda rows: [b'{"ep', *rows],
    "no text": lambda rows: [b"\xff\xfe", *rows, b"\x80"],
    "other values": lambda rows: [b"[]", b"3", b'{"epoch": "one"}', b"{}", b'{"epoch": 1, "run": "another"}', *rows],
    "a row of an epoch that goes on": lambda rows: [*rows, b'{"epoch": 2, "step": 9}'],
    "none": lambda rows: [],
    "nested": lambda rows: [*rows, b"[" * 100_000],
}


@pytest.fixture(scope="module")
def two_epochs(place):
    """The run of two epochs, and what it was after the first."""
    assert train(place / "data", place / "two") == 0
    assert train(place / "data", place / "one of two", "--max_steps", "3") == 0
    return result(place / "two"), place / "one of two"


@pytest.mark.parametrize("how", ROWS)
def test_rows_that_cannot_be_read_are_left_out(place, two_epochs, tmp_path, how):
    run, (expected, begun) = tmp_path / "run", two_epochs
    shutil.copytree(begun, run)
    path = run / "metrics.jsonl"
    path.write_bytes(b"\n".join(ROWS[how](path.read_bytes().splitlines())))
    assert train(place / "data", run, "--resume", "true") == 0
    assert is_same(result(run), expected)


def test_predictions_that_are_killed_leave_the_whole_file_or_none(place, tmp_path):
    expected = result(place / "whole", place / "whole.h5")
    numbers = operations(tmp_path, lambda: predict(place / "whole", tmp_path / "count.h5"))
    for number in numbers:
        output = tmp_path / f"{number}.h5"
        kill_at(tmp_path, number, predict, place / "whole", output)
        assert output.exists() or predict(place / "whole", output) == 0
        assert is_same(result(place / "whole", output), expected)


@pytest.mark.parametrize("keep_last", [1, 2])
def test_a_checkpoint_that_is_written_again_is_there_at_every_moment(tmp_path, keep_last):
    def state(number):
        place = {"num_steps": 2}
        return {"model": {}, "optimizer": {}, "schedule": {}, "place": place, "generator": "", "config": {"n": number}}

    def begin(name):
        store = CheckpointStore(tmp_path / name, keep_last)
        for step in (1, 2):
            store.save(state(step), step)
        return store

    store = begin("count")
    for number in operations(tmp_path, lambda: store.save(state(3), 2)):
        again = begin(str(number))
        kill_at(tmp_path, number, again.save, state(3), 2)
        found = CheckpointStore(tmp_path / str(number), keep_last).load_newest(falls_back=False)
        assert found["place"]["num_steps"] == 2 and found["config"]["n"] in (2, 3)
        again.save(state(4), 3)
        assert again.load_newest()["config"]["n"] == 4 and len(again.notes()) == keep_last
        assert len(list((tmp_path / str(number)).iterdir())) == 2 * keep_last


def test_staging_that_is_killed_anywhere_goes_on(place, tmp_path):
    comm = connect_for_files()
    (tmp_path / "other").mkdir()
    file_faults.write_data(tmp_path / "other", num_files=2)

    def stage(name, data):
        stage_shards(data, tmp_path / name, comm)
        return 0

    def restage(name):  # other shards lie there
        return stage(name, place / "data")

    stage("count", tmp_path / "other")
    for number in operations(tmp_path, lambda: restage("count")):
        name = str(number)
        stage(name, tmp_path / "other")
        kill_at(tmp_path, number, restage, name)
        restage(name)
        assert verify_shards(tmp_path / name) == []
        assert unstage_shards(tmp_path / name, comm) == [] and not (tmp_path / name).exists()


# --- two runs, one directory ----------------------------------------------------------------------------


@pytest.mark.parametrize("resume", ["true", "false"])
def test_a_directory_in_use_is_refused(place, tmp_path, capsys, resume):
    run = tmp_path / "run"
    assert train(place / "data", run, *ONE_EPOCH) == 0
    with Lock(run, "run_dir"):
        before = contents(run)
        assert train(place / "data", run, *ONE_EPOCH, "--resume", resume) == 2
        assert "in use by process" in capsys.readouterr().err
        assert contents(run) == before
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_of_two_runs_that_begin_at_once_one_gets_the_directory(tmp_path):
    first, second = RunDir(tmp_path / "run"), RunDir(tmp_path / "run")
    for run in (first, second):
        run.open(resumes=False)  # nothing is there
    first.begin("{}", "seed: 1")
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="another process has made it in the meantime"):
        second.begin("{}", "seed: 2")
    assert contents(tmp_path) == before and os.listdir(tmp_path) == ["run"]
    first.close()


@pytest.mark.parametrize("how", ["another run begins", "the directory is moved", "the directory is removed"])
def test_a_run_that_lost_its_directory_writes_no_more(place, tmp_path, capsys, how):
    numbers = operations(
        tmp_path, lambda: train(place / "data", tmp_path / "count", *ONE_EPOCH), 4, r"open /count/(\.lock|run\.json)"
    )
    for number in numbers:
        run, moved = tmp_path / f"run-{number}", tmp_path / f"moved-{number}"
        after = {}

        def lose(operation, path, run=run, moved=moved, after=after):
            if how == "the directory is removed":
                shutil.rmtree(run)
                return
            run.rename(moved)
            if how == "another run begins":
                run.mkdir()
                write_identity(run)
                Lock(run, "run_dir")._over.set()
                after.update(contents(run))

        with contextlib.suppress(HpcBnnError):
            code = at(tmp_path, number, lose, lambda run=run: train(place / "data", run, *ONE_EPOCH))
        said = capsys.readouterr().err
        if after:
            assert contents(run).items() >= after.items() and not (run / "checkpoints").exists(), number
        assert code == 1 or "summary.json" not in {p.name for p in run.glob("*")}, (number, code, said)


def test_the_identity_is_everywhere(place, tmp_path):
    identity = read_identity(place / "whole")
    assert (place / "whole/config.yaml").read_text().startswith(f"# run {identity}\n")
    for name in ("metrics.jsonl", "summary.json"):
        assert identity in (place / "whole" / name).read_text()
    for note in CheckpointStore(place / "whole/checkpoints").notes():
        assert note.run == identity


def test_a_config_of_another_run_is_refused(place, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(place / "whole", run)
    write_identity(run, "c" * 32)
    assert train(place / "data", run, *ONE_EPOCH, "--resume", "true") == 1
    assert "two runs are mixed" in capsys.readouterr().err


# --- a rank that hangs ----------------------------------------------------------------------------------


class Hang:
    """A transform of a user, which comes to no end: it lets other threads run, or not."""

    def __init__(self, how):
        self.how = how

    def __call__(self, x, *_):
        time.sleep(600) if self.how == "sleep" else ctypes.PyDLL(None).sleep(600)


@pytest.mark.parametrize("how", ["sleep", "hold the interpreter"])
def test_code_of_a_user_that_hangs_ends_the_job_with_its_traceback(place, tmp_path, how):
    transform = f"[{{name: test_faults.Hang, how: {how}}}]"
    flags = ("--augmentation.transforms", transform, "--stall_seconds", "0.5")
    code, said = in_child(lambda: train(place / "data", tmp_path / "run", *flags))
    assert "in __call__" in said and "test_faults.py" in said and "rank 0 on" in said and "made no progress" in said
    assert code == (1 if how == "sleep" else -signal.SIGABRT) and "augment.py" in said, said


class Sleeper(hpc_bnn.models.MLP):
    """A network of a user, which comes to no end in evaluation mode where a file is there."""

    def __init__(self, *arguments, file, **options):
        super().__init__(*arguments, **options)
        self.file = file

    def forward(self, x):
        while not self.training and os.path.exists(self.file):
            time.sleep(0.1)
        return super().forward(x)


def test_a_network_that_hangs_ends_an_evaluation_and_a_prediction(place, tmp_path):
    run, file = tmp_path / "run", tmp_path / "file"
    model = ("--model.name", "test_faults.Sleeper", "--model.arguments", f"{{hidden: [8], file: {file}}}")
    assert train(place / "data", run, *ONE_EPOCH, *model) == 0
    file.touch()
    for command in (["evaluate"], ["predict", "--output", str(tmp_path / "p.h5")]):
        words = [command[0], str(run), *command[1:], "--stall_seconds", "0.5"]
        code, said = in_child(lambda words=words: main(words))
        assert code == 1 and "has made no progress" in said and "test_faults.py" in said, said
    assert not list(tmp_path.glob("*p*.h5"))
    file.unlink()
    assert main(["evaluate", str(run), "--stall_seconds", "60"]) == 0


WAITS = {
    "in a collective": "stall.STALL_SECONDS = 2.0\nwith stall.Waiting('a sum'): begin(time.sleep)",
    "in Python": "with stall.StallWatch(2.0, 0): begin(time.sleep)",
    "in an extension": "with stall.StallWatch(0.5, 0): begin(ctypes.PyDLL(None).sleep)",
}
"""What waits for ever, for two seconds."""


def test_time_in_which_a_job_is_suspended_does_not_count():
    """Each is stopped for longer than it may wait; then it is still there, and ends after what was left."""
    jobs = {}
    for where, code in WAITS.items():
        begin = "def begin(sleep): print('begun', flush=True); sleep(1000)"
        program = f"import ctypes, time\nfrom hpc_bnn.comm import stall\n{begin}\n{code}"
        pipe = subprocess.PIPE
        jobs[where] = subprocess.Popen([sys.executable, "-c", program], stdout=pipe, stderr=pipe, text=True)
    for job in jobs.values():
        assert job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGSTOP)
    time.sleep(4)
    for job in jobs.values():
        job.send_signal(signal.SIGCONT)
    time.sleep(0.3)  # a job whose time is over ends within 0.2 s
    assert [where for where, job in jobs.items() if job.poll() is not None] == []
    for where, job in jobs.items():
        _, said = job.communicate(timeout=patience(60))
        assert job.returncode == (-signal.SIGABRT if where == "in an extension" else 1), said
        assert ("has waited 2 s in a sum" if where == "in a collective" else "has made no progress") in said, said


def test_a_limit_that_is_kept_changes_nothing(place, tmp_path):
    assert train(place / "data", tmp_path / "run", *ONE_EPOCH, "--stall_seconds", "60") == 0
    assert is_same(result(tmp_path / "run"), result(place / "whole"))
