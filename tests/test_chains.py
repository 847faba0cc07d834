"""The programs as Pyro programs: sites, order, shapes, handlers, and what may not be paired."""

import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import Predictive, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.inspect import get_dependencies, get_model_relations
from torch import nn

from pyro_diffusion.chains import BottomUpGuide, GenerativeChain, TopDownGuide
from pyro_diffusion.denoisers import GaussianDenoiser, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import AlphaSchedule, LogSNRSchedule

SITES = ("x_0", "x_1", "x_2", "x_3")


@pytest.fixture
def diffusion(device):
    denoiser = GaussianDenoiser(
        torch.tensor([0.5, -1.0]), torch.tensor([0.5, 2.0]), LogSNRSchedule(3)
    )
    return DiffusionModel(denoiser).to(device)


@pytest.fixture
def x_0(device):
    return torch.randn(4, 2, device=device)


def latents(trace):
    return [name for name in trace.nodes if name.startswith("x_") and name != "x_0"]


def test_sites_and_their_order(diffusion, x_0):
    model = poutine.trace(diffusion.model).get_trace(x_0)
    assert [n for n in model.nodes if n.startswith("x_")] == ["x_3", "x_2", "x_1", "x_0"]
    assert model.nodes["x_0"]["is_observed"]
    assert latents(poutine.trace(diffusion.guide).get_trace(x_0)) == ["x_1", "x_2", "x_3"]
    assert latents(poutine.trace(diffusion.posterior_guide).get_trace(x_0)) == ["x_3", "x_2", "x_1"]
    for program in (diffusion.model, diffusion.guide, diffusion.posterior_guide):
        assert program.site_names == SITES


def test_site_shapes_and_plates(diffusion, x_0):
    for program in (diffusion.model, diffusion.guide, diffusion.posterior_guide):
        trace = poutine.trace(program).get_trace(x_0)
        for name in latents(trace):
            site = trace.nodes[name]
            assert site["value"].shape == (4, 2)
            assert (site["fn"].batch_shape, site["fn"].event_shape) == ((4,), (2,))
            (frame,) = site["cond_indep_stack"]
            assert (frame.name, frame.dim, frame.size) == ("data", -1, 4)


def test_both_guides_have_one_joint_density(double, device):
    """log q of one trajectory, scored by either guide."""
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([0.9, 0.6, 0.3, 0.2]))
    diffusion = DiffusionModel(denoiser).to(device)
    x_0 = torch.randn(5, 2, device=device)
    for first, second in (
        (diffusion.guide, diffusion.posterior_guide),
        (diffusion.posterior_guide, diffusion.guide),
    ):
        trace = poutine.trace(first).get_trace(x_0)
        again = poutine.trace(poutine.replay(second, trace)).get_trace(x_0)
        torch.testing.assert_close(
            trace.log_prob_sum(), again.log_prob_sum(), rtol=1e-13, atol=1e-13
        )


def test_E7_the_model_is_the_product_of_its_kernels(diffusion, x_0):
    trace = poutine.trace(diffusion.model).get_trace(x_0)
    x = [x_0, *(trace.nodes[f"x_{t}"]["value"] for t in (1, 2, 3))]
    expected = dist.Normal(0.0, 1.0).log_prob(x[3]).sum()
    for t in (1, 2, 3):
        expected = expected + diffusion.denoiser(x[t], t).log_prob(x[t - 1]).sum()
    torch.testing.assert_close(trace.log_prob_sum(), expected)


def test_E8_the_bound_is_the_mean_log_ratio_of_model_and_guide(diffusion, x_0):
    for guide in (diffusion.guide, diffusion.posterior_guide):
        pyro.set_rng_seed(5)
        loss = Trace_ELBO().loss(diffusion.model, guide, x_0)
        pyro.set_rng_seed(5)
        q = poutine.trace(guide).get_trace(x_0)
        p = poutine.trace(poutine.replay(diffusion.model, q)).get_trace(x_0)
        assert -loss == pytest.approx((p.log_prob_sum() - q.log_prob_sum()).item(), rel=1e-5)


