"""What goes wrong with the build cache in ordinary life: odd folders, full disks, compilers that hang."""

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

import fastattn
from fastattn.building import build_cache, commands, compiler, library, library_files
from fastattn.building.cpu_library import LIBRARY

pytestmark = pytest.mark.skipif(not build_cache.SUPPORTED, reason=build_cache.NOT_HERE)
QUERY = torch.randn(1, 2, 5, 8)


def call_and_see_one_warning():
    """The reference serves, and one warning says why, at the line that called."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        out = torch.nn.Sequential(Attends())(QUERY)
        fastattn.attention(QUERY, QUERY, QUERY)
    assert torch.equal(out, fastattn.attention(QUERY, QUERY, QUERY, backend="reference"))
    assert [(each.category, each.filename) for each in caught] == [(RuntimeWarning, __file__)]
    assert caught[0].lineno in (line, CALLS)
    return str(caught[0].message)


class Attends(torch.nn.Module):
    def forward(self, query):
        return fastattn.attention(query, query, query)


CALLS = Attends.forward.__code__.co_firstlineno + 1


def test_damage_where_nothing_may_be_built_is_one_warning(fake, unloaded, monkeypatch):
    fake()
    os.truncate(LIBRARY.build(), 2)
    monkeypatch.setenv("FASTATTN_BUILD", "never")
    assert "is damaged: it has 2 bytes, and 5 were made" in call_and_see_one_warning()
    with pytest.raises(fastattn.BackendUnavailable, match="is damaged"):
        fastattn.attention(QUERY, QUERY, QUERY, backend="cpu")


# ---- odd folders


def in_the_way(folder, put):
    (folder / "file").write_text("")
    put("FASTATTN_CACHE_DIR", str(folder / "file" / "cache"))


def homeless(home):
    def do(folder, put):
        put("FASTATTN_CACHE_DIR", "")
        put("XDG_CACHE_HOME", "")
        put("HOME", home)

    return do


def odd_mark(make):
    def do(folder, put):
        (folder / "cache").mkdir(mode=0o700)
        make(folder / "cache" / LIBRARY.files.cached_name().replace(library_files.SUFFIX, library_files.MARK))

    return do


def of_another_user(folder, put):
    if os.geteuid() != 0:
        pytest.skip("only root can give folders to another user")
    homeless(str(folder / "home"))(folder, put)
    (folder / "home").mkdir()
    os.chown(folder / "home", 54321, 54321)


ODD = {
    "a file in the way": in_the_way,
    "too long a name": lambda folder, put: put("FASTATTN_CACHE_DIR", str(folder / ("x" * 300))),
    "too long a path": lambda folder, put: put("FASTATTN_CACHE_DIR", str(folder) + "/xyz" * 2000),
    "nobody's home": lambda folder, put: put("FASTATTN_CACHE_DIR", "~no-such-user/cache"),
    "a home of another user": of_another_user,
    "an empty HOME": homeless(""),
    "a HOME that is the root folder": homeless("/"),
    "a relative HOME": homeless("somewhere"),
    "a mark that is a folder": odd_mark(lambda path: path.mkdir()),
    "a mark that is a folder with something in it": odd_mark(lambda path: (path / "x").mkdir(parents=True)),
    "a mark of bytes": odd_mark(lambda path: path.write_bytes(b"\xff\xfe\x00")),
    "a mark that is a pipe": odd_mark(lambda path: os.mkfifo(path)),
    "a lock that is a folder": odd_mark(lambda path: path.with_suffix(library_files.LOCK).mkdir()),
}


@pytest.mark.parametrize("odd", ODD)
def test_no_error_of_the_system_comes_out_of_a_call(fake, unloaded, tmp_path, monkeypatch, odd):
    """Whatever the folder is: the compiler's library cannot be loaded, so that the reference serves in the end."""
    fake()
    pwd = pytest.importorskip("pwd")

    def nobody(uid):
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    ODD[odd](tmp_path, monkeypatch.setenv)
    with pytest.raises(fastattn.BackendUnavailable, match="backend 'cpu' cannot run this call: the CPU library cannot"):
        fastattn.attention(QUERY, QUERY, QUERY, backend="cpu")
    monkeypatch.setattr(LIBRARY, "failure", None)
    said = call_and_see_one_warning()
    assert said.startswith(
        "fastattn computes with its plain reference on the CPU, slowly: the CPU library cannot be lo"
    )
    assert fastattn.explain(QUERY, QUERY, QUERY).backend == "reference"
    assert not Path("/.cache/fastattn").exists()


def test_where_no_place_is_left_the_sentence_names_each(fake, unloaded, tmp_path, monkeypatch):
    fake()
    for place in ("cache", f"temporary/fastattn-{os.getuid()}"):
        (tmp_path / place).mkdir()
        (tmp_path / place).chmod(0o777)
    said = call_and_see_one_warning()
    assert said.count("can be written by others") == 2
    with pytest.raises(fastattn.BackendUnavailable, match="can be written by others"):
        fastattn.attention(QUERY, QUERY, QUERY, backend="cpu")


