"""Names, directories, files and locks: nothing is lost, nobody is let in."""

import json
import os
import re
import threading
import time

import pytest
from conftest import patience

from hpc_bnn.errors import ConfigError, DataError
from hpc_bnn.safe_files import (
    append_line,
    check_can_write,
    is_plain,
    locks,
    make_own_directory,
    publish,
    read_bytes,
    refuse_world_writable,
    remove_leftovers,
    replacing,
    write_atomically,
)
from hpc_bnn.safe_files.locks import LOCK, Lock


@pytest.mark.parametrize("name", ["train-00000.h5", "step-00000001.1.pt", "a", "-", "Größe-1.h5"])
def test_a_plain_name(name):
    assert is_plain(name)


@pytest.mark.parametrize(
    "name",
    [
        "",
        ".",
        "..",
        ".hidden",
        "a/b",
        "/a",
        "../a",
        "a\\b",
        "a\0",
        "a\n",
        "a b",
        "~",
        "$(id)",
        "a" * 256,
        None,
        3,
        ["a"],
    ],
    ids=repr,
)
def test_a_name_that_leads_elsewhere_is_not_plain(name):
    assert not is_plain(name)


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr("secrets.token_hex", lambda count: "00" * count)  # somebody has guessed it
    os.symlink(victim, tmp_path / f".file.{'00' * 8}")
    with pytest.raises(FileExistsError):
        write_atomically(tmp_path / "file", "theirs")
    assert victim.read_text() == "mine" and not (tmp_path / "file").exists()


def test_a_temporary_name_differs_each_time_and_nothing_is_left(tmp_path):
    seen = set()
    for _ in range(3):
        with replacing(tmp_path / "file") as temporary:
            seen.add(temporary)
            assert temporary.exists() and not (tmp_path / "file").is_symlink()
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "file"):
        _ = 1 / 0
    assert len(seen) == 3 and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_pipe_or_a_device_takes_the_content_and_is_not_replaced(tmp_path):
    """`--output /dev/null` of root would make a file of it for the whole machine."""
    os.mkfifo(pipe := tmp_path / "pipe")
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    check_can_write(pipe, "--output")
    write_atomically(pipe, "text")
    assert os.read(reader, 10) == b"text" and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]
    os.close(reader)
    (link := tmp_path / "null").symlink_to(os.devnull)
    check_can_write(link, "--output")
    write_atomically(link, "text")
    assert link.is_symlink()


def test_a_name_in_dev_that_stands_for_a_file_is_refused(tmp_path, monkeypatch):
    """Such as /dev/stdout of `hpc-bnn report RUN_DIR --output /dev/stdout > page.html`."""
    (tmp_path / "stdout").symlink_to(tmp_path / "page.html")
    monkeypatch.setattr("os.path.realpath", lambda path: "/dev" if path == tmp_path else str(path))
    with pytest.raises(DataError, match="stands for a file: name that"):
        check_can_write(tmp_path / "stdout", "--output")
    with pytest.raises(OSError, match="stands for a file: name that"):
        write_atomically(tmp_path / "stdout", "text")
    assert (tmp_path / "stdout").is_symlink()


def test_new_files_are_never_writable_by_every_user(tmp_path):
    former = os.umask(0)
    try:
        write_atomically(tmp_path / "file", "")
        append_line(tmp_path / "rows", "{}")
    finally:
        os.umask(former)
    assert all(not path.stat().st_mode & 0o002 for path in tmp_path.iterdir())


@pytest.mark.parametrize("has_links", [True, False])
def test_a_file_that_is_there_is_not_published_over(tmp_path, monkeypatch, has_links):
    if not has_links:

        def refuse(*_):
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refuse)
    for name, text in (("new", "new"), ("old", "old")):
        (tmp_path / name).write_text(text)
    with pytest.raises(FileExistsError):
        publish(tmp_path / "new", tmp_path / "old", overwrites=False)
    assert (tmp_path / "old").read_text() == "old"
    publish(tmp_path / "new", tmp_path / "other", overwrites=False)
    assert (tmp_path / "other").read_text() == "new" and not (tmp_path / "new").exists()


def test_what_cannot_be_read_is_not_taken_for_what_is_not_there(tmp_path):
    assert read_bytes(tmp_path / "nothing", "the file") is None
    with pytest.raises(DataError, match=r"cannot be read .* does not mean that it is damaged"):
        read_bytes(tmp_path, "the file")


def test_a_row_goes_on_a_line_of_its_own_after_half_a_row(tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(b'{"a": 1}\n{"b"\0\0')
    append_line(path, '{"c": 3}')
    assert path.read_bytes().splitlines()[-1] == b'{"c": 3}'


def test_leftovers_of_our_names_alone_are_removed(tmp_path):
    ours, theirs = [".a.h5.123", f".a.h5.{'0f' * 8}"], [".a.h5.swp", ".b.txt.123", "a.h5.123", ".a.h5", ".bashrc"]
    for name in (*ours, *theirs):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, re.compile(r"\w+\.h5"))
    assert sorted(os.listdir(tmp_path)) == sorted(theirs)


# --- directories ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", [0o755, 0o775, 0o2770, 0o700])
def test_directories_of_a_colleague_or_a_group_work(tmp_path, mode):
    tmp_path.chmod(mode)
    refuse_world_writable(tmp_path, "the directory")


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o702])
def test_a_directory_that_everyone_may_write_is_refused(tmp_path, mode):
    tmp_path.chmod(mode)
    with pytest.raises(DataError, match="may be written by every user"):
        refuse_world_writable(tmp_path, "the directory")


