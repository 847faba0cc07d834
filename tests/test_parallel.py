"""Two processes on this machine: shares of data are joined, and training is training on the joint batch."""

import math

import pytest
import ranks
import torch
from oracles import log_normal
from pyro import poutine
from pyro.infer import TraceMeanField_ELBO

from pyro_diffusion.bounds import ELBOTerms, elbo_terms
from pyro_diffusion.chains import StratifiedTimesteps
from pyro_diffusion.training.batches import permuted
from pyro_diffusion.training.parallel import over_ranks, rank_and_size, share

pytest.importorskip("lightning.pytorch")


def log_p(x):
    """log-density of the data of ``ranks.exact``, in nats."""
    mean = torch.arange(3).double()
    return torch.as_tensor(log_normal(x.numpy(), mean.numpy(), (1 + 0.5 * mean.numpy()) ** 2))


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    return ranks.launch("measure", tmp_path_factory.mktemp("measure"))


@pytest.fixture
def shares(measured):
    return [found["shares"] for found in measured]


@pytest.fixture
def evaluated(measured):
    return [found["evaluate"] for found in measured]


def test_results_of_shares_are_joined_in_order(shares):
    """Seven data on two ranks: log p of each, once, in order, the same on both; and of one alone."""
    for n, name in ((7, "seven"), (1, "one")):
        for found in shares:
            terms = ELBOTerms(**found[name])
            expected = log_p(ranks.distinct(n)).sum(1)
            torch.testing.assert_close(terms.elbo, expected, rtol=1e-6, atol=0)
            assert terms.transition.shape == (4, n)
            assert terms.term_standard_error.shape == (6, n)
            assert (terms.kinds, terms.event_size) == (
                ("log-likelihood", *4 * ("log-ratio",), "KL"),
                3,
            )
    ours, theirs = (found["seven"] for found in shares)
    assert all(torch.equal(ours[field], theirs[field]) for field in ELBOTerms._fields[:5])


def test_a_context_of_several_parts_is_shared_with_its_data(shares):
    for found in shares:
        x, a, b, n = found["tree"].T
        assert torch.equal(torch.stack((x, a)), ranks.distinct(7)[:, :2].T)
        assert b.tolist() == list(range(7))
        assert n.tolist() == [3] * 3 + [4] * 4


def test_under_a_mask_the_event_size_is_that_of_all_data(shares):
    mask = ranks.distinct(7).abs() > 0.3
    terms = ELBOTerms(**shares[0]["masked"])
    assert terms.event_size == pytest.approx(mask.sum().item() / 7)
    expected = torch.where(mask, log_p(ranks.distinct(7)), 0.0).sum(1)
    torch.testing.assert_close(terms.elbo, expected, rtol=1e-6, atol=0)


def test_draws_are_shared_out_and_differ(shares):
    """Three data from rank 0 and four from rank 1, no two alike, and the same draws from the same seed."""
    for name in ("drawn", "again"):
        assert torch.equal(shares[0][name], shares[1][name])
        assert len(shares[0][name].unique(dim=0)) == 7
    assert shares[0]["seen"].tolist() == [0.0] * 3 + [1.0] * 4
    assert not torch.equal(shares[0]["drawn"], shares[0]["again"])
    assert torch.equal(shares[0]["drawn"], shares[0]["drawn once more"])


def test_no_rank_waits_for_one_that_failed(shares):
    assert [found["fails"] for found in shares] == [
        "rank 1: site 'x_3': got NaN",
        "site 'x_3': got NaN",
    ]
    assert all("one that returns a Tensor of shape ()" in found["means"] for found in shares)


def test_one_process_alone_is_as_without():
    diffusion = ranks.exact()
    x = ranks.distinct(4)

    def bound(x):
        return elbo_terms(diffusion.model, diffusion.posterior_guide, x)

    torch.manual_seed(0)
    expected = bound(x)
    torch.manual_seed(0)
    assert torch.equal(over_ranks(bound, x).transition, expected.transition)
    assert over_ranks(lambda x: x.mean(), x) == x.mean()  # whatever it is
    assert (rank_and_size(), share(5)) == ((0, 1), slice(0, 5))
    with pytest.raises(ValueError, match="'data': got 4 and 3 rows; expected as many"):
        over_ranks(bound, x, x[:3])
    with pytest.raises(ValueError, match="'data': got no rows"):
        over_ranks(bound)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    return [*ranks.launch("train", folder), folder]


