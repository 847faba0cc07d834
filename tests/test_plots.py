"""Each plot takes axes and returns them, and shows what it says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.plots import plot_bound, plot_samples, plot_schedule
from pyro_diffusion.schedules import CosineSchedule, LogSNRSchedule


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
@pytest.mark.parametrize("num_particles", [1, 8])
def test_plot_bound(guide, num_particles, device):
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(6)))
    diffusion = diffusion.to(device)
    x_0 = torch.randn(5, 2, device=device)
    terms = elbo_terms(diffusion.model, getattr(diffusion, guide), x_0, num_particles=num_particles)
    _, ax = plt.subplots()
    assert plot_bound(terms, ax) is ax
    line, *_ = ax.containers[0]
    np.testing.assert_allclose(line.get_xdata(), [1, 2, 3, 4, 5])
    np.testing.assert_allclose(line.get_ydata(), terms.transition.mean(1).cpu(), rtol=1e-6)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    kind = "KL" if guide == "posterior_guide" else "log-ratio"
    assert any(label.startswith(kind) for label in labels)
    assert ax.get_xlabel()
    assert ax.get_ylabel() == "nats per datum"
    ax.figure.canvas.draw()
    assert plot_bound(terms) is not ax


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


@pytest.mark.parametrize("shape", [(7, 12), (0, 4, 3), (4, 3)])
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="'samples'.*got shape.*reshape"):
        plot_samples(torch.zeros(shape))
