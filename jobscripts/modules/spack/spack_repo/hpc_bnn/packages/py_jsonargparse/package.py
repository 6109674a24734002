from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyJsonargparse(PythonPackage):
    """Command lines and configuration files from signatures and dataclasses."""

    homepage = "https://github.com/omni-us/jsonargparse"
    pypi = "jsonargparse/jsonargparse-4.53.0.tar.gz"

    license("MIT")

    version("4.53.0", sha256="1777126997427bf3fa4b8da02eeded5250a1544d7b16496f82069e2bcaf9d17f")

    variant("signatures", default=False, description="Types and help from signatures and docstrings")

    depends_on("py-setuptools@77:", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.10:")
        depends_on("py-pyyaml@3.13:")

        with when("+signatures"):
            depends_on("py-docstring-parser@0.17:")
            depends_on("py-typeshed-client@2.8.2:")
