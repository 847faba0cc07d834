"""Uniform noise of categories, against matrices, against bits, and against every state of a few entries."""

import itertools
import math
import pickle

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn
from torch.distributions import kl_divergence

from pyro_diffusion import (
    MLP,
    AlphaSchedule,
    AncestralSampler,
    CategoricalLikelihood,
    CosineSchedule,
    DDIMSampler,
    DiffusionModel,
    LinearDecaySchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    compile_elbo,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
    to_arviz,
)
from pyro_diffusion.chains import Continuum, Steps
from pyro_diffusion.processes import BernoulliProcess, CategoricalProcess, Denoised
from pyro_diffusion.processes.categorical import CategoricalNoise

SCHEDULES = {
    "alpha": AlphaSchedule(torch.tensor([0.9, 0.7, 0.4], dtype=torch.float64)),
    "decay": LinearDecaySchedule(5),
    "cosine": CosineSchedule(4),
    "log-SNR": LogSNRSchedule(3),
}
NUM_ENTRIES, K = 3, 3
STATES = np.array(list(itertools.product(range(K), repeat=NUM_ENTRIES)))  # (27, 3)
LAW = np.random.default_rng(7).dirichlet(np.full(len(STATES), 0.4))  # of a datum, any
ALPHA = np.array([0.9, 0.7, 0.4, 0.2])
PATHS_LEFT = 1e-9  # of a chain that forgets its data


# Oracles in numpy, from the formulas.


def kept_or_drawn(alpha, num_categories):
    """E1: q(j | i) = α δ_ij + (1 − α)/K, row i."""
    return alpha * np.eye(num_categories) + (1 - alpha) / num_categories


def bayes(alpha, alpha_bar_before, num_categories):
    """E3: q(x_{t-1} = j | x_t = i, x_0 = k) as an array [i, k, j], from the joint law of the three."""
    from_datum = kept_or_drawn(alpha_bar_before, num_categories)  # [k, j]
    step = kept_or_drawn(alpha, num_categories)  # [j, i]
    joint = from_datum[None] * step.T[:, None]
    return joint / joint.sum(-1, keepdims=True)


def posterior_of_entries(alpha_bar):
    """P(x_{0,i} = k | x_t) of the law, for every state: [state, i, k]."""
    level = kept_or_drawn(alpha_bar, K)
    likelihood = level[STATES[:, None], STATES[None]].prod(-1)  # [datum, state]
    weights = LAW[:, None] * likelihood
    weights = weights / weights.sum(0)
    return np.einsum("ds,dik->sik", weights, np.eye(K)[STATES])


def alpha_bars(alpha=ALPHA):
    return np.concatenate([[1.0], np.cumprod(alpha)])


def exact_kernels(alpha=ALPHA):
    """p(x_{t-1} | x_t) between all states for t = 1 … T, rows x_t; entries independent given x_t."""
    bars, kernels = alpha_bars(alpha), []
    for t in range(1, len(alpha) + 1):
        of_entry = bayes(alpha[t - 1], bars[t - 1], K)[STATES]  # [state, i, k, j]
        probs = np.einsum("sik,sikj->sij", posterior_of_entries(bars[t]), of_entry)
        kernels.append(np.prod([probs[:, i][:, STATES[:, i]] for i in range(NUM_ENTRIES)], axis=0))
    return kernels


def exact_bounds_and_evidence(alpha=ALPHA):
    """E10 of every datum, term by term over all states, and log p(x_0) by the product of the kernels."""
    bars, kernels = alpha_bars(alpha), exact_kernels(alpha)
    bounds = np.zeros(len(STATES))
    for d, datum in enumerate(STATES):
        last = kept_or_drawn(bars[-1], K)[datum[None], STATES].prod(-1)
        bounds[d] -= (last * np.log(last * K**NUM_ENTRIES)).sum()
        for t in range(1, len(alpha) + 1):
            there = kept_or_drawn(bars[t], K)[datum[None], STATES].prod(-1)
            if t == 1:
                bounds[d] += (there * np.log(kernels[0][:, d])).sum()
                continue
            of_entry = bayes(alpha[t - 1], bars[t - 1], K)[STATES, datum[None]]  # [state, i, j]
            q = np.prod([of_entry[:, i][:, STATES[:, i]] for i in range(NUM_ENTRIES)], axis=0)
            bounds[d] -= (there * (q * np.log(q / kernels[t - 1])).sum(1)).sum()
    law = np.full(len(STATES), K**-NUM_ENTRIES)
    for kernel in kernels[::-1]:
        law = law @ kernel
    return bounds, np.log(law)


