r"""Coverage of a posterior's credible regions, for all coordinates together.

:func:`expected_coverage` takes truths and draws of a posterior for each. It measures distances to random
points, in a space where each coordinate is scaled.

References:
    Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023).
    https://arxiv.org/abs/2302.03026
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.checks import as_numbers, check_finite, require
from pyro_diffusion.diagnostics.calibration import randomized_pit


def expected_coverage(theta: Tensor, draws: Tensor, *, references: Tensor | None = None) -> Tensor:
    r"""Credibility of each truth, by distances to a random point (TARP): uniform if the posterior is right.

    With truths :math:`\theta_n`, draws :math:`\theta_n^{(s)}` of a posterior given :math:`x_n`, and a
    reference point :math:`r_n` for each,

    .. math::
        d_n(\theta) = \sum_i \Big(\frac{\theta_i - r_{ni}}{w_i}\Big)^2, \qquad
        u_n = \frac{\#\{s : d_n(\theta_n^{(s)}) < d_n(\theta_n)\}
            + U_n\,(1 + \#\{s : d_n(\theta_n^{(s)}) = d_n(\theta_n)\})}{S + 1},

    with :math:`U_n` uniform in (0, 1). The ball around :math:`r_n` that reaches to the truth is a credible
    region, and :math:`u_n` is its probability. The *expected coverage* at credibility :math:`1 - \alpha` is
    the share of data with :math:`u_n \le 1 - \alpha`: the empirical distribution function of :math:`u`. It
    is :math:`1 - \alpha` for the right posterior. :func:`~pyro_diffusion.plots.plot_pit` draws the
    difference.

    **Scale.** The width :math:`w_i` of a coordinate is the distance from the 5 % to the 95 % quantile of its
    truths. Reference points are drawn in the scaled space, uniformly in the box of these quantiles. Without
    scaling, the coordinate with the largest numbers would decide all distances, and errors in the others
    would go unseen.

    **Side.** Each coordinate of a reference point is then mirrored to one side of the mean of
    :math:`\theta_n, \theta_n^{(1)}, \dots, \theta_n^{(S)}`. The side is drawn once for all data. Otherwise
    the effects of a constant shift on data to the left and to the right of their reference points would
    cancel. The mean treats the truth like a draw, so that :math:`u_n` stays uniform for the right posterior.
    Shifts of several coordinates can still cancel one another: rank the coordinates as well, by
    :func:`~pyro_diffusion.diagnostics.calibration.randomized_pit`.

    **How to read it.** A posterior that is too narrow has too many :math:`u_n` near 1, and near 0 too where
    it is narrow beside the prior: the coverage at a high credibility is too low. A posterior that is too wide
    has too few there: the coverage is too high. A shift moves the :math:`u_n` towards one end.

    **What uniform values do not show.** If reference points do not depend on :math:`x`, some wrong posteriors
    pass. The prior is one: the truth and the draws are then draws of one distribution, so that each rank is
    equally likely. It also passes the ranks of coordinates and of its own density. Only coverage for all
    functions :math:`r(x)` implies that the posterior is right (the theorem of Lemos et al.). So pass
    ``references`` that depend on the observation, such as a rough estimate of :math:`\theta` from :math:`x`,
    and compare the log score, the mean of :math:`\log q(\theta_n \mid x_n)` in nats per datum, with that of
    other posteriors and of the prior. The right posterior has the largest expected log score.

    Args:
        theta: Truths, shape ``(N,)`` + event shape: parameters drawn from the prior, each with its own
            observation.
        draws: Draws of the posterior for each, shape ``(S, N)`` + event shape.
        references: Reference points in the user's units, of the shape of ``theta``; they are used as they
            are. They may depend on the observations, and not on the truths. By default they are drawn as
            above.

    Returns:
        :math:`u_n` in (0, 1), shape ``(N,)``, float64, on the CPU. For the right posterior they are uniform
        and independent, up to an effect of order 1/N of the box and the widths, which come from the truths.

    Raises:
        ValueError: Shapes that do not fit, no draws, numbers that are NaN or infinite, or a coordinate whose
            two quantiles are the same.

    Example:
        >>> theta = torch.randn(500, 2)
        >>> x = theta + torch.randn(500, 2)
        >>> draws = torch.distributions.Normal(x / 2, 0.5**0.5).sample((99,))
        >>> credibility = expected_coverage(theta, draws)
        >>> credibility.shape
        torch.Size([500])
        >>> of_the_prior = expected_coverage(theta, torch.randn(99, 500, 2), references=x)
        >>> (of_the_prior <= 0.5).double().mean() > 0.6  # 0.5 would be right
        tensor(True)

    References:
        Sampling-Based Accuracy Testing of Posterior Estimators for General Inference (Lemos et al., 2023).
        https://arxiv.org/abs/2302.03026
    """
    theta, draws = _finite("theta", theta), _finite("draws", draws)
    shape = tuple(theta.shape)
    require(
        theta.numel() > 0 and theta.dim() > 0 and len(shape) + 1 == draws.dim()
        and tuple(draws.shape[1:]) == shape and len(draws) > 0,
        "argument 'draws'", f"shape {tuple(draws.shape)} for truths of shape {shape}",
        "(S, N) + event shape and (N,) + event shape, with at least one draw for each truth",
        "Draw S times from the posterior of each observation.",
    )  # fmt: skip
    low, width = _box(theta)

    def scaled(x: Tensor) -> Tensor:
        """Numbers in units of their coordinate's width."""
        return (x.double() - low) / width

    if references is None:
        at = _mirrored(torch.rand(shape, dtype=torch.float64), scaled(theta), draws, scaled)
    else:
        references = _finite("references", references)
        require(
            tuple(references.shape) == shape, "argument 'references'",
            f"shape {tuple(references.shape)} for truths of shape {shape}", "the same shape",
            "Pass one reference point for each truth, or none.",
        )  # fmt: skip
        at = scaled(references)

    def distance(x: Tensor) -> Tensor:
        """Squared distance to the reference points, ``(N,)``."""
        return (scaled(x) - at).reshape(len(theta), -1).square().sum(1)

    return randomized_pit(distance(theta), torch.stack([distance(x) for x in draws]))


def _mirrored(
    at: Tensor, theta: Tensor, draws: Tensor, scaled: Callable[[Tensor], Tensor]
) -> Tensor:
    """Reference points, each on the same side of its draws: a side for each coordinate, at random.

    The middle is the mean of the truth and its draws, which treats all of them alike. A reference point that
    depended on the draws alone would make the truth's rank uneven.
    """
    middle = (theta + scaled(draws.mean(0, dtype=torch.float64)) * len(draws)) / (len(draws) + 1)
    side = torch.randint(2, at.shape[1:]) * 2 - 1
    return middle + side * (at - middle).abs()


def _finite(name: str, values: Any) -> Tensor:
    remedy = "Leave out simulations that failed, together with their draws."
    return check_finite(f"argument {name!r}", as_numbers(name, values).detach().cpu(), remedy)


def _box(theta: Tensor) -> tuple[Tensor, Tensor]:
    """The 5 % quantile of each coordinate, and the distance from it to the 95 % quantile."""
    ordered = theta.double().sort(0).values
    tail = round(0.05 * (len(theta) - 1))
    low, high = ordered[tail], ordered[-1 - tail]
    flat = (high <= low).reshape(-1)
    require(
        not flat.any(), "argument 'theta'",
        f"the same number at the 5 % and the 95 % quantile of coordinate {flat.nonzero()[:1].sum()}",
        "a spread in each coordinate, by which distances are scaled",
        "Leave that coordinate out of theta and of the draws.",
    )  # fmt: skip
    return low, high - low
