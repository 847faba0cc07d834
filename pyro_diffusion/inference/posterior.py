r"""Draws of :math:`p(x_0)` times a likelihood, with the evidence, by independent runs of particles (E17)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from pyro_diffusion.checks import as_numbers, check_count, check_values, described, require
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.given import Given
from pyro_diffusion.inference.draws import PosteriorSamples
from pyro_diffusion.inference.functions import Function
from pyro_diffusion.inference.measurements import LinearGaussian
from pyro_diffusion.inference.runs import Runs
from pyro_diffusion.inference.targets import Target
from pyro_diffusion.reading import reading
from pyro_diffusion.walk import check_weights

__all__ = ["posterior_samples"]


def posterior_samples(
    diffusion: DiffusionModel,
    log_likelihood: Callable[[Tensor], Tensor] | LinearGaussian,
    num_samples: int,
    *,
    num_particles: int = 256,
    num_runs: int = 16,
    context: Any = None,
    tempering: Sequence[float] | Tensor | None = None,
    directions: int = 1,
    common_noise: bool = False,
    progress: bool = True,
) -> PosteriorSamples:
    r"""Draw from :math:`p(x_0 \mid y) \propto p_\theta(x_0)\, r(x_0)` by twisted sequential Monte Carlo.

    .. math::
        \log Z = \log \int p_\theta(x_0)\, r(x_0)\, dx_0, \qquad
        \log Z = \log p(y) \text{ for } r(x_0) = p(y \mid x_0) .

    Particles go from :math:`x_T` to :math:`x_0`. They are weighted and resampled by :math:`\psi_t(x_t)`, what
    the likelihood is expected to be at :math:`x_t`. :math:`\hat Z` is unbiased for every model;
    :math:`\log \hat Z` is low in expectation, by half its variance to first order. What :math:`\psi_t` knows
    decides how few particles suffice:

    - :class:`~pyro_diffusion.inference.LinearGaussian` measurements of real numbers, or of levels: the
      Gaussian closed form with the covariance :math:`\operatorname{Cov}[x_0 \mid x_t]`, for one
      vector-Jacobian product of the network a measured number.
    - A function of real numbers or of levels, which it must then take as real numbers: the same for its
      expansion to second order along its gradient at :math:`\hat x_0(x_t)`, and in further ``directions`` if
      asked for.
    - Another function, of categories, bits or whole numbers alone: the mean of :math:`\log r` over 8 draws of
      independent entries of :math:`x_0` given :math:`x_t`; the reverse kernels are the proposals.

    Args:
        diffusion: The model. Its parameters are read.
        log_likelihood: :math:`\log r`, a :class:`~pyro_diffusion.inference.LinearGaussian` or a function that
            maps data in the user's units, ``batch + event_shape``, to nats, ``batch``. If it holds ``N``
            observations it broadcasts: data of ``(K, 1) + event_shape`` give ``(K, N)``, and data of
            ``(K, N) + event_shape`` one number for each pair. Then there are ``N`` posteriors.
        num_samples: Number of draws, resampled from the particles of all runs by weight.
        num_particles: Particles :math:`K` of a run. With 1 nothing is corrected: the draws are those of
            guidance, one a run and ``num_samples`` runs, and the result calls itself biased.
        num_runs: Independent runs; their spread gives the errors. Two give a standard error; that of 16 is
            itself known to about a fifth.
        context: Context of conditional data: one row for all posteriors, or a row for each.
        tempering: Exponents of the likelihood by timestep, ``T`` numbers in (0, 1], entry ``t − 1`` for the
            factor by which :math:`x_t` is proposed (for a function without a gradient, weighted). Small ones
            at large ``t`` keep a sharp likelihood from deciding too early. The last weight is exact in any
            case.
        directions: Number of directions of the expansion of a function: the gradient, and
            directions in the range of the Hessian. Each costs a vector-Jacobian product of the network and a
            few evaluations of the function a step.
        common_noise: Whether all posteriors share their random numbers, so that differences of their evidence
            have small errors. Draws of levels, counts, categories and bits do not share them.
        progress: Show a progress bar if it takes more than five seconds.

    Returns:
        :class:`~pyro_diffusion.inference.PosteriorSamples`, with an axis of ``N`` after the draws if there
        are several observations or rows of context. A run takes :math:`K T` network rows a posterior, and as
        many vector-Jacobian products for each row of the expansion.

    Raises:
        ValueError: A log-likelihood that is NaN, flat, without a gradient, of another shape, or impossible
            for every particle; numbers below one; exponents outside (0, 1]; a context that does not fit.

    Warns:
        UserWarning: Fewer than ten effective particles at some timestep, for some posterior.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(1), torch.ones(1), LogSNRSchedule(20))
        >>> measured = LinearGaussian(torch.ones(1, 1), y=torch.ones(1), noise=1.0)
        >>> draws = posterior_samples(DiffusionModel(denoiser), measured, 100, num_particles=50)
        >>> draws.log_evidence  # N(1; 0, 2)
        tensor(-1.5155, dtype=torch.float64)

    References:
        Practical and Asymptotically Exact Conditional Sampling in Diffusion Models (Wu et al., 2023).
        https://arxiv.org/abs/2306.17775
        Tweedie Moment Projected Diffusions for Inverse Problems (Boys et al., 2024).
        https://arxiv.org/abs/2310.06721
    """
    diffusion = check_weights(check_diffusion(diffusion))
    directions = check_count("directions", directions, 1, "One is the gradient.")
    given = Given.of(context=context)
    tensors = [getattr(log_likelihood, name, None) for name in ("operator", "y", "noise")]
    with torch.inference_mode(False), reading(diffusion, data=(given, tensors)):
        target = _target(diffusion, log_likelihood, directions, context)
        rows = _rows(given, target.num_data)
        runs = Runs(
            diffusion,
            target.expanded(rows),
            num_samples,
            num_particles=num_particles,
            num_runs=num_runs,
            given=given.with_rows(rows, shared=True, device=diffusion.device),
            exponents=_exponents(diffusion, tempering),
            common_noise=common_noise,
            progress=progress,
        )
        return runs.posterior(single=rows == 1)


def _target(
    diffusion: DiffusionModel, log_likelihood: Any, directions: int, context: Any
) -> Target:
    if hasattr(log_likelihood, "target"):
        bound: Target = log_likelihood.target(diffusion)
        return bound
    require(
        callable(log_likelihood),
        "argument 'log_likelihood'",
        described(log_likelihood),
        "a function of x_0, or a LinearGaussian",
        "Pass lambda x_0: Normal(A(x_0), 0.1).log_prob(y).sum(-1), say.",
    )
    return Function(diffusion, log_likelihood, directions, _first(context))


def _rows(given: Given, num_data: int) -> int:
    """The number of posteriors: of observations, or of rows of a context."""
    if given.context is None:
        return num_data
    leaves = [x for x in tree_leaves(given.context) if isinstance(x, Tensor) and x.dim()]
    rows = max([len(x) for x in leaves], default=1)
    return rows if num_data == 1 else num_data


def _exponents(diffusion: DiffusionModel, tempering: Any) -> Tensor:
    """The power of the likelihood by timestep, ``(T + 1,)``."""
    length = diffusion.schedule.num_timesteps
    if tempering is None:
        return torch.ones(length + 1, dtype=torch.float64)
    exponents = as_numbers("tempering", tempering).double().cpu()
    require(
        exponents.shape == (length,),
        "argument 'tempering'",
        described(exponents),
        f"a number for each of {length} timesteps",
        "Pass torch.logspace(0, -3, T).",
    )
    valid = (exponents > 0) & (exponents <= 1)
    check_values(
        "argument 'tempering'", exponents, valid, "exponents in (0, 1]", "One is no tempering."
    )
    return torch.cat((torch.ones(1, dtype=torch.float64), exponents))


def _first(context: Any) -> Any:
    """The first row of a context, with which a function is tried out."""
    context = Given.of(context=context).context
    return tree_map(lambda x: x[:1] if isinstance(x, Tensor) and x.dim() else x, context)
