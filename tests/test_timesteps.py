import pytest
import torch

from pyro_diffusion.timesteps import StratifiedTimesteps, Timesteps

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
