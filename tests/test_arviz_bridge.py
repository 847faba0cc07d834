"""What needs ArviZ and arrays only: the same on 0.23 and on 1.x.

``make arviz1`` runs this file against ArviZ 1.x on Python 3.12 or later, where torch is not installed: the
module is loaded from its file, without the package around it.
"""

import importlib.util
import math
from pathlib import Path

import arviz
import matplotlib
import numpy as np
import pytest
import xarray

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PATH = Path(__file__).parent.parent / "pyro_diffusion" / "arviz_bridge.py"
spec = importlib.util.spec_from_file_location("arviz_bridge", PATH)
bridge = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bridge)

MAJOR = int(arviz.__version__.split(".")[0])


@pytest.fixture
def rng():
    return np.random.default_rng(20261121)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


# ---------------------------------------------------------------- Pareto k


def test_pareto_k_is_the_shape_of_the_tail(rng):
    """exp(k E) with E exponential has a Pareto tail of shape k: sign and orientation, on both majors."""
    shape = np.array([0.2, 0.5, 0.9])[:, None]
    log_weights = shape * rng.standard_exponential((3, 20_000))
    np.testing.assert_allclose(bridge.pareto_k(log_weights), shape[:, 0], atol=0.15)
    np.testing.assert_allclose(  # a constant factor changes nothing, far from zero either
        bridge.pareto_k(log_weights - 3000.0), bridge.pareto_k(log_weights), atol=1e-6
    )


def test_constant_weights_are_exact(rng):
    log_weights = np.stack(
        [np.full(100, -3.0), rng.normal(size=100), 7 + 1e-10 * rng.normal(size=100)]
    )
    k = bridge.pareto_k(log_weights)
    assert k[0] == k[2] == -math.inf
    assert np.isfinite(k[1])
    assert bridge.pareto_k(np.zeros((2, 3, 30))).shape == (2, 3)


def test_bounded_weights_are_no_alarm(rng):
    """A density ratio with a maximum: k far below zero, and no warning on the way."""
    assert bridge.pareto_k(-0.5 * rng.normal(size=(1, 50_000)) ** 2)[0] < 0


@pytest.mark.parametrize("draws", [0, 1, 24])
def test_too_few_draws(draws):
    with pytest.raises(ValueError, match=f"got {draws} draws; expected at least 25"):
        bridge.pareto_k(np.zeros((3, draws)))


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_weights_that_are_no_numbers(wrong):
    with pytest.raises(ValueError, match="got 1 NaN or infinite weights"):
        bridge.pareto_k(np.array([[wrong] + [0.0] * 40]))


# ---------------------------------------------------------------- the schema


def tree(rng):
    x = rng.normal(size=(1, 50, 4, 3))
    return bridge.as_arviz(
        {
            "posterior": xarray.Dataset({"x": (("chain", "draw", "data", "timestep"), x)}),
            "observed_data": xarray.Dataset({"x_0": ("data", np.arange(4.0))}),
            "sample_stats": xarray.Dataset({"lp": (("chain", "draw", "data"), x[..., 0])}),
            "bound": xarray.Dataset({"term": ("timestep", np.arange(3.0))}),
        }
    ), x


def test_groups_survive_a_round_trip(rng, tmp_path):
    draws, x = tree(rng)
    assert type(draws).__name__ == ("InferenceData" if MAJOR == 0 else "DataTree")
    draws.to_netcdf(tmp_path / "draws.nc")
    again = arviz.from_netcdf(tmp_path / "draws.nc")
    np.testing.assert_array_equal(again["posterior"]["x"].values, x)
    assert again["posterior"]["x"].dims == ("chain", "draw", "data", "timestep")
    np.testing.assert_array_equal(again["bound"]["term"].values, np.arange(3.0))
    assert again["posterior"].attrs["inference_library"] == "pyro_diffusion"


def test_arviz_reads_it(rng):
    draws, x = tree(rng)
    summary = arviz.summary(draws, var_names=["x"])
    assert len(summary) == 12
    mean = np.asarray(summary["mean"], dtype=float).reshape(4, 3)
    np.testing.assert_allclose(mean, x.mean((0, 1)), atol=0.06)
    arviz.plot_forest(draws, var_names=["x"])


# ---------------------------------------------------------------- comparison