class Enumerated(nn.Module):
    """A network that knows LAW: log P(x_{0,i} = k | the other entries of x_t), up to a constant."""

    def forward(self, one_hot, log_snr):
        assert one_hot.shape[1:] == (NUM_ENTRIES, K)
        assert set(one_hot.unique().tolist()) <= {-1.0, 1.0}
        bar = log_snr.sigmoid()[:, None, None]
        own = bar * (one_hot == 1) + (1 - bar) / K  # q(x_{t,i} | k)
        data = nn.functional.one_hot(torch.as_tensor(STATES), K).to(own)
        weights = double(LAW) * torch.einsum("bik,dik->bdi", own, data).prod(-1)
        return torch.einsum("bd,dik->bik", weights, data).log() - own.log()


class Independent(nn.Module):
    """The log-probabilities of entries that are independent: the reverse kernel is exact."""

    def __init__(self, log_probs):
        super().__init__()
        self.log_probs = nn.Parameter(log_probs)

    def forward(self, one_hot, log_snr):
        return self.log_probs.expand(len(one_hot), *self.log_probs.shape)


def double(x):
    return torch.as_tensor(x, dtype=torch.float64)


def enumerated(schedule=None):
    schedule = AlphaSchedule(double(ALPHA)) if schedule is None else schedule
    network = Enumerated()
    network.register_parameter("dtype", nn.Parameter(double([0.0])))
    return DiffusionModel(
        NeuralCategoricalDenoiser(network, schedule, (NUM_ENTRIES,), num_categories=K)
    )


def independent(schedule, size=4, num_categories=5, dtype=torch.float64):
    log_probs = torch.randn(size, num_categories, dtype=torch.float64).log_softmax(-1)
    network = Independent(log_probs.to(dtype))
    denoiser = NeuralCategoricalDenoiser(network, schedule, (size,), num_categories=num_categories)
    return DiffusionModel(denoiser), log_probs


def learned(schedule=None, **settings):
    network = MLP((4, 3), hidden_size=16, num_blocks=1)
    schedule = LinearDecaySchedule(8) if schedule is None else schedule
    return DiffusionModel(NeuralCategoricalDenoiser(network, schedule, (4,), num_categories=3))


@torch.no_grad()
def expected_bound(diffusion, x_0, states, time, times, weights):
    """The bound of every datum, summed over all states at given times with given weights."""
    process, last, x_0 = diffusion.process, torch.tensor(time.last), x_0[:, None]
    bound = -kl_divergence(time.marginal(process, x_0, last), diffusion.prior())[:, 0]
    for t, weight in zip((time.first, *times), (1.0, *weights), strict=True):
        t = torch.tensor(t)
        share = time.marginal(process, x_0, t).log_prob(states).exp()
        p, likelihood = time.pair(diffusion, states, t)
        if t == time.first:
            terms = likelihood.log_prob(x_0)
        else:
            terms = -kl_divergence(time.posterior(process, states, x_0, t), p)
        bound = bound + weight * (share * terms).sum(1)
    return bound.numpy()


def bound_of_steps(diffusion, x_0, states):
    num = diffusion.schedule.num_timesteps
    return expected_bound(diffusion, x_0, states, Steps(num), range(2, num + 1), [1.0] * (num - 1))


def bound_of_continuum(diffusion, x_0, states, num_points=40):
    points, weights = np.polynomial.legendre.leggauss(num_points)
    return expected_bound(diffusion, x_0, states, Continuum(), (points + 1) / 2, weights / 2)


# The process.


