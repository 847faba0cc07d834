r"""The cost of diffusion as a probabilistic program, compared with PyTorch code written by hand.

Every ratio compares two things that run in turn in the same process, without warm-up. For each of a few
repeats a row has our time divided by the other time, and the table has the median and range of these ratios.
"By hand" is a loss of ten lines that draws a timestep for each datum and weights the squared error as the
bound does. The small network has four linear layers and 165 thousand parameters, so that the cost of Python
is visible; its steps run on one thread and on two. The memory of a full bound is measured in a separate
process, as the peak above the memory before the bound.

    python benchmarks/speed.py [--device cuda] [--repeats 7] [--only step,sampling,bound,memory,scaling]
        [--smoke] [--output benchmarks/results]
"""

import argparse
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import matplotlib
import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import nn

from pyro_diffusion import (
    MLP,
    AncestralSampler,
    DiffusionModel,
    LinearSchedule,
    NeuralDenoiser,
    UNet,
    compile_elbo,
    elbo_terms,
    evaluate_bound,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

DIMENSION = 64
PARTS = ("step", "unet", "bound", "sampling", "memory", "scaling")
#: Figures from the issue that asked for this benchmark: the time of improved-diffusion's loop over the
#: bound's terms, divided by that of its network rows. It is not a package that can be installed and run here.
CALC_BPD_LOOP = (3.1, 3.9)


def main():
    args = parse_arguments()
    if args.measure_memory:
        return print(json.dumps(memory_of_bound(args)))
    rows = []
    if "step" in args.only:
        rows += steps(args)
    if "unet" in args.only:
        rows += unet_steps(args)
    if "bound" in args.only:
        rows += full_bound(args)
    if "sampling" in args.only:
        rows += sampling(args)
    if "memory" in args.only:
        rows += memory(args)
    scaling = cost_by_size(args) if "scaling" in args.only else {}
    report(rows, scaling, args)
    return None


class SmallNetwork(nn.Module):
    """Four linear layers, with the log-SNR as one more column: 165 thousand parameters for 64 entries."""

    def __init__(self, dimension=DIMENSION, width=256):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(dimension + 1, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, width), nn.SiLU(),
            nn.Linear(width, dimension),
        )  # fmt: skip

    def forward(self, x_t, log_snr):
        """The noise, from a state and its log-SNR."""
        return self.layers(torch.cat([x_t, log_snr[:, None] / 10], 1))


# Steps of training.


def small_steps(args):
    """A step of a network so small that the cost of Python is visible: on one thread, and on two."""
    rows = []
    for count in (1,) if args.smoke else (1, 2):
        with threads(count):
            pyro.clear_param_store()
            works = training_steps(SmallNetwork, (DIMENSION,), 128, args)
            # Many short repeats, so that another job on the machine disturbs only a few of them.
            times = interleaved(works, args, repeats=4 * args.repeats, seconds=args.seconds / 4)
            kind = f"small network, batch 128, {count} thread{'s' if count > 1 else ''}"
            svi, ours = f"`SVI` step, {kind}", f"`compile_elbo` step, {kind}"
            rows += [
                row(svi, "step by hand", times, "svi", "hand", 2.0),
                row(ours, "step by hand", times, "ours", "hand", 1.0),
                row(ours, "step by hand, compiled", times, "ours", "compiled", 1.05),
            ]
    return rows


@contextmanager
def threads(count):
    """Run and compile with a number of threads."""
    from torch._inductor import config

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with config.patch({"cpp.threads": count}):
        yield
    torch.set_num_threads(before)


def steps(args):
    """A step of an MLP: SVI, compiled, by hand, by hand compiled; batches of 128 and 2048."""
    rows = small_steps(args)
    targets = {128: 1.6} if args.smoke else {128: 1.6, 2048: 1.15}
    for batch, target in targets.items():
        pyro.clear_param_store()
        works = training_steps(lambda: MLP((DIMENSION,)), (DIMENSION,), batch, args)
        times = interleaved(works, args)
        kind = f"MLP, batch {batch}"
        rows.append(row(f"`SVI` step, {kind}", "step by hand", times, "svi", "hand", target))
        if batch == 128:
            rows += [
                row(f"`compile_elbo` step, {kind}", "step by hand", times, "ours", "hand", 0.95),
                row(f"`compile_elbo` step, {kind}", "step by hand, compiled", times, "ours", "compiled",
                    1.05),
            ]  # fmt: skip
    return rows


