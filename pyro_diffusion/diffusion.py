r"""Diffusion models: the chains of :mod:`~pyro_diffusion.chains` with linear-Gaussian kernels.

A diffusion model is a Markovian hierarchical VAE with three restrictions: latents of the data's
size, the fixed encoder :math:`q(x_t \mid x_{t-1}) = N(\sqrt{\alpha_t} x_{t-1}, (1 - \alpha_t) I)`, and
a standard normal distribution at the end. What is learned is the reverse chain,
:math:`p_\theta(x_{0:T}) = p(x_T) \prod_t p_\theta(x_{t-1} \mid x_t)`.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015).
    https://arxiv.org/abs/1503.03585
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), section 4.
    https://arxiv.org/abs/2208.11970
"""

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor
from torch.distributions import Transform

from pyro_diffusion.chains import (
    BottomUpGuide,
    Continuum,
    GenerativeChain,
    ProgramPair,
    Steps,
    TimestepPlate,
    Timesteps,
    TopDownGuide,
)
from pyro_diffusion.checks import check_argument, check_count, looking, require
from pyro_diffusion.denoisers import BernoulliDenoiser, Denoised, Denoiser
from pyro_diffusion.denoisers.base import denoiser_in_words
from pyro_diffusion.family import Family, describe_part
from pyro_diffusion.params import shared_copy
from pyro_diffusion.processes import ForwardProcess
from pyro_diffusion.schedules import NoiseSchedule, StridedSchedule
from pyro_diffusion.schedules.base import schedule_in_words
from pyro_diffusion.schedules.views import evenly_spaced
from pyro_diffusion.typed import EmbedsData, TorchDistribution

__all__ = ["BernoulliDiffusion", "DiffusionModel", "check_diffusion"]


