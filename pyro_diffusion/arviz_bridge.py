r"""Arrays to ArviZ and back: the only module that depends on the version of ArviZ.

ArviZ 0.23 is the last version for Python 3.11. From 1.0 on ArviZ is several packages. There PSIS takes the
negative logarithm of the weights, the container is an ``xarray.DataTree``, and scores have other classes.
All of these differences are handled here. The module imports neither torch nor the rest of the package, so
that it can be tested with a version of ArviZ that cannot be installed beside the rest (``make arviz1``).

References:
    Pareto Smoothed Importance Sampling (Vehtari et al., 2024). https://arxiv.org/abs/1507.02646
    The InferenceData schema: https://python.arviz.org/en/latest/schema/schema.html
    Graphical test for discrete uniformity (Säilynoja et al., 2022). https://arxiv.org/abs/2103.10522
"""

import datetime
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

__all__ = [
    "MIN_DRAWS",
    "as_arviz",
    "compare_scores",
    "constant",
    "good_k",
    "pareto_k",
    "plot_compare",
    "plot_khat",
    "plot_pit",
    "randomized_pit",
]

MIN_DRAWS = 25  #: fewer weights have no tail to fit

# Spread, in nats, that rounding in float32 gives to equal log-weights at T = 1000, D = 784.
_CONSTANT = 1e-3


def good_k(num_draws: int) -> float:
    r"""The Pareto k below which an average can be trusted: :math:`\min(1 - 1/\log_{10} K,\, 0.7)`."""
    return min(1 - 1 / math.log10(max(num_draws, MIN_DRAWS)), 0.7)


def constant(log_weights: np.ndarray) -> np.ndarray:
    """Whether the log-weights of a row are all the same; particles on the last axis."""
    return np.ptp(log_weights, axis=-1) <= _CONSTANT


def pareto_k(log_weights: np.ndarray) -> np.ndarray:
    r"""Pareto :math:`\hat k` of importance weights, by ArviZ's own PSIS.

    Args:
        log_weights: Log-weights, particles on the last axis, shape ``batch_shape + (K,)``.

    Returns:
        :math:`\hat k`, shape ``batch_shape``. It is :math:`-\infty` where the weights are constant to 0.001
        nats: they have no tail, and the estimate is exact to 0.001 nats.

    Raises:
        ValueError: Fewer than 25 particles, or weights that are NaN or infinite.
    """
    log_weights = np.asarray(log_weights, dtype=float)
    if log_weights.ndim == 0 or log_weights.shape[-1] < MIN_DRAWS:
        got = log_weights.shape[-1] if log_weights.ndim else 1
        raise ValueError(
            f"argument 'log_weights': got {got} draws; expected at least {MIN_DRAWS}, because Pareto k is "
            "fitted to the tail of the weights. Draw more particles."
        )
    if not np.isfinite(log_weights).all():
        raise ValueError(
            f"argument 'log_weights': got {int((~np.isfinite(log_weights)).sum())} NaN or infinite weights; "
            "expected finite numbers. Check the parameters for NaN and the data for values outside the "
            "support."
        )
    k = np.full(log_weights.shape[:-1], -math.inf)
    rows = ~constant(log_weights)
    if rows.any():
        values = log_weights[rows]
        k[rows] = _psis_k(values - values.max(axis=-1, keepdims=True))
    return k


def _psis_k(log_weights: np.ndarray) -> np.ndarray:
    """Pareto k of each row. ArviZ 1.x has PSIS in another package and takes negative log-weights."""
    with np.errstate(over="ignore"):  # bounded weights, whose k is far below zero
        try:
            from arviz_stats.base import array_stats
        except ImportError:
            import arviz

            return np.asarray(arviz.psislw(log_weights.copy())[1])
        return np.asarray(array_stats.psislw(-log_weights, axis=-1)[1])