def unet_steps(args):
    """The same for a U-Net on images; on a GPU for larger images, in bfloat16."""
    side, batch = (28, 128) if on_gpu(args) else (16, 32)
    shape = (1, side, side)
    channels = (8, 16) if args.smoke else (32, 64)
    network = partial(UNet, shape, channels=channels, attention=(1,), layers_per_block=1)
    pyro.clear_param_store()
    times = interleaved(training_steps(network, shape, batch, args), args)
    kind = f"U-Net 1×{side}×{side}, batch {batch}" + (", bf16" if on_gpu(args) else "")
    return [
        row(f"`SVI` step, {kind}", "step by hand", times, "svi", "hand", 1.06),
        row(f"`compile_elbo` step, {kind}", "step by hand, compiled", times, "ours", "compiled",
            1.05 if on_gpu(args) else 1.03),
    ]  # fmt: skip


def training_steps(make_network, shape, batch, args):
    """Four versions of a step, each with its own network; all start from the same weights."""
    x_0 = torch.randn(batch, *shape, device=args.device)
    models = []
    for _ in range(4):
        pyro.set_rng_seed(0)
        schedule = LinearSchedule(1000).to(args.device)
        network = make_network().to(args.device)
        models.append(DiffusionModel(NeuralDenoiser(network, schedule, event_shape=shape)))
    pairs = [model.subsampled() for model in models]
    adam = pyro.optim.Adam({"lr": 1e-4})
    svi = SVI(pairs[0].model, pairs[0].guide, adam, TraceMeanField_ELBO())
    backend = None if args.smoke else "inductor"
    ours = compile_elbo(pairs[1].model, pairs[1].guide, TraceMeanField_ELBO(), backend=backend)
    hand, compiled = (by_hand(model) for model in models[2:])
    settings = {"backend": "eager"} if args.smoke else {}
    settings = {"mode": "reduce-overhead"} if on_gpu(args) else settings
    return {
        "svi": mixed(lambda: svi.step(x_0), args),
        "ours": mixed(plain_step(ours, ours.parameters(), x_0), args),
        "hand": mixed(plain_step(hand, models[2].parameters(), x_0), args),
        "compiled": mixed(
            plain_step(torch.compile(compiled, **settings), models[3].parameters(), x_0), args
        ),
    }


def by_hand(diffusion):
    """The loss as it is written without a package: tables, a draw, the network, a weighted square."""
    schedule, network = diffusion.schedule, diffusion.denoiser.network
    device = schedule.device
    log_snr = schedule.log_snr(torch.arange(1, 1001, device=device))
    weights = 0.5 * 1000 * torch.expm1((log_snr[:-1] - log_snr[1:]).clamp(max=20)).float()
    weights = torch.cat([weights[:1], weights])
    signal, noise = (scale.float() for scale in schedule.scales(log_snr))
    log_snr = log_snr.float()

    def loss(x_0):
        """Noise to a random timestep, and the weighted error of its prediction."""
        t = torch.randint(1000, (len(x_0),), device=device)
        padded = (len(x_0),) + (1,) * (x_0.dim() - 1)
        epsilon = torch.randn_like(x_0)
        x_t = signal[t].view(padded) * x_0 + noise[t].view(padded) * epsilon
        error = (network(x_t, log_snr[t]) - epsilon).square().flatten(1).sum(1)
        return (weights[t] * error).sum()

    return loss


def plain_step(loss, parameters, x_0):
    """A step with torch's own optimiser."""
    optimizer = torch.optim.Adam(parameters, lr=1e-4)

    def step():
        """Gradients and an update."""
        optimizer.zero_grad()
        loss(x_0).backward()
        optimizer.step()

    return step


def mixed(step, args):
    """On a GPU under bfloat16 autocast."""
    if not on_gpu(args):
        return step

    def run():
        """The step, in mixed precision."""
        with torch.autocast("cuda", dtype=torch.bfloat16):
            step()

    return run


# Evaluation and sampling.


