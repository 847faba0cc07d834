"""What goes with the data: contexts, prefixes, families where programs are taken, and one way to split it."""

import importlib
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn
from torch.utils._pytree import tree_leaves

import pyro_diffusion
from pyro_diffusion import (
    MLP,
    DataPrediction,
    DiffusionModel,
    EnumeratedDenoiser,
    GaussianDenoiser,
    HierarchicalVAE,
    LadderEncoder,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralDenoiser,
    bound_by_datum,
    compile_elbo,
    elbo_terms,
    importance_evidence,
)
from pyro_diffusion.chains import GenerativeChain, Steps
from pyro_diffusion.given import Given, chunks, repeated, together
from pyro_diffusion.moved import MODULES, RENAMED


class Shift(nn.Module):
    """x̂_0 of x_0 ~ N(c, s²): exact for a datum whose mean is its context."""

    def __init__(self, schedule, std):
        super().__init__()
        self.schedule, self.std = schedule, std
        self.scale = nn.Parameter(torch.ones((), dtype=torch.float64))

    def forward(self, x_t, log_snr, context):
        signal, noise = (c[:, None] for c in self.schedule.scales(log_snr))
        mean = context["mean"]
        gain = signal * self.std**2 / (signal**2 * self.std**2 + noise**2)
        return self.scale * (mean + gain * (x_t - signal * mean))


def conditional(num_timesteps=5, std=0.5):
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=6.0, log_snr_min=-60.0)
    exact = GaussianDenoiser(torch.zeros(2).double(), torch.full((2,), std).double(), schedule)

    class Kernel(NeuralDenoiser):
        def reverse_kernel(self, x_t, t, denoised):
            mean = super().reverse_kernel(x_t, t, denoised).mean
            scale = exact(x_t, t).variance.sqrt()
            return dist.Normal(mean, scale).to_event(1)

    network = Shift(schedule, std)
    return DiffusionModel(Kernel(network, schedule, (2,), prediction=DataPrediction()))


def data(n=6):
    context = {"mean": torch.randn(n, 2).double()}
    return context["mean"] + 0.5 * torch.randn(n, 2).double(), context


def log_p(x_0, context):
    return dist.Normal(context["mean"], 0.5).to_event(1).log_prob(x_0)


@pytest.mark.parametrize("num_timesteps", [1, 5])
def test_the_zero_variance_identity_holds_given_a_context(num_timesteps):
    """log p(x∣c) on every path, through chunks and particles: the context goes with its rows."""
    diffusion = conditional(num_timesteps)
    x_0, context = data()
    for guide in (diffusion.guide, diffusion.posterior_guide):
        evidence = importance_evidence(
            diffusion.model, guide, x_0, num_particles=3, batch_size=4, context=context
        )
        torch.testing.assert_close(evidence.log_evidence, log_p(x_0, context), rtol=1e-8, atol=1e-8)
        assert evidence.standard_error.max() < 1e-8
    wrong = {"mean": context["mean"].flip(0)}
    other = importance_evidence(diffusion, x_0, num_particles=3, context=wrong).log_evidence
    torch.testing.assert_close(other, log_p(x_0, wrong), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rows", [1, 3, 40])
def test_a_context_has_a_row_for_each_datum(rows):
    x_0, _ = data()
    context = {"mean": torch.zeros(rows, 2).double()}
    with pytest.raises(ValueError, match=r"argument 'context': got shape .* a row for each datum"):
        importance_evidence(conditional(5), x_0, num_particles=3, context=context)


def test_a_context_reaches_every_way_to_run_a_program():
    """SVI takes it as the second argument: Pyro's handlers have an argument of that name themselves."""
    diffusion = conditional()
    x_0, context = data()
    expected = -log_p(x_0, context).sum().item()
    loss = SVI(diffusion.model, diffusion.guide, Adam({"lr": 0.0}), Trace_ELBO()).step(x_0, context)
    assert abs(loss - expected) < 1e-8
    pair = diffusion.subsampled()
    for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
        SVI(pair.model, pair.guide, Adam({"lr": 1e-4}), elbo).step(x_0, context)
    for pair in (diffusion.subsampled(), diffusion.continuous()):
        assert bound_by_datum(pair.model, pair.guide, x_0, context=context).shape == (6,)
    loss = compile_elbo(pair.model, pair.guide, TraceMeanField_ELBO(), backend=None)
    assert loss(x_0, context).isfinite()
    drawn = diffusion.sample(4000, {"mean": torch.full((4000, 2), 3.0).double()})
    assert (drawn.mean(0) - 3.0).abs().max() < 5 * 0.5 / 4000**0.5 + 0.02


def test_rows_without_a_context_are_told_to_the_network():
    class Notes(nn.Module):
        def forward(self, x_t, log_snr, context, null):
            self.seen = null
            return torch.where(null[:, None], 0.0, context)

    network = Notes()
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(3), (2,)))
    null = torch.tensor([True, False, True])
    terms = elbo_terms(
        diffusion, torch.randn(3, 2), num_particles=2, context=torch.ones(3, 2), null=null
    )
    assert network.seen.tolist() == [True, False, True] * 4  # two states at each of two timesteps
    assert terms.elbo.shape == (3,)


