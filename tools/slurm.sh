#!/bin/bash
# A separate Slurm on this machine to try batch scripts: one slurmctld, and nodes that are slurmd processes.
#
#     tools/slurm.sh start DIR      as root; needs slurm-wlm, munge, libpmix-dev (apt) and an empty or missing DIR
#     export SLURM_CONF=DIR/slurm.conf; sinfo; sbatch ...
#     tools/slurm.sh stop DIR       ends the daemons of `start`, and nothing else
#
# NODES=2, CPUS=4 (per node). WITH_PID=PID: also stop when that process ends. Exit code 3: a program is not installed.
# It has its own ports, munge key and socket, so it does not affect another Slurm of the machine.
# Each node has its own host name (n1, n2) and its own storage at DIR/local, as MPI and staging expect on a cluster, and
# its own network: eth0 on a bridge, and a hosts file in which its own name is 127.0.1.1, as on Debian.
# If the machine does not allow this (unshare, ip link), `start` prints a message. Every wait has a time limit.
set -euo pipefail

fail() { echo "slurm.sh: $1" >&2; exit "${2:-1}"; }

free_ports() {
    python3 -c 'import socket, sys
sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(int(sys.argv[1]))]
print(*(s.getsockname()[1] for s in sockets))' "$1"
}

wait_until() { # SECONDS WHAT COMMAND...
    local end=$((SECONDS + $1)) what=$2
    shift 2
    until "$@" >/dev/null 2>&1; do
        if [ "$SECONDS" -ge "$end" ]; then
            echo "slurm.sh: $what: not within the time" >&2
            return 1
        fi
        sleep 0.2
    done
}

write_configuration() {
    local host i address
    host=$(hostname)
    # cred_expire: seconds after which a requeued job may start again (the default is 120)
    cat >"$dir/slurm.conf" <<CONF
ClusterName=hpc_bnn
SlurmctldHost=$host($(address_of 254))
SlurmctldPort=${ports[0]}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket=$dir/munge.socket,cred_expire=5
StateSaveLocation=$dir/state
SlurmctldPidFile=$dir/slurmctld.pid
SlurmctldLogFile=$dir/slurmctld.log
SlurmdSpoolDir=$dir/spool-%n
SlurmdPidFile=$dir/slurmd-%n.pid
SlurmdLogFile=$dir/slurmd-%n.log
TmpFS=$dir/tmp-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MpiDefault=pmix
ReturnToService=2
SchedulerParameters=sched_interval=2,batch_sched_delay=0
KillWait=5
MinJobAge=3600
JobCompType=jobcomp/filetxt
JobCompLoc=$dir/completed.txt
PartitionName=gpu Nodes=ALL Default=YES MaxTime=INFINITE State=UP
CONF
    for ((i = 1; i <= nodes; i++)); do # TmpFS per node, or PMIx directories collide
        address=$(address_of "$i")
        echo "NodeName=n$i NodeHostname=$host NodeAddr=$address Port=${ports[i]} CPUs=$cpus CoresPerSocket=$cpus RealMemory=4000 State=UNKNOWN"
        mkdir -p "$dir/spool-n$i" "$dir/tmp-n$i" "$dir/local-n$i"
        write_hosts "$i" >"$dir/hosts-n$i"
    done >>"$dir/slurm.conf"
}

write_hosts() { # N: of that node
    local i
    echo "127.0.0.1 localhost"
    echo "127.0.1.1 n$1"
    for ((i = 1; i <= nodes; i++)); do
        if [ "$i" != "$1" ]; then echo "$(address_of "$i") n$i"; fi
    done
    echo "$(address_of 254) $(hostname)"
}

address_of() { # N: of a node, 254 for this machine
    # 198.18.0.0/15 is for trials of networks (RFC 2544); two Slurms of one machine have different ports
    if $own_network; then echo "198.$((18 + ports[0] / 256 % 2)).$((ports[0] % 256)).$1"; else echo 127.0.0.1; fi
}

choose_namespaces() {
    own_namespaces=true own_network=true
    unshare --mount --uts true 2>/dev/null || {
        own_namespaces=false
        echo "slurm.sh: unshare is not allowed here: the nodes share host name and storage" >&2
    }
    if ! { $own_namespaces && unshare --net ip link set lo up && ip link add "$bridge" type bridge; } 2>/dev/null; then
        own_network=false
        echo "slurm.sh: unshare --net or ip link is not allowed here: the nodes share the network" >&2
    fi
}

start_network() {
    $own_network || return 0
    echo "$bridge" >"$dir/bridge"
    ip address add "$(address_of 254)/24" dev "$bridge"
    ip link set "$bridge" up
}

