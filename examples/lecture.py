r"""A lecture's equations in order, each as left side, right side and difference.

First the thirteen of a preface on the evidence lower bound, then those of a lecture from Markovian
hierarchical VAEs to diffusion models (numbered L1, L2, … here; E-numbers are the package's). One
side is the package, by the functions that a section names; the other is written below from the
formula. All problems are Gaussian, small and in float64: an equation between closed forms holds to
round-off ("exact"), a measured one within five Monte Carlo standard errors (the last column), and a
row that does not ends the script with an error. Some printed formulas are no identities. Their rows
read "≠", and must differ: above all the consistency term, which is an expected log-ratio (E11), not

    E KL(q(x_t | x_{t-1}) ‖ p(x_t | x_{t+1})),

because given both neighbours x_t does not follow q(x_t | x_{t-1}).

    python examples/lecture.py [--device cuda] [--seed 0] [--smoke]
"""

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.infer import Trace_ELBO
from torch import Tensor, nn
from torch.distributions import kl_divergence

from pyro_diffusion import (
    AlphaSchedule,
    BottomUpEncoder,
    DiffusionModel,
    Estimate,
    GaussianDenoiser,
    HierarchicalVAE,
    LinearSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    elbo_terms,
    importance_evidence,
    parameterizations,
    snr_weight,
)
from pyro_diffusion import processes as kernels
from pyro_diffusion.chains import BottomUpGuide, GenerativeChain

X_0 = 1.2  # the datum
ALPHA = (0.9, 0.8, 0.6, 0.4, 0.1)
A, B = 0.4, 0.5  # of an estimate x̂_0 = A + B x_t, which is not exact
MEAN, STD = 0.5, 0.6  # of the data for which there is an exact reverse chain, with a tight bound …
TO_THE_END = (*ALPHA, 1e-24)  # … up to √ᾱ_T times the mean
ROUND_OFF = 1e-9


def main():
    args = parse_arguments()
    torch.set_default_dtype(torch.float64)
    torch.set_default_device(args.device)
    pyro.set_rng_seed(args.seed)
    num_draws = 20_000 if args.smoke else 100_000
    table = Table()
    print(f"Gaussian problems in nats; the datum is x_0 = {X_0}, chains have α_1 … α_5 = {ALPHA}.")
    print(
        "'error' is the Monte Carlo standard error of the difference, 'exact' means round-off only."
    )
    preface(table, num_draws)
    hierarchical_vae(table, num_draws)
    encoder(table)
    bound(table, num_draws)
    consistency_and_matching(table, num_draws)
    off_by = erratum(table, num_draws)
    variances(table, num_draws)
    beyond_the_lecture(table)
    if table.failed:
        sys.exit("not as it should be: " + "; ".join(table.failed))
    print(f"\n{table.count} equations hold; the printed consistency term does not: ", end="")
    print(f"off by {off_by:.4f} nats")