def as_arviz(groups: Mapping[str, Any]) -> Any:
    """Datasets by group in the container of the installed ArviZ: ``DataTree``, before 1.0 ``InferenceData``.

    Args:
        groups: An ``xarray.Dataset`` for each group, also for groups that are not in ArviZ's schema.
    """
    import arviz
    import xarray

    about = {
        "created_at": datetime.datetime.now(datetime.UTC).isoformat(),
        "inference_library": "pyro_diffusion",
    }
    tree = xarray.DataTree.from_dict(
        {f"/{name}": dataset.assign_attrs(about) for name, dataset in groups.items()}
    )
    tree.attrs.update(about)
    return arviz.from_datatree(tree) if hasattr(arviz, "from_datatree") else tree


def compare_scores(
    scores: Mapping[str, np.ndarray],
    errors: Mapping[str, np.ndarray],
    k: Mapping[str, np.ndarray],
    num_draws: int,
) -> Any:
    """Rank models by their scores for the same data, through ``arviz.compare``.

    Args:
        scores: A score for each datum by model, shape ``(N,)``; nats.
        errors: The Monte Carlo error of each score, ``(N,)``.
        k: The Pareto k of each score, ``(N,)``. It decides only about ArviZ's column ``warning``.
        num_draws: Particles for each datum.

    Returns:
        The table of the installed ArviZ, with the Monte Carlo error of every sum in a column ``mc_error``.
        ArviZ 1.0 changed the sign of the differences to the best model.
    """
    import arviz

    # Stacking exponentiates scores, which underflow for data of many dimensions. Neither the weights of
    # stacking nor the differences change if all scores of a datum are shifted by the same number.
    best = np.max(list(scores.values()), axis=0)
    data = {
        name: _elpd(values, values - best, k[name], num_draws) for name, values in scores.items()
    }
    settings = {"round_to": "none"} if _is_new(arviz) else {}
    table = arviz.compare(data, method="stacking", **settings)
    if len(best) == 1:  # a single datum has no spread
        table["dse"] = math.nan
    table["mc_error"] = [float(np.sqrt(np.sum(errors[name] ** 2))) for name in table.index]
    return table


def _is_new(arviz: Any) -> bool:
    return int(arviz.__version__.split(".")[0]) >= 1


def _elpd(scores: np.ndarray, pointwise: np.ndarray, k: np.ndarray, num_draws: int) -> Any:
    """Scores as an object of the installed ArviZ."""
    import arviz
    import xarray

    scored, diagnosed = (xarray.DataArray(x, dims=["data"]) for x in (pointwise, k))
    fields = {
        "elpd": float(scores.sum()),
        "se": float(np.sqrt(len(scores) * np.var(scores))) if len(scores) > 1 else math.nan,
        "p": math.nan,
        "n_samples": num_draws,
        "n_data_points": len(scores),
        "scale": "log",
        "warning": bool((k > good_k(num_draws)).any()),
        "good_k": good_k(num_draws),
        "elpd_i": scored,
        "pareto_k": diagnosed,
    }
    if not _is_new(arviz):
        from arviz.stats.stats_utils import ELPDData

        names = {"elpd": "elpd_loo", "p": "p_loo", "elpd_i": "loo_i"}
        return ELPDData({names.get(name, name): value for name, value in fields.items()})
    if hasattr(arviz, "ELPDDataLOO"):  # since 1.3
        return arviz.ELPDDataLOO(**fields)
    return arviz.ELPDData(kind="loo", **fields)


