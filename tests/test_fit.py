"""``fit``: a whole run in one call, against closed forms and against a loop by hand."""

import math
import signal
import sys
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import log_normal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import (
    GaussianDenoiser,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
)
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.encoders import LadderEncoder
from pyro_diffusion.hvae import HierarchicalVAE
from pyro_diffusion.likelihoods import GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule
from pyro_diffusion.training.columns import Columns, Passes, ShuffledRows, columns, split
from pyro_diffusion.training.held_out import HeldOut, Mean, Record
from pyro_diffusion.training.objectives import bound_by_datum

pytest.importorskip("lightning.pytorch")
from pyro_diffusion.training import Recipe, compile_elbo, fit, losses, watching
from pyro_diffusion.training.losses import WarmedUp, Weighted, _elbo
from pyro_diffusion.training.watching import Watch
from pyro_diffusion.transforms import Standardize

CPU = torch.device("cpu")
SHORT = {"max_steps": 50, "progress": False}


def build(num_timesteps=20, seed=0):
    torch.manual_seed(seed)
    network = MLP((2,), hidden_size=16, num_blocks=1)
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(num_timesteps), (2,)))


def data(n=120, seed=1):
    return torch.randn(n, 2, generator=torch.Generator().manual_seed(seed)) * 0.5 + 0.3


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


# ------------------------------------------------------------------ what it reaches


@pytest.fixture(scope="module")
def long_run():
    """A run on a Gaussian of known entropy."""
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=32, num_blocks=1)
    diffusion = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(50), (2,)))
    return diffusion, fit(diffusion, data(2000), max_steps=600, progress=False)


ENTROPY = 2 * (0.5 * math.log(2 * math.pi * math.e) + math.log(0.5))


def test_the_bound_comes_close_to_minus_the_entropy_and_not_above(long_run):
    diffusion, result = long_run
    bound = elbo_terms(diffusion, data(2000, seed=2), num_particles=4).mean()
    error = math.hypot(bound.monte_carlo_error, bound.sampling_error)
    assert -ENTROPY - 0.15 < bound.value < -ENTROPY + 4 * error
    best = result.best.bound
    assert best.value == pytest.approx(bound.value, abs=4 * (error + math.hypot(*best[1:])))


def test_the_history_says_what_happened(long_run):
    _, result = long_run
    history = result.history
    step = history["step"].values
    assert step[0] == 0
    assert step[-1] == result.num_steps == 600
    assert 15 <= len(step) <= 22
    assert history["bound"].attrs["units"] == "nats per datum"
    assert history["bound"].values[0] < history["bound"].values[-1] - 1
    assert history["learning_rate"].values[-1] < 1e-6 < history["learning_rate"].values[4]
    assert (np.diff(history["seconds"].values) > 0).all()
    assert np.isfinite(history["train_bound"].values[1:]).all()
    assert history["bound"].values.max() == history["bound"].sel(step=result.best.step)


def test_the_report_and_the_picture(long_run):
    _, result = long_run
    report = repr(result)
    assert "1,800 data to train on, 200 held out" in report
    assert "nats per datum" in report
    assert "all steps taken" in report
    ax = result.plot()
    assert ax.get_ylabel() == "bound, nats per datum"
    assert ax.get_xlabel() == "step"


def test_the_same_bound_as_by_hand():
    """The loop of README, with as many steps, and ``fit``; paired by datum."""
    by_hand, x_0, held_out = build(50), data(1000), data(1000, seed=2)
    pair = by_hand.subsampled()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 2e-3}), TraceMeanField_ELBO())
    torch.manual_seed(0)
    for _ in range(600):
        svi.step(x_0[torch.randint(1000, (256,))], num_data=1000)
    fitted = build(50)
    fit(fitted, x_0, max_steps=600, progress=False)
    terms = [elbo_terms(model, held_out, num_particles=4).elbo for model in (by_hand, fitted)]
    ahead = Mean.of(terms[1] - terms[0])
    assert ahead.value > -3 * ahead.error


