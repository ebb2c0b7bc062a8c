"""Compiling in several processes, each of which may die without harm to the others."""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Generator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from queue import SimpleQueue

from fastattn.kernels.inspect.compile import Compiled, CompileJob, read_compiled

COMMAND = (sys.executable, "-m", "fastattn.kernels.inspect.compile")


class Compiler:
    """A process that compiles one job after another; started with the first, and anew after it died.

    `stop` may come from another thread while a job is compiled; `close` when none is any more.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.starting = threading.Lock()  # or a process could be started that stop() has not seen
        self.stopped = False
        # What compilers print; closed by close().
        self.said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115

    def compile(self, job: CompileJob) -> Compiled:
        """The figures; or, as its error, the first that went wrong in the compiler's own words."""
        process = self._running()
        self.said.seek(0, os.SEEK_END)
        before = self.said.tell()
        try:
            print(json.dumps(asdict(job)), file=process.stdin, flush=True)
            answer = process.stdout.readline()  # type: ignore[union-attr]
        except BrokenPipeError:
            answer = ""
        compiled = read_compiled(json.loads(answer)) if answer else Compiled(job, error=_last_words(process))
        if compiled.error is not None:
            self.said.seek(before)
            errors = [line.split("error: ", 1)[1].strip() for line in self.said if "error: " in line]
            compiled.error = ": ".join([compiled.error, *errors[:1]])
        return compiled

    def _running(self) -> subprocess.Popen:
        """The process, started where there is none; RuntimeError once stopped."""
        with self.starting:
            if self.stopped:
                raise RuntimeError("the compiler's process has been stopped")
            if self.process is None or self.process.poll() is not None:
                environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
                pipe = subprocess.PIPE
                self.process = subprocess.Popen(
                    COMMAND, stdin=pipe, stdout=pipe, stderr=self.said, text=True, env=environment
                )
            return self.process

    def stop(self) -> None:
        """Ends the process, for good: who waits for its answer gets none."""
        with self.starting:
            self.stopped = True
            if self.process is not None:
                self.process.kill()

    def close(self) -> None:
        if self.process is not None:
            self.process.wait()
            for pipe in (self.process.stdin, self.process.stdout):
                with contextlib.suppress(BrokenPipeError):  # what it was to read when it was stopped
                    pipe.close()  # type: ignore[union-attr]
        self.said.close()


def _last_words(process: subprocess.Popen) -> str:
    return f"the compiler's process ended with {process.wait()}"


def compile_all(jobs: Sequence[CompileJob], processes: int) -> Generator[Compiled, None, None]:
    """Each job's figures, as they come, `processes` at a time. Closing it stops what is under way."""
    idle: SimpleQueue[Compiler] = SimpleQueue()
    compilers = [Compiler() for _ in range(processes)]
    for compiler in compilers:
        idle.put(compiler)

    def compiled(job: CompileJob) -> Compiled:
        compiler = idle.get()
        try:
            return compiler.compile(job)
        finally:
            idle.put(compiler)

    threads = ThreadPoolExecutor(processes)
    try:
        for each in as_completed([threads.submit(compiled, job) for job in jobs]):
            yield each.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for compiler in compilers:
            compiler.stop()
        threads.shutdown()
        for compiler in compilers:
            compiler.close()