class DiffusionModel(Family):
    r"""One model, its programs and its reference sampler.

    ``model`` and ``guide`` under ``Trace_ELBO`` give the hierarchical bound (E8), whose terms are the
    consistency form (E11). ``posterior_guide`` is the same joint distribution in the model's order.
    ``model`` and ``posterior_guide`` give the matching form (E10), with analytic KLs under
    ``TraceMeanField_ELBO``. ``subsampled()`` is the pair for training. All programs share the parameters
    of this object. It is a torch module, whose usual methods (``to``, ``train``, …) ``help`` leaves out.

    Args:
        denoiser: The reverse kernels, with their schedule and event shape.
        likelihood: :math:`p(x_0 \mid x_1)` given :math:`\hat x_0(x_1)`, and the embedding of the
            data; ``None`` takes the denoiser's own: its kernel at ``t = 1`` and the data unchanged,
            or its levels if it predicts levels.
        transform: Torch transform from the user's units to the model's, such as
            ``Standardize.from_data(x_0)``; its log-Jacobian enters at site ``x_0``, and the bound is in
            the user's units.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.

    Raises:
        ValueError: From a program: data of another shape or on another device than the model, empty, not
            finite, outside the likelihood's range or the transform's domain, or so large that rounding hides
            the noise of :math:`x_1`; a mask that does not fit; an output of the network that does not fit.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> diffusion = DiffusionModel(denoiser)
        >>> svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(16, 2))
        >>> diffusion.sample(3).shape
        torch.Size([3, 2])
    """

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: EmbedsData | None = None,
        transform: Transform | None = None,
        *,
        name: str | None = None,
    ) -> None:
        check_argument("denoiser", denoiser, Denoiser, "NeuralDenoiser(…)")
        super().__init__(denoiser.event_shape, likelihood, transform, name)
        require(
            getattr(likelihood, "num_outputs", 1) <= 1,
            "argument 'likelihood'",
            f"{type(likelihood).__name__}, which takes several numbers for each entry",
            "one that takes x̂_0",
            "Leave it out, and use prediction=LevelPrediction(K).",
        )
        if likelihood is not None or transform is not None:
            denoiser.process.check_has_score(
                "transform" if likelihood is None else "likelihood",
                "Leave it out: the data are the states.",
            )
        self.denoiser = denoiser

    @property
    def process(self) -> ForwardProcess:
        """The forward process :math:`q`, whose kernels are E1, E2, E3 and E5; the denoiser's."""
        return self.denoiser.process

    @property
    def schedule(self) -> NoiseSchedule:
        """The denoiser's noise schedule."""
        return self.denoiser.schedule

    @property
    def dtype(self) -> torch.dtype:
        """Floating dtype in which the chain runs: the denoiser's."""
        return self.denoiser.dtype

    @property
    def device(self) -> torch.device:
        """Device that the model is on: the schedule's."""
        return self.schedule.device

    @property
    def description(self) -> dict[str, str]:
        """What a ``state_dict`` must have in common with the model, except for the network."""
        return super().description | {
            "schedule": describe_part(self.schedule),
            "denoiser": describe_part(self.denoiser),
        }

    def _rows(self) -> dict[str, str]:
        own = {
            "schedule": schedule_in_words(self.schedule),
            "denoiser": denoiser_in_words(self.denoiser),
        }
        return own | super()._rows()

    @property
    def model(self) -> GenerativeChain:
        r""":math:`p_\theta(x_{0:T})` as a Pyro program (E7); sites ``x_T … x_0``."""
        return GenerativeChain(
            self.prior,
            self.denoiser,
            self.decode,
            num_timesteps=self.schedule.num_timesteps,
            owner=self,
        )

    @property
    def guide(self) -> BottomUpGuide:
        r""":math:`\prod_t q(x_t \mid x_{t-1})` as a Pyro program (E4); sites ``x_1 … x_T``."""
        return BottomUpGuide(
            self.process.transition,
            num_timesteps=self.schedule.num_timesteps,
            embed=self.embed,
            owner=self,
            below="denoiser.schedule",
        )

    @property
    def posterior_guide(self) -> TopDownGuide:
        r""":math:`q(x_T \mid x_0) \prod_t q(x_{t-1} \mid x_t, x_0)` as a Pyro program (E4)."""
        process, last = self.process, self.schedule.num_timesteps
        guide = TopDownGuide(
            self.embed,
            partial(process.marginal, t=last),
            process.posterior,
            num_timesteps=last,
            owner=self,
            below="denoiser.schedule",
        )
        guide.marginal = process.marginal
        return guide

    def subsampled(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> TimestepPlate | ProgramPair:
        """The pair for training: the bound at ``num_timesteps`` random timesteps for each datum.

        Args:
            num_timesteps: Draws ``k`` for each datum. Each costs one row of the network.
            timesteps: Law of the timesteps; stratified over the batch by default.

        Returns:
            An object with ``model`` and ``guide``. For a chain of one step, which has a single timestep,
            they are ``model`` and ``posterior_guide`` themselves.
        """
        num_timesteps = check_count("num_timesteps", num_timesteps, 1, _DRAWS)
        if self.schedule.num_timesteps == 1:
            return ProgramPair(self.model, self.posterior_guide)
        return TimestepPlate(
            self,
            Steps(self.schedule.num_timesteps),
            num_timesteps=num_timesteps,
            timesteps=timesteps,
        )

    def continuous(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> TimestepPlate:
        r"""The pair of the continuous chain, :math:`T \to \infty`, at random times:

        .. math::
            \mathrm{ELBO}_\infty = E \log p(x_0 \mid x_{\lambda(0)})
                - \mathrm{KL}\big(q(x_{\lambda(1)} \mid x_0) \,\|\, p\big)
                + \tfrac12 \int_0^1 \tfrac{d\,\mathrm{SNR}}{du}\, E \lVert x_0 - \hat x_0(x_u) \rVert^2\, du .

        Of the schedule, the bound depends only on the ends of the curve. Of the reverse kernels, it depends
        only on the means, because all variances have the same limit (Kingma et al., 2021, section 4.2). The
        pair takes the arguments of :meth:`subsampled` and is used like it, for training or for evaluation.

        Raises:
            ValueError: ``num_timesteps`` below one; from a program, a law without a continuous form or a
                schedule that is not a curve.
        """
        return TimestepPlate(
            self.with_both_ends(),
            Continuum(),
            num_timesteps=check_count("num_timesteps", num_timesteps, 1, _DRAWS),
            timesteps=timesteps,
        )

    def with_both_ends(self) -> Self:
        r"""The model; with two steps instead if it has one, whose only state is at :math:`\lambda(1)`."""
        return self if self.schedule.num_timesteps > 1 else self.with_num_timesteps(2)

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        """The same model, parameters and their names included, on another grid of its schedule.

        Raises:
            ValueError: A schedule that has only one grid.
        """
        return self._with_schedule(self.schedule.with_num_timesteps(num_timesteps))

    def strided(self, timesteps: int | Sequence[int]) -> Self:
        r"""The same model, parameters and their names included, on some of its timesteps.

        Its states are states of this chain. Its programs take fewer and longer steps, with fewer network
        calls, and have a bound of their own.

        Args:
            timesteps: Increasing whole numbers in ``1 … T``; or the number of timesteps, which are then
                evenly spaced from the first to the last (a single one is ``T``).

        Raises:
            ValueError: Timesteps outside that range, out of order, or more than there are.

        Example:
            >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LinearSchedule(1000))
            >>> diffusion = DiffusionModel(denoiser).strided(4)
            >>> diffusion.schedule.timesteps
            (1, 334, 667, 1000)
        """
        kept: Any = timesteps
        if isinstance(kept, Integral):
            kept = evenly_spaced(kept, self.schedule.num_timesteps)
        return self._with_schedule(StridedSchedule(self.schedule, kept))

    def _with_schedule(self, schedule: NoiseSchedule) -> Self:
        model = shared_copy(self)
        model.denoiser = self.denoiser.with_schedule(schedule)
        return model

    # What the programs are made of, besides the process and the denoiser.

    _scale_is_known = False

    @property
    def entrance(self) -> Any:
        """The object whose ``embed`` converts data to states: the likelihood, or else the denoiser."""
        return self.denoiser if self.likelihood is None else self.likelihood

    @property
    def gap(self) -> float | None:  # type: ignore[override]
        """The value that a kernel gets in an unobserved entry; it is the process's."""
        return self.process.gap

    def state_mask(self, mask: Tensor) -> Tensor:
        """Observed entries of a state: those whose entry of the datum was observed."""
        return self.embed_mask(mask)

    def embed(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        """Data as states, ``(N,) + event_shape``, in the chain's dtype; unobserved entries are the gap.

        The first data of a model with a network are compared with the chain's noise, with a warning if their
        scale does not fit. An exact denoiser has the scale of its data among its arguments.
        """
        states = self.process.check_states(super().embed(x_0, mask))
        if looking() and not self._scale_is_known and hasattr(self.denoiser, "network"):
            self._scale_is_known = True
            self.process.warn_of_scale(states)
        return states

    def prior(self) -> TorchDistribution:
        """:math:`p(x_T)` (E5)."""
        return self.process.prior(self.dtype)

    def decode(
        self, x_1: Tensor, denoised: Denoised | None = None, **given: Any
    ) -> TorchDistribution:
        r""":math:`p_\theta(x_0 \mid x_1)` in the user's units, which in a VAE is called the decoder.

        Args:
            x_1: States, ``batch_shape + event_shape``.
            denoised: The denoiser's output there; ``None`` computes it.
            given: ``context=`` of conditional data.
        """
        if denoised is None:
            denoised = self.denoiser.denoise(
                x_1, self.schedule.log_snr(1), **self.denoiser.check_given(given)
            )
        batch_shape = x_1.shape[: x_1.dim() - self.denoiser.event_dim]
        return self.data_kernel(self.decode_inside(x_1, denoised), batch_shape)

    def decode_inside(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        """The same in the model's own units, before the transform to the user's."""
        if self.likelihood is None:
            return self.denoiser.decode(x_1, denoised)
        return self.likelihood(denoised.x_0_hat)

    if not TYPE_CHECKING:  # a type checker would then accept every name

        def __getattr__(self, name: str) -> Any:
            if name not in _MOVED:
                return super().__getattr__(name)
            where, kernel = _MOVED[name]
            warnings.warn(
                f"DiffusionModel.{name} has moved to {where}; the old name will be removed in version 0.3",
                DeprecationWarning,
                stacklevel=2,
            )
            return kernel(self)


#: Kernels that were methods of the model in version 0.1: where they are, and how to get them.
_MOVED: dict[str, tuple[str, Callable[[DiffusionModel], Any]]] = {
    "forward_transition": ("process.transition", lambda d: d.process.transition),
    "forward_marginal": ("process.marginal", lambda d: d.process.marginal),
    "forward_posterior": ("process.posterior", lambda d: d.process.posterior),
    "terminal_marginal": (
        "process.marginal",
        lambda d: partial(d.process.marginal, t=d.schedule.num_timesteps),
    ),
    "marginal_at": ("process.marginal_at", lambda d: d.process.marginal_at),
    "increment": ("process.increment", lambda d: d.process.increment),
    "reverse": ("chains.Steps.pair", lambda d: partial(Steps(d.schedule.num_timesteps).pair, d)),
    "reverse_increment": ("chains.Continuum.pair", lambda d: partial(Continuum().pair, d)),
    "decode_denoised": ("decode", lambda d: d.decode),
}


class BernoulliDiffusion(DiffusionModel):
    r"""A diffusion model of bits: the same chains, with the binomial kernels of its denoiser.

    The class is kept from version 0.1. ``DiffusionModel(denoiser)`` is the same model.

    Args:
        denoiser: The reverse kernels, with their schedule, rate and event shape.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.

    Raises:
        ValueError: Another denoiser; from a program: data other than bits, of another shape, or with gaps.

    Example:
        >>> denoiser = NeuralBernoulliDenoiser(MLP((20,)), LinearDecaySchedule(200), event_shape=(20,))
        >>> diffusion = BernoulliDiffusion(denoiser)
        >>> pair = diffusion.subsampled()
        >>> svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
        >>> loss = svi.step(torch.eye(5).repeat(1, 4))

    References:
        Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), table 1.
        https://arxiv.org/abs/1503.03585
    """

    def __init__(self, denoiser: BernoulliDenoiser, *, name: str | None = None) -> None:
        check_argument("denoiser", denoiser, BernoulliDenoiser, "NeuralBernoulliDenoiser(…)")
        super().__init__(denoiser, name=name)


def check_diffusion(diffusion: Any) -> DiffusionModel:
    """``diffusion``, if it is a model and not one of its programs, or another family."""
    return check_argument("diffusion", diffusion, DiffusionModel, "the DiffusionModel itself")


_DRAWS = "One timestep for each datum is enough: the bound stays unbiased."
