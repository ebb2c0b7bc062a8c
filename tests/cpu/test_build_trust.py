"""The build cache holds code: what others own, can write to or have linked elsewhere is neither run nor written."""

import contextlib
import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fastattn.building import build_cache, commands, compiler, library_files
from fastattn.building.cpu_library import LIBRARY

pytestmark = pytest.mark.skipif(not build_cache.SUPPORTED, reason=build_cache.NOT_HERE)
SOMEBODY = 54321
needs_root = pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can give files to another user"
)


def to_somebody(path):
    os.chown(path, SOMEBODY, SOMEBODY)


def replaced_by_link(path):
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


# What is done to a library that is there, by the part that it is done to; `says` is in the sentence.
ATTACKS = {
    "a folder that all can write to": (
        "folder",
        lambda path: path.chmod(0o777),
        r"can be written by others \(mode 777\)",
    ),
    "a folder that a group can write to": ("folder", lambda path: path.chmod(0o770), "can be written by others"),
    "a sticky folder that all can write to": ("folder", lambda path: path.chmod(0o1777), "can be written by others"),
    "another's folder": ("folder", to_somebody, f"belongs to user {SOMEBODY}"),
    "a library that all can write to": ("library", lambda path: path.chmod(0o666), "can be written by others"),
    "a library that a group can write to": ("library", lambda path: path.chmod(0o664), "can be written by others"),
    "another's library": ("library", to_somebody, f"belongs to user {SOMEBODY}"),
    "a link in the library's place": ("library", replaced_by_link, "is a link; remove it, or name another"),
    "another's record": ("record", to_somebody, f"belongs to user {SOMEBODY}"),
    "a record that all can write to": ("record", lambda path: path.chmod(0o646), "can be written by others"),
    "a link in the record's place": ("record", replaced_by_link, "is a link"),
    "a folder in the library's place": (
        "library",
        lambda path: (path.unlink(), path.mkdir()),
        "is not a regular file; remove it, or name another",
    ),
    "a pipe in the record's place": (
        "record",
        lambda path: (path.unlink(), os.mkfifo(path)),
        "is not a regular file; remove it, or name another",
    ),
}


REMEDY = {  # by whether it is a folder, and whether its mode is the trouble
    (True, True): r"\(mode \d+\); `chmod go-w` mends it, or name another in FASTATTN_CACHE_DIR$",
    (True, False): "this process is user 0's; name another in FASTATTN_CACHE_DIR$",
    (False, True): r"\(mode \d+\); `chmod go-w` mends it, or remove it, or name another in FASTATTN_CACHE_DIR$",
    (False, False): "(user 0's|a link|a regular file); remove it, or name another in FASTATTN_CACHE_DIR$",
}


@pytest.mark.parametrize(
    "attack", [pytest.param(name, marks=needs_root if "another's" in name else ()) for name in ATTACKS]
)
def test_a_library_that_others_may_have_put_there_is_not_found(fake, attack):
    fake()
    path = LIBRARY.build()
    parts = {"folder": path.parent, "library": path, "record": path.with_suffix(".json")}
    assert LIBRARY.find() == path and not LIBRARY.unusable
    part, do, says = ATTACKS[attack]
    do(parts[part])
    assert LIBRARY.find() is None
    (sentence,) = LIBRARY.unusable
    assert re.search(says, sentence) and str(parts[part]) in sentence
    assert re.search(REMEDY[part == "folder", "can be written" in says], sentence)


@pytest.mark.parametrize("suffix", [library_files.LOCK, library_files.MARK])
def test_a_link_in_the_place_of_lock_or_mark_empties_no_file(fake, tmp_path, suffix):
    fake()
    victim = tmp_path / "victim"
    victim.write_text("what its owner wrote")
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    planted = folder / LIBRARY.files.cached_name().replace(library_files.SUFFIX, suffix)
    planted.symlink_to(victim)
    with pytest.raises(compiler.BuildError, match="is a link; remove it, or name another in FASTATTN_CACHE_DIR"):
        LIBRARY.build()
    assert victim.read_text() == "what its owner wrote" and planted.is_symlink()


def test_a_failed_build_writes_through_no_link(fake, tmp_path):
    fake(fails="-shared")
    victim = tmp_path / "victim"
    victim.write_text("what its owner wrote")
    (tmp_path / "cache").mkdir(mode=0o700)
    mark = tmp_path / "cache" / LIBRARY.files.cached_name().replace(library_files.SUFFIX, library_files.MARK)
    mark.symlink_to(victim)
    with pytest.raises(compiler.BuildError, match="no such thing"):
        LIBRARY.build(retry=True)
    assert victim.read_text() == "what its owner wrote" and not mark.is_symlink()


