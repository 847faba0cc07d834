"""Compiled ELBOs: the same numbers as the programs that they were traced from."""

import copy
import shutil
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    JitTrace_ELBO,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
    config_enumerate,
)
from torch import nn

from pyro_diffusion import (
    MLP,
    BernoulliDiffusion,
    DiffusionModel,
    FreeBitsELBO,
    HierarchicalVAE,
    ImportanceTimesteps,
    KLWarmup,
    LearnedVariance,
    LevelPrediction,
    LogSNRSchedule,
    MinimumVarianceELBO,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    Standardize,
    compile_elbo,
)
from pyro_diffusion.chains import JointStrata

interpreted = partial(compile_elbo, backend=None)


def tiny(num_outputs=1, dropout=0.0):
    network = MLP((3,), hidden_size=8, num_blocks=1, num_outputs=num_outputs, dropout=dropout)
    nn.init.normal_(network.decode.weight)
    return network


def diffusion_model(num_timesteps=3, dropout=0.0, **arguments):
    schedule = LogSNRSchedule(num_timesteps, learnable=True)
    denoiser = NeuralDenoiser(tiny(dropout=dropout), schedule, event_shape=(3,), **arguments)
    return DiffusionModel(denoiser).double()


def programs():
    """Name, model, guide, ELBO and data: the package's programs."""
    torch.manual_seed(0)
    x_0 = torch.randn(5, 3, dtype=torch.float64)
    diffusion = diffusion_model()
    sub, continuous = diffusion.subsampled(2), diffusion.continuous()
    learned = NeuralDenoiser(
        tiny(2), LogSNRSchedule(4), event_shape=(3,), variance=LearnedVariance()
    )
    learned = DiffusionModel(learned, transform=Standardize(torch.ones(3), 2 * torch.ones(3)))
    levels = NeuralDenoiser(
        tiny(4), LogSNRSchedule(4), event_shape=(3,), prediction=LevelPrediction(4)
    )
    levels = DiffusionModel(levels).double().subsampled()
    bits = BernoulliDiffusion(NeuralBernoulliDenoiser(tiny(), LogSNRSchedule(4), (3,)))
    hvae = HierarchicalVAE((3,), latent_sizes=(2, 2)).double()
    pair = learned.subsampled()
    return {
        "forward": (diffusion.model, diffusion.guide, Trace_ELBO(), x_0),
        "posterior": (diffusion.model, diffusion.posterior_guide, TraceMeanField_ELBO(), x_0),
        "subsampled": (sub.model, sub.guide, TraceMeanField_ELBO(), x_0),
        "sampled": (sub.model, sub.guide, Trace_ELBO(num_particles=2), x_0),
        "vectorized": (
            diffusion.model,
            diffusion.posterior_guide,
            TraceMeanField_ELBO(num_particles=3, vectorize_particles=True, max_plate_nesting=1),
            x_0,
        ),
        "continuous": (continuous.model, continuous.guide, TraceMeanField_ELBO(), x_0),
        "transform": (pair.model, pair.guide, TraceMeanField_ELBO(), x_0.float()),
        "levels": (levels.model, levels.guide, TraceMeanField_ELBO(), torch.randint(4, (5, 3))),
        "bits": (
            bits.model,
            bits.posterior_guide,
            TraceMeanField_ELBO(),
            torch.randint(2, (5, 3)).float(),
        ),
        "hvae": (hvae.model, hvae.guide, Trace_ELBO(), x_0),
        "free_bits": (diffusion.model, diffusion.posterior_guide, FreeBitsELBO(0.5), x_0),
    }


def loss_and_grads(loss, x_0, seed, **given):
    """A loss and its gradients by name, with the noise of a seed."""
    loss.zero_grad()
    torch.manual_seed(seed)
    value = loss(x_0, **given)
    value.backward()
    named = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    return value.detach(), {name: grad.clone() for name, grad in named.items()}


def assert_same(ours, theirs, rtol=1e-10):
    torch.testing.assert_close(ours[0], theirs[0], rtol=rtol, atol=1e-12, check_dtype=False)
    assert ours[1].keys() == theirs[1].keys()
    for name, grad in theirs[1].items():
        scale = grad.abs().max().item() + 1e-12
        torch.testing.assert_close(ours[1][name], grad, rtol=rtol, atol=rtol * scale)


