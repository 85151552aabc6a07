"""The C++ code under AddressSanitizer, UndefinedBehaviorSanitizer and valgrind, and for other processors than x86.

Slow lane, `make test-slow`, but for a look at the sources.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer", "-g", "-O1"]
COMPILER = shutil.which("g++")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs g++"),
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="needs the C++ sources"),
]


def run(command, **environment):
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | environment)
    return done.returncode, done.stdout[-3000:] + done.stderr[-3000:]


SOURCES = sorted((ROOT / "csrc").glob("*/*.cpp"))  # all but the Python bindings, which stand above the folders


def build_native(folder, flags, compiler=COMPILER):
    """The kernels without Python, and a program that tries odd sizes."""
    program = folder / "odd_sizes"
    command = [compiler, "-std=c++17", "-ffp-contract=fast", "-fno-math-errno", "-pthread", *flags, "-Icsrc"]
    code, output = run([*command, "tests/native/odd_sizes.cpp", *map(str, SOURCES), "-o", str(program)])
    assert code == 0, output
    return program


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    return build_native(tmp_path_factory.mktemp("sanitized"), SANITIZE)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["v4", "v3", "baseline"])
def test_odd_sizes_under_sanitizers(sanitized, isa):
    code, output = run([sanitized], REFINELENS_ISA=isa)
    if "on this processor" in output:
        pytest.skip(f"this processor does not run {isa}")
    assert code == 0 and "cases with" in output, output


@pytest.mark.slow
def test_sanitizers_see_an_overread(sanitized):
    code, output = run([sanitized, "overread"])
    assert code != 0 and "heap-buffer-overflow" in output


@pytest.fixture(scope="module")
def for_valgrind(tmp_path_factory):
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    return build_native(tmp_path_factory.mktemp("valgrind"), ["-g", "-O2"])


VALGRIND = ["valgrind", "--quiet", "--error-exitcode=9", "--leak-check=full"]


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["v3", "baseline"])  # valgrind does not know AVX-512
def test_odd_sizes_under_valgrind(for_valgrind, isa):
    code, output = run([*VALGRIND, for_valgrind], REFINELENS_ISA=isa)
    assert code == 0 and "cases with" in output, output


@pytest.mark.slow
def test_valgrind_sees_an_overread(for_valgrind):
    code, output = run([*VALGRIND, for_valgrind, "overread"], REFINELENS_ISA="v3")
    assert code == 9 and "Invalid read" in output, output


@pytest.mark.medium
def test_portable_sources_have_nothing_of_x86(tmp_path):
    """Of all sources in one: what each includes of the compiler's own takes most of the time."""
    together = tmp_path / "together.cpp"
    together.write_text("".join(f'#include "{source}"\n' for source in SOURCES))
    command = [COMPILER, "-std=c++17", "-E", "-DREFINELENS_PORTABLE", "-Icsrc", together]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert all(str(source) in done.stdout for source in SOURCES)
    assert not re.findall(r".*(?:[a-z]mmintrin|x86intrin|GCC target|cpu_supports).*", done.stdout)


# The last one compiles for another processor, whose programs qemu runs.
@pytest.mark.slow
@pytest.mark.parametrize(
    "compiler, flags, runner",
    [
        ("g++", ["-DREFINELENS_PORTABLE"], []),
        ("clang++", [], []),
        ("aarch64-linux-gnu-g++", ["-static"], ["qemu-aarch64"]),
    ],
)
def test_odd_sizes_of_a_portable_build(tmp_path, compiler, flags, runner):
    missing = [tool for tool in (compiler, *runner) if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"needs {missing[0]}")
    program = build_native(tmp_path, ["-O2", "-Wall", "-Wextra", "-Werror", *flags], compiler)
    code, output = run([*runner, program], REFINELENS_ISA="baseline")
    assert code == 0 and "cases with compiler default" in output, output


@pytest.mark.slow
def test_extension_under_sanitizers(tmp_path):
    """The whole extension, built with both sanitizers, through the tests of the op."""
    source = tmp_path / "source"
    skipped = shutil.ignore_patterns(".*", "*.so", "build", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, ignore=skipped)
    flags = " ".join(SANITIZE)
    build = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path / "build")]
    done = subprocess.run(
        build, cwd=source, capture_output=True, text=True, env=os.environ | {"CFLAGS": flags, "LDFLAGS": flags}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (library,) = (tmp_path / "build").glob("lib*")
    runtimes = [run([COMPILER, f"-print-file-name={name}"])[1].strip() for name in ("libasan.so", "libubsan.so")]
    environment = {
        "LD_PRELOAD": " ".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own are not ours
        "PYTHONPATH": str(library),
    }
    code, output = run([sys.executable, "-P", "-c", "import refinelens._C as c; print(c.__file__)"], **environment)
    assert code == 0 and str(library) in output, output
    names = "op/test_fused_lens sweeping/test_robustness store/test_trajectory op/test_rank_agreement op/test_certified"
    names += " op/test_mean_unembedding op/test_divergence_cpu"
    tests = [f"tests/{name}.py" for name in names.split()]
    code, output = run([sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], **environment)
    assert code == 0, output
