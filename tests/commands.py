"""``mpirun -np N python -m mpi4py tests/commands.py JSON``: several commands of hpc-bnn in one job, as each start takes long.

JSON is a list of command lines. Nothing is drawn. The first that fails is the last.
"""

import json
import sys

import hpc_bnn.run.plots
from hpc_bnn.cli.commands import main
from hpc_bnn.comm import finalize

if __name__ == "__main__":
    hpc_bnn.run.plots.write_plots = lambda *_: []
    code = next(filter(None, map(main, json.loads(sys.argv[1]))), 0)
    finalize()
    sys.exit(code)
