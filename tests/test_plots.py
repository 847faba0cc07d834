"""Each plot takes axes and returns them, and shows what it says."""

import math

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from pyro_diffusion.bounds import ELBOTerms, elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.evidence import average
from pyro_diffusion.hvae import HierarchicalVAE, LadderEncoder
from pyro_diffusion.plots import (
    plot_bound,
    plot_denoised,
    plot_khat,
    plot_pit,
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


@pytest.mark.parametrize("shape", [(5, 3, 4, 6), (5, 4, 6, 3), (5, 1, 4, 6), (5, 4, 6, 1)])
def test_channels_are_colours(shape, device):
    images = torch.rand(shape, device=device)
    ax, _ = plot_samples(images, images)
    sheet = ax.get_images()[0].get_array()
    colours = () if 1 in shape[1:] else (3,)
    assert sheet.shape == (2 * 5 - 1, 3 * 7 - 1, *colours)
    low, high = images.min().item(), images.max().item()
    last = images.cpu().movedim(1 if shape[1] in (1, 3) else 3, -1)
    shown = (last[0] - low) / (high - low) if colours else last[0, ..., 0]
    np.testing.assert_allclose(sheet[:4, :6], shown, rtol=1e-5, atol=1e-6)


def test_points_numbers_and_vectors(device):
    """Points as they are, numbers counted, few vectors as curves and many as rows; data on one scale."""
    points = torch.randn(50, 2, device=device)
    axes = plot_samples(points, points[:70] + 3)
    offsets = axes[0].collections[0].get_offsets()
    np.testing.assert_allclose(offsets, points.cpu())
    assert axes[0].get_xlim() == axes[1].get_xlim() == axes[0].get_ylim()
    counts = torch.tensor([0, 1, 1, 3], device=device)
    ax, _ = plot_samples(counts, counts)
    assert [bar.get_height() for bar in ax.patches] == [1, 2, 0, 1]
    assert sum(bar.get_height() for bar in plot_samples(points[:, :1])[0].patches) == 50
    vectors = torch.randn(30, 7, device=device)
    lines = plot_samples(vectors)[0].get_lines()
    np.testing.assert_allclose([line.get_ydata() for line in lines], vectors.cpu())
    bits = torch.randint(2, (300, 7), device=device)
    for many, shown in (
        (bits, bits[:200]),
        (bits[:4], bits[:4]),
        (vectors.repeat(2, 1), vectors.repeat(2, 1)),
    ):
        strip = plot_samples(many, many)[1].get_images()[0].get_array()
        np.testing.assert_allclose(strip, shown.cpu())


def test_values_that_are_missing_are_no_reason_to_fail():
    x = torch.randn(40, 5)
    x[0, 0], x[1, 1] = math.nan, math.inf
    for samples in (
        x,
        x[:10],
        x[:, :2],
        x[:, 0],
        x.reshape(-1, 5, 5),
        x[:3] * math.nan,
    ):
        plot_samples(samples)[0].figure.canvas.draw()


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


@pytest.mark.parametrize("shape", [(0, 4, 3), (), (3, 0)])
def test_nothing_to_show_is_refused(shape):
    with pytest.raises(ValueError, match="'samples'.*got shape.*reshape"):
        plot_samples(torch.zeros(shape))


def test_data_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"'data': got shape \(4, 3\) beside samples of \(2,\)"):
        plot_samples(torch.zeros(4, 2), torch.zeros(4, 3))


# ---------------------------------------------------------------- where the nats go


def written(reconstruction, transition, prior, num_data=6):
    """Terms that are the numbers given, with a spread over data of mean zero."""
    spread = torch.linspace(-0.1, 0.1, num_data).double()
    transition = torch.tensor(transition).double()[:, None] + spread
    last = len(transition) + 1
    return ELBOTerms(
        reconstruction + spread, transition, prior + spread, torch.zeros(num_data),
        torch.zeros(last + 1, num_data), ("log-likelihood", *["KL"] * last),
        tuple(f"x_{t}" for t in range(last + 1)), 2.0,
    )  # fmt: skip


@pytest.mark.parametrize("reconstruction", [-2.0, 5.0])
def test_the_stack_sums_up(reconstruction):
    """C_t by hand: the reconstruction loss, then each term, and the prior term on top."""
    terms = written(reconstruction, [1.0, 2.0, 3.0], 0.5)
    ax = plot_bound(terms, cumulative=True)
    total = max(ax.get_lines(), key=lambda line: len(line.get_xdata()))
    loss = -reconstruction
    expected = [loss, loss, loss + 1, loss + 3, loss + 6, loss + 6.5, loss + 6.5]
    np.testing.assert_allclose(total.get_ydata(), expected)
    np.testing.assert_allclose(total.get_xdata()[1:6], [1, 2, 3, 4, 4])
    assert expected[-1] == pytest.approx(-terms.mean().value)
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    shares = ["(6%)", "(71%)", "(24%)"] if reconstruction < 0 else ["", "", ""]
    for label, number, share in zip(labels, ("0.5", "6", f"{loss:.3g}"), shares, strict=True):
        assert label.endswith(f": {number} {share}".strip())
    _, given = plt.subplots()
    assert plot_bound(terms, given, cumulative=True) is given


