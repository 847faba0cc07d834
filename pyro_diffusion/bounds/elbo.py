r"""The hierarchical bound of any Pyro model and guide, as named terms with errors.

With the posterior-ordered guide the terms are KLs (E10),
:math:`L_t = E\,\mathrm{KL}(q(x_t \mid x_{t+1}, x_0) \| p(x_t \mid x_{t+1}))`. With the forward guide
they are expected log-ratios (E11), :math:`L_t = E \log q(x_t \mid x_{t-1}) / p(x_t \mid x_{t+1})`,
with the same sum. (:math:`L_T` is a mean KL in either, because :math:`p(x_T)` has no parents.) Lecture notes
print the log-ratios as
:math:`E\,\mathrm{KL}(q(x_t \mid x_{t-1}) \| p(x_t \mid x_{t+1}))`. That is another number for
:math:`t < T`, because given both neighbours :math:`x_t` does not follow
:math:`q(x_t \mid x_{t-1})`; it is not used here.

References:
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), eqs. 34-58.
    https://arxiv.org/abs/2208.11970
"""

from collections.abc import Callable
from typing import Any, overload

from torch import Tensor

from pyro_diffusion.bounds.moments import TermMoments
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.single import single_terms, whose_terms_are_single
from pyro_diffusion.bounds.terms import ELBOTerms
from pyro_diffusion.bounds.trajectories import PARTICLES, trajectory_terms
from pyro_diffusion.chains.time import Steps
from pyro_diffusion.checks import check_count
from pyro_diffusion.family import Pair, unpacked
from pyro_diffusion.given import Given
from pyro_diffusion.reading import reading, refuse_gradients


@overload
def elbo_terms(
    family: Pair, /, x_0: Tensor, *, num_particles: int = ..., analytic_kl: bool | None = ...,
    batch_size: int | None = ..., progress: bool = ..., **given: Any,
) -> ELBOTerms: ...  # fmt: skip


@overload
def elbo_terms(
    model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, *, num_particles: int = ...,
    analytic_kl: bool | None = ..., batch_size: int | None = ..., progress: bool = ...,
    **given: Any,
) -> ELBOTerms: ...  # fmt: skip


def elbo_terms(  # type: ignore[misc]
    model: Any,
    guide: Any = None,
    x_0: Any = None,
    *,
    num_particles: int = 8,
    analytic_kl: bool | None = None,
    batch_size: int | None = None,
    progress: bool = True,
    **given: Any,
) -> ELBOTerms:
    r"""The bound of a Pyro model and guide, with the term of every site (E10, or E11).

    Any pair works if both programs are called with a batch of data, have the same latent sites, and
    have every site inside a data plate at dim −1. The latent site that the model samples
    first is :math:`x_T`, the last one :math:`x_1`; observed sites together are the reconstruction.
    Scales of plates and handlers are ignored: values are unscaled. No gradient is recorded. Programs
    that are modules run in evaluation mode (call ``eval()`` for a module inside a function or a handler).

    The analytic KLs of a diffusion model need no whole trajectories. Its posterior-ordered guide has
    :math:`q(x_t \mid x_0)` in closed form at every timestep, so that many terms are drawn at once, each with
    a state of its own. In this case ``draws`` is "single", and the terms' errors are independent.

    In all other cases the terms come from whole trajectories, in chunks of ``batch_size`` of them. The
    states of a trajectory are freed one by one while the model scores it. The programs receive a chunk as a
    batch that contains each datum once for each of its particles. The default size of a chunk keeps the
    memory of a chunk under 256 MiB, as measured with a row or two.

    Args:
        model: Program for :math:`p`, called as ``model(x_0)``; or a family, which has both programs:
            ``elbo_terms(diffusion, x_0)``.
        guide: Program for :math:`q`, called as ``guide(x_0)``; leave it out for a family.
        x_0: Data, shape ``(N,)`` + the shape of one datum.
        num_particles: Trajectories for each datum.
        analytic_kl: Compute KLs in closed form. ``None`` does so where that is legal (the guide runs
            in the model's order) and a formula is known. This estimator of a *term* has less noise.
            ``False`` averages log-ratios along the trajectories: for a denoiser close to exact their
            noise cancels in the sum, and the *bound* can have many times less noise.
        batch_size: Trajectories (data times particles) in a chunk; network rows if the terms are single.
        progress: Show a progress bar if the evaluation takes more than five seconds.
        given: What goes with the data, passed to both programs row by row: ``mask=``, true where an
            entry is observed, boolean, of the data's shape, for the bound of the observed part;
            ``context=`` for conditional data.

    Returns:
        :class:`ELBOTerms`.

    Raises:
        ValueError: Latents or masks that differ between the programs, a site outside the data plate,
            a subsampled pair, ``analytic_kl=True`` with the forward guide, or a term that is not
            finite (the message names the site).

    Example:
        >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5))
        >>> diffusion = DiffusionModel(denoiser)
        >>> terms = elbo_terms(diffusion.model, diffusion.posterior_guide, torch.zeros(3, 2))
        >>> terms.transition.shape, terms.is_kl
        (torch.Size([4, 3]), True)
    """
    model, guide, x_0 = unpacked(model, guide, x_0)
    what = Given.of(**given)
    diffusion = None if analytic_kl is False else whose_terms_are_single(model, guide)
    if diffusion is not None:
        refuse_gradients((x_0, what))
        count = check_count("num_particles", num_particles, 1, PARTICLES)
        size = None if batch_size is None else check_count("batch_size", batch_size, 1, PARTICLES)
        with reading(diffusion):
            rows = Rows(diffusion, x_0, what, Steps(diffusion.schedule.num_timesteps), size)
            if rows.has_kl():
                return single_terms(rows, count, progress)
    moments = TermMoments()
    for start, sites in trajectory_terms(
        model, guide, x_0, what, num_particles=num_particles, analytic_kl=analytic_kl,
        batch_size=batch_size, progress=progress,
    ):  # fmt: skip
        moments.update(start, sites)
    terms = moments.terms()
    if what.mask is None:
        return terms
    return terms._replace(event_size=int(what.mask.sum()) / len(x_0))