@pytest.mark.parametrize("name", list(programs()))
def test_the_graph_is_the_elbo(name):
    model, guide, elbo, x_0 = programs()[name]
    compiled = interpreted(model, guide, elbo)
    rtol = 1e-10 if x_0.dtype == torch.float64 or name == "levels" else 1e-5
    for seed in (1, 2):  # the first of them traces
        ours = loss_and_grads(compiled, x_0, seed)
        assert_same(ours, loss_and_grads(elbo(model, guide), x_0, seed), rtol)
    assert list(dict(compiled.named_parameters())) == list(
        dict(elbo(model, guide).named_parameters())
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_inductor_makes_the_same_numbers():
    denoiser = NeuralDenoiser(tiny(), LogSNRSchedule(4), event_shape=(3,))
    pair, x_0 = DiffusionModel(denoiser).double().subsampled(), torch.randn(5, 3).double()
    model, guide = pair.model, pair.guide
    elbo = Trace_ELBO()  # every draw is in it, so that none is optimised away
    compiled = compile_elbo(model, guide, elbo)
    for seed in (1, 2):
        ours = loss_and_grads(compiled, x_0, seed)
        assert_same(ours, loss_and_grads(elbo(model, guide), x_0, seed), 1e-8)


def test_draws_are_new_seeded_and_not_moved_by_tracing():
    model, guide, elbo, x_0 = programs()["subsampled"]
    compiled = interpreted(model, guide, elbo)
    torch.manual_seed(7)
    losses = [compiled(x_0).item() for _ in range(4)]
    assert len(set(losses)) == 4
    torch.manual_seed(7)
    assert losses == [compiled(x_0).item() for _ in range(4)]


def test_unbiased_over_draws():
    """The mean of compiled draws is the bound, of which the whole chain gives another estimate."""
    diffusion = diffusion_model()
    x_0 = torch.randn(100, 3, dtype=torch.float64)
    pair = diffusion.subsampled()
    compiled = interpreted(pair.model, pair.guide, TraceMeanField_ELBO())
    whole = TraceMeanField_ELBO()(diffusion.model, diffusion.posterior_guide)
    torch.manual_seed(1)
    with torch.no_grad():
        ours = torch.stack([compiled(x_0) for _ in range(300)])
        theirs = torch.stack([whole(x_0) for _ in range(60)])
    error = (ours.var() / len(ours) + theirs.var() / len(theirs)).sqrt()
    assert abs(ours.mean() - theirs.mean()) < 5 * error
    assert error < 0.02 * theirs.mean()


def test_without_gradients():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    with torch.no_grad():
        assert not compiled(x_0).requires_grad
    assert compiled(x_0).requires_grad


def test_gradients_accumulate_and_are_scaled():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    _, once = loss_and_grads(compiled, x_0, 1)
    compiled.zero_grad()
    for _ in range(2):
        torch.manual_seed(1)
        (compiled(x_0) / 5).backward()
    for name, p in compiled.named_parameters():
        torch.testing.assert_close(p.grad, once[name] * 2 / 5)


def test_retraced_for_what_a_graph_cannot_change():
    diffusion = diffusion_model(dropout=0.5)
    pair = diffusion.subsampled()
    elbo = TraceMeanField_ELBO()
    compiled = interpreted(pair.model, pair.guide, elbo)
    x_0 = torch.randn(6, 3, dtype=torch.float64)

    def agree(*args, **kwargs):
        ours = loss_and_grads(compiled, *args, **kwargs)
        assert_same(ours, loss_and_grads(elbo(pair.model, pair.guide), *args, **kwargs))

    agree(x_0, 1)
    agree(x_0[:4], 1)
    agree(x_0, 1, num_data=60)
    mask = torch.rand(6, 3) < 0.7
    mask[:, 0] = True
    agree(x_0, 1, mask=mask)
    diffusion.eval()
    agree(x_0, 1)
    diffusion.denoiser.network.decode.weight.requires_grad_(False)
    agree(x_0, 1)
    diffusion.denoiser.network.decode.weight.requires_grad_(True)
    agree(x_0, 1)
    diffusion.train()
    assert len(compiled._graphs) == 6
    agree(x_0, 2)
    assert len(compiled._graphs) == 6


def test_what_changes_in_place_reaches_the_graph():
    diffusion = diffusion_model(num_timesteps=20)
    timesteps = ImportanceTimesteps()
    pair = diffusion.subsampled(timesteps=timesteps)
    x_0 = torch.randn(6, 3, dtype=torch.float64)
    elbo = TraceMeanField_ELBO()
    compiled = interpreted(pair.model, pair.guide, elbo)
    before = loss_and_grads(compiled, x_0, 3)
    timesteps.observe(pair.model, pair.guide, x_0)
    state = diffusion.state_dict()
    state = {n: torch.randn_like(v) if n.endswith("weight") else v for n, v in state.items()}
    state["denoiser.schedule.log_range"] = torch.tensor(2.5)
    diffusion.load_state_dict(state)
    after = loss_and_grads(compiled, x_0, 3)
    assert abs(after[0] - before[0]) > 1
    assert_same(after, loss_and_grads(elbo(pair.model, pair.guide), x_0, 3))
    assert len(compiled._graphs) == 1


def test_joint_strata_reach_the_graph():
    pair = diffusion_model(num_timesteps=50).subsampled()
    x_0 = torch.randn(6, 3, dtype=torch.float64)
    elbo = TraceMeanField_ELBO()
    compiled = interpreted(pair.model, pair.guide, elbo)
    strata = JointStrata(rank=1, world_size=3, seed=0)
    for seed in range(4):
        strata.advance()
        with strata:
            ours = loss_and_grads(compiled, x_0, seed)
            assert_same(ours, loss_and_grads(elbo(pair.model, pair.guide), x_0, seed))
    assert len(compiled._graphs) == 1


def test_a_copy_is_a_model_of_its_own():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    loss_and_grads(compiled, x_0, 1)
    twin = copy.deepcopy(compiled)
    with torch.no_grad():
        for p in twin.parameters():
            p.add_(0.1)
    ours, theirs = loss_and_grads(compiled, x_0, 1), loss_and_grads(twin, x_0, 1)
    assert ours[0] != theirs[0]
    assert_same(theirs, loss_and_grads(elbo(twin.model, twin.guide), x_0, 1))


def test_mixed_precision():
    diffusion = diffusion_model().float()
    pair = diffusion.subsampled()
    x_0 = torch.randn(16, 3)
    compiled = interpreted(pair.model, pair.guide, TraceMeanField_ELBO())
    full = loss_and_grads(compiled, x_0, 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = loss_and_grads(compiled, x_0, 1)
        theirs = loss_and_grads(TraceMeanField_ELBO()(pair.model, pair.guide), x_0, 1)
    assert_same(ours, theirs, 1e-5)
    assert ours[0] != full[0]
    assert_same(loss_and_grads(compiled, x_0, 1), full)


class VAE(nn.Module):
    """As in Pyro's tutorial: methods that state modules by name."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = nn.Linear(6, 4), nn.Linear(2, 6)

    def model(self, x):
        pyro.module("decoder", self.decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x), 2), 1).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("encoder", self.encoder)
        with pyro.plate("data", len(x)):
            loc, log_scale = self.encoder(x).chunk(2, -1)
            pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


@pytest.mark.parametrize("elbo", [Trace_ELBO(), TraceMeanField_ELBO()])
def test_vae_of_pyros_tutorial(elbo):
    torch.manual_seed(0)
    vae, x = VAE(), (torch.rand(20, 6) < 0.5).float()
    compiled = interpreted(vae.model, vae.guide, elbo)
    compiled(x)
    names = [name for name, _ in compiled.named_parameters()]
    assert names == [
        "encoder$$$weight", "encoder$$$bias", "decoder$$$weight", "decoder$$$bias"
    ]  # fmt: skip
    assert set(names) == set(pyro.get_param_store().keys())
    value, grads = loss_and_grads(compiled, x, 3)
    vae.zero_grad()
    torch.manual_seed(3)
    assert elbo.loss_and_grads(vae.model, vae.guide, x) == pytest.approx(value.item(), rel=1e-6)
    torch.testing.assert_close(grads["encoder$$$weight"], vae.encoder.weight.grad)
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = compiled(x)
        loss.backward()
        optimizer.step()
    assert loss < value - 5


def eight_schools(data):
    y, sigma = data.unbind(1)
    eta = pyro.sample("eta", dist.Normal(torch.zeros(8), 1).to_event(1))
    mu = pyro.sample("mu", dist.Normal(torch.zeros(1), 10).to_event(1))
    tau = pyro.sample("tau", dist.HalfCauchy(25 * torch.ones(1)).to_event(1))
    pyro.sample("obs", dist.Normal(mu + tau * eta, sigma).to_event(1), obs=y)


def eight_schools_guide(data):
    positive = dist.constraints.positive
    for name, size in (("eta", 8), ("mu", 1), ("log_tau", 1)):
        loc = pyro.param(f"m_{name}", torch.zeros(size))
        scale = pyro.param(f"s_{name}", torch.ones(size), constraint=positive)
        q = dist.Normal(loc, scale)
        if name == "log_tau":
            q, name = dist.TransformedDistribution(q, dist.transforms.ExpTransform()), "tau"
        pyro.sample(name, q.to_event(1))


SCHOOLS = torch.tensor(
    [[28.0, 15], [8, 10], [-3, 16], [7, 11], [-1, 9], [1, 11], [18, 10], [12, 18]]
)


def posterior_of_mu():
    """Mean and standard deviation: given tau, the schools' results are Gaussian with the mean mu."""
    y, sigma = SCHOOLS.double().unbind(1)
    tau = torch.linspace(0.01, 200, 20_000, dtype=torch.float64)
    variance = sigma**2 + tau[:, None] ** 2
    precision = (1 / variance).sum(1) + 1 / 10**2
    mean = (y / variance).sum(1) / precision
    covariance = torch.diag_embed(variance) + 10**2
    evidence = dist.MultivariateNormal(torch.zeros(8).double(), covariance).log_prob(y)
    weight = (evidence + dist.HalfCauchy(25.0).log_prob(tau)).softmax(0)
    mu = (weight * mean).sum()
    return mu.item(), (weight * (1 / precision + mean**2)).sum().sub(mu**2).sqrt().item()


def test_eight_schools_of_functions_alone():
    torch.manual_seed(0)
    compiled = interpreted(eight_schools, eight_schools_guide, Trace_ELBO())
    assert list(compiled.parameters()) == []
    compiled(SCHOOLS)
    assert dict(compiled.named_parameters()).keys() == pyro.get_param_store().keys()
    value, grads = loss_and_grads(compiled, SCHOOLS, 3)
    compiled.zero_grad()
    torch.manual_seed(3)
    loss = Trace_ELBO().loss_and_grads(eight_schools, eight_schools_guide, SCHOOLS)
    assert loss == pytest.approx(value.item(), rel=1e-6)
    for name, p in compiled.named_parameters():
        torch.testing.assert_close(grads[name], p.grad)
    optimizer = torch.optim.Adam(compiled.parameters(), lr=0.03)
    for _ in range(1500):
        optimizer.zero_grad()
        compiled(SCHOOLS).backward()
        optimizer.step()
    mean, std = posterior_of_mu()
    assert abs(pyro.param("m_mu").item() - mean) < 0.3 * std
    assert 0.5 * std < pyro.param("s_mu").item() < 1.1 * std  # a product of factors is too narrow


def test_draws_that_are_not_reparameterised():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.3)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1), obs=x)

    def guide(x):
        logit = pyro.param("logit", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=logit.expand(len(x))))

    x = torch.randn(30)
    compiled = interpreted(model, guide, Trace_ELBO())
    compiled(x)
    ours = loss_and_grads(compiled, x, 1)
    pyro.param("logit").grad = None
    torch.manual_seed(1)
    loss = Trace_ELBO().loss_and_grads(model, guide, x)
    assert loss == pytest.approx(ours[0].item(), rel=1e-6)
    torch.testing.assert_close(ours[1]["logit"], pyro.param("logit").grad)


