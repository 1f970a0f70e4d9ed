"""Adapters on their way to the accelerator while it works on something else."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from autolora.fusion.switching import make_ready


class Prefetch:
    """Copies tensors to a device on a stream of their own, beside what is running there.

    Copies overlap with work only from pinned memory (`pinned`). On a CPU, and for tensors that
    are on the device already, nothing happens.

    Args:
        tensors: What to copy, such as the factors of adapters that were just chosen.
        device: Where to.
        dtype: Converted to on the device; None keeps each tensor's own.
    """

    def __init__(
        self, tensors: Sequence[Tensor], device: torch.device, dtype: torch.dtype | None = None
    ) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type != "cuda":
            self._tensors = [tensor.to(device=device, dtype=dtype) for tensor in tensors]
            return
        self._device = device
        beside = torch.cuda.Stream(device)
        beside.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(beside):
            copies = [tensor.to(device, non_blocking=True) for tensor in tensors]
            self._tensors = [copy.to(dtype=dtype) for copy in copies]
            self._event = beside.record_event()

    def wait(self) -> list[Tensor]:
        """Return the copies; work queued after this call waits for them, the host does not."""
        if self._event is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_event(self._event)
            for tensor in self._tensors:
                # Otherwise the memory could be reused while the current stream still reads it.
                tensor.record_stream(current)
        return self._tensors


def ready_beside(module: nn.Module, dtype: torch.dtype, device: torch.device) -> Callable[[], None]:
    """Bring attached adapters to the accelerator on a stream of their own.

    Meant for the moment before something else is computed there, such as the text of a prompt.

    Args:
        module: The model with the adapters.
        dtype: Type of the layers' outputs.
        device: Where they will be.

    Returns:
        What to call before the model is: work queued afterwards waits for the adapters, the host
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


def pinned(tensor: Tensor) -> Tensor:
    """Return the tensor in page-locked memory, from which copies run beside other work.

    Without a CUDA device, or for a tensor that is not on the CPU, it is returned as it is.
    """
    if tensor.device.type != "cpu" or not torch.cuda.is_available():
        return tensor
    return tensor.pin_memory()
