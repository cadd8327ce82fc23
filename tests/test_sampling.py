"""The sampler against Hugging Face's logits processors, and against the distribution it claims to draw from."""

import numpy as np
import pytest
import torch
from alula.sampling import RepetitionPenalty, Sampler, greedy, kept_tokens, shift


def random_logits(size: int, scale: float, seed: int) -> np.ndarray:
    return (torch.randn(size, generator=torch.Generator().manual_seed(seed)) * scale).numpy()


def warp(logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float) -> np.ndarray:
    """Hugging Face's processors in Hugging Face's order; filtered logits are -inf."""
    process = pytest.importorskip("transformers.generation.logits_process")
    scores = torch.from_numpy(logits.copy())[None]
    if temperature != 1.0:
        scores = process.TemperatureLogitsWarper(temperature)(None, scores)
    if top_k:
        scores = process.TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1.0:
        scores = process.TopPLogitsWarper(top_p)(None, scores)
    if min_p:
        scores = process.MinPLogitsWarper(min_p)(None, scores)
    return scores[0].numpy()


@pytest.mark.parametrize("top_k", [0, 1, 5, 50, 5000])
@pytest.mark.parametrize("top_p", [1.0, 0.99, 0.9, 0.5, 0.01])
@pytest.mark.parametrize("min_p", [0.0, 0.05, 0.5, 1.0])
def test_kept_tokens_equal_hugging_face(top_k, top_p, min_p):
    for seed, (size, scale, temperature) in enumerate(
        [(2, 1.0, 1.0), (7, 0.01, 0.7), (100, 3.0, 0.3), (3001, 1.0, 2.0), (3001, 10.0, 0.8), (5000, 0.01, 1.0)]
    ):
        logits = random_logits(size, scale, seed)
        kept = kept_tokens(shift(logits, temperature), top_k=top_k, top_p=top_p, min_p=min_p)
        kept = np.arange(size) if kept is None else np.sort(kept)
        expected = np.flatnonzero(np.isfinite(warp(logits, temperature, top_k, top_p, min_p)))
        # Rounding may move a cut by a token where probabilities are added up; top-k alone is exact.
        if top_p == 1.0:
            np.testing.assert_array_equal(kept, expected)
        else:
            differing = np.setxor1d(kept, expected)
            assert len(differing) <= 2, (size, scale, len(kept), len(expected))
            assert np.ptp(logits[differing]) < 1e-3 if len(differing) else True


def test_top_k_keeps_all_equals_of_the_last():
    logits = np.round(random_logits(2000, 3.0, 0))
    kept = kept_tokens(shift(logits), top_k=50)
    assert len(kept) > 50
    np.testing.assert_array_equal(np.sort(kept), np.flatnonzero(np.isfinite(warp(logits, 1.0, 50, 1.0, 0.0))))


@pytest.mark.parametrize("scale", [0.0, 0.001, 1.0, 4.0, 30.0])
@pytest.mark.parametrize("excluded", [0, 1000, 49_999])
def test_nucleus_is_the_smallest_that_reaches_top_p(scale, excluded):
    logits = random_logits(50_000, scale, 3)
    logits[:excluded] = -np.inf
    p = np.exp(shift(logits).astype(np.float64))
    p /= p.sum()
    for top_p in (0.1, 0.5, 0.95, 0.999):
        kept = kept_tokens(shift(logits), top_p=top_p)
        assert len(np.unique(kept)) == len(kept)
        assert logits[kept].min() >= np.delete(logits, kept).max()
        assert p[kept].sum() >= top_p - 1e-5
        assert p[kept].sum() - p[kept].min() <= top_p + 1e-5


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.9, "min_p": 0.02}]
)
def test_draws_follow_the_distribution(filters):
    """Pearson's chi-squared against the renormalized probabilities, with a bound that a fair sampler passes easily."""
    logits = random_logits(700, 2.0, 5)
    temperature, draws = 0.7, 8_000
    sampler = Sampler(11, temperature=temperature, **filters)
    counts = np.bincount([sampler.draw(logits) for _ in range(draws)], minlength=len(logits))
    scores = warp(logits, temperature, **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters)).astype(np.float64)
    p = np.exp(scores - scores.max())
    p /= p.sum()
    assert counts[p == 0].sum() == 0
    common = p * draws >= 5
    expected = np.append(p[common], p[~common].sum()) * draws
    seen = np.append(counts[common], counts[~common].sum())
    chi_squared = ((seen - expected)[expected > 0] ** 2 / expected[expected > 0]).sum()
    freedom = len(expected) - 1
    assert chi_squared < freedom + 5 * np.sqrt(2 * freedom) + 5


