# shellcheck shell=bash
# What the batch scripts share. They source it; what differs at a centre is set by the environment, before sbatch/qsub/bsub:
#
#   HPC_BNN_ROOT            the repository, for this file and .venv         (default: where the job was submitted)
#   HPC_BNN_MODULES         modules to load, "GCC/12 OpenMPI/5 PyTorch/2"   (default: none)
#   HPC_BNN_VENV            virtual environment to activate                 (default: HPC_BNN_ROOT/.venv where it exists)
#   HPC_BNN_PACKED_VENV     file of tools/pack_environment.sh, to unpack     (default: none; HPC_BNN_VENV is used where it lies)
#                           in HPC_BNN_LOCAL_DIR of each node instead
#   HPC_BNN_LAUNCHER        srun, mpirun, torchrun (under Slurm, no MPI),   (default: srun under Slurm, otherwise mpirun)
#                           or a whole command that starts the ranks,
#                           "mpiexec -n 8 --ppn 4"
#   HPC_BNN_MASTER_PORT     port of the first node, for torchrun            (default: 10000 + the job modulo 20000)
#   HPC_BNN_LAUNCHER_FLAGS  further flags of it                             (default: none)
#   HPC_BNN_SRUN_MPI        value of srun --mpi; "site" gives no --mpi      (default: pmix where srun has it, otherwise site)
#   HPC_BNN_RANKS           ranks of the job                                (default under Slurm: its tasks)
#   HPC_BNN_RANKS_PER_NODE  ranks of a node                                 (default under Slurm: tasks over nodes)
#   HPC_BNN_SAMPLE_SIZE     ranks of a sample group                         (default: the most for which there are samples)
#   HPC_BNN_RUN_DIR         directory of the run                            (default: runs/JOB, for an array runs/JOB/seed-N)
#   HPC_BNN_RESUME          go on from a checkpoint in it: true or false    (default: true)
#   HPC_BNN_LOCAL_DIR       storage of each node, for staging               (default: TMPDIR, otherwise /tmp)
#   HPC_BNN_MAX_REQUEUES    how often a job that stopped with code 75 is    (default: 0; 20 in the requeue scripts)
#                           put into the queue again
#   HPC_BNN_RETRY           put a job that failed into the queue again, too, (default: false; true in the requeue scripts)
#                           if it has written a checkpoint: true or false;
#                           under Slurm without a node that failed
#   HPC_BNN_TIME_LIMIT      seconds of the job, where the scheduler sends   (default: none)
#                           no signal before its time limit
#   HPC_BNN_STOP_SECONDS    so long before it training stops                (default: 300)
#   HPC_BNN_STAGE           shard directory to copy to every node first     (default: none)
#
# A script calls hpc_bnn_job CONFIG [FLAGS]; or, in this order, hpc_bnn_environment, hpc_bnn_stage, hpc_bnn_train or
# hpc_bnn_evaluate, and hpc_bnn_end STATUS.

hpc_bnn_stop_received=
trap 'hpc_bnn_stop_received=1' USR1

hpc_bnn_say() { echo "hpc_bnn: $*" >&2; }

# hpc_bnn_check_numbers NAME...: end the job unless each variable is empty or a whole number. Bash evaluates what stands in
# $((...)), also a command in it, so nothing else gets there.
hpc_bnn_check_numbers() {
    local name
    for name in "$@"; do
        case ${!name:-0} in
            *[!0-9]*)
                hpc_bnn_say "$name ${!name}: must be a whole number. Set it to one, or unset it"
                exit 2
                ;;
        esac
    done
}
hpc_bnn_check_numbers HPC_BNN_RANKS HPC_BNN_RANKS_PER_NODE HPC_BNN_SAMPLE_SIZE HPC_BNN_MASTER_PORT HPC_BNN_MAX_REQUEUES \
    HPC_BNN_TIME_LIMIT HPC_BNN_STOP_SECONDS SLURM_JOB_ID SLURM_NTASKS SLURM_JOB_NUM_NODES SLURM_RESTART_COUNT

