"""Learned gates (AutoLoRA, section "gated fusion"), of a layer and of a model, and their file.

Shapes: ``N`` adapters, ``T`` tokens (any leading shape), ``out`` output channels.

With the layer's own output ``y`` and the adapters' outputs ``l_i``::

    g_i = sigmoid(LN_b(y) w_b + LN_l(l_i) w_l + LN_b(y) LN_l(l_i) w_c + bias)
    out = y + w_out * sum_i g_i l_i

All products are elementwise over the output channels, and all parameters are shared by the
adapters, so that one gate fuses any number of them.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autolora.errors import FusionError
from autolora.files import replacing

PARAMETER_NAMES = (
    "weight_base",
    "weight_lora",
    "weight_cross",
    "weight_out",
    "bias",
    "norm_base.weight",
    "norm_base.bias",
    "norm_lora.weight",
    "norm_lora.bias",
)
"""The published names of one layer's tensors, each of shape ``[out]``."""


@dataclass(frozen=True, slots=True)
class GateTerms:
    """A gate rearranged for speed; all tensors ``[out]``.

    The gate's argument is linear in the normalised adapter output, so with ``LN(y; w, b)`` the
    layer norm of ``y`` with scale ``w`` and shift ``b``, and ``n_i`` the adapter's output
    normalised *without* scale and shift::

        g_i = sigmoid(LN(y; base_weight, base_bias) + n_i * LN(y; coef_weight, coef_bias))

    Two layer norms of ``y`` thus serve all adapters.
    """

    base_weight: Tensor
    base_bias: Tensor
    coef_weight: Tensor
    coef_bias: Tensor
    out: Tensor
    eps_base: float
    eps_lora: float