def pair_of(diffusion):
    pair = diffusion.subsampled()
    return pair.model, pair.guide


def test_a_context_that_nobody_takes_is_refused_in_words():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(3))
    diffusion, x_0 = DiffusionModel(denoiser), torch.zeros(4, 2)
    for run in (
        lambda: elbo_terms(diffusion, x_0, context=torch.zeros(4, 1)),
        lambda: diffusion.sample(4, torch.zeros(4, 1)),
        lambda: bound_by_datum(*pair_of(diffusion), x_0, context=torch.zeros(4, 1)),
        lambda: Steps(3).pair(diffusion, x_0, torch.tensor(2), context=torch.zeros(4, 1)),
        lambda: HierarchicalVAE((2,), (3,)).model(x_0, torch.zeros(4, 1)),
    ):
        with pytest.raises(
            ValueError, match="argument 'context': got one for a .*expected data alone"
        ):
            run()


def test_networks_and_oracles_without_a_context_refuse_one_in_words():
    """The signature decides: of the network, and of the logits of a denoiser of bits."""
    network = MLP((2,))
    neural = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(3), (2,)))
    bits = DiffusionModel(EnumeratedDenoiser(torch.eye(2), LinearDecaySchedule(3)))
    context, says = (
        torch.zeros(2, 1),
        r"site 'x_2': argument 'context': got one for a NeuralDenoiser whose network, MLP, takes none",
    )
    with pytest.raises(ValueError, match=says):
        neural.model(torch.zeros(2, 2), context)
    with pytest.raises(
        ValueError, match="site 'x_2': argument 'context': got one for a Enumerated"
    ):
        bits.model(torch.eye(2), context)
    network.forward = lambda x_t, log_snr, context: x_t
    with pytest.raises(
        ValueError, match=r"\(x_t, log_snr\): missing a required argument: 'context'"
    ):
        neural.model(torch.zeros(2, 2))
    network.forward = lambda x_t, log_snr: x_t + None  # an error of the network's own
    with pytest.raises(TypeError, match="unsupported operand"):
        neural.model(torch.zeros(2, 2))