# --- where this job is -----------------------------------------------------------------------------------------

if [ -n "${SLURM_JOB_ID:-}" ]; then
    hpc_bnn_scheduler=slurm hpc_bnn_job=$SLURM_JOB_ID
    HPC_BNN_RANKS=${HPC_BNN_RANKS:-${SLURM_NTASKS:-1}}
    HPC_BNN_RANKS_PER_NODE=${HPC_BNN_RANKS_PER_NODE:-$((HPC_BNN_RANKS / ${SLURM_JOB_NUM_NODES:-1}))}
    hpc_bnn_default_run_dir=runs/$SLURM_JOB_ID
    if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
        hpc_bnn_default_run_dir=runs/$SLURM_ARRAY_JOB_ID/seed-$SLURM_ARRAY_TASK_ID
    fi
elif [ -n "${PBS_JOBID:-}" ]; then
    hpc_bnn_scheduler=pbs hpc_bnn_job=${PBS_JOBID%%.*}
elif [ -n "${LSB_JOBID:-}" ]; then
    hpc_bnn_scheduler=lsf hpc_bnn_job=$LSB_JOBID
else
    hpc_bnn_scheduler=none hpc_bnn_job=$$
fi
HPC_BNN_RANKS=${HPC_BNN_RANKS:-1}
HPC_BNN_RANKS_PER_NODE=${HPC_BNN_RANKS_PER_NODE:-$HPC_BNN_RANKS}
HPC_BNN_RUN_DIR=${HPC_BNN_RUN_DIR:-${hpc_bnn_default_run_dir:-runs/$hpc_bnn_job}}

# Load modules, activate the environment, and see that hpc_bnn is in it.
hpc_bnn_environment() {
    if [ -n "${HPC_BNN_MODULES:-}" ]; then
        # shellcheck disable=SC2086  # several modules
        module load $HPC_BNN_MODULES || return
    fi
    local venv=${HPC_BNN_VENV:-${HPC_BNN_ROOT:-.}/.venv}
    if [ -n "${HPC_BNN_PACKED_VENV:-}" ]; then
        hpc_bnn_unpack || return
    elif [ -f "$venv/bin/activate" ]; then
        # shellcheck source=/dev/null
        source "$venv/bin/activate"
    elif [ -n "${HPC_BNN_VENV:-}" ]; then
        hpc_bnn_say "HPC_BNN_VENV $venv: there is no bin/activate in it"
        return 2
    fi
    export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}
    if [ -n "${SLURM_CPUS_PER_TASK:-}" ]; then # srun does not take it from sbatch
        export SRUN_CPUS_PER_TASK=${SRUN_CPUS_PER_TASK:-$SLURM_CPUS_PER_TASK}
    fi
    export HDF5_USE_FILE_LOCKING=${HDF5_USE_FILE_LOCKING:-FALSE} # parallel file systems
    local needed=(hpc_bnn mpi4py)
    if [ "${HPC_BNN_LAUNCHER:-}" = torchrun ]; then needed=(hpc_bnn torch); fi
    python -c 'import importlib.util as u, sys; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' "${needed[@]}" || {
        hpc_bnn_say "$(command -v python || echo 'no python') has not all of ${needed[*]}: set HPC_BNN_MODULES or HPC_BNN_VENV"
        return 2
    }
    hpc_bnn_say "job $hpc_bnn_job on $(hostname), $HPC_BNN_RANKS ranks, $HPC_BNN_RANKS_PER_NODE per node, $(hpc_bnn_count_requeues) requeues so far"
}

