"""Loading the tiny base model: storage, computation type, devices, bad weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from autolora.config import PipelineConfig
from autolora.errors import ConfigError
from autolora.families.load import load_pipeline, quiet
from autolora.families.tiny.pipeline import text_length
from autolora.runtime import hardware
from autolora.runtime.hardware import resolve_compute, resolve_device

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config(tiny_weights: Path) -> PipelineConfig:
    return PipelineConfig("random", weights=tiny_weights, device="cpu", width=64, height=64)


def draw(pipe, prompt="a red cat", **options):
    image = pipe(
        prompt,
        cfg_scale=2.0,
        height=64,
        width=64,
        seed=3,
        num_inference_steps=3,
        t5_sequence_length=text_length(pipe, [prompt]),
        progress_bar_cmd=lambda steps: steps,
        **options,
    )
    return np.asarray(image, dtype=np.float64)


def test_float8_keeps_one_byte_per_weight_and_draws_nearly_the_same(config) -> None:
    float8 = load_pipeline(config)
    plain = load_pipeline(replace(config, storage="float32"))
    linears = [m for m in float8.dit.modules() if isinstance(m, torch.nn.Linear)]
    assert linears and all(m.weight.dtype == torch.float8_e4m3fn for m in linears)
    assert all(
        m.weight.dtype == torch.float32
        for m in plain.dit.modules()
        if isinstance(m, torch.nn.Linear)
    )
    # The rounding itself, against torch's own, to the bit.
    name, layer = next((n, m) for n, m in plain.dit.named_modules() if "to_qkv" in n)
    rounded = float8.dit.get_submodule(name).weight.float()
    assert torch.equal(rounded, layer.weight.to(torch.float8_e4m3fn).float())
    error = np.sqrt(np.mean((draw(float8) - draw(plain)) ** 2))
    assert 0 < error < 12.8  # of 255: more than 26 dB


@pytest.mark.parametrize("storage", ["float8", "bfloat16"])
def test_bfloat16_computes_on_a_cpu(config, storage: str) -> None:
    exact = draw(load_pipeline(replace(config, storage="float32")))
    pipe = load_pipeline(replace(config, storage=storage, compute="bfloat16"))
    assert pipe.torch_dtype == torch.bfloat16
    assert 0 < np.sqrt(np.mean((draw(pipe) - exact) ** 2)) < 25


def test_nothing_is_printed_while_loading(config, capfd: pytest.CaptureFixture[str]) -> None:
    load_pipeline(config)
    captured = capfd.readouterr()
    assert captured.out == "" and captured.err == ""


def test_quiet_shows_what_was_printed_when_something_fails(capsys) -> None:
    with pytest.raises(ZeroDivisionError), quiet():
        print("the reason")
        _ = 1 / 0
    assert "the reason" in capsys.readouterr().err


def test_long_prompts_are_not_cut(config) -> None:
    pipe = load_pipeline(config)
    assert text_length(pipe, ["a cat", ""]) == 16
    assert text_length(pipe, ["a cat", "a " * 100]) == 102  # with the first and last token


def test_compute_type_follows_storage_and_device(monkeypatch: pytest.MonkeyPatch) -> None:
    def compute(device: torch.device, **changes: str) -> torch.dtype:
        return resolve_compute(PipelineConfig("x", **changes), device)

    for instructions, expected in ((None, torch.float32), ("AMX", torch.bfloat16)):
        monkeypatch.setattr(hardware, "bfloat16_instructions", lambda found=instructions: found)
        assert compute(CPU) == expected
        assert compute(torch.device("cuda")) == torch.bfloat16
    assert compute(CPU, compute="bfloat16") == torch.bfloat16
    assert compute(torch.device("cuda"), storage="float32") == torch.float32
    assert compute(CPU, storage="bfloat16") == torch.bfloat16


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert resolve_device("auto") == CPU
    for name, words in (("gpu", "'gpu' is not a device"), ("cuda:7", "cuda:7 is not there")):
        with pytest.raises(ConfigError, match=words):
            resolve_device(name)


@pytest.mark.parametrize(
    ("content", "words"), [(None, "missing"), (b"not a checkpoint", "not a tiny FLUX checkpoint")]
)
def test_bad_weights(config, tmp_path: Path, content: bytes | None, words: str) -> None:
    path = tmp_path / "bad.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=words):
        load_pipeline(replace(config, weights=path))


def test_a_full_size_model_needs_its_files(config) -> None:
    with pytest.raises(ConfigError, match="lacks files"):
        load_pipeline(replace(config, kind="flux1"))


def test_a_device_that_is_not_there_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(ConfigError, match=r"cuda is not there .* built without CUDA"):
        resolve_device("cuda")


@pytest.mark.gpu
def test_a_gpu_draws_what_the_cpu_draws(config) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    on_cpu = draw(load_pipeline(replace(config, storage="float32")))
    on_gpu = draw(load_pipeline(replace(config, storage="float32", device="cuda")))
    assert np.sqrt(np.mean((on_cpu - on_gpu) ** 2)) < 2.6
