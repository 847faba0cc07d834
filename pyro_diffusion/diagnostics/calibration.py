r"""Calibration of draws: ranks of the truth among draws, and latent numbers that depend on the datum.

:func:`simulation_based_calibration` tests whether a guide *is* the posterior of its model:

.. math::
    x_{0:T} \sim p, \quad x_{1:T}^{(s)} \sim q(\cdot \mid x_0) \;\Rightarrow\;
    \operatorname{rank}\big(f(x_{0:T})\big) \text{ among } f(x_0, x_{1:T}^{(s)}) \text{ is uniform if } q
    = p(\cdot \mid x_0).

:func:`randomized_pit` takes draws from anywhere. With the parameters of simulations as the truths, and draws
of a posterior for each, it tests whether the posterior is calibrated, coordinate by coordinate.

References:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).
    https://arxiv.org/abs/1804.06788
    Importance Weighted Autoencoders (Burda et al., 2016), section 5.2 (active units).
    https://arxiv.org/abs/1509.00519
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import check_count, check_data, require
from pyro_diffusion.diagnostics.recording import (
    Record,
    as_numpy,
    joined,
)
from pyro_diffusion.family import Family, Pair, programs
from pyro_diffusion.given import Given, chunks, repeated, together
from pyro_diffusion.reading import reading
from pyro_diffusion.walk import ROWS


def simulation_based_calibration(
    family: Pair,
    statistic: Callable[[dict[str, Tensor]], Tensor],
    *,
    num_simulations: int | None = None,
    num_draws: int = 99,
    batch_size: int = ROWS,
    context: Any = None,
    null: Tensor | None = None,
) -> Tensor:
    r"""Rank each draw of the model among draws of the guide: uniform if the guide is the posterior.

    The model draws a trajectory :math:`x_{0:T}`, and the guide draws trajectories for the same
    :math:`x_0`. If the guide is the posterior, all of them have the same distribution.

    Args:
        family: A model with its guide, or a (model, guide) pair whose model can be run as
            ``model(num_samples=n)``.
        statistic: One number for each row of a trajectory, ``statistic(states)`` of shape ``(n,)``:
            ``states["x_t"]`` has shape ``(n,)`` + the shape of a state, ``states["x_0"]`` is the datum.
            Choose it before you look at the results.
        num_simulations: Number of trajectories that the model draws, ``n``. By default 1000, and with a
            context the number of its rows.
        num_draws: Number of trajectories that the guide draws for each of them.
        batch_size: Number of trajectories that the guide draws at a time.
        context: Context of conditional data, a row for each simulation: a tensor, or a tuple or dictionary
            of tensors, ``(n, …)``. The model draws :math:`x_{0:T} \mid c`, and the guide gets the same
            rows. Pass contexts as they occur in the data.
        null: Rows whose context is dropped, boolean, ``(n,)``.

    Returns:
        Randomised ranks in (0, 1), shape ``(n,)``, float64. They are uniform and independent if
        :math:`q(x_{1:T} \mid x_0) = p(x_{1:T} \mid x_0)`. The converse does not hold: uniform ranks of one
        statistic do not show that the guide is exact. :func:`~pyro_diffusion.plots.plot_pit` draws them.

    Raises:
        ValueError: A model without the site ``x_0``; a statistic that is no function, gives more than one
            number for a trajectory, or is the same for every draw of the guide; a context with another
            number of rows than there are simulations.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(1), torch.ones(1), LogSNRSchedule(5))
        >>> pit = simulation_based_calibration(
        ...     DiffusionModel(denoiser), lambda states: states["x_3"][:, 0], num_simulations=50
        ... )
        >>> pit.shape
        torch.Size([50])
    """
    model, guide = programs(family)
    given = Given.of(context=context, null=null)
    num_simulations = _simulations(num_simulations, given)
    num_draws, batch_size = _counts(num_draws=num_draws, batch_size=batch_size)
    require(
        callable(statistic), "argument 'statistic'", repr(statistic), "a function of the states",
        "Pass lambda states: states['x_1'].mean(-1), say.",
    )  # fmt: skip
    with reading(model, guide, data=(given.context, given.null)):
        simulated = Record().of(model, num_samples=num_simulations, **given.arguments())
        require(
            "x_0" in simulated, "argument 'family'", f"a model with the sites {', '.join(simulated)}",
            "the datum at site 'x_0'", "Rename the site.",
        )  # fmt: skip
        truth = _checked(statistic(simulated), num_simulations)
        rows = together(lambda x: repeated(x, num_draws), simulated["x_0"], given)
        draws = [
            statistic(Record().of(guide, x_0, **own.arguments()) | {"x_0": x_0})
            for _, x_0, own in chunks(*rows, batch_size)
        ]
    ranked = torch.cat(draws).reshape(num_draws, num_simulations)
    require(
        not (ranked == truth).all(), "argument 'statistic'",
        "one that is the same for every draw of the guide, which fits any guide",
        "one that depends on latent states", "Use states['x_1'], say, and not the datum alone.",
    )  # fmt: skip
    return randomized_pit(truth, ranked)


def _simulations(number: int | None, given: Given) -> int:
    """The number of simulations: as given, or a row of the context each, or 1000."""
    parts = [x for x in pytree.tree_leaves((given.context, given.null)) if isinstance(x, Tensor)]
    rows = [len(part) for part in parts if part.dim()]
    require(
        len(rows) == len(parts), "argument 'context'", "a tensor without rows",
        "a row for each simulation", "Expand a context that all simulations share.",
    )  # fmt: skip
    if number is None:
        number = rows[0] if rows else 1000
    number = check_count("num_simulations", number, 1, "Leave it out.")
    require(
        set(rows) <= {number}, "argument 'context'",
        f"{' and '.join(map(str, sorted(set(rows))))} rows for {number} simulations",
        "a row for each simulation",
        "Expand a context that all simulations share, and leave num_simulations out.",
    )  # fmt: skip
    return number


def _counts(**counts: Any) -> list[int]:
    return [check_count(name, number, 1, "Leave it out.") for name, number in counts.items()]


def _checked(truth: Tensor, count: int) -> Tensor:
    require(
        truth.shape == (count,), "argument 'statistic'",
        f"values of shape {tuple(truth.shape)} for {count} trajectories", "one number for each",
        "Reduce event dimensions, as in lambda states: states['x_1'].mean(-1).",
    )  # fmt: skip
    return truth


def randomized_pit(observed: Tensor, draws: Tensor) -> Tensor:
    r"""Randomised rank of each observation among draws of a model: uniform if the model is right.

    .. math::
        u_n = \frac{\#\{s : y_{sn} < y_n\} + U_n\,(1 + \#\{s : y_{sn} = y_n\})}{S + 1}.

    Coordinates are ranked one by one. With parameters :math:`\theta_n` that were drawn from a prior, data
    :math:`x_n` simulated from them, and draws of a posterior given each :math:`x_n`, these are the ranks of
    simulation-based calibration, for each parameter. The rank of the posterior's own density says how often
    regions of highest density contain the truth: ``randomized_pit(log_q(theta), log_q(draws))``, where
    :math:`u_n` is one minus the probability of the smallest such region that contains :math:`\theta_n`.

    Args:
        observed: Observations :math:`y_n`, shape ``(N,)``, or ``(N, P)`` for ``P`` coordinates. They may be
            counts or other discrete numbers.
        draws: Draws :math:`y_{sn}` of the model, shape ``(S, N)`` or ``(S, N, P)``. Each observation needs
            draws of its own, because ranks among shared draws depend on one another. For the first entry of
            the data pass ``model.sample(S * N)[:, 0].reshape(S, N)``. Do not pass reconstructions, because
            they depend on the datum.

    Returns:
        :math:`u_n`, float64, of the shape of ``observed``. Values of one coordinate are independent, values
        of one observation are not: test each coordinate ``u[:, i]`` by itself. If ``P`` tests are made, the
        smallest p-value counts ``P`` times.

    Raises:
        ValueError: Shapes that do not fit, or NaN.

    Example:
        A posterior that is right, of two parameters given their noisy measurement:

        >>> theta = torch.randn(500, 2)
        >>> x = theta + torch.randn(500, 2)
        >>> posterior = torch.distributions.Normal(x / 2, 0.5**0.5)
        >>> draws = posterior.sample((99,))
        >>> randomized_pit(theta, draws).shape  # of each parameter
        torch.Size([500, 2])
        >>> log_q = lambda theta: posterior.log_prob(theta).sum(-1)
        >>> randomized_pit(log_q(theta), log_q(draws)).shape  # of the density
        torch.Size([500])

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).
        https://arxiv.org/abs/1804.06788
    """
    uniform = torch.rand(observed.shape, dtype=torch.float64)
    return torch.as_tensor(
        arviz_bridge.randomized_pit(as_numpy(observed), as_numpy(draws), as_numpy(uniform))
    )


def active_units(
    guide: Family | Callable[..., Any],
    x_0: Tensor,
    *,
    num_particles: int = 16,
    threshold: float = 0.01,
    **given: Any,
) -> dict[str, Tensor]:
    r"""Find the latent numbers that depend on the datum: :math:`E_q[x_{t,i} \mid x_0]` varies over data.

    The expectation is a mean over ``num_particles`` draws. The noise of these means is subtracted from their
    variance over data. A number is active if the rest exceeds both the threshold and three standard errors
    of the noise.

    Args:
        guide: Program for :math:`q`, called as ``guide(x_0)``; or a family, whose guide is used.
        x_0: At least two data, shape ``(N,)`` + the shape of one datum.
        num_particles: Draws for each datum, at least 2.
        threshold: Variance above which a number is active.
        given: What goes with the data: ``mask=``, true where an entry is observed; ``context=``.

    Returns:
        For each latent site a boolean tensor of the latent's shape; its ``sum()`` is the number of active
        units.

    Raises:
        ValueError: Fewer than two data or particles, a program that observes data, or a site whose
            distribution has no mean.

    References:
        Importance Weighted Autoencoders (Burda et al., 2016), section 5.2.
        https://arxiv.org/abs/1509.00519
    """
    what = Given.of(**given)
    x_0 = check_data(x_0, what.mask)
    what = what.with_rows(len(x_0))
    guide = programs(guide)[1] if isinstance(guide, Family) else guide
    remedy = "Pass more: a variance over data is compared with the noise of its means."
    check_count("len(x_0)", len(x_0), 2, remedy)
    num_particles = check_count("num_particles", num_particles, 2, remedy)
    means = []
    with reading(guide, data=x_0):
        for _, data, own in chunks(x_0, what, max(ROWS // num_particles, 1)):
            record = Record(mean=True)
            means.append(record.of_particles(guide, data, num_particles, own))
            if record.observed:
                raise ValueError(
                    f"argument 'guide': got a program that observes {record.observed[0]!r}; expected a "
                    "guide, which only samples latents. Pass family.guide."
                )
    active = {}
    for name, x in joined(means, 1).items():
        noise = x.var(0).mean(0) / num_particles
        excess = x.mean(0).var(0) - noise
        active[name] = excess > (3 * noise * math.sqrt(2 / (len(x_0) - 1))).clamp(min=threshold)
    return active
