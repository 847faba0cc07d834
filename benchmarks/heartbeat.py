r"""The binary heartbeat of Sohl-Dickstein et al. (2015): the bound that SVI reaches, and the best bound.

The data are sequences of 20 bits with a one in every fifth bin. There are five of them, equally likely, so
that log p = −log2 5 = −2.322 bits. One network is fitted by SVI to the continuous chain and evaluated at
T = 200 and T = 1000. It is compared with ``EnumeratedDenoiser``, which has the best bound of all reverse
kernels that treat bits independently. That bound is computed exactly, as a sum: the bins of one phase are
exchangeable, so that a state is the number of ones in each phase, one of 5⁵. The bound of the network is this
sum minus the mean difference of the two bounds under the same draws of ``subsampled()``. The difference has
far less noise than the draws themselves (``plain`` in the JSON). Errors come from the spread of independent
draws.

    python benchmarks/heartbeat.py [--seed 0] [--device cuda] [--smoke] [--output benchmarks/results]

References:
    Deep Unsupervised Learning using Nonequilibrium Thermodynamics (Sohl-Dickstein et al., 2015), section 3.1.
    https://arxiv.org/abs/1503.03585
"""

import argparse
import itertools
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any

import pyro
import torch
from pyro.infer import SVI, TraceMeanField_ELBO
from torch import Tensor
from torch.distributions import kl_divergence
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from pyro_diffusion import (
    MLP,
    BernoulliDiffusion,
    EnumeratedDenoiser,
    LinearDecaySchedule,
    NeuralBernoulliDenoiser,
)
from pyro_diffusion.chains import Steps

HEARTBEATS = torch.eye(5).repeat(1, 4)
LENGTHS = (200, 1000)
HIDDEN_SIZE, NUM_BLOCKS = 128, 2
LEARNING_RATE, EMA_DECAY = 4e-3, 0.999
TRAIN_COPIES, TRAIN_DRAWS = 50, 4  # of each sequence in a batch; of a timestep for each row
READ_COPIES, READ_DRAWS = 400, 10


def main() -> None:
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    schedule = LinearDecaySchedule().to(args.device)
    start = time.process_time()
    fitted = fit(schedule, args)
    fit_seconds = time.process_time() - start
    best = BernoulliDiffusion(EnumeratedDenoiser(HEARTBEATS.double().to(args.device), schedule))
    print(
        "| T | bound | best | ± (Monte Carlo) | best − bound | heartbeats among samples | CPU seconds |\n"
        "|---|---|---|---|---|---|---|"
    )
    rows = []
    for length in args.lengths:
        rows.append(row(*(d.with_num_timesteps(length) for d in (fitted, best)), args))
        print(markdown(rows[-1]), flush=True)
    print(f"\nbits/sequence; log p is {-math.log2(5):.4f}. {fit_seconds:.0f} CPU seconds to fit")
    write(rows, fitted, fit_seconds, args)


def fit(schedule: LinearDecaySchedule, args: argparse.Namespace) -> BernoulliDiffusion:
    """Plain SVI on the continuous pair; returns the average of the weights."""
    network = MLP((20,), hidden_size=HIDDEN_SIZE, num_blocks=NUM_BLOCKS).to(args.device)
    diffusion = BernoulliDiffusion(NeuralBernoulliDenoiser(network, schedule, event_shape=(20,)))
    average = AveragedModel(diffusion, multi_avg_fn=get_ema_multi_avg_fn(EMA_DECAY))
    settings = {"optimizer": torch.optim.Adam, "optim_args": {"lr": LEARNING_RATE}}
    optim = pyro.optim.CosineAnnealingLR(settings | {"T_max": args.num_steps})
    pair = diffusion.continuous(num_timesteps=TRAIN_DRAWS)
    svi = SVI(pair.model, pair.guide, optim, TraceMeanField_ELBO())
    batch = HEARTBEATS.repeat(TRAIN_COPIES, 1).to(args.device)
    for _ in range(args.num_steps):
        svi.step(batch)
        optim.step()
        average.update_parameters(diffusion)
    return average.module.eval().double()


