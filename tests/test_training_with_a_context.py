"""Training with a context: p(x∣c) and p(x) from one model, against closed forms; rows stay together."""

import math
from functools import partial

import numpy as np
import pyro
import pytest
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn
from torch.utils.data import DataLoader, Dataset

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    HierarchicalVAE,
    ImportanceTimesteps,
    LadderEncoder,
    LogSNRSchedule,
    NeuralDenoiser,
    OptimalVariance,
    bound_by_datum,
    elbo_terms,
    evaluate_bound,
)
from pyro_diffusion.denoisers.base import Denoiser
from pyro_diffusion.denoisers.variances import exact_variance
from pyro_diffusion.processes import Denoised, chain_step, pad, posterior_mean
from pyro_diffusion.processes.gaussian import gaussian
from pyro_diffusion.training.batches import OrderedBatches, ShuffledBatches
from pyro_diffusion.training.columns import Passes, columns, parts_of
from pyro_diffusion.training.held_out import HeldOut

lightning = pytest.importorskip("lightning.pytorch")
from pyro_diffusion.training import Recipe, SVIModule, fit  # noqa: E402
from pyro_diffusion.training.watching import Watch  # noqa: E402

CPU = torch.device("cpu")
SLOPE, SHIFT, STD = 1.5, 0.4, 0.5
ADAM = partial(torch.optim.Adam, lr=1e-2)


class Regression(Denoiser):
    """The exact reverse chain of x ~ N(W c + b, s²) with c ~ N(0, 1), of which W, b and s are learned.

    Without a context it is that of the marginal, N(b, W² + s²).
    """

    def __init__(self, schedule, slope=0.0, shift=0.0, std=1.0):
        super().__init__(schedule, (1,))
        numbers = torch.tensor([slope, shift, math.log(std)], dtype=torch.float64)
        self.slope, self.shift, self.log_std = (nn.Parameter(number) for number in numbers)

    @property
    def dtype(self):
        return torch.float64

    def denoise(self, x_t, log_snr, context=None, null=None):
        if context is None:
            context, null = torch.zeros(x_t.shape[-2], 1), torch.ones(x_t.shape[-2]).bool()
        null = torch.zeros(len(context)).bool() if null is None else null
        variance = (2 * self.log_std).exp()
        mean = torch.where(null[:, None], self.shift, self.slope * context + self.shift)
        variance = torch.where(null[:, None], self.slope**2 + variance, variance)
        signal, noise = (pad(s, self.missing_dim, x_t.dtype) for s in self.schedule.scales(log_snr))
        total = signal**2 * variance + noise**2
        x_0_hat = mean + signal * variance / total * (x_t - signal * mean)
        return Denoised(x_0_hat, variance=(variance * noise**2 / total).expand(x_t.shape))

    def reverse_kernel(self, x_t, t, denoised):
        step = chain_step(t, self.schedule)
        mean = posterior_mean(x_t, denoised.x_0_hat, step, missing_dim=self.missing_dim)
        variance = exact_variance(step.padded(self.missing_dim), denoised.variance)
        return gaussian(mean, variance.to(x_t.dtype).sqrt(), 1)


def regression(*numbers):
    schedule = LogSNRSchedule(10, log_snr_max=6.0, log_snr_min=-40.0)
    return DiffusionModel(Regression(schedule, *numbers))


