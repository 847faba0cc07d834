"""The bound in the user's units: a change of variables done by hand."""

import copy
import pickle

import numpy as np
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch.distributions import AbsTransform, AffineTransform, ExpTransform, SigmoidTransform

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood, GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule
from pyro_diffusion.transforms import Standardize

#: transform, its inverse and log |dy/dx| in numpy
CASES = {
    "affine": (
        AffineTransform(torch.tensor([1.0, -2.0, 0.0]), torch.tensor([2.0, 0.5, 3.0])),
        lambda y: (y - np.array([1.0, -2.0, 0.0])) / np.array([2.0, 0.5, 3.0]),
        lambda x: np.log(np.array([2.0, 0.5, 3.0])) + 0 * x,
    ),
    "standardize": (
        Standardize(torch.tensor([1e-6, 2e-6, 3e-6], dtype=torch.float64), 1e-6),
        lambda y: 1e-6 * y + np.array([1e-6, 2e-6, 3e-6]),
        lambda x: -np.log(1e-6) + 0 * x,
    ),
    "logit": (
        SigmoidTransform().inv,
        lambda y: 1 / (1 + np.exp(-y)),
        lambda x: -np.log(x * (1 - x)),
    ),
    "log": (ExpTransform().inv, lambda y: np.exp(y), lambda x: -np.log(x)),
    "composed": (
        dist.transforms.ComposeTransform(
            [ExpTransform().inv, AffineTransform(torch.tensor(0.0), torch.tensor(4.0))]
        ),
        lambda y: np.exp(y / 4),
        lambda x: np.log(4) - np.log(x),
    ),
}


def model(transform=None, likelihood=None, event_shape=(3,)):
    torch.manual_seed(0)
    network = MLP(event_shape, hidden_size=16, num_blocks=1).double()
    torch.nn.init.normal_(network.decode.weight)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(6), event_shape)
    return DiffusionModel(denoiser, likelihood, transform)


