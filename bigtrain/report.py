"""`bigtrain report RUN [RUN...]`: one HTML page and pictures about a run, or several laid over each other."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from bigtrain.errors import BigtrainError, UserError
from bigtrain.reporting.charts import By, abscissa, charts_of
from bigtrain.reporting.page import page
from bigtrain.reporting.watched import Watched, check_run

_POINTS = 400
"""Of a curve: about one for every three pixels of a wide screen."""
_LOGS = 20
"""Attempts whose logs are read for warnings."""


def report_command(args: argparse.Namespace) -> int:
    """Write the report and say where."""
    paths = report(args.runs, args.out, by=args.by)
    print(f"{paths[0]} ({paths[0].stat().st_size / 1e3:,.0f} kB) and {len(paths) - 1} pictures beside it")
    return 0


def report(runs: Sequence[str | Path], out: str | Path | None = None, *, by: By | None = None) -> list[Path]:
    """Write the page and the pictures; returns their paths, the page's first.

    `out` is a folder or the page's name (pictures then begin with its stem); by default the folder RUN/report, of
    several runs ./report. `by` is the abscissa, by default steps, or tokens when the runs' steps differ in tokens.
    Raises one UserError for all that is no run directory, and when `out` cannot be written.
    """
    paths = [Path(run) for run in runs]
    _check(paths)
    watched = [Watched(path, _POINTS) for path in paths]
    for run in watched:
        _look(run)
    names = _names(watched)
    by = by or abscissa(watched)
    charts = charts_of(watched, by, names)
    html, prefix = _target(paths, out)
    try:
        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(watched, names, charts, by), encoding="utf-8")
        from bigtrain.reporting.pictures import draw

        title = names[0] if len(names) == 1 else f"{len(names)} runs"
        return [html, *draw(charts, html.parent, prefix, title)]
    except OSError as e:
        raise UserError(
            f"cannot be written: {e.strerror}",
            where=str(html),
            do="give another --out, for example report.html",
        ) from e


def _look(run: Watched) -> None:
    try:
        run.look(attempts=_LOGS)
    except OSError as e:
        where = str(e.filename or run.path)
        raise UserError(f"cannot be read: {e.strerror}", where=where, do="see who may read it") from e


def _check(paths: Sequence[Path]) -> None:
    """One UserError for every path that is no run."""
    wrong: list[BigtrainError] = []
    for path in paths:
        try:
            check_run(path)
        except UserError as e:
            wrong.append(e)
    if len(wrong) == 1:
        raise wrong[0]
    if wrong:
        lines = [f"\n    {e.where}: {e.what}" + (f" ({e.do})" if e.do else "") for e in wrong]
        raise UserError(
            f"{len(wrong)} of {len(paths)} are no runs" + "".join(lines), do="give run directories"
        )


def _names(runs: Sequence[Watched]) -> list[str]:
    """A name for each run: the config's of one; of several the folder's, or as much of the path as tells them apart."""
    if len(runs) == 1:
        return [runs[0].name]
    parts = [Path(os.path.abspath(run.path)).parts for run in runs]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{name} ({i + 1})" for i, name in enumerate(names)]


def _target(paths: Sequence[Path], out: str | Path | None) -> tuple[Path, str]:
    """The page's path, and what the pictures' names begin with."""
    if out is None:
        out = paths[0] / "report" if len(paths) == 1 else Path("report")
    out = Path(out)
    if out.suffix.lower() in (".html", ".htm"):
        return out, f"{out.stem}-"
    return out / "index.html", ""
