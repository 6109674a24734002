# Source this file to get the environment of `make setup`, and launch settings for a laptop or workstation.
#
#     . tools/activate.sh
#     mpirun -np 4 python -m mpi4py -m hpc_bnn train --config configs/digits.yaml --grid.sample_size 2
#
# At a computing centre you do not need this file: load your modules and use the batch scripts of jobscripts/.

if [ -f .venv/bin/activate ]; then
    . .venv/bin/activate
fi
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# Allow more ranks than cores: Open MPI 4 and 5 need these settings (MPICH needs none)
export OMPI_MCA_rmaps_base_oversubscribe=1
export PRTE_MCA_rmaps_default_mapping_policy=:oversubscribe
# Waiting ranks yield their core instead of spinning
export OMPI_MCA_mpi_yield_when_idle=1
# Ranks of one machine talk through its memory: to look for fast networks takes a second of every start
export OMPI_MCA_mtl="${OMPI_MCA_mtl:-^ofi}" OMPI_MCA_btl="${OMPI_MCA_btl:-^ofi,uct}"
# Open MPI requires these from root, for example in a container
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