def preface(table, num_draws):
    """One latent: z ~ N(0, 1), x | z ~ N(z, 0.5), and q(z | x) = N(0.5, 0.25)."""
    table.section("preface, one latent: elbo_terms, importance_evidence, quadrature")
    model, guide = hierarchy((1.0, 0.0, 0.5), (0.0, 0.5, 0.25), num_timesteps=1)
    # p(x) = N(0, 1 + 0.5), and p(z | x) by completing the square
    log_p, truth = log_normal(X_0, 0.0, 1.5), (X_0 / 1.5, 0.5 / 1.5)
    gap = kl_normal(0.5, 0.25, *truth)
    z = torch.linspace(-12, 12, 4001)  # on a smooth peak the trapezoid rule is exact to round-off
    log_joint, log_q = log_normal(z, 0.0, 1.0) + log_normal(X_0, z, 0.5), log_normal(z, 0.5, 0.25)
    log_posterior, q = log_normal(z, *truth), log_q.exp()

    def integral(values):
        return torch.trapezoid(values, z)

    table.row("(1)", "∫ p(x, z) dz = p(x)", integral(log_joint.exp()), math.exp(log_p))
    for i in (1800, 2300):
        ratio = (log_joint[i] - log_posterior[i]).exp()
        table.row("(2)", f"p(x, z) / p(z | x) = p(x), z = {z[i]:.1f}", ratio, math.exp(log_p))
    table.row("(3)", "log ∫ p(x, z) dz = log p", integral(log_joint.exp()).log(), log_p)
    ratio = (log_joint - log_q).exp()
    table.row("(4)", "log ∫ (p(x, z) / q) q dz = log p", integral(ratio * q).log(), log_p)
    evidence = importance_evidence(model, guide, datum(), num_particles=num_draws).mean()
    table.row("(5)", "log E_q[p(x, z) / q] = log p", evidence, log_p)
    elbo = elbo_terms(model, guide, datum(), num_particles=num_draws).mean()
    table.row("(6)", "log p ≥ E_q[log p(x, z) / q] = ELBO", log_p, elbo, "≥")
    table.row("(7)", "log p ∫ q dz = log p", log_p * integral(q), log_p)
    table.row("(8)", "∫ q log p dz = log p", integral(q * log_p), log_p)
    drawn = 0.5 + 0.5 * torch.randn(num_draws)
    table.row("(9)", "E_q[log p] = log p", average(torch.full_like(drawn, log_p)), log_p)
    ratio = log_normal(drawn, 0.0, 1.0) + log_normal(X_0, drawn, 0.5) - log_normal(drawn, *truth)
    table.row("(10)", "E_q[log p(x, z) / p(z | x)] = log p", average(ratio), log_p)
    apart = integral(q * (log_joint - log_q)) + integral(q * (log_q - log_posterior))
    table.row("(11)", "E_q[log p(x, z) / q] + E_q[log q / p(z | x)]", apart, log_p)
    table.row(
        "(12)", "ELBO + KL(q ‖ p(z | x)) = log p", elbo._replace(value=elbo.value + gap), log_p
    )
    table.row("(13)", "log p ≥ log p − KL(q ‖ p(z | x))", log_p, log_p - gap, "≥")
    _, guide = hierarchy((1.0, 0.0, 0.5), (0.0, *truth), num_timesteps=1)
    tight = elbo_terms(model, guide, datum(), analytic_kl=False).mean()
    table.row("(13)", "ELBO → log p as q → p(z | x)", tight, log_p)


def hierarchical_vae(table, num_draws):
    """Three latents with kernels that preserve no variance."""
    table.section("lecture, Markovian hierarchical VAE: GenerativeChain, BottomUpGuide")
    down, up = (0.8, 0.1, 0.5), (0.6, -0.1, 0.9)  # slope, intercept, variance
    model, guide = hierarchy(down, up, num_timesteps=3)
    chain = Chain([up] * 3, [down] * 3)
    p, q, path = traces(model, guide)
    table.row("L1", "p(x, h) = p(h_T) p(x | h_1) ∏ p(h_{t-1} | h_t)", p, chain.log_p.at(path))
    table.row("L2", "q(h | x) = q(h_1 | x) ∏ q(h_t | h_{t-1})", q, chain.log_q.at(path))
    evidence = importance_evidence(model, guide, datum(), num_particles=num_draws).mean()
    table.row("L3", "log E_q[p(x, h) / q(h | x)] = log p", evidence, chain.log_evidence)
    elbo = elbo_terms(model, guide, datum(), num_particles=num_draws).mean()
    table.row("L4", "log p ≥ E_q[log p(x, h) / q(h | x)] = ELBO", chain.log_evidence, elbo, "≥")
    table.row("L5", "the same, the kernels written out", elbo, chain.elbo)
    table.row("L5", "… with p(h_t | h_{t-1}), as printed", elbo, chain.misprinted_elbo, "≠")


