"""The Lightning adapter: a module around ELBO()(model, guide), and nothing of the engine's."""

import functools
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from oracles import log_normal
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from pyro_diffusion.bounds import elbo_terms
from pyro_diffusion.denoisers import GaussianDenoiser, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule

lightning = pytest.importorskip("lightning.pytorch")
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402

from pyro_diffusion.training import SVIModule, compile_elbo  # noqa: E402

ADAM = functools.partial(torch.optim.Adam, lr=1e-2)


def build(num_timesteps=8, **arguments):
    torch.manual_seed(0)
    network = MLP((2,), hidden_size=16, num_blocks=1)
    schedule = LogSNRSchedule(num_timesteps, learnable=True)
    return DiffusionModel(NeuralDenoiser(network, schedule, (2,)), **arguments)


def adapt(diffusion, **arguments):
    pair = diffusion.subsampled()
    return SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), ADAM, **arguments)


def data(n=64, batch_size=32):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x), batch_size=batch_size)


def trainer(folder, **arguments):
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu", "max_epochs": 3}
    return lightning.Trainer(default_root_dir=folder, **quiet | arguments)


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_the_loss_is_svis_per_datum():
    diffusion, x = build(), torch.randn(32, 2)
    module = adapt(diffusion)
    module.log = lambda *_, **__: None
    torch.manual_seed(2)
    loss = module.training_step([x], 0)
    pair = diffusion.subsampled()
    svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 0.0}), TraceMeanField_ELBO())
    torch.manual_seed(2)
    assert loss.item() == pytest.approx(svi.evaluate_loss(x) / 32, rel=1e-6)
    loss.backward()
    assert all(p.grad is not None for p in module.parameters())
    assert len(list(module.parameters())) == len(list(diffusion.parameters()))


def test_training_moves_the_model_itself_and_logs_the_bound(tmp_path):
    diffusion = build()
    before, module = weights(diffusion), adapt(diffusion)
    loader, engine = data(), trainer(tmp_path, max_epochs=4, check_val_every_n_epoch=2)
    engine.fit(module, loader, loader)
    assert not torch.equal(weights(diffusion), before)
    logged = engine.logged_metrics
    assert {"train_loss", "val_bits_per_dim", "val_elbo", "val_x_0", "val_x_8"} <= set(logged)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first = elbo_terms(
            diffusion.model,
            diffusion.posterior_guide,
            loader.dataset.tensors[0][:32],
            num_particles=1,
        ).elbo
        torch.manual_seed(1)
        second = elbo_terms(
            diffusion.model,
            diffusion.posterior_guide,
            loader.dataset.tensors[0][32:],
            num_particles=1,
        ).elbo
    bound = torch.cat([first, second])  # the same noise at every validation
    assert logged["val_elbo"].item() == pytest.approx(bound.mean().item(), rel=1e-5)
    assert logged["val_elbo_error"].item() == pytest.approx(bound.std().item() / 8, rel=1e-4)
    ends = {"val_x_0", "val_x_8"}
    blocks = [name for name in logged if name.startswith("val_x_") and name not in ends]
    assert blocks == ["val_x_1_to_x_2", "val_x_3_to_x_4", "val_x_5", "val_x_6", "val_x_7"]
    total = logged["val_x_0"] - sum(logged[name] for name in blocks) - logged["val_x_8"]
    assert total == pytest.approx(logged["val_elbo"].item(), rel=1e-4)
    expected = -logged["val_elbo"] / 2 / np.log(2)
    assert logged["val_bits_per_dim"].item() == pytest.approx(expected.item(), rel=1e-5)

    assert sorted(module.history) == [4, 8]  # steps: two batches an epoch
    x = loader.dataset.tensors[0]
    terms = elbo_terms(diffusion.model, diffusion.posterior_guide, x, num_particles=200)
    last = module.history[8]
    assert last.shape == (9,)
    assert abs(last[0] - terms.reconstruction.mean()) < 5
    assert engine.test(module, loader, verbose=False)[0]["test_elbo"] == pytest.approx(
        terms.mean().value, abs=5 * (64 * 200) ** 0.5 * terms.mean().monte_carlo_error / 64**0.5
    )