# Run a command once on each node.
hpc_bnn_on_nodes() {
    local nodes=${SLURM_JOB_NUM_NODES:-$(((HPC_BNN_RANKS + HPC_BNN_RANKS_PER_NODE - 1) / HPC_BNN_RANKS_PER_NODE))}
    if [ $hpc_bnn_scheduler = slurm ]; then
        env -u SRUN_CPUS_PER_TASK -u SLURM_CPUS_PER_TASK srun --mpi=none --ntasks="$nodes" --ntasks-per-node=1 "$@"
    elif [ "$nodes" = 1 ]; then
        "$@"
    else
        mpirun -np "$nodes" --map-by ppr:1:node "$@"
    fi
}

# Unpack HPC_BNN_PACKED_VENV on each node, and take it as the environment; hpc_bnn_end removes it.
hpc_bnn_unpack() {
    local archive=$HPC_BNN_PACKED_VENV
    if ! [ -f "$archive" ]; then
        hpc_bnn_say "HPC_BNN_PACKED_VENV $archive: there is no such file. Make it with tools/pack_environment.sh"
        return 2
    fi
    hpc_bnn_unpacked=${HPC_BNN_LOCAL_DIR:-${TMPDIR:-/tmp}}/hpc_bnn-environment-$hpc_bnn_job
    # mkdir without -p: a directory that somebody else has put there is none to run programs from
    # shellcheck disable=SC2016  # the shell of each node expands it
    hpc_bnn_on_nodes sh -ec 'umask 077; rm -rf "$1"; mkdir -p "${1%/*}"; mkdir "$1"' sh "$hpc_bnn_unpacked" || return
    if [ $hpc_bnn_scheduler = slurm ] && command -v sbcast >/dev/null; then # by a tree: one node reads the file
        sbcast --force "$archive" "$hpc_bnn_unpacked/packed.tar" || return
        archive=$hpc_bnn_unpacked/packed.tar
    fi
    # shellcheck disable=SC2016
    hpc_bnn_on_nodes sh -ec 'tar -xf "$2" -C "$1"; rm -f "$1/packed.tar"' sh "$hpc_bnn_unpacked" "$archive" || return
    unset PYTHONHOME
    export VIRTUAL_ENV=$hpc_bnn_unpacked PATH=$hpc_bnn_unpacked/bin:$PATH
}

# --- starting the ranks ----------------------------------------------------------------------------------------

