"""Do something on every rank and learn together whether it worked: no rank waits for one that failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

from bigtrain.checkpoint.format import DamagedError
from bigtrain.errors import BigtrainError, RunError, UserError
from bigtrain.mesh import Mesh

T = TypeVar("T")
_KINDS = {"DamagedError": DamagedError, "RunError": RunError, "UserError": UserError}


def together(mesh: Mesh, act: Callable[[], T]) -> list[T]:
    """Call `act` on every rank (collective); returns every rank's result in rank order.

    When it raises on some rank, every rank raises that error: the lowest rank's, of the same class if it is
    one of ours (a RunError otherwise), with the rank named.
    """
    cause: Exception | None = None
    report: tuple[str, object] = ("", None)
    try:
        report = ("", act())
    except BigtrainError as e:
        cause, report = e, (type(e).__name__, (e.what, e.where, e.do))
    except Exception as e:
        cause, report = e, ("RunError", (f"{type(e).__name__}: {e}", "", ""))
    reports = cast(list[tuple[str, object]], mesh.gather(report))
    for rank, (kind, content) in enumerate(reports):
        if not kind:
            continue
        what, where, do = cast(tuple[str, str, str], content)
        if mesh.world > 1 and kind != "UserError":
            where = f"rank {rank}" + (f", {where}" if where else "")
        raise _KINDS.get(kind, RunError)(what, where=where, do=do) from cause
    return [cast(T, content) for _, content in reports]
