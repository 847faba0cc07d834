import subprocess
import sys

import pytest
import torch

from pyro_diffusion.denoisers import LevelPrediction, NeuralDenoiser
from pyro_diffusion.diffusion import DiffusionModel
from pyro_diffusion.networks import MLP, FeedForward, UNet
from pyro_diffusion.schedules import LogSNRSchedule


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


# images


@pytest.mark.parametrize("event_shape", [(8, 8), (3, 8, 4)])
@pytest.mark.parametrize("num_outputs", [1, 3])
def test_u_net_shapes_and_zero_output(event_shape, num_outputs, device):
    pytest.importorskip("diffusers")
    network = UNet(event_shape, channels=(4, 8, 8), num_outputs=num_outputs).to(device)
    per_entry = () if num_outputs == 1 else (num_outputs,)
    for dtype in (torch.float32, torch.float64):
        x_t = torch.randn(5, *event_shape, device=device, dtype=dtype)
        output = network.to(dtype)(x_t, torch.zeros(5, device=device, dtype=dtype))
        assert output.shape == (5, *event_shape, *per_entry)
        assert output.dtype == dtype
        assert (output == 0).all()


def test_u_net_reads_the_state_and_the_log_snr():
    pytest.importorskip("diffusers")
    network = UNet((2, 8, 8), channels=(4, 8), attention=(1,)).eval()
    torch.nn.init.normal_(network.unet.conv_out.weight, std=0.3)
    x, log_snr = torch.randn(4, 2, 8, 8), torch.zeros(4)
    base = network(x, log_snr)
    torch.testing.assert_close(network(x[2:3], log_snr[2:3]), base[2:3], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(base, network(x + 0.1, log_snr))
    for level in (0.01, 5.0, -5.0, 30.0):
        assert not torch.allclose(base, network(x, torch.full((4,), level)), atol=1e-6)


def test_u_net_outputs_belong_to_their_entries():
    """A bias of output k of channel c moves entry [c, :, :, k] and no other."""
    pytest.importorskip("diffusers")
    network = UNet((2, 4, 4), channels=(4,), attention=(), num_outputs=3)
    network.unet.conv_out.bias.data = torch.arange(6.0)
    output = network(torch.randn(1, 2, 4, 4), torch.zeros(1))[0]
    expected = torch.arange(6.0).reshape(2, 1, 1, 3).expand(2, 4, 4, 3)
    torch.testing.assert_close(output, expected)


def test_u_net_of_a_saved_model(tmp_path):
    pytest.importorskip("diffusers")

    def build():
        network = UNet((8, 8), channels=(4, 8), attention=(), num_outputs=5, dropout=0.1)
        schedule = LogSNRSchedule(6, log_snr_max=4.0)
        return DiffusionModel(
            NeuralDenoiser(network, schedule, (8, 8), prediction=LevelPrediction(5))
        )

    saved = build()
    torch.nn.init.normal_(saved.denoiser.network.unet.conv_out.weight)
    saved.save(tmp_path / "model.pt")
    loaded, draws = build().load(tmp_path / "model.pt"), []
    for diffusion in (saved, loaded):
        torch.manual_seed(0)
        draws.append(diffusion.strided(3).sample(2))
    assert torch.equal(*draws)


@pytest.mark.parametrize(
    ("event_shape", "arguments", "says"),
    [
        ((8, 9), {}, r"'event_shape': got \(8, 9\).*multiples of 4"),
        ((8,), {}, r"'event_shape': got \(8,\); expected \(C, H, W\)"),
        (8, {}, "'event_shape': got 8"),
        ((8, 8), {"channels": ()}, r"'channels' and 'attention': got \(\)"),
        ((8, 8), {"channels": 32}, "'channels' and 'attention': got 32"),
        ((8, 8), {"attention": (3,)}, r"'channels' and 'attention'.*\(3,\)"),
        ((8, 8), {"layers_per_block": 0}, "'layers_per_block': got 0"),
        ((8, 8), {"num_outputs": 0}, "'num_outputs': got 0"),
    ],
)
def test_bad_images_are_refused_in_words(event_shape, arguments, says):
    with pytest.raises(ValueError, match="(?s)" + says):
        UNet(event_shape, **arguments)


def test_u_net_refuses_another_shape():
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match=r"'x_t': got shape \(1, 4, 8\)"):
        UNet((8, 8), channels=(4,), attention=())(torch.zeros(1, 4, 8), torch.zeros(1))


@pytest.mark.parametrize("missing", ["torchvision", "diffusers"])
def test_u_net_needs_diffusers_and_not_torchvision(missing):
    pytest.importorskip("diffusers")
    code = (
        "import sys\n"
        f"sys.modules[{missing!r}] = None\n"
        "from pyro_diffusion import UNet\n"
        "try:\n"
        "    UNet((8, 8), channels=(4,), attention=())\n"
        "except ImportError as error:\n"
        "    print(error)\n"
        "else:\n"
        "    print('built')\n"
    )
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    )
    says = "built" if missing == "torchvision" else "pip install 'pyro-diffusion[images]'"
    assert says in result.stdout


# Contexts.

