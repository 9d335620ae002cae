"""The report as one HTML page that loads nothing from anywhere and works without its script."""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import bigtrain
from bigtrain.redact import redacted
from bigtrain.reporting.charts import DARK, LIGHT, By, Chart
from bigtrain.reporting.compare import at_the_same_place, differences, figures, layout, shown
from bigtrain.reporting.events import Event, events_of
from bigtrain.reporting.planned import planned
from bigtrain.reporting.svg import colour, dash, figure
from bigtrain.reporting.watched import Watched

_MOST_EVENTS = 300
_MOST_EVALUATIONS = 200
_STATES = {"done": "info", "running": "good", "starting": "good", "failed": "bad", "gone": "bad"}


def page(runs: Sequence[Watched], names: Sequence[str], charts: Sequence[Chart], by: By) -> str:
    """The page. `names` tell the runs apart and are the users': everything from a run directory is escaped."""
    title = names[0] if len(runs) == 1 else f"{len(runs)} runs: " + ", ".join(names)
    script = _resource("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    sources = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'"
    policy = f"{sources}; base-uri 'none'; form-action 'none'"
    drawn = "".join(figure(chart, i) for i, chart in enumerate(charts))
    body = [
        f"<header><h1>{escape(title)}</h1>{_run_list(runs, names)}</header>",
        _figures(runs, names, charts),
        f'<div class="charts">{drawn}</div>' if charts else '<p class="warn">No step is recorded yet.</p>',
        _how_drawn(runs) if charts else "",
        _differences(runs, names) if len(runs) > 1 else "",
        *(_run_section(run, name, alone=len(runs) == 1) for run, name in zip(runs, names, strict=True)),
        f"<footer>Made by bigtrain {escape(bigtrain.__version__)} on {_when(time.time())}.</footer>",
        f'<script type="application/json" id="data">{_data(charts, by, len(runs) > 1)}</script>',
        f"<script>{script}</script>",
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="referrer" content="no-referrer">\n'
        f"<title>{escape(title)} - bigtrain</title>\n"
        f"<style>{_palette()}{_resource('page.css')}</style>\n</head>\n<body>\n"
        + "\n".join(part for part in body if part)
        + "\n</body>\n</html>\n"
    )


def _resource(name: str) -> str:
    return (
        importlib.resources.files(__package__ or "bigtrain.reporting")
        .joinpath(name)
        .read_text(encoding="utf-8")
    )


def _palette() -> str:
    """One class a colour, for lines (c), areas and keys (k)."""
    light = "".join(f"--c{i}:{c};" for i, c in enumerate(LIGHT))
    dark = "".join(f"--c{i}:{c};" for i, c in enumerate(DARK))
    classes = "".join(
        f".plot .c{i}{{stroke:var(--c{i})}}.plot .band.c{i}{{stroke:none;fill:var(--c{i})}}.k{i}{{color:var(--c{i})}}"
        for i in range(len(LIGHT))
    )
    return f":root{{{light}}}@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{classes}\n"


def _data(charts: Sequence[Chart], by: By, several: bool) -> str:
    """What the script shows under the pointer, as JSON that cannot end its element."""

    def rounded(values: Iterable[float]) -> list[float]:
        return [float(f"{value:.5g}") for value in values]

    found = []
    for chart in charts:
        lines = []
        for line in chart.lines:
            curve = line.curve
            entry: dict[str, Any] = {
                "label": line.label,
                "colour": colour(line, several),
                "held": line.held_out,
                "x": [float(f"{x:.9g}") for x in curve.x.tolist()],
                "y": rounded(curve.mean.tolist()),
            }
            if (curve.high > curve.low).any():
                entry |= {"low": rounded(curve.low.tolist()), "high": rounded(curve.high.tolist())}
            lines.append(entry)
        found.append({"x_max": chart.x_max, "lines": lines})
    text = json.dumps({"by": by, "charts": found}, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _run_list(runs: Sequence[Watched], names: Sequence[str]) -> str:
    items = []
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        standing = run.standing()
        chip = f'<span class="state {_STATES.get(standing.word, "warn")}">{standing.word}</span>'
        key = (
            f'<span class="key k{i % len(LIGHT)}{dash(i)}"></span><b>{escape(name)}</b> '
            if len(runs) > 1
            else ""
        )
        said = f" {escape(standing.text)}" if standing.text else ""
        where = escape(str(run.path))
        items.append(f'<li>{key}{chip}{said} <span class="soft mono">{where}</span>{_trouble(run)}</li>')
    return f'<ul class="runs">{"".join(items)}</ul>'


def _trouble(run: Watched) -> str:
    """What of the run could not be read."""
    said = [f"{name} cannot be read" for name in run.unreadable]
    if run.history.unreadable:
        said.append(f"{run.history.unreadable:,} lines of metrics.jsonl cannot be read and are left out")
    if run.history.repeated:
        said.append(
            f"{run.history.repeated:,} steps stand in metrics.jsonl more than once: the last ones are shown"
        )
    return "".join(f'<br><span class="warn">{escape(text)}</span>' for text in said)


def _figures(runs: Sequence[Watched], names: Sequence[str], charts: Sequence[Chart]) -> str:
    """Cards for one run, a table for several."""
    all_figures = [figures(run) for run in runs]
    if len(runs) == 1:
        cards = "".join(
            f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in all_figures[0].items()
        )
        return f'<dl class="cards">{cards}</dl>'
    keys = list(dict.fromkeys(key for found in all_figures for key in found))
    rows = [[key, *(found.get(key, "-") for found in all_figures)] for key in keys]
    for chart in charts:
        if chart.panel.key == "loss" and any(not line.held_out for line in chart.lines):
            name, values = at_the_same_place(chart, len(runs))
            rows.insert(keys.index("tokens") + 1 if "tokens" in keys else 1, [name, *values])
    return f"<section><h2>Figures</h2>{_table(['', *names], rows, numbers=True)}</section>"


def _how_drawn(runs: Sequence[Watched]) -> str:
    """What a point of a curve is, in words."""
    widths = {run.history.steps.width for run in runs}
    if widths == {1}:
        text = "Every step is drawn."
    else:
        most = max(widths)
        whose = "each point is the mean of" if len(widths) == 1 else "each point is the mean of up to"
        text = f"The curves are thinned: {whose} {most:,} successive steps"
        text += ", the pale band reaches from the lowest of them to the highest." if len(runs) == 1 else "."
    text += " Where there is a fine line, the bold one is its mean over the neighbours."
    return f'<p class="soft">{text}</p>'


def _differences(runs: Sequence[Watched], names: Sequence[str]) -> str:
    rows = [[f"\0{key}", *values] for key, values in differences(runs)]
    said = _table(["setting", *names], rows) if rows else "<p>The configurations are the same.</p>"
    return f"<section><h2>What differs in the configuration</h2>{said}</section>"


def _run_section(run: Watched, name: str, *, alone: bool) -> str:
    """Everything about one run beside its curves; of several runs each folded."""
    parts = [
        ("Events", _events(run), alone),
        ("Held-out evaluations", _evaluations(run), False),
        ("Layout", _pairs(layout(run)), alone),
        ("Plan", planned(run), False),
        ("Provenance", _provenance(run), False),
        (
            "Configuration",
            _pairs({key: shown(value) for key, value in run.settings.items()}, mono=True),
            False,
        ),
    ]
    if alone:
        opened = "".join(
            f"<section><h2>{title}</h2>{body}</section>" for title, body, now in parts if body and now
        )
        folded = "".join(_details(title, body) for title, body, now in parts if body and not now)
        return f'<div class="sections">{opened}</div>{folded}'
    inside = "".join(f"<h3>{title}</h3>{body}" for title, body, _ in parts if body)
    return _details(name, inside)


def _details(title: str, body: str) -> str:
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _events(run: Watched) -> str:
    found = [event for event in events_of(run) if event.kind != "evaluation"]
    history = run.history
    if history.skipped:
        listed = ", ".join(f"{step:,}" for step in list(history.skips)[-50:])
        more = "the last of them: " if history.skipped > 50 else ""
        text = f"{history.skipped:,} steps skipped (not finite, or a spike): {more}{listed}"
        found.append(Event(run.newest() or 0.0, "skip", text, "warn"))
    if not found:
        return ""
    left = len(found) - _MOST_EVENTS
    rows = "".join(
        f'<tr><td class="time">{_when(event.time)}</td>'
        f'<td class="{event.tone if event.tone != "plain" else ""}">{escape(redacted(event.text))}</td></tr>'
        for event in found[-_MOST_EVENTS:]
    )
    said = f'<p class="soft">The last {_MOST_EVENTS} of {len(found):,}.</p>' if left > 0 else ""
    elsewhere = run.where_checkpoints
    where = f'<p class="soft">Checkpoints lie in <span class="mono">{escape(elsewhere)}</span>.</p>'
    return f'{said}<div class="scroll"><table><tbody>{rows}</tbody></table></div>{where}'


def _evaluations(run: Watched) -> str:
    found = run.history.evaluations
    if not found:
        return ""
    every = -(-len(found) // _MOST_EVALUATIONS)
    chosen = found[::-1][::every][::-1]  # the last one is always there
    rows = [
        [f"{e.step:,}", *(_number(value) for value in (e.loss, e.bits_per_byte, e.perplexity))]
        for e in chosen
    ]
    said = f'<p class="soft">Every {every}th of {len(found):,}.</p>' if every > 1 else ""
    return said + _table(["after step", "loss", "bits per byte", "perplexity"], rows, numbers=True)


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:,.5g}"


def _provenance(run: Watched) -> str:
    if not run.attempts:
        return ""
    rows = []
    for i, attempt in enumerate(run.attempts[-100:], start=max(1, len(run.attempts) - 99)):
        git, hosts = _dict(attempt.get("git")), _list(attempt.get("hosts"))
        commit = (
            f"{str(git.get('commit', '-'))[:12]}{' with changes' if git.get('dirty') else ''}" if git else "-"
        )
        places = ", ".join(map(str, hosts[:3])) + (f" and {len(hosts) - 3} more" if len(hosts) > 3 else "")
        rows.append(
            [str(i), str(attempt.get("started", "-")), shown(attempt.get("world")), places, commit,
             redacted(str(attempt.get("command", "-")))]
        )  # fmt: skip
    last = run.attempts[-1]
    facts = {
        key: shown(value) for part in ("hardware", "versions") for key, value in _dict(last.get(part)).items()
    }
    facts["launcher"] = shown(last.get("launcher"))
    return _table(["attempt", "started", "ranks", "hosts", "commit", "command"], rows) + _details(
        "Machine and packages of the last attempt", _pairs(facts)
    )


def _dict(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _pairs(pairs: Mapping[str, str], *, mono: bool = False) -> str:
    if not pairs:
        return ""
    form = ' class="mono"' if mono else ""
    rows = "".join(f"<tr><th{form}>{escape(k)}</th><td{form}>{escape(v)}</td></tr>" for k, v in pairs.items())
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = False) -> str:
    """A table; of `numbers` all columns but the first stand to the right. A first cell after \\0 is a setting's key."""
    side = ' class="n"' if numbers else ""
    heads = "".join(f"<th{side if i else ''}>{escape(text)}</th>" for i, text in enumerate(head))
    lines = []
    for first, *others in rows:
        key = (
            f'<th class="mono">{escape(first[1:])}</th>'
            if first.startswith("\0")
            else f"<th>{escape(first)}</th>"
        )
        lines.append(f"<tr>{key}{''.join(f'<td{side}>{escape(text)}</td>' for text in others)}</tr>")
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _when(seconds: float) -> str:
    """A time in UTC, which readers everywhere know how to read."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))
    except (OverflowError, ValueError, OSError):
        return "-"
