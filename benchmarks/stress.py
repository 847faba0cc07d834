r"""A thousand seeded fits of tiny models, which should give no NaN and never hang.

The seed of a fit determines everything else: family, schedule, length of the chain, prediction, variance,
likelihood, transform, shape and scale of the data, gaps, programs, ELBO, optimiser, dtype. A fit takes 25
steps of SVI; then its bound and samples are computed. A fit is

- "fine" if every loss, every parameter, the bound, its standard error and all samples are finite, and the
  samples have the data's shape and the dtype of the chain;
- "refused" if a ``ValueError`` explains which settings cannot be combined;
- "wrong" if a number is not finite, or a shape or dtype another; "broken" if there was any other exception;
  "hang" if it took longer than ``--limit`` seconds.

The last three are printed with seed and configuration, and the exit status is 1 if there are any.
``--seed S --num-fits 1`` runs one of them again.

    python benchmarks/stress.py [--num-fits 1000] [--seed 0] [--limit 60] [--device cuda] [--smoke]
        [--output benchmarks/results]
"""

import argparse
import collections
import dataclasses
import json
import os
import platform
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pyro
import torch
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import ExpTransform, SigmoidTransform

import pyro_diffusion as pd

NUM_STEPS, NUM_DATA, HIDDEN_SIZE = 25, 64, 16
SHAPES = [(), (1,), (2,), (3,), (16,), (2, 2), (1, 3, 3), (4, 4)]
LEVELS = [2, 3, 17, 256]
OPTIMISERS = ["Adam", "AdamW", "ClippedAdam", "RMSprop"]
FREE = {"none", "gaussian"}  # likelihoods of real numbers


@dataclasses.dataclass
class Configuration:
    """The settings of a fit, as words and numbers."""

    seed: int
    family: str
    shape: tuple[int, ...]  # of a datum
    num_levels: int
    batch: int
    scale: float  # of real data
    dtype: str
    likelihood: str
    prediction: str
    variance: str
    transform: str
    schedule: str
    exploding: bool
    num_timesteps: int
    log_snr_max: float
    log_snr_min: float
    latent_sizes: tuple[int, ...]
    encoder: str
    pair: str
    num_draws: int
    timesteps: str
    mask: bool
    elbo: str
    warmup: bool
    optimiser: str
    lr: float

    @property
    def real(self):
        """Whether data are real numbers, which have a density."""
        return self.likelihood in FREE and self.prediction != "levels" and self.family != "bits"

    @property
    def chain_dtype(self):
        """Dtype of the states."""
        return torch.float64 if self.dtype == "float64" else torch.float32


def configuration(seed):
    """A legal configuration, drawn from a seed."""
    draw = random.Random(seed)
    family = draw.choices(["diffusion", "bits", "hierarchy"], [6, 1.5, 2.5])[0]
    c = Configuration(
        seed=seed,
        family=family,
        shape=draw.choice(SHAPES),
        num_levels=draw.choice(LEVELS),
        batch=draw.choice([1, 2, draw.randint(1, 64), 64]),
        scale=10 ** draw.uniform(-3, 3),
        dtype=draw.choice(["float32", "float64", "bfloat16"]),
        likelihood="none",
        prediction=draw.choice(["noise", "data", "velocity", "score", "levels"]),
        variance=draw.choice(["forward", "posterior", "learned", "optimal"]),
        transform="none",
        schedule=draw.choice(["linear", "cosine", "log-SNR", "learned", "monotone", "by entry", "alpha"]),
        exploding=draw.random() < 0.2,
        num_timesteps=draw.choice([1, 2, 1000, round(10 ** draw.uniform(0, 3))]),
        log_snr_max=draw.choice([2.0, 4.0, 8.0, 12.0, 20.0]),
        log_snr_min=draw.choice([-4.0, -8.0, -12.0, -20.0]),
        latent_sizes=tuple(draw.randint(1, 6) for _ in range(draw.randint(1, 4))),
        encoder=draw.choice(["bottom-up", "ladder"]),
        pair=draw.choices(["subsampled", "posterior", "forward", "continuous"], [5, 2, 2, 3])[0],
        num_draws=draw.choice([1, 2, 3, 5]),
        timesteps=draw.choice(["stratified", "uniform", "importance"]),
        mask=draw.random() < 0.15,
        elbo=draw.choice(["Trace_ELBO", "TraceMeanField_ELBO", "MinimumVarianceELBO", "FreeBitsELBO"]),
        warmup=draw.random() < 0.2,
        optimiser=draw.choice(OPTIMISERS),
        lr=10 ** draw.uniform(-4, -2),
    )  # fmt: skip
    make_legal(c, draw)
    return c