def data(n=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    c, noise = torch.randn(2, n, 1, generator=generator, dtype=torch.float64)
    return SLOPE * c + SHIFT + STD * noise, c


def log_p(x_0, c=None):
    mean = SHIFT if c is None else SLOPE * c + SHIFT
    std = math.hypot(SLOPE, STD) if c is None else STD
    return torch.distributions.Normal(mean, std).log_prob(x_0).sum(-1)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def labelled(null_token=True, hidden_size=16, **settings):
    torch.manual_seed(0)
    settings |= {"hidden_size": hidden_size, "num_blocks": 1, "null_token": null_token}
    return DiffusionModel(NeuralDenoiser(MLP((2,), **settings), LogSNRSchedule(20), (2,)))


def labels(n=120, seed=0):
    """Two clusters, 1.5 and −1.5, and the number of the cluster."""
    generator = torch.Generator().manual_seed(seed)
    c = torch.randint(0, 2, (n,), generator=generator)
    return 3.0 * c[:, None] - 1.5 + 0.5 * torch.randn(n, 2, generator=generator), c


SHORT = {"max_steps": 25, "progress": False}
QUICK = Recipe(learning_rate=5e-2, averaging=0.9)


# ------------------------------------------------------------------ what it reaches


def test_the_closed_forms_of_these_tests():
    """The bound of the exact model is log p(x∣c), with null rows and without a context log p(x)."""
    diffusion, (x_0, c) = regression(SLOPE, SHIFT, STD), data(8)
    null = torch.arange(8) % 2 == 0
    for given, expected in (
        ({}, log_p(x_0)),
        ({"context": c}, log_p(x_0, c)),
        ({"context": c, "null": null}, torch.where(null, log_p(x_0), log_p(x_0, c))),
    ):
        terms = elbo_terms(
            diffusion.model, diffusion.guide, x_0, analytic_kl=False, progress=False, **given
        )
        torch.testing.assert_close(terms.elbo, expected, rtol=0, atol=1e-6)


@pytest.fixture(scope="module")
def both_laws():
    """A run with context dropout, from wrong numbers."""
    x_0, c = data(2000)
    diffusion, recipe = regression(), QUICK._replace(context_dropout=0.2)
    result = fit(diffusion, x_0, context=c, max_steps=150, recipe=recipe, progress=False)
    return diffusion, result


def test_both_bounds_are_those_of_the_two_laws(both_laws):
    """Within 0.02 nats of log p(x∣c) and log p(x), for data that the run has not seen."""
    diffusion, result = both_laws
    x_0, c = data(2000, seed=1)
    for given, exact in (({"context": c}, log_p(x_0, c)), ({}, log_p(x_0))):
        found = evaluate_bound(diffusion, x_0, standard_error=0.004, **given)
        error = 4 * found.mean().monte_carlo_error
        assert -0.02 - error < float((found.elbo - exact).mean()) < 0.02 + error
    held_out, learned = result.best.bound, diffusion.denoiser
    spread = math.hypot(*held_out[1:])
    assert held_out.value == pytest.approx(float(log_p(x_0, c).mean()), abs=4 * spread)
    assert learned.slope.item() == pytest.approx(SLOPE, abs=0.05)
    assert learned.log_std.exp().item() == pytest.approx(STD, abs=0.05)


def test_a_context_of_other_rows_is_worth_nothing():
    """The tests above fail when rows are not kept together: the bound is that of data without a context."""
    (x_0, c), diffusion = data(2000), regression()
    fit(diffusion, x_0, context=c.roll(1, 0), max_steps=150, recipe=QUICK, progress=False)
    assert abs(diffusion.denoiser.slope.item()) < 0.15


def test_a_network_learns_both_laws_from_labels():
    """In a graph, with whole numbers: E log p(x∣c) and E log p(x), 0.69 nats apart."""
    x_0, c = labels(2000)
    diffusion = labelled(num_classes=2, hidden_size=32)
    recipe = Recipe(context_dropout=0.3, learning_rate=1e-2, averaging=0.98)
    x_valid, c_valid = labels(1000, seed=2)
    fit(
        diffusion, x_0, context=c, validation={"x_0": x_valid, "context": c_valid}, max_steps=300,
        recipe=recipe, progress=False,
    )  # fmt: skip
    x_0, c = labels(2000, seed=1)
    normal = torch.distributions.Normal(torch.tensor([-1.5, 1.5]), 0.5)
    each = normal.log_prob(x_0[..., None]).sum(-2)
    exact = each.gather(1, c[:, None])[:, 0], each.logsumexp(1) - math.log(2)
    assert float((exact[0] - exact[1]).mean()) == pytest.approx(math.log(2), abs=0.01)
    for given, law in (({"context": c}, exact[0]), ({}, exact[1])):
        found = evaluate_bound(diffusion, x_0, standard_error=0.03, **given)
        assert -0.35 < float((found.elbo - law).mean()) < 0.1
    wrong = evaluate_bound(diffusion, x_0, context=1 - c, standard_error=0.5)
    assert float(wrong.mean()) < -5


def test_a_hierarchical_vae_and_weights():
    """Programs that take no context refuse it; weights go with data and context."""
    vae = HierarchicalVAE((2,), (2, 2), encoder=LadderEncoder((2,), (2, 2)))
    x_0, c = labels()
    with pytest.raises(ValueError, match="argument 'context': got one for a"):
        fit(vae, x_0, context=c, **SHORT)
    x_0, c = data(2000)
    w = (c[:, 0] > 0).double()  # a slope of the other sign below zero has no weight
    x_0 = torch.where(c > 0, x_0, -x_0)
    diffusion = regression()
    fit(diffusion, x_0, context=c, weights=w, max_steps=150, recipe=QUICK, progress=False)
    assert 1.2 < diffusion.denoiser.slope.item() < 1.7


# ------------------------------------------------------------------ rows stay together


def parts(kind, x_0, c):
    if kind == "tuple":
        return x_0, (c, {"twice": 2 * c})
    if kind == "dictionary":
        return x_0, {"a": c, "b": (2 * c,)}
    return x_0, c


@pytest.mark.parametrize("kind", ["tensor", "tuple", "dictionary", "array"])
def test_training_and_held_out_rows_keep_their_context(kind):
    x_0 = torch.arange(50.0, dtype=torch.float64)[:, None]
    c = x_0.numpy() if kind == "array" else x_0
    _, context = parts(kind, x_0, c)
    programs = (nn.Linear(1, 1), nn.Linear(1, 1))
    programs[0].forward = programs[1].forward = lambda x_0, **given: None
    cut = parts_of(programs, programs, x_0, None, 3, CPU, context=context)
    held_out = HeldOut.__new__(HeldOut)
    held_out.__dict__ |= {"data": cut.held_out, "device": CPU}
    rows = [held_out._rows(slice(1, 4)), Passes(cut.training, 8).first()]
    rows += [batch for batch, _ in zip(Passes(cut.training, 8), range(9), strict=False)]
    for batch in rows:
        for leaf in torch.utils._pytree.tree_leaves(batch["context"]):
            assert leaf.dtype == torch.float64
            factor = leaf.sum() / batch["x_0"].sum()
            torch.testing.assert_close(leaf, factor * batch["x_0"])
            assert float(factor) in (1.0, 2.0)


def test_kinds_of_context_give_the_same_run(tmp_path):
    """Whole numbers stay whole; on disk they stay on disk."""
    x_0, c = labels()
    null = torch.arange(120) % 5 == 0
    for name, array in (("x", x_0), ("c", c.to(torch.uint8)), ("null", null)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    x, there, dropped = (
        np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "c", "null")
    )
    assert isinstance(columns(x, CPU, context=there)["context"], np.memmap)
    assert columns(x_0, CPU, context=there)["context"].dtype == torch.uint8
    recipe = Recipe(context_dropout=0.3)
    found = []
    for data_, context, of_null in (
        (x_0, c, null),
        (x_0, c.numpy(), null.numpy()),
        (x_0, c.tolist(), null.tolist()),
        ({"x_0": x_0, "context": c, "null": null}, None, None),
        (Rows(x_0, c, null), None, None),
        (x, there, dropped),
    ):
        diffusion = labelled(num_classes=2)
        fit(diffusion, data_, context=context, null=of_null, recipe=recipe, **SHORT)
        found.append(weights(diffusion))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0])


