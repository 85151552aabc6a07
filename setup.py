"""Build of the C++ extension and the layout of the packages; everything else is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import Pybind11Extension, build_ext
from setuptools import setup

# Optional: without a compiler the package still installs and the CPU runs the plain-torch path,
# which `refinelens doctor` reports.
extension = Pybind11Extension(
    "refinelens._C",
    sorted(glob("csrc/**/*.cpp", recursive=True)),
    include_dirs=["csrc"],
    depends=sorted(glob("csrc/**/*.hpp", recursive=True) + glob("csrc/**/*.inl", recursive=True)),
    cxx_std=17,
    extra_compile_args=["-O3", "-fno-math-errno", "-ffp-contract=fast", "-pthread", "-Wall", "-Wextra"],
    optional=True,
)

ROOMS = "bench data fit kernels layers lenses model op prompts report runs sweep tasks".split()

setup(
    packages=["refinelens", *(f"refinelens.{room}" for room in ROOMS), "refinelens.data.tiny"],
    # The folder stands at the top of the repository; installed, it is a part of refinelens, so that it
    # cannot be taken for the package `kernels` that Transformers looks for.
    package_dir={"refinelens.kernels": "kernels"},
    package_data={"refinelens.data": ["*.jsonl"], "refinelens.data.tiny": ["*"]},
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
