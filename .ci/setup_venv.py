"""Makes .venv and installs fastattn into it, editable: what `make setup` runs. Standard library alone.

A torch that this interpreter can import is used through the system's site-packages; otherwise .venv gets its own. What
was done is written into .venv/fastattn-setup.json, and nothing is done twice. With --offline nothing is downloaded:
.venv-offline sees what this interpreter has (what `make gpu` runs on).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OFFLINE = "--offline" in sys.argv
VENV = ROOT / (".venv-offline" if OFFLINE else ".venv")
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fastattn-setup.json"
LOG = VENV / "setup.log"
CONSTRAINTS = VENV / "constraints.txt"

EXTRAS = "test,lint,bench,plot,models"
BUILD_WITH = "setuptools>=77"
# triton 3.6's interpreter fails with numpy 2.4.
NUMPY = "numpy<2.4"
LEAST_TORCH = (2, 11)
POLL_SECONDS = 0.5
TAIL_LINES = 12

NO_TORCH_HINT = (
    "check the network, or name a Python that already has torch 2.11 or newer: make PYTHON=/path/to/python; "
    "another build of torch: make TORCH=torch==<version>"
)
NO_TRITON_HINT = "everything but the Triton backend works without it; to try once more: make clean setup"
OFFLINE_HINT = f"it is built with {BUILD_WITH} of this Python"
NETWORK_HINT = "check the network and run make again: what is already installed stays"


def main() -> int:
    options = arguments()
    torch_here = importable_torch()
    use_system = usable(torch_here) and not options.own_torch
    if OFFLINE and not use_system:
        found = f"has torch {torch_here}" if torch_here else "has none"
        raise SystemExit(
            f"without a network, torch 2.11 or newer must be there already, and {sys.executable} {found}; "
            "name a Python that has it: make gpu PYTHON=/path/to/python3"
        )
    base = {
        "python": [sys.version, sys.executable],
        "root": str(ROOT),
        "torch": torch_here if use_system else options.torch,
        "system_torch": use_system,
        "triton": options.triton,
    }
    project = digest([ROOT / "pyproject.toml", ROOT / "setup.py", Path(__file__)])
    done = stamp()
    if done == {"base": base, "project": project} and PYTHON.exists() and not options.dry_run:
        return 0
    plan = steps(base, torch_here, options.own_torch)
    if options.dry_run:
        print("\n".join(plan))
        return 0
    if VENV.resolve() == Path(sys.prefix).resolve():
        raise SystemExit(
            f"{sys.executable} lies in {VENV.name}, which is to be made anew; name the Python that it was made from: "
            "make PYTHON=python3"
        )
    if VENV.exists() and not done:
        raise SystemExit(f"{VENV.name} is there, but make did not make it; move it away, then run make again")
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        version = ".".join(map(str, sys.version_info[:2]))
        raise SystemExit(
            f"{sys.executable} cannot make virtual environments (the module ensurepip is missing); "
            f"on Debian and Ubuntu: sudo apt install python{version}-venv; then run make again"
        )
    start = time.monotonic()
    print(f"setting up {VENV.name} (once):", *plan, sep="\n  ", flush=True)
    if done.get("base") != base or not PYTHON.exists():
        make_venv(base)
    install(base)
    STAMP.write_text(json.dumps({"base": base, "project": project}))
    print(f"ready after {time.monotonic() - start:.0f} s: {summary()}\n", flush=True)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--torch", default="torch==2.13.0", help="what pip installs where no torch can be imported")
    parser.add_argument("--triton", default="triton==3.6.0", help="what pip installs on Linux where there is no Triton")
    parser.add_argument("--own-torch", action="store_true", help="install --torch even where a torch can be imported")
    parser.add_argument("--offline", action="store_true", help="make .venv-offline of what this Python has")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, do nothing")
    return parser.parse_args()


def importable_torch() -> str | None:
    """The version of the torch that this interpreter has, from its metadata: nothing is imported."""
    if importlib.util.find_spec("torch") is None:
        return None
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def usable(version: str | None) -> bool:
    """New enough; 2.11.0a0 comes before 2.11."""
    match = re.match(r"(\d+)\.(\d+)[.\d]*(.*)", version or "")
    if match is None:
        return False
    release = int(match[1]), int(match[2])
    return release > LEAST_TORCH or (release == LEAST_TORCH and not re.match(r"\.?(a|b|rc|dev)", match[3]))


def digest(files: list[Path]) -> str:
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def stamp() -> dict:
    """What the last set-up wrote; empty when there is none or it is unreadable."""
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def steps(base: dict, torch_here: str | None, own_torch: bool) -> list[str]:
    """What will be done, in words."""
    if OFFLINE:
        return [
            f"Python {platform.python_version()} at {sys.executable}",
            f"torch {torch_here} and all else that this Python has; nothing is downloaded",
            "fastattn, editable",
        ]
    if base["system_torch"]:
        torch = f"torch {torch_here} is the one that this Python has"
    elif torch_here and not own_torch:
        torch = f"torch {torch_here} of this Python is older than 2.11, so {base['torch']} is installed beside it"
    else:
        torch = f"{base['torch']} is installed (hundreds of MB, with CUDA some GB)"
    asked_for = on_linux() and base["triton"]
    return [
        f"Python {platform.python_version()} at {sys.executable}",
        torch,
        f"{base['triton']} is installed if it is missing" if asked_for else "no Triton",
        f"fastattn, editable, with its extras {EXTRAS} (numpy, transformers, matplotlib and others)",
    ]


def on_linux() -> bool:
    return sys.platform.startswith("linux")


def make_venv(base: dict) -> None:
    """A new .venv. The stamp comes first, so that an interrupted set-up is recognised as ours."""
    shutil.rmtree(VENV, ignore_errors=True)
    VENV.mkdir()
    STAMP.write_text(json.dumps({"base": base}))
    system = ["--system-site-packages"] if base["system_torch"] else []
    if OFFLINE:
        system.append("--without-pip")  # with pip may come a setuptools that is too old and hides this Python's
    run("making the environment", [sys.executable, "-m", "venv", *system, str(VENV)], "is the disk full?")
    if base["system_torch"] and sys.prefix != sys.base_prefix:
        # An environment made from an environment looks past it to the interpreter below; this line leads to its torch.
        inner = subprocess.check_output([str(PYTHON), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"])
        outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
        Path(inner.decode().strip(), "outer-environment.pth").write_text("\n".join(outer) + "\n")


def install(base: dict) -> None:
    """Torch, Triton, then fastattn; nothing that pip finds on the way may replace the first two."""
    if OFFLINE:
        pip("fastattn", ["--no-build-isolation", "--no-deps", "-e", str(ROOT)], OFFLINE_HINT)
        return
    pip("setuptools", [BUILD_WITH], NETWORK_HINT)
    if base["system_torch"]:
        if version("torch") is None:
            raise SystemExit(f"torch cannot be imported in .venv (see {LOG}); to install one: make TORCH=torch==2.13.0")
    else:
        pip(base["torch"], shlex.split(base["torch"]), NO_TORCH_HINT)
    if on_linux() and base["triton"] and version("triton") is None:
        pip(base["triton"], [*shlex.split(base["triton"]), NUMPY], NO_TRITON_HINT, optional=True)
    kept = [f"{name}=={found}" for name in ("torch", "triton") if (found := version(name))]
    CONSTRAINTS.write_text("\n".join(kept) + "\n")
    project = ["--no-build-isolation", "-c", str(CONSTRAINTS), "-e", f"{ROOT}[{EXTRAS}]"]
    pip("fastattn and what it is tested with", project, NETWORK_HINT)


def version(package: str) -> str | None:
    """A package's version inside .venv, imported for real; None where that fails."""
    code = f"import {package}, importlib.metadata as m; print(m.version('{package}'))"
    with LOG.open("ab") as log:
        found = subprocess.run([str(PYTHON), "-c", code], stdout=subprocess.PIPE, stderr=log)
    return found.stdout.decode().split()[-1] if found.returncode == 0 else None


