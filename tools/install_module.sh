#!/bin/sh
# Install hpc_bnn for other users: PREFIX/software/hpc_bnn/VERSION, and an Lmod module for it.
#
#     tools/install_module.sh --prefix PREFIX [--environment own|modules|present] [--python PYTHON]
#                             [--depends "NAME/VERSION ..."] [--conflicts "NAME ..."] [--add-missing]
#
# --environment own      a copy of this tree and its own environment, made as by tools/setup.sh (the default)
#               modules  pip install --no-deps on top of the loaded modules for Python, MPI, torch and Horovod
#               present  installs nothing: the module points to this tree and its .venv
# --python       the Python to use (default: python3; present: .venv/bin/python)
# --depends      modules that this module loads first (default: the modules that are loaded now; "" for none)
# --conflicts    modules that must not be loaded together with it, such as other MPIs
# --add-missing  with modules: also install missing requirements of hpc_bnn, but never torch, mpi4py or h5py
#
# First load the modules to build with. docs/centre.md explains everything.
set -eu

here=$(cd "$(dirname "$0")/.." && pwd)
prefix= environment=own python= conflicts= add_missing=
depends=$(echo "${LOADEDMODULES:-}" | tr : '\n' | grep -v '^hpc_bnn/' | tr '\n' ' ' || true)

fail() { echo "install_module: $1" >&2; exit 1; }

while [ $# -gt 0 ]; do
    case $1 in
        --prefix | --environment | --python | --depends | --conflicts) [ $# -gt 1 ] || fail "$1 wants a value" ;;
    esac
    case $1 in
        --prefix) prefix=$2; shift ;;
        --environment) environment=$2; shift ;;
        --python) python=$2; shift ;;
        --depends) depends=$2; shift ;;
        --conflicts) conflicts=$2; shift ;;
        --add-missing) add_missing=1 ;;
        -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
        *) fail "unknown argument $1: see tools/install_module.sh --help" ;;
    esac
    shift
done
[ -n "$prefix" ] || fail "--prefix PREFIX is missing: the directory that gets software/ and modulefiles/"
case $environment in
    own | modules) python=${python:-python3} ;;
    present) python=${python:-$here/.venv/bin/python} ;;
    *) fail "--environment $environment: must be own, modules or present" ;;
esac
command -v "$python" >/dev/null || fail "--python $python is not there: make setup makes .venv, a module may bring python3"

umask 022  # for others to read
mkdir -p "$prefix" || fail "--prefix $prefix cannot be made: choose a directory that you may write to"
prefix=$(cd "$prefix" && pwd)
version=$(sed -n 's/^__version__ = "\(.*\)"$/\1/p' "$here/hpc_bnn/__init__.py")
[ -n "$version" ] || fail "hpc_bnn/__init__.py has no __version__: the tree is not complete"
home=$prefix/software/hpc_bnn/$version
[ ! -e "$home" ] || fail "$home is there already: remove it first, no job may be using it"
modulefile=$prefix/modulefiles/hpc_bnn/$version.lua

# Install everything or nothing: write the modulefile last, and remove an incomplete installation
complete=
trap '[ -n "$complete" ] || rm -rf "$home"' EXIT
trap 'exit 1' HUP INT TERM
mkdir -p "$home"

copy() { for name in "$@"; do cp -R "$here/$name" "$home/"; done; find "$home" -name __pycache__ -exec rm -rf {} +; }
beside="configs data_prep docs examples jobscripts tools LICENSE README.md CHANGELOG.md CITATION.cff"

pip() { # install ...
    command=$1; shift
    "$python" -m pip --disable-pip-version-check "$command" -q --prefix "$home" --no-warn-script-location "$@"
}

