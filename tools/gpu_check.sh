#!/bin/sh
# Tests and measurements of a machine with one NVIDIA GPU, in at most six minutes, without the network and without `make setup`.
#
#   PYTHON   a Python whose torch sees the GPU (default: python3)
#   WHEELS   a directory of wheels, for packages that this Python does not have
#   OUT      where the report goes (default: build/gpu-check)
#
# Without a GPU all tests are skipped, with reasons, and nothing is measured.
set -eu
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3} OUT=${OUT:-build/gpu-check} BENCHMARK_SECONDS=${BENCHMARK_SECONDS:-90}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
needed=$("$PYTHON" - <<'PY'
import importlib.util

packages = {"h5py": "h5py", "jinja2": "jinja2", "jsonargparse": "jsonargparse", "docstring_parser": "docstring-parser",
            "typeshed_client": "typeshed-client", "numpy": "numpy", "yaml": "pyyaml", "scipy": "scipy", "tqdm": "tqdm",
            "pytest": "pytest", "hypothesis": "hypothesis", "pytest_timeout": "pytest-timeout", "xdist": "pytest-xdist"}
print(*(package for module, package in packages.items() if importlib.util.find_spec(module) is None))
PY
)
if [ -n "$needed" ]; then
    if [ -z "${WHEELS:-}" ]; then
        echo "gpu-check: this Python has no $needed. Set WHEELS to a directory with their wheels (pip download, on another machine)" >&2
        exit 1
    fi
    # shellcheck disable=SC2086
    "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --upgrade --target "$OUT/packages" $needed
    for peer in torch_blue bayesian_torch; do  # beside which benchmarks/gpu.py measures, where they are
        "$PYTHON" -m pip install --quiet --no-index --no-deps --find-links "$WHEELS" --upgrade --target "$OUT/packages" \
            "$peer" 2>/dev/null || true
    done
fi
export PYTHONPATH="$PWD:$OUT/packages${PYTHONPATH:+:$PYTHONPATH}"
"$PYTHON" setup.py -q build_ext --inplace >"$OUT/build.log" 2>&1 ||
    echo "gpu-check: the C extension was not built ($OUT/build.log); the CPU draws its noise by NumPy" >&2
status=0
# Workers share the GPU: most of a test's time is that of Python
OMP_NUM_THREADS=1 timeout "${TEST_SECONDS:-200}" "$PYTHON" -m pytest tests/gpu -v -ra -p no:cacheprovider -n "${WORKERS:-4}" --durations 12 || status=$?
timeout "$((BENCHMARK_SECONDS + 60))" "$PYTHON" benchmarks/gpu.py --output "$OUT/gpu.md" --seconds "$BENCHMARK_SECONDS" || status=$?
exit $status
