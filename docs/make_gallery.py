"""Run the examples and keep what the gallery shows: ``make gallery``, or

    python docs/make_gallery.py [NAME …] [--note "while other jobs ran"]

runs one example after another in a folder of its own, and writes to ``docs/gallery`` its picture
(``NAME.png``), what it printed (``NAME.txt``) and, for all of them, command, seconds and machine
(``gallery.json``). Without names all of them run, which takes some twenty minutes on two cores.
"""

import argparse
import io
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
GALLERY = ROOT / "docs/gallery"
#: The arguments of a run that takes a few minutes at most, and the picture that is shown of it.
RUNS = {
    "classify": ("--plot", "classify.png"),
    "diffusion_vs_hvae": ("--seeds 0 --steps 300 --num-timesteps 20", "levels.png"),
    "digits": ("", "samples.png"),
    "eight_schools": ("", "eight_schools.png"),
    "estimator_variance": ("", "estimator_variance.png"),
    "gaussian_oracle": ("", None),
    "guidance": ("", "guidance.png"),
    "latent_diffusion": ("", "latents.png"),
    "lecture": ("", None),
    "lightning_digits": ("", "denoised.png"),
    "inpainting": ("", "inpainting.png"),
    "inverse_problem": ("", "inverse_problem.png"),
    "noise_scale": ("", "noise_scale.png"),
    "poisson_counts": ("", "counts.png"),
    "proportions": ("", "proportions.png"),
    "scale_out": ("", None),
    "simulation_based_inference": ("--task two_moons", "posterior.png"),
    "two_moons": ("", "two_moons.png"),
}
BAR = re.compile(r"\|.*\| *\d+/\S+ \[|\x1b\[A")
WIDTH, LARGEST = 1000, 140_000  # of a picture, in pixels and in bytes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", default=list(RUNS), help="examples, without .py")
    parser.add_argument("--note", default="", help="what else the machine did")
    args = parser.parse_args()
    listing = GALLERY / "gallery.json"
    GALLERY.mkdir(exist_ok=True)
    found = json.loads(listing.read_text()) if listing.exists() else {}
    for name in args.names:
        found[name] = run(name, args.note)
        print(f"{name}: {found[name]['seconds']:.0f} s", flush=True)
        aside = listing.with_suffix(".part")
        aside.write_text(
            json.dumps(dict(sorted(found.items())), indent=2, ensure_ascii=False) + "\n"
        )
        os.replace(aside, listing)


def run(name, note):
    """Run an example as it would be from the repository; its entry of the list."""
    arguments, picture = RUNS[name]
    command = [sys.executable, str(ROOT / f"examples/{name}.py"), *arguments.split()]
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        seconds = time.perf_counter() - start
        if done.returncode:
            sys.exit(f"{name} failed:\n{done.stderr[-3000:]}")
        (GALLERY / f"{name}.txt").write_text(printed(done.stdout))
        if picture:
            keep(next(Path(folder).rglob(picture)), GALLERY / f"{name}.png")
    threads = torch.get_num_threads()
    machine = f"{threads} thread{'s' * (threads > 1)} of {processor()}, torch {torch.__version__}"
    return {
        "command": f"python examples/{name}.py {arguments}".strip(),
        "seconds": round(seconds, 1),
        "machine": f"{machine}, {note}" if note else machine,
        "picture": picture and f"{name}.png",
    }


def printed(text):
    """What an example printed, without the progress bars that Lightning prints as well."""
    lines = [line.rstrip() for line in text.splitlines() if not BAR.search(line)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip() + "\n"


def keep(source, target):
    """A copy of the picture, small enough to be committed."""
    image = Image.open(source).convert("RGB")
    for colours in (None, 256, 64, 32):
        if image.width > WIDTH:
            image = image.resize(
                (WIDTH, image.height * WIDTH // image.width), Image.Resampling.LANCZOS
            )
        kept = image if colours is None else image.quantize(colours)
        kept.save(written := io.BytesIO(), "png", optimize=True)
        if written.tell() <= LARGEST:
            break
    target.write_bytes(written.getvalue())


def processor():
    """The processor by name, where the system says it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


if __name__ == "__main__":
    main()
