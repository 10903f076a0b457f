"""`asgo doctor`: check what training needs on this machine. Sends nothing over the network."""

from __future__ import annotations

import contextlib
import lzma
import os
import platform
import resource
import shlex
import shutil
import sys
import sysconfig
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from packaging.requirements import Requirement

from pipelines.errors import AsgoError

if TYPE_CHECKING:
    from types import ModuleType

_TESTED_PYTHON = ((3, 11), (3, 13))
_TESTED_TORCH = ((2, 11), (2, 14))
_CHECKPOINT_GB = 2.6
"""GPT-2 (124 M parameters) in float32 and the 17 bytes a parameter of AccAsro's state."""
_FEW_GB = 10
_SLOW_MB_S = 100
_FEW_DESCRIPTORS = 1024
_SMALL_SHM_GB = 1
_WRITTEN_AT_ONCE = 16 * 2**20
_WRITTEN_IN_ALL = 64 * 2**20
_WRITING_S = 2.0
"""Time limit of the disk test: a slow disk does not write all of it."""


@dataclass(frozen=True)
class Finding:
    """Result of one check."""

    what: str
    found: str
    warning: str = ""
    """The problem, and what to do; empty if there is none."""
    broken: bool = False
    """Whether the problem makes training impossible."""


def examine(folder: Path) -> Iterator[Finding]:
    """Run all checks, which takes some seconds. `folder` is on the disk that runs will be written to."""
    yield from map(_without_home, _examine(folder))


def _examine(folder: Path) -> Iterator[Finding]:
    yield _asgo()
    yield _python()
    yield Finding("system", platform.platform())
    yield Finding("processor", f"{platform.machine()}, {_cores()} cores, {_memory_gb():.0f} GB of memory")
    yield from _torch_and_what_it_needs()
    yield _vocabulary()
    yield _disk_speed(folder)
    yield _free_space(folder)
    yield _descriptors()
    yield from _shared_memory()
    yield from _packages()


def _without_home(finding: Finding) -> Finding:
    """Replace the home folder, which has the user's name, by `~`: users paste reports in public issues."""
    home = os.environ.get("HOME", "")
    if len(home) < 2:  # in a container it may be `/`
        return finding
    return Finding(finding.what, finding.found.replace(home, "~"), finding.warning.replace(home, "~"), finding.broken)


def _asgo() -> Finding:
    version = _installed("asgo") or "not installed, but run from its sources"
    with contextlib.suppress(ImportError):  # a package that it imports may be the missing one
        from pipelines.training.run_folder import environment

        commit = environment("")["git_commit"]
        version += f", commit {commit}" * (commit is not None)
    return Finding("asgo", version)


def _python() -> Finding:
    return Finding("Python", platform.python_version(), _untested(sys.version_info[:2], _TESTED_PYTHON))


def _untested(version: tuple[int, ...], tested: tuple[tuple[int, int], tuple[int, int]]) -> str:
    oldest, newest = tested
    if oldest <= version <= newest:
        return ""
    return "not tested; from {}.{} to {}.{} is".format(*oldest, *newest)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _torch_and_what_it_needs() -> Iterator[Finding]:
    try:
        import torch
        import torchvision
    except Exception as error:  # not installed, or a library is missing, or the versions do not match
        yield Finding("torch", "cannot be imported", f"{_line(error)}; install asgo again", broken=True)
        return
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    yield Finding(
        "torch", f"{torch.__version__}, torchvision {torchvision.__version__}", _untested(version, _TESTED_TORCH)
    )
    yield from _accelerators(torch)
    yield _nccl(torch)
    yield _kernels()
    yield _torch_compile(torch)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _accelerators(torch: ModuleType) -> Iterator[Finding]:
    if torch.backends.mps.is_available():
        yield Finding("GPU", "Apple GPU")
    if torch.version.cuda is None:
        ignored = shutil.which("nvidia-smi") is not None
        yield Finding("CUDA", "torch is built without", "an NVIDIA driver is here: install torch with CUDA" * ignored)
        return
    with warnings.catch_warnings(record=True) as caught:  # torch warns if a driver or GPU is too old
        warnings.simplefilter("always")
        reason = _why_no_gpu(torch)
        gpus = [] if reason else [_gpu(torch, index) for index in range(torch.cuda.device_count())]
    warned = "; ".join(" ".join(str(warning.message).split()) for warning in caught)
    yield Finding("CUDA", torch.version.cuda, reason or warned)
    yield from gpus


def _why_no_gpu(torch: ModuleType) -> str:
    """Return why there is no GPU; empty if there is one."""
    if torch.cuda.is_available():
        return ""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"no GPU: CUDA_VISIBLE_DEVICES={visible!r} may hide it"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return f"no GPU, so training is on the processor: {_line(error).split('. ')[0]}"
    return "no GPU, so training is on the processor"


def _gpu(torch: ModuleType, index: int) -> Finding:
    properties = torch.cuda.get_device_properties(index)
    capability = f"compute capability {properties.major}.{properties.minor}"
    text = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, {capability}"
    try:
        free, total = torch.cuda.mem_get_info(index)
    except RuntimeError as error:
        return Finding(f"GPU {index}", text, _line(error))
    used = 1 - free / total
    return Finding(f"GPU {index}", text, f"other processes use {used:.0%} of its memory" if used > 0.1 else "")


