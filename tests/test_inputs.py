"""Numbers of any dtype and kind, and at the edges: the right value, or an error that helps."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Predictive, ReweightedWakeSleep, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroSample
from pyro.optim import Adam
from torch import nn
from torch.distributions import ComposeTransform, ExpTransform, SigmoidTransform, constraints

from pyro_diffusion import (
    MLP,
    BernoulliLikelihood,
    CategoricalLikelihood,
    DDIMSampler,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    EnumeratedDenoiser,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    HierarchicalVAE,
    ImportanceTimesteps,
    LadderEncoder,
    LevelLikelihood,
    LevelPrediction,
    LinearDecaySchedule,
    LinearSchedule,
    Logit,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
    PoissonLikelihood,
    Standardize,
    StratifiedTimesteps,
    bound_by_datum,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
    smc_evidence,
)
from pyro_diffusion.likelihoods import Likelihood, embed_levels
from pyro_diffusion.processes import BernoulliProcess


def network(**settings):
    return MLP((3,), hidden_size=8, num_blocks=1, **settings)


def neural(likelihood=None, transform=None, **settings):
    outputs = settings["prediction"].num_levels if "prediction" in settings else 1
    schedule = LogSNRSchedule(4, log_snr_max=3.0)
    denoiser = NeuralDenoiser(network(num_outputs=outputs), schedule, (3,), **settings)
    return DiffusionModel(denoiser, likelihood, transform)


def one_hot_neural():
    denoiser = NeuralDenoiser(
        MLP((3, 5), hidden_size=8, num_blocks=1), LogSNRSchedule(4, log_snr_max=3.0), (3, 5)
    )
    return DiffusionModel(denoiser, CategoricalLikelihood(5))


MODELS = {
    "reals": neural,
    "standardized": lambda: neural(transform=Standardize([1.0, 2.0, 3.0], 2.0)),
    "logarithm": lambda: neural(transform=ComposeTransform([ExpTransform().inv])),
    "levels": lambda: neural(prediction=LevelPrediction(5)),
    "discretized": lambda: neural(DiscretizedGaussianLikelihood(5)),
    "categories": one_hot_neural,
    "counts": lambda: neural(PoissonLikelihood(4)),
    "bits": lambda: DiffusionModel(
        NeuralBernoulliDenoiser(network(), LinearDecaySchedule(4), (3,))
    ),
    "noisy categories": lambda: DiffusionModel(
        NeuralCategoricalDenoiser(
            MLP((3, 5), hidden_size=8, num_blocks=1), LinearDecaySchedule(4), (3,), num_categories=5
        )
    ),
    "hierarchical": lambda: HierarchicalVAE(
        (3,),
        (2,),
        LevelLikelihood(5),
        encoder=LadderEncoder((3,), (2,), hidden_size=8),
        hidden_size=8,
    ),
}
DENSITIES = ("reals", "standardized", "logarithm")
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
WHOLE = (
    torch.uint8,
    torch.uint16,
    torch.int16,
    torch.int32,
    torch.uint32,
    torch.int64,
    torch.uint64,
)


def data_of(kind):
    """Small whole numbers, which every dtype holds exactly."""
    high, low = (2, 0) if kind == "bits" else (5, 1 if kind == "logarithm" else 0)
    return torch.randint(low, high, (6, 3)).double()


READERS = {
    "elbo_terms": lambda family, x_0, **given: elbo_terms(family, x_0, **given).elbo,
    "importance_evidence": lambda family, x_0, **given: (
        importance_evidence(family, x_0, num_particles=5, **given).log_evidence
    ),
    "evaluate_bound": lambda family, x_0, **given: (
        evaluate_bound(family, x_0, standard_error=1e6, **given).elbo
    ),
    "smc_evidence": lambda family, x_0, **given: (
        smc_evidence(family, x_0, num_particles=5, num_runs=2, **given).log_evidence
    ),
    "bound_by_datum": lambda family, x_0, **given: bound_by_datum(family, x_0, **given).detach(),
    "SVI": lambda family, x_0, **given: torch.tensor(
        Trace_ELBO().loss(family.model, family.guide, x_0, **given)
    ),
}


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", MODELS)
def test_the_dtype_of_data_changes_no_number(kind, reader, masked):
    """Every dtype that holds the data exactly: the same bound and evidence, to rounding in float32."""
    torch.manual_seed(0)
    family, x_0 = MODELS[kind](), data_of(kind)
    given = {"mask": torch.rand(6, 3) < 0.7} if masked else {}
    if masked:
        given["mask"][:, 0] = True
        if kind in ("bits", "noisy categories"):
            pytest.skip("whatever stood in the gap would be a state")
    dtypes = FLOATS if kind in DENSITIES else (*FLOATS, *WHOLE, *((torch.bool,) * (kind == "bits")))
    values = []
    if reader == "smc_evidence" and not getattr(family, "process", BernoulliProcess).has_score:
        pytest.skip("its states have no score")
    for dtype in dtypes:
        pyro.clear_param_store()
        torch.manual_seed(1)
        values.append(READERS[reader](family, x_0.to(dtype), **given).double())
    for value in values:  # float64 data are embedded in float64, and rounded once less
        torch.testing.assert_close(value, values[0], rtol=1e-5, atol=1e-5)


def test_half_precision_in_the_parts():
    """Embedding, transform and Jacobian of bfloat16 are those of float32."""
    levels = torch.arange(256)
    expected = embed_levels(levels, 256)
    for dtype in (torch.bfloat16, torch.float16, torch.int64):
        assert torch.equal(embed_levels(levels.to(dtype), 256), expected)
    counts = torch.tensor([0, 3, 200])
    poisson = PoissonLikelihood(200)
    assert torch.equal(poisson.embed(counts.bfloat16()), poisson.embed(counts))
    x = torch.randn(50, 3).half()
    transform = Standardize.from_data(x)
    assert transform.scale.dtype == torch.float32
    torch.testing.assert_close(transform(x), Standardize.from_data(x.float())(x.float()))
    assert Logit()(torch.tensor([0.5]).half()).dtype == torch.float32


def test_grey_levels_in_half_precision_have_their_bits_per_dimension():
    """The case that was 11.58 in place of 9.9 bits."""
    x_0 = torch.randint(0, 256, (20, 16))
    denoiser = NeuralDenoiser(MLP((16,), hidden_size=8), LogSNRSchedule(20), (16,))
    diffusion = DiffusionModel(denoiser, DiscretizedGaussianLikelihood(256))
    bits = []
    for dtype in (torch.int64, torch.bfloat16):
        torch.manual_seed(0)
        bits.append(elbo_terms(diffusion, x_0.to(dtype)).bits_per_dim().value)
    assert bits[0] == bits[1]


def covariance():
    factor = torch.randn(3, 3, dtype=torch.float64)
    return (factor @ factor.mT + torch.eye(3)).float()


EXACT = {
    "covariance": lambda: GaussianDenoiser.from_covariance(
        torch.zeros(3), covariance(), LogSNRSchedule(5, log_snr_max=6.0, log_snr_min=-30.0)
    ),
    "mixture": lambda: GaussianMixtureDenoiser(
        [0.5, 0.5], torch.randn(2, 3), 0.5, LogSNRSchedule(5, log_snr_max=6.0, log_snr_min=-30.0)
    ),
    "enumerated": lambda: EnumeratedDenoiser(torch.eye(3), LinearDecaySchedule(5)),
}


@pytest.mark.parametrize("name", EXACT)
def test_autocast_changes_no_number_of_an_oracle(name):
    """Mixed precision is for networks."""
    diffusion = DiffusionModel(EXACT[name]())
    x_0 = torch.eye(3) if name == "enumerated" else torch.randn(3, 3)
    values = []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            values.append(elbo_terms(diffusion, x_0).elbo)
    assert torch.equal(*values)


def test_numbers_of_numpy_and_python_are_alike():
    """np.int64, np.float32 and arrays where the constructor or the call wants numbers."""
    x_0, half = torch.randn(4, 3), np.float32(0.5)
    diffusion = neural()
    importance_evidence(diffusion, x_0, num_particles=np.int64(8), batch_size=np.int32(16))
    smc_evidence(
        diffusion, x_0, num_particles=np.int64(8), num_runs=np.int8(2), num_pilot=np.int64(25)
    )
    evaluate_bound(diffusion, x_0, standard_error=np.float64(9), max_rows=np.int64(10**5))
    diffusion.subsampled(np.int64(2)), diffusion.strided(np.int64(2)), diffusion.sample(np.int64(2))
    DDIMSampler(diffusion, np.int64(2), eta=half)(np.int64(3))
    StratifiedTimesteps(half), ImportanceTimesteps(half, half, half)
    (
        LinearSchedule(np.int64(5), beta_start=np.float64(1e-4)),
        LogSNRSchedule(5, log_snr_max=np.float32(6)),
    )
    LinearDecaySchedule(5, alpha_bar_max=np.float64(0.9))
    NeuralBernoulliDenoiser(network(), LinearDecaySchedule(4), (3,), rate=np.float32(0.5))
    GaussianDenoiser(np.zeros(3), np.ones(3), LogSNRSchedule(4))
    GaussianDenoiser.from_covariance(np.zeros(3), np.eye(3), LogSNRSchedule(4))
    GaussianMixtureDenoiser(np.ones(2), np.zeros((2, 3)), np.ones((2, 3)), LogSNRSchedule(4))
    EnumeratedDenoiser(np.eye(3), LinearDecaySchedule(4), np.ones(3))
    array = np.random.default_rng(0).normal(size=(9, 3))
    torch.testing.assert_close(
        Standardize.from_data(array).scale, torch.from_numpy(array.std(0, ddof=1))
    )
    DiscretizedGaussianLikelihood(np.int64(5), scale=half), CategoricalLikelihood(np.int64(3))


@pytest.mark.parametrize("flag", [True, np.bool_(True)])
def test_a_bool_is_no_number(flag):
    for call in (
        lambda: neural().subsampled(flag),
        lambda: neural().strided(flag),
        lambda: StratifiedTimesteps(flag),
        lambda: DDIMSampler(neural(), eta=flag),
        lambda: NeuralBernoulliDenoiser(network(), LinearDecaySchedule(4), (3,), rate=flag),
    ):
        with pytest.raises(ValueError, match="got .*True"):
            call()


# Data that are no tensor of rows, and what helps.


def frame():
    pandas = pytest.importorskip("pandas")
    return pandas.DataFrame(np.random.default_rng(0).normal(size=(4, 3)))


HINTS = {
    "DataFrame": (frame, r"torch.tensor\(x_0.to_numpy"),
    "array": (lambda: np.zeros((4, 3)), "torch.as_tensor"),
    "objects": (lambda: np.array([["a"]], dtype=object), r"x_0.astype\(float\)"),
    "batch of a DataLoader": (lambda: [torch.zeros(4, 3)], r"\(x_0,\) = batch"),
    "nothing": (lambda: None, "give the guide the data"),
    "a number": (lambda: torch.tensor(1.0), r"x_0\[None\]"),
    "a datum": (lambda: torch.zeros(3), r"x_0\[None\]"),
    "no rows": (lambda: torch.zeros(0, 3), "Skip empty batches"),
    "bits": (lambda: torch.ones(4, 3, dtype=torch.bool), "BernoulliLikelihood"),
    "whole numbers": (
        lambda: torch.ones(4, 3, dtype=torch.long),
        "CategoricalLikelihood.*PoissonL",
    ),
    "other columns": (lambda: torch.zeros(4, 2), r"event_shape \(2,\)"),
}


@pytest.mark.parametrize("name", HINTS)
def test_the_hint_helps(name):
    make, hint = HINTS[name]
    diffusion = neural()
    for call in (
        lambda x: elbo_terms(diffusion, x),
        lambda x: diffusion.guide(x),
        lambda x: evaluate_bound(diffusion, x, standard_error=1.0),
    ):
        with pytest.raises(ValueError, match=hint):
            call(make())


def test_the_hints_do_what_they_say():
    """A frame's numbers, a datum with a batch axis, a mask the right way round."""
    diffusion = neural()
    elbo_terms(diffusion, torch.tensor(frame().to_numpy(dtype=float)))
    assert elbo_terms(diffusion, torch.zeros(3)[None]).elbo.shape == (1,)
    x_0 = torch.randn(4, 3)
    x_0[0, 0] = math.nan
    with pytest.raises(ValueError, match="Pass ~mask: it is inverted"):
        elbo_terms(diffusion, x_0, mask=x_0.isnan())
    with pytest.raises(ValueError, match="isfinite"):
        elbo_terms(diffusion, x_0, mask=torch.ones(4, 3).bool())
    assert elbo_terms(diffusion, x_0, mask=~x_0.isnan()).elbo.isfinite().all()