def full_bound(args):
    """Every term of a T = 1000 bound, against its network rows in batches of 8,192."""
    diffusion = mlp_model(args)
    x_0 = torch.randn(args.num_data, DIMENSION, device=args.device)
    num_rows = args.num_data * diffusion.schedule.num_timesteps

    def bound():
        """One trajectory of each datum."""
        elbo_terms(diffusion.model, diffusion.posterior_guide, x_0, num_particles=1, progress=False)

    works = {"bound": bound, "rows": lambda: network_rows(diffusion, num_rows, 8192, args)}
    times = interleaved(works, args, calls=1)
    what = f"full bound, T = {diffusion.schedule.num_timesteps}, {args.num_data} data, MLP"
    full = row(what, "its network rows in batches of 8,192", times, "bound", "rows", 1.15)
    least, most = (ratio / full["ratio"] for ratio in CALC_BPD_LOOP)
    print(f"calc_bpd_loop, by the issue's figures, takes {least:.1f} to {most:.1f} times as long")
    return [full, *bounds_of_small_network(args)]


def bounds_of_small_network(args):
    """Two readers of the bound with a network whose rows cost little, each against its rows."""
    pyro.set_rng_seed(0)
    schedule = LinearSchedule(args.num_timesteps).to(args.device)
    network = SmallNetwork().to(args.device)
    diffusion = DiffusionModel(NeuralDenoiser(network, schedule, event_shape=(DIMENSION,)))
    x_0 = torch.randn(min(args.num_data, 128), DIMENSION, device=args.device)
    programs = diffusion.model, diffusion.posterior_guide
    # First with the fewest rows, then to the error that sixteen times as many rows have.
    loose = evaluate_bound(diffusion, x_0, standard_error=1e9).mean().monte_carlo_error

    def evaluated():
        """The mean bound to that error, with the same draws at every call."""
        pyro.set_rng_seed(1)
        return evaluate_bound(diffusion, x_0, standard_error=loose / 4)

    sizes = {"terms": len(x_0) * args.num_timesteps, "evaluated": evaluated().rows}
    works = {
        "terms": lambda: elbo_terms(*programs, x_0, num_particles=1, progress=False),
        "terms' rows": lambda: network_rows(diffusion, sizes["terms"], 8192, args),
        "evaluated": evaluated,
        "evaluated's rows": lambda: network_rows(diffusion, sizes["evaluated"], 8192, args),
    }
    times = interleaved(works, args, calls=1)
    kind = f"T = {args.num_timesteps}, {len(x_0)} data, small network"
    against = "its network rows in batches of 8,192"
    return [
        row(f"full bound, {kind}", against, times, "terms", "terms' rows", 1.2),
        row(f"`evaluate_bound`, {kind}", against, times, "evaluated", "evaluated's rows", 1.2),
    ]


def sampling(args):
    """T = 1000 ancestral steps, eager and compiled, and those of diffusers, against bare network calls."""
    diffusion = mlp_model(args)
    calls = diffusion.schedule.num_timesteps
    eager, compiled = AncestralSampler(diffusion), AncestralSampler(diffusion)
    compiled.compile(**({"backend": "eager"} if args.smoke else {}))
    works = {
        "eager": lambda: eager(128, progress=False),
        "compiled": lambda: compiled(128, progress=False),
        "program": lambda: diffusion.sample(128),
        "network": lambda: network_rows(diffusion, calls * 128, 128, args),
        "scheduler": diffusers_sampler(diffusion, calls, args),
    }
    works = {name: work for name, work in works.items() if work is not None}
    times = interleaved(works, args, calls=1)
    against = "its network calls, eager"
    rows = [
        row(f"ancestral sampling, T = {calls}, batch 128", against, times, "eager", "network", 1.20),
        row(f"the same, compiled, T = {calls}", against, times, "compiled", "network", 1.00),
        row("`diffusion.sample`, the program", against, times, "program", "network", None),
    ]  # fmt: skip
    if "scheduler" in works:
        rows.append(row("diffusers' `DDPMScheduler`", against, times, "scheduler", "network", None))
    return rows


def diffusers_sampler(diffusion, num_timesteps, args):
    """The loop of diffusers around the same network, or nothing if it is not installed."""
    try:
        from diffusers import DDPMScheduler
    except ImportError:
        print("diffusers: not installed, left out")
        return None
    scheduler = DDPMScheduler(num_timesteps, clip_sample=False)
    scheduler.set_timesteps(num_timesteps)
    network = diffusion.denoiser.network
    log_snr = (
        diffusion.schedule.log_snr(torch.arange(1, num_timesteps + 1, device=args.device))
        .float()
        .expand(128, -1)
        .T.contiguous()
    )

    @torch.no_grad()
    def sample():
        """As in the library's own guide."""
        x = torch.randn(128, DIMENSION, device=args.device)
        for t in scheduler.timesteps:
            x = scheduler.step(network(x, log_snr[t]), t, x).prev_sample

    return sample


