"""Maps top-level folders to package names: kernels/ is fastattn.kernels, bench/ fastattn.bench, csrc/ fastattn.csrc.

Bare `kernels` and `bench` belong to other projects on PyPI, so none is ever installed under its folder's name.
A wheel holds the C++ sources and is the same everywhere; with FASTATTN_BUILD=force in the environment it also holds the
libraries that they make, for this platform: FASTATTN_BUILD=force pip wheel --no-build-isolation --no-deps .
The CPU backend's is built for it; the CUDA backend's, which takes minutes, is taken along where `fastattn build --cuda`
has been run.
Everything else is in pyproject.toml.
"""

import os
import sys
import types
from pathlib import Path

from setuptools import Distribution, find_packages, setup
from setuptools import __version__ as setuptools_version

if int(setuptools_version.split(".")[0]) < 77:
    raise SystemExit(
        f"fastattn is built with setuptools 77 or newer, and this environment has {setuptools_version}; "
        "run `pip install -U setuptools`, or leave out --no-build-isolation"
    )

# What follows is not everywhere in older ones.
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

HERE = Path(__file__).resolve().parent
PACKAGES = {"fastattn": "fastattn", "fastattn.kernels": "kernels", "fastattn.bench": "bench"}
SOURCES = "fastattn.csrc", "csrc"
WITH_LIBRARY = os.environ.get("FASTATTN_BUILD") == "force"


def python_packages() -> list[str]:
    """Each package and its sub-packages, under their installed names."""
    return [
        *PACKAGES,
        *(f"{package}.{sub}" for package, folder in PACKAGES.items() for sub in find_packages(str(HERE / folder))),
    ]


def source_packages() -> list[str]:
    """The folders of C++ files, as packages without code."""
    package, folder = SOURCES
    folders = sorted(path.relative_to(HERE / folder) for path in (HERE / folder).rglob("*") if path.is_dir())
    return [package, *(".".join((package, *path.parts)) for path in folders if "__pycache__" not in path.parts)]


class BuildWithLibraries(build_py):
    """Puts the libraries beside the modules."""

    def run(self) -> None:
        super().run()
        if WITH_LIBRARY and not self.editable_mode:
            # The package itself cannot be imported before it is installed.
            sys.modules["fastattn"] = package = types.ModuleType("fastattn")
            package.__path__ = [str(HERE / "fastattn")]  # type: ignore[attr-defined]
            from fastattn.building.commands import BuildError
            from fastattn.building.cpu_library import LIBRARY as CPU
            from fastattn.building.cuda_library import LIBRARY as CUDA

            target = Path(self.build_lib).absolute() / "fastattn" / "lib"
            target.mkdir(parents=True, exist_ok=True)
            CPU.ship(target, build=True)
            try:
                built = CUDA.ship(target, build=False)
            except BuildError:  # the compiler that is asked for is none
                built = False
            if not built:
                print(
                    "fastattn: the wheel has no CUDA library; `fastattn build --cuda` first, and it has",
                    file=sys.stderr,
                )


class PlatformDistribution(Distribution):
    """Knows that a wheel with libraries in it is for one platform."""

    def has_ext_modules(self) -> bool:
        return WITH_LIBRARY


class TaggedWheel(bdist_wheel):
    """The libraries fit any Python."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(
    package_dir=PACKAGES | dict([SOURCES]),
    packages=python_packages() + source_packages(),
    distclass=PlatformDistribution,
    cmdclass={"build_py": BuildWithLibraries, "bdist_wheel": TaggedWheel},
)
