"""Checks of one machine: each a small function that returns findings, and knows nothing of the others."""

from __future__ import annotations

import csv
import os
import platform
import re
import resource
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bigtrain.checkpoint.location import folder_of, remote
from bigtrain.config import Config
from bigtrain.data.cached import is_url
from bigtrain.place import Place
from bigtrain.plan.flops import parameters
from bigtrain.plan.quantities import gibibytes
from bigtrain.provenance import version_of

PROBE_MIB = 64
"""Size of the file that is written and read to time a disk."""
SLOW_DISK_MB_S = 50.0
"""A run or data folder below this is a problem: an 8B checkpoint would take half an hour to write."""
_SHM_GIB = 1.0
"""NCCL and data loaders share memory between the ranks of a machine; containers often get 64 MiB."""
_HOT = 87
"""Degrees Celsius at which data-centre GPUs begin to slow down."""
_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "safetensors")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    level: Literal["ok", "note", "bad"]
    name: str
    text: str
    do: str = ""
    """What to do about it, when it is bad."""


@dataclass(frozen=True)
class Subject:
    """What is examined: a rank's place, and the run that is to be."""

    place: Place
    config: Config | None = None
    run: Path | None = None


Check = Callable[[Subject], Iterable[Finding]]


def examine(checks: Iterable[Check], subject: Subject) -> list[Finding]:
    """The findings of all checks; one that fails itself says so and hides no other."""
    found: list[Finding] = []
    for check in checks:
        try:
            found += check(subject)
        except Exception as e:
            name = check.__name__.replace("_", " ")
            found.append(Finding("note", name, f"could not be checked: {type(e).__name__}: {e}"))
    return found


def versions(subject: Subject) -> Iterator[Finding]:
    """Python and packages; their differences between machines are told by whoever compares."""
    yield Finding("ok", "system", f"{platform.system()} {platform.release()} {platform.machine()}")
    yield Finding("ok", "python", platform.python_version())
    for name in _PACKAGES:
        version = version_of(name)
        if version:
            yield Finding("ok", name, version)
        elif name in ("torch", "deepspeed"):
            yield Finding("bad", name, "is not installed", f"pip install {name}")


def cores(subject: Subject) -> Iterator[Finding]:
    """Cores that this process may use, against the ranks that share them; memory."""
    mine = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = subject.place.local_world
    text = f"{mine} of {os.cpu_count()} for this process, {ranks} rank{'s' * (ranks != 1)} on this machine"
    if mine < 2 and (os.cpu_count() or 1) > 2 * ranks:
        do = "let the launcher bind more cores to a rank: srun --cpus-per-task, mpirun --bind-to none"
        yield Finding("bad", "cores", text, do)
    else:
        yield Finding("ok", "cores", text)
    memory = {
        key: int(value.split()[0]) * 1024 / 2**30
        for key, _, value in (line.partition(":") for line in Path("/proc/meminfo").read_text().splitlines())
    }
    free = f"{memory['MemAvailable']:.1f} of {memory['MemTotal']:.1f} GiB free"
    swapped = memory["SwapTotal"] - memory["SwapFree"]
    if swapped > 1:
        yield Finding("bad", "memory", f"{free}, {swapped:.1f} GiB swapped out", "end what uses the memory")
    else:
        yield Finding("ok", "memory", free)


# ---- GPUs

_ASKED = (
    "index",
    "name",
    "driver_version",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "clocks.sm",
    "clocks.max.sm",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown",
)