def _choose(z):
    return 2 * z if z.sum() > 0 else z


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_choose, "control flow that depends on a tensor's values.*torch.where"),
        (lambda z: z + float(z[0].detach()), "control flow that depends on a tensor's values"),
        (lambda z: z + sum(z.tolist()), "Tensor.tolist"),
        (lambda z: z + float(z.detach().numpy()[0]), "Tensor.numpy"),
        (lambda z: z + z[z > 0].sum(), "shape depends on a tensor's values"),
        (lambda z: z + z.nonzero().sum(), "shape depends on a tensor's values"),
    ],
)
def test_what_cannot_be_traced_is_refused(change, message):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1))
            pyro.sample("x", dist.Normal(change(z), 1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), 1))

    with pytest.raises(ValueError, match=message):
        interpreted(model, guide, Trace_ELBO())(torch.randn(5))


def test_a_program_that_is_another_each_time_is_refused():
    calls = []

    def model(x):
        calls.append(1)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1))
            pyro.sample("x", dist.Normal(z, len(calls)), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc.expand(len(x)), 1))

    with pytest.raises(ValueError, match="a graph that gives a loss of"):
        interpreted(model, guide, Trace_ELBO())(torch.randn(5))


def test_enumeration_is_refused():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(torch.full((len(x),), 0.3)))
            pyro.sample("x", dist.Normal(2 * z - 1, 1), obs=x)

    def guide(x):
        p = pyro.param("p", lambda: torch.tensor(0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(p.expand(len(x))))

    compiled = interpreted(model, config_enumerate(guide), Trace_ELBO())
    with pytest.warns(UserWarning, match="enumerate"), pytest.raises(ValueError, match="site 'z'"):
        compiled(torch.randn(5))


@pytest.mark.parametrize(
    "elbo",
    [
        TraceEnum_ELBO(),
        TraceGraph_ELBO(),
        RenyiELBO(num_particles=2),
        JitTrace_ELBO(),
        MinimumVarianceELBO([nn.Parameter(torch.zeros(()))]),
        Trace_ELBO,
    ],
)
def test_losses_with_steps_of_their_own_are_refused(elbo):
    model, guide, *_ = programs()["posterior"]
    with pytest.raises(ValueError, match="argument 'elbo': got"):
        compile_elbo(model, guide, elbo)


def test_handlers_around_a_call_are_refused():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    with pytest.raises(ValueError, match="got KLWarmup"), KLWarmup(0.5):
        compiled(x_0)
    scaled = interpreted(poutine.scale(model, 2.0), poutine.scale(guide, 2.0), elbo)
    torch.manual_seed(1)
    twice = scaled(x_0)
    torch.manual_seed(1)
    torch.testing.assert_close(twice, 2 * compiled(x_0))


def test_bad_data_raise_in_the_programs_own_words():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    with pytest.raises(ValueError, match="argument 'x_0': got 1 NaN"):
        compiled(torch.where(torch.arange(15).reshape(5, 3) == 7, torch.nan, x_0))


def test_running_means_are_moved_once():
    class Normalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(1)

        def model(self, x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1))
                pyro.sample("x", dist.Normal(z, 1), obs=x)

        def guide(self, x):
            pyro.module("norm", self.norm)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(self.norm(x[:, None])[:, 0], 1))

    x, stock, ours = torch.randn(20) + 3, Normalised(), Normalised()
    Trace_ELBO().differentiable_loss(stock.model, stock.guide, x)
    pyro.clear_param_store()
    interpreted(ours.model, ours.guide, Trace_ELBO())(x)
    torch.testing.assert_close(ours.norm.running_mean, stock.norm.running_mean)
    assert ours.norm.num_batches_tracked == 1


