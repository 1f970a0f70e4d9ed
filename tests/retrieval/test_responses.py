import pytest
import torch

from autolora.errors import RetrievalError
from autolora.lora import LoRA
from autolora.retrieval.encoders import (
    ResponseEncoder,
    fit_queries,
    half_vector,
    read_factors,
    stack_reads,
)
from autolora.retrieval.features import LoRAInputs

LAYER = "blocks.0.attn.b_to_qkv"
OTHER = "blocks.1.attn.b_to_qkv"


def lora(seed: int, reads: torch.Tensor | None = None, rank: int = 3, layer: str = LAYER) -> LoRA:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 16, generator=g) * 0.2, torch.randn(48, rank, generator=g)
    if reads is not None:
        A[0] += reads
    return LoRA.from_factors("x", {layer: (A, B)})


def test_half_vectors_have_the_dot_products_of_the_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (m + m.mT for m in torch.randn(2, 5, 5, generator=g))
    assert (half_vector(a) @ half_vector(b)).item() == pytest.approx((a * b).sum().item(), rel=1e-5)


def test_read_factors_are_the_normalized_square_of_the_dense_delta() -> None:
    adapter = lora(0)
    factor = read_factors(adapter, [LAYER])[0].double()
    delta = adapter.delta(LAYER).double()
    square = delta.T @ delta
    expected = square / torch.linalg.matrix_norm(square)
    torch.testing.assert_close(factor.T @ factor, expected, atol=1e-5, rtol=1e-4)


def test_read_factors_do_not_depend_on_factors_or_strength() -> None:
    A, B = lora(1).factors(LAYER)
    mix = torch.tensor([[2.0, 1, 0], [0, 1, 0], [1, 0, -1]])
    same = LoRA.from_factors("x", {LAYER: (torch.linalg.inv(mix) @ A, 5 * B @ mix)})
    a, b = read_factors(lora(1), [LAYER])[0], read_factors(same, [LAYER])[0]
    torch.testing.assert_close(a.T @ a, b.T @ b, atol=1e-5, rtol=1e-3)


def test_missing_layers_and_different_ranks_are_zero_padded() -> None:
    missing = read_factors(lora(0), [OTHER, LAYER])
    assert not missing[0].any() and missing[1].any()
    assert read_factors(lora(0), [OTHER]).shape == (1, 0, 0)
    joined = stack_reads([missing, read_factors(lora(0, rank=5), [OTHER, LAYER])])
    assert joined.shape == (2, 2, 5, 16)
    torch.testing.assert_close(joined[0, :, :3], missing)


def test_queries_follow_the_variance_and_end_with_the_mean() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 4.0, 1.0, 0.0])
    points = torch.randn(5000, 4, generator=g) * spread.sqrt() + torch.tensor([0.0, 0, 0, 7])
    plain = fit_queries(points, 2, whitening=0.0)
    torch.testing.assert_close(plain.abs(), torch.eye(4)[[0, 1, 3]], atol=0.05, rtol=0)
    white = fit_queries(points, 2, whitening=1.0)
    variance = ((points - points.mean(0)) @ white[:2].T).var(0)
    torch.testing.assert_close(variance, torch.ones(2), atol=0.01, rtol=0.01)
    # No more directions than the activations have.
    assert len(fit_queries(points, 50)) <= 5


def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Texts, their activations, and LoRAs that read the activations of the first sixty."""
    g = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(400, 12, generator=g), dim=-1)
    mapping, common = torch.randn(12, 16, generator=g), torch.randn(16, generator=g)
    activations = text @ mapping + common
    own = [lora(i, 0.5 * (activations[i] - common) + 0.3 * common) for i in range(60)]
    return text, activations, stack_reads([read_factors(one, [LAYER]) for one in own])


def test_scores_are_the_energy_of_the_response() -> None:
    """Without centring, the dot product is ``|B A x|^2`` of the predicted activation."""
    text, activations, reads = world()
    encoder = ResponseEncoder.fit(text[60:], [activations[60:]], reads, 12)
    encoder.lora_centre.zero_()
    encoder.text_centre.zero_()
    y = (text[:5] - encoder.text_mean) @ encoder.text_matrix[0] + encoder.text_bias[0]
    # y are coordinates along the queries: the activation is their combination.
    x = (y @ encoder.queries[0]).detach().double()
    energy = torch.stack([(reads[i, 0].double() @ x.T).square().sum(0) for i in range(3)], 1)
    scores = encoder.encode_text(text[:5]) @ encoder.encode_loras(LoRAInputs(reads=reads[:3])).T
    ratio = scores.detach().double() / energy
    # Both vectors are of unit norm, so the ratio is a factor of the text times one of the LoRA.
    torch.testing.assert_close(
        ratio / ratio[:, :1], (ratio / ratio[:, :1])[:1].expand(5, -1), atol=1e-4, rtol=1e-3
    )


def test_every_text_has_a_share_of_the_mean() -> None:
    """Its cross terms carry the signs of the other coordinates: half of their usual size."""
    text, activations, reads = world()
    encoder = ResponseEncoder.fit(text, [activations], reads, 12)
    usual = ((text - encoder.text_mean) @ encoder.text_matrix[0, :, :-1]).norm(dim=1).mean()
    expected = torch.zeros(encoder.directions)
    expected[-1] = 0.5 * usual.detach()
    torch.testing.assert_close(encoder.text_bias[0].detach(), expected, atol=1e-4, rtol=1e-3)


def test_it_finds_loras_by_texts_that_no_lora_was_fitted_to() -> None:
    """LoRAs that read their captions' activations are found without one training pair."""
    text, activations, reads = world()
    encoder = ResponseEncoder.fit(text[60:], [activations[60:]], reads[:20], 12)
    vectors = encoder.encode_loras(LoRAInputs(reads=reads[20:]))
    asked = encoder.encode_text(text[20:60])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(asked.norm(dim=1), torch.ones(40))
    found = (asked @ vectors.T).argmax(1) == torch.arange(40)
    assert found.float().mean() > 0.8


def test_a_lora_without_one_of_the_layers_is_encoded_by_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    text = torch.randn(50, 6, generator=g)
    points = [torch.randn(50, 16, generator=g) for _ in range(2)]
    reads = stack_reads([read_factors(lora(i), [LAYER, OTHER]) for i in range(3)])
    encoder = ResponseEncoder.fit(text, points, reads, 4)
    vectors = encoder.encode_loras(LoRAInputs(reads=reads)).view(3, 2, -1)
    assert vectors[:, 0].norm() > 1 and not vectors[:, 1].any()


def test_what_does_not_fit_is_refused() -> None:
    text, activations, reads = world()
    encoder = ResponseEncoder.fit(text, [activations], reads, 4)
    with pytest.raises(RetrievalError, match="needs a LoRA's text-side deltas"):
        encoder.encode_loras(LoRAInputs())
    with pytest.raises(RetrievalError, match=r"16 inputs.*have 20.*another base model"):
        encoder.encode_loras(LoRAInputs(reads=torch.ones(1, 1, 2, 20)))