def test_a_draw_inverts_the_cumulative_distribution():
    """Each uniform number lands on the token whose interval holds it, in blocks too and for weights of zero."""
    logits = random_logits(1000, 2.0, 9)
    logits[:300] = -np.inf
    logits[700:] = -np.inf
    sampler, random = Sampler(4), np.random.default_rng(4)
    cumulative = np.cumsum(np.exp(shift(logits)).astype(np.float64))
    for _ in range(500):
        token = sampler.draw(logits)
        target = random.random() * cumulative[-1]
        low = cumulative[token - 1] if token else 0.0
        assert low - 1e-4 <= target <= cumulative[token] + 1e-4
        assert 300 <= token < 700


def test_equal_seeds_repeat_and_others_differ():
    logits = random_logits(500, 1.0, 2)
    draws = [[Sampler(seed).draw(logits)] for seed in (3, 3, 4)]
    streams = [[s.draw(logits) for _ in range(20)] for s in (Sampler(3), Sampler(3), Sampler(4))]
    assert draws[0] == draws[1]
    assert streams[0] == streams[1] != streams[2]


def test_extreme_temperatures():
    logits = random_logits(300, 5.0, 6)
    assert {Sampler(s, temperature=1e-300).draw(logits) for s in range(20)} == {int(logits.argmax())}
    assert {Sampler(s, temperature=0.0).draw(logits) for s in range(20)} == {int(logits.argmax())}
    assert len({Sampler(s, temperature=1e30).draw(logits) for s in range(100)}) > 60


@pytest.mark.parametrize("top_p", [1e-9, 1e-17, 1e-300])
@pytest.mark.parametrize("top_k", [0, 5])
def test_a_token_is_kept_however_small_top_p_is(top_p, top_k):
    logits = np.random.default_rng(0).normal(size=3000).astype(np.float32)
    assert Sampler(0, top_p=top_p, top_k=top_k).draw(logits) == logits.argmax()
    flat = np.zeros(3000, dtype=np.float32)
    assert len(kept_tokens(flat, top_p=top_p, top_k=top_k)) == 1


def test_greedy_takes_the_first_of_equals():
    logits = np.array([0.0, 3.0, 1.0, 3.0], dtype=np.float32)
    assert greedy(logits) == 1 == int(torch.from_numpy(logits).argmax())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_logits_that_are_no_numbers_are_refused(bad):
    logits = random_logits(100, 1.0, 1)
    logits[50] = bad
    for choose in (greedy, Sampler(0).draw, Sampler(0, top_k=3).draw, Sampler(0, temperature=0).draw):
        with pytest.raises(ValueError, match="largest logit is"):
            choose(logits)
    with pytest.raises(ValueError, match="only -inf"):
        greedy(np.full(5, -np.inf, dtype=np.float32))


@pytest.mark.parametrize("penalty", [1.3, 0.5])
def test_repetition_penalty_equals_hugging_face(penalty):
    process = pytest.importorskip("transformers.generation.logits_process")
    logits = random_logits(200, 3.0, 8)
    ids = [5, 9, 9, 150, 3]
    ours = RepetitionPenalty(penalty, 200, np.array(ids[:3]))
    for token in ids[3:]:
        ours.add(token)
    theirs = process.RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([ids]), torch.from_numpy(logits)[None])
    np.testing.assert_array_equal(ours.apply(logits), theirs[0].numpy())