LEAVES = {
    "a link": 'echo half > "$last.x"; rm -f "$last"; ln -s "$PWD/$last.x" "$last"',
    "a link to somebody's file": 'rm -f "$last"; ln -s "$VICTIM" "$last"',
    "a link to nothing": 'rm -f "$last"; ln -s nothing "$last"',
    "a pipe": 'rm -f "$last"; mkfifo "$last"',
    "a folder": 'rm -f "$last"; mkdir "$last"',
}


@pytest.mark.parametrize("leaves", LEAVES)
def test_a_compiler_that_leaves_no_regular_file_is_named(fake, way, tmp_path, monkeypatch, leaves):
    fake()
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    victim.chmod(0o666)
    monkeypatch.setenv("VICTIM", str(victim))
    text = (
        (tmp_path / "c++").read_text().replace("exit 0\n", f'case "$*" in *-shared*) {LEAVES[leaves]};; esac\nexit 0\n')
    )
    (tmp_path / "c++").write_text(text)
    with pytest.raises(compiler.BuildError) as refusal:
        LIBRARY.build()
    output = f"library{library_files.SUFFIX}"
    assert f"the compiler ended without an error and left {output}, which is not a regular file" in str(refusal.value)
    assert "-shared" in str(refusal.value).splitlines()[-1]
    assert victim.stat().st_mode & 0o777 == 0o666
    assert sorted(each.suffix for each in (tmp_path / "cache").iterdir()) == [".failed", ".lock"]


@pytest.mark.parametrize("put", ["symlink_to", "mkdir", "mkfifo"])
def test_only_a_regular_file_is_put_under_a_name(tmp_path, put):
    victim = tmp_path / "victim"
    victim.write_text("somebody's")
    victim.chmod(0o666)
    made = tmp_path / "cache" / "build-x"
    with build_cache.made(tmp_path / "cache") as folder:
        {"symlink_to": lambda: made.symlink_to(victim), "mkdir": made.mkdir, "mkfifo": lambda: os.mkfifo(made)}[put]()
        with pytest.raises(compiler.BuildError, match="the compiler left build-x, which is not a regular file"):
            folder.take(made, "x")
        assert folder.names() == ["build-x"] and victim.stat().st_mode & 0o777 == 0o666


PLANTED = """
#include <cstdio>
#include <cstdlib>
__attribute__((constructor)) static void run() { fclose(fopen(getenv("CANARY"), "w")); }
"""
LOAD = """
from fastattn.building.cpu_library import LIBRARY
print(LIBRARY.available(), *LIBRARY.unusable, *LIBRARY.damaged)
"""


@pytest.fixture
def planted(fake, tmp_path, monkeypatch):
    """A library in the cache folder that leaves a file where its code has run, with a right record beside it."""
    monkeypatch.delenv("CXX", raising=False)
    compiler._find_compiler.cache_clear()
    try:
        found = compiler.find_compiler()
    except compiler.BuildError as refusal:
        pytest.skip(str(refusal))
    (tmp_path / "planted.cpp").write_text(PLANTED)
    library = tmp_path / "planted"
    command = (*found.command, "-shared", "-fPIC", str(tmp_path / "planted.cpp"), "-o", str(library))
    assert commands.call(command, 60).code == 0
    folder = tmp_path / "cache"
    folder.mkdir(mode=0o700)
    path = folder / LIBRARY.files.cached_name()
    shutil.copy(library, path)
    with path.open("rb") as file:
        record = library_files.Manifest.of(file.fileno(), LIBRARY.files.made_for(), found, "")
    path.with_suffix(".json").write_bytes(record.to_bytes())
    return path


@pytest.mark.parametrize("attack", ["none", "folder", "digest", "no record"])
def test_planted_code_runs_only_where_this_user_put_it_with_its_digest(planted, tmp_path, attack):
    if attack == "folder":
        planted.parent.chmod(0o757)
    elif attack == "digest":
        planted.write_bytes(planted.read_bytes() + b"another")
    elif attack == "no record":
        planted.with_suffix(".json").unlink()
    canary = tmp_path / "canary"
    done = subprocess.run(
        [sys.executable, "-c", LOAD], env=os.environ | {"CANARY": str(canary)}, capture_output=True, text=True
    )
    assert canary.exists() == (attack == "none"), done.stdout + done.stderr  # the first row: the attack itself works
    if attack != "none":
        assert done.returncode == 0, done.stderr
        says = {"folder": "can be written by others", "digest": "is damaged", "no record": "None"}
        assert says[attack] in done.stdout