def encoder(table):
    """The three restrictions, and what follows from the transition alone."""
    table.section("lecture, encoder: kernels, programs; E1 written out, composed, and Bayes' rule")
    chain, diffusion = inexact()
    schedule = diffusion.schedule
    p, q, path = traces(diffusion.model, diffusion.guide)
    x_2, x_3 = path[2:3], path[3:4]
    table.row("L6 [E4]", "q(x_{1:T} | x_0) = ∏ q(x_t | x_{t-1})", q, chain.log_q.at(path))
    transition = kernels.forward_transition(x_2, 3, schedule, event_dim=1)
    written = log_normal(x_3, math.sqrt(ALPHA[2]) * x_2, 1 - ALPHA[2])
    table.row("L7 [E1]", "log q(x_3 | x_2)", transition.log_prob(x_3), written)
    marginal = kernels.forward_marginal(datum(), 3, schedule, event_dim=1)
    table.row("L8 [E2]", "mean of q(x_3 | x_0)", marginal.mean, chain.mean[3])
    table.row("L8 [E2]", "variance of q(x_3 | x_0)", marginal.variance, chain.cov[3, 3])
    table.row("L8", "Var x_3 = 1 if Var x_0 = 1", math.prod(ALPHA[:3]) + marginal.variance, 1.0)
    posterior = kernels.forward_posterior(x_3, datum(), 3, schedule, event_dim=1)
    bayes = chain.posterior(2)
    table.row("L9 [E3]", "mean of q(x_2 | x_3, x_0)", posterior.mean, bayes.mean(path))
    table.row("L9 [E3]", "variance of q(x_2 | x_3, x_0)", posterior.variance, bayes.variance)
    _, q, other = traces(diffusion.model, diffusion.posterior_guide)
    table.row("L10 [E4]", "… = q(x_T | x_0) ∏ q(x_{t-1} | x_t, x_0)", q, chain.log_q.at(other))
    prior = diffusion.prior()
    table.row("L11 [E5]", "log p(x_T)", prior.log_prob(path[5:]), log_normal(path[5:], 0.0, 1.0))
    for T in (5, 20, 200):
        end = kernels.forward_marginal(datum(), T, AlphaSchedule([0.8] * T), event_dim=1)
        kl = kl_normal(0.8 ** (T / 2) * X_0, 1 - 0.8**T, 0.0, 1.0)
        text = f"KL(q(x_T | x_0) ‖ p(x_T)), α = 0.8, T = {T}"
        table.row("L12", text, kl_divergence(end, prior), kl)
    table.row("L12", "… → 0, the third restriction", kl_divergence(end, prior), 0.0)
    table.row("L13 [E7]", "p(x_{0:T}) = p(x_T) ∏ p(x_{t-1} | x_t)", p, chain.log_p.at(path))


def restricted_hvae(diffusion):
    """A hierarchical VAE under the three restrictions: its layers are the diffusion model's kernels."""
    steps = range(1, diffusion.schedule.num_timesteps + 1)
    up = [Layer(diffusion.process.transition, t) for t in steps]
    down = [Layer(diffusion.denoiser, t) for t in steps]
    return HierarchicalVAE(
        (1,), latent_sizes=(1,) * len(up), encoder=BottomUpEncoder.from_layers(up), decoder=down
    )


class Layer(nn.Module):
    """A kernel of a chain at one timestep."""

    def __init__(self, kernel, t):
        super().__init__()
        self.kernel, self.t = kernel, t

    def forward(self, h):
        return self.kernel(h, self.t)