def test_an_error_names_the_site_of_its_kernel():
    """By position or by name of the timestep; also where data have another shape than the last kernel."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(3))
    diffusion = DiffusionModel(denoiser)
    for call in (
        lambda: diffusion.model.transition(torch.zeros(1, 2), 9),
        lambda: diffusion.model.transition(torch.zeros(1, 2), t=9),
    ):
        with pytest.raises(ValueError, match="^site 'x_8': argument 't': got 9"):
            call()
    with pytest.raises(ValueError, match=r"^site 'x_0': got data of shape \(4, 3\)"):
        diffusion.model(torch.zeros(4, 3))


def test_rows_and_names_that_do_not_fit_are_refused_in_words():
    diffusion = conditional()
    x_0, context = data()
    short = {"mean": context["mean"][:1]}
    for run in (
        lambda: SVI(diffusion.model, diffusion.guide, Adam({}), Trace_ELBO()).step(x_0, short),
        lambda: diffusion.subsampled().guide(x_0, short),
        lambda: diffusion.sample(3, context),
        lambda: elbo_terms(diffusion, x_0, context=short),
    ):
        with pytest.raises(
            ValueError, match="argument 'context': got shape .* a row for each datum"
        ):
            run()
    with pytest.raises(ValueError, match="argument 'masks': got a name"):
        diffusion.model(x_0, context, masks=x_0 > 0)
    with pytest.raises(ValueError, match="argument 'num_data': got 100 with plate=False"):
        diffusion.model(x_0, context, plate=False, num_data=100)


def test_sites_of_a_subsampled_pair_have_names():
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(4)))
    for pair, names in (
        (diffusion.subsampled(), ("x_4", "t", "x_t", "x_{t-1}", "x_0")),
        (diffusion.continuous(), ("x_inf", "t", "x_t", "dx_t", "x_0")),
    ):
        drawn = poutine.trace(pair.guide).get_trace(torch.zeros(3, 2))
        trace = poutine.trace(poutine.replay(pair.model, drawn)).get_trace(torch.zeros(3, 2))
        assert pair.model.site_names == names
        assert set(names) <= set(trace.nodes)


@pytest.mark.parametrize("subsampled", [False, True])
def test_a_chain_inside_a_bigger_program(subsampled):
    """In the caller's plate, under a prefix, unscaled; the bound is that of the chain alone."""
    denoiser = GaussianDenoiser(torch.zeros(2).double(), torch.ones(2).double(), LogSNRSchedule(4))
    diffusion, x_0 = DiffusionModel(denoiser), torch.randn(5, 2).double()
    pair = diffusion.subsampled() if subsampled else diffusion
    guide = pair.guide if subsampled else diffusion.posterior_guide

    def model(y):
        with poutine.scale(scale=3.0), pyro.plate("rows", 5, dim=-1):
            shift = pyro.sample("shift", dist.Normal(torch.zeros(5).double(), 1.0))
            pair.model(x_0, plate=False, prefix="prior")
            pyro.sample("y", dist.Normal(shift, 1.0), obs=y)

    def bigger_guide(y):
        with poutine.scale(scale=3.0), pyro.plate("rows", 5, dim=-1):
            pyro.sample("shift", dist.Normal(torch.zeros(5).double(), 1.0))
            guide(x_0, plate=False, prefix="prior")

    y = torch.zeros(5).double()
    drawn = poutine.trace(bigger_guide).get_trace(y)
    trace = poutine.trace(poutine.replay(model, drawn)).get_trace(y)
    names = [n for n, site in trace.nodes.items() if site["type"] == "sample" and "." in n]
    assert names[0] == "prior.x_4"
    assert "prior.x_0" in names
    assert "data" not in trace.nodes
    assert ("prior.timesteps" in names) == subsampled
    plates = {frame.name for n in names for frame in trace.nodes[n]["cond_indep_stack"]}
    assert plates == ({"rows", "prior.timesteps"} if subsampled else {"rows"})
    torch.manual_seed(0)
    both = Trace_ELBO().loss(model, bigger_guide, y)
    if subsampled:
        assert math.isfinite(both)
        return
    torch.manual_seed(0)
    rest = Trace_ELBO().loss(
        poutine.block(model, hide_fn=lambda site: site["name"].startswith("prior")),
        poutine.block(bigger_guide, hide_fn=lambda site: site["name"].startswith("prior")),
        y,
    )
    torch.manual_seed(0)
    torch.randn(5, dtype=torch.float64)  # what the guide drew for the shift
    alone = Trace_ELBO().loss(pair.model, guide, x_0)
    assert abs(both - rest - 3 * alone) < 1e-9


def test_two_chains_in_one_program_do_not_meet():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(3))
    diffusion = DiffusionModel(denoiser)

    def both():
        with pyro.plate("rows", 4, dim=-1):
            first = diffusion.model(plate=False, prefix="first")
            return first, diffusion.model(plate=False, prefix="second")

    nodes = poutine.trace(both).get_trace().nodes
    assert {"first.x_3", "second.x_3", "first.x_0", "second.x_0"} <= set(nodes)
    assert nodes["first.x_0"]["value"].shape == (4, 2)


