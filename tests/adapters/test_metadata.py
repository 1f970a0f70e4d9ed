"""Metadata from headers and sidecars, in their order, and what broken ones do."""

import json

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from autolora.adapters import LoRA, Metadata
from autolora.adapters.sidecars import SIDECARS, parse_header, plain_text

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


HEADER = {
    "modelspec.title": "Header title",
    "modelspec.description": "Header text",
    "modelspec.trigger_phrase": "header trigger",
    "modelspec.architecture": "flux-1-dev/lora",
    "ss_output_name": "out",
    "ss_tag_frequency": json.dumps({"a": {"neon": 5, "sign": 9}, "b": {"neon": 7, "Sign": 1}}),
}
MANAGER = {
    "model_name": "Neon Lights",
    "modelDescription": "<p>Bright &amp; <b>bold</b></p>",
    "tags": ["style", "neon"],
    "base_model": "Flux.1 D",
    "civitai": {"trainedWords": ["neon style, ", "n30n", "Neon Style"]},
    "usage_tips": '{"strength": 0.8, "strength_min": 0.5, "strength_max": 1.2}',
}
A1111 = {
    "description": "From the web UI",
    "sd version": "Flux",
    "activation text": "neon glow, n30n",
    "preferred weight": 0.7,
}
CIVITAI = {
    "name": "v1.0",
    "model": {"name": "Neon by somebody", "tags": ["light"]},
    "description": "Version text",
    "trainedWords": ["civ word"],
    "baseModel": "Flux.1 D",
}


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
    assert set(metadata.sources.values()) == {"neon.metadata.json"}
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
    assert metadata.tags == ["neon", "sign"]
    assert set(metadata.sources.values()) == {"header"}


def test_text_file_is_the_last_description(lora_file):
    metadata = Metadata.read(lora_file(**{".txt": "\ufeffA  neon\nsign \n"}))
    assert metadata.description == "A neon\nsign"
    assert metadata.sources["description"] == "neon.txt"


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
        (".civitai.info", {"trainedWords": [None]}, "trainedWords is not a list of words"),
        (".json", {"preferred weight": "lots"}, "preferred weight is not a number"),
        (".json", '{"preferred weight": NaN}', "preferred weight is not a number"),
        (".json", {"description": ["a"]}, "description is not text"),
        (
            ".metadata.json",
            {"usage_tips": {"strength_min": 2, "strength_max": 1}},
            "strength_min is above strength_max",
        ),
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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=6,
)
NAMES = sorted({*MANAGER, *A1111, *CIVITAI, *HEADER, "strength", "strength_min", "strength_max"})


@settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
@given(st.dictionaries(st.sampled_from(NAMES), JSON))
def test_parsers_take_anything(entries):
    for parse in (*dict(SIDECARS).values(), parse_header):
        fields, problems = parse(entries)
        assert all(isinstance(problem, str) for problem in problems)
        for name, value in fields.items():
            assert value not in ("", [], None)
            if name in ("trigger_words", "tags"):
                assert all(isinstance(word, str) for word in value)


def test_plain_text_keeps_what_is_no_markup():
    assert plain_text("strength < 1 and > 0 &amp;") == "strength < 1 and > 0 &amp;"
    assert plain_text("<p>a</p>\n<p>b&lt;c</p>") == "a\nb<c"
