import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from autolora.errors import RetrievalError
from autolora.lora import LoRA
from autolora.retrieval.encoders import (
    EncoderConfig,
    LoRAEncoder,
    RidgeEncoder,
    TextHead,
    TextWhitening,
)
from autolora.retrieval.features import (
    FlatSpec,
    LoRAInputs,
    PortraitSpec,
    TokenSpec,
    WeightTokens,
    portrait_tokens,
)
from tests.retrieval.synthetic import LAYERS, WordVectors, concept_lora, concept_names
from train.retrieval.baseline import PaperEncoder, paper_loss, project_text, stack_factors

SPEC = TokenSpec(tuple(LAYERS), probes=4, sketch=4)
PORTRAIT = PortraitSpec(settings=2, channels=3, grid=4)


def inputs(count: int = 5, seed: int = 0) -> LoRAInputs:
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(count, len(LAYERS), SPEC.size, generator=g)
    tokens = WeightTokens(
        F.normalize(features, dim=-1),
        torch.randn(count, len(LAYERS), generator=g),
        torch.ones(count, len(LAYERS), dtype=torch.bool),
    )
    portraits = torch.randn(count, 2, 6, 3, 8, 8, generator=g)
    return LoRAInputs(tokens, portrait_tokens(portraits, PORTRAIT))


def encoder(**parts: bool) -> LoRAEncoder:
    torch.manual_seed(0)
    sample = inputs().only(**{"weights": True, "portraits": True, **parts})
    return LoRAEncoder.for_inputs(sample, PORTRAIT, 24, dim=16, width=32).eval()


@pytest.mark.parametrize("weights", [True, False])
@pytest.mark.parametrize("portraits", [True, False])
def test_either_part_may_be_absent(weights: bool, portraits: bool) -> None:
    given = inputs().only(weights=weights, portraits=portraits)
    if not (weights or portraits):
        with pytest.raises(RetrievalError, match="neither weight tokens nor a portrait"):
            encoder()(given)
        return
    vectors = encoder()(given)
    assert vectors.shape == (5, 16)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(5))


def test_masked_layers_have_no_influence() -> None:
    model, given = encoder(), inputs()
    assert given.weights is not None
    given.weights.mask[:, 1] = False
    before = model(given)
    given.weights.features[:, 1] = 1e3
    given.weights.strength[:, 1] = -50.0
    torch.testing.assert_close(model(given), before)
    given.weights.mask[:, 1] = True
    assert (model(given) - before).norm() > 1e-2


def test_the_profile_of_strengths_is_told_apart_from_their_level() -> None:
    """An alpha that is twice as large raises the level and leaves the profile over layers."""
    model, given = encoder(portraits=False), inputs().weights
    assert given is not None
    given.mask[:, 1] = False
    louder = WeightTokens(given.features, given.strength + math.log(2), given.mask)
    with torch.no_grad():
        model.strength_in.weight[:, 1] = 0  # deaf to the level
    torch.testing.assert_close(model._embed_weights(louder), model._embed_weights(given))
    with torch.no_grad():
        model.strength_in.weight[:, 1] = 1
    change = model._embed_weights(louder) - model._embed_weights(given)
    torch.testing.assert_close(change[:, 0], torch.full_like(change[:, 0], math.log(2)))


def test_one_lora_is_encoded_as_in_a_batch() -> None:
    model, given = encoder(), inputs()
    together = model(given)
    alone = torch.cat([model(given[i : i + 1]) for i in range(5)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_a_lora_with_no_known_layer_is_refused() -> None:
    given = inputs().only(weights=True, portraits=False)
    assert given.weights is not None
    given.weights.mask[2] = False
    with pytest.raises(RetrievalError, match="none of the layers"):
        encoder(portraits=False)(given)


def test_it_is_small_at_full_size() -> None:
    config = EncoderConfig(
        layers=304, token_size=684, settings=3, portrait_size=16 * 64, text_dim=768, dim=384
    )
    assert sum(p.numel() for p in LoRAEncoder(config).parameters()) < 3e6


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"layers": 0, "settings": 0}, "needs weight tokens or portraits"),
        ({"layers": 1, "settings": 0, "width": 30}, "multiple of its 4 heads"),
    ],
)
def test_impossible_sizes(sizes: dict[str, int], words: str) -> None:
    with pytest.raises(RetrievalError, match=words):
        EncoderConfig(token_size=4, portrait_size=4, text_dim=4, **sizes)


def test_portrait_tokens_equal_a_naive_rewrite() -> None:
    g = torch.Generator().manual_seed(0)
    raw = torch.randn(3, 2, 6, 3, 8, 8, generator=g)
    tokens = portrait_tokens(raw, PORTRAIT)
    for i in range(3):
        for s in range(2):
            mean = raw[i, s].double().mean(0)
            small = mean.view(3, 4, 2, 4, 2).mean((2, 4))
            torch.testing.assert_close(
                tokens.pictures[i, s].double(), small / small.norm(), atol=1e-6, rtol=1e-5
            )
            norms = [raw[i, s, k].double().norm().item() for k in range(6)]
            agreement = mean.norm().item() / (sum(norms) / 6)
            expected = [math.log(mean.norm().item()), agreement]
            assert tokens.scalars[i, s].tolist() == pytest.approx(expected, rel=1e-5)
    subset = portrait_tokens(raw, PORTRAIT, torch.tensor([1, 4]))
    torch.testing.assert_close(
        subset.pictures, portrait_tokens(raw[:, :, [1, 4]], PORTRAIT).pictures
    )