@pytest.mark.parametrize("likelihood", [None, GaussianLikelihood(0.3)], ids=["own", "Gaussian"])
@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("case", CASES)
def test_the_bound_is_in_the_users_units(case, guide, likelihood, double):
    transform, inverse, log_jacobian = CASES[case]
    y = torch.randn(4, 3)
    x = inverse(y.numpy())
    users, models = model(transform, likelihood), model(None, likelihood)
    bounds = []
    for diffusion, data in ((users, torch.tensor(x)), (models, y)):
        torch.manual_seed(1)
        bounds.append(elbo_terms(diffusion.model, getattr(diffusion, guide), data).elbo)
    expected = bounds[1] + torch.tensor(log_jacobian(x).sum(1))
    torch.testing.assert_close(bounds[0], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", CASES)
def test_samples_are_in_the_users_units(case, double):
    transform, inverse, _ = CASES[case]
    torch.manual_seed(2)
    y = model().sample(5)
    torch.manual_seed(2)
    np.testing.assert_allclose(model(transform).sample(5), inverse(y.numpy()), rtol=1e-9)


def test_subsampled_training_sees_the_same_jacobian(double):
    """In expectation, and all of it in every draw: a constant one adds no variance."""
    transform, inverse, _ = CASES["logit"]
    diffusion = model(transform)
    x = torch.tensor(inverse(np.random.default_rng(0).normal(size=(200, 3))))
    pair, full = diffusion.subsampled(50), (diffusion.model, diffusion.posterior_guide)
    elbo = TraceMeanField_ELBO()
    draws = [-elbo.loss(pair.model, pair.guide, x) / len(x) for _ in range(20)]
    expected = [-elbo.loss(*full, x) / len(x) for _ in range(20)]
    error = np.hypot(np.std(draws), np.std(expected)) / np.sqrt(19)
    assert abs(np.mean(draws) - np.mean(expected)) < 5 * error

    losses = []
    for scale in (1.0, 1e6):
        pair = model(AffineTransform(0.0, scale)).subsampled(1)
        torch.manual_seed(5)
        losses.append(elbo.loss(pair.model, pair.guide, torch.randn(20, 3) / scale))
    assert losses[0] - losses[1] == pytest.approx(60 * np.log(1e6), rel=1e-10)


@pytest.mark.parametrize(
    "elbo",
    [
        Trace_ELBO(),
        TraceMeanField_ELBO(),
        Trace_ELBO(7, max_plate_nesting=2, vectorize_particles=True),
    ],
)
def test_the_jacobian_of_observed_entries_only(elbo, double):
    x, mask = torch.randn(20, 3), torch.rand(20, 3) < 0.6
    mask[:, 0] = True
    losses = []
    for scale in (1.0, 1e6):
        pair = model(AffineTransform(0.0, scale)).subsampled(2)
        torch.manual_seed(5)
        losses.append(elbo.loss(pair.model, pair.guide, x / scale, mask=mask))
    assert losses[0] - losses[1] == pytest.approx(mask.sum().item() * np.log(1e6), rel=1e-10)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_data_of_any_scale_give_the_same_model(scale):
    """Standardised, the network sees the same states: parameters after training agree."""
    x = torch.randn(64, 3) * torch.tensor([0.5, 1.0, 2.0]) + 3.0

    def fit(x):
        torch.manual_seed(3)
        network = MLP((3,), hidden_size=16, num_blocks=1)
        diffusion = DiffusionModel(
            NeuralDenoiser(network, LogSNRSchedule(20), (3,)), transform=Standardize.from_data(x)
        )
        pair = diffusion.subsampled()
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        losses = [svi.step(x) for _ in range(10)]
        return losses, torch.nn.utils.parameters_to_vector(network.parameters()).detach()

    losses, parameters = fit(x)
    scaled_losses, scaled_parameters = fit(scale * x)
    torch.testing.assert_close(scaled_parameters, parameters, rtol=1e-3, atol=1e-4)
    jacobian = 64 * 3 * np.log(scale)
    np.testing.assert_allclose(np.array(scaled_losses) - jacobian, losses, rtol=1e-3)


def test_standardize_from_data_and_from_its_observed_part(double):
    x = torch.randn(50, 4) * 3 + 1
    transform = Standardize.from_data(x)
    torch.testing.assert_close(transform(x).mean(0), torch.zeros(4))
    torch.testing.assert_close(transform(x).std(0), torch.ones(4))
    mask = torch.rand(50, 4) < 0.7
    observed = Standardize.from_data(torch.where(mask, x, float("nan")), mask=mask)
    for entry in range(4):
        values = x[mask[:, entry], entry]
        torch.testing.assert_close(observed.loc[entry], values.mean())
        torch.testing.assert_close(observed.scale[entry], values.std())


def test_standardize_takes_arrays(double):
    x_0, observed = torch.randn(50, 2).numpy(), torch.rand(50, 2).numpy() < 0.8
    for mask in (None, observed):
        ours = Standardize.from_data(x_0, mask=mask)
        theirs = Standardize.from_data(
            torch.as_tensor(x_0), mask=None if mask is None else torch.as_tensor(mask)
        )
        assert torch.equal(ours.loc, theirs.loc)
        assert torch.equal(ours.scale, theirs.scale)
    loc = np.array([1.0, 2.0])
    transform = Standardize(loc, np.float32(2.0))
    loc[:] = 0.0  # of the caller's own
    assert transform(torch.tensor([[3.0, 6.0]])).tolist() == [[1.0, 2.0]]


def test_a_transform_is_copied_pickled_and_saved_with_the_model():
    x = torch.randn(20, 2) * 5
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(
        NeuralDenoiser(network, LogSNRSchedule(5), (2,)), transform=Standardize.from_data(x)
    )
    diffusion.sample(2)  # leaves an inverse behind
    assert "transform.loc" in diffusion.state_dict()
    for other in (copy.deepcopy(diffusion), pickle.loads(pickle.dumps(diffusion))):
        torch.manual_seed(0)
        expected = diffusion.sample(3)
        torch.manual_seed(0)
        torch.testing.assert_close(other.sample(3), expected)


def test_a_learned_transform_is_trained():
    flow = dist.transforms.affine_coupling(2, [8])
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(5), (2,)), transform=flow)
    before = [p.clone() for p in flow.parameters()]
    svi = SVI(diffusion.model, diffusion.posterior_guide, Adam({"lr": 0.01}), TraceMeanField_ELBO())
    svi.step(torch.randn(16, 2))
    assert any(not torch.equal(a, b) for a, b in zip(before, flow.parameters(), strict=True))
    assert any(name.startswith("transform.") for name in diffusion.state_dict())


def flow_model(transform):
    network = MLP((2,), hidden_size=8, num_blocks=1)
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(5), (2,)), transform=transform)


