"""Public functions with arguments of a wrong kind or shape: a ``ValueError`` in four beats, never a number.

The table names for each call its arguments, what is right and what kind each is. A kind is a pool of wrong
values. Hypothesis draws a call, an argument and a wrong value for it.
"""

import math
import re
import warnings

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pyro_diffusion as pd
from pyro_diffusion import LogSNRSchedule
from pyro_diffusion.checks import described
from pyro_diffusion.inference import operators

#: Which argument or site; what came; what was expected; what to do.
FOUR_BEATS = re.compile(
    r"(argument|arguments|site|sites|latent sites|first call|terms)\b.*: .*got .+; expected .+\. \S",
    re.S,
)


class Thing:
    """An object of no kind that the package knows."""


JUNK = ["words", None, Thing(), 1 + 2j, [Thing()], {"a": 1}, len, Thing]
NUMBERS = [
    "words",
    None,
    Thing(),
    1 + 2j,
    [1.0, 2.0],
    math.nan,
    True,
    torch.ones(2),
    np.ones((2, 2)),
]
POOLS = {
    "count": [*NUMBERS, 0, -1, 1.5, math.inf, "3"],
    "positive": [*NUMBERS, 0, -1.0, math.inf, -math.inf],
    "share": [*NUMBERS, -0.5, 1.5, math.inf],
    "beta": [*NUMBERS, 0, 1, -0.5, 1.5],
    "object": [*JUNK, 3, torch.ones(2)],
    "network": [*JUNK, 3, torch.nn.Linear(2, 2), torch.nn.Identity],
    "shape": [*JUNK, 3, (0,), (-1,), (1.5,), ("a",), (True,), [2]],
    "timesteps": ["words", Thing(), [0], [6], [3, 2], [1.5], [True], 0, 6, -1, [], 1 + 2j],
    "state": ["words", None, Thing(), -1, 6, 1.5, True, [1]],
    "data": [
        *JUNK,
        3,
        torch.tensor(1.0),
        torch.zeros(0, 2),
        torch.zeros(2),
        torch.zeros(4, 3),
        torch.zeros(4, 2, 2),
        torch.full((4, 2), math.nan),
        torch.full((4, 2), math.inf),
        torch.zeros(4, 2, dtype=torch.complex64),
        torch.zeros(4, 2, dtype=torch.long),
        torch.zeros(4, 2, dtype=torch.bool),
        np.zeros((4, 2)),
        [torch.zeros(4, 2)],
    ],
    "mask": ["words", Thing(), 1, torch.ones(4, 2), torch.ones(4, 3) > 0, torch.ones(4, 2) < 0, [True]],
    "context": [torch.ones(4, 1), {"a": torch.ones(4)}, torch.ones(3, 1)],
    "conditions": [
        "words", None, Thing(), torch.ones(4, 2), torch.ones(3, 3), torch.ones(4, 3, 1),
        math.nan * torch.ones(4, 3), 1j * torch.ones(4, 3), {"a": torch.ones(4, 3)}, (torch.ones(4, 3),),
        [["a", "b", "c"]] * 4,
    ],
    "labels": [
        "words", None, Thing(), torch.tensor([0, 1, 2, 3]), torch.tensor([0, -1, 0, 0]), torch.zeros(4), 2.5,
        torch.zeros(4, 1).long(), torch.zeros(3).long(), {"a": torch.zeros(4).long()}, ["a", "b", "c", "d"],
    ],
    "null": ["words", Thing(), 1, torch.ones(4), torch.ones(3) > 0, torch.ones(4, 1) > 0, [True]],
    "numbers": ["words", None, Thing(), {"a": 1}, 1j * torch.ones(2), ["a", "b"], [1.0, "a"]],
    "function": ["words", None, 3, Thing()],
    "levels": [torch.full((4, 2), 0.5), torch.full((4, 2), -1.0), torch.full((4, 2), 7.0)],
}  # fmt: skip


def schedule():
    return LogSNRSchedule(5, log_snr_max=4.0)


def diffusion(**settings):
    network = pd.MLP((2,), hidden_size=4, num_blocks=1)
    return pd.DiffusionModel(pd.NeuralDenoiser(network, schedule(), (2,)), **settings)


def conditional(**settings):
    network = pd.MLP((2,), hidden_size=4, num_blocks=1, **settings)
    return pd.DiffusionModel(pd.NeuralDenoiser(network, schedule(), (2,)))


