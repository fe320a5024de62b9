"""Folders for wrong input to be tried in."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.command import compress, furnish, ok


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A furnished folder with a result ``out`` of three trials and its work folder ``out.work``."""
    folder = furnish(tmp_path_factory.mktemp("shared"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ok(*compress("out", "--keep-work"))
    return folder


@pytest.fixture
def place(shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A furnished folder of the test's own, as the current one."""
    monkeypatch.chdir(furnish(tmp_path, shared / "model"))
    return tmp_path


@pytest.fixture
def begun(place: Path, shared: Path) -> Path:
    """The same with a finished work folder ``out.work``, whose ``out`` was not written yet."""
    shutil.copytree(shared / "out.work", "out.work")
    return place / "out.work"
