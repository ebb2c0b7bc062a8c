"""Which commit a run is of: git's, or where a copy came without its .git, what was said of it."""

import pytest

from fastattn.bench.measure import env

ONE, OTHER = "1" * 40, "a" * 40


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A checkout's copy, without .git."""
    monkeypatch.setattr(env, "__file__", str(tmp_path / "bench" / "measure" / "env.py"))
    monkeypatch.delenv(env.COMMIT, raising=False)
    (tmp_path / "bench" / "measure").mkdir(parents=True)
    return tmp_path


def test_a_copy_of_which_nothing_is_said_has_none(copy):
    assert env._commit() == {"commit": None, "dirty": None}


def test_the_file_says_it_and_the_variable_before_the_file(copy, monkeypatch):
    (copy / "COMMIT").write_text(f"{ONE}\n")
    assert env._commit() == {"commit": ONE, "dirty": None}
    monkeypatch.setenv(env.COMMIT, OTHER)
    assert env._commit() == {"commit": OTHER, "dirty": None}
    monkeypatch.setenv(env.COMMIT, "")
    assert env._commit()["commit"] == ONE


@pytest.mark.parametrize("said", ["$(git rev-parse HEAD)", "main", "1234567"])
def test_what_is_no_commit_is_refused_with_a_sentence(copy, monkeypatch, said):
    monkeypatch.setenv(env.COMMIT, said)
    with pytest.raises(ValueError, match="FASTATTN_COMMIT: the 40 digits of a commit are needed, got '") as refused:
        env._commit()
    assert "expanded where the copy was made" in str(refused.value)


def test_git_is_asked_first(monkeypatch):
    answers = {"ls-files": "env.py", "rev-parse": ONE, "status": " M bench/measure/env.py"}
    monkeypatch.setattr(env, "_output", lambda command: next(answers[word] for word in command if word in answers))
    monkeypatch.setenv(env.COMMIT, OTHER)
    assert env._commit() == {"commit": ONE, "dirty": True}
