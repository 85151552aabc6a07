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

PACKAGES = "bench claims data data.tiny fitting kernels layers lens model op pages report store sweeping".split()

setup(
    packages=["refinelens", *(f"refinelens.{name}" for name in PACKAGES)],
    package_data={
        "refinelens": ["py.typed", "_C.pyi"],
        "refinelens.claims": ["recipes/*.toml"],
        "refinelens.data": ["*.jsonl"],
        "refinelens.data.tiny": ["*"],
        "refinelens.pages": ["assets/*"],
    },
    ext_modules=[extension],
    cmdclass={"build_ext": build_ext},
)
