"""Files and folders are complete or absent, whichever call of the operating system fails."""

from __future__ import annotations

import contextlib
import errno
import os

import pytest

from peftkit.errors import DataError
from peftkit.system import files
from tests.faults.injection import Faults


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_replaces_the_old_one_or_leaves_it(tmp_path):
    file = tmp_path / "rows.csv"
    with files.open_atomic(file) as stream:
        stream.write("a\r\nb\n")
    assert file.read_bytes() == b"a\r\nb\n"
    with pytest.raises(TypeError), files.open_atomic(file) as stream:
        stream.write(b"half")
    with pytest.raises(FileNotFoundError), files.atomic_file(file):
        pass  # nothing was written
    assert file.read_bytes() == b"a\r\nb\n"
    assert names(tmp_path) == ["rows.csv"]
    with files.atomic_file(file) as staging:
        staging.write_bytes(b"c")
    assert file.read_bytes() == b"c"


def test_permissions_follow_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        with files.open_atomic(tmp_path / "file"):
            pass
        with files.atomic_folder(tmp_path / "folder"):
            pass
        with files.atomic_folder(tmp_path / "private", mode=0o700):
            pass
    finally:
        os.umask(old)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"file": 0o640, "folder": 0o750, "private": 0o700}


@pytest.mark.parametrize("fault", ["ENOSPC", "EIO"])
def test_a_folder_is_the_old_or_the_new_one_after_any_fault(tmp_path, fault):
    at = 0
    while True:
        target = tmp_path / str(at) / "entry"
        with files.atomic_folder(target) as folder:
            (folder / "old").touch()
        with Faults(at, fault) as faults, contextlib.suppress(OSError), files.atomic_folder(target) as folder:
            (folder / "sub").mkdir()
            (folder / "sub" / "new").touch()
        assert names(target) in (["old"], ["sub"])
        if at >= len(faults.calls):
            break
        at += 1
    assert at > 10


def test_two_writers_do_not_share_a_staging_name(tmp_path):
    with files.open_atomic(tmp_path / "a") as one, files.open_atomic(tmp_path / "a") as other:
        one.write("one")
        other.write("other")
    assert (tmp_path / "a").read_text() == "one"
    assert names(tmp_path) == ["a"]


def test_a_file_system_that_cannot_flush_folders_is_no_error(tmp_path, monkeypatch):
    def fail(code):
        def fsync(descriptor):
            raise OSError(code, os.strerror(code))

        return fsync

    monkeypatch.setattr(os, "fsync", fail(errno.EINVAL))
    files.flush_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    with pytest.raises(OSError, match="Input/output"):
        files.flush_folder(tmp_path)


@pytest.mark.parametrize(
    ("out", "message"), [("no/o.csv", "there is no folder"), (".", "a folder"), ("in.csv", "input")]
)
def test_an_output_that_cannot_be_written_is_refused_first(tmp_path, out, message):
    (tmp_path / "in.csv").touch()
    with pytest.raises(DataError, match=message):
        files.check_output(tmp_path / out, tmp_path / "in.csv")
    files.check_output(tmp_path / "o.csv", tmp_path / "in.csv")