def test_unsigned_data_with_a_mask():
    """uint16 grey levels, some of them unobserved."""
    x_0, mask = torch.randint(0, 5, (6, 3)), torch.rand(6, 3) < 0.8
    mask[:, 0] = True
    diffusion, values = neural(prediction=LevelPrediction(5)), []
    for dtype in (torch.int64, torch.uint16):
        torch.manual_seed(0)
        values.append(elbo_terms(diffusion, x_0.to(dtype), mask=mask).elbo)
    assert torch.equal(*values)


# Transforms.


def test_logit_loses_no_digits():
    """Against float64 at both ends, with its Jacobian; torch's own is refused there."""
    p = torch.tensor([1e-38, 1e-20, 0.25, 0.5, 1 - 2**-23, 1 - 2**-24])
    exact = p.double()
    transform = Logit()
    torch.testing.assert_close(
        transform(p).double(), exact.log() - torch.log1p(-exact), rtol=1e-6, atol=1e-6
    )
    jacobian = transform.log_abs_det_jacobian(p, transform(p))
    torch.testing.assert_close(
        jacobian.double(), -exact.log() - torch.log1p(-exact), rtol=1e-6, atol=1e-6
    )
    y = torch.linspace(-10, 10, 21, dtype=torch.float64)
    percent = Logit(-100, 100)
    torch.testing.assert_close(percent(percent.inv(y)), y)
    slope = torch.autograd.functional.jacobian(percent, percent.inv(y)).diagonal().log()
    torch.testing.assert_close(percent.log_abs_det_jacobian(percent.inv(y), y), slope)