@torch.no_grad()
def network_rows(diffusion, num_rows, batch, args):
    """The network alone on that many rows."""
    network = diffusion.denoiser.network.eval()
    x = torch.randn(batch, DIMENSION, device=args.device)
    log_snr = torch.zeros(batch, device=args.device)
    for start in range(0, num_rows, batch):
        size = min(batch, num_rows - start)
        network(x[:size], log_snr[:size])
    network.train()


def mlp_model(args, num_timesteps=None, dimension=DIMENSION, **network):
    """The model of most rows."""
    pyro.set_rng_seed(0)
    schedule = LinearSchedule(num_timesteps or args.num_timesteps).to(args.device)
    network = MLP((dimension,), **network).to(args.device)
    return DiffusionModel(NeuralDenoiser(network, schedule, event_shape=(dimension,)))


# Memory, and how costs grow.


def memory(args):
    """The peak of a full bound in a process of its own, by the network's smallest size."""
    command = [sys.executable, __file__, "--measure-memory", "--device", args.device]
    command += ["--smoke"] if args.smoke else []
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers = json.loads(result.stdout.splitlines()[-1])
    what = "memory of a full bound, T = {num_timesteps}, N = {num_data}, D = {dimension}"
    return [
        {
            "work": what.format(**numbers),
            "against": "1 GiB above the model",
            "ratio": numbers["peak_mib"] / 1024,
            "range": [numbers["peak_mib"] / 1024] * 2,
            "target": 1.0,
            "seconds": numbers["seconds"],
        }
    ]


def memory_of_bound(args):
    """Peak above the memory before; the network is small, because its memory is not to be measured."""
    num_timesteps, num_data, dimension = (20, 50, 784) if args.smoke else (1000, 10_000, 784)
    diffusion = mlp_model(args, num_timesteps, dimension, hidden_size=32, num_blocks=1)
    x_0 = torch.randn(num_data, dimension, device=args.device)
    programs = diffusion.model, diffusion.posterior_guide
    elbo_terms(*programs, x_0[:2], num_particles=1, progress=False)  # warm-up
    before, start = peak(args), time.perf_counter()
    elbo_terms(*programs, x_0, num_particles=1, progress=False)
    return {
        "num_timesteps": num_timesteps,
        "num_data": num_data,
        "dimension": dimension,
        "peak_mib": (peak(args) - before) / 2**20,
        "seconds": time.perf_counter() - start,
    }


def peak(args):
    """Peak memory of the process in bytes, on the device that is used."""
    if on_gpu(args):
        return torch.cuda.max_memory_allocated()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def cost_by_size(args):
    """Seconds of a full bound and of a training step, by length of the chain and number of data."""
    lengths, counts = ((10, 20), (8, 16)) if args.smoke else ((10, 100, 1000), (32, 128, 512))
    full = {}
    for num_timesteps in lengths:
        diffusion = mlp_model(args, num_timesteps)
        programs = diffusion.model, diffusion.posterior_guide
        for count in counts:
            x_0 = torch.randn(count, DIMENSION, device=args.device)
            work = partial(elbo_terms, *programs, x_0, num_particles=1, progress=False)
            full[f"{num_timesteps},{count}"] = min(interleaved({"": work}, args, calls=1)[""])
    step = {}
    for num_timesteps in (*lengths, 10 * lengths[-1]):
        pyro.clear_param_store()
        pair = mlp_model(args, num_timesteps).subsampled()
        svi = SVI(pair.model, pair.guide, pyro.optim.Adam({"lr": 1e-4}), TraceMeanField_ELBO())
        for count in counts:
            x_0 = torch.randn(count, DIMENSION, device=args.device)
            work = partial(svi.step, x_0)
            step[f"{num_timesteps},{count}"] = statistics.median(interleaved({"": work}, args)[""])
    return {"full_bound_seconds": full, "subsampled_step_seconds": step}


