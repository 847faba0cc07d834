r"""The terms of single network rows, and of whole paths, for a model and its data.

A row is a datum at one timestep: a draw of :math:`q(x_t \mid x_0)`, a call of the network, and the term
there, which is the reconstruction at the first timestep and a KL at every other. A path is a draw of the
whole chain, with a row for each timestep. Masks and contexts are split into rows like the data: a term
under a mask is the term of the observed entries, and a context is passed to the network.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from pyro_diffusion.chains.time import Time
from pyro_diffusion.checks import check_data, check_finite
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.given import Given, as_real, observed_part, seen, together
from pyro_diffusion.scoring import Score, log_density, score
from pyro_diffusion.walk import ReverseWalk, check_weights

GROUPS = 32  # groups of timesteps, each with a mean, a noise and a share of its own
_HALVINGS = 10  # of the first group: few bits have flipped there, each with a term like 1 / t
PATH_GROUPS = 4  # groups of sites in a whole path, each with one coefficient


class Rows:
    """Terms of single network rows, and of whole paths.

    Args:
        diffusion: The model.
        x_0: Data.
        given: What goes with the data.
        time: The chain's time.
        batch_size: Network rows at a time; by default as many as fit into the budget of memory.
    """

    def __init__(
        self,
        diffusion: DiffusionModel,
        x_0: Tensor,
        given: Given,
        time: Time,
        batch_size: int | None = None,
    ) -> None:
        x_0 = check_data(x_0, given.mask)
        given = given.with_rows(len(x_0), device=x_0.device)
        diffusion.denoiser.check_given(given.of_kernels())
        self.diffusion, self.time = check_weights(diffusion), time
        walk = ReverseWalk(diffusion, given=given)
        self.batch_size = walk.rows_within(x_0) if batch_size is None else batch_size
        self.given, self.count, self.device = given, len(x_0), x_0.device
        self.embedded = diffusion.embed(x_0, mask=given.mask)
        self.of_state = None if given.mask is None else diffusion.state_mask(given.mask)
        self.data: Any = as_real(x_0)
        self.spent = 0
        self.edges = _edges(time).to(x_0.device)
        #: How many timesteps a group has, or how much time; the reconstruction is the first group.
        self.sizes = torch.cat((torch.ones_like(self.edges[:1]), self.edges.diff()))
        # Two parts of the bound need no network row: the term at x_T, and the log-Jacobian of a transform.
        self.log_volume = (
            torch.zeros(len(x_0), dtype=torch.float64, device=x_0.device)
            if diffusion.transform is None
            else diffusion.log_volume(x_0, given.mask).double()
        )
        self.known = self.log_volume - self._prior_kl()

    def _prior_kl(self) -> Tensor:
        """The term at :math:`x_T` of every datum, computed in closed form."""
        last = torch.as_tensor(self.time.last, device=self.device)
        marginal = self.time.marginal(self.diffusion.process, self.embedded, last)
        q, p = (observed_part(x, self.of_state) for x in (marginal, self.diffusion.prior()))
        kl = score(q, p).kl
        if kl is None:
            raise ValueError(
                f"site x_T: got no formula for the KL of {type(marginal).__name__} and the prior; expected "
                "one, because this term is computed and not drawn. Register it with "
                "torch.distributions.register_kl, or use elbo_terms."
            )
        return kl

    def timesteps(self, group: Tensor, position: Tensor) -> Tensor:
        """Timesteps at a position in [0, 1) of a group; group 0 is the reconstruction."""
        if len(self.edges) == 1:  # a chain of one step
            return torch.ones_like(position)
        inner = (group - 1).clamp(min=0)
        start, end = self.edges[inner], self.edges[inner + 1]
        return torch.where(group == 0, self.time.first, start + position * (end - start))

    def has_kl(self) -> bool:
        """Whether the KL of a step has a formula; otherwise the log-ratio of a draw is used instead."""
        if self.time.num_timesteps == 1:
            return True
        t = torch.as_tensor(self.time.last, device=self.device)[None]
        return self._score(torch.zeros_like(t, dtype=torch.long), t).kl is not None

    def terms(
        self, data: Tensor, t: Tensor, done: Callable[[int], Any] = lambda count: None
    ) -> Tensor:
        """Terms of the bound at timesteps ``t`` of rows ``data``, with their signs; float64, ``(rows,)``.

        A batch of the network has either reconstructions alone or other terms alone, so that no kernel is
        computed without being used.
        ``done(count)`` is called after each batch.
        """
        self.spent += len(data)
        t = self.time.whole(t)
        terms = torch.empty(len(data), dtype=torch.float64, device=data.device)
        first = t == self.time.first
        for where, kind in ((first, self._reconstruction), (~first, self._step)):
            for rows in where.nonzero().squeeze(-1).split(self.batch_size):
                if len(rows):
                    terms[rows] = kind(data[rows], t[rows])
                    done(len(rows))
        at = "" if terms.isfinite().all() else f" at timestep {t[~terms.isfinite()][0].item():g}"
        remedy = "Check the parameters for NaN, and the data for values outside the support."
        return check_finite(f"terms of the bound{at}", terms, remedy)

    def _reconstruction(self, data: Tensor, t: Tensor) -> Tensor:
        x_0, given = together(itemgetter(data), self.embedded, self.given)
        x_1 = self._seen(self.time.marginal(self.diffusion.process, x_0, t).sample(), data)
        likelihood = self.diffusion.decode(x_1, self._denoised(x_1, t, given))
        likelihood = observed_part(likelihood, given.mask)
        return log_density(likelihood, self.data[data]) - self.log_volume[data]

    def _step(self, data: Tensor, t: Tensor) -> Tensor:
        return -self._score(data, t).term

    def _score(self, data: Tensor, t: Tensor) -> Score:
        time, process, of_state = self.time, self.diffusion.process, self._of_state(data)
        x_0, given = together(itemgetter(data), self.embedded, self.given)
        x_t = time.marginal(process, x_0, t).sample()
        state = self._seen(x_t, data)
        p = time.reverse(self.diffusion.denoiser, state, self._denoised(state, t, given), t)
        q = time.posterior(process, x_t, x_0, t)
        return score(observed_part(q, of_state), observed_part(p, of_state))

    def _denoised(self, x_t: Tensor, t: Tensor, given: Given) -> Any:
        log_snr = self.time.log_snr(self.diffusion.schedule, t)
        return self.diffusion.denoiser.denoise(x_t, log_snr, **given.of_kernels())

    def _of_state(self, data: Tensor) -> Tensor | None:
        return None if self.of_state is None else self.of_state[data]

    def _seen(self, x_t: Tensor, data: Tensor) -> Tensor:
        return seen(x_t, self._of_state(data), self.diffusion.gap)

    def paths(self, data: Tensor) -> tuple[Tensor, Tensor]:
        """The bound of whole paths by KLs, without ``known``, and log-ratio minus KL by group of sites."""
        self.spent += len(data) * int(self.time.num_timesteps)
        parts = [self._paths(part) for part in data.split(self.batch_size)]
        bounds, excess = zip(*parts, strict=True)
        return torch.cat(bounds), torch.cat(excess)

    def _paths(self, data: Tensor) -> tuple[Tensor, Tensor]:
        x_0, given = together(itemgetter(data), self.embedded, self.given)
        walk = ReverseWalk(self.diffusion, rows=self.batch_size, given=given)
        *timesteps, _ = walk.timesteps
        site = score(walk.start(x_0), walk.start())
        excess = torch.zeros(PATH_GROUPS, len(data), dtype=torch.float64, device=x_0.device)
        excess[-1] += site.log_ratio - site.term
        bound = torch.zeros_like(excess[0])
        for t in timesteps:
            site = walk.step(site.x, x_0, t)
            excess[(t - 1) * PATH_GROUPS // len(walk.timesteps)] += site.log_ratio - site.term
            bound -= site.term
        bound += log_density(walk.end(site.x), self.data[data])
        return bound - self.log_volume[data], excess.T


def _edges(time: Time) -> Tensor:
    """Edges of groups of timesteps. They have even widths, except that the first is halved repeatedly."""
    edges = time.edges(GROUPS)
    if len(edges) == 1:  # no timestep has a KL
        return edges
    halves = edges[0] + (edges[:2].diff() * 0.5 ** torch.arange(1, 1 + _HALVINGS))
    return torch.cat((edges, time.whole(halves).double())).unique()
