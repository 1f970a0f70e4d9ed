"""From a configuration to a DiffSynth pipeline."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

from autolora.config import PipelineConfig
from autolora.errors import ConfigError
from autolora.runtime.hardware import resolve_compute, resolve_device

if TYPE_CHECKING:
    import torch


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
    from autolora.families.tiny.pipeline import text_length

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
    from autolora.families.flux1.checkpoint import build_flux1

    return build_flux1(config, device)


def _build_tiny(config: PipelineConfig, device: torch.device) -> Any:
    from autolora.families.tiny.pipeline import assemble
    from autolora.families.tiny.weights import SHIPPED, load_tiny
    from autolora.runtime.storage import store_in_float8

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
