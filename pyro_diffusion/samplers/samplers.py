r"""Samplers: draws from a trained model in fewer or cheaper steps than the model's program takes.

``diffusion.sample(n)`` runs the model's program, one reverse kernel after another. A sampler here draws from
the same model on some of its timesteps (:meth:`~pyro_diffusion.diffusion.DiffusionModel.strided`) by

.. math::
    x_{t-1} = A_t\, x_t + B_t\, \hat x_0(x_t) + E_t\, \hat x_0(x_{t+1}) + C_t\, z, \qquad z \sim N(0, I),

with coefficients that are computed before the first step, in float64:

====================== =========================================== =====================================
sampler                a step is                                   in the limit of small steps
====================== =========================================== =====================================
``AncestralSampler``   a draw of the program's own kernel          the program, for any number of steps
``DDIMSampler``        the estimates of datum and noise combined   the probability flow, of order 1
``ODESampler``         the same, with the last two estimates       the probability flow, of order 2
====================== =========================================== =====================================

With ``eta = 1``, ``DDIMSampler`` and ``ODESampler`` draw the chain's noise as well, and solve the reverse
diffusion. Conditional data are drawn by ``sampler(n, context=c)``. Where the estimate is linear in a
network's output, :math:`\hat x_0 = p_t\, o + q_t\, x_t`, a step is one call of the network, a normal draw
and a few additions. The last step is the model's
:math:`p(x_0 \mid x_1)`, with its likelihood and transform.

References:
    Denoising Diffusion Implicit Models (Song et al., 2021). https://arxiv.org/abs/2010.02502
    DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Probabilistic Models (Lu et al., 2022).
    https://arxiv.org/abs/2211.01095
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.checks import (
    check_argument,
    check_between,
    check_finite,
    require,
)
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.denoisers.base import check_signature
from pyro_diffusion.diffusion import DiffusionModel, check_diffusion
from pyro_diffusion.given import Given, beside
from pyro_diffusion.processes.gaussian import chain_step, posterior_mean
from pyro_diffusion.reading import reading
from pyro_diffusion.samplers.guidance import Guidance
from pyro_diffusion.samplers.steps import (
    Update,
    combine,
    downwards,
    fused_step,
    is_plain,
    linear_map,
    rows_of,
    start_states,
)
from pyro_diffusion.walk import ReverseWalk


class Sampler(ABC):
    """Draws data from a model; called as ``sampler(num_samples)``, or ``sampler(num_samples, context=c)``.

    Args:
        diffusion: The model. It is read at each call, so that it may be trained in between.
        timesteps: ``None`` for all timesteps, a number of evenly spaced ones, or an increasing list of them.
        guidance: Guidance by the context, if any; see :class:`~pyro_diffusion.samplers.Guidance`.

    Raises:
        ValueError: An argument that is not a model, or timesteps that the model does not have.
    """

    needs_score: ClassVar[bool] = True  #: whether its steps are sums of states and estimates

    def __init__(
        self,
        diffusion: DiffusionModel,
        timesteps: int | Sequence[int] | None = None,
        *,
        guidance: Guidance | None = None,
    ) -> None:
        self.diffusion, self.timesteps = check_diffusion(diffusion), timesteps
        self.guidance = Guidance(0.0) if guidance is None else guidance
        check_argument("guidance", self.guidance, Guidance, "Guidance(2.0)")
        if self.guidance.strength:
            remedy = (
                "Sample without guidance: estimates of bits and categories cannot be extrapolated."
            )
            diffusion.process.check_has_score("guidance", remedy)
        if self.needs_score:
            remedy = f"{type(self).__name__} adds states to estimates: use AncestralSampler."
            diffusion.process.check_has_score("diffusion", remedy)
        self._step: Callable[..., tuple[Tensor, Tensor | None]] = fused_step
        self._network: Any = None  # compiled
        _ = self.model  # to raise an error for wrong timesteps before anything is drawn

    def __repr__(self) -> str:
        steps = "" if self.timesteps is None else f", timesteps={self.timesteps}"
        guidance = f", guidance={self.guidance}" if self.guidance.strength else ""
        return f"{type(self).__name__} of {self.diffusion.name!r}{steps}{guidance}"

    @property
    def model(self) -> DiffusionModel:
        """The model on the sampler's timesteps."""
        return self.diffusion if self.timesteps is None else self.diffusion.strided(self.timesteps)

    @property
    def deterministic(self) -> bool:
        """Whether no noise is drawn after :math:`x_T`."""
        return False

    @abstractmethod
    def update(self, model: DiffusionModel) -> Update:
        """The steps of a model's chain."""

    def __call__(
        self,
        num_samples: int = 1,
        x_T: Tensor | None = None,
        *,
        context: Any = None,
        progress: bool = True,
    ) -> Tensor:
        """Draw data; layers such as dropout are switched off.

        Args:
            num_samples: Number of data ``n``.
            x_T: States to start from, ``(n,) + event_shape``; ``None`` draws them from :math:`p(x_T)`.
            context: Context of conditional data: a row for each datum, or one row (or number) for all.
            progress: Show a progress bar if it takes more than five seconds.

        Returns:
            Data in the user's units, ``(n,)`` + the shape of a datum.

        Raises:
            ValueError: States of another shape, or that require a gradient; a context that does not fit, or
                one for a model that takes none; guidance without a context; a network whose output is not
                finite or has another shape.
        """
        model = self.model
        with reading(model, data=(x_T, context)), model.param_statements():
            x_T = start_states(model, num_samples, x_T)
            given = self._given(model, context, len(x_T))
            return self._last(model, self._chain(model, x_T, progress, given), given)

    def _given(self, model: DiffusionModel, context: Any, num_samples: int) -> Given:
        given = Given.of(context=context).with_rows(num_samples, shared=True, device=model.device)
        model.denoiser.check_given(given.of_kernels())
        require(
            context is not None or not self.guidance.strength,
            "argument 'context'",
            f"none for a sampler with {self.guidance!r}",
            "one, by which the draws are guided",
            "Pass context=, or sample without guidance.",
        )
        return given

    def compile(self, **settings: Any) -> None:
        """Compile a step (network and update) with ``torch.compile``, in place, when it is first called.

        Where the estimate is not linear in the network's output, only the network is compiled. All steps
        share one compiled function. Another number of samples may compile it again.

        Args:
            settings: Arguments of ``torch.compile``.

        Raises:
            ValueError: A model without a network.
        """
        network = getattr(self.diffusion.denoiser, "network", None)
        require(
            network is not None,
            "argument 'diffusion'",
            f"a {type(self.diffusion.denoiser).__name__}, which has no network to compile",
            "the model of a NeuralDenoiser",
            "Sample without compile().",
        )
        self._step = torch.compile(fused_step, **settings)
        self._network = torch.compile(network, **settings)

    def _chain(
        self, model: DiffusionModel, x_t: Tensor, progress: bool, given: Given = Given()
    ) -> Tensor:
        r""":math:`x_1` from :math:`x_T`."""
        update, denoiser = self.update(model), self._denoiser(model)
        linear = None if self.guidance.strength else linear_map(model.denoiser)
        rows = rows_of(update, model.denoiser, linear)
        previous = (
            None if update.of_previous is None else torch.zeros_like(x_t)
        )  # no weight at first
        for row in _bar(rows, progress):
            z = None if row.noise is None else torch.randn_like(x_t)
            if linear is None:
                x_0_hat = denoiser.x_0_hat(x_t, row.log_snr, **given.of_kernels())
                x_t, previous = combine(x_0_hat, x_t, previous, z, row)
            else:
                network: Any = model.denoiser.network
                c = beside(row.log_snr, given.context)
                try:
                    x_t, previous = self._step(network, x_t, previous, z, row, c)
                except TypeError:
                    check_signature(network, 2 if c is None else 3)
                    raise
        return x_t

    def _denoiser(self, model: DiffusionModel) -> Denoiser:
        """The model's denoiser, with the compiled network if there is one, and guided."""
        denoiser = model.denoiser
        if self._network is not None:
            denoiser = denoiser.with_schedule(model.schedule)
            denoiser.network = self._network
        return self.guidance.of(denoiser)

    def _last(self, model: DiffusionModel, x_1: Tensor, given: Given) -> Tensor:
        r""":math:`x_0` from :math:`x_1`: a draw, or the mean of a deterministic sampler if it exists."""
        remedy = "Lower the learning rate or clip gradients, and check the data's scale."
        check_finite("argument 'network', the states that it leads to", x_1, remedy)
        # A single call of the network is not worth compiling.
        walk = ReverseWalk(model, denoiser=self.guidance.of(model.denoiser), given=given)
        denoised = walk.look(x_1, 1)
        if self.deterministic:
            own = model.likelihood is None and denoised.logits is None
            kernel = None if own else model.decode_inside(x_1, denoised)
            if kernel is None or not kernel.support.is_discrete:
                mean = denoised.x_0_hat if kernel is None else kernel.mean
                return mean if model.transform is None else model.transform.inv(mean)
        return walk.end(x_1, denoised)()


