import pytest
import torch

from pyro_diffusion.networks import MLP


@pytest.mark.parametrize("event_shape", [(), (3,), (2, 3, 4)])
@pytest.mark.parametrize("frequencies", [(), (2, 3)])
def test_shapes_and_zero_output(event_shape, frequencies, device):
    network = MLP(event_shape, hidden_size=16, num_blocks=2, fourier_frequencies=frequencies)
    network = network.to(device)
    output = network(torch.randn(5, *event_shape, device=device), torch.zeros(5, device=device))
    assert output.shape == (5, *event_shape)
    assert (output == 0).all()


def _trained(network):
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network


def test_the_output_depends_on_the_state_and_on_the_log_snr():
    network = _trained(MLP((3,), hidden_size=16))
    x = torch.randn(4, 3)
    base = network(x, torch.zeros(4))
    assert not torch.allclose(base, network(x + 0.1, torch.zeros(4)))
    for log_snr in (0.01, 5.0, -5.0):
        assert not torch.allclose(base, network(x, torch.full((4,), log_snr)), atol=1e-6)


def test_fourier_features_enter_the_first_layer():
    plain, waves = MLP((3,)), MLP((3,), fourier_frequencies=(2, 3, 4))
    assert plain.encode.in_features == 3
    assert waves.encode.in_features == 3 * 7


def test_dropout_is_for_training_only():
    network = _trained(MLP((3,), hidden_size=16, dropout=0.5))
    x, log_snr = torch.randn(4, 3), torch.zeros(4)
    assert not torch.equal(network(x, log_snr), network(x, log_snr))
    network.eval()
    assert torch.equal(network(x, log_snr), network(x, log_snr))


def test_another_event_shape_is_refused():
    with pytest.raises(ValueError, match=r"got shape \(5, 3\).*\(2,\)"):
        MLP((2,))(torch.zeros(5, 3), torch.zeros(5))
    with pytest.raises(ValueError, match="'event_shape': got 2"):
        MLP(2)


def test_rows_do_not_mix():
    network = _trained(MLP((3,), hidden_size=16)).double()
    x, log_snr = torch.randn(4, 3).double(), torch.randn(4).double()
    torch.testing.assert_close(network(x, log_snr)[2:3], network(x[2:3], log_snr[2:3]))
