"""Large files are read whole once, and again after any change.

pytest tests/test_verified.py
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tubelet.runtime import verified
from tubelet.runtime.verified import has_hash


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(verified, "LARGE", 4)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    path = tmp_path / "weights"
    path.write_bytes(b"weights")
    return path


def read_again(path: Path, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whether the file is read when its hash is asked for."""
    opened, wanted = [], sha256(path)
    real = Path.open
    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, *a, **k: (opened.append(self), real(self, *a, **k))[1])
        assert has_hash(path, wanted)
    return path in opened


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_file_is_read_once(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_again(file, monkeypatch)
    assert not read_again(file, monkeypatch)


@pytest.mark.parametrize("keeps_times", [True, False])
def test_a_file_that_changed_is_read_again(file: Path, monkeypatch: pytest.MonkeyPatch, keeps_times: bool) -> None:
    """Also one of the same size whose times were set back."""
    was, times = sha256(file), file.stat()
    assert has_hash(file, was)
    file.write_bytes(b"WEIGHTS")
    if keeps_times:
        os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not has_hash(file, was)
    assert read_again(file, monkeypatch)


def test_a_wrong_hash_leaves_no_note(file: Path) -> None:
    assert not has_hash(file, "0" * 64)
    assert not has_hash(file, "0" * 64)


def test_small_files_are_always_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "LARGE", 1000)
    assert read_again(file, monkeypatch) and read_again(file, monkeypatch)


def test_without_a_folder_for_notes_the_file_is_read(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (file.parent / "home").write_text("a file")
    assert read_again(file, monkeypatch) and read_again(file, monkeypatch)
