"""Processes that do a function's work for the threads of this one.

Decoding and resizing leave the interpreter lock alone, but a photo takes a hundred such calls, and
from some eight threads on they wait for each other's lock: on sixteen cores sixteen threads read
fewer photos a second than eight, and sixteen processes three times as many as those eight
(benchmarks/RESULTS.md).

These are plain programs that read and write pickles through pipes, each with its length in front,
so that one which cannot be loaded leaves nothing behind. Those of `multiprocessing` import the
caller's main module once more, which a script without a guard does not survive, and outlive a
caller that is killed; these end with the pipe.
"""

import contextlib
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import traceback
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Workers:
    """Calls a function in other processes: `workers(*arguments)` as `function(*arguments)`.

    Threads call it at once, each waiting for a process of its own; what the function raises, the
    call raises, or a RuntimeError with its text where pickle cannot carry it. `close` ends the
    processes, and the calls under way with an error.

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
        self._closed = False
        task = _pickled(function)
        try:
            for _ in range(number):
                process = subprocess.Popen(
                    [sys.executable, "-P", "-m", __name__],  # not what lies in this folder
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    env=environment,
                    start_new_session=True,  # the terminal's Ctrl-C is for the caller
                )
                self._processes.append(process)
                _write(process.stdin, task)
                self._idle.put(process)
        except BaseException:
            self.close()
            raise

    def __call__(self, *arguments: Any) -> Any:
        request = _pickled(arguments)
        process = self._idle.get()
        try:
            _write(process.stdin, request)
            reply = _read(process.stdout)
        except (EOFError, OSError, ValueError) as error:
            process.kill()  # if it has not ended, what it is at is not known
            raise RuntimeError(self._end(process.wait())) from error
        except BaseException:
            process.kill()  # its answer would be taken for that to the next call
            raise
        finally:
            self._idle.put(process)
        succeeded, result = _loaded(reply)
        if succeeded:
            return result
        raise result

    def _end(self, status: int) -> str:
        if self._closed:
            return "the processes that read pictures have been closed"
        cause = "the cause is on stderr, above"
        if status == -signal.SIGKILL:
            cause = "if the memory was used up, let fewer of them run (loader_workers)"
        return f"a process that reads pictures has ended, with status {status}: {cause}"

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        self._closed = True
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.wait()
            process.stdout.close()
            with contextlib.suppress(OSError):  # what it was still to be told
                process.stdin.close()


_Message = list[Any]  # a pickle and the arrays it refers to, which lie where they lay: buffers


def _pickled(value: Any) -> _Message:
    arrays: list[pickle.PickleBuffer] = []
    content = pickle.dumps(value, protocol=5, buffer_callback=arrays.append)
    return [content, *(array.raw() for array in arrays)]


def _loaded(message: _Message) -> Any:
    return pickle.loads(message[0], buffers=message[1:])


def _write(pipe: BinaryIO, message: _Message) -> None:
    sizes = [len(buffer) for buffer in message]
    pipe.write(struct.pack(f"<Q{len(sizes)}Q", len(sizes), *sizes))
    for buffer in message:
        pipe.write(buffer)
    pipe.flush()


def _read(pipe: BinaryIO) -> _Message:
    """Raises EOFError where the pipe ends."""

    def fill(size: int) -> np.ndarray:
        buffer = np.empty(size, np.uint8)  # a bytearray would be filled with zeros first
        if pipe.readinto(buffer) != size:
            raise EOFError
        return buffer

    (number,) = struct.unpack("<Q", fill(8))
    return [fill(size) for size in struct.unpack(f"<{number}Q", fill(8 * number))]


def _serve() -> None:
    """What a process does until its input ends."""
    # Whoever uses it ends it; these may be meant for all processes of a terminal, or of a job.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # so that nothing that is printed comes between the replies
    requests = sys.stdin.buffer
    try:
        function = _loaded(_read(requests))
        while True:
            request = _read(requests)
            try:
                reply = _pickled((True, function(*_loaded(request))))
            except Exception as error:
                reply = _pickled_error(error)
            _write(replies, reply)
    except (EOFError, BrokenPipeError):
        os._exit(0)


def _pickled_error(error: Exception) -> _Message:
    """The error, with its traceback as a note; a RuntimeError if pickle cannot carry it."""
    trace = "".join(traceback.format_exception(error))
    try:
        error.add_note(trace)
        reply = _pickled((False, error))
        _loaded(reply)  # an error may be pickled and yet not be made again from its arguments
    except Exception:
        text = traceback.format_exception_only(error)[0].strip()
        substitute = RuntimeError(f"{text}\n{trace}")
        reply = _pickled((False, substitute))
    return reply


if __name__ == "__main__":
    _serve()
