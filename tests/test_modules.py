"""What computing centres install with: a real Lmod loads what tools/install_module.sh writes; eb parses its easyconfigs."""

import ast
import configparser
import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import JOB_SECONDS, REPOSITORY, launch_environment, patience

import hpc_bnn

INSTALL = REPOSITORY / "tools/install_module.sh"
LMOD = next((path for path in Path("/usr/share/lmod").glob("*/init/bash")), None)
NEEDS_LMOD = pytest.mark.skipif(LMOD is None, reason="Lmod is missing: apt install lmod")
"""Where Debian puts Lmod; /usr/share/lmod/lmod is a link to the version."""


def install(prefix, *arguments, **variables):
    return subprocess.run(
        [INSTALL, "--prefix", prefix, *arguments],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=patience(JOB_SECONDS),
    )


def installed(prefix, *arguments):
    done = install(prefix, "--environment", "present", "--python", sys.executable, *arguments)
    assert done.returncode == 0, done.stderr
    return prefix / "modulefiles"


def in_lmod(script, **variables):
    """Run a script in a shell of a user who has Lmod, and a Python and settings of their own."""
    environment = launch_environment() | variables
    environment["PATH"] = "/usr/local/bin:/usr/bin:/bin"  # nothing of the environment that the tests run in
    for name in [*environment]:
        if name.startswith(("LMOD", "_LMFILES", "LOADEDMODULES", "MODULEPATH", "VIRTUAL_ENV")):
            del environment[name]
    script = f"set -e\n. {LMOD}\n{script}"
    return subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, timeout=patience(JOB_SECONDS)
    )


@pytest.fixture(scope="module")
def modulefiles(tmp_path_factory):
    return installed(tmp_path_factory.mktemp("prefix with 'quotes'"), "--depends", "")