def bound(table, num_draws):
    """The derivation's steps, for a chain that is not exact and for one that is."""
    table.section("lecture, bound: importance_evidence, elbo_terms, Trace_ELBO")
    chain, diffusion = inexact()
    programs, log_p = (diffusion.model, diffusion.guide), chain.log_evidence
    evidence = importance_evidence(*programs, datum(), num_particles=num_draws).mean()
    table.row("L14", "log E_q[p(x_{0:T}) / q] = log p", evidence, log_p)
    vae, bounds = restricted_hvae(diffusion), []
    for model, guide in ((vae.model, vae.guide), programs):
        pyro.set_rng_seed(1)  # the same noise
        bounds.append(elbo_terms(model, guide, datum(), num_particles=10).elbo.item())
    table.row("L14 [E14]", "HVAE under the three restrictions = diffusion", *bounds)
    elbo = elbo_terms(*programs, datum(), num_particles=num_draws).mean()
    table.row("L15 [E8]", "log p ≥ E_q[log p(x_{0:T}) / q] = ELBO", log_p, elbo, "≥")
    table.row("L15", "ELBO = log p, as the next page begins", elbo, log_p, "≠")
    error = math.hypot(evidence.monte_carlo_error, elbo.monte_carlo_error)
    gap = Estimate(evidence.value - elbo.value, error, math.nan)
    table.row("L16 [E9]", "log p − ELBO = KL(q ‖ p(x_{1:T} | x_0))", gap, chain.gap)
    (_, diffusion), truth = exact(), log_normal(X_0, MEAN, STD**2)
    for name, guide in (("forward", diffusion.guide), ("posterior", diffusion.posterior_guide)):
        draws = [-Trace_ELBO().loss(diffusion.model, guide, datum()) for _ in range(5)]
        worst = max(draws, key=lambda draw: abs(draw - truth))
        table.row("L17 [E8]", f"exact chain, {name} order: worst of 5 draws", worst, truth)


def consistency_and_matching(table, num_draws):
    """The two decompositions of one bound, term by term."""
    table.section("lecture, terms: elbo_terms with guide (E11) and posterior_guide (E10)")
    chain, diffusion = inexact()
    ratio, kl = "E log q(x_{0} | x_{1}) / p(x_{0} | x_{2})", "E KL(q(x_{0} | x_{2}, x_0) ‖ p)"
    # The prior matching term of E11 is right as printed: nothing follows x_T.
    ratios, at_T = [*chain.consistency[:5], chain.printed[5]], "E KL(q(x_T | x_{T-1}) ‖ p(x_T))"
    for number, guide, expected, name, prior in (
        ("L18 [E11]", diffusion.guide, ratios, ratio, at_T),
        ("L19 [E10]", diffusion.posterior_guide, chain.matching, kl, "KL(q(x_T | x_0) ‖ p(x_T))"),
    ):
        terms = elbo_terms(diffusion.model, guide, datum(), num_particles=num_draws)
        names = [name.format(t, t - 1, t + 1) for t in range(1, 5)]
        names = ["reconstruction E log p(x_0 | x_1)", *names, prior]
        for text, measured, term in zip(names, terms.term_means(), expected, strict=True):
            table.row(number, text, measured, chain.mean_of(term))
        table.row(number, "their sum, the same bound", terms.mean(), chain.elbo)
    # "Effectively zero" is true of E10's prior term; that of E11 tends to −½ log β_T, β_T = 0.02.
    schedule = LinearSchedule(1000)
    x_999 = kernels.forward_marginal(datum(num_draws), 999, schedule, event_dim=1).sample()
    transition = kernels.forward_transition(x_999, 1000, schedule, event_dim=1)
    measured = average(kl_divergence(transition, diffusion.prior()))
    text = "E KL(q(x_T | x_{T-1}) ‖ p(x_T)), T = 1000"
    table.row("L20", text, measured, -0.5 * math.log(0.02))
    table.row("L20", "… is 'effectively zero', as printed", measured, 0.0, "≠")


