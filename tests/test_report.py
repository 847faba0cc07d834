"""The summary of one model: groups, bounds and estimates, and what happens if they disagree."""

import pyro
import pytest
import torch

from pyro_diffusion import (
    AlphaSchedule,
    BernoulliDiffusion,
    BernoulliLikelihood,
    DiffusionModel,
    EnumeratedDenoiser,
    Estimate,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LinearDecaySchedule,
    LogSNRSchedule,
    summary,
)
from pyro_diffusion.evidence import Summary, SummaryRow


@pytest.mark.parametrize("name", ["gaussian", "mixture"])
def test_on_oracles_all_groups_agree(name):
    pyro.set_rng_seed(0)
    schedule = LogSNRSchedule(30, log_snr_max=14.0, log_snr_min=-20.0)
    if name == "gaussian":
        denoiser = GaussianDenoiser(
            torch.zeros(1).double(), torch.full((1,), 0.5).double(), schedule
        )
    else:
        means = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
        denoiser = GaussianMixtureDenoiser([0.3, 0.7], means, 0.4, schedule)
    x_0 = denoiser.data_distribution.sample((40,))
    result = summary(DiffusionModel(denoiser), x_0, standard_error=0.2, num_particles=32)
    truth = denoiser.data_distribution.log_prob(x_0).mean().item()
    assert list(result.groups()) == ["chain, T = 30", "chain, T → ∞", "probability flow"]
    for row in result.rows:
        assert abs(row.value.value - truth) < 5 * row.value.monte_carlo_error + 1e-3, row
        assert row.reliable == 40
    assert [row.kind for row in result.rows] == [
        "bound",
        "estimate",
        "estimate",
        "bound",
        "estimate",
    ]
    assert "probability flow\n  estimate" in str(result)


def test_what_does_not_apply_is_left_out():
    pyro.set_rng_seed(0)
    bits = EnumeratedDenoiser(torch.eye(3), LinearDecaySchedule(5))
    result = summary(BernoulliDiffusion(bits), torch.eye(3).repeat(10, 1), standard_error=0.1)
    assert [row.model for row in result.rows] == ["chain, T = 5"] * 2 + ["chain, T → ∞"]
    alpha = AlphaSchedule([0.9, 0.5, 0.01])
    gaussian = GaussianDenoiser(torch.zeros(2), torch.ones(2), alpha)
    masses = DiffusionModel(gaussian, BernoulliLikelihood())
    result = summary(masses, torch.ones(10, 2), standard_error=0.1)
    assert [row.model for row in result.rows] == ["chain, T = 3"] * 3
    result = summary(masses.strided([1, 3]), torch.ones(10, 2), standard_error=0.1)
    assert [row.model for row in result.rows] == ["chain, T = 2"] * 3


def row(kind, value, error=0.01, reliable=10):
    return SummaryRow(
        "chain, T = 3", f"{kind} {value}", kind, Estimate(value, error, 0.1), reliable, 10
    )


@pytest.mark.parametrize(
    "rows",
    [
        (row("estimate", -1.0), row("estimate", -1.2)),
        (row("bound", -0.8), row("estimate", -1.0)),
        (row("estimate", -1.0), row("estimate", -0.8, reliable=3)),
    ],
)
def test_disagreement_raises(rows):
    with pytest.raises(ValueError, match=r"chain, T = 3: got -0\.|chain, T = 3: got -1"):
        Summary(rows).check()


def test_agreement_does_not():
    Summary((row("bound", -1.3), row("estimate", -1.0), row("estimate", -1.04))).check()
    Summary((row("estimate", -1.0), row("estimate", -5.0, reliable=3))).check()