add_hpc_bnn() { # over the loaded modules, into $home
    "$python" -c 'import torch, mpi4py, h5py, pip' || fail "Python with pip, torch, mpi4py and h5py must be loaded first"
    # setuptools writes into the tree that it builds from
    mkdir "$home/.build" && cp -R "$here/hpc_bnn" "$here/setup.cfg" "$here/pyproject.toml" "$here/README.md" "$here/LICENSE" "$home/.build/"
    isolation=$("$python" -c 'import setuptools, wheel; print("--no-build-isolation" if int(setuptools.__version__.split(".")[0]) >= 77 else "")' 2>/dev/null || true)
    # --ignore-installed: with --prefix alone pip removes another hpc_bnn that is loaded
    pip install --no-deps --ignore-installed $isolation "$home/.build" ||
        fail "pip failed: offline it needs setuptools >= 77 and wheel in the environment, or a wheelhouse in PIP_FIND_LINKS (docs/centre.md)"
    rm -rf "$home/.build"
    site=$(dirname "$(dirname "$(find "$home" -path '*-packages/hpc_bnn/__init__.py')")")
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
    if [ -n "$add_missing" ]; then
        # pip must not replace a loaded package
        "$python" -m pip list --format freeze >"$home/.loaded"
        pip install --constraint "$home/.loaded" "hpc_bnn==$version" ||
            fail "pip cannot add what is missing without replacing what is loaded: load newer modules"
        rm "$home/.loaded"
    fi
    missing=$("$python" -m pip check | grep -i '^hpc[-_]bnn ' || true)
    [ -z "$missing" ] || fail "$missing
install_module: load modules that have it, or --add-missing"
}

site=
case $environment in
    own)
        # shellcheck disable=SC2086
        copy $beside hpc_bnn benchmarks tests Makefile pyproject.toml ruff.toml setup.cfg
        PYTHON=$python "$home/tools/setup.sh"
        bin=$home/bin root=$home python=$home/.venv/bin/python
        "$python" -m compileall -q "$home/hpc_bnn" ;;
    modules)
        # shellcheck disable=SC2086
        copy $beside
        add_hpc_bnn
        root=$home bin=$(dirname "$(find "$home" -path '*/bin/hpc-bnn')") ;;
    present)
        bin=$home/bin root=$here ;;
esac
python=$("$python" -c 'import sys; print(sys.executable)')
venv=$("$python" -c 'import sys; print(sys.prefix if sys.prefix != sys.base_prefix else "")')
if [ "$environment" != modules ]; then
    # Only these come onto the PATH, not python and pip: users keep their own
    mkdir -p "$bin"
    for tool in hpc-bnn mpirun mpiexec; do
        [ -x "$venv/bin/$tool" ] || continue
        # Not a link: MPICH's mpirun looks for its helpers in the directory of the called file
        quoted=$(printf '%s' "$venv/bin/$tool" | sed "s/'/'\\\\''/g")
        printf "#!/bin/sh\nexec '%s' \"\$@\"\n" "$quoted" >"$bin/$tool"
        chmod 755 "$bin/$tool"
    done
fi
found=$("$bin/hpc-bnn" --version) ||
    fail "hpc-bnn --version failed in the new environment: $found"
case $found in *"$version"*) ;; *) fail "hpc-bnn --version says '$found', not $version" ;; esac

mkdir -p "$(dirname "$modulefile")"
"$python" - "$here/jobscripts/modules/lmod/hpc_bnn.lua.in" "$modulefile" \
    "$version" "$root" "$bin" "$python" "$venv" "$site" "$depends" "$conflicts" <<'PY'
import json, os, string, sys
template, path, version, root, bin, python, venv, site, depends, conflicts = sys.argv[1:]
def lua(text):
    return json.dumps(text, ensure_ascii=False)
def calls(function, names):
    return "".join(f"{function}({lua(name)})\n" for name in names.split())
with open(template, encoding="utf-8") as file:
    text = string.Template(file.read()).substitute(
        version=version, root=lua(root), bin=lua(bin), python=lua(python),
        conflicts=calls("conflict", conflicts), depends=calls("depends_on", depends),
        venv=f'setenv("HPC_BNN_VENV", {lua(venv)})\n' if venv else "",
        site=f'prepend_path("PYTHONPATH", {lua(site)})\n' if site else "",
    )
with open(path + ".new", "w", encoding="utf-8") as file:
    file.write(text)
os.replace(path + ".new", path)
PY
complete=1
echo "install_module: $modulefile"
echo "    module use $prefix/modulefiles && module load hpc_bnn/$version && hpc-bnn --version"
