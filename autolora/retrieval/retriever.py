"""A trained retriever: one or more encoders, their probes, calibration and provenance, in a file.

The vectors of several encoders are joined with square-root weights, so that the dot product of
two joined vectors is the weighted mean of the encoders' cosines and one index serves them all. The
meaning of the file's tensors is plain data in its header.

Shape legend: n LoRAs or texts, D joined dimensions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from autolora.errors import RetrievalError, shown
from autolora.files import replacing
from autolora.retrieval.calibration import Calibration, explain_away, standard_scores
from autolora.retrieval.encoders import (
    EncoderConfig,
    LoRAEncoder,
    ResponseEncoder,
    RidgeEncoder,
    read_factors,
)
from autolora.retrieval.features import (
    LoRAInputs,
    PortraitSpec,
    TokenSpec,
    portrait_tokens,
    weight_tokens,
)
from autolora.safetensors_io import file_sha256

if TYPE_CHECKING:
    from autolora.lora.lora import LoRA

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


FORMAT = "autolora-retriever-1"
_HALF_FROM = 1 << 15
BANKS = ("background", "references", "concepts", "newcomer_background", "newcomer_references")
"""Optional tensors of a retriever; files of earlier versions lack some."""


class Retriever(nn.Module):
    """Encodes LoRAs and texts to comparable unit vectors.

    Args:
        spec: What the tensors mean.
        encoders: One or more trained encoders.
        probes: Fitted queries ``[P, in]`` of weight tokens by layer.
        background: Text vectors ``[b, D]`` that the calibration compares with.
        references: LoRA vectors ``[m, D]`` that the calibration compares with.
        concepts: The text encoder's vectors ``[c, text dimensions]`` of the names of the concepts
            that the encoders were fitted to.
        newcomer_background: As `background`, for the encoder of newcomers.
        newcomer_references: As `references`, for the encoder of newcomers.
    """

    background: Tensor
    references: Tensor
    concepts: Tensor
    newcomer_background: Tensor
    newcomer_references: Tensor

    def __init__(
        self,
        spec: RetrieverSpec,
        encoders: Sequence[Encoder],
        probes: dict[str, Tensor] | None = None,
        background: Tensor | None = None,
        references: Tensor | None = None,
        concepts: Tensor | None = None,
        newcomer_background: Tensor | None = None,
        newcomer_references: Tensor | None = None,
    ) -> None:
        super().__init__()
        if not encoders or len(encoders) != len(spec.weights):
            raise RetrievalError("A retriever needs at least one encoder and a weight for each.")
        if spec.newcomers is not None and len(encoders) < 2:
            raise RetrievalError("An encoder of newcomers needs another beside it.")
        self.spec = spec
        self.encoders = nn.ModuleList(encoders)
        self.probes = dict(probes or {})
        self.path: Path | None = None
        banks = (background, references, concepts, newcomer_background, newcomer_references)
        for name, rows in zip(BANKS, banks, strict=True):
            self.register_buffer(name, torch.zeros(0, 0) if rows is None else rows)
        self.eval().requires_grad_(False)

    @property
    def members(self) -> list[Encoder]:
        """The encoders."""
        return list(self.encoders)  # type: ignore[arg-type]

    @property
    def dim(self) -> int:
        """Length D of the joined vectors."""
        return sum(member.dim for member in self.members)

    @property
    def needs_weights(self) -> bool:
        """Whether some encoder looks at a LoRA's weights."""
        return any(member.uses_weights or member.uses_responses for member in self.members)

    @property
    def needs_portraits(self) -> bool:
        """Whether some encoder uses portraits."""
        return any(member.uses_portraits for member in self.members)

    @property
    def calibration(self) -> Calibration:
        """From similarity to probability."""
        return self.spec.calibration

    @property
    def calibrated(self) -> bool:
        """Whether there is anything to compare similarities with."""
        return len(self.background) > 1 and len(self.references) > 1

    @torch.no_grad()
    def log_odds(self, queries: Tensor, loras: Tensor) -> Tensor:
        """Logarithm of the odds that LoRAs are what texts ask for; needs `calibrated`.

        Args:
            queries: ``[q, D]`` as `encode_text` gives them.
            loras: ``[n, D]`` as `encode_inputs` gives them.

        Returns:
            ``[q, n]`` in nats, before anything is explained away.
        """
        queries, loras = (self._of_members(rows) for rows in (queries, loras))
        scores = standard_scores(queries, loras, self.background, self.references)
        return self.calibration.log_odds(scores)

    @torch.no_grad()
    def judge(self, queries: Tensor, loras: Tensor, known: Tensor) -> Tensor:
        """Logarithm of the odds as the search takes it; needs `calibrated`.

        LoRAs of concepts that the encoders were fitted to claim little else (`explain_away`).
        Where there is an encoder that learned no pairs, it alone speaks for all other LoRAs; its
        threshold is moved to that of the others.

        Args:
            queries: ``[q, D]`` as `encode_text` gives them.
            loras: ``[n, D]`` as `encode_inputs` gives them.
            known: ``[n]`` as `known_log_odds` gives it for these LoRAs.

        Returns:
            ``[q, n]`` in nats.
        """
        claimed = explain_away(self.log_odds(queries, loras), known)
        if self.spec.newcomers is None:
            return claimed
        split = self._known_dim
        least = _logit(self.calibration.threshold)
        new = torch.nonzero((known < least) & loras[:, split:].any(1))[:, 0]
        scores = standard_scores(
            functional.normalize(queries[:, split:], dim=1),
            functional.normalize(loras[new, split:], dim=1),
            self.newcomer_background,
            self.newcomer_references,
        )
        of_newcomers = self.spec.newcomers.log_odds(scores)
        claimed[:, new] = of_newcomers + least - _logit(self.spec.newcomers.threshold)
        return claimed

    @property
    def _known_dim(self) -> int:
        """Length of the part of the vectors that comes of encoders which learned pairs."""
        return self.dim if self.spec.newcomers is None else self.dim - self.members[-1].dim

    def _of_members(self, rows: Tensor) -> Tensor:
        """The part of joined vectors that comes of encoders which learned pairs, unit vectors."""
        if self.spec.newcomers is None:
            return rows
        return functional.normalize(rows[:, : self._known_dim], dim=1)

    @torch.no_grad()
    def known_log_odds(self, loras: Tensor) -> Tensor:
        """How sure each LoRA is to be one of the concepts that the encoders were fitted to.

        Args:
            loras: ``[n, D]`` as `encode_inputs` gives them.

        Returns:
            Highest log-odds ``[n]``; minus infinity where the retriever does not name its concepts.
        """
        if not len(self.concepts):
            return torch.full((len(loras),), -torch.inf)
        return self.log_odds(self._concept_queries, loras).amax(0)

    @cached_property
    def _concept_queries(self) -> Tensor:
        return self.encode_text(self.concepts)

    @cached_property
    def sha256(self) -> str:
        """Hash of its file; empty for one that was not loaded from a file."""
        return "" if self.path is None else file_sha256(self.path)

    def inputs(self, lora: LoRA | None = None, portrait: Tensor | None = None) -> LoRAInputs:
        """Make one LoRA's tokens.

        Args:
            lora: The adapter; needed only where weight tokens are used.
            portrait: ``[S, K, C, h, w]``; needed only where portraits are used.

        Returns:
            Inputs of one LoRA.

        Raises:
            RetrievalError: They do not fit what the retriever was trained on.
        """
        found = LoRAInputs()
        if lora is not None and self.spec.response_layers:
            reads = read_factors(lora, self.spec.response_layers)[None]
            found.reads = reads if bool(reads.any()) else None
        if lora is not None and self.spec.tokens is not None:
            found.weights = weight_tokens(lora, self.spec.tokens, self.probes)
            if not bool(found.weights.mask.any()):
                found.weights = None
        if portrait is not None and self.needs_portraits and self.spec.portrait is not None:
            found.portraits = portrait_tokens(portrait, self.spec.portrait)
        return found

    @torch.no_grad()
    def encode(self, lora: LoRA | None = None, portrait: Tensor | None = None) -> Tensor | None:
        """Encode one LoRA.

        Args:
            lora: The adapter.
            portrait: ``[S, K, C, h, w]``.

        Returns:
            Unit vector ``[D]``; None where no encoder can say anything about it, such as a LoRA
            that changes none of the layers that are looked at.

        Raises:
            RetrievalError: It does not fit what the retriever was trained on.
        """
        inputs = self.inputs(lora, portrait)
        if not any(_can_encode(member, inputs) for member in self.members):
            return None
        return self.encode_inputs(inputs)[0]

    @torch.no_grad()
    def encode_inputs(self, inputs: LoRAInputs) -> Tensor:
        """Encode LoRAs from their tokens.

        Args:
            inputs: n LoRAs.

        Returns:
            Unit vectors ``[n, D]``; the parts of encoders whose inputs are absent are zero.

        Raises:
            RetrievalError: No encoder has what it needs.
        """
        parts: list[Tensor] = []
        used = 0.0
        count = len(inputs)
        for member, weight in zip(self.members, self.spec.weights, strict=True):
            if _can_encode(member, inputs):
                parts.append(member.encode_loras(inputs) * weight**0.5)
                used += weight
            else:
                parts.append(torch.zeros(count, member.dim))
        if used <= 0:
            raise RetrievalError(
                "The retriever's encoders have none of the inputs that they need; check that it "
                "and the LoRAs are for the same base model."
            )
        return torch.cat(parts, 1) / used**0.5

    @torch.no_grad()
    def encode_text(self, text: Tensor) -> Tensor:
        """Map vectors of the text encoder to the joined space.

        Args:
            text: ``[n, text dimensions]``.

        Returns:
            Unit vectors ``[n, D]``.
        """
        pairs = zip(self.members, self.spec.weights, strict=True)
        return torch.cat([member.encode_text(text) * weight**0.5 for member, weight in pairs], 1)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to one safetensors file, atomically.

        Large matrices are stored in half precision, which does not change a ranking.

        Args:
            path: The file.
        """
        target = Path(path)
        tensors = dict(self.state_dict())
        tensors |= {f"probes.{layer}": probe for layer, probe in self.probes.items()}
        tensors = {name: _stored(value) for name, value in tensors.items()}
        with replacing(target) as temporary:
            # One entry only: the library writes several in random order, and the file's hash is
            # what an index is checked against.
            save_file(tensors, temporary, metadata={FORMAT: self._describe()})
        self.path = target
        self.__dict__.pop("sha256", None)

    def _describe(self) -> str:
        spec = asdict(self.spec)
        spec["members"] = [{"kind": m.kind, "config": m.config} for m in self.members]
        return json.dumps(spec, sort_keys=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Retriever:
        """Read a retriever.

        Args:
            path: A file that `save` wrote.

        Returns:
            The retriever.

        Raises:
            RetrievalError: The file is missing, damaged, or of another kind.
        """
        file = Path(path)
        try:
            with safe_open(file, framework="pt") as reader:
                header = reader.metadata() or {}
                if FORMAT not in header:
                    raise RetrievalError(
                        f"{shown(file)} is not a retriever of this version ({FORMAT}); train it "
                        "again with python -m train.retriever."
                    )
                tensors = {key: reader.get_tensor(key).float() for key in reader.keys()}  # noqa: SIM118
            retriever = _rebuild(json.loads(header[FORMAT]), tensors)
        except FileNotFoundError as error:
            raise RetrievalError(
                f"There is no retriever at {shown(file)}; train one with python -m train.retriever."
            ) from error
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = shown(str(error).splitlines()[0] if str(error) else type(error).__name__)
            raise RetrievalError(
                f"The retriever {shown(file)} is damaged ({reason}); get it or train it again."
            ) from error
        retriever.path = file
        return retriever


def _logit(probability: float) -> float:
    return math.log(probability / (1 - probability))


def _stored(tensor: Tensor) -> Tensor:
    large = tensor.numel() > _HALF_FROM
    return tensor.detach().cpu().to(torch.float16 if large else torch.float32).contiguous()


def _can_encode(member: Encoder, inputs: LoRAInputs) -> bool:
    if member.uses_responses:
        return inputs.reads is not None
    weights = member.uses_weights and inputs.weights is not None
    portraits = member.uses_portraits and inputs.portraits is not None
    if isinstance(member, LoRAEncoder):
        return weights or portraits
    return weights == member.uses_weights and portraits == member.uses_portraits


def _rebuild(config: dict[str, Any], tensors: dict[str, Tensor]) -> Retriever:
    kinds = config.pop("members")
    spec = spec_from(config)
    encoders = [encoder_from(entry, spec.tokens) for entry in kinds]
    probes = _take(tensors, "probes.")
    banks = {name: tensors.setdefault(name, torch.zeros(0, 0)) for name in BANKS}
    retriever = Retriever(spec, encoders, probes, **banks)
    retriever.load_state_dict(tensors, strict=True)
    return retriever


def _take(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    keys = [key for key in tensors if key.startswith(prefix)]
    return {key.removeprefix(prefix): tensors.pop(key) for key in keys}