class SeedEveryStep(lightning.Callback):
    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        torch.manual_seed(trainer.global_step)


def test_a_run_can_be_resumed(tmp_path):
    """Four epochs at once, or two, a checkpoint and two: the same weights, schedule included."""
    whole = adapt(build())
    trainer(tmp_path, max_epochs=4, callbacks=[SeedEveryStep()]).fit(whole, data())
    first = trainer(tmp_path, max_epochs=2, callbacks=[SeedEveryStep()])
    first.fit(adapt(build()), data(), data())
    first.save_checkpoint(tmp_path / "last.ckpt")
    resumed = adapt(build())
    trainer(tmp_path, max_epochs=4, callbacks=[SeedEveryStep()]).fit(
        resumed, data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
    )
    torch.testing.assert_close(weights(resumed), weights(whole))
    assert sorted(resumed.history) == [2, 4]


def test_checkpoints_averages_and_loggers_are_lightnings(tmp_path):
    diffusion = build()
    average = EMAWeightAveraging(decay=0.9)
    keep = ModelCheckpoint(tmp_path, monitor="val_bits_per_dim", filename="best")
    engine = trainer(
        tmp_path,
        callbacks=[average, keep],
        enable_checkpointing=True,
        gradient_clip_val=1.0,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
    )
    module = adapt(diffusion)
    engine.fit(module, data(), data())
    checkpoint = torch.load(keep.best_model_path, weights_only=True)
    assert sorted(checkpoint["history"])[0] == 2
    assert "val_bits_per_dim" in (tmp_path / "lightning_logs/version_0/metrics.csv").read_text()
    other = build()
    pair = other.subsampled()
    loaded = SVIModule.load_from_checkpoint(
        keep.best_model_path,
        model=pair.model,
        guide=pair.guide,
        elbo=TraceMeanField_ELBO(),
        optimizer=ADAM,
        weights_only=True,
    )
    averaged = checkpoint["state_dict"]["elbo.model.owner.denoiser.network.decode.weight"]
    assert torch.equal(other.denoiser.network.decode.weight, averaged)
    current = checkpoint["current_model_state"]["elbo.model.owner.denoiser.network.decode.weight"]
    assert not torch.equal(averaged, current)
    assert loaded.history


def test_a_checkpoint_of_another_model_is_refused_and_nothing_overwritten(tmp_path):
    engine = trainer(tmp_path, max_epochs=1)
    engine.fit(adapt(build()), data())
    engine.save_checkpoint(tmp_path / "last.ckpt")
    for other in (build(num_timesteps=9), build(name="other")):
        if other.name == "other":
            other.denoiser.network = MLP((2,), hidden_size=8, num_blocks=1)
        before = weights(other)
        with pytest.raises(ValueError, match="'state_dict': got .*; expected"):
            trainer(tmp_path).fit(
                adapt(other), data(), ckpt_path=tmp_path / "last.ckpt", weights_only=True
            )
        assert torch.equal(weights(other), before)


class Incomplete(Dataset):
    """Data with a mask of observed entries, by name."""

    def __init__(self, x):
        self.x, self.mask = x, torch.rand(x.shape) < 0.7
        self.mask[:, 0] = True

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        return {"x_0": self.x[i], "mask": self.mask[i]}


def test_masks_come_with_the_batch(tmp_path):
    """The exact denoiser's bound on validation data is the marginal of what was observed."""
    schedule = LogSNRSchedule(5, log_snr_min=-30.0)
    exact = DiffusionModel(GaussianDenoiser(torch.zeros(3), torch.ones(3), schedule))
    exact.denoiser.unused = nn.Parameter(torch.zeros(()))
    dataset = Incomplete(torch.randn(20, 3))
    module = SVIModule(exact.model, exact.guide, Trace_ELBO(), ADAM)
    engine = trainer(tmp_path)
    result = engine.test(module, DataLoader(dataset, batch_size=7), verbose=False)[0]
    entries = log_normal(dataset.x.numpy(), 0.0, 1.0)
    expected = np.where(dataset.mask, entries, 0.0).sum() / 20
    assert result["test_elbo"] == pytest.approx(expected, rel=1e-4)


