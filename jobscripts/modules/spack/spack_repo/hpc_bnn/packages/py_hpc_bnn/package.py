import pathlib

from spack_repo.builtin.build_systems.cuda import CudaPackage
from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyHpcBnn(PythonPackage, CudaPackage):
    """Trains Bayesian neural networks on many GPUs by splitting the Monte Carlo samples, the
    data, or both, over the ranks of an MPI job."""

    homepage = "https://arxiv.org/abs/2604.04736"
    # The clone that this file lies in: jobscripts/modules/spack/spack_repo/hpc_bnn/packages/py_hpc_bnn/
    git = pathlib.Path(__file__).resolve().parents[7].as_uri()

    license("BSD-3-Clause")

    version("main", branch="main")

    variant("horovod", default=True, description="Several ranks (one process needs no Horovod)")
    variant("plots", default=True, description="Plots of a run")
    variant("data", default=False, description="What data_prep needs for weather and tables")

    depends_on("py-setuptools@77:", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-h5py@3.8:")
        depends_on("py-jinja2@3.1:")
        depends_on("py-jsonargparse@4.53:+signatures")
        depends_on("py-mpi4py@3.1.6:")
        depends_on("py-numpy@1.26:")
        depends_on("py-pyyaml@6.0.1:")
        depends_on("py-scipy@1.11.2:")
        depends_on("py-torch@2.4:")
        depends_on("py-tqdm@4.64:")

        depends_on("py-matplotlib@3.7:", when="+plots")

        with when("+data"):
            depends_on("py-netcdf4@1.6.5:")
            depends_on("py-pandas@2.1:")
            depends_on("py-pillow@9.4:")
            depends_on("py-scikit-learn@1.3:")
            depends_on("py-xarray@2023.6:")

        # Its recipe patches 0.28.1 to C++17.
        with when("+horovod"):
            depends_on("py-horovod@0.28.1 frameworks=pytorch controllers=mpi")
            depends_on("py-horovod~cuda tensor_ops=mpi", when="~cuda")
            depends_on("py-horovod+cuda tensor_ops=nccl", when="+cuda")

    depends_on("py-torch~cuda", when="~cuda")
    for _arch in CudaPackage.cuda_arch_values:
        depends_on(f"py-torch+cuda cuda_arch={_arch}", when=f"+cuda cuda_arch={_arch}")
        depends_on(f"py-horovod cuda_arch={_arch}", when=f"+horovod+cuda cuda_arch={_arch}")

    conflicts("cuda_arch=none", when="+cuda", msg="Say which GPUs: cuda_arch=80 (A100), 90 (H100)")

    @property
    def _beside(self):
        return join_path(self.prefix.share, "hpc_bnn")

    @run_after("install")
    def install_what_lies_beside(self):
        for name in ("configs", "data_prep", "docs", "examples", "jobscripts", "tools"):
            install_tree(name, join_path(self._beside, name))

    def setup_run_environment(self, env: EnvironmentModifications) -> None:
        env.set("HPC_BNN_ROOT", self._beside)
        env.set("HDF5_USE_FILE_LOCKING", "FALSE")  # parallel file systems often refuse its locks
