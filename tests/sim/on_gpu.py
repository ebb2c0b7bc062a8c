"""A process that runs compiled kernels of tests/sim/kernels on a device: one that hangs, or spoils the CUDA context,
takes no other test with it. `python on_gpu.py cuda` reads calls on stdin and answers on stdout; `Runner` is its other
end.
"""

import contextlib
import ctypes
import os
import pickle
import select
import subprocess
import sys

STARTS_WITHIN = 120.0  # seconds: torch's import, the device's context
ANSWERS_WITHIN = 30.0
HEADER = 8  # bytes: how many follow


def call(library, name, arguments):
    """run_<name> of a loaded library: None, or what went wrong. Tensors are passed as pointers."""
    function = getattr(library, f"run_{name}")
    function.restype = ctypes.c_char_p
    said = function(*(ctypes.c_void_p(each.data_ptr()) if hasattr(each, "data_ptr") else each for each in arguments))
    return None if said is None else said.decode()


def write(stream, message):
    data = pickle.dumps(message)
    stream.write(len(data).to_bytes(HEADER, "little") + data)
    stream.flush()


def read(stream):
    """The next message, or None at the end."""
    header = stream.read(HEADER)
    return pickle.loads(stream.read(int.from_bytes(header, "little"))) if len(header) == HEADER else None


def serve(device):
    import torch

    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints
    torch.zeros(1, device=device)
    write(answers, "ready")
    while (message := read(sys.stdin.buffer)) is not None:
        path, name, arguments = message
        on_device = [each.to(device) if isinstance(each, torch.Tensor) else each for each in arguments]
        native = [(ctypes.c_int * len(each))(*each) if isinstance(each, list) else each for each in on_device]
        try:
            said = call(ctypes.CDLL(path), name, native)
            usable = said is None  # else the context may be spoiled, and its tensors with it
            after = [each.cpu() if isinstance(each, torch.Tensor) else None for each in on_device] if usable else []
        except Exception as error:  # the answer says it
            said, after = f"{type(error).__name__}: {error}", []
        write(answers, (said, after))


class Runner:
    """Calls in such a process, which is started when it is needed, and anew after a call that went wrong."""

    def __init__(self, device):
        self.device = device
        self._process = None

    def __call__(self, path, name, arguments, within=ANSWERS_WITHIN):
        """What run_<name> says, None if all is well, and the tensors among the arguments as it leaves them."""
        if self._process is None:
            command = [sys.executable, __file__, self.device]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if self._answer(STARTS_WITHIN) != "ready":
                self.stop()
                return f"no process came up that could use {self.device}", []
        plain = [list(each) if isinstance(each, ctypes.Array) else each for each in arguments]
        with contextlib.suppress(BrokenPipeError):  # it is dead, which the missing answer says
            write(self._process.stdin, (str(path), name, plain))
        answer = self._answer(within)
        if answer is None:
            code = self._ended()
            answer = f"it hangs: no end within {within:g} s" if code is None else f"the process ended with {code}", []
        if answer[0] is not None:
            self.stop()
        return answer

    def _ended(self):
        """Its exit code, or None while it runs."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self._process.wait(1)
        return None

    def _answer(self, within):
        ready, _, _ = select.select([self._process.stdout], [], [], within)
        return read(self._process.stdout) if ready else None

    def stop(self):
        """Ends the process, kernels that hang with it."""
        if self._process is not None:
            self._process.kill()
            for stream in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(BrokenPipeError):
                    stream.close()
            self._process.wait()
        self._process = None


if __name__ == "__main__":
    serve(sys.argv[1])
