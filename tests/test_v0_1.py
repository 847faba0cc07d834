"""Files that version 0.1 wrote are read by this version, and say the same numbers.

``tests/data/make_v0_1.py`` wrote them with commit 33956b7. A file may name modules that have moved
since; loading it may warn of that, and must succeed.
"""

import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from data.make_v0_1 import ADAM, BUILDERS, adapter, data, describe
from pyro.infer import SVI, TraceMeanField_ELBO
from pyro.optim import Adam

FOLDER = Path(__file__).parent / "data"
EXPECTED = json.loads((FOLDER / "v0_1.json").read_text())
FAMILIES = [file for file in EXPECTED if not file.endswith(".ckpt")]


def load(file):
    """The model of a file, by the way that its ending asks for."""
    path = FOLDER / file
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        if path.suffix == ".pickle":
            return pickle.loads(path.read_bytes())
        if path.suffix == ".ckpt":
            return load_checkpoint(path)[0]
        return scrambled(BUILDERS[EXPECTED[file]["kind"]]()).load(path)


def load_checkpoint(path):
    """A Lightning checkpoint's model, and the module around it, filled by Lightning itself."""
    pytest.importorskip("lightning.pytorch")
    from pyro_diffusion.training import SVIModule

    family = scrambled(BUILDERS["lightning"]())
    pair = family.subsampled()
    module = SVIModule.load_from_checkpoint(
        path, model=pair.model, guide=pair.guide, elbo=TraceMeanField_ELBO(), optimizer=ADAM,
        weights_only=True,
    )  # fmt: skip
    return family, module


def scrambled(family):
    """The model with other parameters, so that only a file can give it the right ones."""
    with torch.no_grad():
        for parameter in family.parameters():
            parameter.add_(0.1)
    return family


def close(values, expected, family):
    """Compare to the precision of the model's numbers."""
    relative = 1e-10 if family.dtype == torch.float64 else 1e-6
    for actual, stored in zip(values, expected, strict=True):
        assert actual == pytest.approx(stored, rel=relative)


@pytest.mark.parametrize("file", EXPECTED)
def test_a_file_gives_the_old_numbers(file):
    family, expected = load(file), EXPECTED[file]
    actual = describe(expected["kind"], family)
    assert actual["keys"] == expected["keys"]
    close(actual.get("x_0_hat", []), expected.get("x_0_hat", []), family)
    assert actual["elbo"].keys() == expected["elbo"].keys()
    close(actual["elbo"].values(), expected["elbo"].values(), family)


@pytest.mark.parametrize("file", [file for file in EXPECTED if file.endswith(".pickle")])
def test_a_pickled_model_has_the_numbers_of_its_class_built_anew(file):
    """Nothing that the programs need was left in the old object's ``__dict__``, or is missing there."""
    old, kind = load(file), EXPECTED[file]["kind"]
    new = BUILDERS[kind]()
    assert type(old) is type(new)
    assert old.name.startswith("v0_1_" + kind)  # a copy takes a free name
    new.load_state_dict(old.state_dict())
    assert describe(kind, new) == describe(kind, old)
    assert describe(kind, pickle.loads(pickle.dumps(old))) == describe(kind, old)


@pytest.mark.parametrize("file", FAMILIES)
def test_a_loaded_model_can_be_trained_and_sampled(file):
    family, kind = load(file), EXPECTED[file]["kind"]
    svi = SVI(family.model, family.posterior_guide, Adam({"lr": 1e-3}), TraceMeanField_ELBO())
    before = [parameter.clone() for parameter in family.parameters()]
    assert torch.tensor(svi.step(data(kind))).isfinite()
    assert any(not torch.equal(a, b) for a, b in zip(before, family.parameters(), strict=True))
    assert family.sample(2).shape == (2, *data(kind).shape[1:])


def test_a_lightning_module_fills_the_model_it_holds():
    file = "v0_1_lightning.ckpt"
    family, module = load_checkpoint(FOLDER / file)
    stored = torch.load(FOLDER / file, weights_only=True)["state_dict"]
    assert sorted(module.state_dict()) == sorted(stored) == EXPECTED[file]["module_keys"]
    name = "elbo.model.owner.denoiser.network.decode.weight"
    assert torch.equal(family.denoiser.network.decode.weight, stored[name])
    assert sorted(adapter(family).state_dict()) == sorted(stored)
