"""Files made at random: they load, or one of our errors says why not."""

import json

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from autolora.errors import LoRAFormatError
from autolora.lora import LoRA
from autolora.safetensors_io import read_header
from tests.lora.lora_files import make_file, pack

KEY = "lora_unet_double_blocks_0_img_attn_proj"
DOWN, UP, ALPHA = f"{KEY}.lora_down.weight", f"{KEY}.lora_up.weight", f"{KEY}.alpha"


GOOD = save({DOWN: torch.ones(2, 4), UP: torch.ones(4, 2)})


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_mutated_files_load_or_raise_our_error(tmp_path_factory, data):
    content = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(content) - 1))
        content[position] = data.draw(st.integers(0, 255))
    content = (
        content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    )
    path = tmp_path_factory.mktemp("fuzz") / "a.safetensors"
    path.write_bytes(content)
    try:
        lora = LoRA.load(path)
    except LoRAFormatError as error:
        assert "\n" not in str(error)
    else:
        assert lora.layers


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "BF16", "I64", "F8_E4M3", "BOOL", "Q4"]) | JSON,
        "shape": st.lists(st.integers(-1, 9), max_size=3) | JSON,
        "data_offsets": st.tuples(st.integers(0, 40), st.integers(0, 40)).map(list) | JSON,
    }
)
HEADER_KEYS = st.sampled_from([DOWN, UP, ALPHA, "__metadata__"]) | st.text(max_size=8)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(HEADER_KEYS, ENTRY | JSON, max_size=4) | JSON, st.integers(0, 64))
def test_any_header_loads_or_raises_our_error(tmp_path_factory, header, data_bytes):
    path = tmp_path_factory.mktemp("any") / "a.safetensors"
    path.write_bytes(pack(json.dumps(header).encode("utf-8", "replace"), bytes(data_bytes)))
    try:
        found = read_header(path)
        LoRA.load(path)
    except LoRAFormatError as error:
        assert str(error).isprintable() and "a.safetensors" in str(error)
    else:
        assert sum(info.begin < data_bytes for info in found.tensors.values())


def test_header_agrees_with_the_safetensors_library(tmp_path):
    from safetensors import safe_open

    made = make_file("kohya", dtype=torch.bfloat16, alphas=(1.0,))
    path = made.save(tmp_path / "a.safetensors", metadata={"k": "v"})
    header = read_header(path)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(header.tensors)
        assert file.metadata() == header.metadata
        for key, info in header.tensors.items():
            assert file.get_slice(key).get_shape() == list(info.shape)
            assert file.get_slice(key).get_dtype() == info.dtype
