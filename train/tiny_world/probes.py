"""Probes: a small classifier that names the subject and the style of a picture.

It is trained on renders and on renders passed through the autoencoder, never on generated
pictures, so that a generated picture counts only where it looks like the real drawing.
"""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from train.tiny_world.checkpoint import progress
from train.tiny_world.render import random_view, render
from train.tiny_world.styles import STYLES
from train.tiny_world.subjects import Subject
from train.tiny_world.world import Split, WorldConfig

PROBE_FILE = Path(__file__).parent / "weights" / "probes.safetensors"
PROBE_SIZE = 64  # pictures are reduced to this side
PLAIN = "plain"


class Probe(nn.Module):
    """Pictures [B, 3, 64, 64] in [-1, 1] to subject and style logits."""

    def __init__(self, subjects: list[str], styles: list[str]) -> None:
        super().__init__()
        self.subjects, self.styles = subjects, styles
        widths = (3, 32, 64, 128, 192)
        stages: list[nn.Module] = []
        for a, b in itertools.pairwise(widths):
            stages += [
                nn.Conv2d(a, b, 3, stride=2, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
                nn.Conv2d(b, b, 3, padding=1),
                nn.BatchNorm2d(b),
                nn.ReLU(),
            ]
        self.trunk = nn.Sequential(*stages)
        self.subject_head = nn.Linear(widths[-1] * 16, len(subjects))
        self.style_head = nn.Linear(widths[-1], len(styles))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, subjects] and [B, styles]; larger pictures are reduced first."""
        if pictures.shape[-1] != PROBE_SIZE:
            pictures = F.interpolate(pictures, size=(PROBE_SIZE, PROBE_SIZE), mode="area")
        features = self.trunk(pictures)
        return self.subject_head(F.dropout(features.flatten(1), 0.3, self.training)), (
            self.style_head(features.mean((2, 3)))
        )


def save_probe(probe: Probe, path: Path = PROBE_FILE, **notes: str) -> None:
    """Writes the probe with its class names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"subjects": json.dumps(probe.subjects), "styles": json.dumps(probe.styles)}
    part = path.with_suffix(".part")
    tensors = {k: v.contiguous() for k, v in probe.half().state_dict().items()}
    save_file(tensors, str(part), metadata={**names, **notes})
    os.replace(part, path)


def load_probe(path: Path = PROBE_FILE) -> Probe:
    """Reads a probe for scoring, in float32."""
    with safe_open(str(path), framework="pt") as file:
        header = file.metadata()
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    probe = Probe(json.loads(header["subjects"]), json.loads(header["styles"]))
    probe.load_state_dict(state)
    return probe.float().eval()


def _draw(
    subjects: list[Subject], per_subject: int, size: int, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Renders [N, 3, size, size] in [-1, 1]: a third plain, the rest in a random style each."""
    rng = np.random.default_rng(seed)
    pictures, names, looks = [], [], []
    for label, subject in enumerate(subjects):
        for i in range(per_subject):
            picture, alpha = render(subject, random_view(rng), size)
            look = 0 if i % 3 == 0 else 1 + int(rng.integers(len(STYLES)))
            if look:
                picture = np.clip(STYLES[look - 1].apply(picture, alpha, rng), 0, 1)
            pictures.append(picture.astype(np.float16).transpose(2, 0, 1))
            names.append(label)
            looks.append(look)
    stacked = torch.from_numpy(np.stack(pictures)) * 2 - 1
    return stacked, torch.tensor(names), torch.tensor(looks)


@torch.no_grad()
def _through(encoder: nn.Module, decoder: nn.Module, pictures: Tensor) -> Tensor:
    """The pictures after the autoencoder, with a little latent noise."""
    out = []
    for batch in pictures.split(64):
        z = encoder(batch.float())
        out.append(decoder(z + 0.1 * torch.randn_like(z)).clamp(-1, 1).half())
    return torch.cat(out)


def _reduce(pictures: Tensor) -> Tensor:
    return torch.cat(
        [F.interpolate(p.float(), size=PROBE_SIZE, mode="area").half() for p in pictures.split(256)]
    )


def _augment(x: Tensor) -> Tensor:
    """Noise, blur, brightness and small shifts, so that softness is not taken for a style."""
    n = len(x)
    x = x + 0.06 * torch.rand(n, 1, 1, 1) * torch.randn_like(x)
    gain, bias = 1 + 0.15 * torch.randn(n, 1, 1, 1), 0.08 * torch.randn(n, 3, 1, 1)
    x = x * gain + bias
    dx, dy = (int(v) for v in torch.randint(-3, 4, (2,)))
    x = torch.roll(x, (dy, dx), (2, 3))
    if torch.rand(()) < 0.3:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x.clamp(-1.2, 1.2)


@torch.no_grad()
def probe_accuracy(
    probe: Probe, pictures: Tensor, names: Tensor, looks: Tensor
) -> dict[str, float]:
    """Shares of right subjects (plain, styled) and right styles."""
    probe.eval()
    outputs = [probe(p.float()) for p in pictures.split(256)]
    subject = torch.cat([o[0] for o in outputs]).argmax(1) == names
    style = torch.cat([o[1] for o in outputs]).argmax(1) == looks
    plain = looks == 0
    return {
        "subject_plain": subject[plain].float().mean().item(),
        "subject_styled": subject[~plain].float().mean().item(),
        "style": style.float().mean().item(),
    }


def train_probes(
    split: Split,
    config: WorldConfig,
    encoder: nn.Module,
    decoder: nn.Module,
    per_subject: int = 36,
    epochs: int = 14,
) -> dict[str, float]:
    """Trains the probe on renders and writes it; returns its accuracy on other renders."""
    torch.manual_seed(0)
    subjects = split.base + split.shipped
    size = config.model.size
    pictures, names, looks = _draw(subjects, per_subject, size, seed=100)
    both = torch.cat([_reduce(pictures), _reduce(_through(encoder, decoder, pictures))])
    names, looks = names.repeat(2), looks.repeat(2)
    test = _draw(subjects, 6, size, seed=101)
    test_pictures = _reduce(_through(encoder, decoder, test[0]))
    probe = Probe([s.name for s in subjects], [PLAIN, *(s.name for s in STYLES)])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.02)
    steps = epochs * (len(both) // 128)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in progress(range(steps), "probe", total=steps):
        probe.train()
        pick = torch.randint(len(both), (128,), generator=generator)
        with torch.autocast("cpu", torch.bfloat16):
            subject, style = probe(_augment(both[pick].float()))
        loss = F.cross_entropy(subject.float(), names[pick], label_smoothing=0.05)
        loss = loss + 0.5 * F.cross_entropy(style.float(), looks[pick], label_smoothing=0.05)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.note(f"loss {loss.item():.3f}")
    scores = probe_accuracy(probe, test_pictures, test[1], test[2])
    print("probe on held-out renders:", json.dumps(scores))
    save_probe(probe, held_out=json.dumps(scores))
    return scores
