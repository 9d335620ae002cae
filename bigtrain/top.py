"""`bigtrain top RUN`: a run on one screen of a terminal, live over ssh or after the fact."""

from __future__ import annotations

import argparse
import contextlib
import math
import select
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from bigtrain.console import duration, short
from bigtrain.errors import UserError
from bigtrain.reporting.blocks import blocks, sensible_frame
from bigtrain.reporting.events import Event, events_of
from bigtrain.reporting.watched import Watched, check_run

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_COLOURS = {
    "empty": "yellow",
    "starting": "cyan",
    "running": "green",
    "silent": "yellow",
    "gone": "red",
    "done": "blue",
    "preempted": "magenta",
    "failed": "red",
}
_LABEL, _VALUE = 14, 18
"""Columns of a row's name and of its newest value; the curve takes what is left."""


def top_command(args: argparse.Namespace) -> int:
    """Draw the run until Ctrl-C or q; with --once, or where no terminal is, one screen. UserError without a run."""
    from rich.console import Console

    path = Path(args.run)
    console = Console(highlight=False)
    try:
        return _show(path, console, once=args.once, every=max(args.every, 0.1))
    except OSError as e:
        raise UserError(
            f"cannot be read: {e.strerror}", where=str(e.filename or path), do="see who may read it"
        ) from e


def _show(path: Path, console: Console, *, once: bool, every: float) -> int:
    if once or not console.is_terminal or console.is_dumb_terminal:
        check_run(path)
        run = Watched(path)
        run.look()
        for line in screen(run, console.width, None, plain=_plain(console)):
            console.print(line, soft_wrap=True)
        return 0
    if path.is_dir():  # an absent one may be a job that waits in a queue
        check_run_or_empty(path)
    _follow(Watched(path), console, every)
    return 0


def check_run_or_empty(path: Path) -> None:
    """Raises UserError for a folder with something else in it; an empty one may be about to be filled."""
    if any(entry.name != ".lock" for entry in path.iterdir()):
        check_run(path)


def _follow(run: Watched, console: Console, every: float) -> None:
    from rich.console import Group
    from rich.live import Live

    with (
        contextlib.suppress(KeyboardInterrupt),
        _Interrupt() as interrupt,
        _keys() as wait,
        Live(console=console, screen=True, auto_refresh=False) as live,
    ):
        while True:
            run.look()
            lines = screen(run, console.width, console.height - 1, plain=_plain(console))
            lines += [_line("")] * (console.height - 1 - len(lines))
            lines.append(_line((time.strftime("%H:%M:%S  q leaves"), "dim")))
            live.update(Group(*lines), refresh=True)
            interrupt.now = True
            if interrupt.asked or wait(every):
                break
            interrupt.now = False
    for line in screen(run, console.width, None, plain=_plain(console)):  # stays when the full screen is gone
        console.print(line, soft_wrap=True)


class _Interrupt:
    """Ctrl-C leaves between two screens, never in the middle of drawing one."""

    def __init__(self) -> None:
        self.asked = self.now = False

    def __enter__(self) -> _Interrupt:
        self._former = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._former)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        if self.now:
            self.now = False  # once: what puts the terminal right is not to be interrupted either
            raise KeyboardInterrupt


class _Keys:
    """Waits for time to pass, or for q on the keyboard."""

    def __call__(self, seconds: float) -> bool:
        """Whether to leave."""
        time.sleep(seconds)
        return False