def scores(rng, n=200):
    """Three models of data with 800 nats each: a and b close, c behind."""
    base = -800 + 30 * rng.normal(size=n)
    spread = {"a": 0.0, "b": -1.0, "c": -3.0}
    values = {name: base + shift + rng.normal(size=n) for name, shift in spread.items()}
    return (
        values,
        {name: np.full(n, 0.1) for name in values},
        {name: np.zeros(n) for name in values},
    )


def test_compare_is_paired_and_does_not_underflow(rng):
    values, errors, k = scores(rng)
    table = bridge.compare_scores(values, errors, k, num_draws=100)
    assert list(table.index) == ["a", "b", "c"]
    elpd = table["elpd_loo" if MAJOR == 0 else "elpd"]
    for name, score in values.items():
        difference = score - values["a"]
        assert elpd[name] == pytest.approx(score.sum())
        assert table["se"][name] == pytest.approx(math.sqrt(len(score)) * score.std())
        assert abs(table["elpd_diff"][name]) == pytest.approx(abs(difference.sum()), abs=1e-6)
        assert table["dse"][name] == pytest.approx(
            math.sqrt(len(score)) * difference.std(), abs=1e-6
        )
        assert table["mc_error"][name] == pytest.approx(0.1 * math.sqrt(len(score)))
    assert table["weight"].sum() == pytest.approx(1.0, abs=1e-6)
    assert table["weight"]["a"] > 0.4
    assert (table["dse"][1:] < table["se"][1:]).all()  # pairing takes out what the data share


def test_stacking_weights_of_models_that_are_alike(rng):
    """Each of two models explains half of the data: the weights are equal, whatever the scale."""
    sign = np.where(np.arange(400) % 2 == 0, 2.0, -2.0)
    values = {"a": -5000 + sign, "b": -5000 - sign}
    zeros = {name: np.zeros(400) for name in values}
    table = bridge.compare_scores(values, zeros, zeros, num_draws=100)
    np.testing.assert_allclose(table["weight"], 0.5, atol=0.02)


# ---------------------------------------------------------------- randomised PIT


def test_pit_by_hand():
    draws = np.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0]])
    pit = bridge.randomized_pit(np.array([3.0, 1.0]), draws, np.array([0.5, 0.25]))
    np.testing.assert_allclose(pit, [(2 + 0.5) / 4, (0 + 0.25 * 4) / 4])


@pytest.mark.parametrize("law", ["normal", "poisson"])
def test_pit_of_a_true_model_is_uniform(rng, law):
    """Facts 22: by itself a rank rejects true models; randomised it does not. Counts as well."""
    from scipy import stats

    rejected = 0
    for _ in range(100):
        draw = rng.normal if law == "normal" else (lambda size: rng.poisson(2.0, size=size))
        pit = bridge.randomized_pit(draw(size=500), draw(size=(19, 500)), rng.uniform(size=500))
        rejected += stats.kstest(pit, "uniform").pvalue < 0.01
    assert rejected <= 5


def test_pit_errors(rng):
    with pytest.raises(ValueError, match=r"got shape \(4, 3\) for observations of shape \(5,\)"):
        bridge.randomized_pit(np.zeros(5), np.zeros((4, 3)), np.zeros(5))
    with pytest.raises(ValueError, match="got shape"):
        bridge.randomized_pit(np.zeros(5), np.zeros((0, 5)), np.zeros(5))
    with pytest.raises(ValueError, match="NaN"):
        bridge.randomized_pit(np.full(3, math.nan), np.zeros((4, 3)), np.zeros(3))


# ---------------------------------------------------------------- pictures


def test_plots(rng):
    values, errors, k = scores(rng)
    mixed = np.where(np.arange(100) % 10 == 0, -math.inf, rng.uniform(-0.3, 0.9, size=100))
    assert bridge.plot_khat(mixed, 100) is not None
    assert bridge.plot_compare(bridge.compare_scores(values, errors, k, 100)) is not None
    assert bridge.plot_pit(rng.uniform(size=300)) is not None
    with pytest.raises(ValueError, match="no datum with a Pareto k"):
        bridge.plot_khat(np.full(5, -math.inf), 100)
    if MAJOR == 0:
        _, axes = plt.subplots(1, 3)
        assert bridge.plot_khat(mixed, 100, axes[0]) is axes[0]
        assert bridge.plot_pit(rng.uniform(size=300), axes[2]) is axes[2]
        assert all(axes[i].has_data() for i in (0, 2))