@pytest.mark.parametrize("pair", ["guide", "posterior_guide", "subsampled"])
def test_a_flow_sees_the_same_batch_again(pair):
    """Pyro's flows remember the last tensor by its identity; a full batch is the same tensor."""
    x, diffusion = torch.randn(16, 2), flow_model(dist.transforms.affine_coupling(2, [8]))
    model, guide = diffusion.model, getattr(diffusion, pair, None)
    if pair == "subsampled":
        model, guide = (getattr(diffusion.subsampled(), name) for name in ("model", "guide"))
    svi = SVI(model, guide, Adam({"lr": 0.1}), Trace_ELBO())
    for _ in range(3):
        svi.step(x)
    sums = []
    for batch in (x, x.clone()):
        torch.manual_seed(0)
        drawn = poutine.trace(guide).get_trace(batch)
        scored = poutine.trace(poutine.replay(model, drawn)).get_trace(batch)
        sums.append((drawn.log_prob_sum(), scored.log_prob_sum()))
    assert sums[0] == sums[1]
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x)  # in the flow's own float32
    assert terms.elbo.isfinite().all()
    copied = copy.deepcopy(diffusion)
    assert copied.transform is not diffusion.transform
    pickle.loads(pickle.dumps(diffusion))


@pytest.mark.parametrize("kind", ["composed", "inverse"])
def test_modules_inside_a_transform_are_the_models(kind, tmp_path):
    """Trained, moved and saved, wherever in a composition they stand."""

    def build(loc):
        if kind == "inverse":
            return flow_model(dist.transforms.affine_coupling(2, [8]).inv)
        parts = [AffineTransform(2.0, 1.0), Standardize(torch.tensor([loc, 1.0]), 2.0)]
        return flow_model(dist.transforms.ComposeTransform(parts))

    diffusion, other = build(3.0), build(0.0)
    x = torch.randn(8, 2)
    if kind == "inverse":
        before = [p.clone() for p in diffusion.transform_modules.parameters()]
        svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 0.1}), Trace_ELBO())
        svi.step(x)
        after = list(diffusion.transform_modules.parameters())
        assert any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
    diffusion.save(tmp_path / "model.pt")
    assert not torch.equal(other.embed(x), diffusion.embed(x.clone()))
    other.load(tmp_path / "model.pt")
    torch.testing.assert_close(other.embed(x.clone()), diffusion.embed(x.clone()))
    copied = copy.deepcopy(diffusion)
    assert all(
        a is not b
        for a, b in zip(
            copied.transform_modules.children(), diffusion.transform_modules.children(), strict=True
        )
    )


def test_the_numbers_of_plain_transforms_are_compared(tmp_path):
    flow_model(AffineTransform(3.0, 7.0)).save(tmp_path / "model.pt")
    flow_model(AffineTransform(3.0, 7.0)).load(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=r"transform AffineTransform.*3.0.*expected .*0.0"):
        flow_model(AffineTransform(0.0, 1.0)).load(tmp_path / "model.pt")


def test_a_transform_that_couples_entries():
    """Three shares that sum to one are two coordinates; a mask of shares cannot be one of those."""
    x = torch.distributions.Dirichlet(torch.ones(3)).sample((16,))
    diffusion = flow_model(dist.transforms.StickBreakingTransform().inv)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x)
    assert terms.elbo.isfinite().all()
    torch.testing.assert_close(diffusion.sample(4).sum(-1), torch.ones(4))
    with pytest.raises(ValueError, match="'mask': got shape .*entry by entry"):
        diffusion.model(x, mask=torch.ones(16, 3, dtype=torch.bool))


def test_columns_with_domains_of_their_own(double):
    """A gap is filled with what was seen in the same column, and compared on that column's scale."""
    transform = dist.transforms.CatTransform(
        [AffineTransform(0.0, 1e-6), SigmoidTransform().inv], dim=-1, lengths=[1, 1]
    )
    diffusion = flow_model(transform)
    diffusion.denoiser.double()
    x = torch.stack([1e6 * (5 + torch.rand(6)), torch.rand(6)], -1)
    mask = torch.tensor([[True, False], [True, True], [False, True]]).repeat(2, 1)
    x_missing = torch.where(mask, x, float("nan"))
    for program in (diffusion.guide, diffusion.posterior_guide):
        terms = elbo_terms(diffusion.model, program, x_missing, mask=mask)
        assert terms.elbo.isfinite().all()


