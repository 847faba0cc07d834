import pytest
import torch

from pyro_diffusion.timesteps import (
    ImportanceTimesteps,
    StratifiedTimesteps,
    Timesteps,
    UniformTimesteps,
)

CPU = torch.device("cpu")


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