# ------------------------------------------------------------------ what it takes


def vae():
    torch.manual_seed(0)
    return HierarchicalVAE((2,), (2, 2), GaussianLikelihood(0.3))


def ladder():
    torch.manual_seed(0)
    return HierarchicalVAE(
        (2,), (2, 2), GaussianLikelihood(0.3), encoder=LadderEncoder((2,), (2, 2))
    )


def bits():
    torch.manual_seed(0)
    return DiffusionModel(NeuralBernoulliDenoiser(MLP((4,)), LogSNRSchedule(10), (4,)))


def categories():
    torch.manual_seed(0)
    network = MLP((4, 3), hidden_size=16)
    return DiffusionModel(
        NeuralCategoricalDenoiser(network, LogSNRSchedule(10), (4,), num_categories=3)
    )


MODELS = {
    "diffusion": (build, data()),
    "one step": (lambda: build(1), data()),
    "hierarchical VAE": (vae, data()),
    "ladder": (ladder, data()),
    "bits": (bits, (data(240).reshape(120, 4) > 0).float()),
    "categories": (categories, (data(240).reshape(120, 4) + 1).clamp(0, 2).long()),
}


@pytest.mark.parametrize("name", MODELS)
def test_models(name):
    make, x_0 = MODELS[name]
    model = make()
    before = weights(model)
    result = fit(model, x_0, **SHORT)
    assert result.best.bound.value >= result.history["bound"].values[0] - 5
    assert result.num_data, result.num_held_out == (108, 12)
    assert result.best.step == 0 or not torch.equal(weights(model), before)


@pytest.mark.parametrize("guide", ["guide", "posterior_guide"])
def test_a_model_and_a_guide(guide):
    diffusion = build(4)
    fit((diffusion.model, getattr(diffusion, guide)), data(), **SHORT)
    assert not torch.equal(weights(diffusion), weights(build(4)))


def test_a_subsampled_pair():
    diffusion = build()
    pair = diffusion.subsampled(num_timesteps=2)
    fit((pair.model, pair.guide), data(), **SHORT)
    assert not torch.equal(weights(diffusion), weights(build()))


class Programs(PyroModule):
    """A plain VAE of somebody else's."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(2, 2)


class SomeModel(Programs):
    def forward(self, x_0):
        with pyro.plate("data", len(x_0)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x_0), 2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.net(z), 1.0).to_event(1), obs=x_0)


class SomeGuide(Programs):
    def forward(self, x_0):
        with pyro.plate("data", len(x_0)):
            pyro.sample("z", dist.Normal(self.net(x_0), 1.0).to_event(1))


def test_programs_of_somebody_else():
    model, guide = SomeModel(), SomeGuide()
    result = fit((model, guide), data(), **SHORT)
    assert result.name == "a model and a guide"
    assert result.history["bound"].values[-1] > result.history["bound"].values[0]


def test_the_elbo_follows_the_order_of_the_guide():
    diffusion, given = build(4), {"x_0": data(8)}
    with_kls = _elbo(diffusion.model, diffusion.posterior_guide, dict(given))
    assert isinstance(with_kls, TraceMeanField_ELBO)
    assert type(_elbo(diffusion.model, diffusion.guide, dict(given))) is Trace_ELBO


def test_kinds_of_data_give_the_same_run(tmp_path):
    x_0 = data()
    np.save(tmp_path / "x.npy", x_0.numpy())
    kinds = [
        x_0,
        x_0.numpy(),
        {"x_0": x_0},
        TensorDataset(x_0),
        Items(x_0),
        np.load(tmp_path / "x.npy", mmap_mode="r"),
    ]
    found = []
    for kind in kinds:
        model = build()
        fit(model, kind, **SHORT)
        found.append(weights(model))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


class Items(torch.utils.data.Dataset):
    """A dataset of one datum after the other."""

    def __init__(self, x_0):
        self.x_0 = x_0

    def __len__(self):
        return len(self.x_0)

    def __getitem__(self, row):
        return {"x_0": self.x_0[row]}


def test_mask_and_weights_on_disk(tmp_path):
    x_0, seen, w = data(), data() > 0, torch.rand(120)
    seen[:, 0] = True
    for name, array in (("x", x_0), ("mask", seen), ("w", w)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    on_disk = {
        name: np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "mask", "w")
    }
    found = []
    for x, mask, w_ in (
        (x_0, seen, w),
        (x_0, on_disk["mask"], w),
        (on_disk["x"], on_disk["mask"], on_disk["w"]),
    ):
        model = build()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            fit(model, x, mask=mask, weights=w_, **SHORT)
        found.append(weights(model))
    torch.testing.assert_close(found[1], found[0])
    torch.testing.assert_close(found[2], found[0])


def test_under_a_mask_gaps_do_not_matter():
    x_0 = data()
    seen = torch.rand(x_0.shape, generator=torch.Generator().manual_seed(0)) < 0.7
    seen[:, 0] = True
    found = []
    for hidden in (math.nan, 100.0):
        model = build()
        fit(model, torch.where(seen, x_0, hidden), mask=seen, **SHORT)
        found.append(weights(model))
    torch.testing.assert_close(found[0], found[1])


def test_the_average_has_the_last_step():
    bounds = fit(build(), data(), max_steps=3, progress=False).history["bound"].values
    assert bounds[0] != bounds[-1]


class Constants(SomeModel):
    """A model with buffers that training never changes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("index", 7 * torch.arange(16))
        self.register_buffer("hidden", torch.full((3,), -math.inf))
        self.register_buffer("empty", torch.zeros(0))