def _nccl(torch: ModuleType) -> Finding:
    if torch.distributed.is_available() and torch.distributed.is_nccl_available():
        return Finding("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    several = torch.cuda.device_count() > 1
    return Finding("NCCL", "none", "--gpus does not work without NCCL; install torch with CUDA from pypi.org" * several)


def _kernels() -> Finding:
    from optim import native

    began = time.perf_counter()
    if not native.is_available():
        slow = "on a CPU, Asro, AccAsro and DASGO take 2 to 4 times as long; install gcc or clang, or set CC"
        return Finding("C compiler", f"none that works: {native.description()}", slow)
    return Finding("C compiler", f"compiles the optimizers' kernels in {time.perf_counter() - began:.1f} s")


def _torch_compile(torch: ModuleType) -> Finding:
    """Check for the parts that torch.compile needs. Compiling something would take too long."""
    from torch._dynamo.eval_frame import is_dynamo_supported
    from torch.utils._triton import has_triton

    problems = []
    if not is_dynamo_supported():
        problems.append("not with this Python")
    if shutil.which(shlex.split(os.environ.get("CXX", "g++"))[0]) is None:
        problems.append("no C++ compiler: install g++, or set CXX")
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        problems.append("no Python.h: install python3-dev or python3-devel")
    if torch.cuda.is_available() and not has_triton():
        problems.append("no triton, or not for this GPU")
    return Finding("torch.compile", "not possible" if problems else "possible", "; ".join(problems))


def _vocabulary() -> Finding:
    try:
        from pipelines.data.tokenizers import gpt2_table

        gpt2_table()
    except (AsgoError, ImportError, OSError, EOFError, lzma.LZMAError) as error:
        return Finding("vocabulary", "damaged", f"GPT-2's table: {_line(error)}; install asgo again", broken=True)
    return Finding("vocabulary", "GPT-2's table is complete")


def _disk_speed(folder: Path) -> Finding:
    what = "disk"
    try:
        speed = _written_mb_s(folder)
    except OSError as error:
        return Finding(what, "cannot be written", f"the working directory: {error.strerror}; runs need another --out")
    seconds = _CHECKPOINT_GB * 1e3 / speed
    slow = f"a checkpoint of GPT-2 takes {seconds:.0f} s, and the launcher waits 30 s for it after a SIGTERM"
    return Finding(what, f"writes {speed:,.0f} MB/s", slow if speed < _SLOW_MB_S else "")


def _written_mb_s(folder: Path) -> float:
    """Return megabytes per second of synchronized writes to an anonymous temporary file."""
    content = os.urandom(_WRITTEN_AT_ONCE)  # random, so a compressing file system is not faster
    written, seconds = 0, 0.0
    began = time.perf_counter()
    with tempfile.TemporaryFile(dir=folder) as file:
        while written < _WRITTEN_IN_ALL and seconds < _WRITING_S:
            written += file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - began
    return written / 1e6 / seconds


def _free_space(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    little = f"two checkpoints of GPT-2 take {2 * _CHECKPOINT_GB:.0f} GB, ten shards of FineWeb 2 GB"
    return Finding("free space", f"{free:,.0f} GB", little if free < _FEW_GB else "")


def _descriptors() -> Finding:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = f"with many workers more than {soft} may be needed: ulimit -n 4096"
    return Finding("open files", f"up to {soft:,}", few if soft < _FEW_DESCRIPTORS else "")


def _shared_memory() -> Iterator[Finding]:
    with contextlib.suppress(OSError):  # only Linux has it
        size = shutil.disk_usage("/dev/shm").total / 1e9
        little = "NCCL passes data through it; in a container: docker run --shm-size=8g"
        yield Finding("/dev/shm", f"{size:,.1f} GB", little if size < _SMALL_SHM_GB else "")


def _packages() -> Iterator[Finding]:
    """Check the requirements in the metadata of the installed package: those of all installations, and each extra."""
    try:
        asgo = metadata.metadata("asgo")
    except metadata.PackageNotFoundError:
        return
    wanted = [Requirement(text) for text in asgo.get_all("Requires-Dist", [])]
    always = [each for each in wanted if _applies(each, "")]
    problems = [problem for problem in map(_problem, always) if problem]
    missing = any(_installed(each.name) is None for each in always)
    yield Finding("packages", f"{len(always) - len(problems)} of {len(always)}", "; ".join(problems), broken=missing)
    for extra in asgo.get_all("Provides-Extra", []):
        if extra != "dev":
            of_extra = [each for each in wanted if each not in always and _applies(each, extra)]
            yield _extra(extra, of_extra)


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _extra(name: str, requirements: list[Requirement]) -> Finding:
    problems = [problem for problem in map(_problem, requirements) if problem]
    if problems:
        return Finding(f"extra {name}", f"{', '.join(problems)}: pip install 'asgo[{name}]'")
    return Finding(f"extra {name}", ", ".join(f"{each.name} {metadata.version(each.name)}" for each in requirements))


def _problem(requirement: Requirement) -> str:
    """Return what is wrong with a requirement; empty if it is met."""
    version = _installed(requirement.name)
    if version is None:
        return f"no {requirement.name}"
    fits = requirement.specifier.contains(version, prereleases=True)
    return "" if fits else f"{requirement.name} {version}, not {requirement.specifier}"


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
