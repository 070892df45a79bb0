"""What a record says of the sources that made it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from harness import environment


def test_an_archive_knows_its_commit(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This project's files for `git archive`, unpacked where there is no repository."""
    repository, archive = tmp_path / "repository", tmp_path / "archive"
    for folder in (repository, archive):
        folder.mkdir()
    for name in (".gitattributes", ".git_archival.txt"):
        shutil.copy(root / name, repository)

    def git(*arguments: str) -> bytes:
        own = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(repository), *own, *arguments]
        return subprocess.run(command, check=True, capture_output=True).stdout

    git("init", "--quiet")
    git("add", "--all")
    git("commit", "--quiet", "--message", "one")
    subprocess.run(["tar", "-x", "-C", str(archive)], input=git("archive", "HEAD"), check=True)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.setattr(environment, "ROOT", archive)
    assert environment.commit.__wrapped__() == git("rev-parse", "HEAD").decode()[:12]
    monkeypatch.setattr(environment, "ROOT", repository)
    found = environment.commit.__wrapped__()
    assert found is not None and git("rev-parse", "HEAD").decode().startswith(found)
    shutil.copy(root / ".git_archival.txt", archive)  # as a checkout has it: no commit in it
    monkeypatch.setattr(environment, "ROOT", archive)
    assert environment.commit.__wrapped__() is None
