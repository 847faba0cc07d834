import pickle

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.fx.experimental.proxy_tensor import make_fx

from pyro_diffusion.chains import (
    ImportanceTimesteps,
    JointStrata,
    StratifiedTimesteps,
    Timesteps,
    UniformTimesteps,
)
from pyro_diffusion.distributions import Share

CPU = torch.device("cpu")
NORMAL = dist.Normal(0.0, 1.0)


@pytest.mark.parametrize("num_timesteps", [1, 2, 3, 10, 1000])
@pytest.mark.parametrize("share", [0.01, 0.1, 0.9])
def test_the_law_sums_to_one_and_favours_the_first_step(num_timesteps, share):
    law = StratifiedTimesteps(share)(num_timesteps, CPU)
    pi = law.log_prob(torch.arange(1, num_timesteps + 1)).exp()
    assert pi.sum().item() == pytest.approx(1)
    assert pi[0].item() == pytest.approx(max(share, 1 / num_timesteps))
    assert (pi[1:] - pi[1:].mean()).abs().max() < 1e-12 if num_timesteps > 1 else True


def test_each_entry_alone_follows_the_law(device):
    """20,000 joint draws of 4 entries: every entry's frequencies are π within five standard errors."""
    law = StratifiedTimesteps(0.3)(5, device).expand((4,))
    draws = torch.stack([law.sample() for _ in range(20_000)])
    pi = law.log_prob(torch.arange(1, 6, device=device)).exp()
    for t in range(1, 6):
        frequency = (draws == t).double().mean(0)
        error = (pi[t - 1] * (1 - pi[t - 1]) / 20_000).sqrt()
        assert ((frequency - pi[t - 1]).abs() < 5 * error).all()


def test_a_joint_draw_is_stratified_over_the_whole_batch():
    """1,000 entries over 10 steps: counts differ from their expectation by less than two."""
    law = StratifiedTimesteps(0.1)(10, CPU).expand((5, 200))
    for _ in range(20):
        t = law.sample()
        assert t.shape == (5, 200)
        counts = torch.bincount(t.flatten(), minlength=11)[1:]
        assert ((counts - 100).abs() <= 2).all()


def test_draws_are_in_range_and_random():
    law = StratifiedTimesteps()(1000, CPU).expand((64,))
    first, second = law.sample(), law.sample()
    assert not torch.equal(first, second)
    assert 1 <= min(first.min(), second.min()) <= max(first.max(), second.max()) <= 1000
    assert law.has_rsample
    assert (law.sample((3,)).shape, law.sample().dtype) == ((3, 64), torch.long)
    assert (StratifiedTimesteps()(1, CPU).expand((7,)).sample() == 1).all()


@pytest.mark.parametrize("share", [0.0, 1.0, -0.1, float("nan")])
def test_bad_shares_are_refused(share):
    with pytest.raises(ValueError, match="'reconstruction_share'.*got"):
        StratifiedTimesteps(share)


def test_base_class_is_abstract():
    with pytest.raises(TypeError):
        Timesteps()


def test_uniform_timesteps_are_alike_and_independent():
    law = UniformTimesteps()(7, CPU)
    assert torch.allclose(law.log_prob(torch.arange(1, 8)).exp(), torch.tensor(1 / 7).double())
    draws = torch.stack([law.expand((7,)).sample() for _ in range(4000)])
    counts = torch.bincount(draws[:, 0], minlength=8)[1:] / 4000
    assert ((counts - 1 / 7).abs() < 5 * (6 / 49 / 4000) ** 0.5).all()
    repeated = torch.tensor([len(set(row.tolist())) < 7 for row in draws]).double().mean()
    assert repeated > 0.9  # seven stratified draws of seven would never repeat
    assert type(law.expand((2,)).to(torch.float32)) is type(law)
    assert repr(UniformTimesteps()) == "UniformTimesteps()"


def test_importance_timesteps_follow_the_moments():
    timesteps = ImportanceTimesteps(uniform_share=0.1)
    start = timesteps(5, CPU)
    assert torch.equal(start.log_pi, StratifiedTimesteps()(5, CPU).log_pi)
    timesteps.moments = {1: 16.0, 2: 4.0, 5: 1.0}  # 3 and 4 lie between, in the logarithm
    root = torch.tensor([4.0, 2.0, 2 ** (2 / 3), 2 ** (1 / 3), 1.0], dtype=torch.float64)
    expected = 0.9 * root / root.sum() + 0.1 * start.log_pi.exp()
    torch.testing.assert_close(timesteps(5, CPU).log_pi.exp(), expected)
    assert timesteps(5, CPU).log_pi.exp().sum().item() == pytest.approx(1)
    timesteps.moments = {1: 4.0}
    assert timesteps(3, CPU).log_pi.exp().sum().item() == pytest.approx(1)
    timesteps.moments = {2: 4.0}
    assert timesteps(3, CPU).log_pi.isfinite().all()


@pytest.mark.parametrize(
    "arguments",
    [{"decay": 1.0}, {"decay": -0.1}, {"uniform_share": 0.0}, {"reconstruction_share": 1.0}],
)
def test_bad_shares_of_importance_timesteps_are_refused(arguments):
    with pytest.raises(ValueError, match=f"argument '{next(iter(arguments))}': got"):
        ImportanceTimesteps(**arguments)