def test_what_is_no_argument_of_a_graph_is_said():
    model, guide, elbo, x_0 = programs()["posterior"]
    with pytest.raises(ValueError, match="got a ndarray; expected tensors"):
        interpreted(model, guide, elbo)(x_0.numpy())
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with pytest.raises(ValueError, match="without parameters that require gradients"):
        interpreted(model, guide, elbo)(x_0)


def pair_of(change):
    """A model whose guide's mean is what a function makes of the datum, both as plain functions."""

    def model(x, y=None):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(len(x)), 1))
            pyro.sample("x", dist.Normal(z, 1), obs=x if y is None else y)

    def guide(x, y=None):
        loc = pyro.param("loc", lambda: torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc + change(x), 1))

    return model, guide


def stock(pair, *args):
    torch.manual_seed(1)
    return Trace_ELBO().loss(*pair, *args)


def ours(compiled, *args):
    torch.manual_seed(1)
    return compiled(*args).item()


def test_one_tensor_twice_and_other_strides_are_other_graphs():
    pair, x, y = pair_of(lambda x: x), torch.randn(5), torch.randn(5)
    compiled = interpreted(*pair, Trace_ELBO())
    compiled(x, x)
    assert ours(compiled, x, y) == pytest.approx(stock(pair, x, y), rel=1e-5)
    compiled(torch.randn(10)[::2])
    assert ours(compiled, x) == pytest.approx(stock(pair, x), rel=1e-5)


