"""Metadata from headers and sidecars, in their order, and what broken ones do."""

import base64
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from autolora.lora import LoRA, Metadata
from autolora.lora.covers import picture_suffix, read_embedded_covers
from tests.lora.metadata_samples import A1111, CIVITAI, HEADER, MANAGER

KEY = "lora_unet_double_blocks_0_img_attn_proj"


@pytest.fixture
def lora_file(tmp_path):
    def write(header=None, stem="neon", **sidecars):
        path = tmp_path / f"{stem}.safetensors"
        tensors = {
            f"{KEY}.lora_down.weight": torch.ones(1, 4),
            f"{KEY}.lora_up.weight": torch.ones(4, 1),
        }
        save_file(tensors, path, metadata=header)
        for suffix, content in sidecars.items():
            text = content if isinstance(content, str) else json.dumps(content)
            (tmp_path / (stem + suffix)).write_text(text, encoding="utf-8")
        return path

    return write


def test_nothing_but_weights(lora_file):
    metadata = Metadata.read(lora_file())
    assert metadata == Metadata(title="neon", sources={"title": "file name"})


def test_lora_manager(lora_file):
    metadata = Metadata.read(
        lora_file(HEADER, **{".metadata.json": MANAGER, ".json": A1111, ".civitai.info": CIVITAI})
    )
    assert metadata.title == "Neon Lights"
    assert metadata.description == "Bright & bold"
    assert metadata.trigger_words == ["neon style", "n30n"]
    assert metadata.tags == ["style", "neon"]
    assert metadata.base_model == "Flux.1 D"
    assert metadata.preferred_strength == 0.8
    assert metadata.strength_bounds == (0.5, 1.2)
    assert metadata.suggestions == ["neon", "sign"]
    sources = dict(metadata.sources)
    assert sources.pop("suggestions") == "header"
    assert set(sources.values()) == {"neon.metadata.json"}
    assert metadata.warnings == []


def test_read_order_is_per_field(lora_file):
    metadata = Metadata.read(lora_file(HEADER, **{".json": A1111, ".civitai.info": CIVITAI}))
    assert (metadata.title, metadata.sources["title"]) == ("Neon by somebody", "neon.civitai.info")
    assert metadata.description == "From the web UI"
    assert metadata.trigger_words == ["neon glow", "n30n"]
    assert metadata.sources["trigger_words"] == "neon.json"
    assert metadata.preferred_strength == 0.7
    assert metadata.tags == ["light"]


def test_header_alone(lora_file):
    metadata = Metadata.read(lora_file(HEADER, **{".txt": "Text file"}))
    assert metadata.title == "Header title"
    assert metadata.description == "Header text"
    assert metadata.trigger_words == ["header trigger"]
    assert metadata.base_model == "flux-1-dev/lora"
    # Summed over folders and spellings: neon 12, sign 9.
    assert metadata.suggestions == ["neon", "sign"]
    # What is frequent in the training captions is suggested, not claimed.
    assert metadata.tags == []
    assert set(metadata.sources.values()) == {"header"}


def test_text_file_is_the_last_description(lora_file):
    metadata = Metadata.read(lora_file(**{".txt": "\ufeffA  neon\nsign \n"}))
    assert metadata.description == "A neon\nsign"
    assert metadata.sources["description"] == "neon.txt"


def test_other_header_keys(lora_file):
    header = {
        "ssmd_display_name": "Shown",
        "ssmd_keywords": "a, b",
        "ssmd_tags": "c,d",
        "ssmd_description": "Said",
        "ss_output_name": "out-000010",
    }
    metadata = Metadata.read(lora_file(header))
    assert (metadata.title, metadata.description) == ("Shown", "Said")
    assert (metadata.trigger_words, metadata.tags) == (["a", "b"], ["c", "d"])


USER = """
title: "1.0"
trigger_words: [no, 1e3, "<lora:neon:1> n30n"]
tags: style, glow
strength: 0.65
strength_min: 0.4
strength_max: 1
captions: ["a neon sign"]
"""