def randomized_pit(observed: np.ndarray, draws: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    r"""Randomised probability integral transform by rank: uniform if data and draws are alike.

    .. math::
        u_n = \frac{\#\{s : y_{sn} < y_n\} + U_n\,(1 + \#\{s : y_{sn} = y_n\})}{S + 1},
        \qquad U_n \sim \operatorname{Uniform}(0, 1).

    Without :math:`U_n` all ranks lie on a grid, and tests of uniformity reject models that are right.

    Args:
        observed: :math:`y_n`, shape ``(N, …)``. Coordinates are ranked one by one.
        draws: :math:`y_{sn}`, independent for each datum, shape ``(S, N, …)``.
        uniform: :math:`U_n`, shape ``(N, …)``.

    Returns:
        :math:`u_n`, shape ``(N, …)``.

    Raises:
        ValueError: Shapes that do not fit, or values that are NaN.

    References:
        Validating Bayesian Inference Algorithms with Simulation-Based Calibration (Talts et al., 2018).
        https://arxiv.org/abs/1804.06788
    """
    observed, draws = np.asarray(observed), np.asarray(draws)
    if observed.ndim < 1 or draws.shape[1:] != observed.shape or not len(draws):
        raise ValueError(
            f"argument 'draws': got shape {draws.shape} for observations of shape {observed.shape}; expected "
            "(S, N) and (N,), or (S, N, P) and (N, P), separate draws for each observation. Draw S times for "
            "each of the N observations."
        )
    if np.isnan(observed).any() or np.isnan(draws).any():
        raise ValueError(
            "arguments 'observed' and 'draws': got NaN; expected numbers, because NaN has no rank. Leave out "
            "what was not observed."
        )
    below = (draws < observed).sum(0)
    ties = (draws == observed).sum(0)
    return (below + np.asarray(uniform) * (1 + ties)) / (len(draws) + 1)


def plot_khat(k: np.ndarray, num_draws: int, ax: Any = None) -> Any:
    """ArviZ's plot of Pareto k by datum. Data with constant weights have no tail and are left out."""
    import arviz

    k = np.asarray(k, dtype=float)
    tail = np.isfinite(k)
    if not tail.any():
        raise ValueError(
            "argument 'evidence': got no datum with a Pareto k; expected weights with a tail to plot. "
            "Draw at least 25 particles. If all weights are constant (k = −∞), the evidence is exact, and "
            "there is nothing to plot."
        )
    if _is_new(arviz):
        zeros = np.zeros(int(tail.sum()))
        return arviz.plot_khat(_elpd(zeros, zeros, k[tail], num_draws))
    shown = arviz.plot_khat(k[tail], show_hlines=True, ax=ax)
    shown = _laid_out(shown) if ax is None else ax
    shown.set_xlabel("datum (those with constant weights left out)", fontsize="medium")
    shown.set_ylabel("Pareto $\\hat k$, no unit", fontsize="medium")
    shown.tick_params(labelsize="medium")
    return shown


def _laid_out(ax: Any) -> Any:
    """The axes of a figure that ArviZ made, with room for their labels."""
    ax.figure.set_size_inches(6.4, max(3.0, 0.7 * ax.figure.get_size_inches()[1]))
    ax.figure.set_layout_engine("constrained")
    return ax


def plot_compare(table: Any, ax: Any = None) -> Any:
    """ArviZ's plot of the table that :func:`compare_scores` returned."""
    import arviz

    if _is_new(arviz):
        return arviz.plot_compare(table)
    shown = arviz.plot_compare(table, insample_dev=False, plot_ic_diff=True, ax=ax)
    shown = _laid_out(shown) if ax is None else shown
    shown.set_xlabel("sum over data, nats")
    shown.locator_params(axis="x", nbins=5)
    shown.tick_params(axis="x", labelsize="small")
    return shown


def plot_pit(pit: np.ndarray, ax: Any = None, envelope: float = 0.99) -> Any:
    """ArviZ's plot of the ECDF of a PIT minus the uniform one, with a simultaneous band.

    Args:
        pit: Values in [0, 1], shape ``(N,)``.
        ax: Axes, before ArviZ 1.0.
        envelope: Probability that a uniform PIT stays inside the band everywhere.
    """
    import arviz

    pit = np.asarray(pit)
    if not _is_new(arviz):
        shown = arviz.plot_ecdf(
            pit, cdf=lambda u: np.clip(u, 0, 1), pit=True, difference=True,
            confidence_bands="auto", ci_prob=envelope, ax=ax,
        )  # fmt: skip
        shown = _laid_out(shown) if ax is None else shown
        shown.set(xlabel="PIT, a probability", ylabel="ECDF − uniform, a probability")
        return shown
    dataset = arviz.convert_to_dataset({"pit": pit[None]})
    import xarray

    tree = xarray.DataTree.from_dict({"/prior_sbc": dataset})
    return arviz.plot_ecdf_pit(tree, envelope_prob=envelope)