def test_the_average_keeps_constant_buffers():
    model = Constants()
    fit((model, SomeGuide()), data(), **SHORT)
    assert torch.equal(model.index, 7 * torch.arange(16))
    assert torch.equal(model.hidden, torch.full((3,), -math.inf))


# ------------------------------------------------------------------ weights


@pytest.mark.parametrize("make", [build, ladder])
def test_a_weighted_loss_is_the_weighted_sum_of_bounds(make):
    family, x_0 = make().double(), data(16).double()
    w = torch.linspace(0, 3, 16, dtype=torch.float64)
    pair = family.subsampled() if isinstance(family, DiffusionModel) else family
    model, guide = pair.model, pair.guide
    torch.manual_seed(0)
    bounds = bound_by_datum(model, guide, x_0)
    torch.manual_seed(0)
    loss = (
        TraceMeanField_ELBO()
        .differentiable_loss(Weighted(model), Weighted(guide), x_0, weights=w)
        .item()
    )
    assert loss == pytest.approx(-(w * bounds).sum().item(), rel=1e-9)


def test_data_without_weight_are_not_learned():
    x_0 = torch.cat([data(300) - 3, data(300) + 3])
    w = torch.cat([torch.zeros(300), torch.ones(300)])
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=32, num_blocks=1)
    model = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(20), (2,)))
    fit(model, x_0, weights=w, max_steps=300, progress=False)
    torch.manual_seed(0)
    assert (model.sample(200).mean(1) > 0).float().mean() > 0.95


def test_a_first_gradient_of_zero_does_not_end_the_training():
    training = split({"x_0": torch.arange(200)}, seed=0).training
    w = torch.ones(200)
    w[next(iter(Passes(training, 8)))["x_0"]] = 0.0
    model = build()
    fit(model, data(200), weights=w, recipe=Recipe(batch_size=8), **SHORT)
    assert not torch.equal(weights(model), weights(build()))


def test_the_mean_with_weights_is_that_of_repeated_data():
    values, w = torch.randn(50, dtype=torch.float64), torch.randint(1, 4, (50,)).double()
    repeated = values.repeat_interleave(w.long())
    assert Mean.of(values, w).value == pytest.approx(float(repeated.mean()))
    assert Mean.of(values).error == pytest.approx(float(values.std() / 50**0.5))


# ------------------------------------------------------------------ warm-up of the KLs


