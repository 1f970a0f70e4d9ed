"""Small models of all families, written in the real file layout and loaded once per run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autolora.config import PipelineConfig
from autolora.families.base import Family
from autolora.families.registry import find_family
from autolora.generate.sample import Watch, denoise_latents, prepare
from autolora.images import GivenImages
from tests.families.small import WRITERS

SIDE, STEPS, SEED = 64, 2, 5
PROMPT, NEGATIVE = "a red rocket", "blue"


@dataclass
class Asked:
    """A request, as sampling reads it."""

    negative_prompt: str = NEGATIVE
    steps: int = STEPS
    width: int = SIDE
    height: int = SIDE
    guidance: float = 3.0
    true_cfg: float = 1.0
    sigma_shift: float | None = None
    inputs: dict[str, Any] = field(default_factory=dict)

    @property
    def images(self) -> GivenImages:
        return GivenImages(inputs=self.inputs)


@dataclass
class Model:
    """A loaded family."""

    family: Family
    pipe: Any
    root: Path

    @property
    def denoiser(self) -> Any:
        return self.family.model(self.pipe)

    def latents(self, seed: int = SEED, watch: Watch | None = None, **asked: Any) -> Tensor:
        """Ours: latents after the last step, as a map."""
        conditions = prepare(self.pipe, Asked(**asked), PROMPT, seed)
        return denoise_latents(conditions, [seed], watch)[0]

    def theirs(self, seed: int = SEED, **arguments: Any) -> Tensor:
        """DiffSynth's: what its own call hands to its decoder."""
        seen: list[Tensor] = []
        pipe, step = self.pipe, self.pipe.step

        def record(*args: Any, **inputs: Any) -> Tensor:
            seen.append(step(*args, **inputs))
            return seen[-1]

        pipe.step = record
        try:
            self.call(seed, **arguments)
        finally:
            del pipe.step
        return self.family.unpack(seen[-1], {"height": SIDE, "width": SIDE})

    def call(self, seed: int = SEED, **arguments: Any) -> Any:
        """DiffSynth's own picture."""
        extra = {"embedded_guidance": 0.0} if self.family.name == "flux2" else {}
        extra |= self.family.inputs(self.pipe, [PROMPT, NEGATIVE])
        settings = {"cfg_scale": 3.0, "height": SIDE, "width": SIDE, "seed": seed}
        settings |= {"num_inference_steps": STEPS, "negative_prompt": NEGATIVE}
        return self.pipe(PROMPT, progress_bar_cmd=iter, **(settings | extra | arguments))


@pytest.fixture(scope="session")
def load_small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    @lru_cache
    def load(name: str) -> Model:
        root = WRITERS[name](tmp_path_factory.mktemp(name) / "model")
        config = PipelineConfig(name, kind=name, weights=root, storage="float32", device="cpu")
        family = find_family(name)
        return Model(family, family.load(config, torch.device("cpu")), root)

    return load


@pytest.fixture(params=sorted(WRITERS))
def small(request: pytest.FixtureRequest, load_small: Callable[[str], Model]) -> Model:
    return load_small(request.param)