@pytest.mark.parametrize("num_categories", [2, 3, 7])
@pytest.mark.parametrize("name", SCHEDULES)
def test_kernels_against_bayes_rule_on_matrices(name, num_categories):
    schedule = SCHEDULES[name]
    process = CategoricalProcess(schedule, torch.Size((1,)), num_categories)
    every = torch.arange(num_categories).double()
    x_0, x_t, x_prev = (x.reshape(-1, 1) for x in torch.meshgrid(*[every] * 3, indexing="ij"))
    k, i, j = (x[:, 0].long().numpy() for x in (x_0, x_t, x_prev))
    pi = torch.rand(len(x_t), 1, num_categories, dtype=torch.float64)
    pi = pi / pi.sum(-1, keepdim=True)
    denoised = Denoised(x_t, pi.log() + 3.0)  # logits need not be normalised
    for t in range(1, schedule.num_timesteps + 1):
        alpha, bar, before = (
            f(s).item()
            for f, s in (
                (schedule.alpha, t), (schedule.alpha_bar, t), (schedule.alpha_bar, t - 1)
            )
        )  # fmt: skip
        step, level = kept_or_drawn(alpha, num_categories), kept_or_drawn(bar, num_categories)
        exact = bayes(alpha, before, num_categories)
        mean = np.einsum("nk,nkj->nj", pi[:, 0].numpy(), exact[i])
        laws = {
            "transition": (process.transition(x_prev, t).log_prob(x_t), step[j, i]),
            "marginal": (process.marginal(x_0, t).log_prob(x_t), level[k, i]),
            "reverse": (process.reverse(x_t, denoised, t).log_prob(x_prev), mean[range(len(j)), j]),
        }
        if t > 1:
            laws["posterior"] = process.posterior(x_t, x_0, t).log_prob(x_prev), exact[i, k, j]
        for kernel, (log_prob, truth) in laws.items():
            np.testing.assert_allclose(
                log_prob.exp(), truth, rtol=1e-10, atol=1e-15, err_msg=kernel
            )
        for kernel in (process.transition(x_t, t), process.reverse(x_t, denoised, t)):
            total = kernel.base_dist.log_probs.exp().sum(-1)
            torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=1e-14)
    np.testing.assert_allclose(process.prior(torch.float64).log_prob(x_t).exp(), 1 / num_categories)


def test_orders_of_the_guide_agree_path_by_path():
    process = CategoricalProcess(SCHEDULES["alpha"], torch.Size((2,)), 4)
    x_0, x_1, x_2, x_3 = torch.randint(4, (4, 50, 2)).double()
    forward = sum(
        process.transition(a, t).log_prob(b)
        for t, a, b in ((1, x_0, x_1), (2, x_1, x_2), (3, x_2, x_3))
    )
    backward = process.marginal(x_0, 3).log_prob(x_3)
    backward = backward + process.posterior(x_3, x_0, 3).log_prob(x_2)
    backward = backward + process.posterior(x_2, x_0, 2).log_prob(x_1)
    torch.testing.assert_close(forward, backward, rtol=0, atol=1e-12)


def test_a_chain_that_starts_from_a_state_is_the_rest_of_the_chain():
    process = CategoricalProcess(SCHEDULES["alpha"], torch.Size((2,)), 4)
    x, y = torch.randint(4, (2, 20, 2)).double()
    tail = process.tail(1)
    assert tail.num_categories == 4
    torch.testing.assert_close(
        tail.transition(x, 1).log_prob(y), process.transition(x, 2).log_prob(y)
    )


def test_rates_are_those_of_short_steps():
    """Changes in a step, over its length, as steps become short; of both q and p."""
    curve = LogSNRSchedule(2, log_snr_max=4.0, log_snr_min=-4.0)
    num = 100_001
    fine = CategoricalProcess(curve.with_num_timesteps(num), torch.Size((1,)), 4)
    x_t, x_0 = (
        x.reshape(-1, 1) for x in torch.meshgrid(*[torch.arange(4).double()] * 2, indexing="ij")
    )
    denoised = Denoised(x_t, torch.randn(16, 1, 4, dtype=torch.float64))
    for u in (0.1, 0.5, 0.9):
        t, u = round(u * (num - 1)) + 1, torch.tensor(u, dtype=torch.float64)
        for step, rate in (
            (fine.posterior(x_t, x_0, t), fine.increment(x_t, x_0, u)),
            (fine.reverse(x_t, denoised, t), fine.reverse_increment(x_t, denoised, u)),
        ):
            change = step.base_dist.log_probs.exp() * (num - 1)
            same = fine.is_category(x_t)
            rate = rate.base_dist.rate
            assert (rate[same] == 1).all()
            torch.testing.assert_close(rate[~same], change[~same], rtol=2e-4, atol=0)