def test_logit_in_a_model_is_the_logistic_normal():
    """The exact denoiser of logit-normal data: log p at 1 − 2⁻²⁴, in float32, to float32."""
    schedule = LogSNRSchedule(10, log_snr_max=16.0, log_snr_min=-30.0)
    diffusion = DiffusionModel(
        GaussianDenoiser(torch.zeros(1), torch.full((1,), 8.0), schedule), transform=Logit()
    )
    x_0 = torch.tensor([[0.3], [1 - 2**-24]])
    value = importance_evidence(diffusion, x_0, num_particles=3).log_evidence
    p = x_0.double()
    y = p.log() - torch.log1p(-p)
    expected = dist.Normal(0.0, 8.0).log_prob(y) - p.log() - torch.log1p(-p)
    torch.testing.assert_close(value, expected[:, 0], rtol=1e-4, atol=0)
    clamped = DiffusionModel(diffusion.denoiser, transform=SigmoidTransform().inv)
    with pytest.raises(ValueError, match=r"Use transform=Logit\(\)"):
        elbo_terms(clamped, x_0)
    elbo_terms(clamped, torch.tensor([[0.3], [0.999]]))
    composed = ComposeTransform([SigmoidTransform().inv, Standardize(0.0, 2.0)])
    with pytest.raises(ValueError, match=r"Use transform=Logit\(\)"):
        elbo_terms(DiffusionModel(diffusion.denoiser, transform=composed), x_0)
    with pytest.raises(ValueError, match="argument 'high': got 0"):
        Logit(1, 0)


