"""LoRAs are found by the names that people and other programs give them, where they are unique."""

import unicodedata
from pathlib import Path

import pytest

from autolora.errors import PoolError
from autolora.lora import Pool
from autolora.lora.names import parameter_name


def make_pool(folder: Path, *paths: str) -> Pool:
    for path in paths:
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"never opened here")
    return Pool(folder)


@pytest.mark.parametrize(
    "name",
    [
        "add_detail",
        "Style/add_detail",
        r"Style\add_detail",
        "add_detail.safetensors",
        "Style/add_detail.safetensors",
        "ADD_Detail",
        "style/Add_Detail.SafeTensors",
        " add_detail ",
        "Other Folder/add_detail",
        r"C:\loras\Style\add_detail.safetensors",
    ],
)
def test_one_file_by_many_names(tmp_path: Path, name: str) -> None:
    pool = make_pool(tmp_path, "Style/add_detail.safetensors", "neon.safetensors")
    assert pool.entry(name).name == "add_detail"


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_unicode_forms_are_one(tmp_path: Path, form: str) -> None:
    other = {"NFC": "NFD", "NFD": "NFC"}[form]
    pool = make_pool(tmp_path, unicodedata.normalize(form, "Märchen ガラス.safetensors"))
    assert pool.entry(unicodedata.normalize(other, "märchen ガラス")) is pool.entries[0]


def test_blanks_at_the_end_of_a_stem(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "neon .safetensors", "b/ glass.safetensors")
    assert pool.entry("neon").name == "neon "
    assert pool.entry("b/glass").name == " glass"


def test_names_as_parameters_carry_them(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "foo [v1, overfit].safetensors", 'say "hi": now.safetensors')
    for entry in pool:
        assert pool.entry(parameter_name(entry.name)) is entry
    assert pool.entry('say "hi" now').name == 'say "hi": now'
    assert pool.entry("foo [v1 overfit]").name == "foo [v1, overfit]"


def test_the_exact_name_goes_before_like_ones(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "Neon.safetensors", "neon.safetensors", "NEON.safetensors")
    for entry in pool:
        assert pool.entry(entry.name) is entry
        assert pool.entry(f"{entry.name}.safetensors") is entry
    with pytest.raises(PoolError, match="3 LoRAs that 'nEon' may mean: NEON, Neon, neon"):
        pool.entry("nEon")


def test_folders_tell_files_of_one_stem_apart(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "a/x/neon.safetensors", "b/x/neon.safetensors", "c/neon.safetensors")
    assert pool.entry(r"B\x\neon").name == "b/x/neon"
    assert pool.entry("c/Neon.safetensors").name == "c/neon"
    for name in ("neon", "x/neon", "elsewhere/neon"):
        with pytest.raises(PoolError, match="name one of them"):
            pool.entry(name)


def test_unknown_names_are_still_unknown(tmp_path: Path) -> None:
    pool = make_pool(tmp_path, "neon.safetensors")
    for name in ("", "neo", "neon2", "neon/x", "/", ".safetensors"):
        with pytest.raises(PoolError, match="No LoRA named"):
            pool.entry(name)
