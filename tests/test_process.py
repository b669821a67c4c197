"""The allocator is tuned once, and never against the user's own setting."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from resmol.process import ALLOCATOR_SETTINGS, ALLOCATOR_VARIABLE, StopSignal, allocator_environment


def test_only_glibc_and_only_when_unset() -> None:
    assert allocator_environment({}, "glibc") == {ALLOCATOR_VARIABLE: ALLOCATOR_SETTINGS}
    assert allocator_environment({}, "musl") == {}
    assert allocator_environment({ALLOCATOR_VARIABLE: "mine"}, "glibc") == {}


def test_restart_keeps_the_arguments_and_happens_once() -> None:
    code = "import sys; from resmol.process import restart_with_tuned_allocator as restart; print('up', flush=True)"
    code += "; restart(); print(sys.argv[1:])"
    environment = {key: value for key, value in os.environ.items() if key != ALLOCATOR_VARIABLE}
    result = subprocess.run([sys.executable, "-c", code, "a b", "--c"], capture_output=True, text=True, env=environment)
    expected = "up\n" * (2 if allocator_environment(environment) else 1) + "['a b', '--c']\n"
    assert (result.returncode, result.stdout) == (0, expected)


def test_the_first_signal_counts_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal() as stop:
        assert not stop.requested
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert (stop.requested, stop.name, stop.number) == (True, "SIGTERM", 15)
    assert signal.getsignal(signal.SIGTERM) is before


def test_outside_the_main_thread_it_does_nothing() -> None:
    seen = []

    def work() -> None:
        with StopSignal() as stop:
            seen.append(stop.requested)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