@NEEDS_LMOD
def test_load_runs_ranks_and_unload_restores_the_environment(modulefiles, digits):
    snapshot = "env -0 | sort -z | tr '\\0' '\\n' | grep -vE '^(__LMOD|_ModuleTable|LMOD_|_=)'"
    done = in_lmod(
        f"""
        module use "{modulefiles}"
        before=$({snapshot})
        user_python=$(command -v python3)
        module load hpc_bnn
        hpc-bnn --version
        echo root "$HPC_BNN_ROOT" locking "$HDF5_USE_FILE_LOCKING"
        [ "$(command -v python3)" = "$user_python" ] && echo the python stays
        mpirun -np 2 hpc-bnn stage {digits} "$STAGED"
        "$HPC_BNN_PYTHON" -c 'import hpc_bnn; print("own programs", hpc_bnn.__version__)'
        module unload hpc_bnn
        ! command -v hpc-bnn || echo hpc-bnn is still there
        [ "$before" = "$({snapshot})" ] && echo restored
        """,
        HDF5_USE_FILE_LOCKING="BEST_EFFORT",
        STAGED=str(digits.parent / "staged by module"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"hpc_bnn {hpc_bnn.__version__}" in done.stdout
    assert f"root {REPOSITORY} locking FALSE" in done.stdout
    assert "the python stays" in done.stdout
    assert done.stdout.count("files copied") == 1  # one job of two ranks on one node, not two jobs of one
    assert f"own programs {hpc_bnn.__version__}" in done.stdout
    assert "still there" not in done.stdout and done.stdout.rstrip().endswith("restored")


@NEEDS_LMOD
def test_avail_whatis_and_help(modulefiles):
    done = in_lmod(
        f'module use "{modulefiles}"\nmodule -t avail 2>&1\nmodule whatis hpc_bnn 2>&1\nmodule help hpc_bnn 2>&1'
    )
    assert f"hpc_bnn/{hpc_bnn.__version__}" in done.stdout
    assert "Description: trains Bayesian neural networks" in done.stdout
    assert "hpc-bnn doctor" in done.stdout and "$HPC_BNN_ROOT/configs/digits.yaml" in done.stdout


@NEEDS_LMOD
def test_what_was_loaded_when_installing_is_loaded_first(tmp_path):
    for name in ("OpenMPI/5.0.3", "Horovod/0.28.1", "MPICH/4.2"):
        path = tmp_path / "centre" / f"{name}.lua"
        path.parent.mkdir(parents=True)
        path.write_text(f'setenv("LOADED_{path.parent.name}", "{path.stem}")\n')
    done = install(
        tmp_path, "--environment", "present", "--python", sys.executable, "--conflicts", "MPICH",
        LOADEDMODULES="OpenMPI/5.0.3:hpc_bnn/0.0.1:Horovod/0.28.1",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    use = f'module use {tmp_path}/centre "{tmp_path}/modulefiles"\n'
    done = in_lmod(
        f"{use} module load hpc_bnn; echo $LOADED_OpenMPI $LOADED_Horovod; module unload hpc_bnn; module -t list 2>&1"
    )
    assert "5.0.3 0.28.1" in done.stdout and "No modules loaded" in done.stdout
    done = in_lmod(f"{use} module load MPICH; module load hpc_bnn")
    assert done.returncode != 0 and "MPICH" in done.stderr
    done = in_lmod(f'module use "{tmp_path}/modulefiles"\nmodule load hpc_bnn')
    assert done.returncode != 0 and "OpenMPI/5.0.3" in done.stderr  # a module that is missing is named


def test_an_installation_is_all_or_nothing(tmp_path, modulefiles):
    broken = tmp_path / "python"  # its pip fails
    broken.write_text(f'#!/bin/sh\ncase "$1" in -m) exit 1;; esac\nexec {sys.executable} "$@"\n')
    broken.chmod(0o755)
    done = install(tmp_path / "prefix", "--environment", "modules", "--python", broken)
    assert done.returncode == 1 and "pip failed" in done.stderr
    assert not [path for path in (tmp_path / "prefix").rglob("*") if path.is_file()]

    files = {path: path.stat().st_mtime_ns for path in modulefiles.parent.rglob("*")}
    done = install(modulefiles.parent, "--environment", "present", "--python", sys.executable)
    assert done.returncode == 1 and "is there already: remove it" in done.stderr
    assert files == {path: path.stat().st_mtime_ns for path in modulefiles.parent.rglob("*")}
    programs = [path for path in files if path.parent.name == "bin"]
    assert "hpc-bnn" in {path.name for path in programs} and not any(path.is_symlink() for path in programs)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "--prefix PREFIX is missing"),
        (["--prefix"], "--prefix wants a value"),
        (["--prefix", "x", "--environment", "conda"], "--environment conda: must be own, modules or present"),
        (["--prefix", "x", "--python", "/no/python"], "--python /no/python is not there"),
        (["--prefix", "x", "--prefx", "y"], "unknown argument --prefx"),
    ],
)
def test_wrong_arguments(tmp_path, arguments, message):
    done = subprocess.run(
        [INSTALL, *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=patience(JOB_SECONDS)
    )
    assert done.returncode == 1 and message in done.stderr and not [*tmp_path.iterdir()]


MODULES = REPOSITORY / "jobscripts/modules"
SPACK = MODULES / "spack/spack_repo/hpc_bnn/packages"


def minimum_versions():
    """Package name -> oldest version that setup.cfg allows, its extras for users included."""
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    extras = setup["options.extras_require"]
    lines = "\n".join([setup["options"]["install_requires"], extras["plots"], extras["data"]])
    found = re.findall(r"(?m)^([\w-]+)(?:\[\w+\])? >= ([\d.]+)$", lines)
    assert len(found) == len(lines.split("\n")) - lines.count("\n\n") - lines.startswith("\n")
    return {name.lower().replace("_", "-"): as_numbers(version) for name, version in found}


def as_numbers(version):
    return tuple(int(part) for part in re.findall(r"\d+", version))


def test_the_spack_package_asks_for_what_setup_cfg_asks_for():
    tree = ast.parse((SPACK / "py_hpc_bnn/package.py").read_text())
    specs = [
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "depends_on" and isinstance(node.args[0], ast.Constant)
    ]  # fmt: skip
    asked = dict(match.groups() for spec in specs if (match := re.match(r"py-([\w-]+)@([\d.]+):", spec)))
    asked = {name: as_numbers(version) for name, version in asked.items()}
    del asked["setuptools"]
    assert asked == minimum_versions()


@pytest.mark.parametrize("path", sorted(SPACK.glob("*/package.py")), ids=lambda path: path.parent.name)
def test_spack_finds_the_class_of_a_package(path):
    """The directory's name in CamelCase is the class; checked by hand, for Spack is on no package index."""
    (cls,) = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.ClassDef))
    assert cls.name == "".join(word.capitalize() for word in path.parent.name.split("_"))
    assert ast.get_docstring(cls)