@torch.no_grad()
def row(
    fitted: BernoulliDiffusion, best: BernoulliDiffusion, args: argparse.Namespace
) -> dict[str, Any]:
    """The network's bound and the best one, and the share of heartbeats among samples."""
    start = time.process_time()
    exact = enumerated_bound(best)
    draws = torch.tensor(
        [[draw(d, seed, args) for d in (fitted, best)] for seed in range(args.num_repeats)]
    )
    gap = draws[:, 1] - draws[:, 0]
    samples = fitted.sample(args.num_samples)
    of_data = (samples[:, None] == HEARTBEATS.to(samples)).all(-1).any(-1)
    return {
        "num_timesteps": fitted.schedule.num_timesteps,
        "bits": exact - gap.mean().item(),
        "standard_error": standard_error(gap),
        "best_bits": exact,
        "gap": gap.mean().item(),
        "plain": {
            name: {"bits": values.mean().item(), "standard_error": standard_error(values)}
            for name, values in zip(("network", "best"), draws.T, strict=True)
        },
        "heartbeats_among_samples": of_data.double().mean().item(),
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def draw(diffusion: BernoulliDiffusion, seed: int, args: argparse.Namespace) -> float:
    """An unbiased draw of the bound in bits; a seed gives models of one schedule and dtype the same noise."""
    pyro.set_rng_seed(seed)
    pair = diffusion.subsampled(num_timesteps=READ_DRAWS)
    batch = HEARTBEATS.repeat(args.read_copies, 1).to(args.device, diffusion.dtype)
    return -TraceMeanField_ELBO().loss(pair.model, pair.guide, batch) / len(batch) / math.log(2)


def enumerated_bound(diffusion: BernoulliDiffusion) -> float:
    """The bound of the best denoiser, in bits: the sum over all states of every timestep."""
    x_0 = HEARTBEATS[0].to(diffusion.device, diffusion.dtype)
    counts = torch.tensor(list(itertools.product(range(5), repeat=5)), device=x_0.device)
    states = (torch.arange(4, device=x_0.device)[:, None] < counts[:, None]).flatten(1).to(x_0)
    arrangements = torch.tensor([math.comb(4, k) for k in range(5)]).to(x_0)[counts].prod(1)
    bound = -kl_divergence(
        diffusion.process.marginal(x_0, diffusion.schedule.num_timesteps), diffusion.prior()
    )
    for t in range(1, diffusion.schedule.num_timesteps + 1):
        share = arrangements * diffusion.process.marginal(x_0, t).log_prob(states).exp()
        reverse, likelihood = Steps(diffusion.schedule.num_timesteps).pair(
            diffusion, states, torch.tensor(t)
        )
        if t == 1:
            terms = likelihood.log_prob(x_0)
        else:
            terms = -kl_divergence(diffusion.process.posterior(states, x_0, t), reverse)
        bound += (share * terms).sum()
    return bound.item() / math.log(2)


def standard_error(draws: Tensor) -> float:
    return (draws.std() / len(draws) ** 0.5).item()


def markdown(r: dict[str, Any]) -> str:
    return (
        f"| {r['num_timesteps']} | {r['bits']:.4f} | {r['best_bits']:.4f} | {r['standard_error']:.4f} | "
        f"{r['gap']:.4f} | {100 * r['heartbeats_among_samples']:.1f} % | {r['cpu_seconds']:.0f} |"
    )


def write(
    rows: list[dict[str, Any]],
    fitted: BernoulliDiffusion,
    fit_seconds: float,
    args: argparse.Namespace,
) -> None:
    numbers = {
        "rows": rows,
        "log_p_bits": -math.log2(5),
        "schedule": repr(fitted.schedule),
        "trained_with": f"continuous(num_timesteps={TRAIN_DRAWS})",
        "steps": args.num_steps,
        "batch": len(HEARTBEATS) * TRAIN_COPIES,
        "learning_rate": f"{LEARNING_RATE}, cosine to zero",
        "ema_decay": EMA_DECAY,
        "parameters": sum(p.numel() for p in fitted.parameters()),
        "hidden_size": HIDDEN_SIZE,
        "num_blocks": NUM_BLOCKS,
        "fit_cpu_seconds": round(fit_seconds, 1),
        "read_rows": len(HEARTBEATS) * args.read_copies,
        "read_timesteps": READ_DRAWS,
        "read_repeats": args.num_repeats,
        "num_samples": args.num_samples,
        "dequantisation": None,
        "seed": args.seed,
        "smoke": args.smoke,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".heartbeat.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "heartbeat.json")
    print(f"\nwrote {args.output / 'heartbeat.json'}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    args.num_steps, args.num_repeats, args.num_samples = (
        (20, 2, 20) if args.smoke else (5000, 12, 500)
    )
    args.lengths, args.read_copies = ((5, 10), 10) if args.smoke else (LENGTHS, READ_COPIES)
    return args


if __name__ == "__main__":
    main()
