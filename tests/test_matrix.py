"""Every ELBO with every pair, any number of particles, under every handler: legal, or refused in words.

After Pyro's own ``tests/infer/test_valid_models.py``.
"""

import warnings

import pyro
import pytest
import torch
from pyro import poutine
from pyro.infer import (
    SVI,
    RenyiELBO,
    Trace_ELBO,
    TraceEnum_ELBO,
    TraceGraph_ELBO,
    TraceMeanField_ELBO,
)
from pyro.optim import Adam

from pyro_diffusion.denoisers import LearnedVariance, LevelPrediction, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import PoissonLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.schedules import LogSNRSchedule

ELBOS = [Trace_ELBO, TraceGraph_ELBO, TraceEnum_ELBO, RenyiELBO, TraceMeanField_ELBO]
PAIRS = ["guide", "posterior_guide", "subsampled"]
PARTICLES = {
    "one": {},
    "three": {"num_particles": 3},
    "three at once": {"num_particles": 3, "vectorize_particles": True},
}


def family(kind="neural", num_timesteps=4):
    arguments, outputs, likelihood = {}, 1, None
    if kind == "levels":
        arguments, outputs = {"prediction": LevelPrediction(5)}, 5
    elif kind == "counts":
        arguments, outputs, likelihood = {"variance": LearnedVariance()}, 2, PoissonLikelihood(9)
    network = MLP((3,), hidden_size=8, num_blocks=1, num_outputs=outputs)
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=3.0, learnable=True)
    return DiffusionModel(NeuralDenoiser(network, schedule, (3,), **arguments), likelihood)


def programs(diffusion, pair):
    if pair == "subsampled":
        pair = diffusion.subsampled(2)
        return pair.model, pair.guide
    return diffusion.model, getattr(diffusion, pair)


def data(kind):
    return torch.randn(6, 3) if kind == "neural" else torch.randint(0, 5, (6, 3))


def settings(particles, pair):
    nesting = 2 if pair == "subsampled" else 1
    return PARTICLES[particles] | {"max_plate_nesting": nesting}


def illegal(elbo, pair):
    return elbo is TraceMeanField_ELBO and pair == "guide"


@pytest.fixture(autouse=True)
def _quiet_about_order():
    """Pyro warns of the guide's order before the package's error, and where nothing is enumerated."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s)Failed to verify mean field")
        warnings.filterwarnings("ignore", message="(?s)TraceEnum_ELBO found no sample sites")
        yield


@pytest.mark.parametrize("kind", ["neural", "levels", "counts"])
@pytest.mark.parametrize("particles", PARTICLES)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("elbo", ELBOS, ids=lambda e: e.__name__)
def test_elbos(elbo, pair, particles, kind):
    """Loss, gradients and an SVI step; all parameters are reached, the schedule's ends included."""
    diffusion, x_0 = family(kind), data(kind)
    model, guide = programs(diffusion, pair)
    objective = elbo(**settings(particles, pair))
    if elbo is RenyiELBO and pair == "subsampled":
        pytest.skip("an average of exponentials wants every term of the bound in each particle")
    if illegal(elbo, pair):
        for call in (objective.loss, objective.loss_and_grads):
            with pytest.raises(ValueError, match="posterior_guide"):
                call(model, guide, x_0)
        return
    assert torch.isfinite(torch.as_tensor(objective.loss(model, guide, x_0)))
    svi = SVI(model, guide, Adam({"lr": 0.01}), objective)
    before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
    for _ in range(3):
        svi.step(x_0)
    still = [name for name, p in diffusion.named_parameters() if torch.equal(p, before[name])]
    assert not still
    if elbo not in (RenyiELBO, TraceGraph_ELBO):  # those have no differentiable loss in Pyro
        module = objective(model, guide)
        module(x_0).backward()
        assert all(p.grad is not None for p in module.parameters())


def scaled(factor):
    return lambda program: poutine.scale(program, scale=factor)


