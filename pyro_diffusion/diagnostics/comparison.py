r"""Comparison of models by their scores of the same held-out data.

The score of a datum is an estimate of :math:`\log p(x_0)`: the evidence where the importance weights of
every model can be trusted, and the bound elsewhere. ArviZ adds the scores and ranks the models.
"""

import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyro_diffusion import arviz_bridge
from pyro_diffusion.checks import check_argument, require
from pyro_diffusion.diagnostics.recording import as_numpy
from pyro_diffusion.evidence import Evidence
from pyro_diffusion.evidence.evidence import EXACT

if TYPE_CHECKING:
    import numpy as np
    import pandas


def compare(evidence: Mapping[str, Evidence]) -> "pandas.DataFrame":
    r"""Rank models by their scores of the same held-out data, through ``arviz.compare``.

    The score of a datum is its evidence if Pareto :math:`\hat k` is below 0.7 for every model (for few
    particles, below :math:`1 - 1 / \log_{10} K`). Otherwise it is the bound of every model, from the same
    draws. An estimate that cannot be trusted is therefore never used for the ranking, and the evidence of one
    model is never compared with the bound of another. The one exception is a density that is known,
    :meth:`Evidence.exact`: it is compared with the bounds of other models where these have no evidence that
    can be trusted.

    The table has ArviZ's own columns (before 1.0 ArviZ calls the sum ``elpd_loo``, but nothing here is
    leave-one-out) and these:

    - ``score``: whether data were scored by evidence or by bound.
    - ``mc_error``: the Monte Carlo error of the sum over data; ``se`` is its sampling error.
    - ``mc_bias``: how much too low the sum is in expectation, to first order, because the logarithm of an
      average is concave. It grows faster with the number of data than the errors do. If it is not far
      below a difference between models, use more particles.
    - ``evidence`` and ``bound``: the sum over data of each, also of the one that was not used.
    - ``bad_k``: the number of data for which :math:`\hat k` of this model is too large.

    Where bounds are used, the table ranks models *with their guides*: a model with a loose guide can be
    better than it looks. A warning says so if the evidence gives another order. ``arviz.plot_compare`` and
    :func:`~pyro_diffusion.plots.plot_compare` draw the table.

    Args:
        evidence: :class:`~pyro_diffusion.evidence.Evidence` by the name of its model.

    Returns:
        A ``pandas.DataFrame``, the best model first; sums over data, nats.

    Raises:
        ValueError: Fewer than two models; models scored on different data, as densities and as masses, by
            different estimators or with different numbers of particles; fewer than 25 particles; no bound
            where one is needed.
    """
    num_particles = _check_comparable(evidence)
    good_k = arviz_bridge.good_k(num_particles)
    reliable = torch.stack([e.pareto_k < good_k for e in evidence.values()]).all(0)
    require(
        bool(reliable.all()) or all(e.elbo is not None for e in evidence.values()),
        "argument 'evidence'",
        f"k ≥ {good_k:.2g} for {int((~reliable).sum())} data and no bound to rank them by",
        "one",
        "Use importance_evidence, which returns both.",
    )
    scored = zip(*(_scored(e, reliable) for e in evidence.values()), strict=True)
    scores, errors, ks = (dict(zip(evidence, values, strict=True)) for values in scored)
    table = arviz_bridge.compare_scores(scores, errors, ks, num_particles)
    ranked = [evidence[name] for name in table.index]
    table["mc_bias"] = [0.5 * e.standard_error[reliable].square().sum().item() for e in ranked]
    table["evidence"] = [e.log_evidence.sum().item() for e in ranked]
    table["bound"] = [math.nan if e.elbo is None else e.elbo.sum().item() for e in ranked]
    table["bad_k"] = [int((e.pareto_k >= good_k).sum()) for e in ranked]
    table["score"] = _score_in_words(int(reliable.sum()), len(reliable))
    if not table["evidence"].is_monotonic_decreasing:
        warnings.warn(
            "compare: the order by evidence, which cannot be trusted for all data, differs from the order "
            "by scores. Some scores are bounds, which depend on the guides as well. See the columns score, "
            "evidence, bound and bad_k, and draw more particles.",
            stacklevel=2,
        )
    return table


def _check_comparable(evidence: Mapping[str, Evidence]) -> int:
    """The number of particles, if all estimates have the same data and estimator, and have a Pareto k.

    Densities that are known, :meth:`Evidence.exact`, are compared with estimates of any kind.
    """
    if not isinstance(evidence, Mapping) or len(evidence) < 2:
        got = list(evidence) if isinstance(evidence, Mapping) else f"a {type(evidence).__name__}"
        raise ValueError(
            f"argument 'evidence': got {got}; expected two models or more by name. "
            "Pass {'diffusion': importance_evidence(…), 'hvae': importance_evidence(…)}."
        )
    example = "importance_evidence(model, guide, x_0, num_particles=1000)"
    for name, e in evidence.items():
        check_argument(f"evidence[{name!r}]", e, Evidence, example)
    (first, reference), *others = sorted(
        evidence.items(), key=lambda item: item[1].estimator == EXACT
    )
    for name, other in others:
        # A known density has no estimator, and may be given without its data.
        known = {"estimator", "num_particles", *(() if other.data else ("data",))}
        for what in ("data", "measure", "estimator", "num_particles"):
            ours, theirs = getattr(reference, what), getattr(other, what)
            values = "" if what == "data" else f" ({theirs!r} and {ours!r})"
            same = ours == theirs or (other.estimator == EXACT and what in known)
            require(
                same and len(reference.ess) == len(other.ess),
                "argument 'evidence'",
                f"{name!r} and {first!r} with other {what}{values}",
                "the same for all models, with the data in the same order, because otherwise scores differ "
                "for other reasons than the models",
                "Score all models on the same data, with the same estimator and num_particles.",
            )
    require(
        not any(e.pareto_k.isnan().any() for e in evidence.values()),
        "argument 'evidence'",
        f"estimates from {reference.num_particles} draws, too few for Pareto k",
        f"at least {arviz_bridge.MIN_DRAWS} for each datum",
        "Pass num_particles=1000, say.",
    )
    return reference.num_particles


def _scored(e: Evidence, reliable: Tensor) -> "tuple[np.ndarray, np.ndarray, np.ndarray]":
    """Score of every datum, its Monte Carlo error and Pareto k; bounds, which have no k, get −∞."""
    score, error = e.log_evidence, e.standard_error
    if e.elbo is not None and e.elbo_standard_error is not None:
        score = torch.where(reliable, score, e.elbo)
        error = torch.where(reliable, error, e.elbo_standard_error)
    return as_numpy(score), as_numpy(error), as_numpy(e.pareto_k.masked_fill(~reliable, -math.inf))


def _score_in_words(reliable: int, total: int) -> str:
    if reliable == total:
        return "evidence"
    return f"evidence of {reliable} data, bound of {total - reliable}" if reliable else "bound"