def make_legal(c, draw):  # noqa: C901 (a list of what does not go together, one line each)
    """Replace settings that cannot be combined."""
    if c.family == "bits":
        c.prediction, c.variance, c.num_levels, c.exploding = "probability", "none", 2, False
        c.schedule = draw.choice(["linear", "cosine", "log-SNR", "decay"])
    elif c.family == "hierarchy" or c.prediction != "levels":
        c.likelihood = draw.choice(
            [
                "none",
                "none",
                "gaussian",
                "discretised",
                "bernoulli",
                "categorical",
                "poisson",
                "level",
            ]
        )
    if c.family == "hierarchy":
        c.prediction = c.variance = c.schedule = c.timesteps = "none"
        c.pair = "posterior" if c.encoder == "ladder" else "forward"
        c.num_timesteps, c.exploding, c.mask = len(c.latent_sizes), False, c.mask and c.real
    elif c.likelihood == "level":
        c.likelihood = "discretised"
    if c.likelihood == "bernoulli":
        c.num_levels = 2
    if c.family != "hierarchy":
        c.latent_sizes, c.encoder = (), "none"
        make_chain_legal(c)
    if c.real:
        c.transform = draw.choice(["none", "standardize", "standardize", "exp", "sigmoid"])
    # States of an untrained kernel can grow, and their exponential would overflow.
    if c.transform == "exp" and c.prediction not in ("data", "velocity", "none"):
        c.transform = "standardize"
    if c.transform in ("exp", "sigmoid"):
        c.scale = 1.0
    if c.transform == "none" and c.scale > 10:  # their rounding would hide the noise of x_1
        c.log_snr_max = min(c.log_snr_max, 8.0)
    if c.family == "bits" or c.likelihood == "categorical" or not c.shape:
        c.mask = False
    make_objective_legal(c, draw)


def make_chain_legal(c):
    """The schedule, the length of the chain and the programs."""
    if c.pair in ("posterior", "forward"):  # every timestep in every step
        c.num_timesteps = min(c.num_timesteps, 1 + c.num_timesteps % 8)
    if c.schedule == "alpha" and c.pair == "continuous":
        c.schedule = "cosine"
    if c.schedule == "by entry" and (c.likelihood == "categorical" or not c.shape):
        c.schedule = "monotone"
    if c.variance == "optimal" and (c.schedule == "by entry" or c.num_timesteps == 1):
        c.variance = "posterior"
    if c.pair == "continuous":
        c.timesteps = "stratified"
    elif c.pair != "subsampled":
        c.timesteps, c.num_draws = "none", 0


def make_objective_legal(c, draw):
    """An ELBO that fits the programs: KLs need the model's order, and the variance a learned curve."""
    usual = ["Trace_ELBO", "TraceMeanField_ELBO"]
    if c.elbo == "FreeBitsELBO" and (c.pair != "posterior" or c.mask):
        c.elbo = draw.choice(usual)
    learned = c.schedule in ("monotone", "by entry") and c.num_timesteps > 2
    if c.elbo == "MinimumVarianceELBO" and not learned:
        c.elbo = draw.choice(usual)
    if c.pair == "forward" and not (c.family == "hierarchy" and c.num_timesteps == 1):
        c.elbo = "Trace_ELBO"
    c.warmup = c.warmup and c.pair in ("posterior", "forward")


def make_data(c):
    """Data with some structure, ``(64,) + shape``."""
    size = (NUM_DATA, *c.shape)
    if c.likelihood == "poisson":
        return torch.poisson(torch.full(size, c.scale + 0.1))
    if not c.real:
        return torch.randint(c.num_levels, size)
    x = torch.randn(size, dtype=c.chain_dtype) + 2.0 * torch.randint(2, size)
    if c.transform == "exp":
        return x.exp()
    return x.sigmoid() if c.transform == "sigmoid" else c.scale * x