def test_gradients_that_would_be_lost_are_refused_or_there():
    network, x = nn.Linear(1, 1), torch.randn(5)
    compiled = interpreted(*pair_of(lambda x: network(x[:, None])[:, 0]), Trace_ELBO())
    compiled(x).backward()  # the network is stated nowhere
    assert network.weight.grad is not None
    with pytest.raises(ValueError, match="a tensor that requires a gradient"):
        compiled(x.requires_grad_())


def test_modes_of_modules_that_only_the_functions_know():
    network, x = nn.Dropout(0.5), torch.randn(50)
    pair = pair_of(network)
    compiled = interpreted(*pair, Trace_ELBO())
    compiled(x)
    network.eval()
    assert ours(compiled, x) == pytest.approx(stock(pair, x), rel=1e-5)


def test_handlers_of_one_address_are_told_apart():
    pair = diffusion_model(num_timesteps=50).subsampled()
    x_0 = torch.randn(6, 3, dtype=torch.float64)
    compiled = interpreted(pair.model, pair.guide, TraceMeanField_ELBO())
    for seed in range(3):  # each dies, and the next may stand where it stood
        with JointStrata(rank=seed, world_size=4, seed=seed):
            torch.manual_seed(1)
            value = compiled(x_0)
        with JointStrata(rank=seed, world_size=4, seed=seed):
            torch.manual_seed(1)
            expected = TraceMeanField_ELBO()(pair.model, pair.guide)(x_0)
        torch.testing.assert_close(value, expected, check_dtype=False)


