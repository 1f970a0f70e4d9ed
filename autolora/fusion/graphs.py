"""CUDA graphs around a model with adapters, for small steps that launches would dominate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autolora.errors import FusionError

WARM_UP_CALLS = 3  # kernels are compiled and workspaces made before the capture


def capture(function: Callable[..., Any], *inputs: Tensor) -> Callable[..., Any]:
    """Record a call once and return a function that replays it with other inputs.

    Adapters may be exchanged between replays if they were attached with a `Capacity`: their
    buffers are written in place. Anything else that the function reads must stay where it is.

    Args:
        function: Takes tensors and returns a tensor, or a tuple of tensors; must not look at their
            values on the host. Gradients are not recorded.
        inputs: An example of each input, on one CUDA device. Later inputs must be of the same
            shapes and dtypes; they are copied.

    Returns:
        A function of the same inputs. Its result is overwritten by the next call.

    Raises:
        FusionError: The inputs are not on a CUDA device.
    """
    if not inputs or not all(tensor.is_cuda for tensor in inputs):
        raise FusionError("a graph can only be captured with inputs on a CUDA device")
    static = [tensor.clone() for tensor in inputs]
    with torch.no_grad(), torch.cuda.device(inputs[0].device):
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(WARM_UP_CALLS):
                function(*static)
        torch.cuda.current_stream().wait_stream(beside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = function(*static)

    def replay(*others: Tensor) -> Any:
        for place, tensor in zip(static, others, strict=True):
            if place.shape != tensor.shape:
                raise FusionError(
                    f"a captured graph takes {list(place.shape)}, not {list(tensor.shape)}"
                )
            place.copy_(tensor)
        graph.replay()
        return result

    return replay