def test_two_categories_are_bits():
    """Kernels, KLs, rates and bounds, to rounding."""
    close = {"rtol": 1e-12, "atol": 1e-12}
    for schedule in (*SCHEDULES.values(), LinearDecaySchedule(2000)):
        categories = CategoricalProcess(schedule, torch.Size((3,)), 2)
        bits = BernoulliProcess(schedule, torch.Size((3,)))
        x_t, x_0, y = torch.randint(2, (3, 40, 3)).double()
        logits = 3 * torch.randn(40, 3, dtype=torch.float64)
        two = Denoised(x_t, torch.stack([torch.zeros_like(logits), logits], -1))
        one = Denoised(x_t, logits)
        torch.testing.assert_close(
            categories.prior(y.dtype).log_prob(y), bits.prior(y.dtype).log_prob(y), **close
        )
        t = torch.randint(2, schedule.num_timesteps + 1, (40,))
        pairs = [
            (
                p.transition(x_t, t), p.marginal(x_0, t), p.posterior(x_t, x_0, t), p.reverse(x_t, d, t)
            )
            for p, d in ((categories, two), (bits, one))
        ]  # fmt: skip
        for a, b in zip(*pairs, strict=True):
            torch.testing.assert_close(a.log_prob(y), b.log_prob(y), **close)
        kls = [kl_divergence(kernels[2], kernels[3]) for kernels in pairs]
        torch.testing.assert_close(*kls, **close)
        if isinstance(schedule, AlphaSchedule):
            continue  # it has one grid, and no curve
        u = torch.rand(40, dtype=torch.float64)
        pairs = [
            (p.increment(x_t, x_0, u), p.reverse_increment(x_t, d, u))
            for p, d in ((categories, two), (bits, one))
        ]
        for a, b in zip(*pairs, strict=True):
            changes = a.base_dist.rate[~categories.is_category(x_t)].reshape(x_t.shape)
            torch.testing.assert_close(changes, b.base_dist.rate, rtol=1e-12, atol=0)
        scale = (
            pairs[1][0].base_dist.rate.sum(-1).clamp(min=1)
        )  # of the numbers that cancel in a KL
        torch.testing.assert_close(*(kl_divergence(*pair) / scale for pair in pairs), **close)


class Interacting(nn.Module):
    """Logits of bits that depend on the neighbours, for one number a bit or for two."""

    def __init__(self, two):
        super().__init__()
        self.two = two
        self.weight = nn.Parameter(double(1.5))

    def forward(self, x, log_snr):
        spins = x[..., 1] if self.two else x
        logits = self.weight * spins.roll(1, -1) + 0.1 * log_snr[:, None]
        return torch.stack([torch.zeros_like(logits), logits], -1) if self.two else logits


def test_bounds_of_two_categories_are_those_of_bits():
    schedule = LogSNRSchedule(6, log_snr_max=5.0, log_snr_min=-5.0)
    categories = DiffusionModel(
        NeuralCategoricalDenoiser(Interacting(True), schedule, (3,), num_categories=2)
    )
    bits = DiffusionModel(NeuralBernoulliDenoiser(Interacting(False), schedule, (3,)))
    states = double(list(itertools.product((0, 1), repeat=3)))
    for bound in (bound_of_steps, bound_of_continuum):
        np.testing.assert_allclose(
            bound(categories, states, states), bound(bits, states, states), rtol=0, atol=1e-12
        )


# The law of a state.


