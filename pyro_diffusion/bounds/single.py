r"""The terms of a diffusion model's bound one by one: a state for each, and no path from one to the next.

A KL depends on a single state, :math:`L_{t-1} = E_{q(x_t \mid x_0)}\, \mathrm{KL}(\cdot)`, and the
reconstruction on :math:`x_1`. Where :math:`q(x_t \mid x_0)` has a formula, the terms of all timesteps, data
and particles are rows that a network takes in any batches. The sum of the terms is the bound, and its Monte
Carlo error that of a sum of independent numbers,

.. math::
    s^2 = \sum_t s_t^2 .
"""

from typing import Any

import torch
from tqdm.auto import tqdm

from pyro_diffusion.bounds.moments import Moments
from pyro_diffusion.bounds.rows import Rows
from pyro_diffusion.bounds.terms import ELBOTerms
from pyro_diffusion.chains import GenerativeChain
from pyro_diffusion.chains.base import GuideProgram
from pyro_diffusion.diffusion import DiffusionModel


def whose_terms_are_single(model: Any, guide: Any) -> DiffusionModel | None:
    """The diffusion model of which these are the programs, if the guide knows its marginals."""
    if not isinstance(guide, GuideProgram) or not isinstance(model, GenerativeChain):
        return None
    owner = model.owner
    whole = model.num_timesteps == guide.num_timesteps and guide.owner is owner
    if not whole or not guide.knows_marginals() or not isinstance(owner, DiffusionModel):
        return None
    own = owner.model
    kernels = ("prior", "transition", "likelihood")
    same = all(getattr(model, k).function == getattr(own, k).function for k in kernels)
    return owner if same and model.num_timesteps == own.num_timesteps else None


def single_terms(rows: Rows, num_particles: int, progress: bool) -> ELBOTerms:
    """The bound of every datum, with as many states at each timestep as there are particles.

    Args:
        rows: The model and its data.
        num_particles: States of each datum at each timestep.
        progress: Show a progress bar if it takes more than five seconds.
    """
    length, count = int(rows.time.num_timesteps), rows.count
    t = torch.arange(1, length + 1, device=rows.device)
    at_once = max(1, min(num_particles, rows.batch_size // (length * count)))
    moments = Moments()
    with tqdm(total=num_particles * length * count, desc="bound", unit="row", delay=5,
              disable=not progress, leave=False) as bar:  # fmt: skip
        for start in range(0, num_particles, at_once):
            times = min(at_once, num_particles - start)
            shape = (times, length, count)
            data = torch.arange(count, device=rows.device).expand(shape).flatten()
            values = rows.terms(data, t[:, None].expand(shape).flatten(), bar.update)
            moments.update(values.reshape(shape))
    return _terms(rows, moments)


def _terms(rows: Rows, moments: Moments) -> ELBOTerms:
    """The terms of every datum from those of rows, which have their signs and no log-Jacobian."""
    prior, error = rows.log_volume - rows.known, moments.standard_error()
    certain = torch.zeros_like(prior)[None]
    mask = rows.given.mask
    length = len(moments.mean)
    return ELBOTerms(
        reconstruction=moments.mean[0] + rows.log_volume,
        transition=-moments.mean[1:],
        prior=prior,
        standard_error=error.square().sum(0).sqrt(),
        term_standard_error=torch.cat((error, certain)),
        kinds=("log-likelihood", *("KL",) * length),
        site_names=tuple(f"x_{t}" for t in range(length + 1)),
        event_size=rows.data[0].numel() if mask is None else int(mask.sum()) / rows.count,
        draws="single",
    )