class Rows(Dataset):
    """A datum after the other, with its context."""

    def __init__(self, x_0, c, null=None):
        self.x_0, self.c, self.null = x_0, c, null

    def __len__(self):
        return len(self.x_0)

    def __getitem__(self, row):
        null = {} if self.null is None else {"null": self.null[row]}
        return {"x_0": self.x_0[row], "context": self.c[row]} | null


def test_the_held_out_bound_is_that_of_data_with_their_context():
    diffusion, (x_0, c) = regression(SLOPE, SHIFT, STD), data(200)
    for given, expected in (({"context": c}, log_p(x_0, c)), ({}, log_p(x_0))):
        held_out = HeldOut(diffusion, {"x_0": x_0, **given}, 64, CPU)
        read = torch.stack([held_out.read(seed) for seed in range(6)])
        error = (read.var(0) / 6).mean().div(200).sqrt()
        assert abs(float((read.mean(0) - expected).mean())) < 4 * float(error)
        assert held_out.fewer(50).read().shape == (50,)
    some = HeldOut(diffusion, {"x_0": x_0, "context": {"c": c}}, 64, CPU).fewer(50)
    own = (some.data["x_0"] - SLOPE * some.data["context"]["c"] - SHIFT) / STD
    assert float(own.std()) == pytest.approx(1, abs=0.3)