@pytest.fixture
def umask():
    """Set the mode that new files lack, for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


@pytest.mark.parametrize("lacks", [0o000, 0o002, 0o022, 0o077], ids=oct)
def test_what_is_made_is_this_users_alone(fake, tmp_path, monkeypatch, umask, lacks):
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "new" / "below"))
    fake()
    umask(lacks)
    path = LIBRARY.build()
    assert LIBRARY.find() == path
    assert {stat.S_IMODE(each.stat().st_mode) for each in (path.parent, path.parent.parent)} == {0o700}
    assert not [each for each in path.parent.iterdir() if each.stat().st_mode & 0o022]


@pytest.mark.parametrize("lacks", [0o777, 0o700, 0o177, 0o277], ids=oct)
def test_folders_that_are_made_have_their_mode_whatever_the_umask(tmp_path, umask, lacks):
    """And those that were there keep theirs."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old").chmod(0o751)
    umask(lacks)
    for _ in range(2):
        with build_cache.made(tmp_path / "old" / "new" / "below" / "it"):
            pass
    made = [tmp_path / "old" / below for below in ("new", "new/below", "new/below/it")]
    assert [stat.S_IMODE(each.stat().st_mode) for each in (tmp_path / "old", *made)] == [0o751, *[0o700] * 3]
    made[-1].chmod(0o500)
    with build_cache.made(made[-1]):
        assert stat.S_IMODE(made[-1].stat().st_mode) == 0o500


def test_a_folder_where_all_can_put_another_in_the_caches_place_is_not_trusted(fake, tmp_path, monkeypatch):
    fake()
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(shared / "mine" / "cache"))
    with pytest.raises(compiler.BuildError, match=r"everybody can put another folder in the place of one in .*shared"):
        LIBRARY.build()
    shared.chmod(0o1777)
    assert LIBRARY.build().exists()


def test_the_users_own_links_are_followed(fake, tmp_path, monkeypatch):
    fake()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "link" / "cache"))
    assert LIBRARY.build().parent == tmp_path / "scratch" / "cache"
    assert LIBRARY.find() is not None


@needs_root
def test_anothers_link_is_not_followed(fake, tmp_path, monkeypatch):
    fake()
    (tmp_path / "scratch").mkdir()
    (tmp_path / "link").symlink_to("scratch")
    os.lchown(tmp_path / "link", SOMEBODY, SOMEBODY)
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "link" / "cache"))
    with pytest.raises(compiler.BuildError, match=f"link is a link of user {SOMEBODY}'s"):
        LIBRARY.build()
    assert not list((tmp_path / "scratch").iterdir())


def test_links_that_lead_in_a_circle_are_a_sentence(fake, tmp_path, monkeypatch):
    fake()
    (tmp_path / "link").symlink_to("link")
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(tmp_path / "link" / "cache"))
    with pytest.raises(compiler.BuildError, match="goes through more than 40 links"):
        LIBRARY.build()


def test_below_a_groups_folder_all_happens_in_the_folder_that_was_looked_at(tmp_path):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("this system has no names for descriptors")
    group = tmp_path / "group"
    (group / "cache").mkdir(parents=True, mode=0o700)
    (group / "cache" / "x").write_text("mine")
    with build_cache.made(group / "cache") as folder:
        assert folder.here == group / "cache"
    group.chmod(0o770)
    with build_cache.made(group / "cache") as folder:
        (group / "cache").rename(group / "away")
        (group / "cache").mkdir()
        (group / "cache" / "x").write_text("somebody's")
        assert (folder.here / "x").read_text() == "mine"
        with folder.scratch("y") as scratch:  # where a compiler of ours works
            compiler.run([compiler.Step("made", ("cp", "../x", "made"))], scratch)
            folder.take(scratch / "made", "made")
        folder.write("z", b"record")
    assert sorted(each.name for each in (group / "away").iterdir()) == ["made", "x", "z"]
    assert [each.name for each in (group / "cache").iterdir()] == ["x"]
    assert (group / "away" / "made").read_text() == "mine"


@needs_root
def test_root_makes_no_folder_in_anothers_home_unless_it_is_asked_for(fake, tmp_path, monkeypatch):
    fake()
    home = tmp_path / "home"
    home.mkdir()
    to_somebody(home)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("FASTATTN_CACHE_DIR")
    with pytest.raises(compiler.BuildError, match=f"home belongs to user {SOMEBODY}, and this process is user 0's"):
        LIBRARY.build()
    assert not list(home.iterdir())
    monkeypatch.setenv("FASTATTN_CACHE_DIR", str(home / "asked"))
    assert LIBRARY.build().parent == home / "asked"


def test_another_place_serves_where_the_first_is_not_trusted(fake, unloaded, tmp_path, monkeypatch):
    """The library is built among temporary files, in a folder of this user's; one that is planted there is not used."""
    log = fake()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o777)
    second = tmp_path / "temporary" / f"fastattn-{os.getuid()}"
    with contextlib.suppress(compiler.BuildError):  # what is built cannot be loaded
        LIBRARY.get()
    assert stat.S_IMODE(second.stat().st_mode) == 0o700 and log()
    assert not list((tmp_path / "cache").iterdir())
    assert LIBRARY.find().parent == second
    second.chmod(0o733)
    assert LIBRARY.find() is None
    assert LIBRARY.why_not().count("can be written by others") == 2
