"""What a retriever's tensors mean, as plain data in the header of its file."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from autolora.retrieval.calibration import Calibration
from autolora.retrieval.encoder import EncoderConfig, LoRAEncoder
from autolora.retrieval.portraits import PortraitSpec
from autolora.retrieval.responses import ResponseEncoder
from autolora.retrieval.ridge import RidgeEncoder
from autolora.retrieval.tokens import TokenSpec

Encoder = LoRAEncoder | RidgeEncoder | ResponseEncoder


@dataclass(frozen=True)
class RetrieverSpec:
    """Everything about a retriever that is not a tensor.

    Attributes:
        tokens: How weight tokens are made; None when no encoder uses them.
        portrait: Shape of the portraits; None when no encoder uses them.
        text_encoder: Name of the text encoder.
        weights: Weight of each encoder in the joined vector, adding up to 1.
        calibration: From similarity to probability.
        provenance: How it was trained: base model, portrait settings, data, versions, numbers.
        response_layers: Layers whose responses are looked at, in order.
        newcomers: Calibration of the last encoder by itself, where that one learned no pairs of
            LoRAs and texts: LoRAs that are none of the concepts which the others were fitted to
            are judged by it alone. None without such an encoder.
    """

    tokens: TokenSpec | None
    portrait: PortraitSpec | None
    text_encoder: str
    weights: tuple[float, ...]
    calibration: Calibration = field(default_factory=Calibration)
    provenance: dict[str, Any] = field(default_factory=dict)
    response_layers: tuple[str, ...] = ()
    newcomers: Calibration | None = None


def spec_from(config: dict[str, Any]) -> RetrieverSpec:
    """Read what `dataclasses.asdict` made of a specification.

    Raises:
        KeyError: A setting is missing.
        ValueError: A setting is unknown.
    """
    unknown = set(config) - {item.name for item in fields(RetrieverSpec)}
    if unknown:
        raise ValueError(f"unknown settings {sorted(unknown)}")
    tokens = config.pop("tokens")
    if tokens is not None:
        tokens = TokenSpec(**{**tokens, "layers": tuple(tokens["layers"])})
    portrait = config.pop("portrait")
    newcomers = config.pop("newcomers", None)  # files of earlier versions have none
    return RetrieverSpec(
        tokens=tokens,
        portrait=None if portrait is None else PortraitSpec(**portrait),
        weights=tuple(config.pop("weights")),
        response_layers=tuple(config.pop("response_layers")),
        calibration=Calibration(**config.pop("calibration")),
        newcomers=None if newcomers is None else Calibration(**newcomers),
        **config,
    )


def encoder_from(entry: dict[str, Any], tokens: TokenSpec | None) -> Encoder:
    """Make an encoder whose tensors are still to be loaded.

    Args:
        entry: Its ``kind`` and ``config``.
        tokens: How weight tokens are made; None when no encoder uses them.

    Raises:
        ValueError: The kind is unknown.
    """
    if entry["kind"] == LoRAEncoder.kind:
        return LoRAEncoder(EncoderConfig(**entry["config"]))
    if entry["kind"] == RidgeEncoder.kind:
        # Portrait-only encoders never look at the token spec.
        return RidgeEncoder.from_config(entry["config"], tokens or TokenSpec(("none",)))
    if entry["kind"] == ResponseEncoder.kind:
        return ResponseEncoder(**entry["config"])
    raise ValueError(f"unknown kind of encoder {entry['kind']!r}")