def plot_costs(scaling, path):
    """Seconds against T, a line for each number of data: full bound left, subsampled step right."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    titles = {
        "full_bound_seconds": "full bound: linear in T · N",
        "subsampled_step_seconds": "subsampled step: flat in T",
    }
    for ax, (key, title) in zip(axes, titles.items(), strict=True):
        points = {tuple(map(int, name.split(","))): s for name, s in scaling[key].items()}
        for i, count in enumerate(sorted({n for _, n in points})):
            line = sorted((t, seconds) for (t, n), seconds in points.items() if n == count)
            ax.loglog(*zip(*line, strict=True), "o-", color=f"C{i}", label=f"N = {count}")
        if key == "full_bound_seconds":
            (t, _), seconds = max(points.items())
            ends = sorted({t for t, _ in points})[:: len({t for t, _ in points}) - 1]
            ax.loglog(ends, [seconds * end / t for end in ends], "k:", label="slope 1")
        else:
            ax.set_ylim(min(points.values()) / 5, max(points.values()) * 5)
        ax.set(title=title, xlabel="number of timesteps T", ylabel="seconds")
        ax.legend(frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


# How things are timed, and what is written.


def interleaved(works, args, calls=None, repeats=None, seconds=None):
    """Seconds a call of each function, by repeat; the first calls of each are not counted."""
    for work in works.values():
        for _ in range(1 if calls or args.smoke else 10):
            timed(work, 1, args)
    if calls is None:
        longest = max(timed(work, 1 if args.smoke else 3, args) for work in works.values())
        calls = max(1, math.ceil((seconds or args.seconds) / longest))
    times = {name: [] for name in works}
    for _ in range(repeats or args.repeats):
        for name, work in works.items():
            times[name].append(timed(work, calls, args))
    return times


def timed(work, calls, args):
    """Mean seconds of a number of calls."""
    if on_gpu(args):
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        work()
    if on_gpu(args):
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def row(work, against, times, ours, other, target):
    """A line of the table: the ratio by repeat."""
    ratios = [a / b for a, b in zip(times[ours], times[other], strict=True)]
    line = {
        "work": work,
        "against": against,
        "ratio": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
        "middle_half": quartiles(ratios),
        "repeats": len(ratios),
        "threads": torch.get_num_threads(),
        "target": target,
        "seconds": statistics.median(times[ours]),
        "seconds_against": statistics.median(times[other]),
    }
    print(markdown(line), flush=True)
    return line


def quartiles(ratios):
    """The interval of the middle half."""
    first, _, third = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    return [first, third]


def markdown(line):
    """The line as one of the table."""
    reached = "–" if line["target"] is None else f"≤ {line['target']:.2f}"
    low, high = line["range"]
    spread = "" if low == high else f" ({low:.2f} to {high:.2f})"
    return f"| {line['work']} | {line['against']} | {line['ratio']:.2f}{spread} | {reached} |"


def on_gpu(args):
    """Whether works are asynchronous."""
    return args.device.startswith("cuda")


def processor():
    """Name of the processor, if the system reports it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def report(rows, scaling, args):
    """The table, and JSON with the machine and all that it takes to run it again."""
    print("\n| work | against | ratio, median (range) | target |\n|---|---|---|---|")
    for line in rows:
        print(markdown(line))
    args.output.mkdir(parents=True, exist_ok=True)
    suffix = "_cuda" if on_gpu(args) else ""
    path = args.output / f"speed{suffix}.json"
    before = json.loads(path.read_text()) if path.exists() else {"rows": []}
    ours = {(line["work"], line["against"]) for line in rows}
    kept = [line for line in before["rows"] if (line["work"], line["against"]) not in ours]
    numbers = {
        "rows": kept + rows,
        "scaling": scaling or before.get("scaling", {}),
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "processor": torch.cuda.get_device_name() if on_gpu(args) else processor(),
        "device": args.device,
    }
    aside = path.with_name(f".{path.name}.part")
    aside.write_text(json.dumps(numbers, indent=2, ensure_ascii=False) + "\n")
    os.replace(aside, path)
    print(f"\nwrote {path}")
    if scaling:
        plot_costs(scaling, args.output / f"speed{suffix}.png")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--only", default=",".join(PARTS), help="parts to run, by comma")
    parser.add_argument("--num-timesteps", type=int, help="of bounds and samplers; 1000 by default")
    parser.add_argument("--num-data", type=int, help="of bounds; 512 by default")
    parser.add_argument("--measure-memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.only = args.only.split(",")
    args.seconds = 0.01 if args.smoke else 1.0  # of a work in a repeat
    args.repeats = 1 if args.smoke else args.repeats
    size = (20, 16) if args.smoke else (1000, 512)
    args.num_timesteps, args.num_data = (
        given or usual
        for given, usual in zip((args.num_timesteps, args.num_data), size, strict=True)
    )
    return args


if __name__ == "__main__":
    main()