def joint(law, world_size, seed=3):
    """The points of all ranks' shares of one joint draw, each rank with noise of its own."""
    handlers = [JointStrata(rank, world_size, seed) for rank in range(world_size)]
    return handlers, [law.shared(Share(h.rest, world_size)) for h in handlers]


@pytest.mark.parametrize(
    "law", [StratifiedTimesteps()(50, CPU), StratifiedTimesteps().continuous(CPU)]
)
def test_joint_strata_are_each_hit_once(law):
    handlers, shares = joint(law, 3)
    rests = set()
    for _ in range(20):
        points = torch.cat([share.points(7) for share in shares])
        assert sorted((points * 21).long().tolist()) == list(range(21))
        rests.add(tuple(int(h.rest) for h in handlers))
        for handler in handlers:
            handler.advance()
    assert rests == {(0, 1, 2), (1, 2, 0), (2, 0, 1)}


def test_the_shares_of_a_rank_are_every_stratum_once_over_the_shifts():
    """And within a share the order is a random permutation: hence an entry's stratum is uniform."""
    handler, n = JointStrata(1, 4, seed=0), 5
    law = StratifiedTimesteps()(10, CPU)
    hits = torch.zeros(4 * n)
    for shift in range(4):
        handler.rest.fill_((1 + shift) % 4)
        points = law.shared(Share(handler.rest, 4)).points(n)
        hits[(points * 4 * n).long()] += 1
    assert (hits == 1).all()


def test_each_entry_of_a_share_follows_the_law():
    """20,000 joint draws of 3 entries on rank 1 of 2: frequencies are π within five standard errors."""
    handler = JointStrata(1, 2, seed=0)
    law = StratifiedTimesteps(0.3)(5, CPU).expand((3,)).shared(Share(handler.rest, 2))
    draws = []
    for _ in range(20_000):
        draws.append(law.sample())
        handler.advance()
    frequency = torch.stack([(torch.stack(draws) == t).double().mean(0) for t in range(1, 6)])
    pi = law.log_prob(torch.arange(1, 6)).exp()[:, None]
    assert ((frequency - pi).abs() < 5 * (pi * (1 - pi) / 20_000).sqrt()).all()


def test_one_process_draws_what_it_drew_without():
    law = StratifiedTimesteps()(1000, CPU).expand((64,))
    torch.manual_seed(0)
    alone = law.sample()
    torch.manual_seed(0)
    assert torch.equal(law.shared(Share(JointStrata(0, 1, seed=5).rest, 1)).sample(), alone)


def test_the_handler_shares_out_stratified_sites_and_no_others():
    stratified, uniform = StratifiedTimesteps()(1000, CPU), UniformTimesteps()(1000, CPU)

    def program():
        with pyro.plate("data", 8):
            return pyro.sample("t", stratified), pyro.sample("s", uniform), pyro.sample("x", NORMAL)

    with JointStrata(1, 2, seed=0) as handler:
        trace = poutine.trace(program).get_trace()
    assert trace.nodes["t"]["fn"].share == Share(handler.rest, 2)
    torch.manual_seed(1)
    drawn = uniform.expand((8,)).sample()
    torch.manual_seed(1)
    assert torch.equal(uniform.expand((8,)).shared(Share(1, 2)).sample(), drawn)
    replayed = poutine.replay(program, trace=trace)
    with handler:
        assert torch.equal(replayed()[0], trace.nodes["t"]["value"])


def test_a_captured_graph_follows_the_shift():
    """A draw traced once, as a compiler does, takes the strata of the step that it is run at."""
    handler = JointStrata(0, 2, seed=0)
    law = StratifiedTimesteps()(1000, CPU).shared(Share(handler.rest, 2))
    graph = make_fx(lambda x: x + law.points(6))(torch.zeros(6, dtype=torch.float64))
    for rest in (0, 1, 0):
        handler.rest.fill_(rest)
        assert ((graph(torch.zeros(6, dtype=torch.float64)) * 12).long() % 2 == rest).all()


def test_a_kept_law_follows_its_share_and_is_nobody_elses():
    """The stratified law is made once for each share, length, device and dtype."""
    rule, cpu = StratifiedTimesteps(0.1), torch.device("cpu")
    assert rule(20, cpu) is rule(20, cpu)
    assert rule(20, cpu).to(torch.float32) is rule(20, cpu).to(torch.float32)
    assert rule(20, cpu).to(torch.float32).log_pi.dtype == torch.float32
    rule.reconstruction_share = 0.5
    assert rule(20, cpu).log_pi[0].exp() == pytest.approx(0.5)
    assert not pickle.loads(pickle.dumps(rule))._laws
    with torch.inference_mode():
        inside = StratifiedTimesteps()(5, cpu).to(torch.float32)
    assert not inside.log_pi.is_inference()
    assert not inside.edges.is_inference()
    learned = ImportanceTimesteps()
    learned(20, cpu).log_pi.zero_()  # as observing does, in place
    assert learned.start(20, cpu).log_pi[0].exp() == pytest.approx(0.1)
