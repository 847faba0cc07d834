r"""A diffusion model beside three hierarchical VAEs: the same training, bounds and evidence.

The four families are a VAE, a hierarchical VAE of three levels with a bottom-up encoder, a ladder VAE of
three levels, and a diffusion model that is trained at one random timestep per datum. They have about the same
number of parameters and see the same batches in the same order, so that each passes the same number of rows
through its network. The averaged weights with the best bound of the validation data are kept. Then held-out
data are read: the bound, the evidence by importance weights, ``arviz.compare``, and the bound by level.

The loop is written out with ``SVI``, and not with ``fit``, because the comparison needs the same batches for
all families and a warm-up of the KLs for the hierarchical VAEs, which ``fit`` does not have.

    python examples/diffusion_vs_hvae.py [--data FOLDER] [--device cuda] [--seeds 0 1 2]
        [--smoke] [--output outputs/diffusion_vs_hvae]

The data are the digits of scikit-learn (8×8 pixels, 17 grey levels). With ``--data FOLDER`` they are binary
images from an .npz file in that folder, with arrays ``train``, ``valid`` and ``test``.
"""

import argparse
import copy
import json
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm.auto import trange

from pyro_diffusion import (
    MLP,
    DiffusionModel,
    HierarchicalVAE,
    KLWarmup,
    LadderEncoder,
    LevelLikelihood,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    active_units,
    compare,
    elbo_terms,
    importance_evidence,
    plot_compare,
    plot_samples,
    to_arviz,
)
from pyro_diffusion.arviz_bridge import good_k

matplotlib.use("Agg")
import matplotlib.pyplot as plt

FAMILIES = ("VAE", "bottom-up", "ladder", "diffusion")
LATENTS = {"VAE": (32,), "bottom-up": (32, 16, 8), "ladder": (32, 16, 8)}
#: The best of a few that were tried on validation data (digits, seed 0).
OPTIMISER = {
    "VAE": {"lr": 5e-4, "weight_decay": 1.0, "dropout": 0.2},
    "bottom-up": {"lr": 1e-3, "weight_decay": 1.0, "dropout": 0.0},
    "ladder": {"lr": 1e-3, "weight_decay": 1.0, "dropout": 0.1},
    "diffusion": {"lr": 2e-3, "weight_decay": 2.0, "dropout": 0.4},
}
#: Share of the steps in which the weight of the hierarchical VAEs' KLs rises from 0 to 1.
WARMUP = 0.2


class Images(NamedTuple):
    train: Tensor
    validation: Tensor
    held_out: Tensor
    num_levels: int
    side: int


def main():
    args = parse_arguments()
    data = load_data(args)
    runs = []
    for seed in args.seeds:
        for name in FAMILIES:
            runs.append(run(name, data, seed, args))
            print_run(runs[-1])
    first = {r["family"]: r for r in runs if r["seed"] == args.seeds[0]}
    table = compare({name: r["evidence"] for name, r in first.items()})
    report(runs, table, first, data)
    paths = write(args, runs, table, first, data)
    print("\nwrote " + "\n      ".join(map(str, paths)))


def run(name, data, seed, args):
    """Build, fit and read one family."""
    pyro.set_rng_seed(seed)
    family = match_size(name, data, args).to(args.device)
    start = time.perf_counter()
    family, steps = fit(name, family, data, seed, args)
    fitted = time.perf_counter()
    guide = getattr(family, "posterior_guide", family.guide)
    terms = elbo_terms(family.model, guide, data.held_out, num_particles=16)
    evidence = importance_evidence(
        family.model, guide, data.held_out, num_particles=args.num_particles
    )
    return {
        "family": name,
        "seed": seed,
        "model": family,
        "parameters": num_parameters(family),
        "steps": steps,
        "seconds": fitted - start,
        "seconds_to_read": time.perf_counter() - fitted,
        "terms": terms,
        "evidence": evidence,
    }