@pytest.mark.parametrize("odd", ["a file in the way", "too long a name", "too long a path"])
def test_a_bad_folder_is_named_once_in_one_warning(fake, unloaded, tmp_path, monkeypatch, odd):
    fake()
    ODD[odd](tmp_path, monkeypatch.setenv)
    (tmp_path / "temporary" / f"fastattn-{os.getuid()}").write_text("in the way too")
    said = call_and_see_one_warning()
    assert said.count("name another in FASTATTN_CACHE_DIR") == said.count("the cache folder ") == 2
    assert said.count("cannot be used (") == 2


def test_a_mark_is_named_as_a_remembered_failure(fake, unloaded):
    fake()
    LIBRARY.build()
    mark = LIBRARY.find().with_suffix(library_files.MARK)
    LIBRARY.find().unlink()
    mark.write_text("x")
    says = f"the CPU library could not be built before, says {mark}; `fastattn build` tries again\nx"
    assert LIBRARY.why_not().startswith(says)
    assert f"slowly: {says}" in call_and_see_one_warning()


def test_the_home_that_the_system_knows_serves_where_HOME_is_empty(monkeypatch):
    pwd = pytest.importorskip("pwd")
    for name in ("HOME", "XDG_CACHE_HOME", "FASTATTN_CACHE_DIR"):
        monkeypatch.setenv(name, "")
    expected = Path(pwd.getpwuid(os.getuid()).pw_dir)
    if expected == Path("/"):
        pytest.skip("the system's list says that this user's home is the root folder")
    assert build_cache.asked_folder() == expected / ".cache" / "fastattn"


def test_a_relative_folder_stays_the_same_one(fake, tmp_path, monkeypatch):
    fake()
    monkeypatch.setenv("FASTATTN_CACHE_DIR", f"relative-{tmp_path.name}")
    monkeypatch.chdir(tmp_path)
    path = LIBRARY.build()
    assert path == tmp_path / f"relative-{tmp_path.name}" / path.name
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert LIBRARY.find() == path == LIBRARY.build()
    assert not list((tmp_path / "elsewhere").iterdir())


def test_a_working_folder_that_is_gone_is_a_sentence(fake, tmp_path, monkeypatch):
    fake()
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    monkeypatch.setenv("FASTATTN_CACHE_DIR", f"under-{tmp_path.name}")
    with pytest.raises(compiler.BuildError, match=r"cannot be found .*name another in FASTATTN_CACHE_DIR"):
        LIBRARY.build()


# ---- what passes


PASSES = {
    "a full disk": "x.s: No space left on device",
    "a full quota": "x.s: Disk quota exceeded",
    "no memory": "cc1plus: out of memory allocating 65536 bytes",
    "no files": "error: x.o: Too many open files",
    "a part that was killed": "c++: fatal error: Killed signal terminated program cc1plus",
    "nvcc's part that was killed": "nvcc error   : 'cicc' died due to signal 9 (Kill signal)",
    "the compiler itself was killed": None,
}


def trouble(path, says):
    """A compiler that fails so."""
    fails = "kill -9 $$" if says is None else f'echo "{says}"; exit 1'
    path.write_text(f'#!/bin/sh\ncase "$*" in *--version*) echo "made-up 1.0"; exit 0;; esac\n{fails}\n')
    path.chmod(0o755)


@pytest.mark.parametrize("what", PASSES)
def test_passing_trouble_of_a_compiler_is_not_remembered(fake, way, tmp_path, what):
    fake()
    trouble(tmp_path / "c++", PASSES[what])
    with pytest.raises(commands.PassingError, match="could not be built"):
        LIBRARY.build()
    assert not list((tmp_path / "cache").glob("*.failed"))
    fake()
    assert LIBRARY.build().exists()


@pytest.mark.parametrize("number", ["ENOSPC", "EDQUOT", "EMFILE", "ENOMEM", "EFBIG"])
def test_passing_trouble_of_the_system_is_tried_again_in_a_minute(fake, unloaded, monkeypatch, number):
    fake()
    code = getattr(errno, number)

    def refuse(*args, **named):
        raise OSError(code, os.strerror(code))

    now = [1000.0]
    monkeypatch.setattr(library.time, "monotonic", lambda: now[0])
    with monkeypatch.context() as patch:
        patch.setattr(build_cache.tempfile, "TemporaryDirectory", refuse)
        said = call_and_see_one_warning()
        assert os.strerror(code) in said and "for now" in said
        assert fastattn.explain(QUERY, QUERY, QUERY).reasons["cpu"] == LIBRARY.failure
    before = LIBRARY.failure
    assert LIBRARY.prepare() == before and "for now" in before
    now[0] += library.TRIES_AGAIN
    assert "cannot be loaded" in LIBRARY.prepare()  # it has been built


def test_a_process_that_cannot_be_started_for_now_is_passing(monkeypatch):
    def refuse(*args, **named):
        raise OSError(errno.EAGAIN, "Resource temporarily unavailable")

    monkeypatch.setattr(commands.subprocess, "Popen", refuse)
    with pytest.raises(commands.PassingError, match="cannot be started for now"):
        commands.call(("true",), 1)