def test_a_staging_directory_is_the_users_own(tmp_path):
    make_own_directory(tmp_path / "deep/er")
    assert all((tmp_path / name).stat().st_mode & 0o777 == 0o700 for name in ("deep", "deep/er"))
    (tmp_path / "deep/er").chmod(0o755)
    make_own_directory(tmp_path / "deep/er")
    assert (tmp_path / "deep/er").stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize(
    "mode, owner, parent_mode, parent_owner",
    [(0o777, None, 0o755, None), (0o700, 4321, 0o755, None), (0o700, None, 0o777, None), (0o700, None, 0o755, 4321)],
    ids=["open to all", "of another user", "in one open to all", "in one of another user"],
)
def test_a_staging_directory_that_another_user_can_replace_is_refused(
    tmp_path, monkeypatch, mode, owner, parent_mode, parent_owner
):
    directory = tmp_path / "parent/stage"
    directory.mkdir(parents=True)
    directory.chmod(mode)
    directory.parent.chmod(parent_mode)
    usual, owners = os.stat, {str(directory): owner, str(directory.parent): parent_owner}

    def stat(path, **options):  # of this user all belong to this user
        found = list(usual(path, **options))
        found[4] = owners.get(str(path)) or found[4]
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(DataError, match="could replace what is staged"):
        make_own_directory(directory)


def test_a_sticky_directory_such_as_tmp_may_hold_the_staging_directory(tmp_path):
    tmp_path.chmod(0o1777)
    make_own_directory(tmp_path / "stage")


# --- locks ----------------------------------------------------------------------------------------------


def test_a_directory_has_one_owner(tmp_path):
    with Lock(tmp_path, "run_dir") as lock:
        with pytest.raises(ConfigError, match=rf"run_dir .*in use by process {os.getpid()} on"):
            Lock(tmp_path, "run_dir")
        lock.check()
    assert not os.listdir(tmp_path)
    Lock(tmp_path, "run_dir").release()


def of_a_dead_process(directory, **changes):
    """Leave a lock as a killed process does, with changes."""
    child = os.fork()
    if child == 0:
        Lock(directory, "run_dir")
        os._exit(9)
    os.waitpid(child, 0)
    path = directory / LOCK
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path


def test_the_lock_of_a_process_that_was_killed_is_taken_at_once(tmp_path):
    of_a_dead_process(tmp_path)
    Lock(tmp_path, "run_dir").release()
    assert not os.listdir(tmp_path)


def test_a_new_process_of_the_same_number_is_another_one(tmp_path):
    of_a_dead_process(tmp_path, process=os.getpid(), started=1)
    Lock(tmp_path, "run_dir").release()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"token": "../../x"}', "\0\0"])
def test_a_lock_that_says_nothing_is_taken_when_it_is_old(tmp_path, monkeypatch, content):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    (tmp_path / LOCK).write_text(content)
    start = time.monotonic()
    Lock(tmp_path, "run_dir").release()
    assert time.monotonic() - start > 0.4 and not os.listdir(tmp_path)


def test_the_lock_of_another_host_is_taken_when_its_owner_gives_no_sign_of_life(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.5)
    of_a_dead_process(tmp_path, kernel="another", host="node7", job="SLURM_JOB_ID=5")
    Lock(tmp_path, "run_dir").release()
    assert "on node7, job SLURM_JOB_ID=5 gave no sign of life" in caplog.text


@pytest.mark.parametrize("shift", [-7200, 0, 7200], ids=["clock behind", "same clock", "clock ahead"])
def test_the_lock_of_another_host_that_lives_is_respected_whatever_the_clocks_say(tmp_path, monkeypatch, shift):
    """The mark of life is the server's time, and so is what it is compared with: the clock of this host plays no part."""
    path = of_a_dead_process(tmp_path, kernel="another", host="node7")
    monkeypatch.setattr(time, "time", lambda usual=time.time: usual() + shift)
    over = threading.Event()

    def beat():
        while not over.wait(0.2):
            os.utime(path)

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(ConfigError, match=r"in use by process .* on node7"):
            Lock(tmp_path, "run_dir")
    finally:
        over.set()
        thread.join()


def test_an_owner_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    with Lock(tmp_path, "run_dir") as lock:
        os.utime(lock.path, (1, 1))
        end = time.monotonic() + patience(10)
        while lock.path.stat().st_mtime < 2:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize("change", ["taken", "removed", "moved"])
def test_an_owner_that_lost_its_directory_notices_and_takes_nothing_back(tmp_path, change):
    directory = tmp_path / "run"
    directory.mkdir()
    lock = Lock(directory, "run_dir")
    if change == "taken":
        lock.path.write_text(json.dumps({"token": "b" * 32, "process": 1, "host": "node7"}))
    elif change == "removed":
        lock.path.unlink()
    else:
        directory.rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="no longer that of this process"):
        lock.check()
    lock.release()
    assert (directory / LOCK).exists() == (change == "taken")


def test_of_several_takers_of_a_dead_lock_one_gets_it(tmp_path):
    of_a_dead_process(tmp_path)
    begin = time.time() + 0.3

    def take():
        time.sleep(max(0, begin - time.time()))
        try:
            Lock(tmp_path, "run_dir")
        except ConfigError:
            os._exit(0)
        time.sleep(3)  # the others see that it lives, on a slow machine, too
        os._exit(1)

    takers = []
    for _ in range(6):
        takers.append(os.fork())
        if takers[-1] == 0:
            try:
                take()
            finally:
                os._exit(2)  # never back into pytest
    assert sum(os.waitstatus_to_exitcode(os.waitpid(taker, 0)[1]) for taker in takers) == 1