start_node() { # N: with its own host name, storage, shared memory and network, if the machine allows it
    local name=n$1
    if $own_network; then
        # shellcheck disable=SC2016  # expanded by that sh
        unshare --mount --uts --net sh -ec '
            hostname "$1"
            mount --bind "$2/local-$1" "$2/local"
            mount --bind "$2/hosts-$1" /etc/hosts
            ip link set lo up
            ip link add eth0 type veth peer name "$4$1" netns "$3" # it goes when this network does
            ip address add "$5/24" dev eth0
            ip link set eth0 up
            nsenter --net="/proc/$3/ns/net" ip link set "$4$1" master "$4" up
            exec slurmd -N "$1"' sh "$name" "$dir" $$ "$bridge" "$(address_of "$1")"
    elif $own_namespaces; then
        # shellcheck disable=SC2016  # expanded by that sh
        unshare --mount --uts sh -ec 'hostname "$1"; mount --bind "$2/local-$1" "$2/local"; exec slurmd -N "$1"' \
            sh "$name" "$dir"
    else
        slurmd -N "$name"
    fi
}

start() {
    [ "$(id -u)" = 0 ] || fail "root is needed: slurmd starts jobs for other users" 3
    for program in munged slurmctld slurmd sbatch; do
        command -v $program >/dev/null || fail "$program is missing: apt install --no-install-recommends slurm-wlm munge libpmix-dev" 3
    done
    [ ${#dir} -le 80 ] || fail "$dir: too long for the name of a socket; take one of at most 80 characters"
    [ ! -e "$dir/slurm.conf" ] || fail "$dir holds a Slurm already: tools/slurm.sh stop $dir"
    mkdir -p "$dir/state" "$dir/local"
    trap 'tail -n 5 "$dir"/*.log >&2; stop; fail "not started"' ERR
    read -ra ports <<<"$(free_ports $((nodes + 1)))"
    bridge=slurm${ports[0]}
    choose_namespaces
    write_configuration
    start_network
    export SLURM_CONF=$dir/slurm.conf
    (umask 077 && head -c 1024 /dev/urandom >"$dir/munge.key")
    munged --force --key-file="$dir/munge.key" --socket="$dir/munge.socket" --pid-file="$dir/munged.pid" \
        --log-file="$dir/munged.log" --seed-file="$dir/munge.seed" --num-threads=2 2>>"$dir/munged.log"
    wait_until 5 munged test -S "$dir/munge.socket"
    slurmctld
    for ((i = 1; i <= nodes; i++)); do start_node "$i"; done
    wait_until 30 "$nodes idle nodes" sh -c "[ \"\$(sinfo -h -N -t idle -o %N | wc -l)\" = $nodes ]"
    # slurmd goes on without it, and the first srun then waits for ever
    if grep -q 'can not load PMIx' "$dir"/slurmd-*.log; then
        stop
        fail "srun --mpi=pmix finds no libpmix.so: apt install --no-install-recommends libpmix-dev" 3
    fi
    if [ -n "${WITH_PID:-}" ]; then
        # shellcheck disable=SC2016  # expanded by that sh
        setsid sh -c 'while kill -0 "$1" 2>/dev/null; do sleep 1; done; rm -f "$3/watch.pid"; "$2" stop "$3"' \
            sh "$WITH_PID" "$(realpath "$0")" "$dir" >/dev/null 2>&1 &
        echo $! >"$dir/watch.pid"
    fi
    echo "export SLURM_CONF=$dir/slurm.conf"
}

is_ours() { # PID
    tr '\0' '\n' 2>/dev/null <"/proc/$1/environ" | grep -qx "SLURM_CONF=$dir/slurm.conf"
}

end_daemons() { # PIDFILE...
    local file pid
    local -A pids=()
    for file in "$@"; do
        [ -e "$file" ] || continue
        pid=$(cat "$file")
        if is_ours "$pid"; then pids[$file]=$pid; else rm -f "$file"; fi # it may have outlived its process
    done
    for pid in "${pids[@]}"; do kill "$pid" 2>/dev/null || true; done
    for file in "${!pids[@]}"; do
        pid=${pids[$file]}
        wait_until 5 "end of $file" sh -c "! kill -0 $pid" || kill -9 "$pid" 2>/dev/null || true
        rm -f "$file"
    done
}

stop() {
    local file
    if [ -e "$dir/slurm.conf" ] && [ -e "$dir/slurmctld.pid" ]; then # the jobs first: slurmd leaves them running
        SLURM_CONF=$dir/slurm.conf timeout 5 scancel --partition=gpu 2>/dev/null || true
        wait_until 8 "end of the jobs" sh -c "[ -z \"\$(SLURM_CONF=$dir/slurm.conf timeout 3 squeue -h)\" ]" || true
    fi
    end_daemons "$dir/watch.pid" "$dir"/slurmd-*.pid "$dir/slurmctld.pid"
    end_daemons "$dir/munged.pid" # last: the others talk through it
    for file in /proc/[0-9]*; do # steps whose slurmd is gone
        if [ "$(cat "$file/comm" 2>/dev/null)" = slurmstepd ] && is_ours "${file#/proc/}"; then
            kill -9 "${file#/proc/}" 2>/dev/null || true
        fi
    done
    if [ -e "$dir/bridge" ]; then
        ip link delete "$(cat "$dir/bridge")" 2>/dev/null || true
        rm -f "$dir/bridge"
    fi
}

[ $# = 2 ] || { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0" >&2; exit 2; }
nodes=${NODES:-2} cpus=${CPUS:-4}
dir=$(realpath -m "$2")
case $1 in
    start) start ;;
    stop) stop ;;
    *) fail "$1: must be start or stop" ;;
esac
