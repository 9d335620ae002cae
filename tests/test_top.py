"""`bigtrain top`: one screen about a run, whatever is in its directory and however wide the terminal is."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import sys
import termios
import time
from pathlib import Path

import pytest

from bigtrain.cli import main
from bigtrain.reporting.watched import Watched
from bigtrain.top import screen, size
from tests.watching_parts import START, make_run, rename, write_log

NOW = START + 3600 + 125.0


def shown(path: Path, width: int = 80, height: int | None = 24, **options: object) -> list[str]:
    run = Watched(path)
    run.look()
    return [line.plain.rstrip() for line in screen(run, width, height, now=NOW, **options)]  # type: ignore[arg-type]


@pytest.fixture
def resumed(tmp_path: Path) -> Path:
    """Preempted after step 30, gone on from 20, now at 50 of 60."""
    path = make_run(tmp_path / "run", last=30, end="preempted", reason="SIGUSR1", skip=[7])
    return make_run(path, first=21, last=50, end=None)


def test_a_screen_tells_everything_that_matters(resumed: Path) -> None:
    write_log(resumed, 2, 0, "2026-11-25 01:55:02,000 WARNING bigtrain.sinks: TensorBoardSink failed")
    text = "\n".join(shown(resumed))
    assert "demo   gone   1 x CPU process on" in text
    assert "(attempt 2)" in text
    assert "step 50 / 60" in text
    assert " 83.3%" in text
    assert "━━━" in text
    for row in ("loss            2.0600  +0.5z", "held out        2.1600  0.720 bpb", "gradient norm   1.02",
                "learning rate   1.000e-03", "tokens/s        32  16 each", "step time       2 s",
                "MFU             40.0%", "memory, rank 0  3.00 GiB"):  # fmt: skip
        assert row in text, text
    assert "▇" in text
    assert "1 steps skipped" in text
    assert "best held out 2.1600 at 50" in text
    assert "preempted after step 30: SIGUSR1" in text
    assert "attempt 2 goes on after step 20 with 1 rank" in text
    assert "TensorBoardSink failed" in text


def test_the_time_left_is_told_while_it_runs(resumed: Path) -> None:
    provenance = resumed / "provenance.json"
    provenance.write_text(provenance.read_text().replace(str(2**22 + 1), str(os.getpid())))
    text = "\n".join(shown(resumed))
    assert " running " in text
    assert "eta 20s" in text


@pytest.mark.parametrize(("width", "height"), [(80, 24), (40, 10), (132, 43), (250, 80), (20, 3)])
def test_it_fits_the_terminal(resumed: Path, width: int, height: int) -> None:
    lines = shown(resumed, width, height)
    assert len(lines) <= height
    assert max(map(len, lines)) <= max(width, 40)
    if height >= 40:
        assert sum("█" in line for line in lines) > 15, "there is room for a picture"


def test_an_ascii_terminal_gets_ascii(resumed: Path) -> None:
    lines = shown(resumed, plain=True)
    assert "".join(lines).isascii()
    assert "###" in "\n".join(lines)


def test_names_and_messages_do_not_steer_the_terminal(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", end="failed", reason="[bold]x[/bold]\r\n\x07\x9b31m", last=3)
    rename(path, "a\x1b[2Jb")
    write_log(path, 1, 0, "2026-11-25 01:55:02,000 WARNING x: \x1b]0;title\x07 https://me:sesame@host/")
    text = "".join(shown(path))
    assert text.isprintable()
    assert "[bold]x[/bold]" in text, "markup is text"


def test_no_step_yet(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run", last=0, end=None, evaluate_every=0)
    text = "\n".join(shown(path))
    assert "no step is recorded yet" in text
    assert "step 0 / 60" in text
    path = make_run(tmp_path / "evaluated", last=0, end=None)
    assert "held out        5.1000" in "\n".join(shown(path))


def test_a_damaged_directory_is_said(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "config.toml").write_text("= broken")
    with (path / "metrics.jsonl").open("a") as f:
        f.write("garbage\n")
    text = "\n".join(shown(path))
    assert "config.toml is there and cannot be read" in text
    assert "1 lines of metrics.jsonl cannot be read" in text
    assert "step 60" in text


def test_losses_that_are_not_finite(tmp_path: Path) -> None:
    text = "\n".join(shown(make_run(tmp_path / "run", last=5, skip=range(1, 6), evaluate_every=0)))
    assert "loss            not finite" in text
    assert "5 steps skipped" in text


def test_a_run_that_is_not_there_yet_is_waited_for(tmp_path: Path) -> None:
    assert "not there yet; waiting for" in "".join(shown(tmp_path / "run", width=200))


def test_once_prints_one_screen_without_control_codes(
    resumed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["top", str(resumed), "--once"]) == 0
    out = capsys.readouterr().out
    assert "step 50 / 60" in out
    assert "\x1b" not in out


def test_once_of_no_run_is_the_users_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a", last=1)
    assert main(["top", str(tmp_path / "b"), "--once"]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path / 'b'}: is no run directory" in said
    assert f"runs there: {tmp_path / 'a'}" in said
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    assert main(["top", str(tmp_path / "other")]) == 2


def test_sizes() -> None:
    assert [size(n) for n in (0, 999, 7_000_000, 3 * 2**40)] == ["0 B", "999 B", "6.68 MiB", "3 TiB"]


class Terminal:
    """`bigtrain top` on a terminal of 24 lines."""

    def __init__(self, run: Path) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.environ["TERM"] = "xterm-256color"
            os.execv(sys.executable, [sys.executable, "-m", "bigtrain", "top", str(run), "--every", "0.1"])
        fcntl.ioctl(self.descriptor, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.seen = b""

    def read_until(self, text: bytes, seconds: float = 180) -> None:
        until = time.monotonic() + seconds
        start = len(self.seen)
        while text not in self.seen[start:]:
            if time.monotonic() > until:
                os.kill(self.pid, signal.SIGKILL)
                raise AssertionError(f"{text!r} did not come within {seconds:g} s: {self.seen[-2000:]!r}")
            if select.select([self.descriptor], [], [], 0.2)[0]:
                self.seen += os.read(self.descriptor, 1 << 16)

    def ends(self) -> int:
        with contextlib.suppress(OSError):  # EIO is what Linux says once the other side is closed
            while True:
                self.seen += os.read(self.descriptor, 1 << 16)
        os.close(self.descriptor)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.mark.runs
@pytest.mark.parametrize("leave", ["q", "interrupt"])
def test_live_it_follows_the_run_and_leaves_cleanly(tmp_path: Path, leave: str) -> None:
    path = tmp_path / "run"
    terminal = Terminal(path)
    terminal.read_until(b"not there yet")
    make_run(path, last=30, end="preempted", reason="SIGUSR1")
    terminal.read_until(b"step 30 / 60")
    make_run(path, first=21, last=60)
    terminal.read_until(b"step 60 / 60")
    if leave == "q":
        os.write(terminal.descriptor, b"q")
    else:
        os.kill(terminal.pid, signal.SIGINT)
    assert terminal.ends() == 0
    after = terminal.seen.rpartition(b"\x1b[?1049l")[2]
    assert b"Traceback" not in after
    assert b"step 60 / 60" in after, "the last screen stays"
    assert b"\x1b[?25h" in terminal.seen, "the cursor is back"
