"""Work done by other processes: its results, its errors, and that nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import numpy as np
import pytest

from convnext_jax.data.workers import Workers
from convnext_jax.errors import InputError


def answer(kind: str, value: np.ndarray) -> np.ndarray:
    """What the workers of these tests do; they find it by its name."""
    if kind == "refuse":
        raise InputError("a.jpg: cannot be read")
    if kind == "end":
        os._exit(3)
    if kind == "sleep":
        time.sleep(60)
    if kind == "print":
        print("a library's remark")
        os.write(1, b"another")
    return value * os.getpid()


@pytest.fixture
def workers(monkeypatch):
    monkeypatch.syspath_prepend(os.path.dirname(__file__))
    with closing(Workers(answer, 2)) as workers:
        yield workers


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_each_call_is_answered_by_its_process(workers):
    value = np.arange(300_000).reshape(3, 100_000)  # more than a pipe holds
    with ThreadPoolExecutor(5) as threads:
        results = list(threads.map(lambda _: workers("", value), range(20)))
    pids = {int(result[0, 1]) for result in results}
    assert pids == {process.pid for process in workers._processes}
    for result in results:
        np.testing.assert_array_equal(result, value * result[0, 1])
        result += 1  # an array of the caller's own


def test_what_is_printed_does_not_come_between(workers):
    assert workers("print", np.ones(1)) in [process.pid for process in workers._processes]


def test_an_error_reaches_the_caller_and_the_process_goes_on(workers):
    for _ in range(5):
        with pytest.raises(InputError) as caught:
            workers("refuse", None)
        assert str(caught.value) == "a.jpg: cannot be read"
        assert "in answer" in caught.value.__notes__[0]
    assert workers("", np.ones(1)) > 0


def test_the_end_of_a_process_is_told(workers):
    with pytest.raises(RuntimeError, match=r"has ended, with status 3: .*loader_workers"):
        workers("end", None)


def test_close_does_not_wait(workers):
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(workers, "sleep", None)
        time.sleep(1)
        start = time.perf_counter()
        workers.close()
        with pytest.raises(RuntimeError, match="has ended"):
            call.result()
        assert time.perf_counter() - start < 10
    assert not any(is_alive(process.pid) for process in workers._processes)


def test_processes_end_with_a_caller_that_is_killed():
    """And the caller need not guard its module: it is not imported again."""
    program = """
import operator, time
from convnext_jax.data.workers import Workers
workers = Workers(operator.add, 2)
print(workers(1, 2), *[process.pid for process in workers._processes], flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as caller:
        three, *pids = map(int, caller.stdout.readline().split())
        assert three == 3
        assert all(is_alive(pid) for pid in pids)
        os.kill(caller.pid, signal.SIGKILL)
    for _ in range(100):
        if not any(is_alive(pid) for pid in pids):
            return
        time.sleep(0.1)
    raise AssertionError(f"processes are left: {pids}")