class Gate(nn.Module):
    """Decides, per output channel and token, how much each adapter says in one linear layer.

    Args:
        out_features: Output channels of the layer.
        eps: Added to the variance in both layer norms.

    A new gate is neutral: it passes every adapter unchanged, which is the plain sum.
    """

    def __init__(self, out_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight_base = nn.Parameter(torch.zeros(out_features))
        self.weight_lora = nn.Parameter(torch.zeros(out_features))
        self.weight_cross = nn.Parameter(torch.zeros(out_features))
        # sigmoid(0) is 1/2 exactly, so that an output weight of 2 makes the neutral gate exact.
        self.weight_out = nn.Parameter(torch.full((out_features,), 2.0))
        self.bias = nn.Parameter(torch.zeros(out_features))
        self.norm_base = nn.LayerNorm(out_features, eps=eps)
        self.norm_lora = nn.LayerNorm(out_features, eps=eps)
        self._cached_terms: tuple[tuple[object, ...], GateTerms | None, list[Tensor]] | None = None

    @classmethod
    def neutral(cls, out_features: int) -> Gate:
        """Return the gate under which fusion is the plain sum, exactly."""
        return cls(out_features)

    @classmethod
    def from_diffsynth(cls, state_dict: Mapping[str, Tensor]) -> Gate:
        """Build a gate from one layer's published tensors.

        Args:
            state_dict: The nine tensors of `PARAMETER_NAMES`, each ``[out]``.

        Raises:
            FusionError: A name is missing or unknown, or a tensor is not a finite float ``[out]``.
        """
        _check_tensors(state_dict)
        gate = cls(state_dict["bias"].shape[0])
        gate.load_state_dict({name: tensor.float() for name, tensor in state_dict.items()})
        return gate

    @property
    def out_features(self) -> int:
        """Output channels of the layer that the gate is made for."""
        return self.bias.shape[0]

    @property
    def trains(self) -> bool:
        """Whether a gradient for any of the gate's parameters is wanted right now."""
        return torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters())

    def forward(self, base_output: Tensor, adapter_outputs: Tensor) -> Tensor:
        """Fuse by the equation, term by term; `autolora.fusion.linear` is the fast form.

        Args:
            base_output: ``y``, ``[..., out]``.
            adapter_outputs: ``l_i`` stacked, ``[N, ..., out]``.

        Returns:
            The fused output, ``[..., out]``.
        """
        base = self.norm_base(base_output)
        lora = self.norm_lora(adapter_outputs)
        argument = base * self.weight_base + lora * self.weight_lora
        argument = argument + base * lora * self.weight_cross + self.bias
        return base_output + self.weight_out * (torch.sigmoid(argument) * adapter_outputs).sum(0)

    def is_neutral(self) -> bool:
        """Whether the parameters are exactly those of the plain sum."""
        silent = (self.weight_base, self.weight_lora, self.weight_cross, self.bias)
        return not any(bool(p.any()) for p in silent) and bool((self.weight_out == 2).all())

    def terms(self, dtype: torch.dtype, device: torch.device) -> GateTerms | None:
        """Return the rearranged gate in ``dtype`` on ``device``; None stands for the plain sum.

        While the gate trains, the terms carry gradients and are made anew at each call; otherwise
        they are cached until a parameter changes.
        """
        if self.trains:
            return self.make_terms(dtype, device)
        tensors = self.tensors()
        key = (dtype, device, *tensor_versions(tensors))
        cached = self._cached_terms
        if cached is None or cached[0] != key:
            # A cache filled under inference_mode must still serve a later training step.
            with torch.inference_mode(False), torch.no_grad():
                terms = None if self.is_neutral() else self.make_terms(dtype, device)
            cached = self._cached_terms = (key, terms, held(tensors))
        return cached[1]

    def make_terms(self, dtype: torch.dtype, device: torch.device) -> GateTerms:
        """Rearrange the gate anew; differentiable, and also for a gate that is the plain sum."""
        scale_b, shift_b = self.norm_base.weight, self.norm_base.bias
        scale_l, shift_l = self.norm_lora.weight, self.norm_lora.bias
        base = self.weight_base + shift_l * self.weight_cross

        def cast(vector: Tensor) -> Tensor:
            return vector.to(device=device, dtype=dtype)

        return GateTerms(
            base_weight=cast(scale_b * base),
            base_bias=cast(shift_b * base + shift_l * self.weight_lora + self.bias),
            coef_weight=cast(scale_b * scale_l * self.weight_cross),
            coef_bias=cast(scale_l * (self.weight_lora + shift_b * self.weight_cross)),
            out=cast(self.weight_out),
            eps_base=self.norm_base.eps,
            eps_lora=self.norm_lora.eps,
        )

    def tensors(self) -> list[Tensor]:
        """Return the nine parameters; past nn.Module's look-ups, which are slow."""
        modules = self._modules
        norms = (modules["norm_base"]._parameters, modules["norm_lora"]._parameters)  # type: ignore[union-attr]
        return [*self._parameters.values(), *norms[0].values(), *norms[1].values()]  # type: ignore[list-item]


Stamps = tuple[tuple[int, int], ...]