def erratum(table, num_draws):
    """The consistency term as it is printed, for the exact chain, whose bound is log p."""
    table.section("erratum, exact chain: kernels, Denoiser, elbo_terms")
    (chain, diffusion), x_0, truth = exact(), datum(num_draws), log_normal(X_0, MEAN, STD**2)
    nodes = poutine.trace(diffusion.guide).get_trace(x_0).nodes
    x = [x_0, *(nodes[f"x_{t}"]["value"] for t in range(1, 7))]
    q = [diffusion.process.transition(x[t - 1], t) for t in range(1, 7)]
    p = [*(diffusion.denoiser(x[t + 1], t + 1) for t in range(1, 6)), diffusion.prior()]
    kls = [kl_divergence(*pair) for pair in zip(q, p, strict=True)]
    for t in range(1, 6):
        text, term = f"E KL(q(x_{t} | x_{t - 1}) ‖ p(x_{t} | x_{t + 1}))", chain.consistency[t]
        # α_6 is zero but for 1e-24, so that x_6 says nothing of x_5
        text, relation = (f"{text}, as printed", "≠") if t < 5 else (f"{text}: α_6 = 0", "=")
        table.row("L21", text, average(kls[t - 1]), chain.mean_of(term), relation)
    terms = elbo_terms(diffusion.model, diffusion.guide, datum(), num_particles=num_draws)
    table.row("L22 [E11]", "the sum with log-ratios = log p", terms.mean(), truth)
    measured = average(diffusion.denoiser(x[1], 1).log_prob(x_0) - sum(kls))
    printed = chain.mean_of(chain.printed[0]) - sum(map(chain.mean_of, chain.printed[1:]))
    table.row("L22", "the sum with the printed KLs", measured, printed)
    table.row("L22", "… = log p, as printed", measured, truth, "≠")
    table.row(
        "L22", "… with p(x_t | x_{t-1}), as printed before", chain.misprinted_elbo, truth, "≠"
    )
    return abs(printed - truth)


def variances(table, num_draws):
    """Of one draw of a term, and of the bound's: drawn term by term, or on one trajectory."""
    table.section("lecture, variance of one draw, exact chain: elbo_terms, standard errors")
    (_, diffusion), num_particles, each, path = exact(), num_draws // 100, [], []
    for guide in (diffusion.guide, diffusion.posterior_guide):
        # A hundred copies of the datum are a hundred estimates, whose spread is the error.
        terms = elbo_terms(diffusion.model, guide, datum(100), num_particles=num_particles)
        each.append(num_particles * terms.term_standard_error[1:6].square())
        path.append(num_particles * terms.standard_error.square())
    for t in range(1, 6):
        ratio, kl = (average(variance[t - 1]) for variance in each)
        table.row("L23", f"at x_{t}: Var of log-ratio (E11) ≥ of KL (E10)", ratio, kl, "≥")
    ratios, kls = (average(variance.sum(0)) for variance in each)
    table.row("L24", "the sum, terms drawn apart: Var E11 ≥ Var E10", ratios, kls, "≥")
    ratios, kls = map(average, path)
    table.row("L24", "the sum on one trajectory: Var E10 ≥ Var E11", kls, ratios, "≥")


