"""From a configuration to a DiffSynth pipeline."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from autolora.errors import ConfigError, shown
from autolora.flux.config import PipelineConfig, load_config

if TYPE_CHECKING:
    import torch

__all__ = ["PipelineConfig", "load_config", "load_pipeline", "quiet", "text_length_for"]


def load_pipeline(config: PipelineConfig) -> Any:
    """Build the base model that a configuration describes.

    Args:
        config: The configuration.

    Returns:
        A DiffSynth ``FluxImagePipeline`` in evaluation mode, its transformer stored as configured.

    Raises:
        ConfigError: Weights are missing or do not fit, the device does not exist, or this kind of
            base model cannot be built.
    """
    build = _BUILDERS.get(config.kind)
    if build is None:
        raise ConfigError(
            f"Base models of kind {config.kind} cannot be loaded by this version; "
            f"use one of kind {', '.join(_BUILDERS)}."
        )
    device = resolve_device(config.device)
    with quiet():
        return build(config, device)


def resolve_device(name: str) -> torch.device:
    """Turn the name of a device into a device that exists.

    Raises:
        ConfigError: It is not the name of a device, or torch cannot use it here.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(
            f"{shown(name)!r} is not a device; use auto, cpu, cuda or cuda:N."
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        from autolora.flux.hardware import why_no_cuda

        why = f": {why_no_cuda()}" if not torch.cuda.is_available() else ""
        raise ConfigError(
            f"Device {name} is not there for torch on this machine{why}; use auto or cpu."
        )
    return device


def resolve_compute(config: PipelineConfig, device: torch.device) -> torch.dtype:
    """Return the type that linear layers compute in."""
    import torch

    if config.compute != "auto":
        name = config.compute
    elif config.storage in ("bfloat16", "float32"):
        name = config.storage
    else:
        name = "float32" if device.type == "cpu" else "bfloat16"
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]


def text_length_for(pipe: Any, prompts: Sequence[str]) -> int:
    """Number of text tokens to pad to, so that none of the prompts is cut where that is possible.

    Args:
        pipe: What `load_pipeline` returned.
        prompts: All texts of one generation; they are padded alike.
    """
    minilm = getattr(pipe.text_encoder_2, "minilm", None)
    if minilm is None:
        length: int = pipe.text_length
        return length
    from autolora.flux.tiny.pipeline import text_length

    return text_length(minilm, list(prompts), pipe.dit.config)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries print while they load off the screen, unless loading fails.

    What is sent through ``logging`` and ``warnings`` handlers set up before still appears.
    """
    printed = io.StringIO()
    try:
        with redirect_stdout(printed), redirect_stderr(printed):
            yield
    except ConfigError:
        raise
    except Exception:
        sys.stderr.write(printed.getvalue())
        raise


def _build_flux1(config: PipelineConfig, device: torch.device) -> Any:
    from autolora.flux.flux1 import build_flux1

    return build_flux1(config, device)


def _build_tiny(config: PipelineConfig, device: torch.device) -> Any:
    from autolora.flux.quantize import store_in_float8
    from autolora.flux.tiny.pipeline import assemble
    from autolora.flux.tiny.weights import SHIPPED, load_tiny

    compute = resolve_compute(config, device)
    _, parts = load_tiny(config.weights or SHIPPED)
    pipe = assemble(parts["dit"], parts["encoder"], parts["decoder"], device, compute)
    _cast_text(pipe, compute)
    if config.storage == "float8":
        # After assembling, which casts every parameter to the type that is computed in.
        store_in_float8(pipe.dit, compute, device)
    return pipe


def _cast_text(pipe: Any, compute: torch.dtype) -> None:
    """Hand the transformer its text in the type it computes in; the text encoder has its own."""
    import torch

    def cast(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return tuple(cast(module, inputs, part) for part in output)
        return output.to(compute) if isinstance(output, torch.Tensor) else output

    for encoder in (pipe.text_encoder_1, pipe.text_encoder_2):
        encoder.register_forward_hook(cast)


_BUILDERS: dict[str, Callable[[PipelineConfig, torch.device], Any]] = {
    "tiny": _build_tiny,
    "flux1": _build_flux1,
}
"""One function per kind of base model."""