def test_a_word_tells_the_context_of_held_out_data():
    diffusion, (x_0, c) = regression(), data(20)
    null = torch.arange(20) > 3
    kinds = [
        {},
        {"context": c},
        {"context": -c},
        {"context": (c, -c)},
        {"context": c, "null": null},
    ]
    words = {HeldOut(diffusion, {"x_0": x_0} | kind, 64, CPU).fingerprint for kind in kinds}
    assert len(words) == len(kinds)


class Killed(Exception):
    pass


def test_a_run_with_dropout_that_is_resumed_is_the_same_run(tmp_path, monkeypatch):
    (x_0, c), recipe = labels(), Recipe(context_dropout=0.3, batch_size=32)
    settings = {"context": c, "max_steps": 60, "recipe": recipe, "progress": False}
    whole = labelled(num_classes=2)
    once = fit(whole, x_0, **settings)
    check = Watch._check

    def killed(self, trainer, module):
        if trainer.global_step == 50:
            raise Killed
        check(self, trainer, module)

    monkeypatch.setattr(Watch, "_check", killed)
    with pytest.raises(Killed):
        fit(labelled(num_classes=2), x_0, path=tmp_path, **settings)
    monkeypatch.setattr(Watch, "_check", check)
    resumed = labelled(num_classes=2)
    result = fit(resumed, x_0, path=tmp_path, **settings)
    assert torch.equal(weights(resumed), weights(whole))
    assert result.history["bound"].equals(once.history["bound"])
    without = labelled(num_classes=2)
    fit(without, x_0, **settings | {"recipe": recipe._replace(context_dropout=0.0)})
    assert not torch.equal(weights(without), weights(whole))
    with pytest.raises(ValueError, match="the same"):
        fit(resumed, x_0, path=tmp_path, **settings | {"context": 1 - c, "max_steps": 90})


# ------------------------------------------------------------------ Lightning, by hand, and readers


def trainer(folder, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu"}
    return lightning.Trainer(default_root_dir=folder, **quiet | arguments)


def module_of(diffusion):
    pair = diffusion.subsampled()
    return SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), ADAM)


@pytest.mark.parametrize("loaders", ["of torch", "of arrays"])
def test_batches_with_a_context_train_and_validate(loaders, tmp_path):
    """Validation is of p(x∣c), without dropout; a tuple that torch's loader makes into a list is one."""
    (x_0, c), (x_valid, c_valid) = data(512), data(512, seed=1)
    if loaders == "of torch":
        batches = DataLoader(Rows(x_0, c), 64), DataLoader(Rows(x_valid, c_valid), 256)
    else:
        training = {"x_0": x_0, "context": c}
        batches = (
            ShuffledBatches(training, 64, context_dropout=0.3),
            OrderedBatches({"x_0": x_valid, "context": c_valid}, 256),
        )
    diffusion = regression(SLOPE, SHIFT, STD)
    engine, module = trainer(tmp_path, max_epochs=2), module_of(diffusion)
    engine.fit(module, *batches)
    bound = engine.callback_metrics["val_elbo"].item()
    assert bound == pytest.approx(float(log_p(x_valid, c_valid).mean()), abs=0.1)