def summary() -> str:
    parts = [
        f"Python {platform.python_version()}",
        *(f"{name} {version(name) or 'none'}" for name in ("torch", "triton")),
    ]
    return ", ".join(parts)


def pip(words: str, packages: list[str], remedy: str, optional: bool = False) -> None:
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *packages]
    run(f"installing {words}", command, remedy, optional)


def run(words: str, command: list[str], remedy: str, optional: bool = False) -> None:
    """One step: a line on the terminal while it lasts, its output in the log, a sentence when it fails."""
    start = time.monotonic()
    print(f"- {words} ", end="", flush=True)
    begin = LOG.stat().st_size if LOG.exists() else 0
    with LOG.open("ab") as log:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
            if sys.stdout.isatty():
                show(f"- {words}, {time.monotonic() - start:.0f} s: {last_line(begin)}")
    except BaseException:
        process.kill()
        raise
    if sys.stdout.isatty():
        show(f"- {words} ")
    if process.returncode == 0:
        print(f"({time.monotonic() - start:.0f} s)", flush=True)
        return
    tail = "".join(f"    {line}\n" for line in said_since(begin)[-TAIL_LINES:])
    sentence = f"failed\n{tail}  {words} failed (the whole output: {LOG.relative_to(ROOT)}); {remedy}"
    if not optional:
        raise SystemExit(f"{sentence}")
    print(sentence, flush=True)


def said_since(begin: int) -> list[str]:
    with LOG.open("rb") as log:
        log.seek(begin)
        return [line for line in log.read().decode(errors="replace").splitlines() if line.strip()]


def last_line(begin: int) -> str:
    return (said_since(begin) or [""])[-1].strip()


def show(text: str) -> None:
    """Rewrite the terminal's current line."""
    columns = shutil.get_terminal_size().columns - 1
    print("\r\033[K" + text[:columns], end="", flush=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nstopped; run make again to go on")
