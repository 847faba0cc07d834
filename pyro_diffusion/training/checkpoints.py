"""Checkpoints of a Lightning run: files that are written whole, and the newest one to continue from.

A run that is killed leaves a file cut short, if it was writing one. :class:`CheckpointFiles` writes a file
under another name and renames it when it is whole, so that an older checkpoint is never lost to a newer one.
:func:`latest_checkpoint` reads the files of a folder, from the newest to the oldest, and returns the first
that is whole and of the model that is going to be trained.
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
    """Lightning's checkpoint files, written under another name and renamed when they are whole.

    Use it as ``Trainer(plugins=[CheckpointFiles()])``. Without it a checkpoint is first written in the
    system's temporary folder. Where that is another file system, it is then copied over the older checkpoint,
    and a process that is killed meanwhile leaves neither.

    Raises:
        ValueError: From reading, a file that is cut short or no checkpoint.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None
    ) -> None:
        """Write a checkpoint. An older one of that name stays until this one is whole."""
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
                f"checkpoint {str(path)!r}: got something that weights_only=True would not read again "
                f"({str(error).splitlines()[0]}); expected tensors, Python's numbers and strings. Look for "
                "NumPy's numbers among the optimiser's arguments, or objects in a callback's state."
            ) from error
        os.replace(aside, path)

    def load_checkpoint(self, path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Read a checkpoint, or say why it cannot be read."""
        try:
            return super().load_checkpoint(path, *args, **kwargs)
        except FileNotFoundError:
            raise
        except Exception as error:  # torch has one for each way in which a file can be broken
            raise ValueError(
                f"checkpoint {str(path)!r}: got a file that cannot be read ({type(error).__name__}); "
                "expected a whole checkpoint of Lightning's. It was cut short, or is something else: "
                "resume from latest_checkpoint(folder, module), which passes over such files."
            ) from error


def latest_checkpoint(folder: str | os.PathLike[str], module: SVIModule) -> Path | None:
    """The newest whole checkpoint of this very model, for ``trainer.fit(…, ckpt_path=…)``.

    It looks at files from the newest to the oldest, and reads them with ``weights_only=True``. It passes over
    a file that is cut short, damaged or of another model, with a warning that says why.

    Args:
        folder: Where checkpoints (``*.ckpt``) are, or are going to be.
        module: The module that is going to be trained. It is not changed.

    Returns:
        The file, or ``None`` where there is no checkpoint at all and the run begins.

    Raises:
        ValueError: There are checkpoints, but none is whole and of this model. A new run would write over
            them.
    """
    require(
        not Path(folder).is_file(),
        "argument 'folder'",
        f"the file {str(folder)!r}",
        "the folder where checkpoints are",
        "Pass a file to trainer.fit(…, ckpt_path=…) itself.",
    )
    # Each file once: last.ckpt is often a link, and for a moment a link to nothing.
    files = {path.resolve() for path in Path(folder).glob("*.ckpt") if path.is_file()}
    wrong = []
    for path in sorted(files, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            _check_checkpoint(path, module)
        except ValueError as error:
            wrong.append(f"{path.name}: {error}")
        else:
            for reason in wrong:
                warnings.warn(f"passed over {reason}", stacklevel=2)
            return path
    require(
        not wrong,
        "argument 'folder'",
        f"{str(folder)!r}, where no checkpoint can be used ({'; '.join(wrong)})",
        "a whole one of this model, or none",
        (
            "Put another copy there, build the model with the arguments that it was saved with, or "
            "train in another folder."
        ),
    )
    return None


def _check_checkpoint(path: Path, module: SVIModule) -> None:
    """Raise a ``ValueError`` if a file is not a whole checkpoint of a model like this one."""
    checkpoint = CheckpointFiles().load_checkpoint(path, weights_only=True)
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    require(
        damaged is None,
        f"checkpoint {str(path)!r}",
        f"a file whose part {damaged!r} is damaged",
        "a whole one",
        "Use another copy.",
    )
    require(
        isinstance(checkpoint, dict) and {"state_dict", "loops"} <= set(checkpoint),
        f"checkpoint {str(path)!r}",
        "a file without the state of a run",
        "one that Lightning wrote",
        "Numbers of a model alone are loaded with model.load(path).",
    )
    state = checkpoint["state_dict"]
    check_state_dict(module, state)
    for name, scope in module.named_modules():
        if isinstance(scope, ParamScope):
            scope.set_extra_state(state[f"{name}._extra_state"])
