"""Processes that do a function's work for the threads of this one.

Decoding and resizing leave the interpreter lock alone, but a photo takes a hundred such calls, and
from some eight threads on they wait for each other's lock: on sixteen cores sixteen threads read
fewer photos a second than eight, and sixteen processes three times as many as those eight
(benchmarks/RESULTS.md).

These are plain programs that read and write pickles through pipes. Those of `multiprocessing`
import the caller's main module once more, which a script without a guard does not survive, and
outlive a caller that is killed; these end with the pipe.
"""

import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any


class Workers:
    """Calls a function in other processes: `workers(*arguments)` as `function(*arguments)`.

    Threads call it at once, each waiting for a process of its own; what the function raises, the
    call raises. `close` ends the processes, and the calls under way with an error.

    Args:
      function: importable by name, or a `functools.partial` of such a one.
      number: of processes.
    """

    def __init__(self, function: Callable, number: int):
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "JAX_PLATFORMS": "cpu",  # they are not to touch the accelerator
            "OPENBLAS_NUM_THREADS": "1",
        }
        self._processes: list[subprocess.Popen] = []
        self._idle: queue.SimpleQueue[subprocess.Popen] = queue.SimpleQueue()
        for _ in range(number):
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],  # not what lies in this folder
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,  # the terminal's Ctrl-C is for the caller
            )
            self._processes.append(process)
            _write(process.stdin, function)
            self._idle.put(process)

    def __call__(self, *arguments: Any) -> Any:
        process = self._idle.get()
        try:
            _write(process.stdin, arguments)
            succeeded, result = pickle.load(process.stdout)
        except (EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
            process.kill()  # one that answers what cannot be read is of no more use
            raise RuntimeError(
                f"a process that reads pictures has ended, with status {process.wait()}: if the "
                "memory was used up (-9), let fewer of them run (loader_workers)"
            ) from error
        finally:
            self._idle.put(process)
        if succeeded:
            return result
        raise result

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what it was still to be told
                process.stdin.close()


def _write(pipe: Any, value: Any) -> None:
    # Protocol 5 writes an array as it lies in memory, and reads it into its place.
    pickle.dump(value, pipe, protocol=5)
    pipe.flush()


def _serve() -> None:
    """What a process does until its input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing that is printed comes between the replies
    requests = sys.stdin.buffer
    try:
        function = pickle.load(requests)
        while True:
            arguments = pickle.load(requests)
            try:
                reply = True, function(*arguments)
            except Exception as error:
                error.add_note(traceback.format_exc())
                reply = False, error
            _write(replies, reply)
    except (EOFError, BrokenPipeError):
        os._exit(0)


if __name__ == "__main__":
    _serve()