def test_the_user_file_wins_over_all(lora_file):
    sidecars = {".autolora.yaml": USER, ".metadata.json": MANAGER, ".json": A1111}
    metadata = Metadata.read(lora_file(HEADER, **sidecars, **{".captions.json": {"x.png": ["c"]}}))
    # YAML's own reading of these (a float, False, a number) is not wanted.
    assert metadata.title == "1.0"
    assert metadata.trigger_words == ["no", "1e3", "n30n"]
    assert metadata.tags == ["style", "glow"]
    assert (metadata.preferred_strength, metadata.strength_bounds) == (0.65, (0.4, 1.0))
    assert metadata.captions == ["a neon sign"]
    assert metadata.base_model == "Flux.1 D"
    assert metadata.sources["title"] == "neon.autolora.yaml"
    assert metadata.sources["base_model"] == "neon.metadata.json"
    assert metadata.warnings == []


def test_the_user_file_can_say_that_there_is_nothing(lora_file):
    text = "trigger_words: []\ndescription: ''\n"
    metadata = Metadata.read(lora_file(HEADER, **{".autolora.yaml": text}))
    assert (metadata.trigger_words, metadata.description) == ([], "")
    assert metadata.sources["trigger_words"] == "neon.autolora.yaml"
    assert metadata.title == "Header title"


CARD = """---
base_model:
- black-forest-labs/FLUX.1-dev
instance_prompt: TOK style
tags: [lora, "template:sd-lora"]
widget:
- text: "a house in TOK style"
  output:
    url: images/0.png
- text: "-"
  output: {url: ../secret.png}
- text: "a tree <lora:x:1>"
  output: {url: "https://example.org/2.png"}
---
<Gallery />

# House of TOK
"""


