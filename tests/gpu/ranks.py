"""What test_gpu_ranks.py runs on two ranks of torchrun: ``ranks.py DEVICE``. On a GPU they share it, under NCCL.

NCCL takes ranks of different hosts only on one GPU: each says that it is a host of its own. For tests only.
"""

import os
import sys
from pathlib import Path

os.environ |= {
    "NCCL_HOSTID": f"rank{os.environ['RANK']}", "NCCL_SOCKET_IFNAME": "lo", "NCCL_P2P_DISABLE": "1",
    "NCCL_SHM_DISABLE": "1", "NCCL_IB_DISABLE": "1", "NCCL_NVLS_ENABLE": "0", "NCCL_MAX_NCHANNELS": "2",
}  # fmt: skip
sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from captured_cases import make, train

from hpc_bnn import connect
from hpc_bnn.comm import start, torch_dist

start.check_one_rank_per_gpu = lambda comm: None
torch_dist.ranks_on_one_gpu = lambda device, objects: ([], "")
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def main(device: str) -> None:
    for sample_size in (1, 2):
        comm = connect(sample_size, device, backend="torch")
        for objective in ("elbo", "log_predictive"):
            for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
                options = {"dtype": dtype, "objective": objective, "device": device}
                _, expected = train(make("off", **options), dtype=dtype)
                step = make("on", comm=comm, **options)
                _, got = train(step, dtype=dtype)
                for name, value in expected.items():
                    error = float((got[name] - value).double().norm() / value.double().norm())
                    assert error < tolerance, (comm.grid, objective, dtype, name, error)
                print(
                    f"{comm.grid} {objective} {dtype}: {comm.library}, {step.recorder.num_captures} captures",
                    flush=True,
                )
    comm.close()


if __name__ == "__main__":
    main(sys.argv[1])
