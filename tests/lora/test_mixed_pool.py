"""A folder of LoRAs for every base model, as people have it: each is listed under its own.

Files have the true shapes at rank 1, and headers that are right, wrong, or missing. Names and
shapes are those of the programs that write them (see `tests.lora.truth.families` for the values).
"""

import itertools

import pytest
import torch
from safetensors.torch import save_file

from autolora import LoRA, Pool
from autolora.errors import FamilyError

AB = ("lora_A.weight", "lora_B.weight")
KOHYA = ("lora_down.weight", "lora_up.weight")


def pair(path, out, inner, suffixes=AB, kernel=()):
    shapes = ((1, inner, *kernel), (out, 1, *(1 for _ in kernel)))
    return {
        f"{path}.{suffix}": torch.zeros(shape, dtype=torch.float16)
        for suffix, shape in zip(suffixes, shapes, strict=True)
    }


def kohya(path, *sizes, **options):
    return pair("lora_unet_" + path.replace(".", "_"), *sizes, KOHYA, **options)


def spelled(paths, prefix, joint="."):
    """The same modules as several programs write them."""
    found = {}
    for path, (out, inner) in paths.items():
        suffixes = KOHYA if joint == "_" else AB
        found |= pair(prefix + path.replace(".", joint), out, inner, suffixes)
    return found


def bfl(width, block, mlp=None, single=None):
    modules = {
        f"double_blocks.{block}.img_attn.qkv": (3 * width, width),
        f"double_blocks.{block}.txt_attn.proj": (width, width),
    }
    if mlp:
        modules[f"double_blocks.{block}.img_mlp.0"] = (mlp * width, width)
    if single:
        modules[f"single_blocks.{block}.linear1"] = (single * width, width)
    return modules


def attention(width, *blocks, more=()):
    names = ("to_q", "to_k", "add_v_proj")
    found = {f"transformer_blocks.{b}.attn.{n}": (width, width) for b in blocks for n in names}
    return found | dict(more)


