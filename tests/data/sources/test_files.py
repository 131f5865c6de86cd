"""Errors of the disk name a file and say what was wrong, in a line."""

import errno
import shutil

import pytest

from actial_fast.data.sources.files import reason, writing


def test_a_full_disk_names_the_file(tmp_path):
    for given, named in ((None, str(tmp_path / "x")), ("other", "other")):
        with pytest.raises(OSError, match="No space left") as raised, writing(tmp_path / "x"):
            raise OSError(errno.ENOSPC, "No space left on device", given)
        assert reason(raised.value) == f"{named}: No space left on device"
    with pytest.raises(OSError, match="odd") as raised, writing(tmp_path / "x"):
        raise OSError("odd\nand long")
    assert reason(raised.value) == "odd"


def test_a_folder_that_is_not_copied(tmp_path):
    (tmp_path / "a").mkdir()
    for name in "xy":
        (tmp_path / "a" / name).symlink_to("nowhere")
    with pytest.raises(shutil.Error) as raised:
        shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert "No such file" in reason(raised.value) and "\n" not in reason(raised.value) and len(reason(raised.value)) < 400
