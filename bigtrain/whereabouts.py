"""Where a process is: what its main thread does right now, which collective it waits in, and all stacks in a file.

For reports about hangs. It reads other threads' frames and torch's flight recorder and disturbs neither.
"""

from __future__ import annotations

import faulthandler
import json
import linecache
import re
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, Any

_PACKAGE = Path(__file__).parent
_WAITS = re.compile(r"\.wait\(|\bbarrier\(|\brecv\(|\.join\(.*group")
"""Source lines that wait for other ranks without a Python frame of torch.distributed (Work.wait is C++)."""
_IDLE = re.compile(r"sleep\(|acquire\(|\.get\(|select\(|\.result\(")
"""Source lines that wait for something on this machine, whatever the GPU does meanwhile."""


@dataclass(frozen=True)
class Whereabouts:
    """What the main thread is doing."""

    where: str
    """The innermost line of bigtrain, and what it called: "all_reduce, called at bigtrain/mesh.py:133"."""
    waits: bool
    """Whether it waits for other ranks, rather than being what they wait for."""
    collective: str
    """The oldest collective that has not ended: "all_reduce number 812 of [1048576]"; "" when none is known."""


def whereabouts() -> Whereabouts:
    """Of this process's main thread, from any thread."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    frames = list(_outwards(frame))
    pending = pending_collective()
    if not frames:
        return Whereabouts("the main thread has ended", False, pending)
    waits = any(f.f_globals.get("__name__", "").startswith("torch.distributed") for f in frames)
    line = linecache.getline(frames[0].f_code.co_filename, frames[0].f_lineno)
    waits = waits or bool(_WAITS.search(line))
    # On a GPU the main thread runs ahead and waits at the next number it reads; the recorder knows for what.
    waits = waits or (" (started)" in pending and not _IDLE.search(line))
    return Whereabouts(described(frames), waits, pending)


def _outwards(frame: FrameType | None) -> Iterator[FrameType]:
    """Frames from the innermost on; the interpreter's own start-up excluded."""
    while frame is not None:
        yield frame
        frame = frame.f_back


def described(frames: list[FrameType]) -> str:
    """The innermost frame of bigtrain, and what it called if that is something else's."""
    inner = frames[0]
    ours = next((f for f in frames if _PACKAGE in Path(f.f_code.co_filename).parents), inner)
    here = f"{ours.f_code.co_name} at {_shown(ours)}"
    if ours is inner:
        return here
    called = frames[frames.index(ours) - 1]
    deepest = "" if called is inner else f", now at {_shown(inner)}"
    return f"{called.f_code.co_name}, called by {here}{deepest}"


def _shown(frame: FrameType) -> str:
    """ "bigtrain/mesh.py:133", whatever the installation's folder."""
    path = Path(frame.f_code.co_filename)
    for root in (_PACKAGE.parent, *(Path(p) for p in sys.path if p)):
        if root in path.parents:
            return f"{path.relative_to(root).as_posix()}:{frame.f_lineno}"
    return f"{path.name}:{frame.f_lineno}"


# ---- torch's flight recorder


def flight() -> dict[str, Any]:
    """What torch's flight recorder holds; empty without torch, or with TORCH_FR_BUFFER_SIZE=0.

    It is on by default for NCCL and, since torch 2.8 or so, for gloo, except gloo's send and recv.
    """
    if "torch" not in sys.modules:
        return {}
    try:
        from torch._C._distributed_c10d import _dump_fr_trace_json  # type: ignore[attr-defined]

        found = json.loads(_dump_fr_trace_json(includeCollectives=True, onlyActive=False))
    except Exception:  # another build of torch: the report goes without
        return {}
    return found if isinstance(found, dict) else {}


def pending_collective(recorded: dict[str, Any] | None = None) -> str:
    """The oldest collective that was begun and has not ended, in words; "" when there is none or nobody knows."""
    recorded = flight() if recorded is None else recorded
    status = recorded.get("pg_status", {})
    for entry in recorded.get("entries", []):
        done = int(status.get(str(entry["pg_id"]), {}).get("last_completed_collective", -1))
        number = entry["collective_seq_id"]
        # NCCL keeps a state up to date, gloo only the number of the last one that ended.
        if entry["retired"] or entry["state"] == "completed" or (not entry["is_p2p"] and number <= done):
            continue
        name = str(entry["profiling_name"]).split(":")[-1]
        group = entry["process_group"][1]
        sizes = entry["input_sizes"][0] if entry["input_sizes"] else []
        state = "" if entry["state"] == "scheduled" else f" ({entry['state']})"
        order = f"number {number}" if not entry["is_p2p"] else f"message {entry['p2p_seq_id']}"
        within = "" if group in ("undefined", "") else f" of {group}"
        return f"{name} {order}{within}, {sizes}{state}"
    return ""


def write_flight(folder: Path, rank: int) -> str:
    """Write the recorder's content to flight_RANK.json; how to read it, "" when there is nothing.

    NCCL's goes to flight_RANK too, for torch's own analysis of all ranks' files. Of gloo's records that tool (torch
    2.13) makes a KeyError, for gloo does not name the ranks of its groups.
    """
    recorded = flight()
    if not recorded.get("entries"):
        return ""
    readable = folder / f"flight_{rank}.json"
    readable.write_text(json.dumps(recorded, indent=1) + "\n")
    if not any(str(entry["profiling_name"]).startswith("nccl") for entry in recorded["entries"]):
        return f"the last collectives: {readable}"
    from torch._C._distributed_c10d import _dump_fr_trace  # type: ignore[attr-defined]

    whole = _dump_fr_trace(includeCollectives=True, includeStackTraces=True, onlyActive=False)
    (folder / f"flight_{rank}").write_bytes(whole)
    return f"the last collectives: {readable}, and of all ranks: torchfrtrace --prefix flight_ {folder}"


# ---- stacks


def write_stacks(file: IO[str], title: str) -> None:
    """All threads' Python stacks, below a line that says why."""
    file.write(f"---- {time.strftime('%Y-%m-%d %H:%M:%S')} {title}: the stacks of all threads\n")
    file.flush()
    faulthandler.dump_traceback(file, all_threads=True)
    file.write("----\n")
    file.flush()