def test_nats_by_decade():
    """Terms of equal steps in the log-SNR, half a decade each: two to a decade."""
    decade = math.log(10)
    schedule = LogSNRSchedule(7, log_snr_max=2 * decade, log_snr_min=-decade)
    terms = written(-4.0, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.5)
    axes = plot_bound(terms, cumulative=True, schedule=schedule)
    bars = [patch.get_height() for patch in axes[1].patches]
    np.testing.assert_allclose(bars, [4, 3, 7, 11, 0.5])
    assert sum(bars) == pytest.approx(-terms.mean().value)
    assert axes[1].xaxis_inverted()  # from data to noise, as by timestep
    assert "signal-to-noise" in axes[1].get_xlabel()
    axes[0].figure.canvas.draw()
    shares = [text.get_text() for text in axes[1].texts]
    assert shares == ["16%", "12%", "27%", "43%", "2%"]


def test_steps_are_cut_at_decades():
    """One step over three decades and a half has its nats spread evenly over them."""
    decade = math.log(10)
    schedule = LogSNRSchedule(2, log_snr_max=1.5 * decade, log_snr_min=-2 * decade)
    axes = plot_bound(written(0.0, [7.0], 0.0), cumulative=True, schedule=schedule)
    bars = [patch.get_height() for patch in axes[1].patches]
    np.testing.assert_allclose(bars, [0, 1, 2, 2, 2, 0], atol=1e-12)


@pytest.mark.parametrize("num_timesteps", [1, 2, 300])
@pytest.mark.parametrize("num_data", [1, 5])
def test_sums_of_chains_of_any_length(num_timesteps, num_data, device):
    schedule = CosineSchedule(num_timesteps)
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), schedule)).to(device)
    x_0 = torch.randn(num_data, 2, device=device)
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x_0)
    axes = plot_bound(terms, cumulative=True, schedule=diffusion.schedule)
    total = sum(patch.get_height() for patch in axes[1].patches)
    assert total == pytest.approx(-terms.mean().value, rel=1e-5)
    axes[0].figure.canvas.draw()


def test_sums_of_levels():
    vae = HierarchicalVAE((2,), (3, 2), hidden_size=8)
    terms = elbo_terms(vae.model, vae.guide, torch.randn(5, 2), num_particles=4)
    plot_bound(terms, cumulative=True).figure.canvas.draw()


def test_wrong_settings_of_the_bound():
    terms = written(0.0, [1.0], 0.0)
    for settings, argument in (
        ({"schedule": LogSNRSchedule(2)}, "schedule"),
        ({"schedule": LogSNRSchedule(3), "cumulative": True}, "schedule"),
        ({"schedule": "linear", "cumulative": True}, "schedule"),
        ({"fmt": "o", "cumulative": True}, "fmt"),
    ):
        with pytest.raises(ValueError, match=f"argument '{argument}': got .*; expected"):
            plot_bound(terms, **settings)


# ---------------------------------------------------------------- one style


def pictures():
    """Every figure, as a list of its axes."""
    diffusion = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(12)))
    x_0 = torch.randn(40, 2)
    terms = elbo_terms(diffusion.model, diffusion.guide, x_0[:5], num_particles=2)
    drawn = {
        "bound": plot_bound(terms),
        "sums": plot_bound(terms, cumulative=True, schedule=diffusion.schedule),
        "training": plot_training({1: [-1.0, 1.0, 1.0], 2: [-1.0, 1.0, 1.0]}),
        "schedule": plot_schedule(diffusion.schedule),
        "points": plot_samples(x_0, x_0),
        "numbers": plot_samples(x_0[:, 0]),
        "lines": plot_samples(torch.randn(4, 5)),
        "strip": plot_samples(torch.randn(40, 5)),
        "trajectory": plot_trajectory(diffusion, x_0),
        "denoised": plot_denoised(diffusion, x_0),
        "khat": plot_khat(average(torch.randn(30, 8).double())),
        "pit": plot_pit(torch.rand(50)),
    }
    return {name: list(np.ravel(axes)) for name, axes in drawn.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_one_style_and_a_name_on_every_axis():
    """White under a dark style of the user's, whose settings are left as they were."""
    with plt.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        for name, axes in pictures().items():
            assert axes[0].figure.get_facecolor() == (1, 1, 1, 1), name
            grid = name in ("trajectory", "denoised")
            for ax in [axes[0], axes[-1]] if not grid else []:
                assert ax.get_xlabel(), name
                assert ax.get_ylabel(), name
            if grid:  # below and to the left
                assert all(ax.get_xlabel() for ax in axes[len(axes) // 2 :])
                assert "units" in axes[0].get_ylabel()
            if name not in ("khat", "pit"):
                axes[0].figure.canvas.draw()
                assert axes[0].xaxis.get_major_ticks()[0].label1.get_color() == "#222222"
        assert dict(matplotlib.rcParams) == before


def test_axes_that_are_given_keep_their_style():
    terms = written(0.0, [1.0] * 12, 0.0)
    with plt.style.context("dark_background"):
        _, ax = plt.subplots()
        plot_bound(terms, ax)
        assert ax.get_legend().get_texts()[0].get_color() == "white"
        plot_bound(terms, ax, cumulative=True)
    assert ax.figure.get_facecolor() == (0, 0, 0, 1)
    assert "white" in {line.get_color() for line in ax.get_lines()}


def test_the_legend_covers_nothing():
    terms = written(0.0, [1.0] * 12, 0.0)
    for ax in (
        plot_bound(terms),
        plot_bound(terms, cumulative=True),
        plot_bound(written(0.0, [1.0], 1.0)),
        plot_training({1: [-1.0, 1.0], 2: [-1.0, 1.0]}),
    ):
        ax.figure.canvas.draw()
        legend, frame = ax.get_legend().get_window_extent(), ax.get_window_extent()
        assert legend.x0 >= frame.x1
        assert legend.x1 <= ax.figure.bbox.x1