Z_BLOCK = {
    "layers.3.attention.to_q": (3840, 3840),
    "layers.29.attention.to_out.0": (3840, 3840),
    "layers.3.feed_forward.w1": (10240, 3840),
}
SDXL_ATTENTION = {
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    "mid_block.attentions.0.transformer_blocks.9.attn1.to_q": (1280, 1280),
}
SGM_ATTENTION = {
    "input_blocks.4.1.transformer_blocks.0.attn2.to_k": (640, 2048),
    "middle_block.1.transformer_blocks.9.attn1.to_q": (1280, 1280),
}
QWEN = attention(3072, 0, 59, more={"transformer_blocks.0.img_mod.1": (18432, 3072)}.items())
SURE = {
    "FLUX.1": [
        bfl(3072, 18, mlp=4),
        bfl(3072, 3, mlp=4, single=7),
        bfl(3072, 7),
        {"single_blocks.20.linear2": (3072, 15360)},
        {"single_transformer_blocks.37.attn.to_q": (3072, 3072)},
        attention(3072, 0, more={"single_transformer_blocks.0.proj_mlp": (12288, 3072)}.items()),
        attention(3072, 2, more={"transformer_blocks.2.norm1.linear": (18432, 3072)}.items()),
    ],
    "FLUX.2": [
        bfl(3072, 0, mlp=6),
        bfl(3072, 4, mlp=6, single=9),
        bfl(4096, 7),
        bfl(6144, 0),
        {"single_blocks.19.linear2": (3072, 12288)},
        {"single_transformer_blocks.3.attn.to_out": (3072, 12288)},
        attention(3072, 1, more={"transformer_blocks.1.ff.linear_in": (18432, 3072)}.items()),
        {"single_transformer_blocks.47.attn.to_qkv_mlp_proj": (55296, 6144)},
    ],
    "Z-Image": [
        Z_BLOCK,
        {"layers.0.attention.qkv": (11520, 3840), "layers.0.attention.out": (3840, 3840)},
        {"noise_refiner.1.attention.to_k": (3840, 3840)},
        {"layers.12.adaLN_modulation.0": (15360, 256)},
    ],
    "Qwen-Image": [QWEN, attention(3072, 19), attention(3072, 0, 40)],
    "SDXL": [
        SDXL_ATTENTION,
        SGM_ATTENTION,
        {"up_blocks.0.attentions.1.transformer_blocks.0.attn1.to_v": (1280, 1280)},
        {"input_blocks.5.1.transformer_blocks.1.attn1.to_out.0": (640, 640)},
    ],
    "Krea 2": [
        {
            "transformer_blocks.9.attn.to_q": (6144, 6144),
            "transformer_blocks.9.attn.to_k": (1536, 6144),
        },
        {"blocks.0.attn.wq": (6144, 6144), "blocks.27.mlp.gate": (16384, 6144)},
        {"transformer_blocks.0.attn.to_gate": (6144, 6144)},
        {"text_fusion.refiner_blocks.0.attn.to_q": (2560, 2560)},
    ],
    "FLUX.3": [
        {"single_blocks.0.q_proj": (3072, 3072), "single_blocks.27.mlp_in": (18432, 3072)},
        {"single_transformer_blocks.0.ff.linear_in": (18432, 3072)},
        {"content_mode_blocks.image.0.q_proj": (3072, 3072)},
    ],
    "Anima": [
        {"blocks.0.cross_attn.output_proj": (2048, 2048), "blocks.3.mlp.layer1": (8192, 2048)},
        {"blocks.0.self_attn.q_proj": (2048, 2048)},
    ],
    "Ideogram 4": [
        {"layers.0.attention.qkv": (13824, 4608), "layers.33.attention.o": (4608, 4608)},
        {"layers.0.attention.to_q": (4608, 4608)},
    ],
    "Wan": [
        {"blocks.0.self_attn.q": (5120, 5120), "blocks.0.ffn.0": (13824, 5120)},
        {"blocks.0.cross_attn.k_img": (5120, 1280)},
    ],
    "HiDream": [{"double_stream_blocks.0.block.attn1.to_q": (2560, 2560)}],
    "Lumina 2": [{"layers.0.attention.qkv": (3840, 2304), "layers.0.attention.out": (2304, 2304)}],
    "Stable Diffusion 1.5": [
        {"down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768)},
        {"input_blocks.4.1.transformer_blocks.0.attn2.to_v": (640, 768)},
    ],
    "Stable Diffusion 2": [
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 1024)},
    ],
    "Stable Diffusion 3": [
        {"transformer_blocks.0.attn.to_q": (1536, 1536)},
        {"transformer_blocks.37.attn.add_q_proj": (2432, 2432)},
        {"joint_blocks.0.x_block.attn.qkv": (4608, 1536)},
    ],
}
"""Modules whose names, sizes or numbers tell the base model."""