def beyond_the_lecture(table):
    """What the lecture's sources add."""
    table.section("beyond: snr_weight, parameterizations, Denoiser.score, bits_per_dim")
    chain, diffusion = inexact()
    schedule = diffusion.schedule
    for t in (1, 4):
        error = Quadratic(0.0, [(1.0, -B * unit(6, t + 1), X_0 - A)])  # (x_0 − x̂_0(x_{t+1}))²
        weighted = snr_weight(schedule, t) * chain.mean_of(error)
        text = f"½ (SNR({t}) − SNR({t + 1})) E ‖x_0 − x̂_0‖² = E KL"
        table.row("[E12]", text, weighted, chain.mean_of(chain.matching[t]))
    a, s, noise = schedule.signal(3), schedule.noise(3), torch.tensor(0.7)
    x_t = a * X_0 + s * noise
    outputs = {"Noise": noise, "Velocity": a * noise - s * X_0, "Score": -noise / s}
    for name, output in outputs.items():
        prediction = getattr(parameterizations, f"{name}Prediction")()
        table.row("[E13]", f"x̂_0 from {prediction}", prediction.x_0_hat(output, x_t, a, s), X_0)
    denoiser, state = exact()[1].denoiser, (x_t.reshape(1), schedule.log_snr(3))
    x_0 = torch.linspace(-8, 9, 4001)
    weight = (log_normal(x_0, MEAN, STD**2) + log_normal(x_t, a * x_0, s**2)).exp()
    expected = (x_0 * weight).sum() / weight.sum()
    table.row("[E13]", "x̂_0 = E[x_0 | x_t]", denoiser.x_0_hat(*state), expected)
    score = -(x_t - a * MEAN) / (a**2 * STD**2 + s**2)
    table.row("[E13]", "Tweedie: ∇ log q(x_t)", denoiser.score(*state), score)
    _, four = exact(dimension=4)
    bits = elbo_terms(four.model, four.guide, torch.full((3, 4), X_0)).bits_per_dim().value
    nats = -4 * log_normal(X_0, MEAN, STD**2)
    table.row("[E15]", "bits/dim, D = 4, exact chain", bits, nats / (4 * math.log(2)))


class Table:
    """Prints a row for each equation, and remembers which are not as they should be."""

    def __init__(self):
        self.count, self.failed = 0, []

    def section(self, title):
        print(f"\n{title}\n{'':60s}{'left':>14s}   {'right':>14s}  difference  error")

    def row(self, number, text, left, right, relation="="):
        """Sides are numbers, or measured ones with their errors (``Estimate``)."""
        error = math.hypot(*(getattr(side, "monte_carlo_error", 0.0) for side in (left, right)))
        left, right = float(left), float(right)
        difference, slack = left - right, max(5 * error, ROUND_OFF * max(1.0, abs(right)))
        relations = {"=": abs(difference) <= slack, "≥": difference >= -slack}
        as_it_should = (relations | {"≠": abs(difference) > slack})[relation]
        spread = "exact" if error < ROUND_OFF else f"{error:.1e}"
        print(f"{number:11s}{text:49s}{left:14.8g} {relation} {right:14.8g}", end="")
        print(f"  {difference:+10.1e}  {spread}")
        self.count += as_it_should and relation != "≠"
        if not as_it_should:
            self.failed.append(f"{number} {text} ({left:.8g} {relation} {right:.8g})")


class Kernel(NamedTuple):
    """A state given others, N(weights · (x_0, …, x_T) + intercept, variance)."""

    weights: Tensor
    intercept: float
    variance: float

    def mean(self, path):
        return self.weights @ path + self.intercept


class Quadratic(NamedTuple):
    """c + Σ k (w · x + b)² in the states x of a path: log-densities and KLs of Gaussians are."""

    constant: float
    squares: list  # of (k, w, b)

    def __sub__(self, other):
        minus = [(-k, w, b) for k, w, b in other.squares]
        return Quadratic(self.constant - other.constant, self.squares + minus)

    def at(self, path):
        return self.constant + sum(k * (w @ path + b) ** 2 for k, w, b in self.squares)


