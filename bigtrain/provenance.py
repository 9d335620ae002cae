"""Where a run came from: code, packages, machine, command. No secrets: they end up in shared folders."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bigtrain
from bigtrain.mesh import Mesh
from bigtrain.redact import redacted

_PACKAGES = ("torch", "deepspeed", "triton", "numpy", "sentencepiece", "pydantic", "safetensors")


def provenance(mesh: Mesh) -> dict[str, Any]:
    """What this attempt runs on, as JSON. `hosts` has one name a machine (collective)."""
    hosts = [str(host) for host in mesh.gather(socket.gethostname())]
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": redacted(shlex.join(sys.argv)),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "hosts": sorted(set(hosts)),
        "world": mesh.world,
        "launcher": mesh.place.launcher,
        "git": git_state(Path(bigtrain.__file__).parents[1]),
        "versions": {
            "bigtrain": bigtrain.__version__,
            "python": platform.python_version(),
            **{name: version for name in _PACKAGES if (version := version_of(name))},
        },
        "hardware": hardware(mesh),
    }


def git_state(checkout: Path) -> dict[str, Any] | None:
    """Commit and whether tracked files differ from it; None outside a git checkout."""
    if not (checkout / ".git").exists():
        return None
    commit = _git(checkout, ["rev-parse", "HEAD"])
    if commit is None:
        return None
    status = _git(checkout, ["status", "--porcelain", "--untracked-files=no"])
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def _git(checkout: Path, arguments: Sequence[str]) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def version_of(package: str) -> str | None:
    """What the loaded package says of itself, else what pip installed: only torch itself tells its build (+cu130)."""
    if loaded := getattr(sys.modules.get(package), "__version__", None):
        return str(loaded)
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def hardware(mesh: Mesh) -> dict[str, Any]:
    """Processor, cores, memory and, if the run uses them, the GPUs of rank 0's machine."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
    }
    if mesh.device.type == "cuda":
        import torch

        found["gpu"] = torch.cuda.get_device_name(mesh.device)
        found["gpu_memory_gib"] = round(torch.cuda.get_device_properties(mesh.device).total_memory / 2**30, 1)
        found["gpus_on_host"] = torch.cuda.device_count()
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def _cpu_name() -> str:
    """The model name as Linux tells it; the architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.machine())