def test_num_data_scales_every_term(diffusion, x_0):
    pairs = [(diffusion.model, g) for g in (diffusion.guide, diffusion.posterior_guide)]
    subsampled = diffusion.subsampled(2)
    for model, guide in [*pairs, (subsampled.model, subsampled.guide)]:
        for elbo in (Trace_ELBO(), TraceMeanField_ELBO()):
            if guide is pairs[0][1] and isinstance(elbo, TraceMeanField_ELBO):
                continue
            pyro.set_rng_seed(3)
            whole = elbo.loss(model, guide, x_0)
            pyro.set_rng_seed(3)
            scaled = elbo.loss(model, guide, x_0, num_data=20)
            assert scaled == pytest.approx(5 * whole, rel=1e-4)


@pytest.mark.parametrize("validate", [True, False])
@pytest.mark.parametrize("num_particles", [1, 3])
def test_the_illegal_pair_is_refused(diffusion, x_0, validate, num_particles):
    elbo = TraceMeanField_ELBO(num_particles=num_particles)
    with pyro.validation_enabled(validate), warnings.catch_warnings():
        # Pyro's own warning about the order comes first, and warnings are errors here
        warnings.filterwarnings("ignore", message="(?s)Failed to verify mean field")
        with pytest.raises(ValueError, match="posterior_guide"):
            elbo.loss(diffusion.model, diffusion.guide, x_0)
        with pytest.raises(ValueError, match="posterior_guide"):
            elbo.loss_and_grads(diffusion.model, diffusion.guide, x_0)
        with pytest.raises(ValueError, match="posterior_guide"):
            elbo(diffusion.model, diffusion.guide)(x_0)


def test_a_single_step_has_no_order_to_refuse(device):
    denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), AlphaSchedule([0.3]))
    diffusion = DiffusionModel(denoiser).to(device)
    x_0 = torch.randn(2000, 2, device=device)
    analytic = [
        TraceMeanField_ELBO().loss(diffusion.model, guide, x_0)
        for guide in (diffusion.guide, diffusion.posterior_guide)
    ]
    assert analytic[0] == pytest.approx(analytic[1], rel=0.05)


def test_the_guard_covers_learned_layers():
    """The chain wraps its sites, whatever the transition is made of."""
    model = GenerativeChain(
        lambda: dist.Normal(torch.zeros(1), torch.ones(1)).to_event(1),
        lambda x, t: dist.Normal(x, 1.0).to_event(1),
        lambda x: dist.Normal(x, 1.0).to_event(1),
        num_timesteps=2,
    )
    layer = nn.Linear(1, 1)
    guide = BottomUpGuide(lambda x, t: dist.Normal(layer(x), 1.0).to_event(1), num_timesteps=2)
    x_0 = torch.zeros(3, 1)
    assert math.isfinite(Trace_ELBO().loss(model, guide, x_0))
    with (
        pyro.validation_enabled(False),
        pytest.raises(ValueError, match="posterior_guide"),
    ):
        TraceMeanField_ELBO().loss(model, guide, x_0)


def test_free_standing_programs_train_their_layers():
    """A two-level ladder of linear layers from the same programs, without a model around them."""
    decoder, encoder = nn.Linear(2, 2), nn.Linear(2, 2)
    model = GenerativeChain(
        lambda: dist.Normal(torch.zeros(2), torch.ones(2)).to_event(1),
        _GaussianLayer(decoder),
        _GaussianLayer(nn.Linear(2, 2)),
        num_timesteps=2,
    )
    guide = TopDownGuide(
        encoder,
        lambda c: dist.Normal(c, 1.0).to_event(1),
        lambda x_t, c, t: dist.Normal(x_t + c, 1.0).to_event(1),
        num_timesteps=2,
    )
    before = [p.clone() for p in (*model.parameters(), *guide.parameters())]
    assert len(before) == 6
    svi = pyro.infer.SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), TraceMeanField_ELBO())
    svi.step(torch.randn(8, 2))
    after = [*model.parameters(), *guide.parameters()]
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))


class _GaussianLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, t=1):
        return dist.Normal(self.layer(x), 1.0).to_event(1)


