"""The first signal asks, the second one leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

from bigtrain.signals import StopFlag


def test_the_first_signal_sets_the_flag_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    flag = StopFlag()
    assert not flag
    os.kill(os.getpid(), signal.SIGUSR1)
    assert flag
    assert flag.signal_name == "SIGUSR1"
    flag.close()
    assert signal.getsignal(signal.SIGUSR1) is before


def test_the_second_signal_leaves_at_once() -> None:
    code = (
        "import os, signal\nfrom bigtrain.signals import StopFlag\nf = StopFlag()\n"
        "os.kill(os.getpid(), signal.SIGTERM)\nassert f\nos.kill(os.getpid(), signal.SIGTERM)\nprint('still here')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 128 + signal.SIGTERM
    assert "still here" not in done.stdout