def tensor_versions(tensors: Iterable[Tensor]) -> Stamps:
    """Return stamps that change when a tensor is replaced, moved, or written in place."""
    try:  # the usual case, written for speed
        return tuple([(tensor.data_ptr(), tensor._version) for tensor in tensors])
    except RuntimeError:  # inference tensors do not count their versions
        return tuple([(t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors])


def held(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return aliases that keep the tensors' memory, so that no other comes to lie at its address.

    Without them a stamp of `tensor_versions` could fit a tensor that was put in the place of
    another whose memory was handed out again.
    """
    return [tensor.detach() for tensor in tensors]


def _check_tensors(state_dict: Mapping[str, Tensor]) -> None:
    missing = [name for name in PARAMETER_NAMES if name not in state_dict]
    unknown = [name for name in state_dict if name not in PARAMETER_NAMES]
    if missing or unknown:
        raise FusionError(
            f"a gate needs the tensors {', '.join(PARAMETER_NAMES)}; "
            f"missing: {', '.join(missing) or 'none'}; unknown: {', '.join(unknown[:5]) or 'none'}"
        )
    shape = state_dict["bias"].shape
    for name, tensor in state_dict.items():
        if tensor.dim() != 1 or tensor.shape != shape or tensor.numel() == 0:
            raise FusionError(
                f"gate tensor {name} has shape {list(tensor.shape)} where bias has {list(shape)}; "
                "all nine must be vectors over the layer's output channels"
            )
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor.float()).all()):
            raise FusionError(f"gate tensor {name} must hold finite floating-point numbers")


_PREFIX = "model_dict."
_DOT = "___"


class GateBank(nn.Module):
    """A mapping from canonical layer name to `Gate`.

    Its state dict has the names of the published gates (``LoRAFusion-preview-FLUX.1-dev``):
    ``model_dict.blocks___0___attn___a_to_qkv.weight_base`` and so on, so files go both ways.

    Args:
        gates: The gates by canonical layer name.
        metadata: Strings that travel with the file, such as how the gates were trained.
    """

    def __init__(
        self, gates: Mapping[str, Gate] | None = None, metadata: Mapping[str, str] | None = None
    ) -> None:
        super().__init__()
        gates = gates or {}
        # The attribute's name is the prefix in the published file.
        self.model_dict = nn.ModuleDict({k.replace(".", _DOT): gates[k] for k in gates})
        self.metadata = dict(metadata or {})

    @classmethod
    def neutral(cls, shapes: Mapping[str, tuple[int, int]]) -> GateBank:
        """Return untrained gates for layers of the given ``(out, in)`` shapes."""
        return cls({layer: Gate.neutral(shape[0]) for layer, shape in shapes.items()})

    @property
    def layers(self) -> tuple[str, ...]:
        """Canonical names of the layers that have a gate."""
        return tuple(key.replace(_DOT, ".") for key in self.model_dict)

    def get(self, layer: str) -> Gate | None:
        """Return the gate of a layer, or None."""
        if layer not in self:
            return None
        return self[layer]

    def items(self) -> Iterator[tuple[str, Gate]]:
        """Yield each layer's name and gate."""
        for layer in self:
            yield layer, self[layer]

    def __getitem__(self, layer: str) -> Gate:
        gate = self.model_dict[layer.replace(".", _DOT)]
        assert isinstance(gate, Gate)
        return gate

    def __contains__(self, layer: object) -> bool:
        return isinstance(layer, str) and layer.replace(".", _DOT) in self.model_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.model_dict)


def load_gates(path: str | os.PathLike[str]) -> GateBank:
    """Read a gate file, ours or the published one.

    Args:
        path: A safetensors file with the nine tensors of each layer's gate, named
            ``<layer with ___ for .>.<tensor>``, with or without the prefix ``model_dict.``.

    Raises:
        FusionError: The file can't be read, or a tensor is missing, unknown, or ill-formed.
    """
    path = Path(path)
    if not path.is_file():
        raise FusionError(f"no gate file at {path}; check the path, or train one with train.gate")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise FusionError(f"{path} is not a readable safetensors file: {error}") from error
    layers = _group_by_layer(tensors, path)
    gates = {}
    for layer, state_dict in layers.items():
        try:
            gates[layer] = Gate.from_diffsynth(state_dict)
        except FusionError as error:
            raise FusionError(f"{path}, layer {layer}: {error}") from error
    return GateBank(gates, metadata)


def save_gates(
    bank: GateBank, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the gates as float32 under the published names; the file appears whole or not at all.

    Args:
        bank: The gates.
        path: The file to write or replace.
        metadata: Added to, and winning over, the bank's own.

    Raises:
        FusionError: The bank is empty, or the file can't be written.
    """
    if len(bank) == 0:
        raise FusionError("there are no gates to save")
    path = Path(path)
    tensors = {k: v.detach().float().cpu().contiguous() for k, v in bank.state_dict().items()}
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={**bank.metadata, **(metadata or {})})
    except (SafetensorError, OSError) as error:
        raise FusionError(f"can't write gates to {path}: {error}") from error


def _group_by_layer(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    layers: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in tensors.items():
        layer, _, name = key.removeprefix(_PREFIX).partition(".")
        state_dict = layers.setdefault(layer.replace(_DOT, "."), {})
        if not layer or name not in PARAMETER_NAMES or name in state_dict:
            unknown.append(key)
        state_dict[name] = tensor
    if unknown or not layers:
        some = ", ".join(unknown[:5]) or "none"
        raise FusionError(
            f"{path} is not a gate file: {len(unknown)} of its {len(tensors)} tensors are not a "
            f"gate's ({some}); expected names such as blocks___0___attn___a_to_qkv.weight_base"
        )
    return layers