class Chain:
    """Affine Gaussian kernels up, q(x_t | x_{t-1}), and down, p(x_{t-1} | x_t): all is in moments.

    ``up`` and ``down`` are (slope, intercept, variance) for t = 1 … T. Kernel t is the one over
    x_t, that of q over x_0 the datum itself; the terms at index 0 are the reconstruction.
    """

    def __init__(self, up, down):
        size, zero = len(up) + 1, torch.zeros(len(up) + 1)
        q = [Kernel(k * unit(size, t), b, v) for t, (k, b, v) in enumerate(up)]
        p = [Kernel(k * unit(size, t), b, v) for t, (k, b, v) in enumerate(down, 1)]
        q, p = [Kernel(zero, X_0, 0.0), *q], [*p, Kernel(zero, 0.0, 1.0)]
        self.mean, self.cov = moments(enumerate(q), size)
        log_q, log_p = (
            [log_density(t, k) for t, k in enumerate(ks) if k.variance] for ks in (q, p)
        )
        self.log_q, self.log_p = product(log_q), product(log_p)
        later = range(1, size)
        self.consistency = log_p[:1] + [log_q[t - 1] - log_p[t] for t in later]  # E11
        self.matching = log_p[:1] + [kl(self.posterior(t), p[t]) for t in later]  # E10
        self.printed = log_p[:1] + [kl(q[t], p[t]) for t in later]
        self.elbo = self.mean_of(self.log_p - self.log_q)
        # p's kernels over x_t taken at x_{t-1}, where x_{t+1} is meant
        shifted = [k._replace(weights=k.weights.roll(-2)) for k in p[1:-1]]
        printed = [log_density(t, k) for t, k in enumerate([p[0], *shifted, p[-1]])]
        self.misprinted_elbo = self.mean_of(product(printed) - self.log_q)
        # p(x_0), and p(x_{1:T} | x_0) by conditioning the joint
        mean, cov = moments(reversed(list(enumerate(p))), size)
        self.log_evidence = log_normal(X_0, mean[0].item(), cov[0, 0].item())
        gain = cov[1:, 0] / cov[0, 0]
        mean, cov = mean[1:] + gain * (X_0 - mean[0]), cov[1:, 1:] - torch.outer(gain, cov[0, 1:])
        given_x_0 = dist.MultivariateNormal(mean, cov)
        path = dist.MultivariateNormal(self.mean[1:], self.cov[1:, 1:])
        self.gap = kl_divergence(path, given_x_0)  # E9

    def posterior(self, t):
        """q(x_t | x_{t+1}, x_0) by Bayes' rule for a pair of Gaussians; q(x_T | x_0) for t = T."""
        mean, cov, s = self.mean, self.cov, min(t + 1, len(self.mean) - 1)
        gain = cov[t, s] / cov[s, s] if s > t else torch.tensor(0.0)
        variance = (cov[t, t] - gain * cov[s, t]).item()
        return Kernel(gain * unit(len(mean), s), (mean[t] - gain * mean[s]).item(), variance)

    def mean_of(self, quadratic):
        """Expectation under q: E (w · x + b)² is the mean's square plus the variance."""
        squares = [
            k * ((w @ self.mean + b) ** 2 + w @ self.cov @ w) for k, w, b in quadratic.squares
        ]
        return quadratic.constant + float(sum(squares))


def moments(in_order, size):
    """Mean and covariance of a path whose states are drawn in this order."""
    mean, factor = torch.zeros(size), torch.zeros(size, size)
    for t, kernel in in_order:
        mean[t] = kernel.mean(mean)
        factor[t] = kernel.weights @ factor + math.sqrt(kernel.variance) * unit(size, t)
    return mean, factor @ factor.T


def log_density(t, kernel):
    """log N(x_t; m, v) = −½ log 2πv − (x_t − m)² / 2v, m the kernel's mean."""
    weights = unit(len(kernel.weights), t) - kernel.weights
    square = (-0.5 / kernel.variance, weights, -kernel.intercept)
    return Quadratic(-0.5 * math.log(2 * math.pi * kernel.variance), [square])


def kl(q, p):
    """KL(q ‖ p) = ½ (r − 1 − log r) + (m_q − m_p)² / 2v_p, r = v_q / v_p."""
    square = (0.5 / p.variance, q.weights - p.weights, q.intercept - p.intercept)
    return Quadratic(kl_normal(0.0, q.variance, 0.0, p.variance), [square])


def product(log_densities):
    return Quadratic(
        sum(c for c, _ in log_densities), [s for _, many in log_densities for s in many]
    )


def unit(size, t):
    return torch.eye(size)[t]


