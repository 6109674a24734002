from spack_repo.builtin.build_systems.python import PythonPackage

from spack.package import *


class PyTypeshedClient(PythonPackage):
    """Retrieves information from typeshed and other typing stubs."""

    homepage = "https://github.com/JelleZijlstra/typeshed_client"
    pypi = "typeshed_client/typeshed_client-2.14.0.tar.gz"

    license("MIT")

    version("2.14.0", sha256="b7438c6f1d843e87e734102ca875d45a4c55b8abd15c4e16ce4af9345ad4085d")

    depends_on("py-setuptools@42:", type="build")

    with default_args(type=("build", "run")):
        depends_on("python@3.9:")
        depends_on("py-typing-extensions@4.5:")