def test_the_loss_of_a_batch_is_that_of_the_programs():
    diffusion, (x_0, c) = regression(1.0, 0.2, 0.7), data(32)
    null, module = torch.arange(32) % 3 == 0, module_of(diffusion)
    module.log = lambda *_, **__: None
    pair = diffusion.subsampled()
    for batch in (
        {"x_0": x_0, "context": c, "null": null},
        {"x_0": x_0, "context": c},
        {"x_0": x_0},
    ):
        torch.manual_seed(2)
        loss = module.training_step(batch, 0)
        given = {name: rows for name, rows in batch.items() if name != "x_0"}
        torch.manual_seed(2)
        expected = -bound_by_datum(pair.model, pair.guide, x_0, **given).mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    by_hand = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.0}), TraceMeanField_ELBO())
    torch.manual_seed(2)
    loss = module.training_step({"x_0": x_0, "context": c, "null": null}, 0)
    torch.manual_seed(2)
    assert by_hand.step(x_0, c, null=null) / 32 == pytest.approx(loss.item(), rel=1e-6)


def test_dropout_without_a_null_token_is_refused_before_the_first_step(tmp_path):
    diffusion = labelled(null_token=False, num_classes=2)
    before, module = weights(diffusion), module_of(diffusion)
    batches = ShuffledBatches({"x_0": X, "context": C}, 40, context_dropout=0.1)
    with pytest.raises(ValueError, match="step 0: .*without a null token.*null_token=True"):
        trainer(tmp_path, max_epochs=1).fit(module, batches)
    assert torch.equal(weights(diffusion), before)