class VAE(PyroModule):
    """A plain Pyro model and guide, for which the adapter works as well."""

    def __init__(self):
        super().__init__()
        self.decode, self.encode = nn.Linear(1, 2), nn.Linear(2, 1)

    def model(self, x_0):
        with pyro.plate("data", len(x_0)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x_0), 1), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decode(z), 1.0).to_event(1), obs=x_0)

    def guide(self, x_0):
        with pyro.plate("data", len(x_0)):
            pyro.sample("z", dist.Normal(self.encode(x_0), 0.5).to_event(1))


def test_any_model_and_guide(tmp_path):
    vae = VAE()
    model, guide = PyroModule[nn.Module](), PyroModule[nn.Module]()
    model.vae = guide.vae = vae
    model.forward, guide.forward = vae.model, vae.guide
    module = SVIModule(model, guide, Trace_ELBO(), ADAM)
    engine = trainer(tmp_path, max_epochs=20)
    engine.fit(module, data(), data())
    first, *_, last = module.history.values()
    assert last.shape == (2,)
    assert last[0] - last[1] > first[0] - first[1]


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precision_is_lightnings(precision, tmp_path):
    diffusion = build()
    module = adapt(diffusion)
    x = torch.randn(64, 2).to(torch.float64 if "64" in precision else torch.float32)
    engine = trainer(
        tmp_path, precision=precision, gradient_clip_val=10.0, accumulate_grad_batches=2
    )
    engine.fit(module, DataLoader(TensorDataset(x), 32), DataLoader(TensorDataset(x), 32))
    assert torch.isfinite(engine.logged_metrics["val_elbo"])
    assert diffusion.schedule.log_snr_min.dtype == torch.float64


def test_a_nan_stops_training_with_step_and_site(tmp_path):
    diffusion = build()
    module = adapt(diffusion)

    class Spoil(lightning.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 3:
                with torch.no_grad():
                    diffusion.denoiser.network.decode.bias.fill_(float("nan"))

    with pytest.raises(ValueError, match=r"step 3: site 'x_\{t-1\}'.*NaN"):
        trainer(tmp_path, callbacks=[Spoil()]).fit(module, data())


def test_a_loss_that_is_not_finite_names_its_site(tmp_path):
    """A site whose density is zero for the data: nothing but the loss shows it."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc = nn.Parameter(torch.zeros(()))

        def forward(self, x_0):
            with pyro.plate("data", len(x_0)):
                z = pyro.sample("z", dist.Normal(self.loc, 1.0))
                pyro.sample("x", dist.Normal(z[:, None], 1e-30).to_event(1), obs=x_0)

    def guide(x_0):
        with pyro.plate("data", len(x_0)):
            pyro.sample("z", dist.Normal(0.0, 1.0))

    module = SVIModule(Model(), guide, Trace_ELBO(), ADAM)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(ValueError, match=r"step 0: site 'x': .*NaN or infinite.*clip"):
            trainer(tmp_path).fit(module, data())


def test_bad_arguments_are_refused_in_words():
    def nothing(x_0):
        pass

    with pytest.raises(ValueError, match="programs without parameters of their own"):
        SVIModule(nothing, nothing, Trace_ELBO(), ADAM)
    module = adapt(build())
    for batch, says in [
        ([torch.zeros(2, 2), torch.zeros(2)], "a list of 2"),
        ({"image": torch.zeros(2, 2)}, "a dict of 1"),
        (3, "a int"),
    ]:
        with pytest.raises(ValueError, match=f"'batch': got {says}; expected"):
            module.training_step(batch, 0)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_compiled_it_trains_as_the_programs_do(tmp_path, precision):
    results = []
    for elbo in (
        TraceMeanField_ELBO(),
        functools.partial(compile_elbo, elbo=TraceMeanField_ELBO(), backend=None),
    ):
        pyro.clear_param_store()
        pair = build().subsampled()
        module = SVIModule(pair.model, pair.guide, elbo, ADAM)
        torch.manual_seed(3)
        settings = {"precision": precision, "accumulate_grad_batches": 2, "gradient_clip_val": 5.0}
        trainer(tmp_path, **settings).fit(module, data(), data())
        results.append((weights(module), module.state_dict().keys()))
    ours, theirs = results
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-4, atol=1e-5)
    assert ours[1] == theirs[1]