class AncestralSampler(Sampler):
    r"""The reverse chain itself, :math:`x_{t-1} \sim p_\theta(x_{t-1} \mid x_t)`.

    .. math::
        x_{t-1} = \tilde\mu_t\big(x_t, \hat x_0(x_t)\big) + \sqrt{\Sigma_t}\, z .

    The draws have the same distribution as ``diffusion.strided(timesteps).sample()``, and with the same seed
    they are the same up to rounding. Where the variance is not known before the first step (a learned
    variance, exact denoisers and bits), the denoiser computes the kernel at each step.

    Args:
        diffusion: The model. It is read at each call, so that it may be trained in between.
        timesteps: ``None`` for all timesteps, a number of evenly spaced ones, or an increasing list of them.
        guidance: Guidance by the context, if any; see :class:`~pyro_diffusion.samplers.Guidance`.

    Raises:
        ValueError: An argument that is not a model, or timesteps that the model does not have.

    Example:
        >>> diffusion = DiffusionModel(NeuralDenoiser(MLP((2,)), LinearSchedule(1000), event_shape=(2,)))
        >>> AncestralSampler(diffusion, timesteps=20)(3).shape
        torch.Size([3, 2])

    References:
        Denoising Diffusion Probabilistic Models (Ho et al., 2020), algorithm 2.
        https://arxiv.org/abs/2006.11239
    """

    needs_score: ClassVar[bool] = False

    def update(self, model: DiffusionModel) -> Update:
        step = chain_step(downwards(model.schedule), model.schedule)
        zero, one = torch.zeros_like(step.signal), torch.ones_like(step.signal)
        denoiser: Any = model.denoiser
        return Update(
            of_x_t=posterior_mean(one, zero, step, missing_dim=0),
            of_x_0=posterior_mean(zero, one, step, missing_dim=0),
            noise=denoiser.variance(step).sqrt(),
        )

    def _chain(
        self, model: DiffusionModel, x_t: Tensor, progress: bool, given: Given = Given()
    ) -> Tensor:
        denoiser: Any = self.guidance.of(model.denoiser)
        if is_plain(denoiser) and not denoiser.variance.num_outputs:
            return super()._chain(model, x_t, progress, given)
        walk = ReverseWalk(model, denoiser=self._denoiser(model), given=given)
        for t in _bar(list(walk.timesteps[:-1]), progress):
            x_t = walk.kernel(x_t, t, walk.look(x_t, t))()
        return x_t


