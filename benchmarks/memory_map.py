r"""Training on data that are read from disk: memory and speed by the number of rows.

Rows of 64 whole numbers from 0 to 16, digits with noise, are written in chunks to a file, one byte a number.
The file is mapped (``np.load(path, mmap_mode="r")``), and a model is trained on it by ``ShuffledBatches``,
in a separate process for each number of rows. Anonymous memory (``RssAnon`` of /proc/self/status) is the
memory that a process allocates itself, without the pages of the file in the system's cache. It is first
measured after a tenth of the steps, when all permanent memory is allocated, and then at every hundredth step.

    python benchmarks/memory_map.py [--num-steps 3000] [--batch-size 256] [--seed 0] [--device cuda]
        [--smoke] [--output benchmarks/results]
"""

import argparse
import json
import multiprocessing
import os
import platform
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from pyro.infer import TraceMeanField_ELBO
from sklearn.datasets import load_digits

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    ShuffledBatches,
)

NUM_LEVELS, CHUNK = 17, 100_000


def main():
    args = parse_arguments()
    print(
        "| rows | file, MB | anonymous, MB | growth, MB | rows/s | of which reading | loss |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for num_rows in args.num_rows:
            path = Path(folder) / f"{num_rows}.npy"
            write_rows(path, num_rows, args.seed)
            with multiprocessing.get_context("spawn").Pool(1) as process:
                rows.append(process.apply(train, (path, args)))
            print(markdown(rows[-1]), flush=True)
            path.unlink()
    first, last = rows[0], rows[-1]
    more = last["anonymous_mb"] - first["anonymous_mb"]
    print(f"\n{last['rows']:,} rows take {more:+.1f} MB more than {first['rows']:,}")
    write(rows, args)


def write_rows(path, num_rows, seed):
    """Write digits with noise, one chunk at a time, so that only one chunk is in memory."""
    rng = np.random.default_rng(seed)
    digits = load_digits().data
    file = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=(num_rows, 64))
    for start in range(0, num_rows, CHUNK):
        x = digits[rng.integers(len(digits), size=min(CHUNK, num_rows - start))]
        file[start : start + CHUNK] = np.clip(np.rint(x + rng.normal(size=x.shape)), 0, 16)
    file.flush()


def train(path, args):
    """Train on a file, and return the memory and time used."""
    torch.manual_seed(args.seed)
    batches = ShuffledBatches(np.load(path, mmap_mode="r"), args.batch_size, seed=args.seed)
    denoiser = NeuralDenoiser(
        MLP((64,), hidden_size=64, num_blocks=1, num_outputs=NUM_LEVELS), LogSNRSchedule(1000), (64,),
        prediction=LevelPrediction(NUM_LEVELS),
    )  # fmt: skip
    pair = DiffusionModel(denoiser).to(args.device).subsampled()
    elbo = TraceMeanField_ELBO()(pair.model, pair.guide)
    optimizer = torch.optim.Adam(elbo.parameters(), lr=1e-3)
    memory, losses, reading = [], [], 0.0
    stream, start = endless(batches), time.perf_counter()
    for step in range(args.num_steps):
        before = time.perf_counter()
        x_0 = next(stream).to(args.device)
        reading += time.perf_counter() - before
        loss = elbo(x_0) / len(x_0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step >= args.num_steps // 10 and step % max(args.num_steps // 100, 1) == 0:
            memory.append(anonymous_mb())
    seconds = time.perf_counter() - start
    return {
        "rows": batches.num_data,
        "file_mb": path.stat().st_size / 1e6,
        "anonymous_mb": max(memory),
        "growth_mb": max(memory) - memory[0],
        "rows_per_second": args.num_steps * args.batch_size / seconds,
        "reading_share": reading / seconds,
        "loss": float(np.mean(losses[-args.num_steps // 10 :])),
        "seconds": round(seconds, 1),
    }


def endless(batches):
    while True:
        yield from batches


def anonymous_mb():
    """Anonymous resident memory of this process; Linux reports it in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024 / 1e6


def markdown(r):
    return (
        f"| {r['rows']:,} | {r['file_mb']:.0f} | {r['anonymous_mb']:.1f} | {r['growth_mb']:.1f} | "
        f"{r['rows_per_second']:,.0f} | {r['reading_share']:.0%} | {r['loss']:.1f} |"
    )


def write(rows, args):
    numbers = {
        "rows": rows,
        "num_steps": args.num_steps,
        "batch_size": args.batch_size,
        "seed": args.seed,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".memory_map.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "memory_map.json")
    print(f"wrote {args.output / 'memory_map.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-steps", type=int, default=3000)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_rows = (1_000, 20_000) if args.smoke else (100_000, 1_000_000, 10_000_000)
    if args.smoke:
        args.num_steps, args.batch_size = 40, 32
    return args


if __name__ == "__main__":
    main()
