r"""The cost of importance weights, compared with the network rows that they need.

``importance_evidence`` with K = 1,000 trajectories of a T = 20 chain for 500 data needs 10⁷ rows of the
network. These rows are also timed alone, at the batch size at which they are fastest. Both are run in turn.
Memory is the peak above the memory of the process before the first run. The benchmark also measures the time
to convert draws to ArviZ's schema, and to write the states of the kept timesteps as netCDF.

    python benchmarks/evidence.py [--device cuda] [--repeats 2] [--smoke] [--output benchmarks/results]
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
import time
from pathlib import Path

import pyro
import torch

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    LogSNRSchedule,
    NeuralDenoiser,
    arviz_bridge,
    importance_evidence,
    to_arviz,
)

DIMENSION, NUM_TIMESTEPS = 64, 20
BATCH_SIZES = (256, 512, 1024, 2048, 4096, 8192)


def main():
    args = parse_arguments()
    pyro.set_rng_seed(0)
    network = MLP((DIMENSION,)).to(args.device)
    schedule = LogSNRSchedule(NUM_TIMESTEPS).to(args.device)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, (DIMENSION,)))
    x_0 = torch.randn(args.num_data, DIMENSION, device=args.device)
    rows = args.num_particles * args.num_data * NUM_TIMESTEPS

    estimate(diffusion, x_0[:10], 25)  # warm-up
    before = peak_memory()
    weights = [timed(lambda: estimate(diffusion, x_0, args.num_particles), args)]
    memory = peak_memory() - before
    probe = {
        size: timed(lambda n=size: call(network, rows // 50, n, args), args) for size in BATCH_SIZES
    }
    fastest = min(probe, key=probe.get)
    alone = [timed(lambda: call(network, rows, fastest, args), args)]
    for _ in range(args.repeats - 1):
        weights.append(timed(lambda: estimate(diffusion, x_0, args.num_particles), args))
        alone.append(timed(lambda: call(network, rows, fastest, args), args))
    converted, written, size = conversion(diffusion, x_0, args)
    report(
        {
            "rows": rows,
            "evidence_seconds": weights,
            "network_seconds": alone,
            "fastest_batch_size": fastest,
            "ratios": [a / b for a, b in zip(weights, alone, strict=True)],
            "peak_memory_mib": memory / 2**20,
            "arviz": {
                "conversion_seconds": converted,
                "netcdf_seconds": written,
                "netcdf_mib": size,
            },
        },
        args,
    )


def estimate(diffusion, x_0, num_particles):
    importance_evidence(
        diffusion.model, diffusion.guide, x_0, num_particles=num_particles, progress=False
    )


@torch.no_grad()
def call(network, rows, batch_size, args):
    """Evaluate the network alone on a number of rows."""
    network.eval()
    x, log_snr = (
        torch.randn(batch_size, DIMENSION, device=args.device),
        torch.zeros(batch_size, device=args.device),
    )
    for _ in range(rows // batch_size):
        network(x, log_snr)


def conversion(diffusion, x_0, args):
    """Seconds to convert existing draws to the schema, and to write them; MiB written."""
    draws = to_arviz(
        diffusion, x_0, num_draws=args.num_draws, timesteps=[1, 10, 20], progress=False
    )
    names = draws.groups() if callable(draws.groups) else list(draws.children)
    groups = {
        name: draws[name] if callable(draws.groups) else draws[name].to_dataset() for name in names
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "draws.nc"
        start = time.perf_counter()
        tree = arviz_bridge.as_arviz(groups)
        converted = time.perf_counter()
        # ArviZ 0.23 compresses by default, which takes most of its time; a DataTree does not.
        tree.to_netcdf(path, **({"compress": False} if hasattr(tree, "extend") else {}))
        written = time.perf_counter()
        return converted - start, written - converted, path.stat().st_size / 2**20


def timed(work, args):
    start = time.perf_counter()
    work()
    if args.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory():
    """Peak memory of the process in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def report(numbers, args):
    """Print the table, and write JSON with all that is needed to run it again."""
    medians = {
        key: statistics.median(numbers[key])
        for key in ("evidence_seconds", "network_seconds", "ratios")
    }
    spread = f"{min(numbers['ratios']):.2f} to {max(numbers['ratios']):.2f}"
    arviz = numbers["arviz"]
    alone = f"{numbers['rows']:.0e} network rows alone, batches of {numbers['fastest_batch_size']}"
    trajectories = f"{args.num_particles} × {args.num_data} trajectories of {NUM_TIMESTEPS} steps"
    table = {
        alone: f"{medians['network_seconds']:.1f} s",
        f"`importance_evidence`, {trajectories}": f"{medians['evidence_seconds']:.1f} s",
        f"ratio, median (range of {args.repeats})": f"{medians['ratios']:.2f} ({spread})",
        "peak memory above the model": f"{numbers['peak_memory_mib']:.0f} MiB",
        f"conversion of {args.num_draws} draws, 3 kept timesteps": f"{arviz['conversion_seconds']:.2f} s",
        f"netCDF of them, {arviz['netcdf_mib']:.0f} MiB, not compressed": f"{arviz['netcdf_seconds']:.2f} s",
    }
    print("\n| what | measured |\n|---|---|")
    for what, measured in table.items():
        print(f"| {what} | {measured} |")
    protocol = {
        "num_particles": args.num_particles,
        "num_data": args.num_data,
        "num_timesteps": NUM_TIMESTEPS,
        "dimension": DIMENSION,
        "network": "MLP, 4 blocks of 256",
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": platform.processor() or platform.machine(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".evidence.json.part"
    aside.write_text(json.dumps(protocol | numbers, indent=2) + "\n")
    os.replace(aside, args.output / "evidence.json")
    print(f"\nwrote {args.output / 'evidence.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_particles, args.num_data = (50, 40) if args.smoke else (1_000, 500)
    args.num_draws = 25 if args.smoke else 100
    return args


if __name__ == "__main__":
    main()