class _ImplicitSampler(Sampler):
    """A sampler that draws a fraction of the chain's noise."""

    def __init__(
        self,
        diffusion: DiffusionModel,
        timesteps: int | Sequence[int] | None = None,
        *,
        eta: float = 0.0,
        guidance: Guidance | None = None,
    ) -> None:
        super().__init__(diffusion, timesteps, guidance=guidance)
        remedy = "0 draws no noise after x_T, 1 as much as the chain."
        self.eta = check_between("eta", eta, 0, 1, "the share of the chain's noise", remedy, "[]")

    @property
    def deterministic(self) -> bool:
        """Whether no noise is drawn after :math:`x_T`, which is so for ``eta = 0``."""
        return self.eta == 0


class DDIMSampler(_ImplicitSampler):
    r"""Combine the estimates of datum and noise at the next timestep; :math:`\eta` of the noise is new.

    .. math::
        x_{t-1} = a_{t-1}\, \hat x_0 + \sqrt{\sigma_{t-1}^2 - \eta^2 \tilde\beta_t}\; \hat\epsilon
            + \eta \sqrt{\tilde\beta_t}\, z, \qquad
        \hat\epsilon = \frac{x_t - a_t \hat x_0}{\sigma_t} .

    With :math:`\eta = 0` the result is a function of :math:`x_T`, and becomes the probability flow as the
    steps become small. The last step is the mean :math:`\hat x_0(x_1)` if data are real numbers, and a draw
    if they are levels or counts. With :math:`\eta = 1` the sampler is the chain with
    :class:`~pyro_diffusion.denoisers.PosteriorVariance`.

    Args:
        diffusion: The model. It is read at each call, so that it may be trained in between.
        timesteps: ``None`` for all timesteps, a number of evenly spaced ones, or an increasing list of them.
        guidance: Guidance by the context, if any; see :class:`~pyro_diffusion.samplers.Guidance`.
        eta: :math:`\eta` in [0, 1], the share of the chain's noise.

    Raises:
        ValueError: An argument that is not a model of real numbers, timesteps that the model does not have,
            or ``eta`` outside [0, 1].

    Example:
        >>> diffusion = DiffusionModel(NeuralDenoiser(MLP((2,)), LinearSchedule(1000), event_shape=(2,)))
        >>> sampler = DDIMSampler(diffusion, timesteps=20)
        >>> x_T = torch.randn(3, 2)
        >>> torch.equal(sampler(3, x_T), sampler(3, x_T))
        True

    References:
        Denoising Diffusion Implicit Models (Song et al., 2021), eqs. 12 and 16.
        https://arxiv.org/abs/2010.02502
    """

    def update(self, model: DiffusionModel) -> Update:
        return _implicit_update(model, self.eta)


