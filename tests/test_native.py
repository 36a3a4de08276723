"""The C++ kernels alone (csrc/tests/check*.cpp), built plainly, with sanitizers and for ARM; then the compiled module.

`check` says what the kernels promise. It is compiled here with the flags of CMakeLists.txt, which is read for them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from octavo.quant.formats import FORMATS, Format

ROOT = Path(__file__).parent.parent
ARM_COMPILER = "aarch64-linux-gnu-g++"
CPU_INFO = Path("/proc/cpuinfo")
SETS = {"avx2": "avx2", "avx512_vnni": "avx512-vnni", "asimddp": "neon"}  # flag of the CPU, and what is made for it
EMULATORS = ("qemu-aarch64", "qemu-aarch64-static")


@dataclass(frozen=True)
class Variant:
    """A way to build `check`.

    Attributes:
        argument: of the program.
        flags: of the compiler, after those of CMakeLists.txt; the last -O counts.
        sets: instruction sets that are compiled in besides the generic one; None for all that the compiler knows.
        arm: cross-compiled, and run by an emulator.
    """

    name: str
    argument: str
    flags: tuple[str, ...] = ()
    sets: frozenset[str] | None = None
    arm: bool = False


# Only the plain one is optimised: most of the time goes into compiling. Of it the library is taken that the package was
# built with, where that is there. Under sanitizers avx512vnni reads and writes as
# avx512vbmi does, and the pool cares for no instruction set.
PLAIN = Variant("plain", "all")
MEMORY = Variant(
    "memory",
    "quick",
    (
        *("-O0", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        *("--param", "asan-instrumentation-with-call-threshold=0"),  # g++ compiles faster so; clang++ ignores it
    ),
    sets=frozenset({"avx2", "avx512vbmi", "neon"}),
)
THREADS = Variant("threads", "pool", ("-O0", "-fsanitize=thread"), sets=frozenset())
ARM = Variant("arm", "quick", ("-O0", "-static"), arm=True)


def read_cmake() -> dict[str, tuple[list[str], list[str]]]:
    """Each source of the kernels with its flags: those for any CPU, and those of its instruction set."""
    text = (ROOT / "CMakeLists.txt").read_text()
    variables = dict(re.findall(r"set\((\w+) (.*?)\)", text))

    def found(pattern: str) -> str:
        match = re.search(pattern, text, re.DOTALL)
        assert match, f"CMakeLists.txt has changed: nothing matches {pattern}"
        return match[1]

    common = found(r"target_compile_options\(octavo_kernels PRIVATE (.*?)\)").split()
    of_sets = found(r'COMPILE_OPTIONS "([^"]*?);\$<').split(";")
    sources = re.findall(r"csrc/(\w+)\.cpp", found(r"add_library\(octavo_kernels STATIC(.*?)\)"))
    flags = {source: ([*common], list[str]()) for source in sources}
    for source, options in re.findall(r'_properties\(csrc/(\w+)\.cpp PROPERTIES COMPILE_OPTIONS "(.*?)"', text):
        flags[source][0].extend(options.split(";"))
    for source, options in re.findall(r"kernels_for\((\w+) ([-$].*?)\)\n", text):
        flags[source][0].extend(of_sets)
        flags[source][1].extend(re.sub(r"\$\{(\w+)\}", lambda name: variables[name[1]], options).split())
    assert sum(bool(of_cpu) for _, of_cpu in flags.values()) >= 4
    return flags


def find_library() -> Path | None:
    """The kernels as the package has them, unless a source has changed since."""
    newest = max(path.stat().st_mtime for path in (ROOT / "CMakeLists.txt", *(ROOT / "csrc").glob("*.*")))
    built = (ROOT / "build").glob("*/liboctavo_kernels.a")
    return next((path for path in built if path.stat().st_mtime > newest), None)


def run(*command: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=280, check=False)


def find_compiler(variant: Variant) -> str | None:
    names = (ARM_COMPILER,) if variant.arm else (os.environ.get("CXX"), "g++", "clang++")
    return next((name for name in names if name and shutil.which(name)), None)


def find_emulator() -> str | None:
    return next(filter(None, map(shutil.which, EMULATORS)), None)


class Builds:
    """Builds variants, all cores at work, and links and runs each when asked."""

    def __init__(self, folder: Path, variants: tuple[Variant, ...]) -> None:
        self.folder = folder
        self.pool = ThreadPoolExecutor(os.cpu_count())
        self.missing: dict[Variant, str] = {}
        self.objects: dict[Variant, list[Future[Path]]] = {}
        self.printed: dict[Variant, str] = {}
        self.library: dict[Variant, Path | None] = {}
        for variant in variants:
            self._start(variant)

    def check(self, variant: Variant) -> str:
        """Run `check`, which finds nothing, and return what it printed. Skips where this machine cannot."""
        if variant in self.missing:
            pytest.skip(self.missing[variant])
        if variant in self.printed:
            return self.printed[variant]
        program = self.folder / variant.name / "check"
        library = self.library[variant]
        objects = [*(future.result() for future in self.objects[variant]), *([library] if library else [])]
        linked = run(*self._command(variant), *objects, "-o", program)
        assert not linked.returncode, linked.stderr
        command: list[str | Path] = [program, variant.argument]
        if variant.arm:
            command = [find_emulator() or "", "-cpu", "max", *command]
        done = run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
        assert not re.search("Sanitizer|runtime error", done.stderr), done.stderr
        assert re.search(r"^[1-9]\d+ checks on .*generic: 0 failed$", done.stdout, re.MULTILINE)
        self.printed[variant] = done.stdout
        return done.stdout

    def _start(self, variant: Variant) -> None:
        (self.folder / variant.name).mkdir()
        if missing := self._what_is_missing(variant):
            self.missing[variant] = missing
            return
        jobs = [(f"tests/{check.stem}", list[str]()) for check in sorted((ROOT / "csrc/tests").glob("*.cpp"))]
        self.library[variant] = find_library() if variant == PLAIN else None
        for source, (flags, of_cpu) in read_cmake().items() if self.library[variant] is None else ():
            wanted = variant.sets is None or source in variant.sets
            known = wanted and of_cpu and self._builds(variant, *of_cpu)
            jobs.append((source, [*flags, *(of_cpu if known else ())]))
        jobs.sort(key=lambda job: len(job[1]), reverse=True)  # instruction sets take longest
        self.objects[variant] = [self.pool.submit(self._compile, variant, *job) for job in jobs]

    def _what_is_missing(self, variant: Variant) -> str:
        if not find_compiler(variant):
            return f"not on the PATH: {ARM_COMPILER if variant.arm else 'a C++ compiler, g++ or clang++'}"
        if variant.arm:
            return "" if find_emulator() else f"not on the PATH: {' or '.join(EMULATORS)}"
        if not self._builds(variant) or run(self.folder / variant.name / "nothing").returncode:
            return f"{find_compiler(variant)} makes no programs that run here with {' '.join(variant.flags)}"
        return ""

    def _command(self, variant: Variant, *flags: str) -> list[str]:
        return [find_compiler(variant) or "", "-std=c++20", "-O2", "-pthread", *flags, *variant.flags]

    def _builds(self, variant: Variant, *flags: str) -> bool:
        nothing = self.folder / variant.name / "nothing"
        done = run(*self._command(variant, *flags), "-x", "c++", "-", "-o", nothing, stdin="int main() {}")
        return done.returncode == 0

    def _compile(self, variant: Variant, source: str, flags: list[str]) -> Path:
        out = self.folder / variant.name / f"{Path(source).name}.o"
        done = run(*self._command(variant, *flags), "-c", ROOT / f"csrc/{source}.cpp", "-o", out)
        assert not done.returncode, done.stderr
        return out


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    builds = Builds(tmp_path_factory.mktemp("native"), (PLAIN, MEMORY, THREADS, ARM))
    yield builds
    builds.pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize("variant", [PLAIN, MEMORY, THREADS], ids=lambda variant: variant.name)
def test_kernels_keep_their_promises(builds: Builds, variant: Variant) -> None:
    printed = builds.check(variant)
    if variant == PLAIN and CPU_INFO.exists():  # what this CPU has was compiled and checked
        flags = CPU_INFO.read_text().split()
        assert [name for flag, name in SETS.items() if flag in flags and name not in printed] == []


def test_arm_gives_the_bits_of_this_machine(builds: Builds) -> None:
    on_arm, here = builds.check(ARM), builds.check(PLAIN)
    assert "neon" in on_arm
    bits = re.findall(r"^bits \w{16}$", here, re.MULTILINE)
    assert len(bits) == 1
    assert bits[0] in on_arm


# ---------------------------------------- the compiled module

ROWS, COLS, TOKENS = 200, 130, 11


@pytest.fixture
def native() -> Iterator[ModuleType]:
    module = pytest.importorskip("octavo.kernels._native", reason="built without a C++ compiler")
    threads = module.threads()
    yield module
    module.set_threads(threads)


class Product:
    """x @ w.T for random x and w; call it to compute it again."""

    def __init__(self, native: ModuleType, format: Format, seed: int) -> None:
        random = torch.Generator().manual_seed(seed)
        # Bytes below 64: any of them make finite scales, and codes.
        self.data = torch.randint(0, 64, (format.nbytes(ROWS, COLS),), generator=random, dtype=torch.uint8)
        self.w = native.Matrix(format.bits, self.data.data_ptr(), ROWS, COLS)
        self.x = torch.randn(TOKENS, COLS, generator=random)
        self.native = native

    def __call__(self) -> Tensor:
        y = torch.full((TOKENS, ROWS), torch.nan)
        self.native.linear(False, self.x.data_ptr(), TOKENS, self.w, False, y.data_ptr())
        return y


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_the_number_of_threads_may_change_between_calls(native: ModuleType, format: Format) -> None:
    product = Product(native, format, 0)
    native.set_threads(1)
    alone = product()
    assert alone.isfinite().all()
    assert alone.abs().max() > 0
    for n in (2, 3, 1, 4, 2):
        native.set_threads(n)
        assert native.threads() == n
        assert torch.equal(product(), alone)


def test_python_threads_may_compute_at_once(native: ModuleType) -> None:
    native.set_threads(2)
    products = [Product(native, format, seed) for seed, format in enumerate(FORMATS.values())]
    alone = [product() for product in products]

    def repeat(i: int) -> bool:
        return all(torch.equal(products[i](), alone[i]) for _ in range(300))

    with ThreadPoolExecutor(len(products)) as pool:
        running = [pool.submit(repeat, i) for i in range(len(products))]
        n = 0
        while not all(future.done() for future in running):
            native.set_threads(1 + n % 3)
            n += 1
            wait(running, timeout=0.001)
        assert all(future.result() for future in running)


FORK = """
import os, signal, threading
import torch
from octavo.kernels import _native as native

w = torch.randn(200, 130).bfloat16()
x = torch.randn(11, 130)
matrix = native.Matrix(16, w.data_ptr(), 200, 130)

def product():
    y = torch.empty(11, 200)
    native.linear(False, x.data_ptr(), 11, matrix, False, y.data_ptr())
    return y.numpy().tobytes()

native.set_threads(2)
before = product()
stop = threading.Event()

def compute():
    while not stop.is_set():
        product()

for busy in (False, True):
    other = threading.Thread(target=compute)
    if busy:
        other.start()
    for _ in range(10):
        child = os.fork()
        if not child:
            signal.alarm(20)  # a child that waits for threads it does not have ends so
            os._exit(product() != before)
        assert os.waitpid(child, 0)[1] == 0, "the child's result is wrong, or it hung"
        assert product() == before
stop.set()
other.join()
print("survived")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_process_computes(native: ModuleType) -> None:
    """Data loaders fork. A process of its own, for a fork copies whatever else runs."""
    done = run(sys.executable, "-W", "ignore::DeprecationWarning", "-c", FORK)
    assert done.stdout == "survived\n", done.stderr
