"""The forms in which a user passes a context: each is taken, or refused with an error in four beats."""

import re
from collections import namedtuple

import numpy as np
import pandas as pd
import pyro
import pytest
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.optim import Adam
from torch import nn

from pyro_diffusion import (
    MLP,
    AncestralSampler,
    DiffusionModel,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    Guidance,
    HierarchicalVAE,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralDenoiser,
    ODESampler,
    bound_by_datum,
    elbo_terms,
    evaluate_bound,
    fit,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
    to_arviz,
)
from pyro_diffusion.diagnostics import simulation_based_calibration
from pyro_diffusion.samplers.guidance import GuidedDenoiser
from pyro_diffusion.training import columns

Conditions = namedtuple("Conditions", ["label", "numbers"])
LABELS = torch.arange(12) % 4


def diffusion(schedule=None, **context):
    schedule = LogSNRSchedule(6) if schedule is None else schedule
    network = MLP((2,), hidden_size=8, num_blocks=1, **context)
    nn.init.normal_(
        network.decode.weight, std=0.3
    )  # zero at first: no output would depend on a context
    return DiffusionModel(NeuralDenoiser(network, schedule, (2,)))


def of_labels(**settings):
    return diffusion(num_classes=4, null_token=True, **settings)


def bound(model, x_0, **given):
    pyro.set_rng_seed(3)
    return elbo_terms(model, x_0, num_particles=2, **given).elbo


def beats(message):
    assert re.search(r"got .*; expected .*\. \S", message, re.DOTALL), message
    return message


@pytest.fixture
def data():
    return torch.randn(12, 2), torch.randn(12, 3)


@pytest.mark.parametrize("form", ["array", "read-only", "table", "list", "float64"])
def test_numbers_in_any_container_are_the_same_context(form, data):
    x_0, c = data
    locked = c.numpy().copy()
    locked.flags.writeable = False
    forms = {
        "array": c.numpy(), "read-only": locked, "table": pd.DataFrame(c.numpy()),
        "list": c.tolist(), "float64": c.double(),
    }  # fmt: skip
    model = diffusion(context_shape=(3,))
    torch.testing.assert_close(bound(model, x_0, context=forms[form]), bound(model, x_0, context=c))


def test_a_run_of_fit_takes_a_table(data):
    x_0, c = data
    model = diffusion(context_shape=(3,))
    assert fit(model, x_0, context=pd.DataFrame(c.numpy()), max_steps=1).ended == "all steps taken"


class OfConditions(nn.Module):
    """A network whose context is a named tuple."""

    def __init__(self):
        super().__init__()
        self.network = MLP((2,), hidden_size=8, num_blocks=1, context_shape=(3,))

    def forward(self, x_t, log_snr, context):
        return self.network(x_t, log_snr, context.numbers + context.label[:, None])


def test_a_named_tuple_keeps_its_names(data):
    x_0, c = data
    model = DiffusionModel(NeuralDenoiser(OfConditions(), LogSNRSchedule(6), (2,)))
    context = Conditions(LABELS.numpy(), c)
    assert bound(model, x_0, context=context).isfinite().all()
    assert fit(model, x_0, context=context, max_steps=1).ended == "all steps taken"
    found = columns.columns(x_0, torch.device("cpu"), context=context)["context"]
    assert isinstance(found, Conditions)
    assert torch.equal(found.label, LABELS)


def test_a_list_or_an_array_of_dropped_rows(data):
    x_0, _ = data
    model, null = of_labels(), LABELS == 2
    exact = bound(model, x_0, context=LABELS, null=null)
    assert not torch.allclose(exact, bound(model, x_0, context=LABELS))
    for form in (null.tolist(), null.numpy()):
        torch.testing.assert_close(bound(model, x_0, context=LABELS, null=form), exact)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"context": {"a": LABELS, "b": None}}, "None in a tuple or a dictionary"),
        ({"context": [LABELS, LABELS]}, "a list of 2 tensors"),
        ({"context": LABELS, "null": LABELS}, "torch.int64 for 12 data"),
        ({"context": np.array(["red"] * 12)}, "numpy.str_"),
        ({"context": pd.Series(["red"] * 12)}, "expected numbers"),
    ],
)
def test_other_forms_are_refused_in_words(given, words, data):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        bound(of_labels(), data[0], **given)
    beats(str(error.value))