def easyconfig(name):
    """The parameters of an easyconfig, which is Python."""
    (path,) = (MODULES / "easybuild").glob(f"{name}-*.eb")
    parameters = {"SYSTEM": "system"}
    exec(path.read_text(), parameters)
    return path, parameters


def test_the_easyconfigs_bring_what_setup_cfg_asks_for():
    path, hpc = easyconfig("hpc_bnn")
    toolchain = f"{hpc['toolchain']['name']}-{hpc['toolchain']['version']}"
    assert path.name == f"hpc_bnn-{hpc_bnn.__version__}-{toolchain}-CUDA-{dict_of(hpc)['cuda']}.eb"
    brought = dict_of(hpc) | {name.lower().replace("_", "-"): version for name, version, _ in hpc["exts_list"]}
    for name, version in minimum_versions().items():
        if name in brought:  # the others are in bundles: comments in the easyconfig say which
            assert as_numbers(brought[name]) >= version, name
    assert {"jsonargparse", "h5py", "mpi4py", "tqdm", "pyyaml", "pytorch"} <= set(brought)


def dict_of(parameters):
    return {dependency[0].lower(): dependency[1] for dependency in parameters["dependencies"]}


def test_horovods_easyconfig_has_the_checksum_of_our_cmake_file():
    _, horovod = easyconfig("Horovod")
    ((_, version, options),) = horovod["exts_list"]
    checksums = {name: digest for entry in options["checksums"] for name, digest in entry.items()}
    hook = REPOSITORY / "tools/horovod.cmake"
    assert checksums[hook.name] == hashlib.sha256(hook.read_bytes()).hexdigest()
    assert (MODULES / "easybuild" / hook.name).resolve() == hook
    assert f"version={version}" in (REPOSITORY / "tools/install_horovod.sh").read_text()


@pytest.mark.skipif(shutil.which("eb") is None, reason="EasyBuild is missing: pip install easybuild")
def test_easybuild_resolves_the_easyconfigs():
    path, _ = easyconfig("hpc_bnn")
    options = ["--dry-run", "--robot", f"{path.parent}:", "--allow-use-as-root-and-accept-consequences"]
    done = subprocess.run(["eb", path, *options], capture_output=True, text=True, timeout=patience(JOB_SECONDS))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "(module: Horovod/0.28.1" in done.stdout and "(module: hpc_bnn/" in done.stdout


def test_the_sections_of_the_container_are_shell_and_name_files_that_exist():
    text = (MODULES / "apptainer/hpc_bnn.def").read_text()
    sections = dict(re.findall(r"(?ms)^%(\w+)\n(.*?)(?=^%|\Z)", text))
    given = set(re.findall(r"(?m)^    (\w+)=", sections["arguments"]))
    assert set(re.findall(r"\{\{ (\w+) \}\}", text)) == given
    for name in ("post", "environment", "runscript", "test"):
        script = re.sub(r"\{\{ \w+ \}\}", "", sections[name])
        subprocess.run(["sh", "-n"], input=script, text=True, check=True, timeout=patience(JOB_SECONDS))
    files = dict(line.split() for line in sections["files"].splitlines() if line.strip())
    assert files["hpc_bnn"] == "/opt/hpc_bnn/hpc_bnn" and "setup.cfg" in files
    assert all((REPOSITORY / source).exists() for source in files)
