"""Work that ends on a signal: in its own thread, by failing where it waits."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from libfp.demo import ending


def test_what_the_work_returns_or_raises_comes_through():
    assert ending.run(lambda: 42, pytest.fail) == 42
    with pytest.raises(ZeroDivisionError):
        ending.run(lambda: 1 // 0, pytest.fail)


@pytest.mark.parametrize("number", ending.SIGNALS)
def test_a_signal_aborts_the_work_until_it_has_ended(number):
    calls, cleaned = [], []
    aborted = threading.Event()

    def work():
        os.kill(os.getpid(), number)
        assert aborted.wait(10)
        cleaned.append(threading.current_thread() is not threading.main_thread())
        raise InterruptedError("the work noticed")

    def abort():
        calls.append(1)
        if len(calls) == 3:
            aborted.set()

    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt):
        ending.run(work, abort)
    assert len(calls) >= 3
    assert cleaned == [True]
    assert signal.getsignal(number) is before