# Set the array hpc_bnn_launch_line: the command that starts Python on the ranks.
hpc_bnn_choose_launcher() {
    local launcher=${HPC_BNN_LAUNCHER:-} mpi=${HPC_BNN_SRUN_MPI:-} variable
    local program=(python -m mpi4py)
    if [ -z "$launcher" ]; then
        if [ $hpc_bnn_scheduler = slurm ]; then launcher=srun; else launcher=mpirun; fi
    fi
    case $launcher in
        srun)
            # A rank that fails ends the job: at once by PMIx and mpi4py, a minute after the first one that left otherwise. Not
            # --kill-on-bad-exit=1: where all ranks leave with code 75 it kills those that are last, and the job's code is 143.
            # Block placement keeps a sample group inside a node, where its size divides the ranks of one.
            hpc_bnn_launch_line=(srun --kill-on-bad-exit=0 --wait=60 --distribution=block)
            if [ -z "$mpi" ] && srun --mpi=list 2>&1 | grep -qw pmix; then mpi=pmix; fi
            if [ "${mpi:-site}" != site ]; then hpc_bnn_launch_line+=("--mpi=$mpi"); fi
            # The tree of Slurm's PMIx (22.05) lets a node leave a fence that the other has not entered, and a rank of Open MPI
            # that is still in MPI_Init crashes on the first message: 1 start in 30 on a loaded machine, none by the ring.
            export SLURM_PMIX_FENCE=${SLURM_PMIX_FENCE:-ring}
            ;;
        mpirun)
            hpc_bnn_launch_line=(mpirun -np "$HPC_BNN_RANKS")
            if mpirun --version 2>&1 | grep -q 'Open MPI'; then # other nodes: the environment as here
                for variable in PATH LD_LIBRARY_PATH PYTHONPATH OMP_NUM_THREADS HDF5_USE_FILE_LOCKING; do
                    if [ -n "${!variable:-}" ]; then hpc_bnn_launch_line+=(-x "$variable"); fi
                done
                hpc_bnn_launch_line+=(--map-by "ppr:$HPC_BNN_RANKS_PER_NODE:node" --bind-to none)
            fi
            ;;
        torchrun)
            # One task per node, with all cores of the job there: a number per task would be held against that of sbatch.
            # The first node by the address that Slurm itself reaches it by.
            if [ $hpc_bnn_scheduler != slurm ]; then
                hpc_bnn_say "HPC_BNN_LAUNCHER torchrun: only under Slurm. Elsewhere name a whole command"
                return 2
            fi
            # Only ranks that know it are heard: the ports of torch are open to the network of the nodes
            HPC_BNN_SECRET=${HPC_BNN_SECRET:-$(od -An -N16 -tx1 /dev/urandom | tr -d ' ')}
            export HPC_BNN_SECRET
            local first address
            first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
            address=$(scontrol show node -o "$first" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p')
            hpc_bnn_launch_line=(env -u SRUN_CPUS_PER_TASK -u SLURM_CPUS_PER_TASK srun --kill-on-bad-exit=0 --wait=60
                --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none)
            program=(python "$HPC_BNN_ROOT/jobscripts/torchrun.py" --nnodes "$SLURM_JOB_NUM_NODES"
                --nproc-per-node "$HPC_BNN_RANKS_PER_NODE" --master-addr "${address:-$first}"
                --master-port "${HPC_BNN_MASTER_PORT:-$((10000 + hpc_bnn_job % 20000))}")
            ;;
        *) read -ra hpc_bnn_launch_line <<<"$launcher" ;;
    esac
    local flags
    read -ra flags <<<"${HPC_BNN_LAUNCHER_FLAGS:-}"
    hpc_bnn_launch_line+=("${flags[@]}" "${program[@]}")
}

# Run an hpc-bnn command on all ranks; the status is the program's. SIGUSR1 to the batch script is passed on.
hpc_bnn_launch() {
    local status hpc_bnn_launch_line
    if [ -n "$hpc_bnn_stop_received" ]; then
        hpc_bnn_say "asked to stop before $1 began"
        return 75
    fi
    hpc_bnn_choose_launcher || return
    "${hpc_bnn_launch_line[@]}" -m hpc_bnn "$@" &
    local child=$! is_interrupted
    # Only train knows the signal, others would die of it: they end, and what comes after does not begin
    # shellcheck disable=SC2064  # this child
    if [ "$1" = train ]; then
        trap "is_interrupted=1 hpc_bnn_stop_received=1; kill -USR1 $child" USR1
    else
        trap 'is_interrupted=1 hpc_bnn_stop_received=1' USR1
    fi
    while :; do # wait returns when a signal comes, too
        is_interrupted=
        wait "$child"
        status=$?
        [ -n "$is_interrupted" ] || break
    done
    trap 'hpc_bnn_stop_received=1' USR1
    if [ "$status" != 0 ] && [ "$1" != train ] && [ -n "$hpc_bnn_stop_received" ]; then
        status=75 # LSF signals the ranks as well: what they had begun is to be done again
    fi
    return "$status"
}

# --- what a script does ----------------------------------------------------------------------------------------