def build(name, data, hidden_size, args):
    """A family whose layers are ``hidden_size`` wide."""
    size, levels, dropout = data.side**2, data.num_levels, OPTIMISER[name]["dropout"]
    if name == "diffusion":
        network = MLP(
            (size,), hidden_size=hidden_size, num_blocks=3, dropout=dropout, num_outputs=levels
        )
        schedule = LogSNRSchedule(args.num_timesteps, log_snr_max=4.0, log_snr_min=-8.0)
        denoiser = NeuralDenoiser(
            network, schedule, (size,), prediction=LevelPrediction(levels), variance=PosteriorVariance()
        )  # fmt: skip
        return DiffusionModel(denoiser)
    settings = {"hidden_size": hidden_size, "dropout": dropout}
    encoder = LadderEncoder((size,), LATENTS[name], **settings) if name == "ladder" else None
    return HierarchicalVAE(
        (size,), LATENTS[name], LevelLikelihood(levels), encoder=encoder, **settings
    )


def match_size(name, data, args):
    """A family of the largest width with no more parameters than the diffusion model has."""
    wanted = num_parameters(build("diffusion", data, args.hidden_size, args))
    low, high = 8, 2048
    while high - low > 1:
        middle = (low + high) // 2
        fits = num_parameters(build(name, data, middle, args)) <= wanted
        low, high = (middle, high) if fits else (low, middle)
    return build(name, data, low, args)


def num_parameters(family):
    return sum(p.numel() for p in family.parameters())