class ODESampler(_ImplicitSampler):
    r"""The step of :class:`DDIMSampler` with an extrapolation of the last two estimates: second order.

    .. math::
        \hat x_0 \;\to\; \Big(1 + \frac{1}{2 r_t}\Big) \hat x_0(x_t) - \frac{1}{2 r_t} \hat x_0(x_{t+1}),
        \qquad r_t = \frac{h_{t+1}}{h_t}, \quad h_t = \tfrac12 (\lambda_{t-1} - \lambda_t) .

    With :math:`\eta = 0` this is DPM-Solver++(2M) for the probability flow, and with :math:`\eta = 1`
    SDE-DPM-Solver++(2M) for the reverse diffusion. The first step, which has no earlier estimate, and the
    last step, to :math:`\hat x_0(x_1)`, are of first order. The sampler works best if the steps have equal
    lengths in log-SNR; choose ``timesteps`` for it.

    Args:
        diffusion: The model. It is read at each call, so that it may be trained in between.
        timesteps: ``None`` for all timesteps, a number of evenly spaced ones, or an increasing list of them.
        guidance: Guidance by the context, if any; see :class:`~pyro_diffusion.samplers.Guidance`.
        eta: :math:`\eta` in [0, 1], the share of the chain's noise.

    Raises:
        ValueError: An argument that is not a model of real numbers, timesteps that the model does not have,
            or ``eta`` outside [0, 1].

    Example:
        >>> diffusion = DiffusionModel(NeuralDenoiser(MLP((2,)), LinearSchedule(1000), event_shape=(2,)))
        >>> ODESampler(diffusion, timesteps=[1, 10, 100, 300, 1000])(3).shape
        torch.Size([3, 2])

    References:
        DPM-Solver++ (Lu et al., 2022), algorithm 2 and section 5. https://arxiv.org/abs/2211.01095
    """

    def update(self, model: DiffusionModel) -> Update:
        update, t = _implicit_update(model, self.eta), downwards(model.schedule)
        h = (model.schedule.log_snr(t - 1) - model.schedule.log_snr(t)) / 2
        half_ratio = torch.cat((torch.zeros_like(h[:1]), 0.5 * h[1:] / h[:-1]))  # 1 / 2r
        return update._replace(
            of_x_0=update.of_x_0 * (1 + half_ratio), of_previous=-update.of_x_0 * half_ratio
        )


def _implicit_update(model: DiffusionModel, eta: float) -> Update:
    r"""DDIM's step. With :math:`s = t - 1`, :math:`\sigma_s^2 - \eta^2 \tilde\beta_t = \sigma_s^2 (1 - \eta^2
    \mathrm{share})`."""
    step = chain_step(downwards(model.schedule), model.schedule)
    of_x_t = step.noise_prev * (1 - eta**2 * step.share).sqrt() / step.noise
    noise = eta * step.noise_prev * step.share.sqrt() if eta else None
    return Update(of_x_t, step.signal_prev - of_x_t * step.signal, noise)


def _bar(steps: Iterable[Any], progress: bool) -> Iterator[Any]:
    return tqdm(steps, "sampling", unit="step", delay=5, disable=not progress, leave=False)
