"""Parameters have names of their own: nothing is shared, frozen or lost between models."""

import copy
import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from copies import torch_saved, unpickled
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.nn import PyroModule, PyroParam, PyroSample
from torch import nn
from torch.distributions import constraints

from pyro_diffusion.denoisers import NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.likelihoods import GaussianLikelihood
from pyro_diffusion.networks import MLP
from pyro_diffusion.params import shared_copy
from pyro_diffusion.schedules import LogSNRSchedule

X = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))


def build(network=None, **keywords):
    network = MLP((2,), hidden_size=8, num_blocks=1) if network is None else network
    denoiser = NeuralDenoiser(network, LogSNRSchedule(3), (2,))
    return DiffusionModel(denoiser, GaussianLikelihood(0.5, learnable=True), **keywords)


def train(diffusion, steps=2, classic=True, pair=None):
    """Parameters before and after."""
    before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
    model, guide = pair or (diffusion.model, diffusion.guide)
    if classic:
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
        for _ in range(steps):
            svi.step(X)
    else:
        elbo = Trace_ELBO()(model, guide)
        optimiser = torch.optim.Adam(elbo.parameters(), lr=0.1)
        for _ in range(steps):
            optimiser.zero_grad()
            elbo(X).backward()
            optimiser.step()
    return before, dict(diffusion.named_parameters())


def moved(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def assert_trains(diffusion, **keywords):
    before, after = train(diffusion, **keywords)
    assert moved(before, after) == set(before)


@pytest.mark.parametrize("classic", [True, False])
def test_two_models_train_apart(classic):
    first, second = build(), build()
    frozen = copy.deepcopy(second.state_dict())
    assert_trains(first, classic=classic)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in frozen.items())
    trained = copy.deepcopy(first.state_dict())
    assert_trains(second, classic=classic)
    assert all(torch.equal(value, first.state_dict()[name]) for name, value in trained.items())


def _rebuilt(diffusion):
    other = build()
    other.load_state_dict(diffusion.state_dict())
    return other


