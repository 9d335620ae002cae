"""Last words: a rank that fails leaves word in the store, and the others name it instead of a lost connection."""

from __future__ import annotations

import json
import re
import socket
import time
from collections.abc import Callable

import torch.distributed as dist
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from bigtrain.errors import RunError
from bigtrain.rollcall import GRACE, agent_hosts, store_host, within


def leave_word(store: Store, rank: int, message: str) -> None:
    """Tell the others why this rank fails, before its connections close. The first rank counts. Never raises."""
    word = json.dumps({"rank": rank, "message": message})
    try:
        if reachable(store):
            within(2.0, lambda: store.compare_set("roll/word", "", word))
    except Exception:
        return  # the others are left without a word; the error that brought us here matters more


def last_words(store: Store) -> str:
    """ "rank 3: why", of the first rank that failed; "" when none left a word or the store is gone. <= 2 s."""
    return _word(store) or ""


def _word(store: Store) -> str | None:
    """As last_words, but None when the store is gone."""

    def look() -> str:
        for pause in (0.0, 0.1, 0.3, 0.6):
            time.sleep(pause)
            if store.check(["roll/word"]):
                word = json.loads(store.get("roll/word"))
                return f"rank {word['rank']}: {word['message']}"
        return ""

    try:
        return within(1.5, look) if reachable(store) else None
    except Exception:
        return None


def reachable(store: Store) -> bool | None:
    """Whether something still listens where the store was: False when it is refused, None when nothing answers.

    A request to a store that is gone prints a C++ stack, and hangs where the link is cut.
    """
    while isinstance(store, PrefixStore):
        store = store.underlying_store
    if not isinstance(store, TCPStore):
        return True
    try:
        socket.create_connection((store.host, store.port), timeout=0.5).close()
        return True
    except ConnectionRefusedError:
        return False
    except OSError:
        return None


# What gloo and NCCL say when a peer has gone or does not answer, and NCCL's names for what this rank did wrong.
_GONE = re.compile(
    "closed by peer|reset by peer|Broken pipe|Connection refused|Socket closed|Timed out waiting|"
    "Application timeout caused pair closure|NCCL|nccl"
)
_OURS = re.compile("ncclUnhandledCudaError|ncclInvalid|out of memory")


def lost_connection(
    error: BaseException, store: Store, rank: int, ask: Callable[[str], str] | None = None
) -> RunError | None:
    """What a torch error means when it means that another rank has gone or hangs; None for any other error.

    Names the first rank that failed and its words, if it left any; else `ask`, the watchdog, may know which it was.
    """
    text = str(error)
    lost = isinstance(error, (dist.DistNetworkError, dist.DistStoreError, dist.DistBackendError)) or (
        isinstance(error, RuntimeError) and _GONE.search(text)
    )
    if not lost or _OURS.search(text):
        return None
    word = _word(store)
    if word is not None and rank == 0 and not agent_hosts():
        time.sleep(GRACE)  # the store ends with this process, and the others are about to read the same
    if word:
        return RunError(
            f"stopped because of {word}", where=f"rank {rank}", do="mend that rank's error and start again"
        )
    verdict = ask(_excerpt(text)) if ask and word is not None else ""
    if verdict:
        return RunError(verdict, where=f"rank {rank}", do=f"{_LOOK}; the same command resumes")
    if word is None:
        what = f"lost the other ranks, and {store_host()} with the store is gone"
    elif "imed out" in text or "timeout" in text:
        what = "another rank does not answer: it hangs, or ended without a word"
    else:
        what = "another rank ended without a word"
    return RunError(
        f"{what} ({_excerpt(text)})",
        where=f"rank {rank}",
        do=f"{_LOOK}; a rank that was killed, by out of memory too, leaves no word",
    )


_LOOK = "see the launcher's output and RUN/logs"


def _excerpt(text: str) -> str:
    """The first sentence of a torch error, without its source file and its emoji."""
    line = re.sub(r"^\[[^\]]*\.(cc|cpp|h):\d+\]\s*", "", text.strip()).partition("\n")[0]
    return line.partition(" This is typically")[0].rstrip(".")[:200]