# hpc_bnn_train CONFIG [FLAGS]
hpc_bnn_train() {
    local config=${1:?a config file is needed, such as configs/digits.yaml} sample_size
    shift
    sample_size=${HPC_BNN_SAMPLE_SIZE:-max}
    local flags=(--grid.sample_size "$sample_size" --run_dir "$HPC_BNN_RUN_DIR" --resume "${HPC_BNN_RESUME:-true}")
    if [ -n "${hpc_bnn_staged:-}" ]; then flags+=(--data.shards "$hpc_bnn_staged"); fi
    if [ -n "${HPC_BNN_TIME_LIMIT:-}" ]; then
        local left=$((HPC_BNN_TIME_LIMIT - ${HPC_BNN_STOP_SECONDS:-300} - SECONDS))
        if [ "$left" -le 0 ]; then
            hpc_bnn_say "HPC_BNN_TIME_LIMIT $HPC_BNN_TIME_LIMIT: no time is left after $SECONDS s and HPC_BNN_STOP_SECONDS ${HPC_BNN_STOP_SECONDS:-300}"
            return 2
        fi
        flags+=(--max_seconds "$left")
    fi
    hpc_bnn_first_note=$(hpc_bnn_newest_note)
    hpc_bnn_output=$(readlink "/proc/$$/fd/2") # what srun and the ranks say is there
    hpc_bnn_output_before=
    if [ -f "$hpc_bnn_output" ]; then hpc_bnn_output_before=$(wc -c <"$hpc_bnn_output"); fi
    hpc_bnn_launch train --config "$config" "${flags[@]}" "$@"
}

# The note of the newest checkpoint of the run, such as step-00000100.json; nothing where there is none.
hpc_bnn_newest_note() {
    (cd "$HPC_BNN_RUN_DIR/checkpoints" 2>/dev/null && ls) | grep -xE 'step-[0-9]+\.json' | sort -t- -k2 -n | tail -n 1
}

# hpc_bnn_evaluate RUN_DIR [FLAGS]
hpc_bnn_evaluate() {
    : "${1:?the directory of a run is needed}"
    hpc_bnn_launch evaluate "$@"
}

# hpc_bnn_stage SHARDS: copy them to every node; hpc_bnn_train reads them there, hpc_bnn_end removes them.
hpc_bnn_stage() {
    local shards=${1:?a shard directory is needed, such as data/digits}
    local name
    name=$(basename -- "$shards")
    case $name in
        . | .. | /)
            hpc_bnn_say "HPC_BNN_STAGE $shards: must end with the name of a directory. Name data/digits, for example"
            return 2
            ;;
    esac
    hpc_bnn_staged=${HPC_BNN_LOCAL_DIR:-${TMPDIR:-/tmp}}/hpc_bnn-$hpc_bnn_job/$name
    hpc_bnn_launch stage "$shards" "$hpc_bnn_staged"
}

# hpc_bnn_job CONFIG [FLAGS]: train from beginning to end, from the storage of the nodes where HPC_BNN_STAGE names shards.
hpc_bnn_job() {
    hpc_bnn_environment || hpc_bnn_end $?
    if [ -n "${HPC_BNN_STAGE:-}" ]; then hpc_bnn_stage "$HPC_BNN_STAGE" || hpc_bnn_end $?; fi
    hpc_bnn_train "$@"
    hpc_bnn_end $?
}

# Refuse a sample group that would lie across nodes: its ranks exchange more often than the data groups do.
hpc_bnn_check_sample_group() {
    local size=${HPC_BNN_SAMPLE_SIZE:-$HPC_BNN_RANKS_PER_NODE}
    if [ $((HPC_BNN_RANKS_PER_NODE % size)) != 0 ]; then
        hpc_bnn_say "HPC_BNN_SAMPLE_SIZE $size: must divide the $HPC_BNN_RANKS_PER_NODE ranks of a node, or a sample group lies across nodes"
        return 2
    fi
    hpc_bnn_say "grid of $size x $((HPC_BNN_RANKS / size)), $((HPC_BNN_RANKS_PER_NODE / size)) sample groups inside each node"
}

# --- the end ---------------------------------------------------------------------------------------------------

# Slurm counts itself; elsewhere the number stands beside the run.
hpc_bnn_count_requeues() {
    case $hpc_bnn_scheduler in
        slurm) echo "${SLURM_RESTART_COUNT:-0}" ;;
        *) grep -xE '[0-9]{1,6}' "$HPC_BNN_RUN_DIR.requeues" 2>/dev/null || echo 0 ;;
    esac
}