@pytest.mark.parametrize(("precision", "close"), [("64-true", 1e-10), ("32-true", 1e-6)])
def test_the_gradient_is_that_of_the_joint_batch(precision, close, trained):
    """One process, both ranks' data and draws side by side: what the two had after averaging."""
    first, second = (rank[precision] for rank in trained[:2])
    torch.testing.assert_close(first["gradient"], second["gradient"], rtol=0, atol=0)
    dtype = first["gradient"].dtype
    diffusion = ranks.network_model().to(dtype)
    pair = diffusion.subsampled(timesteps=StratifiedTimesteps(1 / ranks.STEPS))
    x = torch.cat([next(batches_of(rank, dtype)) for rank in range(2)])
    drawn = poutine.trace(pair.guide).get_trace(x)
    for name, (value, where) in first["draws"][0].items():
        joint = torch.cat([value, second["draws"][0][name][0]], dim=where)
        assert joint.shape == drawn.nodes[name]["value"].shape
        drawn.nodes[name]["value"] = joint
    guide = poutine.replay(pair.guide, trace=drawn)
    loss = TraceMeanField_ELBO().differentiable_loss(pair.model, guide, x) / len(x)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in diffusion.parameters()])
    torch.testing.assert_close(gradient, first["gradient"], rtol=close, atol=close)
    assert gradient.abs().max() > 0.1


def batches_of(rank, dtype):
    """The batches of a rank of two, by the order that they are taken from."""
    order = permuted(torch.arange(64).numpy(), 64, (0, 0))
    rows = torch.from_numpy(order).reshape(-1, 2, ranks.PER_RANK)[:, rank]
    return iter(ranks.training_data().to(dtype)[rows])


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_ranks_draw_noise_of_their_own_and_strata_together(precision, trained):
    """Of sixteen timesteps, all alike, each is drawn once by the two ranks' eight draws, at each step."""
    shifts = set()
    for ours, theirs in zip(*(rank[precision]["draws"] for rank in trained[:2]), strict=True):
        assert not torch.isclose(ours["x_16"][0], theirs["x_16"][0]).any()
        t = torch.cat([ours["t"][0], theirs["t"][0]], dim=-1).flatten()
        assert sorted(t.tolist()) == list(range(1, 17))
        shifts.add(int(ours["t"][0].flatten()[0]) % 2)
        assert len(set((ours["t"][0] % 2).flatten().tolist())) == 1
    assert shifts == {0, 1}


@pytest.mark.parametrize("precision", ["64-true", "32-true"])
def test_parameters_stay_the_same_on_all_ranks(precision, trained):
    first, second = (rank[precision]["weights"] for rank in trained[:2])
    assert torch.equal(first, second)
    assert not torch.allclose(
        first, ranks.weights(ranks.network_model()).to(first.dtype), atol=1e-3
    )


def test_two_ranks_go_on_from_a_checkpoint_bit_for_bit(trained):
    """Stopped in the middle of an epoch: noise, strata and rows are what they would have been."""
    for found in trained[:2]:
        assert torch.equal(found["resumed"], found["whole"])


def test_bfloat16_accumulation_clipping_and_averaging_together(trained):
    first, second, _ = trained
    assert torch.equal(first["bf16-mixed"], second["bf16-mixed"])
    assert first["bf16-mixed"].isfinite().all()
    assert torch.equal(first["history"], second["history"])


def test_a_checkpoint_holds_the_generators_of_all_ranks(trained):
    *found, folder = trained
    checkpoint = torch.load(folder / "two.ckpt", weights_only=True)
    for states, rank in zip(checkpoint["generators"], found, strict=True):
        assert torch.equal(states["cpu"], rank["states"]["cpu"])
        assert torch.equal(states["strata"], rank["states"]["strata"])
    assert not torch.equal(*(states["cpu"] for states in checkpoint["generators"]))
    assert torch.equal(*(states["strata"] for states in checkpoint["generators"]))


@pytest.mark.parametrize("n", [11, 1])
def test_validation_counts_each_datum_once(n, evaluated):
    """Every path of this model gives log p(x_0): two ranks say what the closed form does."""
    expected = log_p(ranks.distinct(n)).sum(1)
    for found in evaluated:
        for stage in ("val", "test"):
            said = found[n][stage]
            assert said[f"{stage}_elbo"] == pytest.approx(expected.mean().item(), rel=1e-6)
            bits = -expected.mean().item() / 3 / math.log(2)
            assert said[f"{stage}_bits_per_dim"] == pytest.approx(bits, rel=1e-6)
            error = expected.std().item() / n**0.5 if n > 1 else 0.0
            assert said[f"{stage}_elbo_error"] == pytest.approx(error, rel=1e-5, abs=1e-6)


def test_loaders_that_repeat_data_are_refused(evaluated):
    for found in evaluated:
        assert "a DistributedSampler, which reads some of 11" in found["distributed True"]
        assert "a SequentialSampler, which reads some of 11" in found["distributed False"]
