"""What an object says of itself: in a terminal, in a notebook, to ``dir`` and to ``help``."""

import copy
import inspect
import math
import pickle
import pydoc
import re
import sys
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import pyro_diffusion as pd
from pyro_diffusion import (
    MLP,
    DiffusionModel,
    DiscretizedGaussianLikelihood,
    Evidence,
    GaussianDenoiser,
    HierarchicalVAE,
    LadderEncoder,
    LevelPrediction,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
    Standardize,
    StridedSchedule,
    VarianceExploding,
    elbo_terms,
    evaluate_bound,
    importance_evidence,
)
from pyro_diffusion.evidence import average


def diffusion(num_timesteps=20, network=None, **settings):
    network = MLP((2,), hidden_size=8, num_blocks=1) if network is None else network
    return DiffusionModel(NeuralDenoiser(network, LogSNRSchedule(num_timesteps), (2,)), **settings)


def vae(**settings):
    return HierarchicalVAE((2,), (8, 4), hidden_size=8, **settings)


class _Rows(HTMLParser):
    """The texts of a table's cells, and whether every tag was closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.cells = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        if tag in ("th", "td"):
            self.cells.append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.cells[-1] += data


def table(thing):
    """Title and rows of an object's table."""
    title, *cells = _Rows(thing._repr_html_()).cells
    return title, dict(zip(cells[::2], cells[1::2], strict=True))


# ---------------------------------------------------------------- models


def test_a_diffusion_model_says_what_it_is_made_of():
    model = diffusion(name="ring")
    title, *lines = repr(model).splitlines()
    assert title == "DiffusionModel 'ring', event shape (2,)"
    assert [line.split()[0] for line in lines] == [
        "schedule",
        "denoiser",
        "likelihood",
        "transform",
    ]
    schedule, denoiser, likelihood, transform = lines
    assert schedule.endswith("LogSNRSchedule, T = 20, log-SNR 8 … -8")
    count = sum(p.numel() for p in model.denoiser.network.parameters())
    for word in (f"MLP of {count:,} parameters", "NoisePrediction()", "ForwardVariance()"):
        assert word in denoiser
    assert "none" in likelihood
    assert "none" in transform
    assert str(model) == repr(model)


def test_a_hierarchical_vae_says_what_it_is_made_of():
    model = vae(encoder=LadderEncoder((2,), (8, 4), hidden_size=8), name="ladder")
    title, *lines = repr(model).splitlines()
    assert title == "HierarchicalVAE 'ladder', event shape (2,)"
    rows = {line.split()[0]: line for line in lines}
    assert list(rows) == ["latents", "encoder", "decoder", "likelihood", "transform"]
    assert "h_1 (8,), h_2 (4,)" in rows["latents"]
    count = sum(p.numel() for p in model.decoder.parameters())
    assert f"GaussianLayer of {count:,} parameters" in rows["decoder"]
    assert "LadderEncoder of" in rows["encoder"]
    assert "…" in repr(HierarchicalVAE((2,), (2,) * 12, hidden_size=2)).splitlines()[1]


