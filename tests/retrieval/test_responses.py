import pytest
import torch

from autolora.adapters import LoRA
from autolora.errors import RetrievalError
from autolora.retrieval.features import LoRAInputs
from autolora.retrieval.responses import (
    ResponseEncoder,
    fit_queries,
    half_vector,
    response_features,
)

LAYER = "blocks.0.attn.b_to_qkv"
OTHER = "blocks.1.attn.b_to_qkv"


def lora(seed: int, reads: torch.Tensor | None = None, rank: int = 3) -> LoRA:
    g = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, 16, generator=g) * 0.2, torch.randn(48, rank, generator=g)
    if reads is not None:
        A[0] += reads
    return LoRA.from_factors("x", {LAYER: (A, B)})


def test_half_vectors_have_the_dot_products_of_the_matrices() -> None:
    g = torch.Generator().manual_seed(0)
    a, b = (m + m.mT for m in torch.randn(2, 5, 5, generator=g))
    assert (half_vector(a) @ half_vector(b)).item() == pytest.approx((a * b).sum().item(), rel=1e-5)


def test_features_are_the_energy_of_the_dense_delta() -> None:
    g = torch.Generator().manual_seed(0)
    queries = {LAYER: torch.randn(6, 16, generator=g)}
    adapter = lora(0)
    feature = response_features(adapter, queries)[0].double()
    y = torch.randn(6, generator=g).double()
    x = y @ queries[LAYER].double()  # a text's activation with these coordinates
    energy = (adapter.delta(LAYER).double() @ x).square().sum()
    gram = queries[LAYER].double() @ adapter.delta(LAYER).double().T
    norm = torch.linalg.matrix_norm(gram @ gram.T)
    assert (feature @ half_vector(torch.outer(y, y))).item() == pytest.approx(
        (energy / norm).item(), rel=1e-4
    )


def test_features_do_not_depend_on_factors_or_strength() -> None:
    queries = {LAYER: torch.randn(6, 16, generator=torch.Generator().manual_seed(0))}
    A, B = lora(1).factors(LAYER)
    mix = torch.tensor([[2.0, 1, 0], [0, 1, 0], [1, 0, -1]])
    same = LoRA.from_factors("x", {LAYER: (torch.linalg.inv(mix) @ A, 5 * B @ mix)})
    torch.testing.assert_close(
        response_features(lora(1), queries),
        response_features(same, queries),
        atol=1e-5,
        rtol=1e-3,
    )


def test_a_missing_layer_is_not_a_number_and_another_model_is_refused() -> None:
    queries = {OTHER: torch.ones(2, 16), LAYER: torch.ones(2, 16)}
    features = response_features(lora(0), queries)
    assert features[0].isnan().all() and features[1].isfinite().all()
    with pytest.raises(RetrievalError, match=r"20 inputs.*has 16.*another base model"):
        response_features(lora(0), {LAYER: torch.ones(2, 20)})


def test_queries_follow_the_variance_and_end_with_the_mean() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 4.0, 1.0, 0.0])
    points = torch.randn(5000, 4, generator=g) * spread.sqrt() + torch.tensor([0.0, 0, 0, 7])
    plain = fit_queries({LAYER: points}, 2, whitening=0.0)[LAYER]
    torch.testing.assert_close(plain.abs(), torch.eye(4)[[0, 1, 3]], atol=0.05, rtol=0)
    white = fit_queries({LAYER: points}, 2, whitening=1.0)[LAYER]
    variance = ((points - points.mean(0)) @ white[:2].T).var(0)
    torch.testing.assert_close(variance, torch.ones(2), atol=0.01, rtol=0.01)
    # No more directions than the activations have.
    assert len(fit_queries({LAYER: points}, 50)[LAYER]) <= 5


def test_it_finds_loras_by_texts_that_no_lora_was_fitted_to() -> None:
    """LoRAs that read their captions' activations are found without one training pair."""
    g = torch.Generator().manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(400, 12, generator=g), dim=-1)
    mapping = torch.randn(12, 16, generator=g)
    common = torch.randn(16, generator=g)
    activations = text @ mapping + common
    own = [lora(i, 0.5 * (activations[i] - common) + 0.3 * common) for i in range(60)]
    queries = fit_queries({LAYER: activations[60:]}, 12)
    features = torch.stack([response_features(one, queries) for one in own])
    encoder = ResponseEncoder.fit(
        text[60:], [activations[60:]], list(queries.values()), features[:20]
    )
    vectors = encoder.encode_loras(LoRAInputs(responses=features[20:]))
    asked = encoder.encode_text(text[20:60])
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(40))
    torch.testing.assert_close(asked.norm(dim=1), torch.ones(40))
    found = (asked @ vectors.T).argmax(1) == torch.arange(40)
    assert found.float().mean() > 0.8


def test_a_lora_without_one_of_the_layers_is_encoded_by_the_others() -> None:
    g = torch.Generator().manual_seed(0)
    text = torch.randn(50, 6, generator=g)
    points = {name: torch.randn(50, 16, generator=g) for name in (LAYER, OTHER)}
    queries = fit_queries(points, 4)
    features = torch.stack([response_features(lora(i), queries) for i in range(3)])
    encoder = ResponseEncoder.fit(text, list(points.values()), list(queries.values()), features)
    vectors = encoder.encode_loras(LoRAInputs(responses=features)).view(3, 2, -1)
    assert vectors[:, 0].norm() > 1 and not vectors[:, 1].any()
    with pytest.raises(RetrievalError, match="needs a LoRA's responses"):
        encoder.encode_loras(LoRAInputs())