def test_a_parameter_that_one_operation_takes_twice():
    """Of w² the gradient is 2w times the slope, and not twice that: the leaf w is found once."""
    w, x = nn.Parameter(torch.tensor(0.5)), torch.randn(10)
    pair = pair_of(lambda x: w * w * x)
    grads = []
    for loss in (interpreted(*pair, Trace_ELBO()), Trace_ELBO()(*pair)):
        torch.manual_seed(1)
        grads += torch.autograd.grad(loss(x), w)
    torch.testing.assert_close(*grads)


def test_replaced_buffers_are_other_graphs_and_refused_inside():
    class Shift(nn.Module):
        def __init__(self, replaces):
            super().__init__()
            self.register_buffer("shift", torch.zeros(()))
            self.replaces = replaces

        def forward(self, x):
            if self.replaces:
                self.shift = 0.9 * self.shift + 0.1
            return x + self.shift

    x, shift = torch.randn(5), Shift(replaces=False)
    pair = pair_of(shift)
    compiled = interpreted(*pair, Trace_ELBO())
    compiled(x)
    shift.shift = torch.tensor(5.0)
    assert ours(compiled, x) == pytest.approx(stock(pair, x), rel=1e-5)
    with pytest.raises(ValueError, match="buffer 'shift' of a Shift.*in place"):
        interpreted(*pair_of(Shift(replaces=True)), Trace_ELBO())(x)


