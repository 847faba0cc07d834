r"""Estimates of :math:`\log p(x_0)` above the bound.

The bound's expectation is over trajectories of the guide, :math:`E_q \log w` with the weight of a path

.. math::
    w = \frac{p_\theta(x_{0:T})}{q(x_{1:T} \mid x_0)}, \qquad
    \log p_\theta(x_0) = \log E_q\, w = \mathrm{ELBO}
        + \mathrm{KL}\big(q(x_{1:T} \mid x_0) \,\|\, p_\theta(x_{1:T} \mid x_0)\big) \quad \text{(E9)},

so that an average of the weights themselves closes the gap. The average :math:`\hat p` is unbiased, and
:math:`\log \hat p` is below :math:`\log p` in expectation. The difference depends on the tail of the weights,
which effective sample size and Pareto :math:`\hat k` measure for each datum. Both measure the *guide*: a
:math:`\hat k` above 0.7 means that the estimate cannot be trusted, not that the model is bad. It rises with
the length of the chain.

References:
    Importance Weighted Autoencoders (Burda et al., 2016), section 3. https://arxiv.org/abs/1509.00519
    Pareto Smoothed Importance Sampling (Vehtari et al., 2024). https://arxiv.org/abs/1507.02646
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any, overload

from torch import Tensor

from pyro_diffusion.bounds import join_chunks, trajectory_terms
from pyro_diffusion.chains import BottomUpGuide, GenerativeChain
from pyro_diffusion.checks import check_state, require
from pyro_diffusion.evidence.evidence import Evidence, at_the_end, average, fingerprint
from pyro_diffusion.family import Family, Pair, unpacked
from pyro_diffusion.given import Given
from pyro_diffusion.reading import refuse_gradients


@overload
def importance_evidence(
    family: Pair, /, x_0: Tensor, *, num_particles: int, state: int = ...,
    batch_size: int | None = ..., progress: bool = ..., **given: Any,
) -> Evidence: ...  # fmt: skip


@overload
def importance_evidence(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, num_particles: int,
    state: int = ..., batch_size: int | None = ..., progress: bool = ..., **given: Any,
) -> Evidence: ...  # fmt: skip


def importance_evidence(  # type: ignore[misc]
    model: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    num_particles: int,
    state: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
    **given: Any,
) -> Evidence:
    r"""Importance weights over the whole chain: :math:`\log \hat p(x_0) = \log \frac1K \sum_k w_k`.

    Log-ratios are computed site by site and added in float64. Scales of plates and handlers are ignored.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``, that
            :func:`~pyro_diffusion.bounds.elbo_terms` takes; or a family: ``importance_evidence(diffusion,
            x_0, num_particles=100)``.
        guide: Program for :math:`q`, called as ``guide(x_0)``; leave it out for a family.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Trajectories :math:`K` for each datum.
        state: 0 if ``x_0`` are data. Otherwise ``x_0`` are states at this timestep ``t``, and the result is
            :math:`\log p(x_t)`, the log-density of each state; this needs the two chains
            ``diffusion.model`` and ``diffusion.guide``. At T it is the density of the prior, exactly.
        batch_size: Trajectories in a chunk; by default as many as fit into 256 MiB.
        progress: Show a progress bar if it takes more than five seconds.
        given: What goes with the data: ``mask=``, true where an entry is observed; ``context=``.

    Returns:
        :class:`Evidence`. Its standard error is the error of the logarithm, to first order. It can be
        trusted where :math:`\hat k` is below 0.7 (for few particles, below
        :math:`1 - 1 / \log_{10} K`). The logarithm of an average is low in expectation, by half of the
        squared standard error to first order. For discrete latents, whose weights take few values,
        :math:`\hat k` is not informative.

    Raises:
        ValueError: The errors of :func:`~pyro_diffusion.bounds.elbo_terms`; a state outside ``0 … T``, or a
            state for other programs than the two chains.

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> importance_evidence(
        ...     diffusion.model, diffusion.guide, torch.zeros(3, 2), num_particles=10
        ... ).log_evidence
        tensor([-1.8379, -1.8379, -1.8379], dtype=torch.float64)
    """
    chain, q, x_0 = unpacked(model, guide, x_0)
    if state != 0:
        forward = model.guide if isinstance(model, Family) else q
        q = _check_guide(chain, forward, state, given)
        refuse_gradients(x_0)
        if state == chain.num_timesteps:
            Given.of(**given).with_rows(len(x_0))
            return at_the_end(chain.prior(), x_0, num_particles)
        chain, q = chain.of_state(state), q.of_state(state)
    chunks: dict[int, list[Tensor]] = defaultdict(list)
    what = Given.of(**given)
    for start, sites in trajectory_terms(
        chain, q, x_0, what, num_particles=num_particles, analytic_kl=False,
        batch_size=batch_size, progress=progress, description="evidence",
    ):  # fmt: skip
        chunks[start].append(sites.log_weight)
    evidence = average(join_chunks(chunks))
    return evidence._replace(data=fingerprint(x_0, what.mask), measure=sites.measure)


def _check_guide(model: Any, guide: Any, state: int, given: dict[str, Any]) -> Any:
    """``guide``, if the two programs have the evidence of a state."""
    besides = " with a mask" if given.get("mask") is not None else ""
    require(
        isinstance(model, GenerativeChain) and isinstance(guide, BottomUpGuide) and not besides,
        "argument 'state'",
        f"{state!r} for a {type(model).__name__} and a {type(guide).__name__}{besides}",
        "the chain and its forward guide, without a mask, because states have no gaps",
        "Pass diffusion.model and diffusion.guide.",
    )
    check_state(state, model.num_timesteps)
    return guide