@pytest.mark.parametrize("ladder", [False, True])
def test_readers_take_a_family(ladder):
    encoder = LadderEncoder((2,), (3, 2)) if ladder else None
    for family in (
        DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(3))),
        HierarchicalVAE((2,), (3, 2), encoder=encoder),
    ):
        x_0 = torch.randn(4, 2)
        guide = getattr(family, "posterior_guide", family.guide)
        for reader in (elbo_terms, lambda *a, **k: importance_evidence(*a, num_particles=4, **k)):
            results = []
            for arguments in ((family.model, guide, x_0), (family, x_0)):
                torch.manual_seed(0)
                results.append(reader(*arguments).elbo)
            torch.testing.assert_close(*results)
        with pytest.raises(ValueError, match="argument 'guide': got a|argument 'model': got a"):
            elbo_terms(family.model, family, x_0)


def test_data_and_what_goes_with_them_move_together():
    x_0 = torch.arange(3)
    given = Given(mask=x_0 > 1, context=(x_0 * 10, {"a": x_0 * 100}), null=None)
    rows, what = together(lambda x: repeated(x, 2)[1:5], x_0, given)
    assert rows.tolist() == [1, 2, 0, 1]
    assert what.mask.tolist() == (rows > 1).tolist()
    assert what.context[0].tolist() == (rows * 10).tolist()
    assert what.context[1]["a"].tolist() == (rows * 100).tolist()
    assert what.null is None


@st.composite
def contexts(draw, count):
    """A tree of tensors, each with the number of its row in every entry; labels stay whole."""
    kinds = st.sampled_from([torch.float32, torch.float64, torch.int64, torch.uint8])
    shapes = st.sampled_from([(), (2,), (2, 3)])

    def leaf(dtype, shape):
        return torch.arange(count).to(dtype).reshape(-1, *(1,) * len(shape)).expand(count, *shape)

    leaves = st.builds(leaf, kinds, shapes)
    names = st.sampled_from(["a", "b"])
    trees = st.recursive(
        leaves,
        lambda part: st.tuples(part, part) | st.dictionaries(names, part, min_size=1),
        max_leaves=4,
    )
    return draw(trees)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data(), count=st.integers(1, 7), size=st.integers(1, 4), times=st.integers(1, 3))
def test_a_context_stays_beside_its_datum(data, count, size, times):
    """Through chunks and particles, whatever tree it is; its dtype is kept."""
    context = data.draw(contexts(count))
    null = torch.arange(count) % 2 == 1
    whole = Given.of(context=context, null=null).with_rows(count)
    x_0 = torch.arange(count).double()[:, None]
    for _, rows, own in chunks(x_0, whole, size):
        rows, own = together(lambda x: repeated(x, times), rows, own)
        for before, part in zip(tree_leaves(context), tree_leaves(own.context), strict=True):
            assert part.dtype == before.dtype
            numbers = part.reshape(len(rows), -1).double()
            kept = torch.where(own.null[:, None], 0.0, rows)
            assert torch.equal(numbers, kept.expand_as(numbers))
        assert torch.equal(own.null, rows[:, 0] % 2 == 1)