def gpus(subject: Subject) -> Iterator[Finding]:
    """What torch sees and what nvidia-smi says: number, memory, errors, heat, throttling."""
    import torch

    seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if shutil.which("nvidia-smi") is None:
        what = f"torch sees {seen}" if seen else "none"
        yield Finding("ok" if seen else "note", "GPUs", f"{what}; nvidia-smi is not on this machine")
        return
    try:
        rows = _smi()
    except (OSError, subprocess.SubprocessError) as e:
        said = str(getattr(e, "stderr", "") or e).strip().splitlines()[0]
        yield Finding("bad", "GPUs", f"nvidia-smi failed: {said}", "restart the driver, or drain the machine")
        return
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not seen and hidden != "":
        built = torch.version.cuda or "none"
        do = f"install a torch for this driver: pip install torch with CUDA (this one's is {built})"
        yield Finding("bad", "GPUs", f"{len(rows)} in this machine, and torch can use none", do)
    elif 1 < seen < subject.place.local_world:
        ranks = subject.place.local_world
        yield Finding("bad", "GPUs", f"{seen} for {ranks} ranks", "start one rank a GPU")
    kinds = {(row["name"], row["memory.total"]) for row in rows}
    text = f"{len(rows)} x {', '.join(sorted(f'{name} {memory} MiB' for name, memory in kinds))}"
    driver = rows[0]["driver_version"] if rows else "?"
    yield Finding("ok" if len(kinds) == 1 else "note", "GPUs", f"{text}, driver {driver}, torch sees {seen}")
    for row in rows:
        yield from _gpu(row)


def _smi() -> list[dict[str, str]]:
    """One row of values a GPU."""
    done = subprocess.run(
        ["nvidia-smi", f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    lines = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(_ASKED, line, strict=True)) for line in lines]


def _gpu(row: Mapping[str, str]) -> Iterator[Finding]:
    """What is wrong with one GPU."""
    name = f"GPU {row['index']}"
    number = {key: float(value) for key, value in row.items() if re.fullmatch(r"\d+(\.\d+)?", value)}
    if errors := number.get("ecc.errors.uncorrected.volatile.total", 0):
        yield Finding(
            "bad", name, f"{errors:.0f} uncorrected memory errors", "drain the machine, reset the GPU"
        )
    hot = row["clocks_throttle_reasons.hw_thermal_slowdown"] == "Active"
    if hot or number.get("temperature.gpu", 0) >= _HOT:
        text = f"{row['temperature.gpu']} C{', slowed down by heat' if hot else ''}"
        yield Finding("bad", name, text, "look at fans, air and power: one slow GPU slows all ranks")
    elif row["clocks_throttle_reasons.hw_slowdown"] == "Active":
        text = f"slowed down by the hardware: {row['clocks.sm']} of {row['clocks.max.sm']} MHz"
        yield Finding("bad", name, text, "look at its power supply")
    share = number.get("memory.used", 0) / max(number.get("memory.total", 1), 1)
    if share > 0.1:
        text = f"{row['memory.used']} of {row['memory.total']} MiB are in use"
        yield Finding("bad", name, text, "nvidia-smi names the process; end it, or take another GPU")


# ---- limits


