"""Write the files of version 0.1 in this folder; this script was run once, with commit 33956b7.

Later versions must read these files (``tests/test_v0_1.py``), so do not write them again. The builders
below say what each file holds. The test uses them where a model is built first and filled afterwards.
``v0_1.json`` holds, for each file, what the old code said of the loaded model: the bound of fixed data,
estimates at fixed states (which no random number enters), and the names in its ``state_dict``.

    python tests/data/make_v0_1.py
"""

import functools
import json
import logging
import pickle
import warnings
from pathlib import Path

import pyro
import torch
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO
from torch.utils.data import DataLoader, TensorDataset

from pyro_diffusion import (
    MLP,
    BernoulliDiffusion,
    DiffusionModel,
    HierarchicalVAE,
    LadderEncoder,
    LearnedVariance,
    LinearSchedule,
    LogSNRSchedule,
    NeuralBernoulliDenoiser,
    NeuralDenoiser,
    Standardize,
    VelocityPrediction,
    elbo_terms,
)

FOLDER = Path(__file__).parent
ADAM = functools.partial(torch.optim.Adam, lr=1e-2)
BUILDERS = {}


def builder(function):
    """Enter a function under its name in ``BUILDERS``."""
    BUILDERS[function.__name__] = function
    return function


@builder
def model():
    """The model of ``v0_1_model.pt``."""
    x = data("model")
    denoiser = NeuralDenoiser(network(3, hidden_size=16), LogSNRSchedule(8), (3,))
    return DiffusionModel(denoiser, transform=Standardize.from_data(x), name="v0_1_model").double()


@builder
def velocity():
    """The model of ``v0_1_model.pickle``."""
    denoiser = NeuralDenoiser(
        network(3, hidden_size=8, num_outputs=2), LinearSchedule(8), (3,),
        prediction=VelocityPrediction(), variance=LearnedVariance(),
    )  # fmt: skip
    return DiffusionModel(denoiser, name="v0_1_velocity").double()


@builder
def bits():
    """The model of ``v0_1_bits.pickle``; float32, to keep the file small."""
    denoiser = NeuralBernoulliDenoiser(
        network(4, hidden_size=8), LogSNRSchedule(6, log_snr_max=4.0, log_snr_min=-6.0), (4,)
    )
    return BernoulliDiffusion(denoiser, name="v0_1_bits")


@builder
def hvae():
    """The model of ``v0_1_hvae.pt`` and ``v0_1_hvae.pickle``."""
    torch.manual_seed(0)
    encoder = LadderEncoder((3,), (4, 2), hidden_size=8)
    return HierarchicalVAE((3,), (4, 2), encoder=encoder, hidden_size=8, name="v0_1_hvae").double()


@builder
def lightning():
    """The model of ``v0_1_lightning.ckpt``; float32, as Lightning's users have it."""
    schedule = LogSNRSchedule(8, learnable=True)
    denoiser = NeuralDenoiser(network(2, hidden_size=8), schedule, (2,))
    return DiffusionModel(denoiser, name="v0_1_lightning")


def network(size, **settings):
    """A small perceptron whose output is not zero."""
    torch.manual_seed(0)
    result = MLP((size,), num_blocks=1, **settings)
    torch.nn.init.normal_(result.decode.weight, std=0.1)
    torch.nn.init.normal_(result.decode.bias, std=0.1)
    return result


def data(kind):
    """Fixed data for a model, made without random numbers."""
    if kind == "bits":
        return torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 0, 1]], dtype=torch.float32)
    x = torch.arange(12, dtype=torch.float64).reshape(4, 3).mul(1.7).sin() + 0.5
    return x[:, :2].float() if kind == "lightning" else x


def adapter(family):
    """Lightning's module around the subsampled pair of a model."""
    from pyro_diffusion.training import SVIModule

    pair = family.subsampled()
    return SVIModule(pair.model, pair.guide, TraceMeanField_ELBO(), ADAM)


def describe(kind, family):
    """What the code says of a model: its bound, its estimates, and the names in its ``state_dict``."""
    pyro.clear_param_store()  # the models of one kind have one name
    x_0 = data(kind)
    family.eval()
    guides = ["posterior_guide"] if kind == "hvae" else ["guide", "posterior_guide"]
    bounds = {}
    for guide in guides:
        pyro.set_rng_seed(0)
        q = poutine.scale(getattr(family, guide), 1.0)  # read along paths, in any version
        terms = elbo_terms(family.model, q, x_0, num_particles=2)
        bounds[guide] = terms.elbo.tolist()
    numbers = {"kind": kind, "elbo": bounds, "keys": sorted(family.state_dict())}
    if kind != "hvae":
        log_snr = torch.linspace(-2, 2, len(x_0), dtype=torch.float64)
        with torch.no_grad():
            numbers["x_0_hat"] = family.denoiser.x_0_hat(x_0, log_snr).tolist()
    return numbers


def main():
    """Write every file, and read it back before it is described."""
    models = {name: build() for name, build in BUILDERS.items()}
    expected = {}
    for kind, file in (("model", "v0_1_model.pt"), ("hvae", "v0_1_hvae.pt")):
        models[kind].save(FOLDER / file)
        expected[file] = describe(kind, BUILDERS[kind]().load(FOLDER / file))
    for kind, file in (
        ("velocity", "v0_1_model.pickle"), ("bits", "v0_1_bits.pickle"), ("hvae", "v0_1_hvae.pickle"),
    ):  # fmt: skip
        (FOLDER / file).write_bytes(pickle.dumps(models[kind]))
        expected[file] = describe(kind, pickle.loads((FOLDER / file).read_bytes()))
    expected["v0_1_lightning.ckpt"] = train(models["lightning"])
    (FOLDER / "v0_1.json").write_text(json.dumps(expected, indent=1) + "\n")


def train(family):
    """Two steps by Lightning's ``Trainer``, and a checkpoint of them."""
    import lightning.pytorch as pl

    warnings.filterwarnings("ignore", module="lightning.*")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module = adapter(family)
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=2, enable_progress_bar=False, enable_model_summary=False,
        logger=False, enable_checkpointing=False,
    )  # fmt: skip
    torch.manual_seed(0)
    trainer.fit(module, DataLoader(TensorDataset(data("lightning")), batch_size=2))
    trainer.save_checkpoint(FOLDER / "v0_1_lightning.ckpt")
    checkpoint = torch.load(FOLDER / "v0_1_lightning.ckpt", weights_only=True)
    pyro.clear_param_store()
    other = BUILDERS["lightning"]()
    module = adapter(other)
    module.load_state_dict(checkpoint["state_dict"])
    module_keys = {"module_keys": sorted(checkpoint["state_dict"])}
    return describe("lightning", other) | module_keys


if __name__ == "__main__":
    main()
