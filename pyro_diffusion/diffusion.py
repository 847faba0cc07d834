r"""Diffusion models: the chains of :mod:`~pyro_diffusion.chains` with linear-Gaussian kernels.

A diffusion model is a Markovian hierarchical VAE with three restrictions: latents of the data's
size, the fixed encoder :math:`q(x_t \mid x_{t-1}) = N(\sqrt{\alpha_t} x_{t-1}, (1 - \alpha_t) I)`, and
a standard normal end. What is learned is the reverse chain,
:math:`p_\theta(x_{0:T}) = p(x_T) \prod_t p_\theta(x_{t-1} \mid x_t)`.

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015).
    https://arxiv.org/abs/1503.03585
    Understanding Diffusion Models: A Unified Perspective (Luo, 2022), section 4.
    https://arxiv.org/abs/2208.11970
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import torch
from pyro.distributions.torch_distribution import TorchDistribution
from torch import Tensor
from torch.distributions import Transform

from pyro_diffusion.chains import (
    BottomUpGuide,
    GenerativeChain,
    ProgramPair,
    TimestepPlate,
    TopDownGuide,
)
from pyro_diffusion.checks import check_argument, holds
from pyro_diffusion.denoisers import Denoised, Denoiser
from pyro_diffusion.family import Family, describe_part
from pyro_diffusion.kernels import (
    forward_increment,
    forward_marginal,
    forward_posterior,
    forward_transition,
    noised,
    terminal_prior,
)
from pyro_diffusion.schedules import NoiseSchedule, StridedSchedule
from pyro_diffusion.timesteps import Timesteps

__all__ = ["DiffusionModel"]


class DiffusionModel(Family):
    r"""One model, its programs and its reference sampler.

    ``model`` with ``guide`` under ``Trace_ELBO`` is the hierarchical bound (E8), term by term the
    consistency form (E11); ``model`` with ``posterior_guide``, the same joint distribution in the
    model's order, is the matching form (E10) and has analytic KLs under ``TraceMeanField_ELBO``;
    ``subsampled()`` is the pair one trains with. All of them share the parameters of this object.

    Args:
        denoiser: The reverse kernels, which bring schedule and event shape.
        likelihood: :math:`p(x_0 \mid x_1)` given :math:`\hat x_0(x_1)`, and the embedding of the
            data; ``None`` takes the denoiser's own: its kernel at ``t = 1`` and the data as they are,
            or its levels if it predicts levels.
        transform: Torch transform from the user's units to the model's, such as
            ``Standardize.from_data(x_0)``; its log-Jacobian enters at site ``x_0``, and the bound is in
            the user's units.
        name: Prefix of the parameters in Pyro's param store; ``None`` takes a free one.

    Raises:
        ValueError: From a program: data of another shape or on another device than the model,
            empty, not finite, outside the likelihood's range or the transform's domain, or so large
            that rounding hides the noise of :math:`x_1`; a mask that does not fit; a network that
            misbehaves.

    Example:
        >>> denoiser = NeuralDenoiser(MLP((2,)), LogSNRSchedule(20), event_shape=(2,))
        >>> diffusion = DiffusionModel(denoiser)
        >>> svi = SVI(diffusion.model, diffusion.guide, Adam({"lr": 1e-3}), Trace_ELBO())
        >>> loss = svi.step(torch.randn(16, 2))
        >>> diffusion.sample(3).shape
        torch.Size([3, 2])
    """

    states: ClassVar[str] = "real numbers"  #: what the chain's states are

    def __init__(
        self,
        denoiser: Denoiser,
        likelihood: Any = None,
        transform: Transform | None = None,
        *,
        name: str | None = None,
    ) -> None:
        check_argument("denoiser", denoiser, Denoiser, "NeuralDenoiser(…)")
        if denoiser.states != self.states:
            raise ValueError(
                f"argument 'denoiser': got {type(denoiser).__name__}, whose states are {denoiser.states}; "
                f"expected {self.states} for a {type(self).__name__}. Pass it to the model of its kind, "
                "BernoulliDiffusion for bits."
            )
        super().__init__(denoiser.event_shape, likelihood, transform, name)
        if getattr(likelihood, "num_outputs", 1) > 1:
            raise ValueError(
                f"argument 'likelihood': got {type(likelihood).__name__}, which takes several numbers for "
                "each entry; expected one that takes x̂_0. Use prediction=LevelPrediction(K) without one."
            )
        self.denoiser = denoiser

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
        """What the numbers of a ``state_dict`` mean: everything but the network."""
        return super().description | {
            "schedule": describe_part(self.schedule),
            "denoiser": describe_part(self.denoiser),
        }

    @property
    def model(self) -> GenerativeChain:
        r""":math:`p_\theta(x_{0:T})` as a Pyro program (E7); sites ``x_T … x_0``."""
        return GenerativeChain(
            self.prior,
            self.denoiser,
            self.decode,
            num_timesteps=self.schedule.num_timesteps,
            owner=self,
            state_mask=self.embed_mask,
        )

    @property
    def guide(self) -> BottomUpGuide:
        r""":math:`\prod_t q(x_t \mid x_{t-1})` as a Pyro program (E4); sites ``x_1 … x_T``."""
        return BottomUpGuide(
            self.forward_transition,
            num_timesteps=self.schedule.num_timesteps,
            embed=self.embed,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
        )

    @property
    def posterior_guide(self) -> TopDownGuide:
        r""":math:`q(x_T \mid x_0) \prod_t q(x_{t-1} \mid x_t, x_0)` as a Pyro program (E4)."""
        return TopDownGuide(
            self.embed,
            self.terminal_marginal,
            self.forward_posterior,
            num_timesteps=self.schedule.num_timesteps,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
        )

    def subsampled(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> TimestepPlate | ProgramPair:
        """The pair to train with: the bound at ``num_timesteps`` random timesteps for each datum.

        Args:
            num_timesteps: Draws ``k`` for each datum, and rows of the network that a step costs.
            timesteps: Law of the timesteps; stratified over the batch by default.

        Returns:
            An object with ``model`` and ``guide``. A chain of one step has one timestep to draw: its
            pair is ``model`` and ``posterior_guide`` themselves.

        Raises:
            ValueError: ``num_timesteps`` below one.
        """
        _check_draws(num_timesteps)
        if self.schedule.num_timesteps == 1:
            return ProgramPair(self.model, self.posterior_guide)
        return self._plate(
            (self.forward_marginal, self.forward_posterior, self.reverse),
            self.schedule.num_timesteps,
            num_timesteps,
            timesteps,
        )

    def continuous(
        self, num_timesteps: int = 1, *, timesteps: Timesteps | None = None
    ) -> TimestepPlate:
        r"""The pair of the chain without end, :math:`T \to \infty`, at random times:

        .. math::
            \mathrm{ELBO}_\infty = E \log p(x_0 \mid x_{\lambda(0)})
                - \mathrm{KL}\big(q(x_{\lambda(1)} \mid x_0) \,\|\, p\big)
                + \tfrac12 \int_0^1 \tfrac{d\,\mathrm{SNR}}{du}\, E \lVert x_0 - \hat x_0(x_u) \rVert^2\, du .

        Of the curve only the ends are in it, and of the reverse kernels only the mean: their variances
        have one limit. Used as :meth:`subsampled` is, for training or for evaluation.

        Args:
            num_timesteps: Draws ``k`` for each datum, and rows of the network that a step costs.
            timesteps: Law of the times; stratified over the batch by default.

        Returns:
            An object with ``model`` and ``guide``.

        Raises:
            ValueError: ``num_timesteps`` below one; from a program, a law without a continuous form or a
                schedule that is no curve.

        References:
            Variational Diffusion Models (Kingma et al., 2021), section 4.2.
            https://arxiv.org/abs/2107.00630
        """
        _check_draws(num_timesteps)
        model = self.with_both_ends()
        kernels = model.marginal_at, model.increment, model.reverse_increment
        return model._plate(kernels, math.inf, num_timesteps, timesteps)

    def _plate(
        self,
        kernels: tuple[Any, Any, Any],
        chain_length: float,
        num_timesteps: int,
        timesteps: Timesteps | None,
    ) -> TimestepPlate:
        """Random timesteps of a chain with the given marginal, posterior and reverse kernels."""
        marginal, posterior, reverse = kernels
        return TimestepPlate(
            self.embed,
            marginal,
            posterior,
            self.prior,
            reverse,
            num_timesteps=num_timesteps,
            chain_length=chain_length,
            timesteps=timesteps,
            owner=self,
            below="denoiser.schedule",
            state_mask=self.embed_mask,
            log_volume=None if self.transform is None else self.log_volume,
        )

    def with_both_ends(self) -> Self:
        r"""The model itself; of one step, which stands at :math:`\lambda(1)` alone, that of two."""
        return self if self.schedule.num_timesteps > 1 else self.with_num_timesteps(2)

    def with_num_timesteps(self, num_timesteps: int) -> Self:
        """The same model, parameters and their names included, on another grid of its schedule.

        Raises:
            ValueError: A schedule that has one grid.
        """
        return self._with_schedule(self.schedule.with_num_timesteps(num_timesteps))

    def strided(self, timesteps: int | Sequence[int]) -> Self:
        r"""The same model, parameters and their names included, on some of its timesteps.

        Its states are states of this chain, and its programs are a chain of fewer, longer steps: with fewer
        network calls, and a bound of its own.

        Args:
            timesteps: Increasing whole numbers in ``1 … T``; or how many, evenly spaced from the first to the
                last (one of them is ``T``).

        Raises:
            ValueError: Timesteps outside that range, out of order, or more than there are.

        Example:
            >>> denoiser = GaussianDenoiser(torch.zeros(2), torch.ones(2), LinearSchedule(1000))
            >>> diffusion = DiffusionModel(denoiser).strided(4)
            >>> diffusion.schedule.timesteps
            (1, 334, 667, 1000)
        """
        if isinstance(timesteps, int):
            timesteps = _evenly_spaced(timesteps, self.schedule.num_timesteps)
        return self._with_schedule(StridedSchedule(self.schedule, timesteps))

    def _with_schedule(self, schedule: NoiseSchedule) -> Self:
        model = object.__new__(type(self))  # no copy, which would take a name of its own
        model.__dict__.update(self.__dict__, _modules=self._modules.copy())
        model.denoiser = self.denoiser.with_schedule(schedule)
        return model

    # The kernels that the programs are made of.

    @property
    def _entrance(self) -> Any:
        return self.denoiser if self.likelihood is None else self.likelihood

    def embed(self, x_0: Tensor, mask: Tensor | None = None) -> Tensor:
        return _check_resolution(super().embed(x_0, mask), self.schedule)

    def prior(self) -> TorchDistribution:
        """:math:`p(x_T)` (E5)."""
        return terminal_prior(self.schedule, self.event_shape, dtype=self.dtype)

    def decode(self, x_1: Tensor) -> TorchDistribution:
        r""":math:`p_\theta(x_0 \mid x_1)`, the term that a VAE calls its decoder."""
        return self.decode_denoised(x_1, self.denoiser.denoise(x_1, self.schedule.log_snr(1)))

    def reverse(self, x_t: Tensor, t: Tensor) -> tuple[TorchDistribution, TorchDistribution]:
        r""":math:`p_\theta(x_{t-1} \mid x_t)` and :math:`p_\theta(x_0 \mid x_1)` from one network call."""
        denoised = self.denoiser.denoise(x_t, self.schedule.log_snr(t))
        return self.denoiser.reverse_kernel(x_t, t, denoised), self.decode_denoised(x_t, denoised)

    def forward_transition(self, x_prev: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_{t-1})` (E1)."""
        return forward_transition(x_prev, t, self.schedule, event_dim=self.denoiser.event_dim)

    def forward_marginal(self, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_t \mid x_0)` (E2) for an embedded ``x_0``."""
        return forward_marginal(x_0, t, self.schedule, event_dim=self.denoiser.event_dim)

    def terminal_marginal(self, x_0: Tensor) -> TorchDistribution:
        r""":math:`q(x_T \mid x_0)` for an embedded ``x_0``."""
        return self.forward_marginal(x_0, self.schedule.num_timesteps)

    def forward_posterior(self, x_t: Tensor, x_0: Tensor, t: int | Tensor) -> TorchDistribution:
        r""":math:`q(x_{t-1} \mid x_t, x_0)` (E3) for an embedded ``x_0``."""
        return forward_posterior(x_t, x_0, t, self.schedule, event_dim=self.denoiser.event_dim)

    def marginal_at(self, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r""":math:`q(x_u \mid x_0)` at a time of the continuous chain, for an embedded ``x_0``."""
        log_snr = self.schedule.log_snr_at(u)
        return noised(x_0, log_snr, self.schedule, event_dim=self.denoiser.event_dim)

    def increment(self, x_u: Tensor, x_0: Tensor, u: Tensor) -> TorchDistribution:
        r"""What :math:`q` says in a step of the continuous chain, in units of its length."""
        return forward_increment(x_0, u, self.schedule, event_dim=self.denoiser.event_dim)

    def reverse_increment(
        self, x_u: Tensor, u: Tensor
    ) -> tuple[TorchDistribution, TorchDistribution]:
        r"""What :math:`p_\theta` says in that step, and :math:`p_\theta(x_0 \mid x_1)`; one network call."""
        denoised = self.denoiser.denoise(x_u, self.schedule.log_snr_at(u))
        return self.increment(x_u, denoised.x_0_hat, u), self.decode_denoised(x_u, denoised)

    def decode_denoised(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        r""":math:`p_\theta(x_0 \mid x_1)` from what the denoiser said of :math:`x_1` already."""
        batch_shape = x_1.shape[: x_1.dim() - self.denoiser.event_dim]
        return self.data_kernel(self.decode_inside(x_1, denoised), batch_shape)

    def decode_inside(self, x_1: Tensor, denoised: Denoised) -> TorchDistribution:
        """The same in the model's own units, before the transform to the user's."""
        if self.likelihood is None:
            return self.denoiser.decode(x_1, denoised)
        return self.likelihood(denoised.x_0_hat)


def check_diffusion(diffusion: Any) -> DiffusionModel:
    """``diffusion``, if it is a model and not one of its programs, or another family."""
    return check_argument("diffusion", diffusion, DiffusionModel, "the DiffusionModel itself")


def _evenly_spaced(count: int, last: int) -> list[int]:
    """``count`` timesteps of ``1 … last``, both ends included; of a single one, the last."""
    if isinstance(count, bool) or not 1 <= count <= last:
        raise ValueError(
            f"argument 'timesteps': got {count}; expected 1 … {last}, how many of the model's timesteps to "
            "keep. Take with_num_timesteps(…) for a finer grid of the same curve."
        )
    if count == 1:
        return [last]
    gaps = count - 1
    return [1 + (2 * i * (last - 1) + gaps) // (2 * gaps) for i in range(count)]


def _check_resolution(x_0: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Embedded data, if the noise of :math:`x_1`, where there is least of it, is not lost in rounding."""
    noise = (-0.5 * schedule.log_snr(1)).exp()
    largest = x_0.abs().amax(0)
    if not holds(torch.finfo(x_0.dtype).eps * largest <= noise):
        raise ValueError(
            f"argument 'x_0': got states of up to {largest.max().item():.3g} in {x_0.dtype} with a noise of "
            f"{noise.min().item():.3g} at x_1, which is lost in their rounding; expected at least "
            f"{torch.finfo(x_0.dtype).eps:.1g} of them. Pass transform=Standardize.from_data(x_0), a smaller "
            "log_snr_max, or a network in float64."
        )
    return x_0


def _check_draws(num_timesteps: int) -> None:
    if not isinstance(num_timesteps, int) or num_timesteps < 1:
        raise ValueError(
            f"argument 'num_timesteps': got {num_timesteps!r}; expected a whole number of at "
            "least 1, the timesteps drawn for each datum. One is enough: the bound stays unbiased."
        )
