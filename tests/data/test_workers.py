"""Work done by other processes: its results, its errors, and that nothing is left of them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from convnext_jax.data.workers import Workers
from convnext_jax.errors import InputError


class NeedsMore(Exception):
    """Pickled without a complaint, but not made again from its one argument."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


class Unpicklable(Exception):
    """Carries what pickle refuses, behind much that it does not."""

    def __init__(self, message: str):
        super().__init__(message, bytes(300_000), lambda: None)


class Unloadable:
    """An argument that can be pickled, and not be loaded."""

    def __reduce__(self):
        return int, ("no number",)


def answer(kind: str, value: np.ndarray) -> np.ndarray:
    """What the workers of these tests do; they find it by its name."""
    if kind == "needs more":
        raise NeedsMore("what was wrong", 3)
    if kind == "unpicklable":
        raise Unpicklable("what was wrong")
    if kind == "no result":
        return [np.ones(100_000), lambda: None]
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
    status = Path(f"/proc/{pid}/stat")  # one that has ended and whose parent did not ask is Z
    return not status.exists() or status.read_text().rpartition(")")[2].split()[0] != "Z"


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


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("needs more", "NeedsMore: what was wrong"),
        ("unpicklable", "Unpicklable: .*what was wrong"),
        ("no result", "(?i)pickle"),
    ],
)
def test_what_cannot_be_pickled_is_told_and_leaves_nothing_behind(workers, kind, said):
    for _ in range(3):
        with pytest.raises(Exception, match=said) as caught:
            workers(kind, None)
        assert "Traceback" in str(caught.value) + "".join(getattr(caught.value, "__notes__", []))
    value = np.arange(3)
    for _ in range(4):  # each of the two at least once, with no answer that was meant for another
        assert (workers("", value) / value.clip(1))[1] in [p.pid for p in workers._processes]


def test_arguments_that_cannot_be_sent_or_loaded_leave_nothing_behind(workers):
    for _ in range(3):
        with pytest.raises(Exception, match=r"(?i)pickle"):
            workers("", [bytes(300_000), lambda: None])
        with pytest.raises(ValueError, match="no number"):
            workers("", Unloadable())
    assert workers("", np.ones(1)) in [process.pid for process in workers._processes]


def test_the_end_of_a_process_is_told(workers):
    with pytest.raises(RuntimeError, match=r"has ended, with status 3: .*on stderr, above$"):
        workers("end", None)


def test_one_that_was_killed_may_have_used_up_the_memory(workers):
    for process in workers._processes:
        process.kill()
    with pytest.raises(RuntimeError, match=r"has ended, with status -9: .*loader_workers"):
        workers("", np.ones(1))


def test_a_start_that_fails_half_way_leaves_no_process(monkeypatch):
    started = []
    start = subprocess.Popen

    def popen(*arguments, **options):
        if len(started) == 2:
            raise BlockingIOError("no more processes")
        started.append(start(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(subprocess, "Popen", popen)
    with pytest.raises(BlockingIOError):
        Workers(answer, 3)
    assert [process.returncode for process in started] == [-signal.SIGKILL] * 2


def test_close_does_not_wait(workers):
    with ThreadPoolExecutor(1) as threads:
        call = threads.submit(workers, "sleep", None)
        time.sleep(1)
        start = time.perf_counter()
        workers.close()
        with pytest.raises(RuntimeError, match="have been closed"):
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