def test_a_card_names_no_picture_outside_its_folder(lora_file, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    path = lora_file(stem="in/neon")
    outside = tmp_path / "private.png"
    outside.write_bytes(b"\x89PNG\r\n\x1a\n")
    (folder / "own.png").write_bytes(outside.read_bytes())
    (folder / "link.png").symlink_to(outside)
    for name in ("../private.png", str(outside), "link.png", "own.png"):
        (folder / "README.md").write_text(f"---\nwidget:\n- output: {{url: {name}}}\n---\n")
        covers = Metadata.read(path).covers
        assert [cover.name for cover in covers] == (["own.png"] if name == "own.png" else [])


def test_a_huge_sidecar_is_not_read(lora_file, monkeypatch):
    path = lora_file(**{".json": {"activation text": "n30n"}})
    size = path.with_suffix(".json").stat().st_size
    monkeypatch.setattr("autolora.lora.metadata.MAX_SIDECAR_BYTES", size)
    assert Metadata.read(path).trigger_words == ["n30n"]
    monkeypatch.setattr("autolora.lora.metadata.MAX_SIDECAR_BYTES", size - 1)
    found = Metadata.read(path)
    assert found.trigger_words == [] and found.warnings == ["neon.json is too large; not used."]


@pytest.mark.parametrize(
    ("start", "suffix"),
    [
        (b"\x89PNG\r\n\x1a\n", ".png"),
        (b"\xff\xd8\xff\xe0", ".jpg"),
        (b"RIFF\x10\0\0\0WEBPVP8 ", ".webp"),
        (b"RIFF\x10\0\0\0WAVEfmt ", ""),
        (b"GIF89a", ".gif"),
        (b"GIF88a", ""),
        (b"", ""),
    ],
)
def test_pictures_are_known_by_their_first_bytes(start, suffix):
    assert picture_suffix(start) == suffix


def test_model_card(lora_file, tmp_path):
    path = lora_file({"ss_output_name": "out"}, **{".txt": "text"})
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes(b"")
    metadata = Metadata.read(path)
    assert metadata.title == "House of TOK"
    assert metadata.trigger_words == ["TOK style"]
    assert metadata.tags == ["lora", "template:sd-lora"]
    assert metadata.base_model == "black-forest-labs/FLUX.1-dev"
    assert metadata.captions == ["a house in TOK style", "a tree"]
    assert metadata.covers == [tmp_path / "images" / "0.png"]
    assert metadata.sources["covers"] == metadata.sources["title"] == "README.md"
    assert metadata.warnings == []
    # Pictures named after the file come first, and a folder's card is nobody's among several.
    (tmp_path / "neon.png").write_bytes(b"")
    assert Metadata.read(path).covers == [tmp_path / "neon.png"]
    (tmp_path / "other.safetensors").write_bytes(b"")
    assert Metadata.read(path).title == "out"
    (tmp_path / "neon.README.md").write_text(CARD)
    assert Metadata.read(path).sources["title"] == "neon.README.md"


@pytest.mark.parametrize("text", ["# Only a heading", "---\nno end", "", "---\n\n---\n"])
def test_cards_without_front_matter(lora_file, text):
    metadata = Metadata.read(lora_file(**{".README.md": text}))
    assert metadata.title == "neon"
    assert all("README.md" in warning for warning in metadata.warnings)


def test_example_prompts_stand_in_for_captions(lora_file):
    images = [{"meta": {"prompt": "a <lora:neon:1> sign"}}, {"meta": None}, None, {"meta": 3}]
    info = {"images": [*images, {"meta": {"prompt": ["x"]}}, images[0]]}
    sidecars = {".civitai.info": info}
    assert Metadata.read(lora_file(**sidecars)).captions == ["a sign"]
    sidecars[".captions.json"] = {"neon.png": ["ours"]}
    assert Metadata.read(lora_file(**sidecars)).captions == ["ours"]


PNG, JPEG = b"\x89PNG\r\n\x1a\n" + bytes(9), b"\xff\xd8\xff" + bytes(9)


def test_pictures_in_the_header(lora_file):
    encoded = [base64.b64encode(picture).decode() for picture in (PNG, JPEG)]
    header = {
        "ssmd_cover_images": json.dumps([encoded[0], encoded[0], "no base64", 3]),
        "modelspec.thumbnail": f"data:image/jpeg;base64,{encoded[1]}",
    }
    path = lora_file(header)
    metadata = Metadata.read(path)
    assert metadata.embedded_covers == 2
    assert metadata.sources["embedded_covers"] == "header"
    assert metadata.covers == []
    (warning,) = metadata.warnings
    assert "ssmd_cover_images holds no PNG, JPEG, WebP or GIF picture" in warning
    assert read_embedded_covers(path) == [PNG, JPEG]


@pytest.mark.parametrize(
    "thumbnail", ["https://example.org/a.png", "data:text/html,x", "file:///etc/passwd", "data:"]
)
def test_addresses_in_the_header_are_not_followed(lora_file, thumbnail):
    metadata = Metadata.read(lora_file({"modelspec.thumbnail": thumbnail}))
    assert metadata.embedded_covers == 0
    assert "modelspec.thumbnail holds no" in metadata.warnings[0]


def test_links_out_of_the_folder_are_not_followed(lora_file, tmp_path):
    path = lora_file()
    secret = tmp_path.parent / f"{tmp_path.name}-secret"
    secret.write_text('{"activation text": "secret"}')
    for suffix in (".json", ".txt", ".png", ".autolora.yaml"):
        (tmp_path / f"neon{suffix}").symlink_to(secret)
    (tmp_path / "neon.civitai.info").symlink_to(tmp_path / "inside")
    (tmp_path / "inside").write_text('{"trainedWords": ["inside"]}')
    metadata = Metadata.read(path)
    assert metadata.trigger_words == ["inside"]
    assert (metadata.covers, metadata.description) == ([], "")
    assert len(metadata.warnings) == 3
    assert all("is a link that leaves its folder" in warning for warning in metadata.warnings)


def test_a_pipe_beside_the_file_is_not_opened(lora_file, tmp_path):
    path = lora_file()
    os.mkfifo(tmp_path / "neon.json")
    os.mkfifo(tmp_path / "neon.png")
    assert Metadata.read(path) == Metadata(title="neon", sources={"title": "file name"})


def test_text_is_safe_to_print(lora_file):
    nasty = "a\x1b[31mb\ud800c\u202ed\te\x00"
    metadata = Metadata.read(
        lora_file(**{".json": {"description": nasty, "activation text": nasty + "," + "x" * 501}})
    )
    assert metadata.description == "a[31mbcd e"
    assert metadata.trigger_words == ["a[31mbcd e"]
    assert "more than 500 characters" in metadata.warnings[0]
    json.dumps(metadata.to_dict(), ensure_ascii=False).encode()


def test_range_of_strengths(lora_file):
    tips = {"usage_tips": {"strength_range": "0.6 - 1.1"}}
    assert Metadata.read(lora_file(**{".metadata.json": tips})).strength_bounds == (0.6, 1.1)


def test_zero_preferred_weight_means_not_set(lora_file):
    metadata = Metadata.read(lora_file(**{".json": {"preferred weight": 0}}))
    assert metadata.preferred_strength is None
    assert metadata.warnings == []


def test_covers_and_captions(lora_file, tmp_path):
    captions = {
        "neon.cover-1.png": ["long 1", "medium 1", "short 1"],
        "neon.cover-0.png": ["long 0", "", "short 0"],
        "gone.png": ["of a picture that is gone"],
    }
    path = lora_file(**{".captions.json": captions})
    names = ["neon.png", "neon.preview.jpeg", "neon.cover-0.png", "neon.cover-1.png"]
    for name in reversed([*names, "neon2.png", "neon.cover-x.png", "neon.cover-3.png"]):
        (tmp_path / name).write_bytes(b"")
    metadata = Metadata.read(path)
    assert [cover.name for cover in metadata.covers] == names
    assert metadata.captions == [
        "long 0",
        "short 0",
        "long 1",
        "medium 1",
        "short 1",
        "of a picture that is gone",
    ]
    assert json.loads(json.dumps(metadata.to_dict()))["covers"][0].endswith("neon.png")


@pytest.mark.parametrize(
    ("suffix", "content", "words"),
    [
        (".metadata.json", "{nope", "neon.metadata.json is not valid JSON"),
        (".json", "[1]", "neon.json is not a JSON object"),
        (".json", "[" * 100_000, "neon.json is not valid JSON"),
        (".civitai.info", {"trainedWords": 3}, "trainedWords is not a list of words"),
        (".civitai.info", {"trainedWords": [{}]}, "trainedWords has entries that are no words"),
        (".json", {"preferred weight": "lots"}, "preferred weight is not a number"),
        (".json", '{"preferred weight": NaN}', "preferred weight is not a number"),
        (".json", {"description": ["a"]}, "description is not text"),
        (
            ".metadata.json",
            {"usage_tips": {"strength_min": 2, "strength_max": 1}},
            "strength_min is above strength_max",
        ),
        (
            ".metadata.json",
            {"usage_tips": {"strength_range": "strong"}},
            "strength_range is not a range",
        ),
        (".metadata.json", {"usage_tips": {"strength_min": 1}}, "are not two numbers"),
        (".autolora.yaml", "a: [", "neon.autolora.yaml is not valid YAML"),
        (".autolora.yaml", "[" * 5000, "neon.autolora.yaml is not valid YAML"),
        (".autolora.yaml", "a: &x [*x]", "neon.autolora.yaml is not valid YAML"),
        (".autolora.yaml", "colour: red", "unknown key 'colour'; known are title"),
        (".autolora.yaml", "x" * 300_000, "neon.autolora.yaml is not valid YAML"),
        (".autolora.yaml", "- a", "neon.autolora.yaml is not a table of keys"),
        (".autolora.yaml", "triger_words: a", "did you mean trigger_words?"),
        (".autolora.yaml", "strength: lots", "strength is not a number"),
        (".autolora.yaml", "tags: {a: b}", "tags is not a list of words"),
        (".autolora.yaml", "title: !!python/object/apply:os.getcwd []", "title is not text"),
        (".README.md", "---\na: [\n---\n", "neon.README.md: its front matter is not YAML"),
        (".captions.json", "{", "neon.captions.json is not valid JSON"),
        (".captions.json", [], "neon.captions.json is not a JSON object"),
        (".captions.json", {"a.png": "text"}, "captions of 'a.png'"),
    ],
)
def test_broken_sidecars_warn_and_the_lora_works(lora_file, suffix, content, words):
    path = lora_file({"modelspec.title": "T"}, **{suffix: content})
    lora = LoRA.load(path)
    assert lora.metadata.title == "T"
    (warning,) = lora.metadata.warnings
    assert words in warning


def test_sidecar_that_is_not_text(lora_file, tmp_path):
    path = lora_file()
    (tmp_path / "neon.json").write_bytes(b"\xff\xfe\x00")
    (warning,) = Metadata.read(path).warnings
    assert "neon.json cannot be read" in warning


def test_damaged_weights_still_have_sidecars(lora_file):
    path = lora_file(**{".json": A1111})
    path.write_bytes(b"junk")
    metadata = Metadata.read(path)
    assert metadata.trigger_words == ["neon glow", "n30n"]
    assert "neon.safetensors" in metadata.warnings[0]


def test_stem_with_dots_and_brackets(lora_file, tmp_path):
    path = lora_file(stem="a.v1 [x]", **{".json": A1111})
    (tmp_path / "a.v1 [x].png").write_bytes(b"")
    metadata = Metadata.read(path)
    assert metadata.sources["description"] == "a.v1 [x].json"
    assert len(metadata.covers) == 1


def read(path: Path) -> Metadata:
    return Metadata.read(path)


def test_a_sidecar_of_stability_matrix(lora_file) -> None:
    entries = {
        "ModelId": 1,
        "ModelName": "Neon City",
        "ModelDescription": "<p>Bright</p>",
        "Tags": ["style"],
        "VersionName": "v2",
        "BaseModel": "Flux.1 D",
        "Hashes": {"SHA256": "00", "BLAKE3": "11"},
        "TrainedWords": ["ne0n"],
        "UserTitle": None,
        "Source": 0,
        "Anything new": {"kept": True},
    }
    metadata = read(lora_file(**{".cm-info.json": entries}))
    assert (metadata.title, metadata.description) == ("Neon City", "Bright")
    assert (metadata.tags, metadata.trigger_words) == (["style"], ["ne0n"])
    assert metadata.base_model == "Flux.1 D" and metadata.warnings == []


def test_a_sidecar_of_rgthree(lora_file) -> None:
    entries = {
        "file": "neon.safetensors",
        "name": "Neon City - v2",
        "baseModel": "Flux.1 D",
        "trainedWords": [
            {"word": "ne0n", "civitai": True},
            {"word": "glow", "user": True},
            {"word": "1girl", "count": 99, "metadata": True},
        ],
        "images": [{"url": "https://x", "positive": "a neon cat"}, None],
        "strengthMin": 0.5,
        "strengthMax": 1.5,
    }
    metadata = read(lora_file(**{".safetensors.rgthree-info.json": entries}))
    assert metadata.title == "Neon City - v2" and metadata.trigger_words == ["ne0n", "glow"]
    assert metadata.suggestions == ["1girl"] and metadata.captions == ["a neon cat"]
    assert metadata.strength_bounds == (0.5, 1.5) and metadata.warnings == []


def test_the_lora_managers_own_fields_are_no_trouble_and_stay(lora_file, tmp_path) -> None:
    from autolora.lora.add import add_files

    entries = {
        "file_name": "neon",
        "model_name": "Neon",
        "sha256": "0" * 64,
        "civitai": None,
        "favorite": True,
        "usage_tips": "{}",
        "base_model": "Unknown",
        "something new": [1, {"a": None}],
    }
    path = lora_file({"modelspec.architecture": "flux-1-dev/lora"}, **{".metadata.json": entries})
    metadata = read(path)
    assert (metadata.title, metadata.base_model) == ("Neon", "flux-1-dev/lora")
    assert metadata.warnings == []
    add_files(tmp_path / "pool", [path])
    assert json.loads((tmp_path / "pool" / "neon.metadata.json").read_text()) == entries


@pytest.mark.parametrize("word", ["Unknown", "unknown ", "Other", "None", "n/a"])
@pytest.mark.parametrize(
    ("suffix", "key"),
    [(".json", "sd version"), (".civitai.info", "baseModel"), (".cm-info.json", "BaseModel")],
)
def test_what_is_not_known_hides_nothing(lora_file, suffix: str, key: str, word: str) -> None:
    path = lora_file({"modelspec.architecture": "flux-1-dev/lora"}, **{suffix: {key: word}})
    assert read(path).base_model == "flux-1-dev/lora"


def test_one_null_does_not_lose_a_list(lora_file) -> None:
    metadata = read(lora_file(**{".civitai.info": {"trainedWords": ["ne0n", None, 7]}}))
    assert metadata.trigger_words == ["ne0n", "7"] and metadata.warnings == []
    metadata = read(lora_file(**{".civitai.info": {"trainedWords": [{"a": 1}, "ne0n", True]}}))
    assert metadata.trigger_words == ["ne0n"]
    assert metadata.warnings == [
        "neon.civitai.info: trainedWords has entries that are no words; those are not used."
    ]


@pytest.mark.parametrize("word", ["<s0><s1>", "<style>1234</style>", "<tok-1> cat", "a <b2>"])
def test_trigger_words_in_angle_brackets_are_words(lora_file, word: str) -> None:
    from autolora.prompt_syntax import add_triggers, parse_prompt

    metadata = read(
        lora_file(
            **{
                ".civitai.info": {"trainedWords": [word]},
                ".README.md": f"---\nwidget:\n- text: a photo of {word}\n---\n",
            }
        )
    )
    assert metadata.trigger_words == [word] and metadata.captions == [f"a photo of {word}"]
    text = add_triggers("a cat", metadata.trigger_words)[0]
    assert text == f"a cat, {word}" and parse_prompt(text).text == text


@pytest.mark.parametrize(
    "stem",
    ["pytorch_lora_weights", "lora", "adapter_model", "model", "Lora-2", "diffusion_pytorch_model"],
)
def test_a_stem_that_says_nothing_takes_its_folders_name(lora_file, tmp_path, stem: str) -> None:
    path = lora_file({"ss_output_name": stem}, stem=stem)
    folder = tmp_path / "Neon City"
    folder.mkdir()
    path = path.rename(folder / path.name)
    assert (read(path).title, read(path).sources["title"]) == ("Neon City", "folder name")
    cache = tmp_path / "models--somebody--neon-style" / "snapshots" / ("a1" * 20)
    cache.mkdir(parents=True)
    path = path.rename(cache / path.name)
    assert read(path).title == "neon-style"
    (cache / "README.md").write_text("---\ntags: [a]\n---\n# Neon, the card\n")
    assert read(path).title == "Neon, the card"
    plain = tmp_path / "loras"
    plain.mkdir()
    assert read(path.rename(plain / path.name)).title == stem


def test_names_that_say_something_stay(lora_file) -> None:
    for stem in ("neon", "lora-neon", "model of a ship", "adapter model x", "loraine"):
        assert read(lora_file(stem=stem)).title == stem


def test_covers_of_other_spellings_and_kinds(lora_file, tmp_path) -> None:
    path = lora_file()
    for name in ("neon.PNG", "neon.gif", "neon.preview.JPG", "neon.preview.jpeg"):
        (tmp_path / name).write_bytes(b"x")
    covers = {cover.name for cover in read(path).covers}
    assert covers == {"neon.PNG", "neon.gif", "neon.preview.JPG", "neon.preview.jpeg"}


def test_a_lone_tag_of_a_training_is_its_trigger_word(lora_file) -> None:
    lone = {"ss_tag_frequency": json.dumps({"1_ne0n": {"ne0n": 1}})}
    assert read(lora_file(lone)).trigger_words == ["ne0n"]
    two = {"ss_tag_frequency": json.dumps({"1_ne0n": {"ne0n": 9, "cat": 1}})}
    assert read(lora_file(two)).trigger_words == []
    long = {"ss_tag_frequency": json.dumps({"1": {"a photo of a cat in the snow": 9}})}
    assert read(lora_file(long)).trigger_words == []
    said = {**lone, "ssmd_keywords": "other"}
    assert read(lora_file(said)).trigger_words == ["other"]


def test_civitais_answer_under_another_name(lora_file) -> None:
    metadata = read(lora_file(**{".json": {"trainedWords": ["ne0n"], "model": {"name": "Neon"}}}))
    assert (metadata.title, metadata.trigger_words) == ("Neon", ["ne0n"])
