"""Maps the top-level rooms to package names: kernels/ is fastattn.kernels and bench/ is fastattn.bench.

Bare `kernels` and `bench` belong to other projects on PyPI, so neither is ever installed under its folder's name.
Everything else is in pyproject.toml.
"""

from pathlib import Path

from setuptools import __version__ as setuptools_version
from setuptools import find_packages, setup

if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"fastattn is built with setuptools 77 or newer, and this environment has {setuptools_version}; "
        "run `pip install -U setuptools`, or leave out --no-build-isolation"
    )

HERE = Path(__file__).resolve().parent
ROOMS = {"fastattn": "fastattn", "fastattn.kernels": "kernels", "fastattn.bench": "bench"}


def room_packages() -> list[str]:
    """Each room and its sub-packages, under their installed names."""
    return [
        *ROOMS,
        *(f"{room}.{sub}" for room, folder in ROOMS.items() for sub in find_packages(str(HERE / folder))),
    ]


setup(package_dir=ROOMS, packages=room_packages())
