r"""Training: objectives, a compiled loss, data in batches, several processes, Lightning.

.. math::
    \theta, \phi \;\leftarrow\; \operatorname*{arg\,max}_{\theta, \phi}\;
        \mathrm{ELBO}(\theta, \phi), \qquad
    \mathrm{ELBO} = E_q\big[\log p_\theta(x_{0:T}) - \log q_\phi(x_{1:T} \mid x_0)\big] .

``SVI`` in a script needs none of these modules:

- :mod:`~pyro_diffusion.training.fitting`: a whole run in one call. Its data are in
  :mod:`~pyro_diffusion.training.columns`, the held-out part of them in
  :mod:`~pyro_diffusion.training.held_out`, and its result in :mod:`~pyro_diffusion.training.fitted`.
- :mod:`~pyro_diffusion.training.objectives`: KL warm-up, free bits, the variance of the bound.
  :mod:`~pyro_diffusion.training.log_variance`: the variance of log-weights, for guides of several modes.
  :mod:`~pyro_diffusion.training.keeping` keeps the best parameters of a guide.
- :mod:`~pyro_diffusion.training.compilation`: any static model and guide as one compiled graph, which
  :mod:`~pyro_diffusion.training.graphs` traces and checks.
- :mod:`~pyro_diffusion.training.batches` and :mod:`~pyro_diffusion.training.parallel`: arrays larger than
  memory, and work that is divided among processes.
- :mod:`~pyro_diffusion.training.lightning_module` and :mod:`~pyro_diffusion.training.checkpoints`: the
  adapter to Lightning's ``Trainer``; :mod:`~pyro_diffusion.training.watching` is the callback of ``fit``.
  Lightning is imported when one of their names is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from pyro_diffusion.training.batches import OrderedBatches, ShuffledBatches
from pyro_diffusion.training.compilation import CompiledELBO, compile_elbo
from pyro_diffusion.training.fitted import Fit
from pyro_diffusion.training.fitting import Recipe, fit
from pyro_diffusion.training.keeping import Gain, KeepBest
from pyro_diffusion.training.log_variance import LogVarianceELBO
from pyro_diffusion.training.objectives import (
    FreeBitsELBO,
    KLWarmup,
    MinimumVarianceELBO,
    bound_by_datum,
)
from pyro_diffusion.training.parallel import over_ranks

if TYPE_CHECKING:
    from pyro_diffusion.training.checkpoints import CheckpointFiles, latest_checkpoint
    from pyro_diffusion.training.lightning_module import SVIModule

__all__ = [
    "CheckpointFiles",
    "CompiledELBO",
    "Fit",
    "FreeBitsELBO",
    "Gain",
    "KLWarmup",
    "KeepBest",
    "LogVarianceELBO",
    "MinimumVarianceELBO",
    "OrderedBatches",
    "Recipe",
    "SVIModule",
    "ShuffledBatches",
    "bound_by_datum",
    "compile_elbo",
    "fit",
    "latest_checkpoint",
    "over_ranks",
]

_WITH_LIGHTNING = {
    "CheckpointFiles": "checkpoints",
    "SVIModule": "lightning_module",
    "latest_checkpoint": "checkpoints",
}


if not TYPE_CHECKING:  # type checkers read the imports above

    def __getattr__(name: str) -> Any:
        """Import the names that need Lightning when they are first used (PEP 562)."""
        if name not in _WITH_LIGHTNING:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        try:
            import_module("lightning.pytorch")
        except ImportError as error:
            raise ImportError(
                "pyro_diffusion.training: got no installation of Lightning; expected lightning>=2.6. Install "
                "it with pip install 'pyro-diffusion[lightning]', or train with pyro.infer.SVI."
            ) from error
        return getattr(import_module(f"{__name__}.{_WITH_LIGHTNING[name]}"), name)
