r"""The terms of a diffusion model's bound one by one, each from a state of its own and not from a path.

A KL depends on a single state, :math:`L_{t-1} = E_{q(x_t \mid x_0)}\, \mathrm{KL}(\cdot)`, and the
reconstruction on :math:`x_1`. Where :math:`q(x_t \mid x_0)` has a formula, the terms of all timesteps, data
and particles are independent rows, which can be put into batches of any size. The sum of the terms is the
bound, and its Monte Carlo error is the error of a sum of independent numbers,

.. math::
    s^2 = \sum_t s_t^2 .
"""

from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from pyro_diffusion.bounds.moments import Moments
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.terms import ELBOTerms
from pyro_diffusion.chains.base import GuideProgram
from pyro_diffusion.denoisers import Denoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.reading import BUDGET
from pyro_diffusion.walk import drawing, whose_programs

_BYTES = 64  # of a row: its indices, its term, and the moments


def whose_terms_are_single(model: Any, guide: Any) -> DiffusionModel | None:
    """The diffusion model that has these two programs, if the guide has its marginals in closed form.

    The denoiser must not override or hook ``forward``, because single terms are computed without calling it.
    """
    diffusion = whose_programs(model, guide)
    if diffusion is None or not isinstance(guide, GuideProgram) or not guide.knows_marginals():
        return None
    denoiser = diffusion.denoiser
    hooks = denoiser._forward_hooks or denoiser._forward_pre_hooks
    own = type(denoiser).forward is Denoiser.forward and not hooks
    return diffusion if own and not drawing(diffusion) else None


def single_terms(rows: Rows, num_particles: int, progress: bool) -> ELBOTerms:
    """The bound of every datum, from ``num_particles`` states at each timestep.

    Args:
        rows: The model and its data.
        num_particles: States of each datum at each timestep.
        progress: Show a progress bar if it takes more than five seconds.
    """
    length, count = int(rows.time.num_timesteps), rows.count
    steps = max(1, int(BUDGET // (_BYTES * count)))  # timesteps of all data at a time
    moments = []
    with tqdm(
        total=num_particles * length * count, desc="bound", unit="row", delay=5,
        disable=not progress, leave=False,
    ) as bar:  # fmt: skip
        for t in torch.arange(1, length + 1, device=rows.device).split(steps):
            moments.append(_moments(rows, t, num_particles, bar))
    return _terms(rows, moments)


def _moments(rows: Rows, t: Tensor, num_particles: int, bar: tqdm) -> Moments:
    """Moments over particles of the terms of some timesteps, of shape ``(len(t), N)``."""
    moments = Moments()
    at_once = max(1, rows.batch_size // (len(t) * rows.count))
    for start in range(0, num_particles, at_once):
        shape = (min(at_once, num_particles - start), len(t), rows.count)
        data = torch.arange(rows.count, device=rows.device).expand(shape).flatten()
        values = rows.terms(data, t[:, None].expand(shape).flatten(), bar.update)
        moments.update(values.reshape(shape))
    return moments


def _terms(rows: Rows, moments: list[Moments]) -> ELBOTerms:
    """The terms of every datum, from the terms of rows, which have signs and no log-Jacobian."""
    mean = torch.cat([part.mean for part in moments])
    error = torch.cat([part.standard_error() for part in moments])
    prior, mask, length = rows.log_volume - rows.known, rows.given.mask, len(mean)
    certain = torch.zeros_like(prior)[None]
    return ELBOTerms(
        reconstruction=mean[0] + rows.log_volume,
        transition=-mean[1:],
        prior=prior,
        standard_error=error.square().sum(0).sqrt(),
        term_standard_error=torch.cat((error, certain)),
        kinds=("log-likelihood", *("KL",) * length),
        site_names=tuple(f"x_{t}" for t in range(length + 1)),
        event_size=rows.data[0].numel() if mask is None else int(mask.sum()) / rows.count,
        draws="single",
    )