def test_portraits_of_other_settings_are_refused() -> None:
    with pytest.raises(RetrievalError, match=r"do not fit.*same settings"):
        portrait_tokens(torch.zeros(3, 6, 3, 8, 8), PORTRAIT)


def test_text_head_starts_at_the_closed_form() -> None:
    g = torch.Generator().manual_seed(0)
    text = torch.randn(60, 8, generator=g)
    whitening = TextWhitening.fit(text, torch.arange(60) // 3, dim=5)
    head = TextHead(8, 5).eval()
    head.start_from(whitening)
    torch.testing.assert_close(head(text), whitening(text), atol=1e-5, rtol=1e-4)


def test_whitening_ignores_what_varies_within_a_lora() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(40, 8, generator=g)
    nuisance = torch.zeros(40, 6, 8)
    nuisance[..., 0] = torch.randn(40, 6, generator=g) * 5
    text = (centres[:, None] + nuisance + torch.randn(40, 6, 8, generator=g) * 0.1).flatten(0, 1)
    owners = torch.arange(240) // 6
    head = TextWhitening.fit(text, owners, shrinkage=0.01)
    mapped = head(text).view(40, 6, 8)
    within = (mapped[:, 0] * mapped[:, 1]).sum(-1).mean()
    plain = TextWhitening.fit(text, owners, shrinkage=1.0)(text).view(40, 6, 8)
    assert within > 0.95 > (plain[:, 0] * plain[:, 1]).sum(-1).mean()


def test_fewer_dimensions_keep_what_tells_loras_apart() -> None:
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(30, 8, generator=g) * torch.tensor([3.0, 3, 0, 0, 0, 0, 0, 0])
    text = (centres[:, None] + torch.randn(30, 4, 8, generator=g) * 0.3).flatten(0, 1)
    head = TextWhitening.fit(text, torch.arange(120) // 4, dim=2)
    assert head.dim == 2
    # Only the first two directions reach the output, and neither is lost.
    reach = head.matrix.norm(dim=1)
    assert reach[:2].min() > 5 * reach[2:].max()
    assert torch.linalg.svdvals(head.matrix[:2]).min() > 1


def test_every_group_of_features_has_the_same_variance() -> None:
    """Four layers of weights do not outweigh two settings of portraits."""
    given = inputs(30)
    whitening = TextWhitening(torch.zeros(6), torch.eye(6))
    targets = torch.randn(30, 6, generator=torch.Generator().manual_seed(0))
    spec = FlatSpec(("portrait", "read"), tuple(range(len(LAYERS))))
    model = RidgeEncoder.fit(given, targets, whitening, spec, SPEC)
    assert given.portraits is not None and given.weights is not None
    read = given.weights.features[..., SPEC.write_size :].flatten(1)
    flat = torch.cat([given.portraits.pictures.flatten(1), read], 1)
    spread = ((flat - model.mean) * model.scale).square().mean(0)
    pictures = given.portraits.pictures[0].numel()
    assert spread[:pictures].sum().item() == pytest.approx(1, rel=1e-3)
    assert spread[pictures:].sum().item() == pytest.approx(1, rel=1e-3)
    blocks = spread[pictures:].view(len(LAYERS), SPEC.read_size).sum(1)
    torch.testing.assert_close(blocks, torch.full((len(LAYERS),), 1 / len(LAYERS)))


def test_ridge_equals_the_normal_equations() -> None:
    g = torch.Generator().manual_seed(0)
    given = inputs(30)
    whitening = TextWhitening(torch.zeros(6), torch.eye(6))
    targets = torch.randn(30, 6, generator=g)
    spec = FlatSpec(("portrait",))
    model = RidgeEncoder.fit(given, targets, whitening, spec, SPEC, ridge=0.5, components=1000)
    assert given.portraits is not None
    x = given.portraits.pictures.flatten(1).double()
    x = (x - x.mean(0)) * model.scale.double()
    values = torch.linalg.svdvals(x)
    penalty = 0.5 * values[values > values.max() * 1e-6].square().mean()
    gram = x @ x.T + penalty * torch.eye(30).double()
    expected = F.normalize(x @ x.T @ torch.linalg.solve(gram, targets.double()), dim=-1)
    torch.testing.assert_close(model.encode_loras(given).double(), expected, atol=1e-4, rtol=1e-3)


def test_ridge_takes_a_missing_layer_for_the_mean() -> None:
    given = inputs(12)
    assert given.weights is not None
    whitening = TextWhitening(torch.zeros(6), torch.eye(6))
    g = torch.Generator().manual_seed(0)
    spec = FlatSpec(("read", "write"), tuple(range(len(LAYERS))))
    targets = torch.randn(12, 6, generator=g)
    model = RidgeEncoder.fit(given, targets, whitening, spec, SPEC)
    given.weights.mask[0, 2] = False
    masked = model.encode_loras(given)
    read, write = given.weights.features.split([SPEC.write_size, SPEC.read_size], -1)[::-1]
    start = 2 * SPEC.read_size
    read[0, 2] = model.mean[start : start + SPEC.read_size]
    start = len(LAYERS) * SPEC.read_size + 2 * SPEC.write_size
    write[0, 2] = model.mean[start : start + SPEC.write_size]
    given.weights.mask[0, 2] = True
    torch.testing.assert_close(model.encode_loras(given), masked, atol=1e-5, rtol=1e-4)


def test_the_papers_tokens_equal_dense_products() -> None:
    names = concept_names(3)
    words = WordVectors()
    loras = [concept_lora(n, words.encode([n])[0], rank=2 + i) for i, n in enumerate(names)]
    factors = stack_factors(loras, list(LAYERS))
    torch.manual_seed(0)
    model = PaperEncoder(factors, width=32, heads=4).eval()
    seen: list[torch.Tensor] = []
    model.blocks.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    assert model(factors).shape == (3, 32)
    position = 0
    for kind, query, project in zip(model.kinds, model.queries, model.projections, strict=True):
        for j, layer in enumerate(factors.layers[kind]):
            for i, lora in enumerate(loras):
                expected = project(query[j] @ lora.delta(layer).T)
                torch.testing.assert_close(seen[0][i, position], expected, atol=1e-4, rtol=1e-3)
            position += 1


def test_the_papers_encoder_takes_what_is_not_low_rank(tmp_path: Path) -> None:
    """LoKr has no factors: its leading ones stand for it, to the error of that rank."""
    words = WordVectors()
    plain = concept_lora("plain", words.encode(["plain"])[0])
    g = torch.Generator().manual_seed(0)
    tensors = {
        "diffusion_model.single_blocks.0.linear2.lokr_w1": torch.randn(4, 4, generator=g),
        "diffusion_model.single_blocks.0.linear2.lokr_w2": torch.randn(6, 30, generator=g),
    }
    save_file(tensors, tmp_path / "lokr.safetensors")
    kron = LoRA.load(tmp_path / "lokr.safetensors")
    factors = stack_factors([plain, kron], kron.layers)
    (kind,) = factors.layers
    product = factors.up[kind][1, 0] @ factors.down[kind][1, 0]
    torch.testing.assert_close(product, kron.delta(kron.layers[0]), atol=1e-4, rtol=1e-4)


def test_layers_that_no_lora_changes_or_of_another_model_are_refused() -> None:
    words = WordVectors()
    plain = concept_lora("plain", words.encode(["plain"])[0])
    with pytest.raises(RetrievalError, match="have 0 shapes"):
        stack_factors([plain], ["blocks.7.ff_a.0"])
    layer = next(iter(LAYERS))
    other = LoRA.from_factors("other", {layer: (torch.ones(1, 5), torch.ones(7, 1))})
    with pytest.raises(RetrievalError, match="have 2 shapes"):
        stack_factors([plain, other], [layer])


def test_the_papers_attention_is_causal() -> None:
    words = WordVectors()
    loras = [concept_lora(n, words.encode([n])[0]) for n in concept_names(2)]
    factors = stack_factors(loras, list(LAYERS))
    torch.manual_seed(0)
    model = PaperEncoder(factors, width=32, heads=4).eval()
    outputs: list[torch.Tensor] = []
    model.blocks.register_forward_hook(lambda _, args, out: outputs.append(out))
    pooled = model(factors)
    # Every token is normalized before the mean, as published.
    each = torch.stack([model.norm(outputs[0][:, i]) for i in range(outputs[0].shape[1])])
    torch.testing.assert_close(pooled, each.mean(0))
    last = list(factors.layers)[-1]
    factors.up[last] = factors.up[last] * 3
    model(factors)
    torch.testing.assert_close(outputs[0][:, :-1], outputs[1][:, :-1])
    assert (outputs[0][:, -1] - outputs[1][:, -1]).abs().max() > 1e-3


def test_the_papers_loss_has_no_temperature() -> None:
    text = F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    logits = [[float(a @ b) for b in text] for a in text]
    direction = [
        -math.log(math.exp(row[i]) / sum(math.exp(v) for v in row)) for i, row in enumerate(logits)
    ]
    assert paper_loss(text, 3 * text).item() == pytest.approx(10 * sum(direction) / 4, rel=1e-5)


def test_wider_papers_encoders_keep_text_cosines() -> None:
    text = torch.randn(4, 8)
    torch.testing.assert_close(project_text(text, 12) @ project_text(text, 12).T, text @ text.T)
    with pytest.raises(ValueError, match="below the text's 8"):
        project_text(text, 4)