MODELS = {
    "levels": lambda: DiffusionModel(
        NeuralDenoiser(
            MLP((3,), num_outputs=4, hidden_size=8, num_blocks=1), LogSNRSchedule(5), (3,),
            prediction=LevelPrediction(4),
        )
    ),
    "pixels": lambda: diffusion(likelihood=DiscretizedGaussianLikelihood(17)),
    "standardised": lambda: diffusion(transform=Standardize(torch.zeros(2), torch.ones(2))),
    "bits": lambda: DiffusionModel(
        NeuralBernoulliDenoiser(MLP((3,), hidden_size=8, num_blocks=1), LinearDecaySchedule(5), (3,))
    ),
    "categories": lambda: DiffusionModel(
        NeuralCategoricalDenoiser(
            MLP((3, 4), hidden_size=8, num_blocks=1), LinearDecaySchedule(5), (3,), num_categories=4
        )
    ),
    "exact": lambda: DiffusionModel(
        GaussianDenoiser(torch.zeros(2), torch.ones(2), VarianceExploding(LinearSchedule(9)))
    ),
    "one step": lambda: diffusion(1),
    "by entry": lambda: DiffusionModel(
        GaussianDenoiser(torch.zeros(2), torch.ones(2), MonotoneSchedule(9, event_shape=(2,)))
    ),
    "strided": lambda: diffusion().strided(4),
    "vae": vae,
    "vae of pixels": lambda: vae(likelihood=DiscretizedGaussianLikelihood(17)),
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_models_are_short_and_have_a_table(name, device):
    model = MODELS[name]().to(device)
    lines = repr(model).splitlines()
    assert len(lines) == (6 if "vae" in name else 5)
    assert max(map(len, lines)) < 130
    title, rows = table(model)
    assert title == lines[0]
    for line, (part, content) in zip(lines[1:], rows.items(), strict=True):
        assert line.split(maxsplit=1) == [part, content]


def test_what_a_part_is_is_said():
    assert "prediction=LevelPrediction(num_levels=4)" in repr(MODELS["levels"]())
    assert "DiscretizedGaussianLikelihood(num_levels=17" in repr(MODELS["pixels"]())
    assert "Standardize" in repr(MODELS["standardised"]())
    assert "MLP of" in repr(MODELS["bits"]())
    assert "rate=0.5" in repr(MODELS["bits"]())
    assert "num_categories=4" in repr(MODELS["categories"]())
    assert "GaussianDenoiser\n" in repr(MODELS["exact"]())
    assert "a curve for each of 2 entries" in repr(MODELS["by entry"]())
    assert "StridedSchedule, T = 4" in repr(MODELS["strided"]())


def test_networks_keep_torchs_tree():
    network = MLP((2,), hidden_size=8, num_blocks=1)
    assert repr(network).startswith("MLP(\n  (encode): Linear(")
    assert "(network): MLP(\n" in repr(diffusion(network=network).denoiser)


def test_a_lazy_network_has_no_parameters_yet():
    class Lazy(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.LazyLinear(2)

        def forward(self, x_t, log_snr):
            return self.layer(x_t)

    assert "Lazy of 0 parameters" in repr(diffusion(network=Lazy()))


def test_a_likelihood_that_is_a_tree_is_named():
    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 2)

        embed = None

        def forward(self, x):
            return x

    assert "likelihood  Own\n" in repr(diffusion(likelihood=Own()))


# ---------------------------------------------------------------- programs


def test_programs_and_pairs_say_whose_they_are():
    model = diffusion(name="ring")
    assert repr(model.model) == "GenerativeChain of 'ring': a Pyro model with sites x_20 … x_0"
    assert repr(model.guide) == "BottomUpGuide of 'ring': a Pyro guide with sites x_1 … x_20"
    assert repr(model.posterior_guide).startswith("TopDownGuide of 'ring': a Pyro guide")
    pair = model.subsampled(3)
    assert "of 'ring', T = 20: 3 random timesteps a datum, StratifiedTimesteps" in repr(pair)
    assert repr(pair.model).startswith("model of a TimestepPlate of 'ring'")
    assert repr(pair.guide).startswith("guide of a TimestepPlate of 'ring'")
    assert "T → ∞: 1 random timestep a datum" in repr(model.continuous())
    one = diffusion(1, name="step").subsampled()
    assert repr(one).splitlines() == [
        "ProgramPair",
        "  model  GenerativeChain of 'step': a Pyro model with sites x_1 … x_0",
        "  guide  TopDownGuide of 'step': a Pyro guide with sites x_1",
    ]
    alone = pd.chains.BottomUpGuide(lambda x, t: x, num_timesteps=3)
    assert (
        repr(alone) == f"BottomUpGuide of {alone.owner.name!r}: a Pyro guide with sites x_1 … x_3"
    )


# ---------------------------------------------------------------- schedules and results


@pytest.mark.parametrize(
    ("schedule", "ends", "numbers"),
    [
        (LogSNRSchedule(20), "8 … -8", "fixed"),
        (LogSNRSchedule(20, learnable=True), "8 … -8", "2 of them learned"),
        (VarianceExploding(LogSNRSchedule(20)), "8 … -8", "fixed"),
        (StridedSchedule(LogSNRSchedule(17), [1, 5]), "8 … 4", "fixed"),
        (MonotoneSchedule(20, event_shape=(3,)), "8 … -8", f"{3 * 27} of them learned"),
    ],
)
def test_schedules_have_a_table(schedule, ends, numbers):
    title, rows = table(schedule)
    assert title == type(schedule).__name__
    assert rows["timesteps"] == f"T = {schedule.num_timesteps}"
    assert rows["log-SNR"].startswith(ends)
    assert rows["numbers"] == numbers
    assert "\n" not in repr(schedule)


def test_what_was_found_is_in_the_table():
    model, x_0 = diffusion(), torch.randn(6, 2)
    terms = elbo_terms(model.model, model.guide, x_0, num_particles=4)
    title, rows = table(terms)
    assert title == "ELBOTerms(6 data, 1 KL and 19 log-ratios), nats per datum"
    assert rows["bound"] == str(terms.mean())
    assert rows["bits per dimension"] == str(terms.bits_per_dim())
    assert rows["log-likelihood at x_0"] == str(terms.term_means()[0])
    assert rows["KL at x_20"] == str(terms.term_means()[-1])
    between = float(rows["sum over 19 sites between"])
    ends = terms.term_means()[0].value - terms.term_means()[-1].value
    assert ends - between == pytest.approx(terms.mean().value, abs=1e-3)

    evidence = importance_evidence(model.model, model.guide, x_0, num_particles=30)
    title, rows = table(evidence)
    assert title == "Evidence(6 data), nats per datum"
    assert rows["log-evidence"] == str(evidence.mean())
    assert rows["estimator"] == "importance weights, 30 particles a datum"
    assert rows["reliable for"] == f"{int(evidence.reliable.sum())} of 6 data"
    assert float(rows["largest Pareto k"]) == pytest.approx(
        evidence.pareto_k.max().item(), abs=0.01
    )

    result = evaluate_bound(model, x_0, standard_error=2.0)
    title, rows = table(result)
    assert title == "BoundEvaluation(6 data), nats per datum"
    assert rows["bound"] == str(result.mean())
    assert rows["network rows"] == f"{result.rows:,} by {result.estimator}"
    assert rows["rows of one full sum"] == "120"
    endless = evaluate_bound(model, x_0, standard_error=2.0, num_timesteps=math.inf)
    assert "rows of one full sum" not in table(endless)[1]


def test_a_k_that_is_no_number_is_said_in_words():
    assert table(average(torch.randn(3, 4).double()))[1]["largest Pareto k"] == "unknown"
    constant = table(average(torch.zeros(30, 4).double()))[1]
    assert constant["largest Pareto k"] == "none: the weights are constant"
    exact = table(Evidence.exact(torch.zeros(4)))[1]
    assert "largest Pareto k" not in exact
    assert exact["reliable for"] == "4 of 4 data"


def test_one_level_and_one_particle_have_a_table():
    model = HierarchicalVAE((2,), (3,), hidden_size=8)
    _, rows = table(elbo_terms(model.model, model.guide, torch.randn(5, 2)))
    assert rows["sum over 0 sites between"] == "0.0000"


# ---------------------------------------------------------------- dir and help


def lines_of_help(cls):
    return pydoc.plain(pydoc.render_doc(cls)).splitlines()


@pytest.mark.parametrize("cls", [DiffusionModel, HierarchicalVAE, pd.BernoulliDiffusion])
def test_help_fits_three_screens(cls):
    lines = lines_of_help(cls)
    # from 3.13 on pydoc writes the arguments of long signatures on lines of their own
    assert len(lines) <= (150 if sys.version_info < (3, 13) else 190)
    text = "\n".join(lines)
    assert inspect.getdoc(cls).splitlines()[0] in text
    for name in ("sample(", "model\n", "guide\n", "save(", "load("):
        assert re.search(rf"^ \|  {re.escape(name)}", text, re.M), name
    assert "torch.nn.modules.module.Module:" not in text  # no section of inherited methods
    assert "register_forward_hook" not in text


def test_dir_lists_what_a_user_needs():
    of_class = [
        "continuous", "device", "dtype", "guide", "load", "model", "posterior_guide", "process", "sample",
        "save", "schedule", "strided", "subsampled", "with_num_timesteps",
    ]  # fmt: skip
    assert dir(DiffusionModel) == of_class
    of_torch = ["eval", "load_state_dict", "parameters", "state_dict", "to", "train", "training"]
    own = ["denoiser", "event_shape", "likelihood", "name", "transform"]
    assert dir(diffusion()) == sorted([*of_class, *of_torch, *own])
    assert dir(diffusion(likelihood=DiscretizedGaussianLikelihood(17))) == dir(diffusion())
    assert len(dir(HierarchicalVAE)) <= 10
    assert {"encoder", "decoder", "latent_shapes", "num_timesteps", "sample"} <= set(dir(vae()))
    assert len(dir(vae())) <= 25


@pytest.mark.parametrize("build", [diffusion, vae])
def test_what_is_not_listed_is_still_there(build):
    """Attribute access, torch's methods and the internals are as before; only the lists are short."""
    model = build()
    inherited = [name for name in dir(nn.Module) if not name.startswith("__")]
    assert all(hasattr(model, name) and hasattr(type(model), name) for name in inherited)
    for name in type(model)._internal - {
        "transition",
        "transform_modules",
        "gap",
        "decode_inside",
        "with_both_ends",
    }:
        assert hasattr(model, name), name
    assert all(getattr(model, name, None) is not model for name in dir(model))
    with pytest.raises(AttributeError):
        model.no_such_name  # noqa: B018


def test_a_class_of_the_users_lists_its_own():
    class Ring(DiffusionModel):
        radius = 1.0
        _internal = frozenset({"helper"})

        def helper(self):
            return self._secret()

        def circumference(self):
            return 2 * math.pi * self.radius

        def _secret(self):
            return 3

    assert set(dir(Ring)) - set(dir(DiffusionModel)) == {"radius", "circumference"}
    ring = Ring(diffusion().denoiser)
    ring.note = "seen"
    assert {"note", "circumference"} <= set(dir(ring))
    assert ring.helper() == 3
    assert repr(ring).startswith("Ring 'ring")


@pytest.mark.parametrize("build", [diffusion, vae])
def test_copies_and_pickles_are_as_before(build):
    model = build()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert dir(copied) == dir(model)
        assert repr(copied).splitlines()[1:] == repr(model).splitlines()[1:]
        assert copied.state_dict().keys() == model.state_dict().keys()


def test_abstract_classes_stay_abstract():
    with pytest.raises(TypeError, match="abstract"):
        pd.family.Family((2,), None, None, None)
