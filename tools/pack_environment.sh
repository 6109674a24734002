#!/bin/sh
# Pack an environment with hpc_bnn into one file, for batch jobs that unpack it on each node (HPC_BNN_PACKED_VENV, jobscripts/lib.sh).
#
#     tools/pack_environment.sh environment.tar [VENV]        (default: .venv of the repository)
#
# A start opens thousands of files on every rank; of a packed environment, one. The Python that the environment was made with must
# be on the nodes. An installation that refers to this repository gets a copy of hpc_bnn. It needs GNU tar.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
archive=${1:?the name of a file is needed, such as environment.tar}
venv=${2:-$root/.venv}
if ! [ -x "$venv/bin/python" ] || ! [ -f "$venv/pyvenv.cfg" ]; then
    echo "pack_environment: $venv is no virtual environment. Name one, or run make setup" >&2
    exit 2
fi
packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib", vars={"base": "."}))')
trap 'rm -f "$archive.part"' EXIT
tar -C "$venv" --exclude='__editable__*hpc_bnn*' -cf "$archive.part" .
[ -d "$venv/$packages/hpc_bnn" ] || tar -C "$root" --transform "s,^,$packages/," -rf "$archive.part" hpc_bnn
mv "$archive.part" "$archive"
trap - EXIT
echo "$archive: $(($(wc -c <"$archive") / 1000000)) MB"