def test_a_tuple_survives_a_loader_of_torch():
    """``default_collate`` makes a list of it."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x_t, log_snr, context):
            numbers, more = context
            return self.layer(torch.cat((x_t, numbers, more["a"]), dim=-1))

    rows = [{"x_0": torch.zeros(1), "context": (torch.ones(1), {"a": torch.ones(1)})}] * 20
    diffusion = DiffusionModel(NeuralDenoiser(Both(), LogSNRSchedule(4), (1,)))
    module = module_of(diffusion)
    module.log = lambda *_, **__: None
    batch = next(iter(DataLoader(rows, 4)))
    assert isinstance(batch["context"], list)
    assert module.training_step(batch, 0).isfinite()

    class Listed(Dataset):
        def __len__(self):
            return 20

        def __getitem__(self, row):
            return rows[row]

    fit(diffusion, Listed(), **SHORT)


def test_timesteps_and_variances_are_learned_from_data_with_their_context():
    diffusion, (x_0, c) = regression(SLOPE, SHIFT, STD), data(2000)
    timesteps = ImportanceTimesteps()
    pair = diffusion.subsampled(timesteps=timesteps)
    timesteps.observe(pair.model, pair.guide, x_0, context=c, null=torch.zeros(2000).bool())
    assert timesteps.moments
    null = torch.ones(2000).bool()
    for given, variance in (
        ({"context": c}, STD**2),
        ({"context": c, "null": null}, SLOPE**2 + STD**2),
        ({}, SLOPE**2 + STD**2),
    ):
        found = OptimalVariance.from_data(diffusion, x_0, num_levels=6, batch_size=700, **given)
        signal, noise = diffusion.schedule.scales(found.log_snr)
        exact = variance * noise**2 / (signal**2 * variance + noise**2)
        ratio = found.log_mean_square.exp() / exact
        assert ((ratio - 1).abs() < 5 * (2 / 2000) ** 0.5).all()
    with pytest.raises(ValueError, match="'mask': got one; expected data without gaps"):
        OptimalVariance.from_data(diffusion, x_0, mask=x_0 > 0)
    with pytest.raises(ValueError, match="'context': got shape .* a row for each datum"):
        OptimalVariance.from_data(diffusion, x_0, context=c[:5])


# ------------------------------------------------------------------ what is wrong is said


X, C = labels()
REAL = torch.randn(120, 3, generator=torch.Generator().manual_seed(0))
NAN = REAL.clone()
NAN[77, 1] = math.nan
TOO_LARGE = C.clone()
TOO_LARGE[77] = 2
NULL = torch.zeros(120).bool()
WITH_DROPOUT = Recipe(context_dropout=0.1)
WRONG = {
    "rows": (labelled, {"context": C[:50]}, "'context': got 50 rows for 120 data; expected a row"),
    "a row in a tree": (
        labelled,
        {"context": {"a": C, "b": C[:3]}},
        "'context': got 3 rows for 120",
    ),
    "a label": (labelled, {"context": TOO_LARGE}, "'context': got the value 2; expected a whole"),
    "negative": (labelled, {"context": -C}, "'context': got the value -1; expected a whole"),
    "real labels": (labelled, {"context": C.float()}, r"'context': got .*labels.long\(\)"),
    "NaN": (partial(labelled, context_shape=(3,)), {"context": NAN}, "'context': got 1 NaN"),
    "shape": (partial(labelled, context_shape=(2,)), {"context": REAL}, r"'context': got .*\(2,\)"),
    "a single number": (labelled, {"context": 1}, "'context': got a single number"),
    "words": (labelled, {"context": ["a"] * 120}, "'context': got .*expected numbers"),
    "no network": (
        lambda: DiffusionModel(NeuralDenoiser(MLP((2,)), LogSNRSchedule(4), (2,))),
        {"context": C},
        "'context': got one for a NeuralDenoiser whose network, MLP, takes none",
    ),
    "nobody": (partial(labelled, null_token=False), {}, "'context': got no context.*Pass context="),
    "validation": (
        labelled,
        {"context": C, "validation": X[:20]},
        "'validation': got data without a context.*Pass validation=",
    ),
    "training": (
        labelled,
        {"validation": {"x_0": X[:20], "context": C[:20]}},
        "'validation': got data with a context",
    ),
    "a label there": (
        labelled,
        {"context": C, "validation": {"x_0": X[:20], "context": C[:20] + 1}},
        "'validation'.*'context': got the value 2",
    ),
    "null alone": (labelled, {"null": NULL}, "'null': got .*beside context="),
    "null numbers": (labelled, {"context": C, "null": NULL.float()}, "torch.float32 for 120 data"),
    "null shape": (labelled, {"context": C, "null": NULL[:, None]}, "'null': got .*for 120 data"),
    "no token": (
        partial(labelled, null_token=False),
        {"context": C, "null": NULL},
        "without a null token.*null_token=True",
    ),
    "dropout without a token": (
        partial(labelled, null_token=False),
        {"context": C, "recipe": WITH_DROPOUT},
        "without a null token.*null_token=True",
    ),
    "dropout of nothing": (
        labelled,
        {"recipe": WITH_DROPOUT},
        "'context_dropout': got 0.1 for data without a context.*fit context=",
    ),
    "dropout of all": (
        labelled,
        {"context": C, "recipe": Recipe(context_dropout=1.0)},
        r"'context_dropout': got 1.0; expected a number in \[0, 1\)",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_before_training(name, monkeypatch):
    make, arguments, says = WRONG[name]
    if make is labelled or getattr(make, "keywords", {}) == {"null_token": False}:
        make = partial(make, num_classes=2)
    model = make()

    def begun(*_, **__):
        raise AssertionError("training has begun")

    monkeypatch.setattr(lightning.Trainer, "fit", begun)
    with pytest.raises(ValueError, match=says):
        fit(model, X, **SHORT | arguments)


def test_a_label_on_disk_is_looked_at_as_well(tmp_path):
    for name, array in (("x", X), ("c", TOO_LARGE)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    x, c = (np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in ("x", "c"))
    with pytest.raises(ValueError, match="'context': got the value 2"):
        fit(labelled(num_classes=2), x, context=c, **SHORT)
    np.save(tmp_path / "real.npy", NAN.numpy())
    c = np.load(tmp_path / "real.npy", mmap_mode="r")
    with pytest.raises(ValueError, match="'context': got 1 NaN"):
        fit(labelled(context_shape=(3,)), x, context=c, **SHORT)


def test_looking_at_the_context_draws_no_numbers():
    torch.manual_seed(5)
    state = torch.get_rng_state()
    diffusion = labelled(num_classes=2)
    torch.set_rng_state(state)
    fit(diffusion, X, context=C, **SHORT)
    assert torch.equal(torch.get_rng_state(), state)
