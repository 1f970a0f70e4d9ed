"""From a configuration to a DiffSynth pipeline."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

from autolora.config import PipelineConfig
from autolora.errors import ConfigError
from autolora.families.registry import find_family
from autolora.runtime.hardware import resolve_device


def load_pipeline(config: PipelineConfig) -> Any:
    """Build the base model that a configuration describes.

    Args:
        config: The configuration.

    Returns:
        DiffSynth's pipeline in evaluation mode, its denoiser stored as configured; its attribute
        ``family`` says what is particular about it.

    Raises:
        ConfigError: Weights are missing or do not fit, the device does not exist, or this kind of
            base model cannot be built.
    """
    family = find_family(config.kind)
    device = resolve_device(config.device)
    with quiet():
        return family.load(config, device)


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