# hpc_bnn_end STATUS: remove what was staged and unpacked, requeue a run that stopped with code 75, and exit with the program's status.
hpc_bnn_end() {
    local status=$1 count excluded=
    if [ -n "${hpc_bnn_staged:-}" ]; then
        hpc_bnn_stop_received= # a few files: there is time for it
        hpc_bnn_launch stage --clean - "$hpc_bnn_staged" || hpc_bnn_say "$hpc_bnn_staged stays on some node"
    fi
    if [ -n "${hpc_bnn_unpacked:-}" ]; then
        hpc_bnn_on_nodes rm -rf "$hpc_bnn_unpacked" || hpc_bnn_say "$hpc_bnn_unpacked stays on some node"
    fi
    count=$(hpc_bnn_count_requeues)
    local why="stopped with a checkpoint"
    if [ "$status" != 75 ] && hpc_bnn_may_retry "$status"; then
        why="failed with status $status after the checkpoint $(hpc_bnn_newest_note)"
        if [ "$count" -lt "${HPC_BNN_MAX_REQUEUES:-0}" ]; then
            status=75 excluded=$(hpc_bnn_nodes_to_exclude)
        else hpc_bnn_say "$why"; fi
    fi
    if [ "$status" = 75 ] && [ "${HPC_BNN_MAX_REQUEUES:-0}" != 0 ]; then
        if [ "$count" -lt "$HPC_BNN_MAX_REQUEUES" ]; then
            hpc_bnn_say "$why in $HPC_BNN_RUN_DIR; requeue $((count + 1)) of at most $HPC_BNN_MAX_REQUEUES"
            if [ -n "$excluded" ]; then trap '' TERM; fi # which the requeue sends; only a job that waits takes the list
            hpc_bnn_requeue "$count" || { hpc_bnn_say "the scheduler refused; submit again with HPC_BNN_RUN_DIR=$HPC_BNN_RUN_DIR"; exit 1; }
            if [ -n "$excluded" ]; then
                scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$excluded" || hpc_bnn_say "Slurm refused to exclude $excluded"
            fi
        else
            hpc_bnn_say "requeued $count times, HPC_BNN_MAX_REQUEUES allows no more; to go on, submit with HPC_BNN_RUN_DIR=$HPC_BNN_RUN_DIR"
            if [ $hpc_bnn_scheduler = lsf ]; then status=1; fi # code 75 would be requeued
        fi
    fi
    exit "$status"
}

# hpc_bnn_may_retry STATUS: whether a training that failed has come further since this job began. A node or a link that was lost can
# have any status; what the input causes comes again before a new checkpoint, and a wrong request (2) and Ctrl-C (130) are not retried.
hpc_bnn_may_retry() {
    case $1 in 0 | 2 | 130) return 1 ;; esac
    [ "${HPC_BNN_RETRY:-false}" = true ] && [ -n "${hpc_bnn_first_note+set}" ] && [ "$(hpc_bnn_newest_note)" != "$hpc_bnn_first_note" ]
}

# --- a node that failed (Slurm) --------------------------------------------------------------------------------

# Print the node whose fault the failure of this training seems to be, and what happened there ("n2 Bus error"); nothing where
# several nodes come into question, or the program. Of SIGKILL srun says the same about ranks that Slurm has ended after another.
hpc_bnn_failed_node() {
    local said found
    if [ -z "${hpc_bnn_output_before:-}" ]; then return 0; fi # a terminal or a pipe
    said=$(tail -c "+$((hpc_bnn_output_before + 1))" "$hpc_bnn_output")
    found=$(sed -nE -e 's/^srun: error: ([^ :]+): tasks? [-0-9,]+: (Bus error|Segmentation fault|Aborted|Illegal instruction).*/\1 \2/p' \
        -e 's/^torchrun: rank [0-9]+ on ([^ .]+)[^ ]* ended with (code 13[24-79])$/\1 \2/p' \
        -e 's/^hpc-bnn: .*rank [0-9]+ on ([^ ,:.]+).* (CUDA|HIP) error: .*(ECC|NVLink|hardware).*/\1 \2 error: \3/p' <<<"$said")
    if [ -z "$found" ] && ! grep -qE '^hpc-bnn: .*error: |: Exited with exit code 1$' <<<"$said"; then
        found=$(sed -nE 's/^srun: error: ([^ :]+): tasks? [-0-9,]+: (Killed)$/\1 \2/p' <<<"$said")
    fi
    if [ "$(cut -d' ' -f1 <<<"$found" | sort -u | wc -l)" = 1 ]; then head -n 1 <<<"$found"; fi
}