def test_a_first_call_in_inference_mode():
    model, guide, elbo, x_0 = programs()["posterior"]
    compiled = interpreted(model, guide, elbo)
    with torch.inference_mode():
        torch.manual_seed(1)
        value = compiled(x_0.clone())
    assert_same(loss_and_grads(compiled, x_0, 1), loss_and_grads(elbo(model, guide), x_0, 1))
    torch.manual_seed(1)
    torch.testing.assert_close(value, compiled(x_0).detach())


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_machine_code_follows_parameters_in_place_and_leaves_out_dead_draws():
    """What trains in place reaches the code; another tensor makes another graph; the terms are the ELBO's."""
    network = nn.Linear(2, 2)

    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
            pyro.sample("x", dist.Normal(network(x), 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(network.bias, 1.0).to_event(1))

    x, elbo = torch.randn(5, 2), TraceMeanField_ELBO()  # no draw is in this bound
    compiled, stock = compile_elbo(model, guide, elbo), elbo(model, guide)

    def agree():
        torch.manual_seed(0)
        before = torch.get_rng_state()
        network.zero_grad()
        compiled(x).backward()
        ours = [p.grad.clone() for p in network.parameters()]
        assert torch.equal(torch.get_rng_state(), before)  # dead draws are not drawn
        network.zero_grad()
        stock(x).backward()
        for grad, p in zip(ours, network.parameters(), strict=True):
            torch.testing.assert_close(grad, p.grad)

    agree()
    with torch.no_grad():
        network.weight.mul_(2)
    network.bias.data.add_(1)
    agree()
    assert len(compiled._graphs) == 1
    network.bias = nn.Parameter(torch.zeros(2))
    agree()
    assert len(compiled._graphs) == 2


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # torch's own
def test_machine_code_moves_buffers_and_has_the_casts_of_its_first_call():
    network = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    twin = copy.deepcopy(network)

    def programs_of(network):
        def guide(x):
            loc = network(x)
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Normal(loc, 1.0).to_event(1))

        def model(x):
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
                pyro.sample("x", dist.Normal(z, 1.0).to_event(1), obs=x)

        return model, guide

    x, compiled = torch.randn(8, 2), compile_elbo(*programs_of(network), Trace_ELBO())
    stock = Trace_ELBO()(*programs_of(twin))
    for seed in (1, 2):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            torch.manual_seed(seed)
            ours = compiled(x)
            torch.manual_seed(seed)
            theirs = stock(x)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
    for ours, theirs in zip(network.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_gradients_that_share_memory_are_copied():
    """A gradient is handed over as it is only if no other tensor has its memory."""
    a, b, x = nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5)), torch.randn(5)
    compiled = interpreted(*pair_of(lambda x: a + b + x), Trace_ELBO())
    compiled(x).backward()
    expected = a.grad.clone()
    a.grad.zero_()
    torch.testing.assert_close(b.grad, expected)
    torch.manual_seed(3)
    one = torch.autograd.grad(compiled(x), [a, b])
    a.grad = b.grad = None
    torch.manual_seed(3)
    twice = compiled(x)
    twice.backward(retain_graph=True)
    a.grad.mul_(5)  # what was handed over is the caller's
    twice.backward()
    torch.testing.assert_close(a.grad, 6 * one[0])
    torch.testing.assert_close(b.grad, 2 * one[1])


