"""Adapters on their way to the accelerator while it works on something else."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from autolora.fusion.switching import make_ready


def ready_beside(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Bring attached adapters to the accelerator on a stream of their own.

    Meant for the moment before something else is computed there, such as the text of a prompt.

    Args:
        module: The model with the adapters.
        dtype: Type of the layers' outputs.
        device: Where they will be.

    Returns:
        What to call before the model is. Work queued afterwards waits for the adapters, the host
        does not. On a CPU nothing is done here, and layers make themselves ready when called.
    """
    if device.type != "cuda":
        return lambda: None
    beside = torch.cuda.Stream(device)
    # So that memory of earlier adapters is not overwritten while queued work still reads it.
    beside.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(beside):
        make_ready(module, dtype, device)
        event = beside.record_event()
    return lambda: torch.cuda.current_stream(device).wait_event(event)