@pytest.mark.parametrize("clone", [copy.deepcopy, unpickled, torch_saved, _rebuilt])
@pytest.mark.parametrize("classic", [True, False])
def test_copies_share_values_and_nothing_else(clone, classic):
    original = build()
    train(original)  # a trained model: Pyro has left its marks on the parameters
    other = clone(original)
    assert other.name != original.name
    for (name, ours), theirs in zip(original.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours is not theirs
    kept = copy.deepcopy(original.state_dict())
    assert_trains(other, classic=classic)
    assert all(torch.equal(value, original.state_dict()[name]) for name, value in kept.items())
    assert_trains(original, classic=classic)


def test_anunpickled_model_keeps_a_free_name():
    diffusion = build(name="keepsItsName")
    data = pickle.dumps(diffusion)
    from pyro_diffusion import params as store

    store._used_names.discard("keepsItsName")  # as in a process that never saw it
    assert pickle.loads(data).name == "keepsItsName"


def test_programs_of_one_model_share_its_parameters():
    diffusion = build()
    subsampled = diffusion.subsampled(1)
    for pair in (
        (diffusion.model, diffusion.guide),
        (diffusion.model, diffusion.posterior_guide),
        (subsampled.model, subsampled.guide),
    ):
        assert_trains(diffusion, pair=pair)
    names = {name.partition(".")[0] for name in pyro.get_param_store()}
    assert names == {diffusion.name}
    assert set(pyro.get_param_store()) == {
        f"{diffusion.name}.{path}" for path, _ in diffusion.named_parameters()
    }


def test_copied_programs_train_the_copied_model():
    diffusion = build()
    model, guide = copy.deepcopy((diffusion.model, diffusion.guide))
    kept = copy.deepcopy(diffusion.state_dict())
    assert_trains(model.owner, pair=(model, guide))
    assert all(torch.equal(value, diffusion.state_dict()[name]) for name, value in kept.items())


def test_names_can_be_given():
    diffusion = build(name="digits")
    train(diffusion)
    assert all(name.startswith("digits.") for name in pyro.get_param_store())
    with pytest.raises(ValueError, match="'name'.*'digits'.*name=None"):
        build(name="digits")
    pyro.clear_param_store()
    assert build(name="digits").name == "digits"


def test_a_cleared_store_is_filled_again():
    diffusion = build()
    train(diffusion)
    pyro.clear_param_store()
    assert_trains(diffusion)


def test_another_tensor_in_the_store_is_refused():
    diffusion = build()
    train(diffusion)
    state = {name: value.clone() for name, value in diffusion.state_dict().items()}
    diffusion.load_state_dict(state, assign=True)
    with pytest.raises(ValueError, match=r"another tensor.*clear_param_store"):
        train(diffusion)
    pyro.clear_param_store()
    assert_trains(diffusion)


def test_a_loaded_param_store_is_refused(tmp_path):
    diffusion = build()
    train(diffusion)
    pyro.get_param_store().save(tmp_path / "params")
    pyro.clear_param_store()
    pyro.get_param_store().load(tmp_path / "params")
    with pytest.raises(ValueError, match=r"another tensor.*clear_param_store"):
        train(diffusion)


def test_a_parameter_that_is_not_contiguous_is_trained():
    """The store holds the module's own tensor, and no contiguous copy of it."""
    diffusion = build()
    layer = diffusion.denoiser.network.encode
    layer.weight = nn.Parameter(layer.weight.detach().mT.contiguous().mT)
    weight = layer.weight
    before = weight.detach().clone()
    train(diffusion)
    assert layer.weight is weight
    assert not weight.is_contiguous()
    assert not torch.equal(weight, before)


def test_frozen_parameters_stay():
    diffusion = build()
    diffusion.denoiser.network.encode.requires_grad_(False)
    before, after = train(diffusion)
    assert moved(before, after) == {name for name in before if ".encode." not in name}


def test_moving_and_casting_keep_training(device):
    diffusion = build()
    train(diffusion)
    diffusion.to(device).double().float()
    before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
    svi = SVI(diffusion.model, diffusion.guide, pyro.optim.Adam({"lr": 0.1}), Trace_ELBO())
    svi.step(X.to(device))
    assert moved(before, dict(diffusion.named_parameters())) == set(before)


class ScaledNetwork(PyroModule):
    """A Pyro module inside the plain modules of the package, with a constrained parameter."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = PyroParam(torch.tensor(0.5), constraint=constraints.positive)

    def forward(self, x_t, log_snr):
        return self.scale * self.weight * self.layer(x_t)


@pytest.mark.parametrize("classic", [True, False])
def test_pyro_params_of_two_models_are_apart(classic):
    first, second = build(ScaledNetwork()), build(ScaledNetwork())
    assert_trains(first, classic=classic)
    assert second.denoiser.network.scale_unconstrained.item() == pytest.approx(
        torch.tensor(0.5).log().item()
    )
    assert_trains(second, classic=classic)
    assert not any(name in ("scale", "weight") for name in pyro.get_param_store())
    assert_trains(copy.deepcopy(first), classic=classic)
    assert_trains(unpickled(first), classic=classic)


class BayesianNetwork(PyroModule):
    def __init__(self):
        super().__init__()
        self.weight = PyroSample(dist.Normal(0.0, 1.0).expand([2, 2]).to_event(2))

    def forward(self, x_t, log_snr):
        return x_t @ self.weight


def test_a_pyro_sample_is_one_draw_for_all_data_and_steps():
    diffusion = build(BayesianNetwork())
    trace = pyro.poutine.trace(diffusion.model).get_trace(X)
    (name,) = (name for name in trace.nodes if name.endswith(".weight"))
    site = trace.nodes[name]
    assert site["value"].shape == (2, 2)
    assert site["cond_indep_stack"] == ()
    assert list(trace.nodes).index(name) < list(trace.nodes).index("x_3")
    again = pyro.poutine.trace(diffusion.model).get_trace(X)
    assert not torch.equal(site["value"], again.nodes[name]["value"])


def test_a_bayesian_denoiser_trains_with_a_guide_for_its_weights():
    diffusion = build(BayesianNetwork())
    chain = diffusion.posterior_guide
    weights = pyro.infer.autoguide.AutoNormal(
        pyro.poutine.block(diffusion.model, hide=list(diffusion.model.site_names))
    )

    def guide(x_0):
        weights(x_0)
        chain(x_0)

    svi = SVI(diffusion.model, guide, pyro.optim.Adam({"lr": 0.01}), Trace_ELBO())
    losses = [svi.step(X) for _ in range(5)]
    assert all(torch.tensor(losses).isfinite())


def test_module_local_params():
    """Pyro's other mode, with parameters kept out of the global store."""
    diffusion = build(ScaledNetwork())
    with pyro.settings.context(module_local_params=True):
        subsampled = diffusion.subsampled(1)
        elbo = TraceMeanField_ELBO()(subsampled.model, subsampled.guide)
        optimiser = torch.optim.Adam(elbo.parameters(), lr=0.1)
        before = {name: p.detach().clone() for name, p in diffusion.named_parameters()}
        for _ in range(8):
            optimiser.zero_grad()
            elbo(X).backward()
            optimiser.step()
        assert moved(before, dict(diffusion.named_parameters())) == set(before)


# copies that share


class Gain(nn.Module):
    """A user's module, with another constructor and one of everything that a module can hold."""

    def __init__(self, layer, *, gain):
        super().__init__()
        self.layer, self.label = layer, "first"
        self.gain = nn.Parameter(torch.tensor(gain))
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("passing", torch.zeros(2), persistent=False)


class Named(DiffusionModel):
    """A user's family, with another constructor."""

    def __init__(self, label):
        super().__init__(NeuralDenoiser(MLP((2,), hidden_size=8), LogSNRSchedule(3), (2,)))
        self.label = label


@pytest.mark.parametrize(
    "build", [lambda: Gain(nn.Linear(2, 2), gain=2.0), lambda: Named("mine"), build]
)
def test_a_shared_copy_has_the_same_tensors(build):
    module = build()
    twin = shared_copy(module)
    assert type(twin) is type(module)
    assert twin is not module
    for kind in ("named_parameters", "named_buffers", "named_children"):
        ours, theirs = (dict(getattr(m, kind)()) for m in (module, twin))
        assert ours.keys() == theirs.keys()
        assert all(ours[name] is theirs[name] for name in ours)
    assert twin.state_dict().keys() == module.state_dict().keys()
    assert getattr(twin, "label", None) == getattr(module, "label", None)


def test_what_is_assigned_to_a_shared_copy_stays_there():
    module = Gain(nn.Linear(2, 2), gain=2.0)
    attributes, keys = list(module.__dict__), list(module.state_dict())
    layer, gain, kept = module.layer, module.gain, module.kept
    twin = shared_copy(module)
    twin.label, twin.layer, twin.gain = "second", nn.Linear(3, 3), nn.Parameter(torch.tensor(5.0))
    twin.kept, twin.another = torch.zeros(2), nn.Linear(1, 1)
    twin.register_buffer("kept", torch.zeros(2), persistent=False)
    twin.register_buffer("passing", torch.zeros(2), persistent=True)
    pairs = ((module.layer, layer), (module.gain, gain), (module.kept, kept))
    assert all(ours is before for ours, before in pairs)
    assert module.label == "first"
    assert list(module.__dict__) == attributes
    assert list(module.state_dict()) == keys
    module.label = "third"
    assert twin.label == "second"


def test_a_shared_copy_is_trained_with_the_model_under_its_names():
    diffusion = build()
    twin = shared_copy(diffusion)
    assert twin.name == diffusion.name
    assert_trains(diffusion, pair=(twin.model, twin.guide))
    assert_trains(twin, pair=(diffusion.model, diffusion.guide))
    names = {f"{diffusion.name}.{path}" for path, _ in diffusion.named_parameters()}
    assert set(pyro.get_param_store()) == names


def test_a_users_family_is_put_on_another_grid():
    diffusion = Named("mine")
    other = diffusion.with_num_timesteps(7)
    assert (other.label, other.name) == ("mine", diffusion.name)
    assert (other.schedule.num_timesteps, diffusion.schedule.num_timesteps) == (7, 3)
    assert other.denoiser.network is diffusion.denoiser.network
    assert_trains(diffusion, pair=(other.model, other.guide))


# what is found once and kept


def stated(program, *args):
    """Names and tensors that a program states to Pyro."""
    trace = pyro.poutine.trace(program, param_only=True).get_trace(*args)
    return {name: site["value"] for name, site in trace.nodes.items() if site["type"] == "param"}


def test_statements_follow_what_is_swapped_frozen_or_renamed():
    """The paths of parameters are kept between runs, and found anew when anything has another place."""
    diffusion = build()
    program, denoiser = diffusion.model, diffusion.denoiser
    prefix = f"{diffusion.name}.denoiser.network"
    before = stated(program, X)
    assert set(before) == {f"{diffusion.name}.{name}" for name, _ in diffusion.named_parameters()}

    denoiser.network = MLP((2,), hidden_size=4, num_blocks=2)  # another submodule
    pyro.clear_param_store()
    after = stated(program, X)
    assert {n for n in after if n.startswith(prefix)} == {
        f"{prefix}.{name}" for name, _ in denoiser.network.named_parameters()
    }
    assert all(any(v is p for p in diffusion.parameters()) for v in after.values())

    denoiser.network.decode.bias = nn.Parameter(torch.zeros(2))  # another parameter in its place
    with pytest.raises(ValueError, match="another tensor"):
        stated(program, X)
    pyro.clear_param_store()
    assert stated(program, X)[f"{prefix}.decode.bias"] is denoiser.network.decode.bias

    denoiser.network.decode.bias.requires_grad_(False)
    assert f"{prefix}.decode.bias" not in stated(program, X)
    denoiser.network.decode.bias.requires_grad_(True)
    assert f"{prefix}.decode.bias" in stated(program, X)

    denoiser.network.decode.bias = None  # a parameter less
    assert f"{prefix}.decode.bias" not in stated(program, X)
    denoiser.network = ScaledNetwork()  # a Pyro module where none was
    pyro.clear_param_store()
    assert f"{prefix}.scale" in stated(program, X)


def test_a_shared_copy_and_a_deep_copy_find_their_own():
    diffusion = build()
    stated(diffusion.model, X)
    shared, deep = shared_copy(diffusion), copy.deepcopy(diffusion)
    shared.denoiser = shared.denoiser.with_schedule(shared.schedule.with_num_timesteps(4))
    assert stated(shared.model, X).keys() == stated(diffusion.model, X).keys()
    own = stated(deep.model, X)
    assert all(name.startswith(f"{deep.name}.") for name in own)
    assert all(any(value is p for p in deep.parameters()) for value in own.values())
