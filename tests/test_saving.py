"""A model is saved and loaded without any engine: whole, or not at all."""

import os
import pickle

import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion.denoisers import (
    LearnedVariance,
    NeuralDenoiser,
    PosteriorVariance,
    VelocityPrediction,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import DiscretizedGaussianLikelihood, GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import CosineSchedule, LinearSchedule, LogSNRSchedule
from pyro_diffusion.transforms import Standardize


def build(
    *,
    schedule=None,
    event_shape=(3,),
    hidden_size=16,
    prediction=None,
    variance=None,
    likelihood=None,
    transform=None,
):
    schedule = LogSNRSchedule(10, learnable=True) if schedule is None else schedule
    variance = LearnedVariance() if variance is None else variance
    network = MLP(
        event_shape, hidden_size=hidden_size, num_blocks=1, num_outputs=1 + variance.num_outputs
    )
    denoiser = NeuralDenoiser(
        network, schedule, event_shape, prediction=prediction, variance=variance
    )
    likelihood = GaussianLikelihood(0.5, learnable=True) if likelihood is None else likelihood
    return DiffusionModel(denoiser, likelihood, transform)


def standardize(value=0.0):
    return Standardize(torch.full((3,), value), torch.ones(3))


@pytest.fixture
def trained():
    x = 3 + torch.randn(32, 3)
    diffusion = build(transform=Standardize.from_data(x))
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.05}), TraceMeanField_ELBO())
    for _ in range(5):
        svi.step(x)
    return diffusion.eval()


def draws(diffusion):
    torch.manual_seed(0)
    return diffusion.sample(4)


@pytest.mark.parametrize("way", ["save and load", "state_dict"])
def test_everything_learned_comes_back(way, trained, tmp_path):
    path, other = tmp_path / "model.pt", build(transform=standardize()).eval()
    if way == "save and load":
        trained.save(path)
        assert other.load(path) is other
    else:
        torch.save(trained.state_dict(), path)
        other.load_state_dict(torch.load(path, weights_only=True))
    assert other.schedule.log_snr_min == trained.schedule.log_snr_min != -8
    assert other.likelihood.scale == trained.likelihood.scale != 0.5
    torch.testing.assert_close(other.transform.loc, trained.transform.loc)
    assert torch.equal(draws(other), draws(trained))
    assert os.listdir(tmp_path) == ["model.pt"]


def test_training_goes_on_after_loading(trained, tmp_path):
    """The loaded numbers are in the module's own tensors, which the store and optimisers hold."""
    trained.save(tmp_path / "model.pt")
    saved = trained.state_dict()["denoiser.network.decode.weight"].clone()
    pair = trained.subsampled()
    svi = SVI(pair.model, pair.guide, Adam({"lr": 0.05}), TraceMeanField_ELBO())
    svi.step(3 + torch.randn(8, 3))
    weight = trained.denoiser.network.decode.weight
    assert not torch.equal(weight, saved)
    trained.load(tmp_path / "model.pt")
    assert torch.equal(weight, saved)
    svi.step(3 + torch.randn(8, 3))
    assert not torch.equal(weight, saved)


class UsersLikelihood:
    """A plain object, without a representation of its own."""

    def embed(self, x_0):
        return x_0

    def __call__(self, x_0_hat):
        return torch.distributions.Normal(x_0_hat, 1.0)


def test_a_users_likelihood_is_known_by_its_class():
    first, second = build(likelihood=UsersLikelihood()), build(likelihood=UsersLikelihood())
    assert first.description["likelihood"] == "UsersLikelihood"
    second.load_state_dict(first.state_dict())


OTHERS = {
    "schedule": {"schedule": CosineSchedule(10)},
    "linear": {"schedule": LinearSchedule(10)},
    "length": {"schedule": LogSNRSchedule(11, learnable=True)},
    "prediction": {"prediction": VelocityPrediction()},
    "variance": {"variance": PosteriorVariance()},
    "likelihood": {"likelihood": DiscretizedGaussianLikelihood(4, learnable=True)},
    "transform": {"transform": None},
    "event": {"event_shape": (4,), "transform": None},
    "network": {"hidden_size": 8},
}


@pytest.mark.parametrize("other", OTHERS)
def test_another_model_is_refused_and_nothing_overwritten(other, trained, tmp_path):
    trained.save(tmp_path / "model.pt")
    target = build(**{"transform": standardize()} | OTHERS[other])
    before = {k: v.clone() for k, v in target.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match="'state_dict': got .*; expected .*Build the model"):
        target.load(tmp_path / "model.pt")
    with pytest.raises(ValueError, match="'state_dict': got"):
        target.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    for name, value in before.items():
        assert torch.equal(target.state_dict()[name], value), name


def test_names_and_shapes_are_compared_without_a_description(trained):
    state = {k: v for k, v in trained.state_dict().items() if k != "_extra_state"}
    with pytest.raises(ValueError, match="got no '_extra_state'"):
        build(transform=standardize()).load_state_dict(state)
    state = trained.state_dict() | {"surplus": torch.zeros(1)}
    with pytest.raises(ValueError, match="'surplus', which this model does not have"):
        build(transform=standardize()).load_state_dict(state)
    target = build(transform=standardize())
    before = target.denoiser.network.decode.bias.clone()
    name = "denoiser.network.encode.weight"
    for broken in (
        {name: torch.zeros(1)}, {name: 3}, {"_extra_state": torch.tensor([1.0])},
        {"_extra_state": torch.tensor([65, 66], dtype=torch.uint8)},
    ):  # fmt: skip
        for strict in (True, False):
            with pytest.raises(ValueError, match="'state_dict': got"):
                target.load_state_dict(trained.state_dict() | broken, strict=strict)
    assert torch.equal(target.denoiser.network.decode.bias, before)
    missing = build(transform=standardize()).load_state_dict({}, strict=False)
    assert missing.missing_keys  # torch's own way out


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda whole: whole[: len(whole) // 2], "cannot be read"),
        (lambda whole: whole[:-40], "cannot be read"),
        (lambda whole: b"", "cannot be read"),
        (lambda whole: b"not a checkpoint\n" * 100, "cannot be read"),
        (lambda whole: pickle.dumps(build), "cannot be read"),
        (None, r"holds a dictionary of 'epoch', 'state_dict'.*Lightning"),
    ],
)
def test_a_broken_file_is_refused_and_nothing_overwritten(content, says, trained, tmp_path):
    path = tmp_path / "model.pt"
    trained.save(path)
    if content is None:
        torch.save({"epoch": 3, "state_dict": trained.state_dict()}, path)
    else:
        path.write_bytes(content(path.read_bytes()))
    expected = draws(trained)
    with pytest.raises(ValueError, match=f"'path': got .*model.pt', which .*{says}"):
        trained.load(path)
    assert torch.equal(draws(trained), expected)
    with pytest.raises(FileNotFoundError):
        trained.load(tmp_path / "none.pt")


def test_a_crash_while_saving_leaves_the_older_file(trained, tmp_path, monkeypatch):
    path = tmp_path / "model.pt"
    trained.save(path)
    before = path.read_bytes()

    def crash(state, target):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(OSError, match="disk full"):
        trained.save(path)
    assert path.read_bytes() == before


def test_a_scope_inside_another_module_is_checked_too(trained):
    """As inside a Lightning module: the description is compared before the children are filled."""
    wrapper = nn.ModuleDict({"family": trained})
    target = nn.ModuleDict({"family": build(transform=standardize(), schedule=LinearSchedule(10))})
    with pytest.raises(ValueError, match="model with schedule LogSNRSchedule"):
        target.load_state_dict(wrapper.state_dict())