def make_transform(c, x_0):
    """From the data's units to the model's."""
    return {
        "none": lambda: None,
        "standardize": lambda: pd.Standardize.from_data(x_0),
        "exp": lambda: ExpTransform().inv,
        "sigmoid": lambda: SigmoidTransform().inv,
    }[c.transform]()


def make_likelihood(c, x_0):
    """What a datum is, given its estimate."""
    return {
        "none": lambda: None,
        "gaussian": lambda: pd.GaussianLikelihood(0.1, learnable=True),
        "discretised": lambda: pd.DiscretizedGaussianLikelihood(c.num_levels, learnable=True),
        "bernoulli": lambda: pd.BernoulliLikelihood(learnable=True),
        "categorical": lambda: pd.CategoricalLikelihood(c.num_levels),
        "poisson": lambda: pd.PoissonLikelihood(max_count=x_0.max().clamp(min=1)),
        "level": lambda: pd.LevelLikelihood(c.num_levels),
    }[c.likelihood]()


def state_shape(c):
    """Shape of a state; categories have an axis of their own."""
    return (*c.shape, c.num_levels) if c.likelihood == "categorical" else c.shape


def make_schedule(c):
    """The curve, on its grid."""
    ends = {"log_snr_max": c.log_snr_max, "log_snr_min": c.log_snr_min}
    schedule = {
        "linear": lambda: pd.LinearSchedule(c.num_timesteps),
        "cosine": lambda: pd.CosineSchedule(c.num_timesteps),
        "decay": lambda: pd.LinearDecaySchedule(c.num_timesteps),
        "log-SNR": lambda: pd.LogSNRSchedule(c.num_timesteps, **ends),
        "learned": lambda: pd.LogSNRSchedule(c.num_timesteps, **ends, learnable=True),
        "monotone": lambda: pd.MonotoneSchedule(c.num_timesteps, **ends),
        "by entry": lambda: pd.MonotoneSchedule(c.num_timesteps, **ends, event_shape=c.shape),
        "alpha": lambda: pd.AlphaSchedule(torch.linspace(0.999, 0.9, c.num_timesteps)),
    }[c.schedule]()
    return pd.VarianceExploding(schedule) if c.exploding else schedule


def make_diffusion(c, x_0):
    """A diffusion model, of numbers or of bits, with a tiny network."""
    shape, schedule = state_shape(c), make_schedule(c)
    dtype = getattr(torch, c.dtype)
    if c.family == "bits":
        network = make_network(shape, 1).to(dtype)
        return pd.BernoulliDiffusion(pd.NeuralBernoulliDenoiser(network, schedule, shape))
    prediction = {
        "noise": pd.NoisePrediction(),
        "data": pd.DataPrediction(),
        "velocity": pd.VelocityPrediction(),
        "score": pd.ScorePrediction(),
        "levels": pd.LevelPrediction(c.num_levels),
    }[c.prediction]
    variance = {
        "forward": pd.ForwardVariance(), "posterior": pd.PosteriorVariance(),
        "learned": pd.LearnedVariance(), "optimal": pd.PosteriorVariance(),
    }[c.variance]  # fmt: skip
    network = make_network(shape, prediction.num_outputs + variance.num_outputs).to(dtype)
    transform, likelihood = make_transform(c, x_0), make_likelihood(c, x_0)

    def model(variance):
        denoiser = pd.NeuralDenoiser(
            network, schedule, shape, prediction=prediction, variance=variance
        )
        return pd.DiffusionModel(denoiser, likelihood, transform)

    if c.variance == "optimal":
        return model(pd.OptimalVariance.from_data(model(variance), x_0, num_levels=8))
    return model(variance)


def make_network(shape, num_outputs):
    """An MLP of a few thousand parameters, its last layer not at zero."""
    network = pd.MLP(shape, hidden_size=HIDDEN_SIZE, num_blocks=1, num_outputs=num_outputs)
    torch.nn.init.normal_(network.decode.weight, std=0.1)
    return network


