from __future__ import annotations

import subprocess
from pathlib import Path

from passdeploy.reporting.commit import current_commit


def git(folder: Path, *arguments: str) -> str:
    who = ("-c", "user.name=A", "-c", "user.email=a@example.com", "-c", "commit.gpgsign=false")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_the_commit_of_the_working_directory(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q")
    assert current_commit(tmp_path, {}) is None, "no commit yet"
    (tmp_path / "net.py").write_text("width = 8\n")
    git(tmp_path, "add", "net.py")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    (tmp_path / "notes.txt").write_text("not in the repository\n")
    assert current_commit(tmp_path, {}) == head
    (tmp_path / "net.py").write_text("width = 16\n")
    assert current_commit(tmp_path, {}) == head + "+"


def test_github_says_which(tmp_path: Path) -> None:
    assert current_commit(tmp_path, {"GITHUB_SHA": "a" * 40}) == "a" * 40
    assert current_commit(tmp_path, {"GITHUB_SHA": "$(rm)"}) is None


def test_outside_a_repository_there_is_none(tmp_path: Path) -> None:
    assert current_commit(tmp_path, {}) is None