# Print the nodes that the job shall wait without: those of before and the one that failed; nothing where that stays as it is.
# A node stays where another one was not free of the same error either, or where the job might find too few nodes and wait for ever.
hpc_bnn_nodes_to_exclude() {
    local failed node what record=$HPC_BNN_RUN_DIR.failed job former nodes kind others
    [ $hpc_bnn_scheduler = slurm ] || return 0
    failed=$(hpc_bnn_failed_node)
    node=${failed%% *} what=${failed#* }
    # A rank can print what it wants: only a node of this job counts
    scontrol show hostnames "$SLURM_JOB_NODELIST" | grep -qxF -e "$node" || return 0
    echo "$failed" >>"$record"
    others=$(awk -v n="$node" -v w="$what" '$1 != n && substr($0, length($1) + 2) == w { print $1 }' "$record" | sort -u | wc -l)
    if [ "$others" -ge 2 ]; then
        hpc_bnn_say "$what on $node, and on two other nodes before ($record): it seems to be the program, the node stays"
        return 0
    fi
    job=$(scontrol show job -o "$SLURM_JOB_ID")
    if ! grep -q ' ReqNodeList=(null) ' <<<"$job" || [ -n "${SLURM_JOB_RESERVATION:-}" ]; then
        hpc_bnn_say "$what on $node: it stays, the job asks for nodes by name or for a reservation"
        return 0
    fi
    former=$(sed -nE 's/.* ExcNodeList=([^ (]+) .*/\1/p' <<<"$job")
    # Others that are as this one in features, GPUs, cores and memory fit what the job asks for
    nodes=$(sinfo -h -N -p "$SLURM_JOB_PARTITION" -o '%N %t %f|%G|%c|%m')
    kind=$(awk -v n="$node" '$1 == n { print $3; exit }' <<<"$nodes")
    others=$(awk -v n="$node" -v k="$kind" '$1 != n && $3 == k && $2 ~ /^(idle|mix|alloc|comp|plnd)[-~#%!^]?$/ { print $1 }' <<<"$nodes" |
        { if [ -n "$former" ]; then grep -vxF -f <(scontrol show hostnames "$former"); else cat; fi; } | sort -u | wc -l)
    if [ "$others" -lt "$SLURM_JOB_NUM_NODES" ]; then
        hpc_bnn_say "$what on $node: it stays, $SLURM_JOB_PARTITION has $others other nodes of its kind, the job needs $SLURM_JOB_NUM_NODES"
        return 0
    fi
    hpc_bnn_say "$what on $node: the job goes on without it, $others nodes of its kind are left"
    echo "${former:+$former,}$node"
}

hpc_bnn_requeue() {
    case $hpc_bnn_scheduler in
        slurm) scontrol requeue "$SLURM_JOB_ID" ;;
        pbs) # qrerun is for operators: the same script again, with the same variables, for the same run
            echo $(($1 + 1)) >"$HPC_BNN_RUN_DIR.requeues"
            export HPC_BNN_RUN_DIR
            qsub -v "$(compgen -e HPC_BNN_ | paste -sd, -)" "${HPC_BNN_SCRIPT:?the script for qsub}" ;;
        lsf) echo $(($1 + 1)) >"$HPC_BNN_RUN_DIR.requeues" ;; # by #BSUB -Q 75
        *) return 1 ;;
    esac
}