def test_a_warm_up_scales_the_latent_sites_alone():
    """Under a share β the loss is −(reconstruction − β · KLs), also in a graph whose β changes in place."""
    family, x_0, share = ladder().double(), data(16).double(), torch.ones(())
    model, guide = (WarmedUp(program, share) for program in (family.model, family.guide))
    graph = compile_elbo(model, guide, TraceMeanField_ELBO(), backend=None)
    found = {}
    for beta in (0.0, 0.3, 1.0):
        share.fill_(beta)
        for name, loss in (("programs", TraceMeanField_ELBO()(model, guide)), ("graph", graph)):
            torch.manual_seed(0)
            found[name, beta] = loss(x_0).item()
    for name in ("programs", "graph"):
        expected = 0.7 * found["programs", 0.0] + 0.3 * found["programs", 1.0]
        assert found[name, 0.3] == pytest.approx(expected, rel=1e-6)
    torch.manual_seed(0)
    plain = TraceMeanField_ELBO()(family.model, family.guide)(x_0).item()
    assert found["graph", 1.0] == pytest.approx(plain, rel=1e-9)


@pytest.mark.parametrize(("make", "shares"), [(ladder, [0.1, 0.2, 1.0]), (build, [1.0])])
def test_hierarchical_vaes_have_a_warm_up(make, shares, monkeypatch):
    seen = []
    start = Watch.on_train_batch_start

    def noted(self, *arguments):
        start(self, *arguments)
        seen.append(round(float(self.kl_share), 6))

    monkeypatch.setattr(Watch, "on_train_batch_start", noted)
    fit(make(), data(), **SHORT)
    assert set(shares) <= set(seen)
    assert seen[-1] == 1.0
    assert seen == sorted(seen)


# ------------------------------------------------------------------ held-out data


def test_checks_read_some_of_many_held_out_data():
    many, few = (HeldOut(build(), {"x_0": data(n)}, 256, CPU) for n in (300, 50))
    some = many.fewer(100)
    assert some.count == len(some.read()) == 100
    assert len({tuple(row) for row in some.data["x_0"].tolist()}) == 100
    assert torch.equal(some.data["x_0"], many.fewer(100).data["x_0"])
    assert few.fewer(100) is few


@pytest.mark.parametrize("num_timesteps", [1, 2, 7, 300])
def test_the_held_out_bound_is_that_of_elbo_terms(num_timesteps):
    """Readings over many seeds have the mean of the full sum, term by term."""
    torch.manual_seed(0)
    denoiser = GaussianDenoiser(
        torch.zeros(2, dtype=torch.float64),
        torch.full((2,), 0.8, dtype=torch.float64),
        LogSNRSchedule(num_timesteps, log_snr_min=-2.0),
    )
    scale = torch.full((2,), 2.0, dtype=torch.float64)
    diffusion = DiffusionModel(denoiser, transform=Standardize(torch.zeros_like(scale), scale))
    x_0 = 2 * data(5).double()
    held_out = HeldOut(diffusion, {"x_0": x_0}, 256, CPU)
    readings = torch.stack([held_out.read(seed) for seed in range(60)])
    exact = elbo_terms(diffusion, x_0, num_particles=400)
    error = (readings.var(0) / 60 + exact.standard_error**2).sqrt()
    assert ((readings.mean(0) - exact.elbo).abs() < 4.5 * error + 1e-9).all()
    # With the exact reverse chain the bound is log p(x_0) + E log N(x_T; 0, 1) / p(x_T), in closed form.
    bar, z = 1 / (1 + math.exp(2.0)), (x_0 / 2).numpy()
    v, second = 0.64 * bar + 1 - bar, bar * z**2 + 1 - bar
    end = 0.5 * (math.log(v) + second / v - second)
    known = torch.from_numpy(log_normal(z, 0.0, 0.64) - math.log(2.0) + end).sum(-1)
    alone = (readings.var(0) / 60).sqrt()
    assert ((readings.mean(0) - known).abs() < 4.5 * alone + 1e-9).all()
    torch.testing.assert_close(held_out.read(), held_out.read(), rtol=0, atol=0)