def make_family(c, x_0):
    """The model of a configuration."""
    if c.family != "hierarchy":
        return make_diffusion(c, x_0)
    shape = state_shape(c)
    encoder = None
    if c.encoder == "ladder":
        encoder = pd.LadderEncoder(shape, c.latent_sizes, hidden_size=HIDDEN_SIZE)
    vae = pd.HierarchicalVAE(
        shape, c.latent_sizes, make_likelihood(c, x_0), encoder=encoder,
        transform=make_transform(c, x_0), hidden_size=HIDDEN_SIZE,
    )  # fmt: skip
    parts = [part for part in (vae.encoder, vae.decoder) if part is not None]
    for part in parts:  # but not the transform, which has the data's dtype
        part.to(getattr(torch, c.dtype))
    return vae


def make_pair(c, family):
    """Model and guide."""
    if c.pair == "subsampled":
        pair = family.subsampled(c.num_draws, timesteps=make_law(c))
        return pair.model, pair.guide
    if c.pair == "continuous":
        pair = family.continuous(c.num_draws)
        return pair.model, pair.guide
    return family.model, family.posterior_guide if c.pair == "posterior" else family.guide


def make_law(c):
    """How timesteps are drawn."""
    return {
        "stratified": pd.StratifiedTimesteps,
        "uniform": pd.UniformTimesteps,
        "importance": pd.ImportanceTimesteps,
    }[c.timesteps]()


def make_elbo(c, family):
    """The objective."""
    if c.elbo == "MinimumVarianceELBO":
        schedule = family.schedule.schedule if c.exploding else family.schedule
        return pd.MinimumVarianceELBO([schedule.interior])
    if c.elbo == "FreeBitsELBO":
        return pd.FreeBitsELBO(free_nats=0.1)
    return {"Trace_ELBO": Trace_ELBO, "TraceMeanField_ELBO": TraceMeanField_ELBO}[c.elbo]()


class WrongError(Exception):
    """A number that is not finite, or of another shape or dtype."""


def run(c):
    """Fit a configuration, compute its bound and samples, and return the last loss and the bound."""
    pyro.clear_param_store()
    pyro.set_rng_seed(c.seed)
    x_0 = make_data(c)
    family = make_family(c, x_0)
    model, guide = make_pair(c, family)
    optimiser = getattr(pyro.optim, c.optimiser)({"lr": c.lr})
    svi = SVI(model, guide, optimiser, make_elbo(c, family))
    mask = observed(x_0) if c.mask else None
    for step in range(NUM_STEPS):
        rows = torch.randint(NUM_DATA, (c.batch,))
        given = {} if mask is None else {"mask": mask[rows]}
        with pd.KLWarmup((step + 1) / NUM_STEPS if c.warmup else 1.0):
            loss = svi.step(x_0[rows], num_data=NUM_DATA, **given)
        require_finite(f"loss of step {step}", torch.as_tensor(loss))
        observe(c, model, guide, x_0[rows], given)
    for name, parameter in family.named_parameters():
        require_finite(f"parameter {name}", parameter)
    check_samples(c, family.sample(3))
    return loss, bound(c, family, x_0, mask)


def observed(x_0):
    """A mask with gaps, and at least one observed entry in every row."""
    mask = torch.rand(x_0.shape) < 0.7
    mask.flatten(1)[torch.arange(len(x_0)), torch.randint(x_0[0].numel(), (len(x_0),))] = True
    return mask


def observe(c, model, guide, x_0, given):
    """Record second moments, for the distribution of timesteps that follows them."""
    if c.timesteps == "importance" and c.num_timesteps > 1:
        model.law.observe(model, guide, x_0, **given)


def require_finite(name, values):
    """Raise if a number is not finite."""
    if not values.isfinite().all():
        count = int((~values.isfinite()).sum())
        raise WrongError(f"{name}: {count} of {values.numel()} NaN or infinite")


def check_samples(c, samples):
    """Finite, and of the data's shape and the chain's dtype."""
    require_finite("samples", samples.double())
    whole = c.prediction == "levels" or c.likelihood in ("categorical", "level")
    expected = (3, *c.shape), torch.int64 if whole else c.chain_dtype
    if (tuple(samples.shape), samples.dtype) != expected:
        raise WrongError(f"samples: {tuple(samples.shape)}, {samples.dtype}, expected {expected}")


