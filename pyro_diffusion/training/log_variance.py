r"""The variance of log-weights as an objective, for posteriors with several modes.

The bound is a reverse KL divergence: a guide loses little by leaving out a mode. The variance of the
log-weights is another divergence of guide and posterior.

References:
    VarGrad (Richter et al., 2020). https://arxiv.org/abs/2010.10436
    Improved sampling via learned diffusions (Richter and Berner, 2024). https://arxiv.org/abs/2307.01198
"""

from typing import Any

import torch
from pyro.distributions import Delta
from pyro.infer import Trace_ELBO
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pyro_diffusion.bounds.checks import is_latent
from pyro_diffusion.checks import check_count, check_finite
from pyro_diffusion.evidence.particles import check_random, log_joint


class LogVarianceELBO(Trace_ELBO):
    r"""Half of the variance of the log-weights, over draws of the guide that have no gradient:

    .. math::
        \tfrac12 \operatorname{Var}_{z \sim r} \big[\log p(y, z) - \log q_\phi(z)\big], \qquad
        r = q_\phi \text{ without its gradient.}

    It is zero if and only if the guide is the posterior. It is a divergence, and no bound of the evidence:
    ``loss``, ``evaluate_loss`` and ``SVI.step`` return this number. For parameters of the densities that are
    drawn from, its gradient has the same mean as the bound's. Yet the gradient of a finite number of draws
    has more weight where the guide is wrong, so that a guide which begins broad can keep modes that the bound
    loses. The draws are the guide's own: a mode that none of them reaches is lost here too. The variance is
    minimised first, and then the bound::

        many = dict(num_particles=256, vectorize_particles=True)
        SVI(model, guide, optimizer, LogVarianceELBO(**many))    # until it does not fall any more
        SVI(model, guide, optimizer, Trace_ELBO(**many))

    The bound can lose a mode again. Take a small learning rate there, and
    :class:`~pyro_diffusion.training.KeepBest`.

    The base of an :class:`~pyro_diffusion.inference.AutoDiffusion` moves the target in the coordinates of the
    chain, and its gradient is another than the bound's. Hold it meanwhile,
    ``guide.base.requires_grad_(False)``.

    Parameters of the model have no gradient, because the evidence, which they change, is a constant here.

    Args:
        num_particles: Number of draws, two or more. Hundreds are better.
        arguments: Arguments of ``Trace_ELBO``.

    Raises:
        ValueError: Fewer than two draws. From a step: a plate of a part of the data, with which the estimate
            would be biased; latents that differ between the programs; a latent that is always the same; or
            weights that are not finite.

    References:
        VarGrad (Richter et al., 2020). https://arxiv.org/abs/2010.10436
        Improved sampling via learned diffusions (Richter and Berner, 2024).
        https://arxiv.org/abs/2307.01198
    """

    def __init__(self, num_particles: int = 16, **arguments: Any) -> None:
        remedy = "The variance is over draws: hundreds, with vectorize_particles=True, are better."
        super().__init__(
            num_particles=check_count("num_particles", num_particles, 2, remedy), **arguments
        )
        self._checked = False

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Half of the variance, differentiable by the parameters of the guide."""
        return self._traced(model, guide, args, kwargs)[0]

    def loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Half of the variance: a divergence, and no bound of the evidence."""
        with torch.no_grad():
            return self._traced(model, guide, args, kwargs)[0].item()

    def loss_and_grads(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> float:
        """Half of the variance. Adds its gradients to the gradients of the guide's parameters."""
        loss, parameters = self._traced(model, guide, args, kwargs)
        if parameters:
            loss.backward(inputs=parameters, retain_graph=self.retain_graph)
        return loss.item()

    def _traced(
        self, model: Any, guide: Any, args: Any, kwargs: Any
    ) -> tuple[Tensor, list[Tensor]]:
        """Half of the variance, and the parameters of the guide."""
        together = self.vectorize_particles
        count = self.num_particles if together else 1
        weights, parameters = [], {}
        with _WithoutGradient():
            for p, q in self._get_traces(model, guide, args, kwargs):
                if not self._checked:
                    again = self._vectorized_num_particles(guide) if together else guide
                    check_random(q, p, again, *args, **kwargs)
                    self._checked = True
                nesting = self.max_plate_nesting - 1 if together else None
                log_p, log_q = (log_joint(trace, count, nesting) for trace in (p, q))
                weights.append(log_p - log_q)
                for name, site in q.nodes.items():
                    if site["type"] == "param":
                        parameters[name] = site["value"].unconstrained()
        trained = [value for value in parameters.values() if value.requires_grad]
        remedy = (
            "Take a smaller learning rate, clip gradients, or hold the base of an AutoDiffusion."
        )
        log_weights = check_finite("draws of the guide, log p − log q", torch.cat(weights), remedy)
        return log_weights.var() / 2, trained


class _WithoutGradient(Messenger):
    """Cut the gradient of every draw. Points that follow from a draw, as in automatic guides, keep theirs."""

    def _pyro_sample(self, msg: Any) -> None:
        fresh = not msg["done"]  # and not a value of the guide that the model takes over
        if is_latent(msg) and fresh and not isinstance(msg["fn"], Delta):
            msg["infer"]["_cut"] = True

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["infer"].get("_cut"):
            msg["value"] = msg["value"].detach()