def test_draws_have_the_law_and_the_dtype_of_the_chain():
    log_probs = torch.tensor([0.0, 0.001, 0.299, 0.7]).log()
    law = CategoricalNoise(log_probs)
    draws = law.sample((20_000,))
    assert draws.dtype == torch.float32
    counts = torch.stack([(draws == k).float().mean() for k in range(4)])
    error = (log_probs.exp() * (1 - log_probs.exp()) / 20_000).sqrt()
    assert ((counts - log_probs.exp()).abs() <= 5 * error).all()
    assert law.expand((3, 2)).sample((5,)).shape == (5, 3, 2)
    assert law.expand((3, 2)).log_prob(torch.zeros(2)).shape == (3, 2)
    assert law.enumerate_support().tolist() == [0, 1, 2, 3]
    assert law.log_prob(draws).isfinite().all()
    assert law.mean.isnan()
    with pytest.raises(ValueError, match="within the support"):
        law.log_prob(torch.tensor(4.0))


def test_draws_need_no_score_function_where_nothing_is_learned():
    log_probs = torch.zeros(3).log_softmax(-1)
    assert CategoricalNoise(log_probs).has_rsample
    assert not CategoricalNoise(log_probs.requires_grad_()).has_rsample


def test_kl_broadcasts_and_takes_probabilities_of_zero():
    q = torch.tensor([[0.0, 0.4, 0.6], [0.0, 0.0, 1.0]], dtype=torch.float64)
    p = torch.tensor([[[0.0, 0.5, 0.5]], [[0.2, 0.3, 0.5]]], dtype=torch.float64)
    kl = kl_divergence(CategoricalNoise(q.log()), CategoricalNoise(p.log()))
    truth = torch.special.xlogy(q, q / p).nan_to_num(0.0).sum(-1)
    assert kl.shape == (2, 2)
    torch.testing.assert_close(kl, truth)
    impossible = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64).log()
    assert kl_divergence(CategoricalNoise(q.log()), CategoricalNoise(impossible))[0] == math.inf


# The bound.


@pytest.mark.parametrize("num_categories", [2, 5])
def test_zero_variance(num_categories):
    """Independent entries: the reverse kernel is exact, and every path's log-ratio is log p(x_0)."""
    schedule = AlphaSchedule(double([0.95, 0.6, 0.5, PATHS_LEFT]))
    diffusion, log_probs = independent(schedule, 4, num_categories)
    x_0 = torch.randint(num_categories, (200, 4))
    log_p = log_probs.expand(200, 4, -1).gather(-1, x_0[..., None]).sum((1, 2))
    for guide, settings in (
        (diffusion.guide, {}),
        (diffusion.posterior_guide, {"analytic_kl": False}),
    ):
        terms = elbo_terms(diffusion.model, guide, x_0, num_particles=1, **settings)
        torch.testing.assert_close(terms.elbo, log_p, rtol=0, atol=1e-7)
    evidence = importance_evidence(diffusion, x_0, num_particles=3)
    torch.testing.assert_close(evidence.log_evidence, log_p, rtol=0, atol=1e-7)


def test_exact_kernel_by_enumeration():
    """Three entries with any joint law: the denoiser's kernel is the product of the true marginals."""
    diffusion = enumerated()
    states = double(STATES)
    for t, kernel in enumerate(exact_kernels(), start=1):
        log_prob = diffusion.denoiser(states[:, None], t).log_prob(states[None])
        np.testing.assert_allclose(log_prob.detach().exp(), kernel, rtol=1e-9, atol=1e-14)
    decoded = diffusion.decode(states).base_dist.probs.detach()
    np.testing.assert_allclose(decoded, posterior_of_entries(ALPHA[0]), rtol=1e-10)
    best = diffusion.denoiser.x_0_hat(states, diffusion.schedule.log_snr(1))
    assert best.shape == states.shape
    assert best.dtype == states.dtype
    np.testing.assert_array_equal(best, posterior_of_entries(ALPHA[0]).argmax(-1))


