"""Checkpoints of a Lightning run: files that are complete, and the newest one to continue from.

A run that is killed while it writes a checkpoint leaves an incomplete file. :class:`CheckpointFiles` writes a
file under another name and renames it when it is complete, so that no older checkpoint is destroyed.
:func:`latest_checkpoint` reads the files of a folder, from the newest to the oldest, and returns the first
that is complete and belongs to the model that is going to be trained.
"""

import os
import pickle
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import TorchCheckpointIO

from pyro_diffusion.checks import require
from pyro_diffusion.params import ParamScope, check_state_dict
from pyro_diffusion.training.lightning_module import SVIModule


class CheckpointFiles(TorchCheckpointIO):
    """Lightning's checkpoint files, written under another name and renamed when they are complete.

    Use it as ``Trainer(plugins=[CheckpointFiles()])``. Without it a checkpoint is first written in the
    system's temporary folder. If that is another file system, the file is then copied over the older
    checkpoint. A process that is killed during the copy leaves neither of them.

    Raises:
        ValueError: From reading, a file that is incomplete or is not a checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. An older one of that name is kept until the new one is complete."""
        path = Path(path)
        aside = path.with_name(f".{path.name}.part")
        path.parent.mkdir(parents=True, exist_ok=True)
        with aside.open("wb") as file:
            torch.save(checkpoint, file)
            os.fsync(file.fileno())
        try:
            torch.load(aside, weights_only=True, mmap=True, map_location="cpu")
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"checkpoint {str(path)!r}: got an object that weights_only=True cannot read again "
                f"({str(error).splitlines()[0]}); expected tensors, Python numbers and strings. Look for "
                "NumPy numbers among the optimiser's arguments, or objects in a callback's state."
            ) from error
        os.replace(aside, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, or raise a ``ValueError`` with the reason why it cannot be read."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch raises many kinds for broken files
            raise ValueError(
                f"checkpoint {str(path)!r}: got a file that cannot be read ({type(error).__name__}); "
                "expected a complete checkpoint of Lightning. The file was cut short, or is not a "
                "checkpoint: resume from latest_checkpoint(folder, module), which skips such files."
            ) from error


def latest_checkpoint(folder: str | os.PathLike[str], module: SVIModule) -> Path | None:
    """The newest complete checkpoint of this model, for ``trainer.fit(…, ckpt_path=…)``.

    Files are read from the newest to the oldest, with ``weights_only=True``. A file that is incomplete,
    damaged or of another model is skipped, with a warning that gives the reason.

    Args:
        folder: The folder of the checkpoints (``*.ckpt``); it may still be empty.
        module: The module that is going to be trained. It is not changed.

    Returns:
        The file; ``None`` if there is no checkpoint at all, and a new run begins.

    Raises:
        ValueError: There are checkpoints, but none is complete and of this model. A new run would overwrite
            them.
    """
    require(
        not Path(folder).is_file(),
        "argument 'folder'",
        f"the file {str(folder)!r}",
        "the folder where checkpoints are",
        "Pass a file to trainer.fit(…, ckpt_path=…) itself.",
    )
    # Each file once: last.ckpt is often a link, and its target may not exist for a moment.
    files = {path.resolve() for path in Path(folder).glob("*.ckpt") if path.is_file()}
    wrong = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            _check_checkpoint(path, module)
        except ValueError as error:
            wrong.append(f"{path.name}: {error}")
        else:
            for reason in wrong:
                warnings.warn(f"skipped {reason}", stacklevel=2)
            return path
    require(
        not wrong,
        "argument 'folder'",
        f"{str(folder)!r}, where no checkpoint can be used ({'; '.join(wrong)})",
        "a complete one of this model, or none",
        (
            "Put another copy of a checkpoint there, build the model with the arguments of the saved "
            "one, or train in another folder."
        ),
    )
    return None


def _check_checkpoint(path: Path, module: SVIModule) -> None:
    """Raise a ``ValueError`` if a file is not a complete checkpoint of a model like this one."""
    checkpoint = CheckpointFiles().load_checkpoint(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    require(
        damaged is None,
        f"checkpoint {str(path)!r}",
        f"a file whose part {damaged!r} is damaged",
        "a complete one",
        "Use another copy.",
    )
    require(
        isinstance(checkpoint, dict) and {"state_dict", "loops"} <= set(checkpoint),
        f"checkpoint {str(path)!r}",
        "a file without the state of a run",
        "one that Lightning wrote",
        "To load the weights of a model alone, call model.load(path).",
    )
    state = checkpoint["state_dict"]
    check_state_dict(module, state)
    for name, scope in module.named_modules():
        if isinstance(scope, ParamScope):
            scope.set_extra_state(state[f"{name}._extra_state"])