def test_a_chain_of_ones_own_kernels_may_take_a_context():
    def transition(x_t, t, context):
        return dist.Normal(x_t + context, 1.0).to_event(1)

    model = GenerativeChain(
        lambda: dist.Normal(torch.zeros(2), 1.0).to_event(1),
        transition,
        lambda x_1: dist.Normal(x_1, 1e-6).to_event(1),
        num_timesteps=3,
    )
    drawn = model(context=torch.full((2000, 1), 5.0), num_samples=2000)
    assert (drawn.mean() - 10.0).abs() < 5 * (3 / 4000) ** 0.5


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_moved_forward_their_names(module):
    """By both ways to import, with a warning that names the new place."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        old = importlib.import_module(f"pyro_diffusion.{module}")
    assert getattr(pyro_diffusion, module) is old
    names = OLD_NAMES[module]
    for name in names:
        with pytest.warns(
            DeprecationWarning, match=rf"{module}.{name} has moved to pyro_diffusion"
        ):
            value = getattr(old, name)
        assert value.__name__ == RENAMED.get((module, name), name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = old.nothing


#: What the modules of version 0.1 exported.
OLD_NAMES = {
    "batches": ["OrderedBatches", "ShuffledBatches", "permuted"],
    "bernoulli": ["BernoulliDenoiser", "BernoulliDiffusion", "EnumeratedDenoiser", "Noise"],
    "compilation": ["CompiledELBO", "compile_elbo"],
    "draws": ["Record", "as_numpy", "programs", "to_arviz"],
    "evaluation": ["BoundEvaluation", "evaluate_bound"],
    "families": ["Family"],
    "flow": ["ode_log_likelihood"],
    "kernels": [
        "forward_increment", "forward_marginal", "forward_posterior", "forward_transition",
        "terminal_prior", "gaussian", "chain_step", "pad",
    ],
    "objectives": ["FreeBitsELBO", "KLWarmup", "MinimumVarianceELBO", "bound_by_datum"],
    "observations": ["as_real", "check_data", "check_mask", "holds", "observed_part", "zeroed"],
    "parallel": ["agreed_seed", "gather", "over_ranks", "rank_and_size", "share"],
    "parameterizations": ["DataPrediction", "LevelPrediction", "embed_levels", "check_num_levels"],
    "report": ["Summary", "SummaryRow", "summary"],
    "sequential": ["smc_evidence"],
    "store": ["ParamScope", "check_state", "evaluating", "free_name", "snake_case"],
    "timesteps": ["ImportanceTimesteps", "JointStrata", "TimestepDistribution", "Timesteps"],
    "variances": ["LearnedVariance", "OptimalVariance", "PosteriorVariance", "exact_variance"],
}  # fmt: skip


def test_names_that_left_the_top_level_or_a_room_are_forwarded():
    for module, name in (
        ("pyro_diffusion", "Denoiser"), ("pyro_diffusion", "TimestepPlate"),
        ("pyro_diffusion.bounds", "log_density"), ("pyro_diffusion.denoisers", "check_argument"),
        ("pyro_diffusion.chains", "BottomUpSite"),
    ):  # fmt: skip
        with pytest.warns(DeprecationWarning, match=f"{name} has moved to pyro_diffusion"):
            assert getattr(importlib.import_module(module), name).__name__ == name
    with pytest.raises(AttributeError):
        _ = pyro_diffusion.nothing


def test_kernels_that_were_methods_of_the_model_are_forwarded():
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(3))
    diffusion, x, t = DiffusionModel(denoiser), torch.ones(4, 2), torch.tensor(2)
    u = torch.tensor(0.5)
    for old, new in (
        (lambda: diffusion.forward_transition(x, 2), diffusion.process.transition(x, 2)),
        (lambda: diffusion.forward_transition(x_prev=x, t=2), diffusion.process.transition(x, 2)),
        (lambda: diffusion.forward_marginal(x, 2), diffusion.process.marginal(x, 2)),
        (lambda: diffusion.terminal_marginal(x), diffusion.process.marginal(x, 3)),
        (lambda: diffusion.forward_posterior(x, x, 2), diffusion.process.posterior(x, x, 2)),
        (lambda: diffusion.marginal_at(x, u), diffusion.process.marginal_at(x, u)),
        (lambda: diffusion.increment(x, x, u), diffusion.process.increment(x, x, u)),
        (lambda: diffusion.reverse(x, t)[0], diffusion.denoiser(x, t)),
        (
            lambda: diffusion.reverse_increment(x, u)[0],
            diffusion.process.increment(
                x, diffusion.denoiser.x_0_hat(x, diffusion.schedule.log_snr_at(u)), u
            ),
        ),
        (
            lambda: diffusion.decode_denoised(
                x, denoiser.denoise(x, diffusion.schedule.log_snr(1))
            ),
            diffusion.decode(x),
        ),
    ):
        with pytest.warns(
            DeprecationWarning, match=r"has moved to .*will be removed in version 0\.3"
        ):
            kernel = old()
        torch.testing.assert_close(kernel.log_prob(x), new.log_prob(x))