def test_bound_and_evidence_by_enumeration():
    diffusion = enumerated()
    bounds, evidence = exact_bounds_and_evidence()
    assert (bounds < evidence).all()
    entropy = -(LAW * np.log(LAW)).sum()
    assert LAW @ bounds < LAW @ evidence < -entropy
    states = double(STATES)
    np.testing.assert_allclose(
        bound_of_steps(diffusion, states, states), bounds, rtol=0, atol=1e-10
    )
    rows = torch.as_tensor(np.arange(300) % len(STATES))
    x_0, truth = torch.as_tensor(STATES)[rows], bounds[rows].mean()
    for guide in (diffusion.guide, diffusion.posterior_guide):
        mean = elbo_terms(diffusion.model, guide, x_0, num_particles=20).mean()
        assert abs(mean.value - truth) < 4 * mean.monte_carlo_error
    result = evaluate_bound(diffusion, x_0, standard_error=0.02)
    assert abs(result.mean().value - truth) < 4 * result.monte_carlo_error
    estimate = importance_evidence(diffusion, x_0, num_particles=100).mean()
    assert abs(estimate.value - evidence[rows].mean()) < 5 * estimate.monte_carlo_error + 2e-3


def test_long_chains_converge_to_the_continuous_one():
    """Ten times as many steps are ten times as close; the mean over the law increases, below −entropy."""
    diffusion = enumerated(LogSNRSchedule(10, log_snr_max=5.0, log_snr_min=-5.0))
    states = double(STATES)
    limit = bound_of_continuum(diffusion, states, states)
    np.testing.assert_allclose(
        limit, bound_of_continuum(diffusion, states, states, 30), rtol=0, atol=1e-8
    )
    ten, hundred, thousand = (
        bound_of_steps(diffusion.with_num_timesteps(n), states, states) for n in (10, 100, 1000)
    )
    assert LAW @ ten < LAW @ hundred < LAW @ thousand < LAW @ limit < LAW @ np.log(LAW)
    assert 9 < np.abs(hundred - limit).sum() / np.abs(thousand - limit).sum() < 11
    assert np.abs(thousand - limit).max() < 0.02
    batch = states.repeat(10, 1)
    for num, bounds in ((math.inf, limit), (1000, thousand)):
        result = evaluate_bound(diffusion, batch, standard_error=0.03, num_timesteps=num)
        assert abs(result.mean().value - bounds.mean()) < 4 * result.monte_carlo_error
    pair = diffusion.continuous(16)
    losses = torch.tensor(
        [TraceMeanField_ELBO().loss(pair.model, pair.guide, batch) / 270 for _ in range(20)]
    )
    assert (losses.mean() + limit.mean()).abs() < 4 * losses.std() / math.sqrt(20)


