"""The pool as the gallery shows it, and its covers."""

import io
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from autolora.console.catalog import Catalog, Covers, Item
from autolora.errors import PoolError
from autolora.generate.picture_texts import read_texts
from autolora.lora import Pool, save_lora
from tests.conftest import random_factors


@pytest.fixture
def pool(tmp_path: Path, make_pool) -> Path:
    return make_pool(tmp_path / "pool")


@pytest.fixture
def catalog(pool: Path) -> Catalog:
    files = Pool(pool)
    catalog = Catalog(lambda: files)
    catalog.refresh(wait=True)
    return catalog


def names(page) -> list[str]:
    return [item.name for item in page.items]


def test_items_know_what_people_wrote(catalog: Catalog) -> None:
    item = catalog.item("elephant")
    assert item.title == "Elephant" and item.triggers == ("elphnt animal",)
    assert item.format == "kohya" and item.strength == 1.0
    assert catalog.item("neon").strength == 0.7 and catalog.item("neon").format == "diffusers"
    facts = item.to_dict()
    assert facts["covers"] == 0 and not any("/" in str(value) for value in facts.values())


def test_pages_are_found_by_words_and_format(catalog: Catalog) -> None:
    page = catalog.page()
    assert names(page) == ["elephant", "neon", "rocket"] and page.total == page.pool == 3
    assert names(catalog.page("ELPHNT")) == ["elephant"]
    assert names(catalog.page("animal eleph")) == ["elephant"]
    assert names(catalog.page("animal neon")) == []
    assert names(catalog.page(format="diffsynth")) == ["rocket"]
    assert page.formats == {"diffsynth": 1, "diffusers": 1, "kohya": 1}
    assert names(catalog.page(start=1, count=1)) == ["neon"]


def test_pages_are_found_by_tag(catalog: Catalog, pool: Path, tiny_shapes) -> None:
    header = {"modelspec.title": "Violin", "modelspec.tags": "music, wood"}
    save_lora(pool / "violin.safetensors", random_factors(tiny_shapes, 9), metadata=header)
    catalog.refresh(wait=True)
    assert catalog.page().tags == {"music": 1, "wood": 1}
    assert names(catalog.page(tag="wood")) == ["violin"]
    assert names(catalog.page("violin", tag="wo")) == []


def test_changes_in_the_folder_are_seen(catalog: Catalog, pool: Path) -> None:
    assert catalog.refresh() is False
    before = catalog.item("elephant")
    (pool / "neon.safetensors").write_bytes((pool / "rocket.safetensors").read_bytes())
    catalog.refresh(wait=True)
    assert catalog.item("neon").format == "diffsynth", "a file that changed is read again"
    assert catalog.item("elephant") is before
    (pool / "rocket.safetensors").rename(pool / "moon rocket.safetensors")
    assert catalog.refresh(wait=True) is True
    assert names(catalog.page()) == ["elephant", "moon rocket", "neon"]
    assert catalog.item("elephant") is before, "read once"
    with pytest.raises(PoolError, match="No LoRA named 'rocket'"):
        catalog.item("rocket")


def test_a_file_that_cannot_be_used_says_why(catalog: Catalog, pool: Path) -> None:
    (pool / "broken.safetensors").write_bytes(b"\x00" * 30)
    catalog.refresh(wait=True)
    assert "broken.safetensors" in catalog.item("broken").problem
    assert catalog.page("broken").items[0].problem


def test_an_empty_pool_empties_the_catalog(catalog: Catalog, pool: Path) -> None:
    for file in pool.iterdir():
        file.unlink()
    with pytest.raises(PoolError, match=r"no \.safetensors"):
        catalog.refresh()
    assert catalog.page().pool == 0


def make_item(path: Path, *covers: Path) -> Item:
    return Item("x", path, (1, 1), covers=covers, read=True)


def test_covers_are_made_small_and_kept(tmp_path: Path) -> None:
    cover = tmp_path / "x.png"
    Image.new("RGBA", (600, 300), (10, 200, 30, 255)).save(cover)
    covers = Covers(tmp_path / "small")
    item = make_item(tmp_path / "x.safetensors", cover)
    with Image.open(io.BytesIO(covers.get(item, size=200))) as small:
        assert small.format == "WEBP" and small.size == (256, 128)
        assert abs(small.convert("RGB").getpixel((100, 50))[1] - 200) < 8
    assert covers.get(item, size=90) != covers.get(item, size=200)
    kept = sorted(file.name for file in (tmp_path / "small").iterdir())
    assert len(kept) == 2
    again = Covers(tmp_path / "small")
    assert again.get(item, size=200) == covers.get(item, size=200)
    assert sorted(file.name for file in (tmp_path / "small").iterdir()) == kept