@settings(max_examples=30, deadline=None)
@given(st.integers(10, 400), st.integers(0, 5))
def test_a_split_has_every_row_once(count, seed):
    rows = torch.arange(count)
    parts = split({"x_0": rows, "weights": rows.double()}, seed)
    held_out = parts.held_out["x_0"]
    assert len(held_out) == max(2, round(count / 10))
    assert sorted([*held_out.tolist(), *parts.training["x_0"].tolist()]) == rows.tolist()
    assert torch.equal(parts.held_out["weights"].long(), held_out)
    again = split({"x_0": rows}, seed)
    assert torch.equal(again.held_out["x_0"], held_out)


def test_rows_on_disk_are_those_in_memory():
    array = np.arange(50.0).reshape(25, 2)
    on_disk = ShuffledRows(array.view(np.memmap) if hasattr(array, "view") else array, 5, 20, 3)
    in_memory = ShuffledRows(torch.as_tensor(array), 5, 20, 3)
    places = np.array([0, 14, 3])
    assert np.array_equal(on_disk[places], in_memory[places].numpy())
    assert len(on_disk) == 15


def test_passes_go_on_without_end_and_from_where_they_stopped():
    rows = {"x_0": torch.arange(10)}
    batches = Passes(rows, 4)
    taken = [batch["x_0"].tolist() for batch, _ in zip(batches, range(6), strict=False)]
    assert all(len({*taken[k], *taken[k + 1]}) == 8 for k in (0, 2, 4))
    resumed = Passes(rows, 4)
    before = Passes(rows, 4)
    for _ in zip(range(3), before, strict=False):
        pass
    resumed.load_state_dict(before.state_dict())
    assert next(iter(resumed))["x_0"].tolist() == taken[3]


def test_a_run_ends_after_so_many_checks_behind():
    held_out = HeldOut(build(), {"x_0": data(50)}, 256, CPU)
    record, zero = Record(held_out, patience=2), [torch.zeros(1)]
    falling = [torch.zeros(50) - k + 0.01 * torch.randn(50) for k in range(3)]
    over = []
    for step, bounds in enumerate([*falling[:2], falling[0], *falling[1:]]):
        record.add(bounds, lambda: zero, step=step)
        over.append(record.is_over)
    assert over == [False, False, False, False, True]
    assert record.best["step"] == 0


# ------------------------------------------------------------------ a run that is broken off


class Killed(Exception):
    pass


@pytest.mark.parametrize("make", [build, vae])
def test_a_run_that_is_resumed_is_the_same_run(make, tmp_path, monkeypatch):
    torch.manual_seed(3)
    whole = make()
    once = fit(whole, data(), max_steps=100, progress=False)

    check = Watch._check

    def killed(self, trainer, module):
        if trainer.global_step == 75:
            raise Killed
        check(self, trainer, module)

    monkeypatch.setattr(Watch, "_check", killed)
    torch.manual_seed(3)
    begun = make()
    with pytest.raises(Killed):
        fit(begun, data(), max_steps=100, progress=False, path=tmp_path)
    monkeypatch.setattr(Watch, "_check", check)
    torch.manual_seed(4)
    resumed = make()
    result = fit(resumed, data(), max_steps=100, progress=False, path=tmp_path)
    assert torch.equal(weights(resumed), weights(whole))
    left_out = ("seconds",)
    for name in set(result.history) - set(left_out):
        np.testing.assert_array_equal(result.history[name].values, once.history[name].values)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


def test_a_run_that_is_over_is_read_and_not_trained(tmp_path):
    first = build()
    once = fit(first, data(), path=tmp_path, **SHORT)
    written = (tmp_path / "last.ckpt").stat().st_mtime_ns
    second = build(seed=5)
    again = fit(second, data(), path=tmp_path, **SHORT)
    assert torch.equal(weights(first), weights(second))
    assert again.history.identical(once.history)
    assert (tmp_path / "last.ckpt").stat().st_mtime_ns == written
    longer = fit(build(), data(), path=tmp_path, max_steps=100, progress=False)
    assert longer.history["step"].values.tolist() == [0, 25, 50, 75, 100]


