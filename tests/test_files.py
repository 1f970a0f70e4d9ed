import os

import pytest

from autolora.files import replacing


def test_a_file_is_replaced_when_all_went_well(tmp_path):
    target = tmp_path / "new" / "a.txt"
    for text in ("first", "second"):
        with replacing(target) as temporary:
            temporary.write_text(text)
            assert temporary.parent == target.parent and temporary != target
    assert target.read_text() == "second" and os.listdir(target.parent) == ["a.txt"]


def test_a_file_has_the_permissions_of_its_owners_files(tmp_path):
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("text")
            temporary.chmod(0o600)  # as some libraries do
    finally:
        os.umask(before)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o640


def test_what_was_there_stays_when_something_fails(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("before")
    with pytest.raises(KeyboardInterrupt), replacing(target) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert target.read_text() == "before" and os.listdir(tmp_path) == ["a.txt"]