def fit(name, family, data, seed, args):
    """SVI, with a warm-up of the KLs. Returns the averaged weights with the best validation bound."""
    pair = family.subsampled() if name == "diffusion" else family
    elbo = Trace_ELBO() if name == "bottom-up" else TraceMeanField_ELBO()
    settings = {key: OPTIMISER[name][key] for key in ("lr", "weight_decay")}
    optim = pyro.optim.CosineAnnealingLR(
        {
            "optimizer": torch.optim.AdamW,
            "optim_args": {"betas": (0.9, 0.99), **settings},
            "T_max": args.num_steps,
        }
    )
    svi = SVI(pair.model, pair.guide, optim, elbo)
    average = AveragedModel(family, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    batches = torch.Generator().manual_seed(seed)  # the same for every family
    best, best_bound, best_step = None, -math.inf, 0
    order = torch.empty(0, dtype=torch.long)
    for step in trange(args.num_steps, desc=name, unit="step", leave=False):
        if len(order) < args.batch_size:
            order = torch.randperm(len(data.train), generator=batches)
        rows, order = order[: args.batch_size], order[args.batch_size :]
        warm = 1.0 if name == "diffusion" else min(1.0, (step + 1) / (WARMUP * args.num_steps))
        family.train()
        with KLWarmup(warm):
            svi.step(data.train[rows.to(data.train.device)])
        average.update_parameters(family)
        optim.step()
        if (step + 1) % args.check_every == 0:
            bound = quick_bound(name, average.module, data.validation)
            if bound > best_bound:
                best, best_bound, best_step = copy.deepcopy(average.module), bound, step + 1
    return best.eval(), best_step


@torch.no_grad()
def quick_bound(name, family, x_0):
    """The bound of validation data, with the same noise at every check."""
    family.eval()
    pair = family.subsampled(num_timesteps=20) if name == "diffusion" else family
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return -Trace_ELBO(num_particles=4).loss(pair.model, pair.guide, x_0)


def print_run(r):
    print(
        f"seed {r['seed']}  {r['family']:10s} {r['parameters']:9,d} parameters  best at step "
        f"{r['steps']:6d}  {r['seconds']:5.0f} s to fit  -ELBO {-r['terms'].mean().value:8.3f}",
        flush=True,
    )


def report(runs, table, first, data):
    """The table over seeds, ArviZ's comparison, and the bound level by level."""
    print(f"\nheld out, nats per datum; mean over {len({r['seed'] for r in runs})} seed(s)")
    print(
        f"{'family':10s} {'parameters':>10s} {'-ELBO':>9s} {'± MC':>6s} {'± sampling':>10s} "
        f"{'± seeds':>8s} {'bits/dim':>8s} {'-evidence':>9s} {'± MC':>6s} {'bad k':>8s} "
        f"{'ESS':>6s} {'fit, s':>6s} {'read, s':>7s}"
    )
    for name in FAMILIES:
        print(row(name, [r for r in runs if r["family"] == name]))
    print(
        f"\narviz.compare, seed {next(iter(first.values()))['seed']}, sums over {len(data.held_out)} data"
    )
    print(
        table.drop(columns=["p_loo", "scale", "warning"], errors="ignore").to_string(
            float_format="%.2f"
        )
    )
    for name, r in first.items():
        print(f"\n{name}: terms, nats per datum")
        print(r["terms"].table())
        if name != "diffusion":
            units = active_units(r["model"].guide, data.held_out)
            counts = (f"{site} {int(on.sum())} of {on.numel()}" for site, on in units.items())
            print("active units: " + ", ".join(counts))


def row(name, same):
    """Means over seeds of values and of their errors. The spread over seeds is a column of its own."""
    bounds = [r["terms"].mean() for r in same]
    evidence = [r["evidence"].mean() for r in same]
    bits = np.mean([r["terms"].bits_per_dim().value for r in same])
    values = np.array([b.value for b in bounds])
    unreliable = np.mean([bad_k(r["evidence"]).double().mean().item() for r in same])
    error = np.mean([e.monte_carlo_error for e in evidence])
    # An error that rests on a handful of weights means nothing.
    error = f"{error:6.3f}" if unreliable < 0.5 else "     –"
    ess = np.mean([r["evidence"].ess.median().item() for r in same])
    return (
        f"{name:10s} {same[0]['parameters']:10,d} {-values.mean():9.3f} "
        f"{np.mean([b.monte_carlo_error for b in bounds]):6.3f} "
        f"{np.mean([b.sampling_error for b in bounds]):10.3f} "
        f"{(values.std(ddof=1) if len(values) > 1 else math.nan):8.3f} {bits:8.4f} "
        f"{-np.mean([e.value for e in evidence]):9.3f} "
        f"{error} {unreliable:8.0%} {ess:6.1f} "
        f"{np.mean([r['seconds'] for r in same]):6.0f} "
        f"{np.mean([r['seconds_to_read'] for r in same]):7.0f}"
    )


def bad_k(evidence):
    """Data whose Pareto k is too large for the number of particles."""
    return evidence.pareto_k >= good_k(evidence.num_particles)


def write(args, runs, table, first, data):
    """Write pictures, numbers and draws, each under another name first: no file is half written."""
    args.output.mkdir(parents=True, exist_ok=True)
    numbers = [summary(r) for r in runs]
    writers = {
        "result.json": lambda path: path.write_text(json.dumps(numbers, indent=2) + "\n"),
        "compare.csv": lambda path: table.to_csv(path),
        "compare.png": lambda path: save(plot_compare(table), path),
        "levels.png": lambda path: plot_levels(first, path),
        "samples.png": lambda path: plot_all_samples(first, data, path),
    }
    shown = data.held_out[: args.num_written]
    for name, r in first.items():
        draws = to_arviz(r["model"], shown, num_draws=args.num_particles, progress=False)
        writers[f"{name}.nc"] = draws.to_netcdf
        writers[f"{name}.pt"] = r["model"].save
    for name, writer in writers.items():
        aside = args.output / f".part.{name}"
        writer(aside)
        os.replace(aside, args.output / name)
    return [args.output / name for name in writers]


def summary(r):
    keys = ("family", "seed", "parameters", "steps", "seconds", "seconds_to_read")
    k = r["evidence"].pareto_k
    return {key: r[key] for key in keys} | {
        "elbo": r["terms"].mean()._asdict(),
        "bits_per_dim": r["terms"].bits_per_dim()._asdict(),
        "evidence": r["evidence"].mean()._asdict(),
        "median_k": k.median().item(),
        "share_of_bad_k": bad_k(r["evidence"]).double().mean().item(),
        "median_ess": r["evidence"].ess.median().item(),
    }


def plot_levels(first, path):
    """KL by level of the ladder beside KL by timestep of the diffusion model."""
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    ladder, diffusion = (
        np.array(first[name]["terms"].term_means()[1:]) for name in ("ladder", "diffusion")
    )
    t = np.arange(1, len(ladder) + 1)
    axes[0].bar(t, ladder[:, 0], yerr=ladder[:, 2], color="C0")
    axes[0].set(
        xticks=t,
        xlabel="level $t$",
        ylabel="KL at $h_t$, nats",
        title=f"ladder, sum {ladder[:, 0].sum():.1f}",
    )
    t = np.arange(1, len(diffusion) + 1)
    axes[1].errorbar(t, diffusion[:, 0], diffusion[:, 2], fmt=".-", ms=3, lw=0.8, color="C1")
    title = f"diffusion, sum {diffusion[:, 0].sum():.1f}"
    axes[1].set(xlabel="timestep $t$", ylabel="KL at $x_t$, nats", yscale="log", title=title)
    fig.savefig(path, dpi=120, format="png")


def plot_all_samples(first, data, path):
    """Samples of every family, and data, on one scale."""
    fig, axes = plt.subplots(
        1, len(first) + 1, figsize=(3 * len(first) + 3, 3.3), layout="constrained"
    )
    images = {name: r["model"].sample(36) for name, r in first.items()} | {
        "data": data.held_out[:36]
    }
    for ax, (name, x) in zip(axes, images.items(), strict=True):
        plot_samples(x.reshape(-1, data.side, data.side), axes=ax)
        ax.set_title(name)
    fig.savefig(path, dpi=120, format="png")


def save(ax, path):
    ax.figure.savefig(path, dpi=120, format="png", bbox_inches="tight")


def load_data(args):
    """The digits, split by class, or binary images from an .npz file, with its test images shuffled."""
    if args.data is None:
        x, label = load_digits(return_X_y=True)
        x = torch.tensor(x, dtype=torch.float32)
        rest, held_out, label, _ = train_test_split(
            x, label, test_size=360, stratify=label, random_state=0
        )
        train, validation = train_test_split(rest, test_size=180, stratify=label, random_state=0)
        levels = 17
    else:
        path = args.data if args.data.suffix == ".npz" else next(args.data.glob("*.npz"))
        with np.load(path) as file:
            train, validation, held_out = (
                torch.tensor(file[part], dtype=torch.float32).flatten(1)
                for part in ("train", "valid", "test")
            )
        shuffle = torch.randperm(len(held_out), generator=torch.Generator().manual_seed(0))
        held_out, validation, levels = held_out[shuffle[:500]], validation[:500], 2
    if args.smoke:
        train, validation, held_out = train[:64], validation[:16], held_out[:12]
    parts = (part.to(args.device) for part in (train, validation, held_out))
    return Images(*parts, levels, math.isqrt(train.shape[1]))


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of binary images; the digits by default")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--seed", type=int, help="one seed alone")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--num-timesteps", type=int, default=100)
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/diffusion_vs_hvae"))
    args = parser.parse_args()
    args.seeds = args.seeds if args.seed is None else [args.seed]
    args.num_steps = 6 if args.smoke else args.steps
    args.check_every = 3 if args.smoke else 100
    args.batch_size = 32 if args.smoke else 256
    args.hidden_size = 32 if args.smoke else 256
    args.num_particles = 25 if args.smoke else 100
    args.num_written = 4 if args.smoke else 16
    if args.smoke:
        args.num_timesteps, args.seeds = 10, args.seeds[:1]
    return args


if __name__ == "__main__":
    main()