def test_a_run_of_seconds_ends_in_time():
    result = fit(build(), data(), max_seconds=1.0, progress=False)
    assert "1 seconds" in result.ended
    assert 1.0 <= result.seconds < 10.0


def test_the_seconds_include_the_compilation(monkeypatch):
    passed = [0.0]
    clock = SimpleNamespace(perf_counter=lambda: time.perf_counter() + sum(passed))
    monkeypatch.setattr(watching, "time", clock)

    def slow(*programs, **settings):
        passed.append(100.0)
        return compile_elbo(*programs, **settings)

    monkeypatch.setattr(losses, "compile_elbo", slow)
    eager = Recipe(compiled=False)
    result = fit(build(), data(), max_steps=25, max_seconds=1000.0, recipe=eager, progress=False)
    assert result.history["seconds"].values[0] >= 100


def test_a_new_best_lets_the_run_go_on():
    held_out = HeldOut(build(), {"x_0": data(50)}, 256, CPU)
    watch = Watch(held_out, Recipe(patience=1), 100, None, None, progress=False)
    trainer, noise = SimpleNamespace(global_step=50), 0.01 * torch.randn(50)
    for bounds, over in ((0.0, False), (-1.0, True), (1.0, False)):
        watch.record.add(bounds + noise, lambda: [torch.zeros(1)], step=50)
        watch._end_if_over(trainer, 0.0)
        assert trainer.should_stop is bool(watch.ended) is over


def test_an_error_leaves_the_best_weights(monkeypatch):
    best = {}
    check = Watch._check

    def spoiled(self, trainer, module):
        check(self, trainer, module)
        if trainer.global_step == 50:
            best["weights"] = [t.clone() for t in self.record._best_tensors]
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.fill_(math.nan)

    monkeypatch.setattr(Watch, "_check", spoiled)
    model = build()
    with pytest.raises(ValueError, match="step 50"):
        fit(model, data(), max_steps=200, progress=False)
    assert torch.isfinite(weights(model)).all()
    assert weights(model).numel() == sum(
        t.numel() for t in best["weights"][: len(list(model.parameters()))]
    )


def test_an_interrupt_is_an_interrupt(monkeypatch):
    seen = []
    check = Watch._check

    def interrupted(self, trainer, module):
        seen.append(self)
        if trainer.global_step == 25:
            raise KeyboardInterrupt
        check(self, trainer, module)

    monkeypatch.setattr(Watch, "_check", interrupted)
    handler, model = signal.getsignal(signal.SIGINT), build()
    with pytest.raises(KeyboardInterrupt):  # and not SystemExit, as of Lightning
        fit(model, data(), max_steps=50)
    assert signal.getsignal(signal.SIGINT) is handler
    assert seen[0]._bar.disable  # it is closed
    assert torch.equal(
        weights(model), weights(build())
    )  # the best weights: those of the first check


# ------------------------------------------------------------------ manners


def test_the_process_is_left_as_it_was():
    torch.manual_seed(7)
    state, model = torch.get_rng_state(), build().eval()
    torch.set_rng_state(state)
    fit(model, data(), **SHORT)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert not any(module.training for module in model.modules())


def test_training_is_in_training_mode():
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=8, num_blocks=1, dropout=0.5)
    model = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(5), (2,))).eval()
    modes = []
    network.register_forward_pre_hook(lambda module, _: modes.append(module.training))
    fit(model, data(), max_steps=25, progress=False)
    assert True in modes
    assert not model.training


def test_a_seed_says_what_happens():
    found = []
    for seed in (0, 0, 1):
        model = build()
        torch.manual_seed(len(found))
        fit(model, data(), seed=seed, **SHORT)
        found.append(weights(model))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_step_that_cannot_be_traced_is_taken_as_it_is():
    class Branching(SomeModel):
        def forward(self, x_0):
            if x_0.sum() > 1e9:
                raise AssertionError
            super().forward(x_0)

    result = fit((Branching(), SomeGuide()), data(), **SHORT)
    assert result.history["bound"].values[-1] > result.history["bound"].values[0]