READERS = {
    "elbo_terms": lambda model, x_0, c: elbo_terms(model, x_0, num_particles=2, context=c),
    "evaluate_bound": lambda model, x_0, c: evaluate_bound(
        model, x_0, standard_error=1.0, context=c
    ),
    "importance": lambda model, x_0, c: importance_evidence(model, x_0, num_particles=2, context=c),
    "smc": lambda model, x_0, c: smc_evidence(model, x_0, num_particles=25, context=c),
    "ode": lambda model, x_0, c: ode_log_likelihood(model, x_0, context=c),
    "arviz": lambda model, x_0, c: to_arviz(model, x_0, context=c),
}


class OwnEmbedding(nn.Module):
    """A network of the user's, which looks a label up and checks nothing."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 2)

    def forward(self, x_t, log_snr, context):
        return x_t + self.embed(context)


@pytest.mark.parametrize("reader", READERS)
def test_a_label_that_does_not_exist_in_the_first_row(reader, data):
    """A reader measures its memory with the first row, before any value is checked."""
    labels = torch.where(torch.arange(12) == 0, 4, LABELS)
    with pytest.raises(ValueError, match=r"got the value 4; expected a whole number 0 … 3"):
        READERS[reader](of_labels(), data[0], labels)


def test_a_label_outside_of_a_users_own_table_is_the_tables_error(data):
    own = DiffusionModel(NeuralDenoiser(OwnEmbedding(), LogSNRSchedule(6), (2,)))
    with pytest.raises(
        IndexError, match="index out of range"
    ):  # and the run's, not the measurement's
        elbo_terms(own, data[0], context=LABELS + 1)


def test_a_hierarchy_refuses_a_label_that_does_not_exist(data):
    vae = HierarchicalVAE((2,), (3, 2), hidden_size=8, num_classes=4)
    with pytest.raises(ValueError, match="got the value 4"):
        elbo_terms(vae, data[0], context=LABELS.flip(0) + 1)


@pytest.mark.parametrize("kind", ["diffusion", "hierarchy"])
def test_rows_that_do_not_fit_the_plate_of_the_caller(kind):
    vae = HierarchicalVAE((2,), (3, 2), hidden_size=8, num_classes=4)
    model = of_labels().model if kind == "diffusion" else vae.model
    with pyro.plate("rows", 12), pytest.raises(ValueError, match="got 5 rows for states") as error:
        model(context=LABELS[:5], plate=False)
    beats(str(error.value))
    with pyro.plate("rows", 12):
        for context in (LABELS, LABELS[:1], 2):
            assert model(context=context, plate=False).shape == (12, 2)


def test_a_context_in_the_plate_of_the_caller_is_checked(data):
    _, c = data
    model, gap = diffusion(context_shape=(3,), null_token=True).model, c.clone()
    gap[4] = torch.nan
    null = gap.isnan().any(-1)
    with pyro.plate("rows", 12):
        with pytest.raises(ValueError, match="'context': got 3 NaN or infinite values"):
            model(context=gap, plate=False)
        with pytest.raises(ValueError, match="'null': got a Tensor of shape"):
            model(context=c, null=null[:5], plate=False)
        assert model(context=gap, null=null, plate=False).isfinite().all()


def test_tensors_that_were_made_in_inference_mode(data):
    """A reader and a step of training copy them: a graph may not hold them."""
    x_0, c = data
    model, vae = (
        diffusion(context_shape=(3,), null_token=True),
        HierarchicalVAE((2,), (3, 2), hidden_size=8, num_classes=4, null_token=True),
    )
    with torch.inference_mode():
        numbers, labels, null = c.clone(), LABELS.clone(), LABELS == 2
        inside = ode_log_likelihood(model, x_0[:2], context=numbers[:2]).log_evidence
    outside = ode_log_likelihood(model, x_0[:2], context=numbers[:2]).log_evidence
    torch.testing.assert_close(inside, outside.detach())
    bound_by_datum(
        model.model, model.posterior_guide, x_0, context=numbers, null=null
    ).sum().backward()
    assert all(p.grad is not None for p in model.denoiser.network.context.parameters())
    for elbo, pair in ((TraceMeanField_ELBO(), model.subsampled()), (Trace_ELBO(), vae)):
        context = labels if pair is vae else numbers
        svi = SVI(pair.model, pair.guide, Adam({"lr": 1e-3}), elbo)
        assert np.isfinite(svi.step(x_0, context, null=null))


@pytest.mark.parametrize("form", [torch.Tensor.numpy, torch.Tensor.tolist])
def test_ranks_of_simulations_take_any_form(form):
    exact = DiffusionModel(
        GaussianDenoiser.from_regression(
            torch.ones(2, 3), torch.zeros(2), torch.ones(2), LogSNRSchedule(6)
        )
    )
    ranks = simulation_based_calibration(
        exact, lambda states: states["x_3"][:, 0], context=form(torch.randn(12, 3)), num_draws=3
    )
    assert ranks.shape == (12,)


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8, torch.uint16])
def test_components_of_a_mixture_are_looked_up_by_any_whole_number(dtype):
    """A bit or a byte as an index selects rows: the law would be that of other components."""
    means = torch.tensor([[-1.5, 0.0], [1.5, 0.5], [0.0, 2.0]])
    denoiser = GaussianMixtureDenoiser([0.5, 0.3, 0.2], means, 0.6, LogSNRSchedule(6))
    k = torch.tensor([0, 1, 0])
    found = denoiser.conditional_distribution(k.to(dtype)).mean
    assert torch.equal(found, means[k])
    x_t, level = torch.randn(3, 2), torch.tensor(0.0)
    exact = denoiser.x_0_hat(x_t, level, context=k)
    torch.testing.assert_close(denoiser.x_0_hat(x_t, level, context=k.to(dtype)), exact)


def test_arviz_has_the_names_and_the_dropped_rows_of_a_context(data, tmp_path):
    x_0, c = data
    model = DiffusionModel(NeuralDenoiser(OfConditions(), LogSNRSchedule(6), (2,)))
    named = to_arviz(model, x_0, context=Conditions(LABELS, c), num_draws=25)["constant_data"]
    assert {"context_label", "context_numbers"} <= set(named.data_vars)
    null = LABELS == 2
    dropped = to_arviz(of_labels(), x_0, context=LABELS, null=null, num_draws=25)
    dropped.to_netcdf(tmp_path / "draws.nc")
    assert (dropped["constant_data"]["null"].values == null.numpy()).all()


def test_oracles_refuse_a_context_with_another_axis(data):
    x_0, c = data
    schedule = LogSNRSchedule(6)
    with pytest.raises(ValueError, match="'weight': got 1 NaN"):
        GaussianDenoiser.from_regression(torch.tensor([[0.0], [torch.nan]]), [0, 0], 1, schedule)
    regression = GaussianDenoiser.from_regression(torch.ones(2, 3), [0, 0], 1, schedule)
    mixture = GaussianMixtureDenoiser([0.5, 0.5], torch.randn(2, 2), 0.6, schedule)
    for denoiser, context in ((regression, c[:, None]), (mixture, LABELS[:, None] % 2)):
        with pytest.raises(ValueError, match="argument 'context': got a Tensor of shape") as error:
            elbo_terms(DiffusionModel(denoiser), x_0, context=context)
        beats(str(error.value))


@pytest.mark.parametrize("curves", [False, True])
def test_a_guided_denoiser_takes_a_timestep_for_each_row(curves, data):
    x_t, _ = data
    schedule = MonotoneSchedule(12, event_shape=(2,)) if curves else LogSNRSchedule(12)
    guided, t = GuidedDenoiser(of_labels(schedule=schedule).denoiser, 2.0), torch.arange(1, 13)
    alone = torch.cat(
        [guided(x_t[[n]], int(t[n]), context=LABELS[[n]]).mean for n in range(12)]
    ).detach()
    for states in (x_t, x_t.expand(3, 12, 2)):
        together = guided(states, t, context=LABELS).mean.detach()
        torch.testing.assert_close(together, alone.expand_as(states), rtol=1e-4, atol=1e-4)


def test_models_and_samplers_say_that_they_are_conditional():
    model = of_labels()
    assert "parameters with a context" in repr(model)
    assert "with a context" not in repr(diffusion())
    vae = HierarchicalVAE((2,), (3, 2), hidden_size=8, num_classes=4)
    assert "with a context" in repr(vae)
    assert "with a context" not in repr(HierarchicalVAE((2,), (3, 2), hidden_size=8))
    words = repr(ODESampler(model, 5, guidance=Guidance(2.0)))
    assert words == f"ODESampler of {model.name!r}, timesteps=5, guidance=Guidance(2)"
    assert repr(AncestralSampler(model)) == f"AncestralSampler of {model.name!r}"


def test_a_field_of_the_recipe_is_no_argument_of_fit(data):
    with pytest.raises(ValueError, match=r"Pass recipe=Recipe\(batch_size=…\)") as error:
        fit(of_labels(), data[0], context=LABELS, batch_size=4)
    beats(str(error.value))