HANDLERS = {
    "scale": (scaled(0.25), lambda loss: 0.25 * loss),
    "mask": (lambda program: poutine.mask(program, mask=False), lambda loss: 0.0),
    "mask of data": (
        lambda program: poutine.mask(program, mask=torch.tensor([True, False] * 3)), None
    ),
    "seed": (lambda program: poutine.seed(program, rng_seed=0), None),
    "block nothing": (lambda program: poutine.block(program, hide=[]), lambda loss: loss),
    "infer config": (
        lambda program: poutine.infer_config(program, config_fn=lambda site: {}), lambda loss: loss
    ),
    "enumerate": (lambda program: pyro.infer.config_enumerate(program), lambda loss: loss),
}  # fmt: skip


@pytest.mark.parametrize("particles", ["one", "three at once"])
@pytest.mark.parametrize("handler", HANDLERS)
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("elbo", [Trace_ELBO, TraceMeanField_ELBO], ids=lambda e: e.__name__)
def test_handlers(elbo, pair, handler, particles):
    """A handler around both programs does to the loss what it says."""
    diffusion, x_0 = family(), torch.randn(6, 3)
    model, guide = programs(diffusion, pair)
    wrap, effect = HANDLERS[handler]
    objective = elbo(**settings(particles, pair))
    if illegal(elbo, pair):
        if handler != "mask":  # where everything is masked there is no KL to ask for
            with pytest.raises(ValueError, match="posterior_guide"):
                objective.loss(wrap(model), wrap(guide), x_0)
        return
    pyro.set_rng_seed(1)
    plain = objective.loss(model, guide, x_0)
    pyro.set_rng_seed(1)
    wrapped = objective.loss(wrap(model), wrap(guide), x_0)
    if effect is None:
        assert torch.isfinite(torch.as_tensor(wrapped))
    else:
        assert wrapped == pytest.approx(effect(plain), rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("pair", ["guide", "posterior_guide"])
def test_masking_data_is_leaving_them_out(pair):
    """poutine.mask over the plate: the bound of the rows that are left, on the same draws."""
    diffusion, x_0 = family(), torch.randn(6, 3)
    model, guide = programs(diffusion, pair)
    keep = torch.tensor([True, False, True, True, False, True])
    torch.manual_seed(0)
    masked = Trace_ELBO().loss(poutine.mask(model, mask=keep), poutine.mask(guide, mask=keep), x_0)
    torch.manual_seed(0)
    trace = poutine.trace(guide).get_trace(x_0)
    replayed = poutine.trace(poutine.replay(model, trace=trace)).get_trace(x_0)
    trace.compute_log_prob()
    replayed.compute_log_prob()
    latents = diffusion.model.site_names[1:]
    log_q = sum(trace.nodes[name]["log_prob"] for name in latents)
    log_p = sum(replayed.nodes[name]["log_prob"] for name in (*latents, "x_0"))
    assert masked == pytest.approx((log_q - log_p)[keep].sum().item(), rel=1e-5)


@pytest.mark.parametrize("pair", ["guide", "posterior_guide"])
def test_conditioning_is_observing(pair):
    """The model run without data and conditioned on them has the bound of the model run on them."""
    diffusion, x_0 = family(), torch.randn(6, 3)
    model, guide = programs(diffusion, pair)
    conditioned = poutine.condition(lambda x_0: model(num_samples=6), data={"x_0": x_0})
    losses = []
    for program in (model, conditioned):
        torch.manual_seed(0)
        losses.append(Trace_ELBO().loss(program, guide, x_0))
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_sites_that_do_not_match_are_noticed():
    """Pyro's own checks see the programs' sites."""
    diffusion, other, x_0 = family(), family(num_timesteps=3), torch.randn(6, 3)
    with pytest.warns(
        UserWarning, match="Found non-auxiliary vars in guide but not model|model but not"
    ):
        Trace_ELBO().loss(other.model, diffusion.posterior_guide, x_0)
