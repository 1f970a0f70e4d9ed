"""Pictures of other programs become settings: small made files, one per program and container."""

import hashlib
import json
import struct
import zlib
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from autolora.errors import GenerationError
from autolora.generate.foreign import Found, FoundLoRA, match_loras, read_found, take_over
from autolora.generate.picture_texts import MAX_TEXT, read_texts
from autolora.lora import Pool

IMAGE = Image.new("RGB", (8, 4), "red")
A1111 = (
    "a knight <lora:Style/neon:0.7>, (armor:1.2)\nNegative prompt: lowres\n"
    "Steps: 28, Sampler: DPM++ 2M, CFG scale: 6.5, Seed: 1234567, Size: 512x768, "
    'Lora hashes: "neon: {data}", Version: v1.9.4'
)


def with_exif(path: Path, tag: int, value: bytes | str, ifd: int | None = None, **options) -> Path:
    exif = Image.Exif()
    exif[0x0131] = "a program"
    if ifd is None:
        exif[tag] = value
    else:
        exif.get_ifd(ifd)[tag] = value
    IMAGE.save(path, exif=exif, **options)
    return path


def with_text(path: Path, **texts: str) -> Path:
    chunks = PngInfo()
    for name, text in texts.items():
        chunks.add_text(name, text)
    IMAGE.save(path, pnginfo=chunks)
    return path


def found_in(path: Path) -> Found:
    found = read_found(read_texts(path))
    assert found is not None
    return found


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    """Two files that nobody opens, of known hashes of file and data."""
    folder = tmp_path / "pool"
    for name, data in (("Style/neon", b"n" * 64), ("glass [v1, b]", b"g" * 64)):
        header = b'{"x":{"dtype":"U8","shape":[64],"data_offsets":[0,64]}}'
        file = folder / f"{name}.safetensors"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(struct.pack("<Q", len(header)) + header + data)
    return Pool(folder)


def whole(pool: Pool, name: str) -> str:
    return hashlib.sha256(pool.entry(name).path.read_bytes()).hexdigest()


def data(pool: Pool, name: str) -> str:
    return hashlib.sha256(pool.entry(name).path.read_bytes()[-64:]).hexdigest()


# Containers


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
@pytest.mark.parametrize("encoding", ["utf-16-be", "utf-16-le", "utf-16", "ascii", "bare"])
def test_exif_user_comment(tmp_path: Path, suffix: str, encoding: str) -> None:
    text = "a café, 猫\nSteps: 3, Seed: 4, Size: 8x8"
    if encoding in ("ascii", "bare"):
        code = {"ascii": b"ASCII\0\0\0", "bare": b""}[encoding]
        value = code + text.encode()
    else:
        value = b"UNICODE\0" + text.encode(encoding)
    path = with_exif(tmp_path / f"a.{suffix}", 0x9286, value, 0x8769)
    assert read_texts(path) == {"parameters": text}
    assert found_in(path).seed == 4


