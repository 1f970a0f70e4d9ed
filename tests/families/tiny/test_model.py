"""The tiny FLUX: the same layers and arithmetic as FLUX.1, only smaller."""

from pathlib import Path

import numpy as np
import pytest
import torch

from autolora.errors import ConfigError
from autolora.families.flux1.layers import LAYERS
from autolora.families.tiny.model import (
    DOWN,
    LATENT_CHANNELS,
    TinyDecoder,
    TinyEncoder,
    TinyFluxConfig,
)
from autolora.families.tiny.weights import SHIPPED, load_tiny, save_tiny
from autolora.minilm import MiniLM, shared_minilm


@pytest.fixture(scope="module")
def parts(tiny_weights: Path):
    return load_tiny(tiny_weights)


@pytest.fixture(scope="module")
def pipe(parts):
    from autolora.families.tiny.pipeline import assemble

    _, modules = parts
    return assemble(modules["dit"], modules["encoder"], modules["decoder"])


def test_every_linear_layer_has_a_canonical_name(parts) -> None:
    _, modules = parts
    linears = [n for n, m in modules["dit"].named_modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all(LAYERS.parse(name) for name in linears)


def test_saving_and_loading_keeps_sizes_and_values(parts, tmp_path: Path) -> None:
    config, modules = parts
    path = tmp_path / "new" / "copy.safetensors"
    save_tiny(path, config, modules, {"steps": "3"}, dtype=torch.float32)
    again, copies = load_tiny(path)
    assert again == config
    for part, module in modules.items():
        for name, value in module.state_dict().items():
            assert torch.equal(copies[part].state_dict()[name], value), (part, name)
    assert [file.name for file in path.parent.iterdir()] == ["copy.safetensors"]


def test_sizes_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(ValueError, match="add up to width/heads"):
        TinyFluxConfig(width=192, heads=3, rope_axes=(16, 16, 16))


def test_a_checkpoint_that_lacks_a_tensor_is_refused(tiny_weights: Path, tmp_path: Path) -> None:
    from safetensors import safe_open
    from safetensors.torch import save_file

    with safe_open(str(tiny_weights), "pt") as file:
        header = file.metadata()
        tensors = {key: file.get_tensor(key) for key in list(file.keys())[1:]}
    save_file(tensors, str(tmp_path / "less.safetensors"), metadata=header)
    with pytest.raises(ConfigError, match="do not fit"):
        load_tiny(tmp_path / "less.safetensors")


def test_the_autoencoder_has_flux_shapes_and_undoes_its_normalization() -> None:
    torch.manual_seed(0)
    encoder, decoder = TinyEncoder().eval(), TinyDecoder().eval()
    picture = torch.rand(2, 3, 64, 48) * 2 - 1
    with torch.no_grad():
        raw = encoder.raw(picture)
        assert raw.shape == (2, LATENT_CHANNELS, 64 // DOWN, 48 // DOWN)
        encoder.mean.copy_(raw.mean((0, 2, 3)))
        encoder.std.copy_(raw.std((0, 2, 3)))
        decoder.mean.copy_(encoder.mean)
        decoder.std.copy_(encoder.std)
        latents = encoder(picture, tiled=False)
        assert latents.mean((0, 2, 3)).abs().max() < 1e-4
        assert (latents.std((0, 2, 3)) - 1).abs().max() < 1e-3
        torch.testing.assert_close(decoder(latents), decoder.raw(raw), rtol=1e-3, atol=1e-4)
        assert decoder(latents).shape == picture.shape


def test_one_guided_batch_is_what_two_passes_are(pipe) -> None:
    from diffsynth.pipelines.flux_image import FluxImagePipeline

    def draw() -> np.ndarray:
        image = pipe(
            "a red cat",
            negative_prompt="a dog",
            cfg_scale=3.0,
            height=64,
            width=64,
            seed=0,
            num_inference_steps=3,
            t5_sequence_length=16,
            progress_bar_cmd=lambda steps: steps,
        )
        return np.asarray(image, dtype=int)

    together = draw()
    fast = type(pipe).cfg_guided_model_fn
    try:
        type(pipe).cfg_guided_model_fn = FluxImagePipeline.cfg_guided_model_fn
        apart = draw()
    finally:
        type(pipe).cfg_guided_model_fn = fast
    assert np.abs(together - apart).max() <= 1
    assert together.std() > 1, "a flat picture would prove nothing"


def test_padding_changes_no_text_state() -> None:
    minilm = shared_minilm()
    short, pooled = minilm.token_states(["a red cat"], 8)
    long, pooled_long = minilm.token_states(["a red cat"], 40)
    torch.testing.assert_close(long[:, :8], short, rtol=1e-4, atol=1e-5)
    assert torch.count_nonzero(long[:, 8:]) == 0
    torch.testing.assert_close(pooled, pooled_long, rtol=1e-4, atol=1e-5)


def test_sentence_vectors_are_the_masked_mean_of_unit_length() -> None:
    minilm = shared_minilm()
    texts = ["a cat", "a steam locomotive on a green background", ""]
    vectors = minilm.encode(texts)
    for text, vector in zip(texts, vectors, strict=True):
        ids = minilm.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            states = minilm.model(input_ids=ids).last_hidden_state[0].double()
        expected = states.mean(0) / states.mean(0).norm()
        torch.testing.assert_close(vector.double(), expected, rtol=1e-4, atol=1e-5)
    assert MiniLM.dim == vectors.shape[1]
    assert minilm.encode([]).shape == (0, MiniLM.dim)


@pytest.mark.skipif(not SHIPPED.is_file(), reason="the trained tiny FLUX is not in this checkout")
def test_the_shipped_model_draws_a_plain_background() -> None:
    from autolora.config import PipelineConfig
    from autolora.families.load import load_pipeline

    pipe = load_pipeline(PipelineConfig("tiny", device="cpu"))
    for colour, channel in (("red", 0), ("blue", 2)):
        prompt = f"a watermelon on a {colour} background"
        image = pipe(
            prompt,
            cfg_scale=3.0,
            height=128,
            width=128,
            seed=0,
            num_inference_steps=8,
            **pipe.family.inputs(pipe, [prompt]),
            progress_bar_cmd=lambda steps: steps,
        )
        corners = np.asarray(image, dtype=float)[[4, 4, -5, -5], [4, -5, 4, -5]].mean(0)
        assert corners.argmax() == channel and corners[channel] - np.median(corners) > 30
