"""Compiled libraries in a cache that others may have touched."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
import torch

from autolora import c_library
from autolora.c_library import CLibrary, compiled

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("AUTOLORA_NATIVE") == "0"
        or not any(map(shutil.which, (os.environ.get("CC", ""), "cc", "gcc"))),
        reason="no C compiler",
    ),
    pytest.mark.skipif(os.name != "posix", reason="owners and modes are POSIX's"),
]


@pytest.fixture
def source(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(c_library, "_own_folder", None)
    file = tmp_path / "seven.c"
    file.write_text("int seven(void) { return 7; }\n", encoding="utf-8")
    return file


def seven(path):
    return ctypes.CDLL(str(path)).seven()


def test_a_library_is_compiled_once(source, tmp_path, monkeypatch):
    path = compiled(source)
    assert path.parent == tmp_path / "cache" / "autolora" and seven(path) == 7
    assert path.parent.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o700
    monkeypatch.setattr(c_library, "_compile", None)
    assert compiled(source) == path


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def plant(path):
    path.write_bytes(b"not a library")


def open_to_all(path):
    path.chmod(0o722)


def link(path):
    moved = path.rename(path.with_suffix(".elsewhere"))
    path.symlink_to(moved)


@pytest.mark.parametrize("spoil", [cut, plant, open_to_all, link])
def test_a_damaged_or_planted_library_is_compiled_again(spoil, source, caplog):
    path = compiled(source)
    spoil(path)
    again = compiled(source)
    assert seven(again) == 7 and not again.is_symlink()
    assert again.stat().st_mode & 0o777 == 0o700
    assert "compiled again" in caplog.text


def test_a_library_of_another_owner_is_not_loaded(source, monkeypatch):
    path = compiled(source)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    own = compiled(source)
    assert own.parent != path.parent and seven(own) == 7
    assert own.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_not_used(mode, source, tmp_path):
    folder = tmp_path / "cache" / "autolora"
    folder.mkdir(parents=True)
    folder.chmod(mode)
    path = compiled(source)
    assert path.parent != folder and not list(folder.iterdir()) and seven(path) == 7
    assert compiled(source) == path  # once per process


def test_without_a_place_in_the_cache_the_library_is_made_elsewhere(source, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be", encoding="utf-8")
    assert seven(compiled(source)) == 7


def test_the_check_runs_outside_of_the_callers_modes(source):
    seen = []

    def agrees(library):
        seen.append(torch.is_autocast_enabled("cpu"))
        seen.append(torch.is_inference_mode_enabled())
        seen.append(torch.empty(1).device.type)
        return library.seven() == 7

    with torch.autocast("cpu"), torch.inference_mode(), torch.device("meta"):
        assert CLibrary(source, lambda library: None, agrees).get() is not None
    assert seen == [False, False, "cpu"]


def test_a_check_that_fails_leaves_no_library_and_is_asked_once(source):
    asked = []
    library = CLibrary(source, lambda _: None, lambda _: bool(asked.append(1)))
    assert library.get() is None and library.get() is None and asked == [1]
    library.forget()
    assert library.get() is None and asked == [1, 1]


def test_a_function_that_is_missing_leaves_no_library(source):
    def bind(library):
        library.eight.restype = ctypes.c_int

    assert CLibrary(source, bind, lambda _: True).get() is None