def test_png_itxt_and_ztxt(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add_itxt("parameters", "猫\nSteps: 3, Seed: 4, Size: 8x8", zip=True)
    chunks.add_text("other", "é", zip=True)
    IMAGE.save(tmp_path / "a.png", pnginfo=chunks)
    assert read_texts(tmp_path / "a.png")["other"] == "é"
    assert found_in(tmp_path / "a.png").prompt == "猫"


def test_texts_that_grow_without_end_are_refused(tmp_path: Path) -> None:
    chunks = PngInfo()
    chunks.add(b"zTXt", b"parameters\0\0" + zlib.compress(b"a" * (MAX_TEXT + 1)))
    IMAGE.save(tmp_path / "a.png", pnginfo=chunks)
    with pytest.raises(GenerationError, match="bytes of text"):
        read_texts(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_damaged_pictures_are_a_sentence(tmp_path: Path, suffix: str) -> None:
    path = with_exif(tmp_path / f"a.{suffix}", 0x9286, b"ASCII\0\0\0a cat", 0x8769)
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        changed = content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :]
        for damaged in (content[:place], changed):
            path.write_bytes(damaged)
            try:
                read_found(read_texts(path))
            except GenerationError as error:
                assert "cannot be read" in str(error)


# Programs


def test_a1111(tmp_path: Path, pool: Pool) -> None:
    text = A1111.replace("{data}", data(pool, "neon")[:12])
    found = found_in(with_text(tmp_path / "a.png", parameters=text))
    assert found.program == "A1111"
    assert (found.seed, found.steps, found.width, found.height) == (1234567, 28, 512, 768)
    assert found.guidance == 6.5 and found.settings["Sampler"] == "DPM++ 2M"
    assert found.loras == (FoundLoRA("Style/neon", 0.7, (data(pool, "neon")[:12],)),)
    taken = take_over(found, pool)
    assert taken.prompt == "a knight, armor" and taken.negative_prompt == "lowres"
    assert [(lora.name, lora.strength) for lora in taken.loras] == [("neon", 0.7)]
    assert taken.missing == () and any("(armor:1.2)" in note for note in taken.notes)


def test_forge(tmp_path: Path) -> None:
    text = (
        "a cat\nSteps: 20, Sampler: Euler, CFG scale: 1, Distilled CFG Scale: 3.5, Seed: 5, "
        "Size: 64x64, Version: f2.0.1v1.10.1-previous-636"
    )
    found = found_in(with_text(tmp_path / "a.png", parameters=text))
    assert (found.program, found.guidance) == ("Forge", 3.5)


def test_civitai(tmp_path: Path, pool: Pool) -> None:
    resources = [
        {"type": "checkpoint", "modelVersionId": 1, "modelName": "Base [XL], {x}"},
        {"type": "lycoris", "weight": 0.7, "modelVersionId": 2, "modelName": "neon"},
        {"air": "urn:air:flux1:lora:civitai:1@2", "modelName": "Nobody, at all"},
    ]
    text = (
        "a cat\nNegative prompt: dogs\n"
        "Steps: 8, Sampler: Euler, CFG scale: 1, Seed: 9, Size: 64x64, "
        f"Clip skip: 2, Civitai resources: {json.dumps(resources)}, Civitai metadata: {{}}"
    )
    value = b"UNICODE\0" + text.encode("utf-16-be")
    found = found_in(with_exif(tmp_path / "a.jpg", 0x9286, value, 0x8769))
    assert found.program == "Civitai" and json.loads(found.settings["Civitai resources"])
    assert found.loras == (FoundLoRA("neon", 0.7), FoundLoRA("Nobody, at all"))
    taken = take_over(found, pool)
    assert [lora.name for lora in taken.loras] == ["neon"]
    assert (
        taken.missing == ("Nobody, at all",)
        and taken.notes[0] == "Not in the pool: Nobody, at all."
    )


def test_hashes_of_comfyui_savers(tmp_path: Path, pool: Pool) -> None:
    hashes = {"model": "0123456789", "LORA:renamed, since": whole(pool, "glass [v1, b]")[:10]}
    text = f"a cat\nSteps: 8, Seed: 9, Size: 64x64, Version: ComfyUI, Hashes: {json.dumps(hashes)}"
    found = found_in(with_text(tmp_path / "a.png", parameters=text, prompt="{}"))
    assert found.program == "ComfyUI"
    assert [lora.name for lora in take_over(found, pool).loras] == ["glass [v1, b]"]


def test_comfyui(tmp_path: Path, pool: Pool) -> None:
    workflow = {
        "1": {
            "class_type": "Power Lora Loader (rgthree)",
            "inputs": {
                "lora_1": {"on": True, "lora": "Style\\neon.safetensors", "strength": 0.8},
                "lora_2": {"on": False, "lora": "glass.safetensors", "strength": 1},
            },
        },
        "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "a cat", "clip": ["1", 1]}},
        "3": {
            "class_type": "KSampler",
            "inputs": {"seed": 7, "steps": 4, "cfg": 1.5, "positive": ["2", 0], "model": ["1", 0]},
        },
    }
    text = json.dumps(workflow)
    paths = [with_text(tmp_path / "a.png", prompt=text, workflow="{}")]
    # ComfyUI's own WebP has it where cameras name their model.
    paths.append(with_exif(tmp_path / "a.webp", 0x0110, f"prompt:{text}"))
    for path in paths:
        found = found_in(path)
        assert (found.program, found.prompt, found.seed) == ("ComfyUI", "a cat", 7)
        assert (found.steps, found.guidance) == (4, 1.5)
        taken = take_over(found, pool)
        assert [(lora.name, lora.strength) for lora in taken.loras] == [("neon", 0.8)]


def test_swarmui(tmp_path: Path, pool: Pool) -> None:
    values = {
        "sui_image_params": {
            "prompt": "a cat",
            "negativeprompt": "dogs",
            "model": "flux/dev",
            "seed": 130105844,
            "steps": "30",
            "cfgscale": 1.0,
            "fluxguidancescale": 3.5,
            "width": 128,
            "height": 64,
            "loras": ["flux/another name", "nobody"],
            "loraweights": ["1.1", "0.5"],
        },
        "sui_models": [
            {
                "name": "flux/another name.safetensors",
                "param": "loras",
                "hash": f"0x{data(pool, 'neon')}",
            }
        ],
    }
    text = json.dumps(values, indent=2)
    path = with_text(tmp_path / "a.png", parameters=text)
    jpeg = with_exif(tmp_path / "a.jpg", 0x9286, b"UNICODE\0" + text.encode("utf-16-le"), 0x8769)
    for found in (found_in(path), found_in(jpeg)):
        assert (found.program, found.steps, found.guidance) == ("SwarmUI", 30, 3.5)
        taken = take_over(found, pool)
        assert (taken.prompt, taken.negative_prompt, taken.seed) == ("a cat", "dogs", 130105844)
        assert [(lora.name, lora.strength) for lora in taken.loras] == [("neon", 1.1)]
        assert taken.missing == ("nobody",) and taken.size == (128, 64)


def test_fooocus(tmp_path: Path, pool: Pool) -> None:
    values = {
        "prompt": "a cat",
        "negative_prompt": "dogs",
        "full_prompt": ["a cat", "cinematic"],
        "resolution": "(896, 1152)",
        "guidance_scale": 4.0,
        "seed": "42",
        "steps": 30,
        "loras": [["other", 0.1, whole(pool, "neon")[:10]], ["None", 1.0, ""]],
        "lora_combined_1": "other : 0.1",
    }
    text = json.dumps(values)
    path = with_text(tmp_path / "a.png", parameters=text, fooocus_scheme="fooocus")
    webp = with_exif(tmp_path / "a.webp", 0x9286, text)
    for found in (found_in(path), found_in(webp)):
        assert (found.program, found.seed, found.width, found.height) == ("Fooocus", 42, 896, 1152)
        taken = take_over(found, pool)
        assert [(lora.name, lora.strength) for lora in taken.loras] == [("neon", 0.1)]
    kin = {"Prompt": "a cat", "Negative": "x", "steps": 4, "cfg": 2, "width": 64, "height": 64}
    kin |= {"software": "RuinedFooocus", "loras": [[whole(pool, "neon")[:10], "0.5 - other"]]}
    found = found_in(with_text(tmp_path / "b.png", parameters=json.dumps(kin)))
    assert (found.program, found.guidance, found.negative_prompt) == ("RuinedFooocus", 2.0, "x")
    assert [(lora.name, lora.strength) for lora in take_over(found, pool).loras] == [("neon", 0.5)]


def test_invokeai(tmp_path: Path, pool: Pool) -> None:
    values = {
        "generation_mode": "flux_txt2img",
        "positive_prompt": "a neon++ cat",
        "negative_prompt": "",
        "seed": 3,
        "steps": 30,
        "guidance": 4.0,
        "cfg_scale": 1.0,
        "width": 64,
        "height": 96,
        "model": {"name": "FLUX Dev", "hash": "blake3:00"},
        "loras": [{"model": {"name": "Neon", "hash": "blake3:11", "type": "lora"}, "weight": 0.75}],
    }
    found = found_in(with_text(tmp_path / "a.png", invokeai_metadata=json.dumps(values)))
    assert (found.program, found.guidance, found.steps) == ("InvokeAI", 4.0, 30)
    taken = take_over(found, pool)
    assert taken.prompt == "a neon cat" and taken.size == (64, 96)
    assert [(lora.name, lora.strength) for lora in taken.loras] == [("neon", 0.75)]


# Matching


def test_hashes_go_before_names(pool: Pool) -> None:
    glass = FoundLoRA("neon", 0.5, (whole(pool, "glass [v1, b]")[:10],))
    notes: list[str] = []
    assert match_loras([glass], pool, notes)[0][0].name == "glass [v1, b]" and notes == []
    other = FoundLoRA("neon", 0.5, ("0123456789",))
    assert match_loras([other], pool, notes)[0][0].name == "neon"
    assert notes == ["neon is another file than in the picture."]


def test_names_as_parameters_carry_them_and_titles(pool: Pool) -> None:
    (pool.folder / "Style" / "neon.civitai.info").write_text('{"model": {"name": "Neon City"}}')
    loras = [FoundLoRA("glass [v1 b]"), FoundLoRA("neon city"), FoundLoRA("nobody")]
    asked, missing = match_loras(loras, pool, [])
    assert [lora.name for lora in asked] == ["glass [v1, b]", "neon"] and missing == ("nobody",)


def test_what_cannot_be_taken_over_is_said() -> None:
    found = Found("X", "a <lora:x:oops> cat", seed=2**64 - 1, steps=10**6, width=1, height=9)
    taken = take_over(found, None)
    assert taken.seed is taken.steps is taken.size is None
    said = " ".join(taken.notes)
    for words in ("seed, 18446744073709551615", "number of steps", "size, 1x9", "is not a number"):
        assert words in said


@pytest.mark.parametrize(
    "value", ["9" * 400, "1e999", True, None, [], {}, "NaN", -(10**30), "٣", 3.7, "x" * 10**6]
)
def test_odd_values_are_no_error(tmp_path: Path, value) -> None:
    names = ("seed", "steps", "width", "height", "cfgscale", "loras", "loraweights", "prompt")
    swarm = {"sui_image_params": dict.fromkeys(names, value), "sui_models": value}
    invoke = dict.fromkeys((*names, "positive_prompt", "cfg_scale", "image", "guidance"), value)
    fooocus = {"prompt": "a cat", **dict.fromkeys(("seed", "steps", "resolution", "loras"), value)}
    node = {"1": {"class_type": "KSampler", "inputs": dict.fromkeys((*names, "lora_1"), value)}}
    for name, data in (
        ("parameters", swarm),
        ("parameters", fooocus),
        ("invokeai_metadata", invoke),
        ("prompt", node),
    ):
        found = read_found({name: json.dumps(data)})
        assert found is None or take_over(found, None).seed is None


def test_four_hundred_digits_in_json(tmp_path: Path) -> None:
    for digits in (400, 5000):
        text = '{"sui_image_params": {"prompt": "a cat", "seed": ' + "9" * digits + "}}"
        found = read_found({"parameters": text})
        assert found is not None and found.seed is None