def limits(subject: Subject) -> Iterator[Finding]:
    """Open files, locked memory, shared memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Rank 0's machine may hold the store: two connections of every rank; and each rank its groups' and its files.
    needed = 1024 + 4 * subject.place.world
    if soft != resource.RLIM_INFINITY and soft < needed:
        do = f"ulimit -n {max(needed, 65536)} before the start, or nofile in /etc/security/limits.conf"
        yield Finding("bad", "open files", f"{soft} at most (hard limit {hard}), {needed} may be needed", do)
    else:
        yield Finding("ok", "open files", f"{soft} at most")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if Path("/dev/infiniband").exists() and locked != resource.RLIM_INFINITY:
        do = "ulimit -l unlimited (memlock): InfiniBand pins what it sends"
        yield Finding("bad", "locked memory", f"{locked / 2**20:.0f} MiB at most", do)
    shm = Path("/dev/shm")
    if not shm.is_dir():
        yield Finding("bad", "/dev/shm", "is not there", "mount a tmpfs at /dev/shm")
        return
    free = shutil.disk_usage(shm).free / 2**30
    if free < _SHM_GIB and subject.place.local_world > 1:
        do = "docker run --shm-size=16g, or an emptyDir of medium Memory in Kubernetes"
        yield Finding("bad", "/dev/shm", f"{free:.2f} GiB free, for {subject.place.local_world} ranks", do)
    else:
        yield Finding("ok", "/dev/shm", f"{free:.1f} GiB free")


# ---- environment

_HARMFUL: Mapping[str, tuple[str, str]] = {
    "NCCL_P2P_DISABLE": ("1", "GPUs of a machine then talk through host memory"),
    "NCCL_SHM_DISABLE": ("1", "ranks of a machine then talk through the network"),
    "NCCL_IB_DISABLE": ("1", "InfiniBand is then not used"),
    "NCCL_SOCKET_IFNAME": ("lo", "other machines are not reached by it"),
    "GLOO_SOCKET_IFNAME": ("lo", "other machines are not reached by it"),
    "NCCL_DEBUG": ("INFO|TRACE", "it prints from every rank, TRACE at every call"),
    "NCCL_ALGO": (".+", "NCCL chooses better by itself"),
    "NCCL_PROTO": (".+", "NCCL chooses better by itself"),
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel then waits for the one before"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is then checked by two more"),
    "TORCH_NCCL_BLOCKING_WAIT": ("1", "the host then waits in every collective"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor is then allocated by the driver"),
    "TORCH_FR_BUFFER_SIZE": ("0", "the flight recorder is off: hangs are explained badly"),
    "BIGTRAIN_HANG_SECONDS": ("0", "the watchdog is off: a hang lasts for ever"),
}
"""Variables that are harmful at a value (a pattern), and why; often left over from somebody's debugging."""