@pytest.mark.parametrize("transform", [ExpTransform(), SigmoidTransform()], ids=repr)
def test_a_transform_the_wrong_way_round(transform):
    """Its values are half of the line; the model has mass on all of it."""
    for family in (neural(transform=transform), HierarchicalVAE((3,), (2,), transform=transform)):
        with pytest.raises(ValueError, match=r"whose values are in .*Transform\(…\).inv"):
            elbo_terms(family, torch.rand(4, 3))


# Networks.


class StateAlone(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x_t):
        return self.layer(x_t)


class Images(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x_t, log_snr):
        return self.last(self.first(x_t[:, None]).relu())[:, 0]


@pytest.mark.parametrize("module", [StateAlone(), nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 3))])
def test_a_network_that_takes_the_state_alone_is_refused_when_it_is_given(module):
    expected = r"forward does not take \(x_t, log_snr\)"
    with pytest.raises(ValueError, match=expected):
        NeuralDenoiser(module, LogSNRSchedule(4), (3,))
    with pytest.raises(ValueError, match=expected):
        NeuralBernoulliDenoiser(module, LinearDecaySchedule(4), (3,))
    with pytest.raises(ValueError, match=expected):
        NeuralCategoricalDenoiser(module, LinearDecaySchedule(4), (3,), num_categories=2)