def test_exact_density_through_a_transform(double):
    """Log-normal data with the exact denoiser of their logarithms."""
    schedule = LogSNRSchedule(10, log_snr_min=-60.0)
    denoiser = GaussianDenoiser(torch.zeros(2), torch.tensor([0.5, 1.5]), schedule)
    diffusion = DiffusionModel(denoiser, transform=ExpTransform().inv)
    x = torch.randn(6, 2).exp()
    expected = dist.LogNormal(torch.zeros(2), torch.tensor([0.5, 1.5])).log_prob(x).sum(1)
    terms = elbo_terms(diffusion.model, diffusion.guide, x, analytic_kl=False)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("transform", "x", "says"),
    [
        (SigmoidTransform().inv, [0.5, 1.0], "from 0.5 to 1,.*not a bijection.*edges excluded"),
        (SigmoidTransform().inv, [0.0, 0.5], "not a bijection"),
        (SigmoidTransform().inv, [-0.1, 0.5], "from -0.1 to 0.5"),
        (ExpTransform().inv, [0.0, 1.0], "not a bijection"),
        (ExpTransform().inv, [-1.0, 1.0], "not a bijection"),
        (SigmoidTransform(), [0.0, 50.0], "not a bijection"),  # saturates
        (AffineTransform(0.0, float("inf")), [0.0, 1.0], "not a bijection"),
    ],
)
def test_data_on_which_it_is_no_bijection_are_refused(transform, x, says):
    network = MLP((2,), hidden_size=8, num_blocks=1)
    diffusion = DiffusionModel(
        NeuralDenoiser(network, LogSNRSchedule(5), (2,)), transform=transform
    )
    for program in (diffusion.guide, diffusion.posterior_guide, diffusion.subsampled().guide):
        with pytest.raises(ValueError, match=f"'transform': got data {says}|'transform'.*{says}"):
            program(torch.tensor([x]))


def test_other_bad_transforms():
    denoiser = NeuralDenoiser(MLP((2,), hidden_size=8, num_blocks=1), LogSNRSchedule(5), (2,))
    with pytest.raises(ValueError, match="'transform': got AbsTransform.*not a bijection"):
        DiffusionModel(denoiser, transform=AbsTransform())
    with pytest.raises(
        ValueError,
        match=r"'transform': got the class Standardize; .* Transform or None\. Pass.*from_data",
    ):
        DiffusionModel(denoiser, transform=Standardize)
    whole_numbers = Standardize.from_data(torch.tensor([[0, 10], [1, 13], [5, 15]]))
    torch.testing.assert_close(whole_numbers.loc, torch.tensor([2.0, 38 / 3]))
    for x, mask, says in [
        (
            torch.stack([torch.randn(9), torch.full((9,), 0.1)], 1).double(),
            None,
            "'x_0': .*constant",
        ),
        (torch.randn(1, 2), None, r"'x_0': .*observed 1 time"),
        (torch.randn(3, 2), torch.tensor([[1, 0]] * 3).bool(), r"'x_0': .*observed 0 time"),
        (torch.randn(3, 2), torch.ones(3, 2), "'mask': got torch.float32"),
        (torch.tensor([[1.0], [float("nan")], [2.0]]), None, "'x_0': got 1 NaN.*mask=x_0.isfinite"),
    ]:
        with pytest.raises(ValueError, match=says):
            Standardize.from_data(x, mask=mask)
    with pytest.raises(ValueError, match="'transform': .*does not take data of shape"):
        flow_model(Standardize(torch.zeros(3), 1.0)).guide(torch.randn(4, 2))
    with pytest.raises(ValueError, match="'scale': got the value 0; expected positive"):
        Standardize(0.0, torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="'loc': got 1 NaN .*; expected finite"):
        Standardize(torch.tensor([1.0, torch.nan]), 1.0)
    levels = DiffusionModel(denoiser, DiscretizedGaussianLikelihood(5), AffineTransform(0.0, 2.0))
    with pytest.raises(ValueError, match="'transform'.*a mass has no Jacobian"):
        levels.model(torch.tensor([[0.0, 1.0]]))
    whole = DiffusionModel(denoiser, transform=AffineTransform(0.0, 2.0))
    with pytest.raises(ValueError, match=r"torch.int64 for a model that has a density"):
        whole.guide(torch.tensor([[0, 1]]))