def test_matrices_alone_have_weight_decay():
    from pyro_diffusion.training.fitting import _adamw

    model = MLP((2,), hidden_size=16)
    optimizer = _adamw(model.parameters(), Recipe(weight_decay=0.5))
    decayed, free = optimizer.param_groups
    assert all(p.dim() >= 2 for p in decayed["params"])
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.5, 0.0)


def test_without_lightning_the_error_says_how_to_install_it(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "lightning"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    with pytest.raises(ImportError, match=r"pip install 'pyro-diffusion\[lightning\]'"):
        fit(build(), data(), **SHORT)


WRONG = {
    "too few": ({"x_0": data(5)}, "ten or more"),
    "a loader": ({"x_0": DataLoader(TensorDataset(data()))}, "dataset"),
    "a word": ({"x_0": "data"}, "argument 'x_0': got a str"),
    "NaN": ({"x_0": torch.full((50, 2), math.nan)}, "mask=x_0.isfinite"),
    "shape": ({"x_0": torch.zeros(50, 3)}, r"expected \(N,\)"),
    "columns": ({"x_0": {"mask": torch.ones(50, 2)}}, "called 'x_0'"),
    "lengths": ({"x_0": data(), "mask": torch.ones(50, 2).bool()}, "one row in each"),
    "mask": ({"x_0": data(), "mask": torch.ones(120, 2)}, "torch.bool"),
    "negative weights": ({"x_0": data(), "weights": -torch.ones(120)}, "not negative"),
    "wrong weights": ({"x_0": data(), "weights": torch.ones(120, 2)}, "one number for each datum"),
    "no weight": ({"x_0": data(), "weights": torch.zeros(120)}, "not all zero"),
    "one validation datum": ({"x_0": data(), "validation": data()[:1]}, "two or more"),
    "bad validation": ({"x_0": data(), "validation": data() / 0}, "'validation'.*finite numbers"),
    "rows in a list": ({"x_0": data().tolist()}, "Convert numbers with torch.as_tensor"),
    "a number": ({"x_0": data(), "num_data": 120}, "a row for each datum"),
    "a device": ({"x_0": data(), "device": "cpu"}, "'device': got a str"),
    "a gradient": ({"x_0": data().requires_grad_()}, r"x_0.detach\(\)"),
    "held out of weight 0": (
        {"x_0": data(), "weights": torch.eye(120)[3]},
        "'weights'.*too few with a weight",
    ),
    "steps": ({"x_0": data(), "max_steps": 0}, "max_steps"),
    "seconds": ({"x_0": data(), "max_seconds": -1.0}, "max_seconds"),
    "recipe": ({"x_0": data(), "recipe": {"lr": 1}}, "a Recipe"),
    "rate": ({"x_0": data(), "recipe": Recipe(learning_rate=-1.0)}, "learning_rate"),
    "averaging": ({"x_0": data(), "recipe": Recipe(averaging=1.0)}, "averaging"),
    "decay": ({"x_0": data(), "recipe": Recipe(weight_decay="a")}, "weight_decay"),
    "a class": ({"x_0": data(), "recipe": Recipe(elbo=Trace_ELBO)}, "the class Trace_ELBO"),
    "seed": ({"x_0": data(), "seed": -1}, "seed"),
    "path": ({"x_0": data(), "path": 3}, "argument 'path'"),
    "a file": ({"x_0": data(), "path": __file__}, "a folder"),
    "a name": ({"x_0": data(), "masc": torch.ones(120, 2).bool()}, "masc"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said(name):
    arguments, said = WRONG[name]
    arguments = SHORT | arguments
    with pytest.raises(ValueError, match=said):
        fit(build(), arguments.pop("x_0"), **arguments)


def test_programs_that_have_nothing_to_fit():
    exact = DiffusionModel(GaussianDenoiser(torch.zeros(2), torch.ones(2), LogSNRSchedule(5)))
    with pytest.raises(ValueError, match="without parameters"):
        fit(exact, data(), **SHORT)
    with pytest.raises(ValueError, match=r"requires_grad_\(True\)"):
        fit(build().requires_grad_(False), data(), **SHORT)
    with pytest.raises(ValueError, match="PyroModule"):
        fit((lambda x_0: None, lambda x_0: None), data(), **SHORT)


class Statement(SomeModel):
    """A model with a parameter that no module has."""

    def forward(self, x_0):
        pyro.param("of_nobody", torch.zeros(2))
        super().forward(x_0)


class OwnParameter(SomeModel):
    def __init__(self):
        super().__init__()
        self.of_each = nn.Parameter(torch.zeros(2))

    def forward(self, x_0):
        super().forward(x_0 + self.of_each)


def test_parameters_that_no_step_would_train():
    with pytest.raises(ValueError, match="'of_nobody'.*PyroParam"):
        fit((Statement(), SomeGuide()), data(), **SHORT)
    fit((OwnParameter(), SomeGuide()), data(), **SHORT)
    second = OwnParameter()  # Pyro's store has the first one's parameter under this name
    with pytest.raises(ValueError, match="'of_each'.*clear_param_store"):
        fit((second, SomeGuide()), data(), **SHORT)
    pyro.clear_param_store()
    fit((second, SomeGuide()), data(), **SHORT)
    assert second.of_each.abs().min() > 0


def test_a_folder_of_other_data_or_of_another_model(tmp_path):
    fit(build(), data(), path=tmp_path, **SHORT)
    with pytest.raises(ValueError, match="the same"):
        fit(build(), data(seed=9), path=tmp_path, max_steps=100, progress=False)
    torch.manual_seed(0)
    other = DiffusionModel(NeuralDenoiser(MLP((2,), hidden_size=8), LogSNRSchedule(20), (2,)))
    with pytest.raises(ValueError, match="no checkpoint can be used"):
        fit(other, data(), path=tmp_path, **SHORT)


def test_a_folder_of_other_weights(tmp_path):
    fit(build(), data(), path=tmp_path, weights=[1.0, 2.0] * 60, **SHORT)
    with pytest.raises(ValueError, match="the same"):
        fit(build(), data(), path=tmp_path, weights=[2.0, 1.0] * 60, **SHORT)


def test_columns_stay_what_they_are():
    found: Columns = columns(data(), CPU, mask=None, weights=[1.0] * 119 + [2.0])
    assert set(found) == {"x_0", "weights"}
    assert float(found["weights"].mean()) == pytest.approx(1.0)


def test_it_says_nothing_of_its_own(capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(build(), data(), max_steps=25)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_a_model_that_overfits(tmp_path):
    """It falls behind; the run ends and says so, leaves the best weights, and is over when resumed."""
    recipe, held_out = Recipe(learning_rate=1e-2, weight_decay=0.0), data(100, seed=2)
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        network = MLP((2,), hidden_size=64, num_blocks=2)
        model = DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(20, log_snr_max=6.0), (2,)))
        with pytest.warns(UserWarning, match="overfits"):
            result = fit(
                model, data(12), validation=held_out, max_steps=1000, recipe=recipe,
                path=tmp_path, progress=False,
            )  # fmt: skip
        found.append((result, weights(model)))
    (first, left), (second, left_again) = found
    assert 250 <= first.num_steps < 1000
    assert first.best.step < first.num_steps
    assert "two standard errors" in first.ended
    assert "behind the best" in repr(first)
    read = HeldOut(model, {"x_0": held_out}, 256, CPU).read(rows=1920)  # as in a check
    best = first.history["bound"].sel(step=first.best.step)
    assert float(read.mean()) == pytest.approx(float(best), abs=1e-4)
    assert second.history.identical(first.history)
    assert torch.equal(left, left_again)