def bound(c, family, x_0, mask):
    """The mean bound with its Monte Carlo error: by timesteps if there are many, otherwise by paths."""
    if c.family == "hierarchy" or mask is not None or c.num_timesteps <= 10:
        x_0, mask = x_0[:8], None if mask is None else mask[:8]
        guide = family.guide if c.pair == "forward" else family.posterior_guide
        particles = 2 if c.num_timesteps <= 10 else 4
        estimate = pd.elbo_terms(
            family.model, guide, x_0, num_particles=particles, mask=mask, progress=False
        ).mean()
    else:
        length = float("inf") if c.pair == "continuous" else None
        estimate = pd.evaluate_bound(
            family, x_0, standard_error=1e6, num_timesteps=length
        ).mean()  # with the smallest number of rows
    require_finite("bound and standard error", torch.tensor(estimate[:2]))
    return estimate.value


def on_alarm(signum, frame):
    raise TimeoutError("the time limit")


def first_line(error):
    """The first line of an error, without the shapes that Pyro adds."""
    return str(error).strip().split("\n")[0]


def attempt(c, limit):
    """The outcome of a fit as a word and a sentence, and its seconds."""
    start = time.perf_counter()
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        run(c)
        outcome, words = "fine", ""
    except ValueError as error:
        outcome, words = "refused", first_line(error)
    except WrongError as error:
        outcome, words = "wrong", first_line(error)
    except TimeoutError as error:
        outcome, words = "hang", str(error)
    except Exception as error:
        outcome, words = "broken", f"{type(error).__name__}: {first_line(error)}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return outcome, words, time.perf_counter() - start


def main():
    args = parse_arguments()
    torch.set_default_device(args.device)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGALRM, on_alarm)
    outcomes, failures, seconds, options = collections.Counter(), [], [], collections.Counter()
    for seed in range(args.seed, args.seed + args.num_fits):
        c = configuration(seed)
        options.update(f"{name}: {getattr(c, name)}" for name in OPTIONS)
        outcome, words, time_taken = attempt(c, args.limit)
        outcomes[outcome] += 1
        seconds.append(time_taken)
        if outcome != "fine":
            failures.append(
                {"outcome": outcome, "message": words, "configuration": dataclasses.asdict(c)}
            )
            print(f"{outcome}, --seed {seed} --num-fits 1: {words}\n  {c}", flush=True)
    report(args, outcomes, failures, sorted(seconds), options)
    return sum(outcomes[word] for word in ("wrong", "broken", "hang"))


OUTCOMES = ("fine", "refused", "wrong", "broken", "hang")
OPTIONS = (
    "family", "shape", "dtype", "likelihood", "prediction", "variance", "transform", "schedule",
    "exploding", "encoder", "pair", "timesteps", "mask", "elbo", "warmup", "optimiser",
)  # fmt: skip


def report(args, outcomes, failures, seconds, options):
    """Print the counts, and write them with the protocol."""
    print(f"| fits | {' | '.join(OUTCOMES)} | median, s | slowest, s | minutes |")
    print("|---" * (len(OUTCOMES) + 4) + "|")
    counts = " | ".join(str(outcomes[word]) for word in OUTCOMES)
    median, slowest, total = seconds[len(seconds) // 2], seconds[-1], sum(seconds)
    print(f"| {args.num_fits} | {counts} | {median:.2f} | {slowest:.1f} | {total / 60:.1f} |")
    numbers = {
        "fits": args.num_fits,
        "outcomes": {word: outcomes[word] for word in OUTCOMES},
        "failures": failures,
        "median_seconds": round(median, 3),
        "slowest_seconds": round(slowest, 2),
        "total_seconds": round(total, 1),
        "options": dict(sorted(options.items())),
        "seed": args.seed,
        "num_steps": NUM_STEPS,
        "limit_seconds": args.limit,
        "torch": torch.__version__,
        "pyro": pyro.__version__,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "device": args.device,
    }
    args.output.mkdir(parents=True, exist_ok=True)
    aside = args.output / ".stress.json.part"
    aside.write_text(json.dumps(numbers, indent=2) + "\n")
    os.replace(aside, args.output / "stress.json")
    print(f"\nwrote {args.output / 'stress.json'}")


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--num-fits", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0, help="of the first fit")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for a fit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--smoke", action="store_true", help="minutes of work in seconds")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results"))
    args = parser.parse_args()
    if args.smoke:
        args.num_fits = min(args.num_fits, 12)
    return args


if __name__ == "__main__":
    sys.exit(min(main(), 1))
