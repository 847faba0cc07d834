"""Terms of the bound drawn one by one where the guide knows its marginals: one bound, an honest error."""

import math

import pytest
import torch
from pyro import poutine
from torch import nn

from pyro_diffusion import (
    MLP,
    DataPrediction,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    GaussianMixtureDenoiser,
    HierarchicalVAE,
    LadderEncoder,
    LevelPrediction,
    LinearDecaySchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    Standardize,
    elbo_terms,
)


class Wrong(nn.Module):
    """An estimate of Gaussian data that is 20 % too large."""

    def __init__(self):
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(1.2, dtype=torch.float64))

    def forward(self, x_t, log_snr):
        return self.factor * torch.sigmoid(log_snr)[:, None].sqrt() * x_t


def reals(transform=None, num_timesteps=6):
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=4.0)
    denoiser = NeuralDenoiser(Wrong(), schedule, (2,), prediction=DataPrediction())
    return DiffusionModel(denoiser, transform=transform)


def levels():
    network = MLP((2,), hidden_size=8, num_blocks=1, num_outputs=5).double()
    schedule = LogSNRSchedule(6, log_snr_max=3.0)
    return DiffusionModel(NeuralDenoiser(network, schedule, (2,), prediction=LevelPrediction(5)))


def discretized():
    network = MLP((2,), hidden_size=8, num_blocks=1).double()
    denoiser = NeuralDenoiser(network, LogSNRSchedule(6, log_snr_max=3.0), (2,))
    return DiffusionModel(denoiser, DiscretizedGaussianLikelihood(5))


def bits():
    network = MLP((2,), hidden_size=8, num_blocks=1).double()
    return DiffusionModel(NeuralBernoulliDenoiser(network, LinearDecaySchedule(6), (2,)))


MODELS = {
    "reals": reals,
    "units": lambda: reals(Standardize([1.0, 2.0], [3.0, 4.0])),
    "one step": lambda: reals(num_timesteps=1),
    "levels": levels,
    "discretized": discretized,
    "bits": bits,
}


def data(kind):
    whole = {"levels": 5, "discretized": 5, "bits": 2}
    return torch.randint(whole[kind], (4, 2)) if kind in whole else torch.randn(4, 2).double()


@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("kind", MODELS)
def test_the_terms_are_those_of_whole_paths(kind, masked):
    """Every term of every datum, within the errors of both; with gaps as well."""
    diffusion, x_0 = MODELS[kind](), data(kind)
    if masked and kind == "bits":
        pytest.skip("whatever stood in the gap would be a state")
    given = {"mask": torch.tensor([[True, False], [False, True]] * 2)} if masked else {}
    single = elbo_terms(diffusion, x_0, num_particles=600, **given)
    programs = (poutine.scale(p, 1.0) for p in (diffusion.model, diffusion.posterior_guide))
    paths = elbo_terms(*programs, x_0, num_particles=600, **given)
    assert (single.draws, paths.draws) == ("single", "paths")
    assert single[6:8] == (paths.site_names, paths.event_size)
    assert single.kinds == paths.kinds
    ours, theirs = (
        torch.cat((terms.reconstruction[None], terms.transition, terms.prior[None]))
        for terms in (single, paths)
    )
    error = (single.term_standard_error**2 + paths.term_standard_error**2).sqrt()
    assert ((ours - theirs).abs() < 5 * error + 1e-9).all()
    total = (single.standard_error**2 + paths.standard_error**2).sqrt()
    assert ((single.elbo - paths.elbo).abs() < 5 * total + 1e-9).all()


def test_the_error_of_the_sum_is_what_repeats_scatter_by():
    """Of 4,000 estimates of one datum's bound; that of the mean follows from it."""
    diffusion, x_0 = reals(), torch.tensor([[0.5, -1.0]]).double().expand(4000, 2)
    terms = elbo_terms(diffusion, x_0, num_particles=4)
    claimed = terms.standard_error.square().mean().sqrt()
    assert (terms.elbo.std() / claimed - 1).abs() < 0.05
    for t in range(len(terms.kinds) - 1):
        values = terms.transition[t - 1] if t else terms.reconstruction
        claimed = terms.term_standard_error[t].square().mean().sqrt()
        assert (values.std() / claimed - 1).abs() < 0.1


def test_what_has_no_single_terms_is_read_off_paths():
    """Log-ratios; kernels without a KL, whose paths are exact; a hierarchical VAE; programs of one's own."""
    x_0 = torch.randn(3, 2).double()
    diffusion = reals()
    assert elbo_terms(diffusion, x_0).draws == "single"
    assert diffusion.posterior_guide.knows_marginals()
    assert not diffusion.guide.knows_marginals()
    assert elbo_terms(diffusion, x_0, analytic_kl=False).draws == "paths"
    assert elbo_terms(diffusion.model, diffusion.guide, x_0).draws == "paths"
    means = torch.randn(3, 2).double()
    mixture = DiffusionModel(
        GaussianMixtureDenoiser(
            torch.ones(3), means, 0.5, LogSNRSchedule(6, log_snr_max=6.0, log_snr_min=-40.0)
        )
    )
    terms = elbo_terms(mixture, x_0, num_particles=2)
    assert terms.draws == "paths"
    assert (terms.standard_error < 1e-6).all()
    encoder = LadderEncoder((2,), (2,), hidden_size=8)
    vae = HierarchicalVAE((2,), (2,), encoder=encoder, hidden_size=8)
    assert elbo_terms(vae, x_0.float()).draws == "paths"
    assert elbo_terms(diffusion, x_0).to_dataset().attrs["draws"] == "single"


def test_network_rows_are_those_of_the_terms():
    """K T N of them, in batches of the size asked for; two more measure a step."""
    diffusion, rows = reals(), []
    diffusion.denoiser.network.register_forward_hook(lambda m, args, out: rows.append(len(out)))
    elbo_terms(diffusion, torch.randn(10, 2).double(), num_particles=3, batch_size=64)
    assert sum(rows) == 3 * 6 * 10 + 1  # and a row that looks for the formula of a KL
    assert max(rows) <= 64


def test_a_single_particle_has_no_error():
    terms = elbo_terms(reals(), torch.randn(3, 2).double(), num_particles=1)
    assert terms.standard_error.isnan().all()
    assert math.isnan(terms.mean().monte_carlo_error)