def test_covers_stand_upright_and_on_white(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    clear.save(tmp_path / "clear.png")
    lying = Image.new("RGB", (40, 20), "blue")
    turned = lying.getexif()
    turned[0x0112] = 6  # the camera was turned
    lying.save(tmp_path / "lying.jpg", exif=turned)
    item = make_item(tmp_path / "x.safetensors", tmp_path / "clear.png", tmp_path / "lying.jpg")
    covers = Covers(tmp_path / "small")
    with Image.open(io.BytesIO(covers.get(item, 0))) as small:
        assert min(small.convert("RGB").getpixel((20, 20))) > 250
    with Image.open(io.BytesIO(covers.get(item, 1))) as small:
        assert small.size == (20, 40)


def test_a_cover_with_too_many_bytes_or_pixels_is_refused(tmp_path: Path, monkeypatch) -> None:
    cover = tmp_path / "x.png"
    Image.new("RGB", (50, 50), "red").save(cover)
    item = make_item(tmp_path / "x.safetensors", cover)
    for limit, message in (("MAX_COVER_BYTES", "too large"), ("MAX_PIXELS", "too many pixels")):
        with monkeypatch.context() as patched:
            patched.setattr(f"autolora.console.catalog.{limit}", 10)
            with pytest.raises(PoolError, match=message):
                Covers(tmp_path / "small").get(item)


def test_nothing_half_written_is_left_of_a_cover(tmp_path: Path, monkeypatch) -> None:
    cover = tmp_path / "x.png"
    Image.new("RGB", (50, 50), "red").save(cover)

    def full(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    assert Covers(tmp_path / "small").get(make_item(tmp_path / "x.safetensors", cover))
    assert list((tmp_path / "small").iterdir()) == []


def test_a_changed_cover_is_made_again(tmp_path: Path) -> None:
    cover = tmp_path / "x.png"
    Image.new("RGB", (50, 50), "red").save(cover)
    covers = Covers(tmp_path / "small")
    item = make_item(tmp_path / "x.safetensors", cover)
    before = covers.get(item)
    Image.new("RGB", (60, 50), "blue").save(cover)
    assert covers.get(item) != before


def huge_png() -> bytes:
    """A PNG whose header promises 60000 x 60000 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\x00"))


@pytest.mark.parametrize("data", [b"", b"no picture", b"\x89PNG\r\n\x1a\n", huge_png()])
def test_what_is_no_picture_is_refused(tmp_path: Path, data: bytes) -> None:
    cover = tmp_path / "x.png"
    cover.write_bytes(data)
    with pytest.raises(PoolError, match=r"of 'x'"):
        Covers(tmp_path / "small").get(make_item(tmp_path / "x.safetensors", cover))


@pytest.mark.parametrize("number", [-1, 0, 7])
def test_covers_that_are_not_there_are_refused(catalog: Catalog, tmp_path: Path, number) -> None:
    with pytest.raises(PoolError, match="no cover"):
        Covers(tmp_path / "small").get(catalog.item("rocket"), number)


def test_a_read_only_folder_only_costs_time(tmp_path: Path) -> None:
    cover = tmp_path / "x.png"
    Image.new("RGB", (50, 50), "red").save(cover)
    (tmp_path / "small").write_text("a file where the folder should be")
    item = make_item(tmp_path / "x.safetensors", cover)
    assert Covers(tmp_path / "small").get(item).startswith(b"RIFF")


def test_large_covers_are_decoded_one_at_a_time(tmp_path: Path, monkeypatch) -> None:
    from autolora.console import catalog

    cover = tmp_path / "x.png"
    Image.new("RGB", (50, 50), "red").save(cover)
    at_once, most = [], []
    shrunk = catalog._shrunk

    def watched(picture, side):
        at_once.append(1)
        most.append(len(at_once))
        time.sleep(0.02)
        at_once.pop()
        return shrunk(picture, side)

    monkeypatch.setattr(catalog, "_shrunk", watched)
    monkeypatch.setattr(catalog, "LARGE_PIXELS", 100)
    covers = Covers(tmp_path / "small")
    items = [make_item(tmp_path / f"{n}.safetensors", cover) for n in range(6)]
    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(covers.get, items))
    assert len(most) == 6 and max(most) == 1


@pytest.mark.parametrize("kind", ["PNG", "GIF", "WEBP"])
def test_of_moving_pictures_only_the_first_frame_is_decoded(
    tmp_path: Path, monkeypatch, kind
) -> None:
    frames = [Image.new("RGB", (40, 30), (n, 200, 20)) for n in range(5)]
    cover = tmp_path / f"x.{kind.lower()}"
    frames[0].save(cover, kind, save_all=True, append_images=frames[1:], duration=20)
    decoded = []
    real = type(Image.open(cover)).load
    monkeypatch.setattr(
        type(Image.open(cover)), "load", lambda self: decoded.append(self.tell()) or real(self)
    )
    assert Covers(tmp_path / "small").get(make_item(tmp_path / "x.safetensors", cover))
    assert decoded and set(decoded) == {0}
    if kind != "GIF":
        decoded.clear()
        assert read_texts(cover) == {} and decoded == []


def test_colours_of_every_mode_are_kept(tmp_path: Path) -> None:
    for number, mode in enumerate(("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK")):
        cover = tmp_path / f"{number}.{'jpg' if mode == 'CMYK' else 'png'}"
        full = 65535 if mode == "I;16" else 255
        white = 0 if mode == "CMYK" else 1 if mode == "1" else full
        picture = Image.new("RGB", (300, 300), "white").convert(mode) if mode == "P" else None
        if picture is None:
            bands = len(Image.new(mode, (1, 1)).getbands())
            picture = Image.new(mode, (300, 300), white if bands == 1 else (white,) * bands)
        picture.save(cover)
        item = make_item(tmp_path / f"{number}.safetensors", cover)
        with Image.open(io.BytesIO(Covers(tmp_path / "small").get(item))) as small:
            assert small.size == (256, 256)
            assert min(small.convert("RGB").getpixel((9, 9))) > 245, mode