def test_condition(diffusion, x_0):
    x_2 = torch.full((4, 2), 0.3, device=x_0.device)
    conditioned = pyro.condition(diffusion.model, data={"x_2": x_2})
    trace = poutine.trace(conditioned).get_trace(num_samples=4)
    assert trace.nodes["x_2"]["is_observed"]
    kernel = diffusion.denoiser(x_2, 2)
    torch.testing.assert_close(trace.nodes["x_1"]["fn"].base_dist.loc, kernel.base_dist.loc)
    observed = pyro.condition(diffusion.model, data={"x_0": x_0})
    assert poutine.trace(observed).get_trace(num_samples=4).nodes["x_0"]["is_observed"]


def test_replay_and_block(diffusion, x_0):
    trace = poutine.trace(diffusion.posterior_guide).get_trace(x_0)
    replayed = poutine.trace(poutine.replay(diffusion.model, trace)).get_trace(x_0)
    for name in ("x_1", "x_2", "x_3"):
        torch.testing.assert_close(replayed.nodes[name]["value"], trace.nodes[name]["value"])
    hidden = poutine.trace(poutine.block(diffusion.model, hide=["x_2"])).get_trace(x_0)
    assert "x_2" not in hidden.nodes


@pytest.mark.parametrize("parallel", [False, True])
def test_predictive(diffusion, x_0, parallel):
    prior = Predictive(diffusion.model, num_samples=6, parallel=parallel)(num_samples=4)
    assert prior["x_0"].shape == (6, 4, 2)
    assert prior["x_3"].shape == (6, 4, 2)
    posterior = Predictive(diffusion.guide, num_samples=6, parallel=parallel)(x_0)
    assert posterior["x_1"].shape == (6, 4, 2)
    conditioned = pyro.condition(diffusion.model, data={"x_1": torch.zeros_like(x_0)})
    draws = Predictive(conditioned, num_samples=6, parallel=parallel)(num_samples=4)
    assert draws["x_0"].shape == (6, 4, 2)


def test_relations(diffusion, x_0):
    """Pyro infers the Markov chain from the program."""
    relations = get_model_relations(diffusion.model, (x_0,))
    assert relations["sample_sample"] == {
        "x_3": [],
        "x_2": ["x_3"],
        "x_1": ["x_2"],
        "x_0": ["x_1"],
    }
    assert relations["plate_sample"] == {"data": ["x_3", "x_2", "x_1", "x_0"]}
    assert relations["observed"] == ["x_0"]
    posterior = get_dependencies(diffusion.model, (x_0,))["posterior_dependencies"]
    assert set(posterior["x_1"]) == {"x_1", "x_0"}
    guide = get_model_relations(diffusion.posterior_guide, (x_0,))
    assert guide["sample_sample"] == {"x_3": [], "x_2": ["x_3"], "x_1": ["x_2"]}


def test_relations_of_a_neural_chain_name_its_parameters(device):
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(2), (2,))).to(device)
    relations = get_model_relations(diffusion.model, (torch.randn(3, 2, device=device),))
    assert relations["sample_sample"]["x_0"] == ["x_1"]


def test_render_model(diffusion, x_0):
    pytest.importorskip("graphviz")
    graph = pyro.render_model(diffusion.model, model_args=(x_0,))
    assert "x_3" in graph.source


def test_sampling_is_the_program_without_data(device):
    """20,000 draws of a chain that is exact for N(m, s²) have its moments."""
    mean, std = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.1])
    schedule = LogSNRSchedule(30, log_snr_max=9, log_snr_min=-20)
    diffusion = DiffusionModel(GaussianDenoiser(mean, std, schedule)).to(device)
    x_0 = diffusion.sample(20_000).cpu()
    assert x_0.shape == (20_000, 2)
    assert ((x_0.mean(0) - mean).abs() < 5 * std / 20_000**0.5).all()
    assert ((x_0.std(0) / std - 1).abs() < 5 / 40_000**0.5).all()


def test_samples_are_in_the_users_units(device):
    network = MLP((2, 3), hidden_size=8, num_blocks=1, dropout=0.5)
    diffusion = DiffusionModel(
        NeuralDenoiser(network, LogSNRSchedule(5), (2, 3)), DiscretizedGaussianLikelihood(4)
    ).to(device)
    x_0 = diffusion.sample(7)
    assert x_0.shape == (7, 2, 3)
    assert set(x_0.unique().tolist()) <= {0, 1, 2, 3}
    assert diffusion.training
    assert not x_0.requires_grad