def conditional_reader(function, **fixed):
    """A reader of data given three numbers each."""
    return lambda context: function(conditional(context_shape=(3,)), X_0, context=context, **fixed)


def evidence():
    return {
        name: pd.importance_evidence(diffusion(), torch.zeros(4, 2), num_particles=25)
        for name in "ab"
    }


def draws():
    likelihood = pd.LinearGaussian(torch.ones(1, 2), torch.ones(1), 1.0)
    return pd.posterior_samples(diffusion(), likelihood, 3, num_particles=40, num_runs=2)


X_0 = torch.linspace(-1, 1, 8).reshape(4, 2)


def reader(function, **fixed):
    return lambda x_0, **given: function(diffusion(), x_0, **fixed, **given)


#: Name: the call, then for each argument what is right, and its kind (``None``: it stays right).
CALLS = {
    "LinearSchedule": (
        pd.LinearSchedule,
        {"num_timesteps": (5, "count"), "beta_start": (1e-4, "beta"), "beta_end": (0.02, "beta")},
    ),
    "CosineSchedule": (pd.CosineSchedule, {"num_timesteps": (5, "count")}),
    "LogSNRSchedule": (
        pd.LogSNRSchedule,
        {"num_timesteps": (5, "count"), "log_snr_max": (6.0, "numbers"), "log_snr_min": (-6.0, "numbers")},
    ),
    "MonotoneSchedule": (
        pd.MonotoneSchedule,
        {"num_timesteps": (5, "count"), "num_pieces": (4, "count"), "event_shape": ((), "shape")},
    ),
    "AlphaSchedule": (pd.AlphaSchedule, {"alpha": ([0.9, 0.5], "numbers")}),
    "LinearDecaySchedule": (
        pd.LinearDecaySchedule,
        {
            "num_timesteps": (5, "count"),
            "alpha_bar_max": (0.9, "beta"),
            "alpha_bar_min": (0.1, "beta"),
        },
    ),
    "with_num_timesteps": (
        lambda num_timesteps: schedule().with_num_timesteps(num_timesteps),
        {"num_timesteps": (5, "count")},
    ),
    "StridedSchedule": (
        pd.StridedSchedule, {"schedule": (schedule(), "object"), "timesteps": ([1, 3], "timesteps")}
    ),
    "Standardize": (pd.Standardize, {"loc": (0.0, "numbers"), "scale": (1.0, "numbers")}),
    "Standardize.from_data": (
        pd.Standardize.from_data, {"x_0": (X_0, "numbers"), "mask": (None, "mask")}
    ),
    "Logit": (pd.Logit, {"low": (0.0, "numbers"), "high": (1.0, "positive")}),
    "DiscretizedGaussianLikelihood": (
        pd.DiscretizedGaussianLikelihood, {"num_levels": (5, "count"), "scale": (1.0, "positive or nothing")}
    ),
    "CategoricalLikelihood": (
        pd.CategoricalLikelihood, {"num_categories": (5, "count"), "scale": (1.0, "positive")}
    ),
    "BernoulliLikelihood": (pd.BernoulliLikelihood, {"scale": (1.0, "positive")}),
    "GaussianLikelihood": (pd.GaussianLikelihood, {"scale": (1.0, "positive")}),
    "LevelLikelihood": (pd.LevelLikelihood, {"num_levels": (5, "count")}),
    "LevelPrediction": (pd.LevelPrediction, {"num_levels": (5, "count")}),
    "PoissonLikelihood": (pd.PoissonLikelihood, {"max_count": (5, "positive")}),
    "MLP": (
        pd.MLP,
        {"event_shape": ((2,), "shape"), "hidden_size": (4, "count"), "num_blocks": (1, "count"),
         "num_outputs": (1, "count"), "dropout": (0.0, "share")},
    ),
    "FeedForward": (
        pd.FeedForward,
        {"input_shape": ((2,), "shape"), "output_shape": ((2,), "shape"), "hidden_size": (4, "count"),
         "dropout": (0.0, "share")},
    ),
    "NeuralDenoiser": (
        pd.NeuralDenoiser,
        {"network": (pd.MLP((2,), hidden_size=4), "network"), "schedule": (schedule(), "object"),
         "event_shape": ((2,), "shape"), "prediction": (pd.NoisePrediction(), "kind"),
         "variance": (pd.PosteriorVariance(), "kind")},
    ),
    "NeuralBernoulliDenoiser": (
        pd.NeuralBernoulliDenoiser,
        {"network": (pd.MLP((2,), hidden_size=4), "network"), "schedule": (schedule(), "object"),
         "event_shape": ((2,), "shape"), "rate": (0.5, "beta")},
    ),
    "NeuralCategoricalDenoiser": (
        pd.NeuralCategoricalDenoiser,
        {"network": (pd.MLP((2, 3), hidden_size=4), "network"), "schedule": (schedule(), "object"),
         "event_shape": ((2,), "shape"), "num_categories": (3, "count")},
    ),
    "GaussianDenoiser": (
        pd.GaussianDenoiser,
        {"mean": (torch.zeros(2), "numbers"), "std": (torch.ones(2), "numbers"),
         "schedule": (schedule(), "object")},
    ),
    "GaussianDenoiser.from_covariance": (
        pd.GaussianDenoiser.from_covariance,
        {"mean": (torch.zeros(2), "numbers"), "covariance": (torch.eye(2), "numbers"),
         "schedule": (schedule(), "object")},
    ),
    "GaussianMixtureDenoiser": (
        pd.GaussianMixtureDenoiser,
        {"weights": ([1.0], "numbers"), "means": (torch.zeros(1, 2), "numbers"), "stds": (1.0, "numbers"),
         "schedule": (schedule(), "object")},
    ),
    "EnumeratedDenoiser": (
        pd.EnumeratedDenoiser,
        {"data": (torch.eye(2), "numbers"), "schedule": (schedule(), "object"), "rate": (0.5, "beta")},
    ),
    "OptimalVariance.from_data": (
        reader(pd.OptimalVariance.from_data),
        {"x_0": (X_0, "data"), "num_levels": (3, "count"), "batch_size": (9, "count")},
    ),
    "DiffusionModel": (
        pd.DiffusionModel,
        {"denoiser": (diffusion().denoiser, "object"), "likelihood": (pd.GaussianLikelihood(), "kind"),
         "transform": (pd.Standardize(0.0, 1.0), "kind")},
    ),
    "HierarchicalVAE": (
        pd.HierarchicalVAE,
        {"event_shape": ((2,), "shape"), "latent_sizes": ((2,), "sizes"), "hidden_size": (4, "count"),
         "likelihood": (pd.GaussianLikelihood(), "kind")},
    ),
    "subsampled": (lambda n: diffusion().subsampled(n), {"n": (1, "count")}),
    "continuous": (lambda n: diffusion().continuous(n), {"n": (1, "count")}),
    "strided": (lambda timesteps: diffusion().strided(timesteps), {"timesteps": ([1, 3], "timesteps")}),
    "sample": (lambda n: diffusion().sample(n), {"n": (1, "count")}),
    "model": (
        lambda x_0, **given: diffusion().model(x_0, **given),
        {"x_0": (X_0, "data but nothing"), "mask": (None, "mask"), "context": (None, "context"),
         "num_data": (9, "count or nothing")},
    ),
    "guide": (
        lambda x_0, **given: diffusion().guide(x_0, **given),
        {"x_0": (X_0, "data"), "mask": (None, "mask"), "num_data": (9, "count or nothing")},
    ),
    "StratifiedTimesteps": (pd.StratifiedTimesteps, {"reconstruction_share": (0.1, "beta")}),
    "ImportanceTimesteps": (
        pd.ImportanceTimesteps,
        {"decay": (0.9, "share"), "uniform_share": (0.1, "share"), "reconstruction_share": (0.1, "beta")},
    ),
    "AncestralSampler": (
        lambda timesteps, n: pd.AncestralSampler(diffusion(), timesteps)(n),
        {"timesteps": (3, "timesteps"), "n": (2, "count")},
    ),
    "sampler given numbers": (
        lambda context: pd.AncestralSampler(conditional(context_shape=(3,)))(4, context=context),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "sampler given labels": (
        lambda context: pd.ODESampler(conditional(num_classes=3))(4, context=context),
        {"context": (torch.tensor([0, 1, 2, 0]), "labels")},
    ),
    "sample given labels": (
        lambda context: conditional(num_classes=3).sample(4, context=context),
        {"context": (2, "labels")},
    ),
    "Guidance": (pd.Guidance, {"strength": (2.0, "finite")}),
    "guided sampler": (
        lambda context: pd.ODESampler(
            conditional(num_classes=3, null_token=True), guidance=pd.Guidance(1.0)
        )(4, context=context),
        {"context": (1, "labels")},
    ),
    "elbo_terms given numbers": (
        conditional_reader(pd.elbo_terms), {"context": (torch.zeros(4, 3), "conditions")}
    ),
    "importance_evidence given numbers": (
        conditional_reader(pd.importance_evidence, num_particles=2),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "smc_evidence given numbers": (
        conditional_reader(pd.smc_evidence, num_particles=3),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "ode_log_likelihood given numbers": (
        conditional_reader(pd.ode_log_likelihood, rtol=0.1, atol=0.1),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "to_arviz given numbers": (
        conditional_reader(pd.to_arviz, num_draws=25, timesteps=[1]),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "dropped contexts": (
        lambda null: conditional(num_classes=3, null_token=True).model(
            X_0, torch.zeros(4).long(), null=null
        ),
        {"null": (torch.ones(4) > 0, "null")},
    ),
    "DDIMSampler": (
        lambda model, eta, n, x_T: pd.DDIMSampler(model, 3, eta=eta)(n, x_T),
        {"model": (diffusion(), "object"), "eta": (0.0, "share"), "n": (4, "count"),
         "x_T": (X_0, "states")},
    ),
    "elbo_terms": (
        reader(pd.elbo_terms),
        {"x_0": (X_0, "data"), "num_particles": (2, "count"), "batch_size": (9, "count or nothing"),
         "mask": (None, "mask"), "context": (None, "context")},
    ),
    "elbo_terms of paths": (
        reader(pd.elbo_terms, analytic_kl=False),
        {"x_0": (X_0, "data"), "num_particles": (2, "count"), "mask": (None, "mask"),
         "context": (None, "context")},
    ),
    "importance_evidence": (
        reader(pd.importance_evidence),
        {"x_0": (X_0, "data"), "num_particles": (2, "count"), "mask": (None, "mask"),
         "state": (0, "state")},
    ),
    "smc_evidence": (
        reader(pd.smc_evidence),
        {"x_0": (X_0, "data"), "num_particles": (3, "count"), "num_runs": (2, "count"),
         "num_pilot": (25, "count"), "mask": (None, "mask"), "state": (0, "state"),
         "context": (None, "context")},
    ),
    "ode_log_likelihood": (
        reader(pd.ode_log_likelihood),
        {"x_0": (X_0, "data"), "num_probes": (2, "count or nothing"), "rtol": (1e-3, "positive"),
         "atol": (1e-3, "positive"), "batch_size": (9, "count or nothing"), "state": (0, "state"),
         "context": (None, "context")},
    ),
    "evaluate_bound": (
        reader(pd.evaluate_bound),
        {"x_0": (X_0, "data"), "standard_error": (9.0, "positive"), "mask": (None, "mask"),
         "num_timesteps": (5, "count but ends"), "batch_size": (9, "count or nothing"),
         "context": (None, "context")},
    ),
    "posterior_samples": (
        lambda log_likelihood, n, **settings: pd.posterior_samples(
            diffusion(), log_likelihood, n, **{"num_particles": 40, "num_runs": 2} | settings
        ),
        {"log_likelihood": (lambda x: -0.1 * (x - 1).square().sum(-1), "log-likelihood"), "n": (3, "count"),
         "num_particles": (40, "count"), "num_runs": (2, "count"), "directions": (1, "count"),
         "tempering": (None, "exponents"), "context": (None, "context")},
    ),
    "posterior_samples given numbers": (
        lambda context: pd.posterior_samples(
            conditional(context_shape=(3,)), pd.LinearGaussian(torch.ones(1, 2), torch.ones(4, 1), 1.0), 3,
            num_particles=40, num_runs=2, context=context,
        ),
        {"context": (torch.zeros(4, 3), "conditions")},
    ),
    "posterior_samples of a measurement": (
        lambda y: pd.posterior_samples(
            diffusion(), pd.LinearGaussian(torch.ones(2, 2), y, 1.0), 3, num_particles=40, num_runs=2
        ),
        {"y": (torch.zeros(4, 2), "measured")},
    ),
    "impute": (
        lambda x_0, mask, n, **settings: pd.impute(
            diffusion(), x_0, mask, n, **{"num_particles": 40, "num_runs": 2} | settings
        ),
        {"x_0": (X_0, "data"), "mask": (torch.ones(4, 2) > 0, "mask of all"), "n": (3, "count"),
         "num_particles": (40, "count"), "num_runs": (2, "count"), "context": (None, "context")},
    ),
    "PosteriorSamples": (
        lambda q, n: (draws().quantile(q), draws().resample(n)), {"q": (0.5, "level"), "n": (3, "count")}
    ),
    "LinearGaussian": (
        pd.LinearGaussian,
        {"operator": (torch.ones(2, 3), "operator"), "y": (torch.zeros(2), "numbers"),
         "noise": (1.0, "noise")},
    ),
    "Entries": (operators.Entries, {"mask": (torch.ones(2) > 0, "mask of entries")}),
    "Blur": (operators.Blur, {"kernel": (torch.ones(3), "kernel")}),
    "Subsampling": (operators.Subsampling, {"step": (2, "sizes of axes")}),
    "BlockMeans": (operators.BlockMeans, {"size": (2, "sizes of axes")}),
    "summary": (
        reader(pd.summary),
        {"x_0": (X_0, "data"), "standard_error": (9.0, "positive"), "num_particles": (3, "count"),
         "num_runs": (2, "count")},
    ),
    "to_arviz": (
        reader(pd.to_arviz),
        {"x_0": (X_0, "data"), "num_draws": (25, "count"), "timesteps": ([1], "sequence"),
         "batch_size": (99, "count or nothing")},
    ),
    "bound_by_datum": (reader(pd.bound_by_datum), {"x_0": (X_0, "data"), "mask": (None, "mask")}),
    "active_units": (
        lambda x_0, **settings: pd.active_units(diffusion().guide, x_0, **settings),
        {"x_0": (X_0, "data"), "num_particles": (2, "count")},
    ),
    "simulation_based_calibration": (
        lambda statistic, **settings: pd.simulation_based_calibration(diffusion(), statistic, **settings),
        {"statistic": (lambda states: states["x_1"][:, 0], "function"),
         "num_simulations": (9, "count or nothing"), "num_draws": (3, "count"), "batch_size": (9, "count"),
         "context": (None, "context")},
    ),
    "expected_coverage": (
        pd.expected_coverage,
        {"theta": (X_0, "data"), "draws": (torch.zeros(3, 4, 2), "data"),
         "references": (None, "references")},
    ),
    "compare": (lambda other: pd.compare({"a": evidence()["a"], "b": other}), {"other": (None, "evidence")}),
    "Evidence.exact": (
        pd.Evidence.exact, {"log_p": (torch.zeros(4), "numbers"), "measure": ("density", "object")}
    ),
    "KLWarmup": (pd.KLWarmup, {"scale": (0.5, "at least zero")}),
    "FreeBitsELBO": (pd.FreeBitsELBO, {"free_nats": (0.5, "at least zero")}),
    "LogVarianceELBO": (pd.LogVarianceELBO, {"num_particles": (2, "count")}),
    "AutoDiffusion": (
        lambda **given: pd.AutoDiffusion(lambda: None, **given),
        {"num_timesteps": (16, "count"), "init_scale": (3.0, "positive or nothing"),
         "network": (None, "network or nothing"), "schedule": (None, "kind")},
    ),
    "MinimumVarianceELBO": (pd.MinimumVarianceELBO, {"parameters": ([], "object")}),
    "levels": (
        lambda x_0: pd.elbo_terms(diffusion(likelihood=pd.DiscretizedGaussianLikelihood(5)), x_0),
        {"x_0": (torch.ones(4, 2), "levels")},
    ),
    "bits": (
        lambda x_0: pd.elbo_terms(diffusion(likelihood=pd.BernoulliLikelihood()), x_0),
        {"x_0": (torch.ones(4, 2), "levels")},
    ),
}  # fmt: skip
POOLS |= {
    "kind": [x for x in POOLS["object"] if x is not None and x is not len],
    "sizes": ["words", None, Thing(), 3, (), (0,), (-1,), (1.5,), (True,), 1 + 2j],
    # The model alone may run without data; whole numbers are refused by the guide that goes with it.
    "data but nothing": [
        x
        for x in POOLS["data"]
        if x is not None and getattr(x, "dtype", 0) not in (torch.long, torch.bool)
    ],
    "network or nothing": [x for x in POOLS["network"] if x is not None],
    "positive or nothing": [x for x in POOLS["positive"] if x is not None],
    "count or nothing": [x for x in POOLS["count"] if x is not None],
    "count but ends": [x for x in POOLS["count"] if x is not None and x is not math.inf],
    "references": [
        torch.zeros(4),
        torch.zeros(4, 3),
        torch.full((4, 2), math.nan),
        "words",
        Thing(),
    ],
    "states": [*POOLS["data"][8:15], "words", Thing(), 3],
    "sequence": ["words", Thing(), [0], [6], [1.5], [True], 3, []],
    "evidence": [*JUNK, 3, torch.ones(4)],
    "finite": ["words", None, Thing(), 1 + 2j, [1.0], math.nan, math.inf, True],
    "log-likelihood": [
        "words",
        None,
        Thing(),
        3,
        torch.ones(4),
        len,
        lambda x: x,
        lambda x: x.sum(),
        lambda x: 1.0,
        lambda x: 0 * x.sum(-1),
        lambda x: x.detach().sum(-1),
        lambda x: math.nan * x.sum(-1),
        lambda x: x[..., 9],
        lambda x: x.sum(-1).round(),
        lambda: 0.0,
        lambda x: x.sum(-1)[:1],
    ],
    "exponents": [
        "words",
        Thing(),
        1 + 2j,
        0.5,
        [1.0],
        torch.ones(5, 1),
        torch.zeros(5),
        2 * torch.ones(5),
        -torch.ones(5),
        math.nan * torch.ones(5),
        ["a"] * 5,
    ],
    "measured": [
        torch.zeros(4, 3),
        torch.zeros(0, 2),
        torch.zeros(2, 2, 2, 2),
        math.nan * torch.zeros(2),
        math.inf * torch.ones(2),
        3,
        "words",
        None,
        Thing(),
    ],
    "mask of all": [
        "words",
        None,
        Thing(),
        1,
        torch.ones(4, 2),
        torch.ones(4, 3) > 0,
        torch.ones(4, 2) < 0,
        [True],
        torch.ones(2) > 0,
    ],
    "mask of entries": ["words", None, Thing(), 1, torch.ones(2), torch.ones(2) < 0],
    "operator": [
        "words",
        None,
        Thing(),
        3,
        torch.ones(3),
        torch.ones(2, 2, 2),
        1j * torch.ones(2, 3),
    ],
    "kernel": [
        "words",
        None,
        Thing(),
        1 + 2j,
        torch.ones(2),
        torch.ones(3, 3, 3),
        torch.ones(3, 2),
        3.0,
    ],
    "noise": ["words", None, Thing(), 1 + 2j, [1.0] * 3, math.nan, -1.0, math.inf],
    "level": ["words", None, Thing(), 1 + 2j, 0, 1, -0.5, 1.5, math.nan],
    "sizes of axes": [
        "words",
        None,
        Thing(),
        0,
        -1,
        1.5,
        True,
        (0,),
        (1.5,),
        (True,),
        ("a",),
        1 + 2j,
    ],
    "at least zero": ["words", None, Thing(), 1 + 2j, [1.0], math.nan, -1.0, math.inf],
}
CASES = [
    (name, argument, place)
    for name, (_, arguments) in CALLS.items()
    for argument, (_, kind) in arguments.items()
    for place in range(len(POOLS[kind]))
]


def outcome(name, argument, place):
    """A call with one wrong argument."""
    call, arguments = CALLS[name]
    values = {
        key: right for key, (right, _) in arguments.items() if right is not None or key == argument
    }
    values[argument] = POOLS[arguments[argument][1]][place]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        call(**values)


@settings(
    max_examples=400, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
@given(st.sampled_from(CASES))
def test_a_wrong_argument_gets_four_beats(case):
    name, argument, place = case
    wrong = POOLS[CALLS[name][1][argument][1]][place]
    with pytest.raises(ValueError) as caught:  # the message is looked at below
        outcome(name, argument, place)
    assert FOUR_BEATS.search(str(caught.value)), (
        name,
        argument,
        described(wrong),
        str(caught.value),
    )


@pytest.mark.parametrize("name", CALLS)
def test_the_right_arguments_are_right(name):
    """The table itself: with nothing wrong there is no error."""
    if name in ("compare", "MinimumVarianceELBO"):
        pytest.skip("what is right is made of the wrong ones' kind")
    call, arguments = CALLS[name]
    with warnings.catch_warnings():
        # data that an untrained model draws, and its few effective particles
        warnings.filterwarnings("ignore", message="argument '(x_0|log_likelihood)'")
        call(**{key: right for key, (right, _) in arguments.items() if right is not None})