class Two(nn.Module):
    """Two parameters in two places."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(1.0)), nn.Parameter(torch.tensor(3.0))

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z + self.a + 10 * self.b, 1.0), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.a.expand(len(x)), 1.0))


def test_parameters_that_change_places_or_are_tied_make_another_graph():
    two, x = Two(), torch.randn(8)
    loss = interpreted(two.model, two.guide, TraceMeanField_ELBO())

    def agree():
        values = []
        for call in (
            lambda: loss(x).item(),
            lambda: TraceMeanField_ELBO().loss(two.model, two.guide, x),
        ):
            torch.manual_seed(0)
            values.append(call())
        assert values[0] == pytest.approx(values[1], rel=1e-5)
        return values[0]

    first = agree()
    two.a, two.b = two.b, two.a
    swapped = agree()
    two.b = two.a
    assert len({first, swapped, agree()}) == 3


# ------------------------------------------------------------------ with a context


def contexts():
    """Networks with a context and a null token, and contexts of five data."""
    torch.manual_seed(0)
    labels, numbers = torch.randint(3, (5,)), torch.randn(5, 2, dtype=torch.float64)

    class Tree(nn.Module):
        def __init__(self):
            super().__init__()
            self.label = MLP((3,), hidden_size=8, num_blocks=1, num_classes=3, null_token=True)
            self.number = MLP(
                (3,), hidden_size=8, num_blocks=1, context_shape=(2,), null_token=True
            )

        def forward(self, x_t, log_snr, context, null=None):
            label, more = context["label"], context["more"][0]
            return self.label(x_t, log_snr, label, null) + self.number(x_t, log_snr, more, null)

    settings = {"hidden_size": 8, "num_blocks": 1, "null_token": True}
    return {
        "labels": (MLP((3,), num_classes=3, **settings), labels),
        "numbers": (MLP((3,), context_shape=(2,), **settings), numbers),
        "tree": (Tree(), {"label": labels, "more": (numbers,)}),
    }


def conditional_pair(network):
    for name, parameter in network.named_parameters():
        if "decode" in name or name.endswith("null"):
            nn.init.normal_(parameter)
    denoiser = NeuralDenoiser(network, LogSNRSchedule(4), event_shape=(3,))
    return DiffusionModel(denoiser).double().subsampled()


@pytest.mark.parametrize(
    ("name", "null"),
    [
        ("labels", None),
        ("labels", torch.tensor([True, False, True, False, False])),
        ("numbers", None),
        ("tree", torch.tensor([False, False, True, False, True])),
    ],
)
def test_the_graph_takes_a_context(name, null):
    """Also in other rows than those of the trace, and in other dropped rows; by name and by position."""
    network, context = contexts()[name]
    pair, x_0 = conditional_pair(network), torch.randn(5, 3, dtype=torch.float64)
    compiled = interpreted(pair.model, pair.guide, TraceMeanField_ELBO())
    programs = TraceMeanField_ELBO()(pair.model, pair.guide)
    losses = []
    for turn in range(3):
        rows = torch.arange(5).roll(turn)
        x, c = x_0[rows], torch.utils._pytree.tree_map(lambda part, rows=rows: part[rows], context)
        given = {} if null is None else {"null": null.roll(turn // 2)}
        programs.zero_grad()
        torch.manual_seed(turn)
        value = programs(x, c, **given)
        value.backward()
        named = {n: p.grad for n, p in programs.named_parameters() if p.grad is not None}
        theirs = value.detach(), {n: grad.clone() for n, grad in named.items()}
        assert_same(loss_and_grads(compiled, x, turn, context=c, **given), theirs)
        torch.manual_seed(turn)
        assert compiled(x, c, **given).item() == pytest.approx(value.item(), rel=1e-10)
        torch.manual_seed(turn)
        assert compiled(x_0=x, context=c, **given).item() == pytest.approx(value.item(), rel=1e-10)
        losses.append(value.item())
    assert len(compiled._graphs) == 1
    assert len(set(losses)) == 3


def test_dropped_rows_change_the_loss_of_a_graph_and_none_is_another_graph():
    network, context = contexts()["labels"]
    pair, x_0 = conditional_pair(network), torch.randn(5, 3, dtype=torch.float64)
    compiled = interpreted(pair.model, pair.guide, TraceMeanField_ELBO())
    found = []
    for given in (
        {"context": context, "null": torch.zeros(5).bool()},
        {"context": context, "null": torch.ones(5).bool()},
        {},
        {"context": None},
    ):
        torch.manual_seed(0)
        found.append(compiled(x_0, **given).item())
    assert found[1] == pytest.approx(found[2], rel=1e-10)
    assert found[2] == found[3]
    assert found[0] != pytest.approx(found[1], rel=1e-3)
    assert len(compiled._graphs) == 2