def test_a_nan_is_refused_with_its_site(device):
    """With validation off too: nothing else would stop it."""

    class Broken(nn.Module):
        def forward(self, x_t, log_snr):
            return torch.where(log_snr[:, None] < 0, math.nan, x_t)

    diffusion = DiffusionModel(NeuralDenoiser(Broken(), LogSNRSchedule(5), (2,))).to(device)
    x_0 = torch.randn(3, 2, device=device)
    subsampled = diffusion.subsampled(4)
    for validate in (True, False):
        with pyro.validation_enabled(validate):
            with pytest.raises(ValueError, match="site 'x_4'.*NaN"):
                Trace_ELBO().loss(diffusion.model, diffusion.guide, x_0)
            with pytest.raises(ValueError, match="site 'x_{t-1}'.*NaN"):
                Trace_ELBO().loss(subsampled.model, subsampled.guide, x_0)


X = torch.randn(4, 2, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("program", ["model", "guide", "posterior_guide", "subsampled"])
@pytest.mark.parametrize(
    ("x_0", "says"),
    [
        (torch.where(X > 0, math.nan, X), "'x_0'.*NaN or infinite.*finite numbers"),
        (torch.full((4, 2), math.inf), "'x_0'.*8 NaN or infinite"),
        (X[:0], "'x_0'.*shape \\(0, 2\\).*N ≥ 1"),
        (torch.tensor(1.0), "'x_0'.*shape \\(\\)"),
        (X.tolist(), "'x_0'.*a list"),
        (torch.randn(4, 3), "got data of shape \\(4, 3\\).*\\(2,\\)"),
        (torch.randn(4, 2, 1), "got data of shape \\(4, 2, 1\\)"),
        (torch.randn(4), "got data of shape \\(4,\\)"),
    ],
)
def test_bad_data_are_refused_in_words(program, x_0, says, diffusion):
    diffusion = diffusion.cpu()
    run = diffusion.subsampled(2).guide if program == "subsampled" else getattr(diffusion, program)
    with pytest.raises(ValueError, match="(?s)" + says):
        run(x_0)


def test_levels_outside_the_likelihood_are_refused():
    network = MLP((2,), hidden_size=8, num_blocks=1)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(5), (2,))
    diffusion = DiffusionModel(denoiser, DiscretizedGaussianLikelihood(16))
    with pytest.raises(ValueError, match="site 'x_0'.*got the value 16;.*0 … 15"):
        diffusion.guide(torch.tensor([[3, 16]]))


def test_data_on_another_device_are_refused(diffusion):
    with pytest.raises(ValueError, match=r"data on meta; expected .*x_0\.to"):
        diffusion.embed(torch.zeros(4, 2, device="meta"))
    if torch.cuda.is_available():
        cpu = diffusion.cpu()
        with pytest.raises(ValueError, match="data on cuda"):
            cpu.guide(torch.zeros(4, 2, device="cuda"))


def test_bad_counts_are_refused(diffusion, x_0):
    with pytest.raises(ValueError, match="'num_data'.*got 0"):
        diffusion.guide(x_0, num_data=0)
    for count in (0, 2.5):
        with pytest.raises(ValueError, match=f"'num_samples'.*got {count}"):
            diffusion.sample(count)


def test_bad_parts_are_refused(diffusion):
    for denoiser in (MLP((2,)), GaussianDenoiser):
        with pytest.raises(ValueError, match="'denoiser'.*expected an instance of Denoiser"):
            DiffusionModel(denoiser)
    for likelihood in (DiscretizedGaussianLikelihood, lambda x_0_hat: x_0_hat):
        with pytest.raises(ValueError, match="'likelihood'.*embed"):
            DiffusionModel(diffusion.denoiser, likelihood)


def test_whole_numbers_have_no_density(diffusion):
    with pytest.raises(ValueError, match=r"torch\.int64.*DiscretizedGaussianLikelihood"):
        diffusion.cpu().guide(torch.tensor([[1, 2]]))


def test_guides_want_data(diffusion):
    with pytest.raises(ValueError, match="a NoneType.*the data that the model observes"):
        diffusion.guide(None)