# Use.


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
@pytest.mark.parametrize("pair", ["subsampled", "continuous"])
def test_training_lowers_the_loss(pair, elbo):
    """Four equal entries in a row: of 4 log 3 = 4.39 nats, 1.10 are left to learn."""
    diffusion = learned()
    x_0 = torch.arange(3).repeat(40)[:, None].expand(-1, 4)
    programs = getattr(diffusion, pair)(2)
    before = evaluate_bound(diffusion, x_0, standard_error=0.1).mean().value
    svi = SVI(programs.model, programs.guide, Adam({"lr": 0.02}), elbo())
    for _ in range(60):
        svi.step(x_0)
    after = evaluate_bound(diffusion, x_0, standard_error=0.1).mean().value
    assert before == pytest.approx(-4 * math.log(3), abs=0.3)
    assert after > before + (1.0 if elbo is TraceMeanField_ELBO else 0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_have_the_right_marginals(dtype):
    schedule = AlphaSchedule(double([0.9, 0.6, 0.5, PATHS_LEFT]))
    diffusion, log_probs = independent(schedule, 2, 3, dtype)
    probs, num = log_probs.exp(), 5000
    sampler = AncestralSampler(diffusion, timesteps=3)
    for draws in (diffusion.sample(num), sampler(num, progress=False)):
        assert draws.shape == (num, 2)
        assert set(draws.unique().tolist()) == {0, 1, 2}
        share = torch.stack([(draws == k).double().mean(0) for k in range(3)], -1)
        assert ((share - probs).abs() < 5 * (probs * (1 - probs) / num).sqrt()).all()


def test_states_keep_their_shapes_with_particles_in_front():
    diffusion = learned()
    x_t = torch.randint(3, (5, 2, 4)).float()
    kernel = diffusion.denoiser(x_t, torch.tensor([2, 7]))
    assert (kernel.batch_shape, kernel.event_shape) == ((5, 2), (4,))
    posterior = diffusion.process.posterior(x_t, x_t[0], torch.tensor([2, 7]))
    assert posterior.batch_shape == (5, 2)
    for row, t in enumerate((2, 7)):
        alone = diffusion.process.posterior(x_t[:, row], x_t[0, row], t)
        torch.testing.assert_close(
            alone.log_prob(x_t[:, 0]), posterior.log_prob(x_t[:, :1].expand(-1, 2, -1))[:, row]
        )
    rates = diffusion.process.increment(x_t, x_t[0], torch.tensor([0.2, 0.7]).double())
    assert (rates.batch_shape, rates.event_shape) == ((5, 2), (4, 3))
    assert diffusion.process.state_size == 12


def test_a_context_reaches_the_network():
    class Told(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(20.0))

        def forward(self, one_hot, log_snr, context):
            return self.scale * nn.functional.one_hot(context, 3).expand(one_hot.shape)

    denoiser = NeuralCategoricalDenoiser(Told(), LinearDecaySchedule(5), (2, 2), num_categories=3)
    diffusion = DiffusionModel(denoiser)
    x_0 = torch.randint(3, (10, 2, 2))
    told = elbo_terms(diffusion, x_0, num_particles=2, context=x_0).mean().value
    assert told > -0.2
    evidence = importance_evidence(diffusion, x_0, num_particles=2, context=x_0)
    assert (evidence.log_evidence > -1).all()


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
def test_programs_compile(elbo):
    diffusion, x_0 = learned(), torch.randint(3, (16, 4))
    pairs = [diffusion.subsampled(), diffusion.continuous()]
    for pair in pairs if elbo is TraceMeanField_ELBO else pairs[:1]:
        loss = compile_elbo(pair.model, pair.guide, elbo(), backend=None)
        loss(x_0)
        torch.manual_seed(3)
        compiled = loss(x_0)
        compiled.backward()
        gradient = diffusion.denoiser.network.decode.weight.grad.clone()
        assert gradient.abs().sum() > 0
        torch.manual_seed(3)
        assert compiled.item() == pytest.approx(elbo().loss(pair.model, pair.guide, x_0), rel=1e-4)


def test_saving_and_loading(tmp_path):
    diffusion, other = learned(), learned()
    nn.init.normal_(diffusion.denoiser.network.decode.weight)
    diffusion.save(tmp_path / "model.pt")
    other.load(tmp_path / "model.pt")
    x_t = torch.randint(3, (5, 4)).float()
    copy = pickle.loads(pickle.dumps(diffusion))
    for model in (other, copy):
        torch.testing.assert_close(
            model.denoiser(x_t, 3).log_prob(x_t), diffusion.denoiser(x_t, 3).log_prob(x_t)
        )
    more = NeuralCategoricalDenoiser(
        MLP((4, 3), hidden_size=16, num_blocks=1), LinearDecaySchedule(8), (4,), num_categories=4
    )
    with pytest.raises(ValueError, match="num_categories=3"):
        DiffusionModel(more).load(tmp_path / "model.pt")


def test_float32_keeps_small_changes():
    """Steps of 1e-5: KLs of the kernels and rates within 1e-3 of those in float64."""
    process = CategoricalProcess(LinearDecaySchedule(100_000), torch.Size((2,)), 4)
    x_t, x_0 = torch.randint(4, (2, 500, 2))
    t, u = torch.randint(2, 100_000, (500,)), torch.rand(500, dtype=torch.float64)
    logits = torch.randn(500, 2, 4)
    kls, rates, changes = [], [], []
    for dtype in (torch.float32, torch.float64):
        x, y, denoised = x_t.to(dtype), x_0.to(dtype), Denoised(x_t, logits.to(dtype))
        kernel = process.reverse(x, denoised, t)
        kls.append(kl_divergence(process.posterior(x, y, t), kernel).double())
        rates.append(
            kl_divergence(
                process.increment(x, y, u), process.reverse_increment(x, denoised, u)
            ).double()
        )
        log_probs = kernel.base_dist.log_probs
        changes.append(log_probs.masked_fill(~process.is_category(x), 0.0).double())
    torch.testing.assert_close(*kls, rtol=1e-3, atol=1e-9)
    torch.testing.assert_close(*rates, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(*changes, rtol=1e-4, atol=0)
    assert changes[1].abs().amax(-1).median() < 3e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_networks_of_half_precision_leave_the_chain_as_exact_as_it_is(dtype):
    network = Independent(torch.zeros(4, 3, dtype=dtype))
    denoiser = NeuralCategoricalDenoiser(
        network, LinearDecaySchedule(50_000), (4,), num_categories=3
    )
    assert denoiser.dtype == torch.float32
    result = evaluate_bound(
        DiffusionModel(denoiser), torch.randint(3, (50, 4)), standard_error=0.02
    )
    assert abs(result.mean().value + 4 * math.log(3)) < 4 * result.monte_carlo_error + 1e-3


def test_arviz_takes_it():
    pytest.importorskip("arviz")
    x_0 = torch.randint(3, (3, 4))
    tree = to_arviz(learned(), x_0, num_draws=25, progress=False)
    states = np.asarray(tree["posterior"]["x"])
    assert set(np.unique(states)) <= {0, 1, 2}


def test_what_it_cannot_take_is_refused_in_words():
    schedule, diffusion = LinearDecaySchedule(5), learned()
    x_0 = torch.randint(3, (2, 4))
    for wrong in (torch.full((2, 4), 3), torch.full((2, 4), -1), torch.full((2, 4), 0.5)):
        with pytest.raises(ValueError, match="expected whole numbers in 0 … 2"):
            Trace_ELBO().loss(diffusion.model, diffusion.guide, wrong)
    lacking = "chain of categories, which has no score"
    with pytest.raises(ValueError, match=lacking):
        smc_evidence(diffusion, x_0, num_particles=10)
    with pytest.raises(ValueError, match=lacking):
        ode_log_likelihood(diffusion, x_0)
    with pytest.raises(ValueError, match=f"{lacking}.*AncestralSampler"):
        DDIMSampler(diffusion)
    with pytest.raises(ValueError, match=lacking):
        diffusion.denoiser.score(x_0.float(), torch.tensor(0.0))
    with pytest.raises(ValueError, match=lacking):
        DiffusionModel(diffusion.denoiser, CategoricalLikelihood(3))
    with pytest.raises(
        ValueError, match="argument 'mask': got one for states that have no value for a gap"
    ):
        diffusion.guide(x_0, mask=x_0 >= 0)
    with pytest.raises(ValueError, match="argument 'num_categories'"):
        NeuralCategoricalDenoiser(MLP((4, 1)), schedule, (4,), num_categories=1)
    for learned_schedule in (MonotoneSchedule(5), MonotoneSchedule(5, event_shape=(4,))):
        with pytest.raises(ValueError, match="argument 'schedule'.*draws of categories"):
            NeuralCategoricalDenoiser(MLP((4, 3)), learned_schedule, (4,), num_categories=3)
    wrong = NeuralCategoricalDenoiser(MLP((4, 3), num_outputs=2), schedule, (4,), num_categories=3)
    with pytest.raises(ValueError, match="argument 'network'.*chain of categories"):
        wrong(x_0.float(), 2)


def test_states_whose_evidence_is_asked_for():
    """log p(x_t) of independent entries: q(x_t) of the data's law."""
    schedule = AlphaSchedule(double([0.9, 0.6, 0.5, PATHS_LEFT]))
    diffusion, log_probs = independent(schedule, 2, 3)
    x_t = torch.randint(3, (20, 2)).double()
    share = log_probs.exp() @ double(kept_or_drawn(0.54, 3))
    truth = share.log().expand(20, 2, 3).gather(-1, x_t.long()[..., None]).sum((1, 2))
    evidence = importance_evidence(diffusion, x_t, num_particles=3, state=2)
    torch.testing.assert_close(evidence.log_evidence, truth, rtol=0, atol=1e-7)


def test_samples_and_bounds_are_seeded():
    diffusion = learned()
    draws = []
    for _ in range(2):
        pyro.set_rng_seed(1)
        draws.append(diffusion.sample(10))
    assert torch.equal(*draws)
