"""A run that is killed goes on, bit for bit; what is not a whole checkpoint of the model is refused."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import ranks
import torch

lightning = pytest.importorskip("lightning.pytorch")
from pyro_diffusion.training import CheckpointFiles, latest_checkpoint  # noqa: E402


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The losses of 24 steps, three epochs of eight, that nothing interrupts."""
    return ranks.losses_of_a_run(tmp_path_factory.mktemp("whole") / "run")


def steps(losses):
    return {step: loss for step, loss in losses.items() if step != "weights"}


def test_a_run_that_was_killed_goes_on_bit_for_bit(whole, tmp_path):
    """SIGKILL after step 13 of 24, in the second epoch; from step 12 on the losses are the same."""
    folder = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, "-W", "ignore", ranks.__file__, "killed", str(folder)],
        capture_output=True, timeout=60, check=False, env=os.environ | ranks.PATHS,
    )  # fmt: skip
    assert process.returncode == -9, process.stderr[-2000:]
    before = dict(line.split() for line in (folder / "losses.txt").read_text().splitlines())
    assert list(before) == [str(step) for step in range(1, 14)]
    assert all(whole[int(step)] == loss for step, loss in before.items())
    resumed = ranks.losses_of_a_run(folder, resume=True)
    assert steps(resumed) == {step: whole[step] for step in range(13, 25)}
    assert resumed["weights"] == whole["weights"]


@pytest.mark.parametrize(("stop_after", "every", "last"), [(16, 4, 16), (17, 8, 16), (1, 1, 1)])
def test_a_run_goes_on_from_any_step(stop_after, every, last, whole, tmp_path):
    """From the last batch of an epoch, before and after its end, and from the first of all."""
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        ranks.losses_of_a_run(tmp_path / "run", stop_after=-stop_after, every=every)
    resumed = ranks.losses_of_a_run(tmp_path / "run", resume=True, every=every)
    assert steps(resumed) == {step: whole[step] for step in range(last + 1, 25)}
    assert resumed["weights"] == whole["weights"]


def test_with_a_loader_of_torchs_a_run_goes_on_from_the_end_of_an_epoch(tmp_path):
    """Its order comes from the generator, which is in the checkpoint; within an epoch it has no position."""
    expected = ranks.losses_of_a_run(tmp_path / "whole", shuffled=False, every=8)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        ranks.losses_of_a_run(tmp_path / "run", shuffled=False, stop_after=-10, every=8)
    resumed = ranks.losses_of_a_run(tmp_path / "run", resume=True, shuffled=False, every=8)
    assert steps(resumed) == {step: expected[step] for step in range(9, 25)}


def checkpoints(folder):
    ranks.losses_of_a_run(folder, every=12)
    return folder / "step=12.ckpt", folder / "step=24.ckpt"


def test_the_newest_whole_checkpoint_of_a_model_is_found(tmp_path):
    """Cut short, the newest is passed over with a reason; when none is left, or of this model, none is."""
    folder = tmp_path / "run"
    module = ranks.adapt(ranks.network_model(dropout=0.2))
    before = ranks.weights(module)
    assert latest_checkpoint(folder, module) is None
    older, newest = checkpoints(folder)
    assert latest_checkpoint(folder, module).resolve() == newest.resolve()
    assert (folder / "last.ckpt").is_symlink()
    content = newest.read_bytes()
    middle = len(content) // 2
    newest.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.warns(UserWarning, match="skipped .*damaged"):
        assert latest_checkpoint(folder, module) == older
    with pytest.raises(ValueError, match="got the file"):
        latest_checkpoint(newest, module)
    newest.write_bytes(content[:-100])
    with pytest.warns(UserWarning, match="skipped .*cannot be read.*cut short"):
        assert latest_checkpoint(folder, module) == older
    with pytest.raises(ValueError, match="step=24.ckpt': got a file that cannot be read"):
        ranks.lightning_trainer(tmp_path, plugins=[CheckpointFiles()], max_epochs=4).fit(
            module, ranks.ShuffledBatches(ranks.training_data(), 8), ckpt_path=newest
        )
    other = ranks.adapt(ranks.network_model(num_timesteps=9, dropout=0.2))
    with pytest.raises(
        ValueError, match=r"no checkpoint can be used .*of a model with .*; expected a"
    ):
        latest_checkpoint(folder, other)
    newest.unlink()
    (folder / "last.ckpt").unlink()
    torch.save(module.state_dict(), folder / "weights.ckpt")
    with pytest.warns(UserWarning, match="weights.ckpt.*without the state of a run"):
        assert latest_checkpoint(folder, module) == older
    assert torch.equal(ranks.weights(module), before)


def test_an_older_file_stays_until_the_new_one_is_whole(tmp_path, monkeypatch):
    path = tmp_path / "run" / "last.ckpt"
    files = CheckpointFiles()
    files.save_checkpoint({"number": 1}, path)

    def interrupted(checkpoint, aside):
        aside.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        files.save_checkpoint({"number": 2}, path)
    assert files.load_checkpoint(path, weights_only=True) == {"number": 1}
    monkeypatch.undo()
    with pytest.raises(ValueError, match="cannot read again.*NumPy numbers"):
        files.save_checkpoint({"lr": np.float64(1e-3)}, path)
    assert files.load_checkpoint(path, weights_only=True) == {"number": 1}
    with warnings.catch_warnings(), pytest.raises(FileNotFoundError):
        files.load_checkpoint(tmp_path / "none.ckpt")