SHARED = [
    (("FLUX.1", "FLUX.2"), bfl(3072, 0), {"FLUX.1": "flux1", "FLUX.2": "flux_2_klein_4b"}),
    (
        ("FLUX.1", "FLUX.2", "Qwen-Image"),
        attention(3072, 0, 4),
        {"FLUX.1": "flux1", "FLUX.2": "flux_2_klein_4b", "Qwen-Image": "qwen_image"},
    ),
    (
        ("FLUX.1", "Qwen-Image"),
        attention(3072, *range(19)),
        {"FLUX.1": "flux_kontext", "Qwen-Image": "qwen_image_edit"},
    ),
    (
        ("FLUX.1", "FLUX.3"),
        {"single_transformer_blocks.5.attn.to_v": (3072, 3072)},
        {"FLUX.1": "flux1", "FLUX.3": "flux_3_klein"},
    ),
    (
        ("FLUX.2", "Krea 2"),
        {"transformer_blocks.3.attn.to_q": (6144, 6144)},
        {"FLUX.2": "flux_2_dev", "Krea 2": "krea2"},
    ),
    (
        ("SDXL", "Stable Diffusion 1.5", "Stable Diffusion 2"),
        {"down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640)},
        {"SDXL": "sdxl_base_v1-0", "Stable Diffusion 1.5": "sd_v1.5"},
    ),
]
"""Modules that several base models have, and headers that tell one of them."""

WRITERS = (("lora_unet_", "_"), ("diffusion_model.", "."), ("base_model.model.", "."), ("", "."))
WRONG = ("sd_1.5", "sdxl_base_v1-0", "flux_2_klein_9b", "qwen_image", "z_image", "flux1", "mine")


def sure_files():
    """Base model, tensors and header of about 170 files that can be told."""
    headers = itertools.cycle((None, *WRONG))
    for title, listed in SURE.items():
        for modules, (prefix, joint) in itertools.product(listed, WRITERS):
            yield title, spelled(modules, prefix, joint), next(headers)
    stem = "lora_unet_input_blocks_8_0_in_layers_2"
    yield "SDXL", kohya("output_blocks.2.2.conv", 1280, 1280, kernel=(3, 3)), "flux1"
    yield (
        "SDXL",
        pair(stem, 1280, 1280, KOHYA, (3, 3)) | spelled(SGM_ATTENTION, "lora_unet_", "_"),
        None,
    )
    sized = {"lora_te2_text_model_encoder_layers_31_mlp_fc1": (5120, 1280)}
    shared = {"lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640)}
    yield "SDXL", spelled(sized | shared, "", "_"), "sd_1.5"


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixed")
    wanted = {}

    def write(title, tensors, named):
        path = folder / f"{len(wanted):03}.safetensors"
        save_file(tensors, path, {"ss_base_model_version": named} if named else None)
        wanted[path.stem] = title

    for title, tensors, named in sure_files():
        write(title, tensors, named)
    for titles, modules, headers in SHARED:
        prefix, joint = WRITERS[1]
        write(" or ".join(titles), spelled(modules, prefix, joint), None)
        write(" or ".join(titles), spelled(modules, prefix, joint), "mine")
        for title, named in headers.items():
            write(title, spelled(modules, prefix, joint), named)
    # Chroma has the names and shapes of FLUX.1: its header is all that tells.
    write("Chroma", spelled(bfl(3072, 8, mlp=4), "diffusion_model."), "chroma")
    write("unknown", {"x.lora_A.weight": torch.zeros(1, 4)}, None)
    return Pool(folder), wanted


def test_every_file_is_under_its_base_model(mixed):
    pool, wanted = mixed
    assert len(wanted) >= 200
    found = {name: title for title, names in pool.families().items() for name in names}
    wrong = {name: (wanted[name], found[name]) for name in wanted if wanted[name] != found[name]}
    assert wrong == {}


def test_ambiguous_files_say_what_they_may_be(mixed):
    pool, wanted = mixed
    for name, title in wanted.items():
        if " or " in title:
            candidates = title.split(" or ")
            with pytest.raises(FamilyError) as caught:
                pool.load(name)
            assert caught.value.candidates == tuple(candidates)
            assert all(candidate in str(caught.value) for candidate in candidates)
            assert "family=" in str(caught.value)
            for family in caught.value.families:
                assert pool.load(name, family).family == family


@pytest.mark.parametrize(
    ("beside", "text"),
    [
        (".autolora.yaml", "base_model: FLUX.2"),
        (".autolora.yaml", "base_model: flux2"),
        (".civitai.info", '{"baseModel": "Flux.2 Klein 4B", "trainedWords": []}'),
    ],
)
def test_a_word_beside_the_file_decides(tmp_path, beside, text):
    path = tmp_path / "a.safetensors"
    save_file(spelled(bfl(3072, 0), "diffusion_model."), path)
    with pytest.raises(FamilyError, match=r"base_model in a\.autolora\.yaml"):
        LoRA.load(path)
    (tmp_path / f"a{beside}").write_text(text)
    assert LoRA.load(path).family == "flux2"
    assert Pool(tmp_path).families() == {"FLUX.2": ["a"]}
    (tmp_path / "a.autolora.yaml").write_text("base_model: SDXL")
    with pytest.raises(FamilyError):
        LoRA.load(path)


def test_other_models_are_named_and_left_out(mixed):
    pool, wanted = mixed
    supported = {"FLUX.1": "flux1", "FLUX.2": "flux2", "Z-Image": "z_image"}
    supported |= {"Qwen-Image": "qwen_image", "SDXL": "sdxl"}
    for name, title in wanted.items():
        if title in supported:
            described = pool.describe(name)
            assert described.family == supported[title] and described.format
            assert described.problem == ""
        elif title != "unknown" and " or " not in title:
            with pytest.raises(FamilyError, match=f"an adapter for {title}, not for FLUX.1"):
                pool.load(name)
            with pytest.raises(
                FamilyError, match=f"{title}, not for Z-Image; use one made for Z-Image"
            ):
                LoRA.load(pool.entry(name).path, "z_image")


def test_a_family_that_does_not_exist_is_refused(mixed):
    pool, _ = mixed
    with pytest.raises(Exception, match="no base-model family named 'flux9'; choose one of flux1"):
        pool.load(pool.names[0], "flux9")
