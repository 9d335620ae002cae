"""The first signal asks, a later one leaves at once."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

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


def test_signals_are_heard_while_the_main_thread_is_in_c() -> None:
    """It waits where Python runs no handler: another thread takes the signals, as the kernel may choose to."""
    code = """
import ctypes, os, signal, threading, time
from bigtrain.signals import StopFlag
flag = StopFlag()
def ask():
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for n in range(2):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
        print(flag.signal_name, flush=True)
threading.Thread(target=ask, daemon=True).start()
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
ctypes.CDLL(None).sleep(30)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=20)
    assert (done.returncode, done.stdout) == (128 + signal.SIGTERM, "SIGTERM\n")


def test_closing_leaves_no_thread() -> None:
    before = threading.active_count()
    flag = StopFlag()
    assert threading.active_count() == before + 1
    flag.close()
    assert threading.active_count() == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize(
    ("passed_on_seconds", "gap", "stays"), [(0, 0.0, False), (60, 0.0, True), (0.3, 0.6, False)]
)
def test_a_second_signal(passed_on_seconds: float, gap: float, stays: bool) -> None:
    """It leaves at once, unless it is the first one passed on by a launcher, 1 ms later."""
    code = f"""
import os, signal, time
from bigtrain.signals import StopFlag
flag = StopFlag({passed_on_seconds})
os.kill(os.getpid(), signal.SIGTERM)
time.sleep({gap} or 0.001)
os.kill(os.getpid(), signal.SIGUSR1)
time.sleep(1)
print(flag.signal_name)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == ((0, "SIGTERM\n") if stays else (128 + signal.SIGUSR1, ""))
