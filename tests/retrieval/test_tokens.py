import hashlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autolora.errors import RetrievalError
from autolora.lora import LoRA
from autolora.retrieval.features import (
    TokenSpec,
    delta_norm,
    fit_probes,
    random_signs,
    weight_tokens,
)

LAYERS = ("blocks.0.attn.a_to_qkv", "blocks.0.ff_b.0", "single_blocks.0.proj_out")
SPEC = TokenSpec(LAYERS, probes=5, sketch=4)


def lora(seed: int = 0, rank: int = 3, layers: tuple[str, ...] = LAYERS) -> LoRA:
    g = torch.Generator().manual_seed(seed)
    sizes = dict(zip(LAYERS, ((36, 12), (48, 12), (12, 60)), strict=True))
    return LoRA.from_factors(
        "x",
        {
            layer: (
                torch.randn(rank, sizes[layer][1], generator=g),
                torch.randn(sizes[layer][0], rank, generator=g),
            )
            for layer in layers
        },
    )


def test_tokens_equal_a_dense_float64_computation() -> None:
    adapter = lora()
    tokens = weight_tokens(adapter, SPEC)
    for position, layer in enumerate(LAYERS):
        delta = adapter.delta(layer).double()  # [out, in]
        query = random_signs(f"{SPEC.seed}/in", 5, delta.shape[1]).double()
        sketch = random_signs(f"{SPEC.seed}/out", delta.shape[0], 4).double()
        responses = query @ delta.T
        write = (responses @ sketch).flatten()
        gram = responses @ responses.T
        read = [
            gram[i, j].item() * (1.0 if i == j else math.sqrt(2))
            for i in range(5)
            for j in range(i, 5)
        ]
        read = torch.tensor(read, dtype=torch.float64)
        expected = torch.cat([write / write.norm(), read / read.norm()])
        torch.testing.assert_close(
            tokens.features[0, position].double(), expected, atol=1e-5, rtol=1e-4
        )
        assert tokens.strength[0, position].item() == pytest.approx(
            math.log(torch.linalg.matrix_norm(delta).item()), abs=1e-5
        )


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.floats(0.1, 10), st.integers(0, 3))
def test_tokens_do_not_depend_on_how_the_product_is_split(
    seed: int, scale: float, padding: int
) -> None:
    adapter = lora(seed)
    g = torch.Generator().manual_seed(seed + 1)
    factors = {}
    for layer in LAYERS:
        A, B = (t.double() for t in adapter.factors(layer))
        mix = torch.linalg.qr(torch.randn(3, 3, generator=g).double())[0] * scale
        A, B = torch.linalg.inv(mix) @ A, B @ mix
        A = torch.cat([A, torch.zeros(padding, A.shape[1]).double()])
        B = torch.cat([B, torch.randn(B.shape[0], padding, generator=g).double()], 1)
        factors[layer] = (A.float(), B.float())
    first = weight_tokens(adapter, SPEC)
    second = weight_tokens(LoRA.from_factors("x", factors), SPEC)
    torch.testing.assert_close(first.features, second.features, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(first.strength, second.strength, atol=1e-4, rtol=1e-4)


def test_strength_moves_the_strength_feature_only() -> None:
    adapter = lora()
    louder = LoRA.from_factors(
        "x", {n: (adapter.factors(n)[0], adapter.factors(n)[1] * 4) for n in LAYERS}
    )
    a, b = weight_tokens(adapter, SPEC), weight_tokens(louder, SPEC)
    torch.testing.assert_close(a.features, b.features)
    torch.testing.assert_close(b.strength - a.strength, torch.full((1, 3), math.log(4)))


def test_different_deltas_give_different_tokens() -> None:
    a, b = weight_tokens(lora(0), SPEC), weight_tokens(lora(1), SPEC)
    assert (a.features - b.features).norm() > 0.5


def test_missing_and_zero_layers_are_masked() -> None:
    some = lora(layers=LAYERS[:2])
    factors = {n: some.factors(n) for n in some.layers}
    factors[LAYERS[1]] = (factors[LAYERS[1]][0], torch.zeros_like(factors[LAYERS[1]][1]))
    tokens = weight_tokens(LoRA.from_factors("x", factors), SPEC)
    assert tokens.mask.tolist() == [[True, False, False]]
    assert not tokens.features[0, 1:].any() and not tokens.strength[0, 1:].any()


def test_random_signs_never_change() -> None:
    signs = random_signs("autolora-tokens-1/in", 2, 8)
    assert signs.dtype == torch.float32 and set(signs.unique().tolist()) <= {-1.0, 1.0}
    # Indexes on disk hold features made with these signs, so they are the plain bits of the hash.
    digest = hashlib.shake_256(b"autolora-tokens-1/in/2x8").digest(2)
    bits = [int(bit) * 2.0 - 1 for bit in f"{int.from_bytes(digest, 'big'):016b}"]
    assert signs.flatten().tolist() == bits
    assert abs(random_signs("x", 100, 100).mean().item()) < 0.05


def test_delta_norm_equals_the_dense_one() -> None:
    A, B = lora().factors(LAYERS[0])
    assert delta_norm(A, B).item() == pytest.approx(torch.linalg.matrix_norm(B @ A).item(), 1e-5)


def test_fitted_probes_span_what_the_pool_reads() -> None:
    spec = TokenSpec(LAYERS[:1], probes=4, sketch=2)
    basis = torch.linalg.qr(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))[0]
    loras = []
    for seed in range(6):
        g = torch.Generator().manual_seed(seed)
        A = torch.randn(2, 4, generator=g) @ basis.T
        loras.append(LoRA.from_factors("x", {LAYERS[0]: (A, torch.randn(36, 2, generator=g))}))
    probes = fit_probes(loras, spec)[LAYERS[0]]
    torch.testing.assert_close(probes @ probes.T, torch.eye(4), atol=1e-5, rtol=0)
    projected = probes @ basis @ basis.T
    torch.testing.assert_close(projected, probes, atol=1e-4, rtol=0)


def test_a_loud_lora_does_not_outvote_the_others() -> None:
    spec = TokenSpec(LAYERS[:1], probes=1, sketch=2)
    loras = []
    for direction, size in ((0, 1.0), (0, 1.0), (1, 1000.0)):
        A = torch.zeros(1, 12)
        A[0, direction] = size
        loras.append(LoRA.from_factors("x", {LAYERS[0]: (A, torch.ones(36, 1))}))
    probe = fit_probes(loras, spec)[LAYERS[0]][0]
    torch.testing.assert_close(probe.abs(), torch.eye(12)[0], atol=1e-5, rtol=0)


def test_probes_of_another_model_are_refused() -> None:
    probes = {LAYERS[0]: torch.eye(5, 16)}
    with pytest.raises(RetrievalError, match=r"16 inputs.*another base model"):
        weight_tokens(lora(), SPEC, probes)


def test_a_spec_without_layers_is_refused() -> None:
    with pytest.raises(RetrievalError, match="at least one layer"):
        TokenSpec(())