def test_channels_last_trains_samples_and_saves(tmp_path):
    """Parameters that are not contiguous are the module's own tensors in Pyro's store."""
    made = Images().to(memory_format=torch.channels_last)
    assert not all(p.is_contiguous() for p in made.parameters())
    diffusion = DiffusionModel(NeuralDenoiser(made, LogSNRSchedule(5), (4, 4)))
    pair, x_0 = diffusion.subsampled(), torch.randn(16, 4, 4)
    before = [p.detach().clone() for p in diffusion.parameters()]
    elbo_terms(diffusion, x_0), diffusion.sample(2)
    svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-2}), TraceMeanField_ELBO())
    svi.step(x_0)
    for p, old in zip(diffusion.parameters(), before, strict=True):
        assert not torch.equal(p, old)
    diffusion.save(tmp_path / "model.pt")
    again = DiffusionModel(NeuralDenoiser(Images(), LogSNRSchedule(5), (4, 4)))
    again.load(tmp_path / "model.pt")
    torch.manual_seed(0)
    ours = elbo_terms(diffusion, x_0).elbo
    torch.manual_seed(0)
    torch.testing.assert_close(elbo_terms(again, x_0).elbo, ours, rtol=1e-4, atol=1e-4)


class Bayesian(PyroModule):
    def __init__(self):
        super().__init__()
        self.layer = PyroModule[nn.Linear](3, 3)
        self.layer.weight = PyroSample(dist.Normal(0.0, 1.0).expand([3, 3]).to_event(2))

    def forward(self, x_t, log_snr):
        return self.layer(x_t)


def test_weights_that_are_drawn_under_vectorized_particles():
    """One draw of the weights goes to one run: several particles run one after the other."""
    diffusion = DiffusionModel(NeuralDenoiser(Bayesian(), LogSNRSchedule(4), (3,)))

    def guide(x_0):
        weight = diffusion.name + ".denoiser.network.layer.weight"
        pyro.sample(weight, dist.Normal(torch.zeros(3, 3), 1.0).to_event(2))
        diffusion.guide(x_0)

    x_0 = torch.randn(5, 3)
    settings = {"num_particles": 3, "max_plate_nesting": 1}
    assert math.isfinite(Trace_ELBO(**settings).loss(diffusion.model, guide, x_0))
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        Trace_ELBO(vectorize_particles=True, **settings).loss(diffusion.model, guide, x_0)


# Masks over a state that the likelihood widens.


class Mixed(Likelihood):
    """A real number, and a category of three one-hot in ±1: a datum of two entries, a state of four."""

    widths = (1, 3)

    def embed(self, x_0):
        corners = 2 * nn.functional.one_hot(x_0[..., 1].long(), 3) - 1
        return torch.cat((x_0[..., :1], corners.to(x_0)), -1)

    def forward(self, x_0_hat):
        return Columns(x_0_hat)


class Columns(dist.TorchDistribution):
    arg_constraints = {}  # noqa: RUF012
    support = constraints.real

    def __init__(self, x_0_hat):
        self.x_0_hat = x_0_hat
        super().__init__((*x_0_hat.shape[:-1], 2), validate_args=False)

    def log_prob(self, value):
        real = dist.Normal(self.x_0_hat[..., 0], 0.5).log_prob(value[..., 0])
        category = dist.Categorical(logits=4 * self.x_0_hat[..., 1:], validate_args=False)
        category = category.log_prob(value[..., 1])
        return torch.stack((real, category), -1)

    def sample(self, sample_shape=torch.Size()):
        shape = self._extended_shape(sample_shape)
        return torch.zeros(shape, dtype=self.x_0_hat.dtype)

    def expand(self, batch_shape, _instance=None):
        return self