class _Keyboard(_Keys):
    def __call__(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            if not select.select([sys.stdin], [], [], left)[0]:
                return False
            key = sys.stdin.read(1)
            if key in ("q", "Q", "\x03", ""):
                return True
        return False


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Single keys without Enter, where the input is a terminal; it is left as it was."""
    try:
        import termios
        import tty

        descriptor = sys.stdin.fileno()
        former = termios.tcgetattr(descriptor)
    except (ImportError, OSError, ValueError, termios.error):
        yield _Keys()
        return
    try:
        tty.setcbreak(descriptor)
        yield _Keyboard()
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, former)


def _plain(console: Console) -> bool:
    return not console.encoding.lower().startswith("utf")


def screen(
    run: Watched, width: int, height: int | None, *, plain: bool = False, now: float | None = None
) -> list[Text]:
    """The lines to show, none wider than `width`; at most `height` of them (None: what there is to say, no more).

    `plain`: ASCII only.
    """
    now = time.time() if now is None else now
    width = max(width, 40)
    if not run.path.exists():
        waiting = (f"not there yet; waiting for {run.path}", _COLOURS["empty"])
        return [_fitted(line, width, plain) for line in (_line((run.name, "bold")), _line(waiting))]
    head = [*_title(run, width, now), _progress(run, width, plain, now), _line("")]
    rows = _rows(run, width, plain)
    facts = _facts(run, width, now)
    events = [_event(event, width, now) for event in events_of(run) if event.kind != "evaluation"]
    tail = 6 if height is None else height - len(head) - len(rows) - len(facts) - 1
    picture: list[Text] = []
    if height is not None and tail >= 14:  # room to spare: a picture of the loss instead of one line
        picture = _picture(run, width, min(20, tail - max(3, min(8, len(events))) - 1), plain)
        tail -= len(picture)
    shown = [*head, *picture, *rows, *facts]
    if events and tail > 0:
        shown += [_line(""), *events[-tail:]]
    shown = shown if height is None else shown[:height]
    return [_fitted(line, width, plain) for line in shown]


def clean(text: str) -> str:
    """Without control characters: a name or a message must not steer the terminal."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def _line(*parts: str | tuple[str, str]) -> Text:
    from rich.text import Text

    line = Text(no_wrap=True, overflow="ellipsis")
    for part in parts:
        text, style = (part, "") if isinstance(part, str) else part
        line.append(clean(text), style=style)
    return line


def _fitted(line: Text, width: int, plain: bool) -> Text:
    line.truncate(width, overflow="crop" if plain else "ellipsis")
    if plain:
        line.plain = line.plain.encode("ascii", "replace").decode()
    return line


def _title(run: Watched, width: int, now: float) -> list[Text]:
    """Name, state and where it runs; what is wrong with it on a line of its own."""
    standing = run.standing(now)
    colour = _COLOURS[standing.word]
    left: list[str | tuple[str, str]] = [
        (run.name, "bold"),
        "  ",
        (f" {standing.word} ", f"bold reverse {colour}"),
    ]
    said = standing.text
    lines = [_line(*left, "  ", _place(run))]
    if said:
        lines.append(_line((said, colour)))
    for name in run.unreadable:
        lines.append(_line((f"{name} is there and cannot be read", "yellow")))
    return lines


def _place(run: Watched) -> str:
    """On how much of which machine, and which attempt it is."""
    if not run.attempts:
        return str(run.path)
    attempt = run.attempts[-1]
    hardware = attempt.get("hardware") or {}
    hosts = attempt.get("hosts") or []
    unit = str(hardware.get("gpu") or "CPU process")
    parts = [f"{attempt.get('world', 1)} x {unit}"]
    if hosts:
        parts.append(f"on {hosts[0]}" if len(hosts) == 1 else f"on {len(hosts)} hosts")
    if len(run.attempts) > 1:
        parts.append(f"(attempt {len(run.attempts)})")
    return " ".join(map(str, parts))


def _progress(run: Watched, width: int, plain: bool, now: float) -> Text:
    """Steps, a bar, per cent, time left."""
    step, total, share = run.history.step, run.total_steps(), run.share_done()
    steps = f"step {step:,}" + (f" / {total:,}" if total else "")
    left = run.seconds_left() if run.standing(now).word in ("running", "silent") else None
    tail = "" if share is None else f" {100 * share:5.1f}%"
    if left is not None and step and share is not None and share < 1:
        tail += f"  eta {duration(left)}"
    room = width - len(steps) - len(tail) - 2
    if share is None or room < 8:
        return _line((steps, "bold"), tail)
    done = round(share * room)
    full, empty = ("#", "-") if plain else ("━", "─")
    return _line((steps, "bold"), "  ", (full * done, "green"), (empty * (room - done), "dim"), tail)


def _rows(run: Watched, width: int, plain: bool) -> list[Text]:
    """A quantity a line: name, newest value, its curve from the first step to the last."""
    history, last = run.history, run.history.last
    if not last:
        rows = [_line(("no step is recorded yet", "dim"))]
        return [*rows, _held_out(run, width, plain)] if history.evaluations else rows
    z = last.get("loss_z")
    values = [
        ("loss", _number(last.get("loss"), ".4f") + (f"  {z:+.1f}z" if isinstance(z, float) else ""), "loss"),
        ("gradient norm", _number(last.get("grad_norm"), ".4g"), "grad_norm"),
        ("learning rate", _number(last.get("lr"), ".3e"), "lr"),
        ("tokens/s", _speed(run), "tokens_per_second"),
        ("step time", _number(run.step_seconds(), ".3g", " s"), "seconds"),
    ]
    if last.get("mfu") is not None:
        values.append(("MFU", _number(last["mfu"], ".1%"), "mfu"))
    values.append(
        ("memory, rank 0", _number(last.get("memory_bytes"), ".2f", " GiB", 2**-30), "memory_bytes")
    )
    lines = [
        _row(name, value, history.steps.curve(column).mean.tolist(), width, plain)
        for name, value, column in values
    ]
    if history.evaluations:
        lines.insert(1, _held_out(run, width, plain))
    return lines


def _held_out(run: Watched, width: int, plain: bool) -> Text:
    newest, values = run.history.evaluations[-1], run.history.held_out.curve("loss").mean.tolist()
    value = f"{_number(newest.loss, '.4f')}  {_number(newest.bits_per_byte, '.3f')} bpb"
    return _row("held out", value, values, width, plain)


def _row(name: str, value: str, values: list[float], width: int, plain: bool) -> Text:
    room = width - _LABEL - 2 - _VALUE - 1
    curve = blocks(values, room, plain=plain, frame=sensible_frame(values))[0] if values and room >= 8 else ""
    return _line((f"{name:<{_LABEL}}  ", "dim"), (f"{value:<{_VALUE}} ", "bold"), (curve, "cyan"))


def _speed(run: Watched) -> str:
    """Of the last step, all devices and one."""
    speed, each = (
        run.history.last.get("tokens_per_second"),
        run.history.last.get("tokens_per_second_per_device"),
    )
    if not isinstance(speed, (int, float)):
        return "-"
    text = short(speed)
    return f"{text}  {short(each)} each" if isinstance(each, (int, float)) and each < 0.99 * speed else text


def _number(value: object, form: str, unit: str = "", scale: float = 1.0) -> str:
    if not isinstance(value, (int, float)):
        return "not finite" if value is None else "-"
    return f"{value * scale:{form}}{unit}" if math.isfinite(value) else "not finite"


def _picture(run: Watched, width: int, height: int, plain: bool) -> list[Text]:
    """The loss over the run, with a scale."""
    values = run.history.steps.curve("loss").mean.tolist()
    if len(values) < 2:
        return []
    low, high = sensible_frame(values)
    drawn = blocks(values, width - 10, height - 1, plain=plain, frame=(low, high))
    scale = [f"{high:8.3f}", *[" " * 8] * (height - 3), f"{low:8.3f}"] if height >= 3 else [""] * height
    lines = [_line((label, "dim"), "  ", (row, "cyan")) for label, row in zip(scale, drawn, strict=False)]
    return [*lines, _line("")]


def _facts(run: Watched, width: int, now: float) -> list[Text]:
    """What happened so far, in two or three lines."""
    history, last = run.history, run.history.last
    parts = []
    if last:
        tokens, epochs = last.get("tokens"), last.get("epochs")
        if isinstance(tokens, int):
            parts.append(
                f"{short(tokens)} tokens" + (f" ({epochs:.3g} epochs)" if isinstance(epochs, float) else "")
            )
        parts.append(f"{duration(history.steps.total('seconds')[1])} of training")
    best = history.best()
    if best is not None:
        parts.append(f"best held out {best.loss:.4f} at {best.step:,}")
    lines = [_line(""), _line(", ".join(parts))] if parts else []
    if history.skipped:
        last_skip = f", the last at step {history.skips[-1]:,}" if history.skips else ""
        lines.append(
            _line((f"{history.skipped:,} steps skipped (not finite, or a spike){last_skip}", "yellow"))
        )
    if history.unreadable:
        lines.append(_line((f"{history.unreadable:,} lines of metrics.jsonl cannot be read", "yellow")))
    lines.append(_line(("checkpoints   ", "dim"), _saved(run, width - 14, now)))
    return lines


def _saved(run: Watched, width: int, now: float) -> str:
    """The steps of the newest checkpoints, and the age of the last."""
    if "://" in run.where_checkpoints:
        return f"in {run.where_checkpoints}"
    if not run.checkpoints:
        return "none yet"
    newest = run.checkpoints[-1]
    age = f" ({duration(now - newest.time)} ago, {size(newest.bytes)})"
    steps = [f"{c.step:,}" for c in run.checkpoints]
    while len(steps) > 1 and len("steps ... " + "  ".join(steps) + age) > width:
        del steps[0]
    more = "... " if len(steps) < len(run.checkpoints) else ""
    return f"step{'s' * (len(run.checkpoints) > 1)} {more}{'  '.join(steps)}{age}"


def size(count: int) -> str:
    """A number of bytes in binary units."""
    number, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if number < 1000 or unit == "TiB":
            break
        number /= 1024
    return f"{number:.3g} {unit}"


def _event(event: Event, width: int, now: float) -> Text:
    when = time.localtime(event.time)
    form = "%H:%M:%S" if now - event.time < 20 * 3600 else "%m-%d %H:%M"
    colour = {"bad": "red", "warn": "yellow", "good": "green"}.get(event.tone, "")
    return _line((f"{time.strftime(form, when):<12}", "dim"), (event.text, colour))