def environment(subject: Subject) -> Iterator[Finding]:
    """Variables that often hurt."""
    found = False
    for name, (pattern, why) in _HARMFUL.items():
        if re.fullmatch(pattern, value := os.environ.get(name, "")):
            if pattern == "lo" and subject.place.world == subject.place.local_world:
                continue
            found = True
            yield Finding("bad", "environment", f"{name}={value}: {why}", f"unset {name}")
    threads = os.environ.get("OMP_NUM_THREADS", "")
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if threads.isdigit() and int(threads) > max(1, usable // subject.place.local_world):
        found = True
        text = f"OMP_NUM_THREADS={threads}, with {usable} cores for {subject.place.local_world} ranks"
        yield Finding("bad", "environment", text, "unset it: bigtrain shares the cores out")
    if not found:
        yield Finding("ok", "environment", "no variable that is known to hurt")


def slurm(subject: Subject) -> Iterator[Finding]:
    """What SLURM gave."""
    env = os.environ
    if "SLURM_JOB_ID" not in env:
        return
    facts = [f"job {env['SLURM_JOB_ID']}", f"{env.get('SLURM_JOB_NUM_NODES', '?')} nodes"]
    facts += [f"{n} cores a task" for n in [env.get("SLURM_CPUS_PER_TASK")] if n]
    facts += [f"restart {n}" for n in [env.get("SLURM_RESTART_COUNT")] if n]
    yield Finding("ok", "SLURM", ", ".join(facts))
    if subject.place.launcher != "slurm" and subject.place.world == 1:
        text = "inside a job, but not started by srun: this looks at one process only"
        yield Finding("note", "SLURM", text, "srun bigtrain doctor looks at all")


# ---- disks


def disks(subject: Subject) -> Iterator[Finding]:
    """Speed and free space of the run's folder, and how fast the data are read."""
    if subject.run is not None:
        folder = _existing(subject.run)
        yield from timed("run folder", folder)
        yield from space("run folder", folder, subject.config)
    if subject.config is not None:
        for source in subject.config.data.corpora.values():
            if not is_url(source.path):
                yield from _data(Path(source.path))


def _existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(p for p in (path, *path.absolute().parents) if p.is_dir())


def timed(name: str, folder: Path) -> Iterator[Finding]:
    """Write a file, wait until it is on the disk, read it back, remove it."""
    probe = folder / f".bigtrain_doctor_{os.getpid()}"
    content = os.urandom(2**20)
    began = time.perf_counter()
    try:
        with probe.open("wb", buffering=0) as file:
            for _ in range(PROBE_MIB):
                if file.write(content) != len(content):  # a disk that fills up takes a part of it first
                    raise OSError(28, "No space left on device")
            os.fsync(file.fileno())
        written = PROBE_MIB * 1.048576 / (time.perf_counter() - began)
        read = _read_speed(probe)
    except OSError as e:
        text = f"{folder}: cannot be written: {e.strerror}"
        yield Finding("bad", name, text, "make room, or give another --run-dir")
        return
    finally:
        probe.unlink(missing_ok=True)
    text = f"{folder}: writes {written:,.0f} MB/s, reads {read:,.0f} MB/s ({PROBE_MIB} MiB)"
    if min(written, read) < SLOW_DISK_MB_S:
        yield Finding(
            "bad", name, text, "checkpoints will be slow: use a faster file system, or save less often"
        )
    else:
        yield Finding("ok", name, text)


def _read_speed(path: Path, most: int = PROBE_MIB * 2**20) -> float:
    """MB/s of the first `most` bytes, from the disk rather than from memory where the system lets us ask for it."""
    with path.open("rb", buffering=0) as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, count = time.perf_counter(), 0
        while count < most and (piece := file.read(2**20)):
            count += len(piece)
    return count / 1e6 / max(time.perf_counter() - began, 1e-9)


def space(name: str, folder: Path, config: Config | None) -> Iterator[Finding]:
    """Free space, against the checkpoints that the config keeps."""
    free = shutil.disk_usage(folder).free
    if config is None:
        yield Finding("ok", "free space", f"{free / 2**30:,.1f} GiB in {folder}")
        return
    checkpoints = folder_of(folder, config)
    if remote(checkpoints):
        yield Finding(
            "ok", "free space", f"checkpoints go to {checkpoints}; {free / 2**30:,.1f} GiB in {folder}"
        )
        return
    if config.checkpoint.folder:
        free = shutil.disk_usage(_existing(Path(checkpoints))).free
    # One more than are kept: the oldest goes when the newest is whole.
    size = checkpoint_bytes(config)
    needed = size * (config.checkpoint.keep_last + 1)
    text = f"{gibibytes(free)}; {config.checkpoint.keep_last} + 1 checkpoints take {gibibytes(needed)}"
    if free < needed:
        yield Finding("bad", "free space", text, "make room, or lower checkpoint.keep_last")
    else:
        yield Finding("ok", "free space", text)


def checkpoint_bytes(config: Config) -> int:
    """fp32 weights and the optimizer's moments: two of AdamW, one of SGD and Muon."""
    return parameters(config.model) * 4 * (3 if config.optim.kind == "adamw" else 2)


def _data(folder: Path) -> Iterator[Finding]:
    """The largest file of the dataset, read from the disk."""
    files = [f for f in folder.glob("*.bin") if f.is_file()] if folder.is_dir() else []
    single = folder.with_name(f"{folder.name}.bin")  # a Megatron corpus is named by its prefix
    if single.is_file():
        files.append(single)
    if not files:
        do = "bigtrain prepare writes one; data.path says where it is"
        yield Finding("bad", "data", f"{folder}: no dataset is there", do)
        return
    largest = max(files, key=lambda f: f.stat().st_size)
    speed, size = _read_speed(largest), sum(f.stat().st_size for f in files)
    text = f"{folder}: {len(files)} shards, {size / 2**20:,.1f} MiB, read at {speed:,.0f} MB/s"
    if speed < SLOW_DISK_MB_S and largest.stat().st_size > 2**20:
        yield Finding("bad", "data", text, "copy the data to a faster file system")
    else:
        yield Finding("ok", "data", text)


CHECKS: tuple[Check, ...] = (versions, cores, gpus, limits, environment, slurm, disks)
