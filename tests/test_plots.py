"""Each plot takes axes and returns them, and shows what it says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.plots import (
    plot_bound,
    plot_denoised,
    plot_samples,
    plot_schedule,
    plot_training,
    plot_trajectory,
)
from pyro_diffusion.schedules import CosineSchedule, LogSNRSchedule


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("num_particles", [1, 8])
def test_plot_bound(guide, num_particles, device):
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(12)))
    diffusion = diffusion.to(device)
    x_0 = torch.randn(5, 2, device=device)
    terms = elbo_terms(diffusion.model, getattr(diffusion, guide), x_0, num_particles=num_particles)
    _, ax = plt.subplots()
    assert plot_bound(terms, ax) is ax
    line, *_ = ax.containers[0]
    np.testing.assert_allclose(line.get_xdata(), np.arange(1, 12))
    np.testing.assert_allclose(line.get_ydata(), terms.transition.mean(1).cpu(), rtol=1e-6)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    kind = "KL" if guide == "posterior_guide" else "log-ratio"
    assert any(label.startswith(kind) for label in labels)
    assert ax.get_xlabel()
    assert ax.get_ylabel() == "nats per datum"
    ax.figure.canvas.draw()
    assert plot_bound(terms) is not ax


@pytest.mark.parametrize("encoder", [None, LadderEncoder((2,), (3, 2), hidden_size=8)])
@pytest.mark.parametrize("num_particles", [1, 8])
def test_plot_bound_of_a_few_levels(encoder, num_particles):
    """Bars for all of them, the top included, coloured by what they are."""
    vae = HierarchicalVAE((2,), (3, 2), encoder=encoder, hidden_size=8)
    terms = elbo_terms(vae.model, vae.guide, torch.randn(5, 2), num_particles=num_particles)
    ax = plot_bound(terms)
    heights = [patch.get_height() for patch in ax.patches]
    np.testing.assert_allclose(heights, [term.value for term in terms.term_means()[1:]])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert ("log-ratio at $x_t$" in labels) == (encoder is None)
    assert "KL at $x_t$" in labels
    ax.figure.canvas.draw()


def test_plot_schedule(device):
    schedule = CosineSchedule(100).to(device)
    _, axes = plt.subplots(1, 2)
    assert plot_schedule(schedule, axes) is axes
    t = torch.arange(1, 101, device=device)
    log_snr, alpha_bar = (ax.get_lines()[0].get_ydata() for ax in axes)
    np.testing.assert_allclose(log_snr, schedule.log_snr(t).cpu())
    np.testing.assert_allclose(alpha_bar, schedule.alpha_bar(t).cpu())
    assert len(plot_schedule(LogSNRSchedule(3))) == 2


def test_plot_samples(device):
    images = torch.arange(7 * 4 * 3, device=device).reshape(7, 4, 3)
    axes = plot_samples(images, images + 1)
    assert [ax.get_title() for ax in axes] == ["samples", "data"]
    sheet = axes[0].get_images()[0].get_array()
    assert sheet.shape == (3 * 5 - 1, 3 * 4 - 1)
    np.testing.assert_array_equal(sheet[:4, :3], images[0].cpu())
    np.testing.assert_array_equal(sheet[5:9, 4:7], images[4].cpu())
    _, ax = plt.subplots()
    assert plot_samples(images, axes=ax)[0] is ax


@pytest.mark.parametrize("event_shape", [(), (1,), (2,), (4, 3), (7,), (2, 2, 2)])
@pytest.mark.parametrize("plot", [plot_trajectory, plot_denoised])
def test_plots_of_states(plot, event_shape, device):
    denoiser = GaussianDenoiser(torch.zeros(event_shape), 0.5, LogSNRSchedule(20))
    diffusion = DiffusionModel(denoiser).to(device)
    x_0 = torch.randn(5, *event_shape, device=device)
    axes = plot(diffusion, x_0)
    assert axes.shape == (2, 6)
    assert "$t = 20$" in axes[0, -1].get_title()
    axes[0, 0].figure.canvas.draw()
    if event_shape == (1,):
        assert any(bar.get_height() > 0 for bar in axes[0, 0].patches)
    if event_shape in [(1,), (2,)]:
        assert len({ax.get_xlim() for ax in axes.flat}) == 1
    _, given = plt.subplots(2, 2, squeeze=False)
    assert plot(diffusion, x_0, timesteps=[1, 20], axes=given) is given
    if event_shape == (4, 3) and plot is plot_denoised:  # little noise: the estimate is the datum
        sheet = np.asarray(given[1, 0].get_images()[0].get_array())
        np.testing.assert_allclose(sheet[:4, :3], x_0[0].cpu(), atol=0.2)
    for wrong in ([21], [-1, 3], [], [1.5]):
        with pytest.raises(ValueError, match="'timesteps': got"):
            plot(diffusion, x_0, timesteps=wrong)


@pytest.mark.parametrize("reconstruction", [-50.0, 3.0])
def test_plot_training(reconstruction):
    history = {step: torch.linspace(1, 2, 11) * step for step in (100, 200, 300)}
    for terms in history.values():
        terms[0] = reconstruction
    ax = plot_training(history)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert any("prior" in label for label in labels)
    assert sum(label.startswith("$x_{") and "prior" not in label for label in labels) == 5
    assert "$x_{9}$" in labels  # a block of one
    total = {line.get_label(): line for line in ax.get_lines()}["$-$ELBO"]
    expected = [float(terms[1:].sum()) - reconstruction for terms in history.values()]
    np.testing.assert_allclose(total.get_ydata(), expected, rtol=1e-6)
    stack = len(ax.collections)
    assert stack == (7 if reconstruction < 0 else 6)
    _, given = plt.subplots()
    assert plot_training({1: [0.0, 1.0], 2: [0.0, 1.0]}, given) is given
    for wrong in ({}, {1: [0.0, 1.0]}, {1: [0.0, 1.0], 2: [0.0]}):
        with pytest.raises(ValueError, match="'history': got"):
            plot_training(wrong)


@pytest.mark.parametrize("shape", [(7, 12), (0, 4, 3), (4, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="'samples'.*got shape.*reshape"):
        plot_samples(torch.zeros(shape))