def test_a_loader_that_lacks_memory_or_files_is_passing(tmp_path, monkeypatch):
    def refuse(path):
        raise OSError(f"{path}: cannot open shared object file: Too many open files")

    monkeypatch.setattr(build_cache.ctypes, "CDLL", refuse)
    with pytest.raises(commands.PassingError, match="cannot be loaded for now"):
        build_cache.load(tmp_path / "x.so", None)


# ---- compilers that hang, and that make nothing


HANG_LIMIT = 3.0  # seconds, in which a busy machine starts a shell
HANGS = """#!/bin/sh
case "$*" in *--version*) [ {version} = 1 ] || { echo "made-up 1.0"; exit 0; };; esac
trap "" TERM
sleep 1000 &
echo $! $$ >> "{log}"
wait
"""


def ended(process):
    """Whether a process is over, or nothing but its entry is left."""
    with contextlib.suppress(OSError):
        os.kill(process, 0)
        status = Path(f"/proc/{process}/stat")
        return status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z"
    return True


@pytest.mark.parametrize("where", ["version", "build"])
def test_a_compiler_that_hangs_is_ended_with_all_that_it_started(fake, way, tmp_path, monkeypatch, where):
    fake()
    script = HANGS.replace("{version}", str(int(where == "version"))).replace("{log}", str(tmp_path / "started"))
    (tmp_path / "c++").write_text(script)
    monkeypatch.setattr(commands, f"{where.upper()}_LIMIT", HANG_LIMIT)
    monkeypatch.setattr(compiler, "_HUNG", {})
    with pytest.raises(compiler.BuildError, match=f"did not end within {HANG_LIMIT:g} s and was stopped"):
        LIBRARY.build()
    started = [int(line) for line in (tmp_path / "started").read_text().split()]
    deadline = time.monotonic() + 60
    while not all(map(ended, started)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert started and all(map(ended, started))
    monkeypatch.setattr(commands, "call", None)  # it is not asked, or run, a second time
    with pytest.raises(compiler.BuildError, match=f"did not end within {HANG_LIMIT:g} s"):
        LIBRARY.build()


def test_who_interrupts_a_build_ends_the_compiler(tmp_path, monkeypatch):
    script = tmp_path / "hangs"
    script.write_text(f'#!/bin/sh\necho $$ > "{tmp_path}/started"\nsleep 1000\n')
    script.chmod(0o755)

    def interrupt(self, **named):
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text().strip():
            time.sleep(0.02)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(subprocess.Popen, "communicate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            commands.call((str(script),), 60)
    assert ended(int((tmp_path / "started").read_text()))


def test_a_compiler_that_makes_nothing_is_named(fake, way, tmp_path):
    fake()
    script = '#!/bin/sh\ncase "$*" in *--version*) echo "made-up 1.0";; esac\nexit 0\n'
    (tmp_path / "c++").write_text(script)
    with pytest.raises(
        compiler.BuildError, match=r"ended without an error and made no cpu_dispatch\.o\nthe command was"
    ):
        LIBRARY.build()


# ---- several processes


BUILD = "from fastattn.building.cpu_library import LIBRARY; print(LIBRARY.build())"


def test_who_waits_for_a_build_says_so(fake, tmp_path):
    """The lock is held here until the other process has said it."""
    fake()
    (tmp_path / "cache").mkdir(mode=0o700)
    stem = LIBRARY.files.cached_name().removesuffix(library_files.SUFFIX)
    with build_cache.made(tmp_path / "cache") as folder, folder.locked(stem + library_files.LOCK, "nothing"):
        waits = subprocess.Popen(
            [sys.executable, "-c", BUILD], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert waits.stderr.readline() == "fastattn: waiting for the CPU library, which another process builds\n"
    out, err = waits.communicate(timeout=120)
    assert waits.returncode == 0 and "waiting" not in err and out.strip().endswith(library_files.SUFFIX)


def test_folders_of_killed_builds_are_cleared_by_the_next(fake, tmp_path):
    log = fake(seconds=30)
    process = subprocess.Popen([sys.executable, "-c", BUILD], stderr=subprocess.DEVNULL, start_new_session=True)
    while not log():
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    cache = tmp_path / "cache"
    assert [each.name for each in cache.glob("build-*")]
    (cache / "build-fastattn_cpu_another-x1").mkdir()
    (cache / "build-fastattn_cpu_another-x2").write_text("a record that was not put under its name")
    (cache / "fastattn_cpu_another.lock").touch(mode=0o600)
    for name, age in (("build-old", 2 * build_cache.LEFT_FOR_GOOD), ("build-new", 0)):
        (cache / name).mkdir()
        os.utime(cache / name, (time.time() - age,) * 2)
    with build_cache.made(cache) as folder, folder.locked("fastattn_cpu_busy.lock", "nothing"):
        (cache / "build-fastattn_cpu_busy-x").mkdir()
        fake()
        LIBRARY.build()
    assert sorted(each.name for each in cache.glob("build-*")) == ["build-fastattn_cpu_busy-x", "build-new"]
