"""Evidence of models with global latents, against conjugate models and quadrature."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from pyro.infer.autoguide import AutoDelta, AutoGuideList, AutoMultivariateNormal, AutoNormal
from torch.distributions import MultivariateNormal

from pyro_diffusion.evidence import GlobalEvidence, global_evidence

Y = torch.tensor([0.5, 1.2, -0.3], dtype=torch.float64)
NESTINGS = (None, 1, 3)


def evidence(model, guide, *args, **options):
    return global_evidence(model, guide, *args, progress=False, **options)


def conjugate(y):
    """A normal mean of normal data: log p(y) = log N(y; 0, I + 1 1ᵀ)."""
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.Normal(z, 1.0), obs=y)


def posterior_of(y):
    variance = 1 / (1 + len(y))
    return dist.Normal(y.sum() * variance, variance**0.5)


def posterior(y):
    pyro.sample("z", posterior_of(y))


def log_p(y):
    count = len(y)
    return MultivariateNormal(torch.zeros(count), torch.eye(count) + 1).log_prob(y).item()


def fitted(model, guide, *args, steps=300, nesting=1):
    elbo = Trace_ELBO(num_particles=10, vectorize_particles=True, max_plate_nesting=nesting)
    decay = {"lr": 0.05, "lrd": 0.05 ** (1 / steps)}
    svi = SVI(model, guide, pyro.optim.ClippedAdam(decay), elbo)
    for _ in range(steps):
        svi.step(*args)
    return guide


@pytest.mark.parametrize("nesting", NESTINGS)
def test_the_posterior_has_constant_weights(double, nesting):
    found = evidence(conjugate, posterior, Y, num_particles=230, max_plate_nesting=nesting)
    assert abs(found.log_evidence - log_p(Y)) < 1e-12
    assert abs(found.elbo - log_p(Y)) < 1e-12
    assert found.standard_error < 1e-12
    assert found.log_weights.shape == (230,)
    assert found.log_weights.dtype == torch.float64
    assert found.num_particles == 230
    assert abs(found.ess - 230) < 1e-6
    assert found.pareto_k == -math.inf
    assert found.reliable
    assert found.verdict == "The weights are constant: the guide is the posterior."


@pytest.mark.parametrize("nesting", NESTINGS)
def test_weights_draw_by_draw(double, nesting):
    """log p(y, z) − log q(z) at each draw, in its order, together or one by one; numbers of the summary."""
    draws = []

    def guide(y):
        draws.append(pyro.sample("z", dist.Normal(0.2, 0.8)))

    found = evidence(conjugate, guide, Y, num_particles=120, max_plate_nesting=nesting)
    z = torch.cat([z.flatten() for z in draws])
    expected = (
        dist.Normal(0.0, 1.0).log_prob(z)
        + dist.Normal(z[:, None], 1.0).log_prob(Y).sum(1)
        - dist.Normal(0.2, 0.8).log_prob(z)
    )
    torch.testing.assert_close(found.log_weights, expected)
    weights = expected.exp()
    assert math.isclose(found.log_evidence, weights.mean().log(), rel_tol=1e-12)
    assert math.isclose(found.elbo, expected.mean(), rel_tol=1e-12)
    error = weights.std() / weights.mean() / 120**0.5
    assert math.isclose(found.standard_error, error, rel_tol=1e-12)
    assert math.isclose(found.elbo_standard_error, expected.std() / 120**0.5, rel_tol=1e-12)
    assert math.isclose(found.ess, weights.sum() ** 2 / weights.square().sum(), rel_tol=1e-12)


def test_the_estimate_is_within_its_error(double):
    def guide(y):
        pyro.sample("z", dist.Normal(0.2, 0.8))

    errors = [
        (found.log_evidence - log_p(Y)) / found.standard_error
        for found in (evidence(conjugate, guide, Y, max_plate_nesting=1) for _ in range(20))
    ]
    errors = torch.tensor(errors)
    assert errors.abs().max() < 4
    assert abs(errors.mean()) < 4 / 20**0.5
    assert 0.5 < errors.std() < 1.6


def log_normal(y):
    """log y given log s is normal: conjugate in the logarithm."""
    s = pyro.sample("s", dist.LogNormal(0.0, 1.0))
    with pyro.plate("data", len(y)):
        pyro.sample("y", dist.LogNormal(s.log(), 1.0), obs=y)


@pytest.mark.parametrize("nesting", [None, 1])
@pytest.mark.parametrize("guide", [AutoNormal, AutoMultivariateNormal])
def test_an_automatic_guide_of_a_constrained_latent_at_the_posterior(double, guide, nesting):
    """The Jacobian of the constraint is in the weights: they are constant, and log p(y) is exact."""
    y, exact = Y.exp(), posterior_of(Y)
    guide = guide(log_normal)
    guide(y)
    if isinstance(guide, AutoNormal):
        guide.locs.s, guide.scales.s = exact.loc, exact.scale
    else:
        guide.loc = torch.nn.Parameter(exact.loc[None])
        guide.scale = torch.nn.Parameter(exact.scale[None])
    found = evidence(log_normal, guide, y, num_particles=30, max_plate_nesting=nesting)
    assert found.log_weights.std() < 1e-10
    assert abs(found.log_evidence - (log_p(Y) - Y.sum().item())) < 1e-10


def test_a_dirichlet_under_an_automatic_guide(double):
    """Against the Dirichlet-multinomial; a fresh guide that was never called, and one by one."""
    concentration, counts = torch.tensor([1.5, 2.0, 3.0]), torch.tensor([4.0, 1.0, 7.0])

    def model(counts):
        p = pyro.sample("p", dist.Dirichlet(concentration))
        pyro.sample("y", dist.Multinomial(12, probs=p), obs=counts)

    exact = dist.DirichletMultinomial(concentration, 12).log_prob(counts).item()
    fresh = evidence(model, AutoNormal(model), counts, num_particles=50, max_plate_nesting=0)
    assert fresh.log_weights.isfinite().all()
    guide = fitted(model, AutoMultivariateNormal(model), counts, steps=150, nesting=0)
    for nesting, particles in ((0, 2000), (None, 300)):
        found = evidence(model, guide, counts, num_particles=particles, max_plate_nesting=nesting)
        assert found.reliable
        assert found.standard_error < 0.05
        assert abs(found.log_evidence - exact) < 4 * found.standard_error
        assert found.elbo < found.log_evidence


def test_latents_of_data_beside_a_global_one(double):
    def model(y):
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            z = pyro.sample("z", dist.Normal(mean, 1.0))
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    exact = MultivariateNormal(torch.zeros(3), 2 * torch.eye(3) + 1).log_prob(Y).item()
    guide = fitted(model, AutoMultivariateNormal(model), Y, steps=200)
    found = evidence(model, guide, Y, num_particles=2000, max_plate_nesting=1)
    assert found.reliable
    assert found.standard_error < 0.03
    assert abs(found.log_evidence - exact) < 4 * found.standard_error


@pytest.mark.parametrize("nesting", [None, 1])
def test_auxiliary_sites_and_factors_of_a_guide(double, nesting):
    exact = posterior_of(Y)

    def auxiliary(y):
        u = pyro.sample("u", dist.Normal(0.0, 1.0), infer={"is_auxiliary": True})
        volume = -exact.scale.log().expand_as(u)
        pyro.sample("z", dist.Delta(exact.loc + exact.scale * u, log_density=volume))

    def with_factor(y):
        z = pyro.sample("z", exact)
        pyro.factor("f", 1.3 + 0 * z, has_rsample=True)

    options = {"num_particles": 40, "max_plate_nesting": nesting}
    found = evidence(conjugate, auxiliary, Y, **options)
    assert (found.log_weights - log_p(Y)).abs().max() < 1e-10
    found = evidence(conjugate, with_factor, Y, **options)
    assert (found.log_weights - log_p(Y) + 1.3).abs().max() < 1e-10


@pytest.mark.parametrize("nesting", [None, 1])
def test_masks_plates_one_by_one_and_discrete_latents(double, nesting):
    mask = torch.tensor([True, False, True])

    def masked(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)), poutine.mask(mask=mask):
            pyro.sample("y", dist.Normal(z, 1.0), obs=y)

    def sequential(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        for i in pyro.plate("data", len(y)):
            pyro.sample(f"y_{i}", dist.Normal(z, 1.0).mask(mask[i]), obs=y[i])

    for model in (masked, sequential):
        found = evidence(
            model, lambda y: posterior(y[mask]), Y, num_particles=30, max_plate_nesting=nesting
        )
        assert (found.log_weights - log_p(Y[mask])).abs().max() < 1e-10

    def two_means(y):
        k = pyro.sample("k", dist.Categorical(torch.tensor([0.3, 0.7])))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(k.double(), 1.0), obs=y)

    joint = torch.stack([dist.Normal(k, 1.0).log_prob(Y).sum() for k in (0.0, 1.0)])
    joint = joint + torch.tensor([0.3, 0.7]).log()

    def exact(y):
        pyro.sample("k", dist.Categorical(logits=joint))

    found = evidence(two_means, exact, Y, num_particles=30, max_plate_nesting=nesting)
    assert (found.log_weights - joint.logsumexp(0)).abs().max() < 1e-10


def test_it_stays_out_of_a_surrounding_program(double):
    with poutine.trace() as outer, poutine.scale(scale=3.0):
        found = evidence(conjugate, posterior, Y, num_particles=5)
    assert not outer.trace.nodes
    assert abs(found.log_evidence - log_p(Y)) < 1e-12
    assert evidence(conjugate, posterior, y=Y, num_particles=2).log_weights.grad_fn is None


def test_modules_are_read_in_evaluation_mode(double):
    modes = []

    class Model(pyro.nn.PyroModule):
        def forward(self, y):
            modes.append(self.training)
            conjugate(y)

    model = Model()
    evidence(model, posterior, Y, num_particles=2)
    assert modes == [False, False]
    assert model.training


def test_float32_programs_have_float64_weights():
    y = Y.float()
    found = evidence(conjugate, posterior, y, num_particles=30, max_plate_nesting=1)
    assert found.log_weights.dtype == torch.float64
    assert found.pareto_k == -math.inf
    assert abs(found.log_evidence - log_p(y)) < 1e-5


# verdicts


def of(pareto_k, count=1000):
    weights = torch.zeros(count)
    return GlobalEvidence(-1.0, 0.1, -2.0, 0.1, 9.0, pareto_k, weights)


@pytest.mark.parametrize(
    ("pareto_k", "count", "reliable", "words"),
    [
        (math.nan, 10, False, "Too few draws for Pareto k: take 25 or more"),
        (-math.inf, 1000, True, "The weights are constant"),
        (0.3, 1000, True, "Pareto k is 0.30, below 0.67: the weights of these draws show no fault"),
        (
            0.65,
            100,
            False,
            "Pareto k is 0.65, above 0.50: the guide misses a part of the posterior",
        ),
        (0.69, 100_000, True, "below 0.70"),
        (math.inf, 1000, False, "above 0.67"),
    ],
)
def test_the_verdict_is_a_sentence(pareto_k, count, reliable, words):
    found = of(pareto_k, count)
    assert found.reliable is reliable
    assert words in found.verdict
    assert found.verdict[-1] == "."


def test_what_is_shown():
    shown = repr(of(0.3))
    assert shown == (
        "GlobalEvidence(log_evidence=-1.0000 ± 0.1, elbo=-2.0000 ± 0.1 nats, 1,000 draws, "
        "pareto_k=0.30, ess=9)"
    )
    table = of(0.3)._repr_html_()
    assert "9 of 1,000" in table
    assert "no fault" in table


def test_few_draws(double):
    one = evidence(conjugate, posterior, Y, num_particles=1)
    assert math.isnan(one.standard_error)
    assert math.isnan(one.pareto_k)
    assert not one.reliable

    def guide(y):
        pyro.sample("z", dist.Normal(0.2, 0.8))

    assert math.isnan(evidence(conjugate, guide, Y, num_particles=24).pareto_k)
    assert math.isfinite(evidence(conjugate, guide, Y, num_particles=25).pareto_k)


def test_a_guide_that_misses_the_posterior_is_found_out(double):
    """Three posterior sds away and a third as wide: the estimate is off, and k̂ says so."""
    exact = posterior_of(Y)

    def guide(y):
        pyro.sample("z", dist.Normal(exact.loc + 3 * exact.scale, exact.scale / 3))

    found = evidence(conjugate, guide, Y, max_plate_nesting=1)
    assert found.log_evidence < log_p(Y) - 1
    assert not found.reliable
    assert "Use a richer guide, train longer, or use NUTS" in found.verdict


# errors


def renamed(y):
    pyro.sample("w", dist.Normal(0.0, 1.0))


def half(y):
    z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(y), subsample_size=2) as rows:
        pyro.sample("y", dist.Normal(z, 1.0), obs=y[rows])


def broken(y):
    pyro.sample("z", dist.Normal(0.0, 1.0))
    pyro.factor("f", torch.tensor(math.inf), has_rsample=True)


WRONG = {
    "other latents": (
        (conjugate, renamed, {}),
        r"arguments 'model' and 'guide': got latent sites that one of them alone has, 'w', 'z'; "
        r"expected the same latents in both\. Rename",
    ),
    "a part of the data": (
        (half, posterior, {}),
        r"site 'y': got a scale.*expected all of the data.*Leave out subsample_size",
    ),
    "a part of the data, together": (
        (half, posterior, {"max_plate_nesting": 1}),
        r"site 'y': got a scale",
    ),
    "a scale": ((poutine.scale(conjugate, 2.0), posterior, {}), r"site 'z': got a scale"),
    "a scale in the guide": ((conjugate, poutine.scale(posterior, 2.0), {}), r"got a scale"),
    "NaN": (
        (conjugate, broken, {}),
        r"argument 'guide'.*got .*NaN.*expected finite numbers\. Check",
    ),
    "no draws": ((conjugate, posterior, {"num_particles": 0}), r"argument 'num_particles': got 0;"),
    "half a draw": ((conjugate, posterior, {"num_particles": 1.5}), r"argument 'num_particles'"),
    "nesting": (
        (conjugate, posterior, {"max_plate_nesting": -1}),
        r"argument 'max_plate_nesting': got -1; expected a whole number of at least 0\. It is the",
    ),
    "no program": ((conjugate, 3, {}), r"argument 'guide'"),
    "a gradient": (
        (conjugate, posterior, {"y": Y.clone().requires_grad_()}),
        r"require a gradient",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_refused(double, what):
    (model, guide, options), message = WRONG[what]
    y = options.get("y", Y)
    rest = {name: value for name, value in options.items() if name != "y"}
    with pytest.raises(ValueError, match=message):
        evidence(model, guide, y, **rest)


@pytest.mark.parametrize("nesting", [None, 1])
def test_a_point_is_no_guide(double, nesting):
    guide = AutoDelta(conjugate)
    guide(Y)
    with pytest.raises(ValueError, match="argument 'guide'"):
        evidence(conjugate, guide, Y, max_plate_nesting=nesting)


def test_a_plate_that_the_nesting_leaves_no_room_for(double):
    with pytest.raises(ValueError, match="max_plate_nesting"):
        evidence(conjugate, posterior, torch.randn(100), num_particles=100, max_plate_nesting=0)


def test_one_point_among_random_latents_is_named(double):
    def two(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(y)):
            pyro.sample("y", dist.Normal(z + w, 1.0), obs=y)

    guide = AutoGuideList(two)
    guide.append(AutoNormal(poutine.block(two, hide=["w"])))
    guide.append(AutoDelta(poutine.block(two, hide=["z"])))
    with pytest.raises(ValueError, match="site 'w' of argument 'guide': got a point"):
        evidence(two, guide, Y, num_particles=5)


def test_a_term_that_sums_over_the_draws_is_named(double):
    def summed(y):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.factor("odd", -z.reshape(-1).square())

    guide = AutoNormal(summed)
    with pytest.raises(ValueError, match="site 'odd': got a log-density of shape"):
        evidence(summed, guide, Y, num_particles=7, max_plate_nesting=1)
