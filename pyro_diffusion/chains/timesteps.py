r"""How random timesteps are drawn: laws over :math:`\{1, …, T\}` that a program samples ``t`` from.

The bound is a sum over timesteps; a subsampled program draws ``k`` of them for each datum and weights
a term by :math:`1 / (k\, \pi(t))`, which leaves the expectation unchanged for any :math:`\pi > 0`.
``t = 1`` selects the reconstruction term and ``t ≥ 2`` the KL at site :math:`x_{t-1}`. The law changes the
variance. For independent draws the variance is least if :math:`\pi(t)` is proportional to the root of the
term's second moment.

If a batch is spread over several processes, :class:`JointStrata` stratifies the draws of all of them
together.

References:
    Variational Diffusion Models (Kingma et al., 2021), appendix I.1 (low-discrepancy timesteps).
    https://arxiv.org/abs/2107.00630
    Improved Denoising Diffusion Probabilistic Models (Nichol and Dhariwal, 2021), section 3.3 (importance
    sampling). https://arxiv.org/abs/2102.09672
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_diffusion.checks import check_between, looking, require
from pyro_diffusion.distributions import (
    ContinuousTimestepDistribution,
    IndependentTimestepDistribution,
    Share,
    TimestepDistribution,
)
from pyro_diffusion.scoring import log_density, replayed, score


class JointStrata(Messenger):
    r"""An effect handler that stratifies timesteps over the batches of all processes together.

    Of :math:`W` processes with :math:`n` draws each, the one of rank :math:`r` takes the strata

    .. math::
        \{ s \in \{0, …, Wn - 1\} : s \equiv r + \mathrm{shift} \pmod W \},

    in random order. ``shift`` is uniform on :math:`\{0, …, W - 1\}` and new at every step. All processes have
    the same shift without communication, because their generators have the same seed. Each entry alone
    therefore has law :math:`\pi`. If all processes have equally many draws, their draws together hit each
    stratum once. (A law that each process learns by itself differs between processes. The bound is unbiased
    nevertheless.)

    Inside the handler, in guide and model, a site with a
    :class:`~pyro_diffusion.distributions.TimestepDistribution` draws its share of the strata. Independent
    draws do not change. Call :meth:`advance` between steps. It writes the new shift in place, so that a
    captured graph reads it as well.

    Args:
        rank: :math:`r`, in {0 … W − 1}.
        world_size: :math:`W`.
        seed: Seed of the shifts, the same in all processes.
        device: Where the timesteps are drawn.
    """

    in_place: ClassVar[bool] = True  #: the shift changes in place, as a compiled program needs it

    def __init__(
        self, rank: int, world_size: int, seed: int, device: torch.device | str = "cpu"
    ) -> None:
        super().__init__()
        self.rank, self.world_size = rank, world_size
        self.generator = torch.Generator().manual_seed(seed)
        self.rest = torch.full((), rank, dtype=torch.long, device=device)
        self.advance()

    def advance(self) -> None:
        """Draw the shift of the next step."""
        shift = torch.randint(self.world_size, (), generator=self.generator)
        self.rest.copy_((self.rank + shift) % self.world_size)

    def _pyro_sample(self, msg: Any) -> None:
        if isinstance(msg["fn"], TimestepDistribution):
            msg["fn"] = msg["fn"].shared(Share(self.rest, self.world_size))


class Timesteps(ABC):
    """A rule that gives the law of the timesteps, for a chain of any length."""

    @abstractmethod
    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        r"""The law :math:`\pi` over :math:`\{1, …, T\}`."""

    def continuous(self, device: torch.device) -> TimestepDistribution:
        r"""The law over the times :math:`u \in [0, 1]` of the continuous chain, if the rule has one.

        Raises:
            ValueError: The rule has none.
        """
        raise ValueError(
            f"argument 'timesteps': got {self} for a continuous chain, in which no single time has a "
            "probability; expected a law with a share for the reconstruction. Use StratifiedTimesteps()."
        )


class StratifiedTimesteps(Timesteps):
    r"""Uniform over the KL terms, with a share of the draws for the reconstruction term.

    .. math::
        \pi(1) = \max(\rho, 1/T), \qquad \pi(t) = \frac{1 - \pi(1)}{T - 1} \quad (t \ge 2).

    Under a uniform law the reconstruction term would be drawn once in :math:`T` draws, with weight :math:`T`,
    and would dominate the variance of the bound.

    Args:
        reconstruction_share: :math:`\rho`, in (0, 1).

    Raises:
        ValueError: A share outside (0, 1).
    """

    def __init__(self, reconstruction_share: float = 0.1) -> None:
        meaning, remedy = "the share of the draws that go to t = 1", "0.1 suits most likelihoods."
        self.reconstruction_share = check_between(
            "reconstruction_share", reconstruction_share, 0, 1, meaning, remedy
        )
        self._laws: dict[Any, TimestepDistribution] = {}  # nothing that they depend on changes

    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        key = self.reconstruction_share, num_timesteps, device
        vars(self).setdefault("_laws", {})  # an older pickle does not have it
        if key not in self._laws:
            # It may be made in evaluation and used in training, so it must hold no inference tensors.
            with torch.inference_mode(False):
                log_pi = self._log_pi(num_timesteps, device)
                edges = TimestepDistribution.edges_of(log_pi)
            self._laws[key] = TimestepDistribution(log_pi, edges=edges)
        return self._laws[key]

    def _log_pi(self, num_timesteps: int, device: torch.device) -> Tensor:
        first = max(self.reconstruction_share, 1 / num_timesteps)
        rest = (1 - first) / max(num_timesteps - 1, 1)
        pi = torch.full((num_timesteps,), rest, dtype=torch.float64, device=device)
        pi[0] = first
        return pi.log()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_laws": {}}

    def continuous(self, device: torch.device) -> TimestepDistribution:
        first = self.reconstruction_share
        pi = torch.tensor([first, 1 - first], dtype=torch.float64, device=device)
        return ContinuousTimestepDistribution(pi.log())

    def __repr__(self) -> str:
        return f"{type(self).__name__}(reconstruction_share={self.reconstruction_share})"


class UniformTimesteps(Timesteps):
    r"""Independent draws from a uniform law, :math:`\pi(t) = 1 / T`, the rule of textbooks.

    The reconstruction term has one draw in :math:`T`, and its weight :math:`T` dominates the variance.
    :class:`StratifiedTimesteps` has less variance at the same cost.
    """

    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        pi = torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64, device=device)
        return IndependentTimestepDistribution(pi.log())

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


class ImportanceTimesteps(Timesteps):
    r"""Draws where the terms are large: :math:`\pi(t) \propto \sqrt{E\,L_t^2}`, from running second moments.

    .. math::
        \pi(t) = (1 - u)\, \frac{\sqrt{m_t}}{\sum_s \sqrt{m_s}} + u\, \pi_0(t), \qquad
        m_t \leftarrow d\, m_t + (1 - d)\, \overline{L_t^2},

    where :math:`\pi_0` is the stratified law. The first draws are from :math:`\pi_0`, and its share
    :math:`u` bounds every weight. The moments of timesteps that have not been drawn yet are interpolated.
    Call :meth:`observe` now and then during training, to update the moments::

        timesteps = ImportanceTimesteps()
        pair = diffusion.subsampled(timesteps=timesteps)
        ...
        if step % 50 == 0:
            timesteps.observe(pair.model, pair.guide, batch)

    Args:
        decay: :math:`d`, in [0, 1).
        uniform_share: :math:`u`, in (0, 1].
        reconstruction_share: :math:`\rho` of :math:`\pi_0`, as in :class:`StratifiedTimesteps`.

    Raises:
        ValueError: A number outside its range; from ``observe``, programs that are not a subsampled pair.
    """

    def __init__(
        self, decay: float = 0.9, uniform_share: float = 0.1, reconstruction_share: float = 0.1
    ) -> None:
        meaning, remedy = (
            "the share of a moment that an observation leaves",
            "0.9 averages over about ten observations.",
        )
        self.decay = check_between("decay", decay, 0, 1, meaning, remedy, "[)")
        meaning, remedy = "the share of the draws by the stratified law", "0.1 bounds every weight."
        self.uniform_share = check_between(
            "uniform_share", uniform_share, 0, 1, meaning, remedy, "(]"
        )
        self.start = StratifiedTimesteps(reconstruction_share)
        self.moments: dict[int, float] = {}
        # Laws by length and device. They change in place, because a compiled program reads these tensors.
        self._laws: dict[tuple[int, torch.device], Tensor] = {}

    def __call__(self, num_timesteps: int, device: torch.device) -> TimestepDistribution:
        law = self._laws.get((num_timesteps, device))
        if law is None:
            # Training changes the tensor in place, which torch forbids for an inference tensor.
            with torch.inference_mode(False):
                law = self._laws[num_timesteps, device] = self._log_pi(num_timesteps, device)
        elif looking():
            law.copy_(self._log_pi(num_timesteps, device))
        return TimestepDistribution(law)

    def _log_pi(self, num_timesteps: int, device: torch.device) -> Tensor:
        start = self.start(num_timesteps, device).log_pi
        if not self.moments:
            return start.clone()
        root = torch.as_tensor(self._roots(num_timesteps), device=device)
        pi = (1 - self.uniform_share) * root / root.sum()
        return (pi + self.uniform_share * start.exp()).log()

    def _roots(self, num_timesteps: int) -> np.ndarray:
        """Square roots of the moments. Those of the KLs are interpolated; the reconstruction has its own."""
        seen = sorted(t for t in self.moments if 2 <= t <= num_timesteps)
        logs = [0.5 * np.log(self.moments[t]) for t in seen]
        roots = np.empty(num_timesteps)
        if seen:
            roots[1:] = np.exp(np.interp(np.arange(2, num_timesteps + 1), seen, logs))
        else:
            roots[1:] = self.moments[1] ** 0.5
        roots[0] = self.moments[1] ** 0.5 if 1 in self.moments else roots[1:].mean()
        return roots

    @torch.no_grad()
    def observe(
        self, model: Callable[..., Any], guide: Callable[..., Any], x_0: Tensor, **given: Any
    ) -> None:
        """Update the moments with the terms of one draw of a subsampled pair."""
        drawn, scored = replayed(model, guide, x_0, **given)
        q, p = drawn.nodes, scored.nodes
        require(
            "t" in q and "x_{t-1}" in p,
            "arguments 'model' and 'guide'",
            f"programs with the sites {', '.join(map(repr, q))}",
            "a subsampled pair, which draws timesteps",
            "Pass diffusion.subsampled(timesteps=…).",
        )
        step, t = p["x_{t-1}"], q["t"]["value"]
        kl = score(q["x_{t-1}"]["fn"], step["fn"], step["value"]).term
        reconstruction = log_density(p["x_0"]["fn"], p["x_0"]["value"])
        squares = torch.where(t == 1, reconstruction, kl).square()
        t, squares = torch.broadcast_tensors(t, squares)
        for step in t.unique().tolist():
            mean = max(squares[t == step].mean().item(), 1e-30)
            before = self.moments.get(step, mean)
            self.moments[step] = self.decay * before + (1 - self.decay) * mean
        for (length, device), law in self._laws.items():
            law.copy_(self._log_pi(length, device))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(decay={self.decay}, uniform_share={self.uniform_share}, "
            f"{len(self.moments)} moments)"
        )