CONTEXTS = {
    "numbers": ({"context_shape": (2, 3)}, torch.randn(5, 2, 3)),
    "labels": ({"num_classes": 4}, torch.tensor([0, 3, 2, 0, 1])),
    "small labels": ({"num_classes": 4}, torch.tensor([0, 3, 2, 0, 1], dtype=torch.uint8)),
}
BACKBONES = {
    "MLP": lambda **c: MLP((8, 8), hidden_size=16, num_blocks=2, **c),
    "UNet": lambda **c: UNet((8, 8), channels=(4, 8), attention=(), **c),
}


def randomised(network):
    """The network with outputs that are not zero, in evaluation mode."""
    torch.manual_seed(0)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return network.eval()


@pytest.mark.parametrize("kind", list(CONTEXTS))
@pytest.mark.parametrize("name", list(BACKBONES))
def test_a_context_changes_its_own_row_and_no_other(name, kind):
    settings, context = CONTEXTS[kind]
    network = randomised(BACKBONES[name](**settings, null_token=True))
    x_t, log_snr = torch.randn(5, 8, 8), torch.randn(5)
    output = network(x_t, log_snr, context)
    other = context.clone()
    other[1] = other[0]
    changed = (network(x_t, log_snr, other) - output).flatten(1).abs().amax(1)
    assert (changed > 1e-4).tolist() == [False, True, False, False, False]
    # A dropped row is the row of the null token, whatever its context.
    null = torch.tensor([False, True, False, True, False])
    mixed = network(x_t, log_snr, context, null)
    without = network(x_t, log_snr)
    torch.testing.assert_close(mixed, torch.where(null[:, None, None], without, output))
    assert not torch.allclose(without, output)


def test_a_network_without_a_context_has_the_parameters_of_before():
    names = {name.split(".")[0] for name in MLP((2,)).state_dict()}
    assert names == {"encode", "condition", "blocks", "decode"}


def test_arguments_of_a_context_that_do_not_go_together():
    for settings, says in (
        ({"context_shape": (3,), "num_classes": 2}, "arguments 'context_shape' and 'num_classes'"),
        ({"context_shape": 3}, "argument 'context_shape': got 3; expected a tuple"),
        ({"num_classes": 0}, "argument 'num_classes': got 0"),
        (
            {"null_token": True},
            "argument 'null_token': got True for a network that takes no context",
        ),
    ):
        for build in BACKBONES.values():
            with pytest.raises(ValueError, match=says):
                build(**settings)
    says = r"argument 'context': got one for an MLP that was built without one; .* context_shape=\(8,\)"
    with pytest.raises(ValueError, match=says):
        MLP((2,))(torch.zeros(3, 2), torch.zeros(3), torch.zeros(3, 8))


def test_a_feed_forward_layer_takes_particles_in_front_of_its_context():
    layer = randomised(FeedForward((4,), (2,), hidden_size=8, context_shape=(3,)))
    h, context = torch.randn(7, 5, 4), torch.randn(5, 3)
    each = torch.stack([layer(rows, context) for rows in h])
    torch.testing.assert_close(layer(h, context), each)
    assert not torch.allclose(layer(h, context.flip(0)), each)


@pytest.mark.parametrize("channels", [(32, 64, 64), (16, 32), (8, 8)])
def test_every_block_of_a_u_net_sees_the_timestep_and_the_context(channels):
    """A norm whose groups have one channel would subtract what the embeddings add to all of its pixels."""
    network = UNet((8, 8), channels=channels, attention=(), num_classes=3).eval()
    outputs = []
    network.unet.down_blocks[0].resnets[0].register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    x_t, labels = torch.randn(4, 8, 8), torch.tensor([0, 1, 2, 0])
    for log_snr, context in ((0.0, labels), (3.0, labels), (0.0, labels.flip(0))):
        network(x_t, torch.full((4,), log_snr), context)
    base, other_level, other_label = outputs
    assert (base - other_level).abs().max() > 1e-2
    assert (base - other_label)[:2].abs().max() > 1e-2


def test_u_net_weights_of_before_compute_what_they_did():
    """Weights without a word on the groups were trained with up to 32; new ones say how many they have."""
    network, again = (UNet((8, 8), channels=(8, 16), attention=()) for _ in range(2))
    randomised(network), randomised(again)
    x_t, log_snr = torch.randn(3, 8, 8), torch.zeros(3)
    old = {name: x for name, x in network.state_dict().items() if name != "_extra_state"}
    new = network(x_t, log_snr)
    again.load_state_dict(network.state_dict())
    torch.testing.assert_close(again(x_t, log_snr), new)
    again.load_state_dict(old)
    assert {m.num_groups for m in again.modules() if isinstance(m, torch.nn.GroupNorm)} == {8}
    assert not torch.allclose(again(x_t, log_snr), new)
    third = UNet((8, 8), channels=(8, 16), attention=()).eval()
    third.load_state_dict(again.state_dict())  # and they say so when they are saved again
    torch.testing.assert_close(third(x_t, log_snr), again(x_t, log_snr))
    diffusion = DiffusionModel(NeuralDenoiser(third, LogSNRSchedule(3), (8, 8)))
    saved = diffusion.state_dict()
    del saved["denoiser.network._extra_state"]
    diffusion.load_state_dict(saved)