def log_normal(x, mean, variance):
    log = variance.log() if isinstance(variance, Tensor) else math.log(variance)
    return -0.5 * (math.log(2 * math.pi) + log + (x - mean) ** 2 / variance)


def kl_normal(mean, variance, other_mean, other_variance):
    ratio = variance / other_variance
    return 0.5 * (ratio - 1 - math.log(ratio) + (mean - other_mean) ** 2 / other_variance)


def inexact():
    """Chain and model with x̂_0 = A + B x_t and variance β̃_t (β_1 at t = 1)."""
    up, down, bar = [(math.sqrt(a), 0.0, 1 - a) for a in ALPHA], [], 1.0
    for a in ALPHA:  # the posterior mean at x̂_0 (Ho et al., 2020, eq. 7)
        bar_prev, bar = bar, bar * a
        of_x_0 = math.sqrt(bar_prev) * (1 - a) / (1 - bar)
        of_x_t = math.sqrt(a) * (1 - bar_prev) / (1 - bar)
        variance = (1 - bar_prev) / (1 - bar) * (1 - a) if bar_prev < 1 else 1 - a
        down.append((of_x_0 * B + of_x_t, of_x_0 * A, variance))
    denoiser = NeuralDenoiser(
        AffineEstimate(),
        AlphaSchedule(ALPHA),
        (1,),
        prediction=parameterizations.DataPrediction(),
        variance=PosteriorVariance(),
    )
    return Chain(up, down), DiffusionModel(denoiser)


class AffineEstimate(nn.Module):
    def forward(self, x_t, log_snr):
        return A + B * x_t


def exact(dimension=1):
    """Chain and model with Bayes' rule for x_0 ~ N(MEAN, STD²)."""
    up, down, bar = [(math.sqrt(a), 0.0, 1 - a) for a in TO_THE_END], [], 1.0
    for a in TO_THE_END:
        bar_prev, bar = bar, bar * a
        prev, total = (b * STD**2 + 1 - b for b in (bar_prev, bar))  # Var x_{t-1}, Var x_t
        slope = math.sqrt(a) * prev / total
        intercept = (math.sqrt(bar_prev) - slope * math.sqrt(bar)) * MEAN
        down.append((slope, intercept, prev * (1 - a) / total))
    mean = torch.full((dimension,), MEAN)
    denoiser = GaussianDenoiser(mean, torch.tensor(STD), AlphaSchedule(TO_THE_END))
    return Chain(up, down), DiffusionModel(denoiser)


def hierarchy(down, up, num_timesteps):
    """Programs with N(slope h + intercept, variance) at every level, and p(h_T) = N(0, 1)."""

    def kernel(h, slope, intercept, variance):
        return dist.Normal(slope * h + intercept, math.sqrt(variance)).to_event(1)

    model = GenerativeChain(
        lambda: kernel(torch.zeros(1), 0.0, 0.0, 1.0),
        lambda h, t: kernel(h, *down),
        lambda h: kernel(h, *down),
        num_timesteps=num_timesteps,
    )
    return model, BottomUpGuide(lambda h, t: kernel(h, *up), num_timesteps=num_timesteps)


def traces(model, guide):
    """log p and log q of one path drawn from the guide, and the path x_0 … x_T."""
    q = poutine.trace(guide).get_trace(datum())
    p = poutine.trace(poutine.replay(model, trace=q)).get_trace(datum())
    path = [p.nodes[f"x_{t}"]["value"].reshape(()) for t in range(model.num_timesteps + 1)]
    return p.log_prob_sum(), q.log_prob_sum(), torch.stack(path)


def datum(copies=1):
    return torch.full((copies, 1), X_0)


def average(values):
    """A mean of independent draws with its Monte Carlo error."""
    return Estimate(values.mean().item(), (values.std() / values.numel() ** 0.5).item(), math.nan)


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true", help="a minute's work in seconds")
    parser.add_argument("--output", type=Path, help="unused: this example only prints")
    return parser.parse_args()


if __name__ == "__main__":
    main()