def test_a_mask_follows_the_entries_that_a_likelihood_widens():
    """The bound of the real column alone is that of a model of this column."""
    schedule = LogSNRSchedule(6, log_snr_max=3.0)
    both = DiffusionModel(
        GaussianDenoiser(torch.zeros(4).double(), torch.ones(4).double(), schedule), Mixed()
    )

    class Real(Likelihood):
        def embed(self, x_0):
            return x_0

        def forward(self, x_0_hat):
            return dist.Normal(x_0_hat, 0.5)

    alone = DiffusionModel(
        GaussianDenoiser(torch.zeros(1).double(), torch.ones(1).double(), schedule), Real()
    )
    x_0 = torch.tensor([[0.3, 2.0], [-1.0, 0.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False]]).expand(2, 2)
    of_state = both.embed_mask(mask)
    assert of_state.tolist() == [[True, False, False, False]] * 2
    gaps = torch.where(mask, x_0, math.nan)
    masked = elbo_terms(both, gaps, mask=mask, num_particles=4000)
    expected = elbo_terms(alone, x_0[:, :1], num_particles=4000)
    error = (masked.standard_error**2 + expected.standard_error**2).sqrt()
    assert ((masked.elbo - expected.elbo).abs() < 5 * error).all()
    both.likelihood.widths = None
    with pytest.raises(ValueError, match="widths say how many"):
        elbo_terms(both, gaps, mask=mask)


# Mistakes that gave a number in silence.


def test_a_scale_that_the_chain_does_not_expect_is_warned_of_once():
    diffusion = neural()
    for x_0 in (1e3 * torch.randn(8, 3), 1e-4 * torch.randn(8, 3)):
        diffusion = neural()
        with pytest.warns(UserWarning, match=r"Standardize.from_data\(x_0\)"):
            diffusion.guide(x_0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            diffusion.guide(x_0)
            neural(transform=Standardize.from_data(x_0)).guide(x_0)


@pytest.mark.parametrize("wide", [False, True], ids=["steps", "continuous"])
def test_a_model_of_random_timesteps_needs_its_own_guide(wide):
    diffusion, x_0 = neural(), torch.randn(4, 3)
    pair = diffusion.continuous() if wide else diffusion.subsampled()
    expected = "site 't': got a model of random timesteps.*use diffusion.model"
    with pytest.raises(ValueError, match=expected):
        pair.model()
    with pytest.raises(ValueError, match=expected):
        Predictive(pair.model, num_samples=10)()
    with pytest.raises(ValueError, match=expected):
        SVI(pair.model, diffusion.guide, Adam({"lr": 1e-3}), Trace_ELBO()).step(x_0)


def test_a_data_set_is_no_smaller_than_its_batch():
    diffusion, x_0 = neural(), torch.randn(4, 3)
    for program in (diffusion.model, diffusion.guide, diffusion.subsampled().guide):
        with pytest.raises(ValueError, match="argument 'num_data': got 3; expected .* at least 4"):
            program(x_0, num_data=3)


# Reweighted wake-sleep.


@pytest.mark.parametrize("insomnia", [0.0, 0.5, 1.0])
def test_reweighted_wake_sleep_trains(insomnia):
    """Both phases move encoder and decoder; the guide reads what the model drew."""
    vae = HierarchicalVAE((2,), latent_sizes=(2,), hidden_size=8)
    elbo = ReweightedWakeSleep(
        num_particles=3, num_sleep_particles=2, insomnia=insomnia, vectorize_particles=False
    )
    svi = SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), elbo)
    before = {name: p.detach().clone() for name, p in vae.named_parameters()}
    for _ in range(3):
        assert all(math.isfinite(loss) for loss in svi.step(torch.randn(8, 2)))
    assert not [name for name, p in vae.named_parameters() if torch.equal(p, before[name])]


def test_the_guide_of_a_sleep_phase_reads_the_observations():
    """The factorised posterior of a linear model: its score at what the model drew, not at the data."""
    vae = HierarchicalVAE((2,), latent_sizes=(2,), hidden_size=8)
    x_0, drawn = torch.zeros(5, 2), torch.randn(5, 2)
    torch.manual_seed(0)
    ours = poutine.trace(vae.guide).get_trace(x_0, observations={"x_0": drawn})
    torch.manual_seed(0)
    theirs = poutine.trace(vae.guide).get_trace(drawn)
    assert torch.equal(ours.nodes["x_1"]["value"], theirs.nodes["x_1"]["value"])
    elbo = ReweightedWakeSleep(
        num_particles=3, num_sleep_particles=2, insomnia=0.5, max_plate_nesting=1
    )
    with pytest.raises(ValueError, match="vectorize_particles=False"):
        SVI(vae.model, vae.guide, Adam({"lr": 1e-2}), elbo).step(x_0)


def test_bernoulli_likelihood_takes_bools():
    diffusion = neural(BernoulliLikelihood())
    assert elbo_terms(diffusion, torch.rand(4, 3) < 0.5).elbo.isfinite().all()
