r"""Classify handwritten digits by Bayes' rule, from ten conditional bounds.

A conditional diffusion model has a bound of :math:`\log p(x \mid c)` for each class :math:`c`. Bayes' rule
turns the ten bounds of an image into a posterior of its class,
:math:`p(c \mid x) \propto p(c) \, \exp(\mathrm{ELBO}(x \mid c))`.

A bound is below :math:`\log p(x \mid c)` by a gap that is not known, so this posterior is an approximation.

The data are the 1,797 digits that come with scikit-learn: 8×8 pixels of 17 grey levels. 360 of them are held
out, by the split of ``digits.py``, and 1,437 are for training. Of these, 180 are used for validation: the
weights and the exponent (below) are chosen with them.

A full sum over the chain for ten classes would be expensive, and is not needed. ``race`` estimates the bounds
from random timesteps, in rounds. All classes of an image have the same timesteps and noise, so that most of
the noise cancels in the difference of two bounds. A class leaves the race when it is so many standard errors
behind the leader that the noise cannot explain it. An image with one class left is decided: it is known which
class has the greatest bound. Its posterior may still be uncertain, because the bounds may be close.

The network has seen few images, and the differences between its bounds may be too large. The script measures
this with an exponent, :math:`p(c) \exp(a\, \mathrm{ELBO}(x \mid c))`. It takes the :math:`a` of the best log
score on the 180 validation images. An exponent below one says that the posterior is too sure. Few images are
classified wrongly, so the exponent is not known well, and both posteriors are reported. Logistic regression
and k nearest neighbours are there for comparison. They are fitted to all 1,437 training images.

The U-Net needs ``pip install 'pyro-diffusion[examples,images,lightning]'``.

    python examples/classify.py [--device cuda] [--seed 0] [--error 0.01] [--plot] [--smoke]
        [--output outputs/classify]
"""

import argparse
import json
import os
import time
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import pyro
import scipy.stats
import torch
from pyro.poutine.messenger import Messenger
from pyro.poutine.util import site_is_subsample
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import (
    GridSearchCV,
    StratifiedKFold,
    cross_val_predict,
    train_test_split,
)
from sklearn.neighbors import KNeighborsClassifier

from pyro_diffusion import (
    DiffusionModel,
    LevelPrediction,
    LogSNRSchedule,
    NeuralDenoiser,
    PosteriorVariance,
    Recipe,
    UNet,
    bound_by_datum,
    fit,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_LEVELS, NUM_CLASSES = 17, 10
RECIPE = Recipe(batch_size=128, weight_decay=0.5)
LOOKS = (16, 32, 64, 128)  # rounds after which classes may leave the race
DRAWS = 4  # timesteps in a round, for each image and class
BANDS = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0 + 1e-9)  # of the reliability table


def main():
    args = parse_arguments()
    pyro.set_rng_seed(args.seed)
    start = time.perf_counter()
    data = load_data(args)
    (train, train_label), (validation, validation_label), (held_out, label) = data
    log_prior = (torch.bincount(train_label, minlength=NUM_CLASSES) + 1.0).double()
    log_prior = (log_prior / log_prior.sum()).log().to(args.device)

    diffusion = build(args.num_timesteps).to(args.device)
    result = fit(
        diffusion, train, context=train_label,
        validation={"x_0": validation, "context": validation_label},
        max_steps=args.steps, seed=args.seed, recipe=RECIPE,
    )  # fmt: skip
    print(result)
    fitted = time.perf_counter()

    diffusion.eval()
    tuning = classify(diffusion, validation, log_prior, args)
    exponent = fitted_exponent(tuning, validation_label, log_prior)
    found = classify(diffusion, held_out, log_prior, args)
    classified = time.perf_counter()
    report_race(found, args.num_timesteps, args.error)

    bayes = {
        "Bayes by bounds": found.log_posterior(log_prior),
        f"Bayes by bounds, exponent {exponent:.2f}": found.log_posterior(log_prior, exponent),
    }
    posteriors = {name: log_p.cpu() for name, log_p in (bayes | others(data)).items()}
    report(posteriors, label.cpu())
    report_errors(found, log_prior, exponent, label)
    report_wrong(found, log_prior, exponent, label)
    label = label.cpu()
    write(args.output, posteriors, exponent, label)
    diffusion.save(args.output / "model.pt")
    if args.plot:
        print("\npicture:", plot(args.output, posteriors, held_out.cpu(), label))
    print(f"{fitted - start:.0f} s to fit, {classified - fitted:.0f} s to classify")


def classify(diffusion, x_0, log_prior, args):
    """Run the race between the classes for every image."""
    draw = drawn_bounds(diffusion, x_0, DRAWS)
    return race(draw, len(x_0), log_prior, args.looks, args.error)


class SharedNoise(Messenger):
    """An effect handler for a subsampled guide: all rows of one image have the same timesteps and noise.

    Args:
        first: For each row, the first row of the same image, ``(rows,)``.
    """

    def __init__(self, first):
        super().__init__()
        self.first = first

    def _pyro_sample(self, msg):
        law = msg["fn"]
        if msg["name"] == "t":  # one column for all rows, stratified by itself
            draws, rows = law.batch_shape
            msg["value"] = law.expand((draws, 1)).sample().expand(draws, rows)
        elif not site_is_subsample(msg):
            msg["value"] = law.sample().index_select(-1 - law.event_dim, self.first)


def drawn_bounds(diffusion, x_0, draws, images_at_a_time=64):
    """A function ``draw(image, label)``, which estimates log p(x | c) for each row.

    ``image`` has row numbers of ``x_0`` in increasing order, and ``label`` has a class for each. An estimate
    is the mean over ``draws`` random timesteps, in nats, float64. Rows of one image share the noise.
    """
    pair = diffusion.subsampled(draws)

    def draw_batch(image, label):
        _, which, counts = image.unique_consecutive(return_inverse=True, return_counts=True)
        guide = SharedNoise((counts.cumsum(0) - counts)[which])(pair.guide)
        return bound_by_datum(pair.model, guide, x_0[image], context=label)

    def draw(image, label):
        _, counts = image.unique_consecutive(return_counts=True)
        sizes = [int(part.sum()) for part in counts.split(images_at_a_time)]
        batches = zip(image.split(sizes), label.split(sizes), strict=True)
        with torch.no_grad():
            return torch.cat([draw_batch(*batch) for batch in batches])

    return draw


class Race(NamedTuple):
    """What is known of the classes of N images after a race of K classes over R rounds."""

    #: log p(x | c) less the leader's in each round, ``(R, N, K)``; NaN where it was not drawn
    difference: torch.Tensor
    #: classes that are left, ``(N, K)``
    racing: torch.Tensor

    @property
    def decided(self):
        """Images with one class left, ``(N,)``."""
        return self.racing.sum(1) == 1

    def log_posterior(self, log_prior, exponent=1.0):
        """log p(c | x) from the mean differences, with the bounds multiplied by an exponent, ``(N, K)``."""
        return (log_prior + exponent * self.difference.nanmean(0)).log_softmax(-1)

    def noise(self, log_prior, exponent=1.0):
        """What a round adds to the Monte Carlo error of ``log_posterior``, to first order, ``(R, N, K)``."""
        p = self.log_posterior(log_prior, exponent).exp()
        count = (~self.difference.isnan()).sum(0)
        noise = (self.difference - self.difference.nanmean(0)) / (count * (count - 1)).sqrt()
        noise = exponent * noise.nan_to_num()
        return noise - (p * noise).sum(-1, keepdim=True)

    def standard_error(self, log_prior, exponent=1.0):
        """Monte Carlo error of ``log_posterior``, ``(N, K)``."""
        return self.noise(log_prior, exponent).square().sum(0).sqrt()


def race(draw, num_data, log_prior, looks=LOOKS, error=0.01):
    r"""Find the class of the greatest log p(c) + log p(x | c), from noisy draws of log p(x | c).

    Every class that is still in the race has one draw in each round. After each number of rounds in
    ``looks``, the class with the greatest mean is the leader, and a class leaves the race if

    .. math::
        \bar d > z \, s_{\bar d} ,

    where :math:`\bar d` is the leader's mean less its own, with the log prior added, and :math:`s_{\bar d}`
    the standard error of this difference over rounds. :math:`z` is the upper quantile of Student's t at
    ``error`` divided by the number of rivals and by the number of looks. If means over rounds are normal,
    the probability that the best class of an image leaves is therefore at most ``error`` (Bonferroni).

    Args:
        draw: ``draw(image, label)`` has one estimate for each row; rows of one image may share their noise.
        num_data: Number of images.
        log_prior: log p(c), ``(K,)``.
        looks: Numbers of rounds, increasing, each at least 2. After the last, the race is over.
        error: Largest probability that the best class of an image leaves.

    Returns:
        A :class:`Race`.
    """
    shape = num_data, len(log_prior)
    values = log_prior.new_full((looks[-1], *shape), torch.nan)
    racing = torch.ones_like(values[0], dtype=torch.bool)
    for start, stop in pairwise((0, *looks)):
        for i in range(start, stop):
            image, label = (racing & (racing.sum(1, keepdim=True) > 1)).nonzero(as_tuple=True)
            if len(image):
                values[i, image, label] = draw(image, label)
        difference, leader = to_leader(values, racing, log_prior)
        z = scipy.stats.t.isf(error / ((shape[1] - 1) * len(looks)), stop - 1)
        now = difference[:stop]
        gap = log_prior[leader][:, None] - log_prior - now.nanmean(0)
        racing &= ~(gap > z * now.std(0) / stop**0.5)
    return Race(difference, racing)


def to_leader(values, racing, log_prior):
    """Differences to the leader of each image, NaN where not drawn, and the leaders ``(N,)``."""
    score = (values.nanmean(0) + log_prior).masked_fill(~racing, -torch.inf)
    leader = score.argmax(-1)
    of_leader = values.gather(2, leader.expand(len(values), -1)[..., None])
    return values - of_leader, leader


def fitted_exponent(found, label, log_prior):
    """The exponent of the bounds with the best log score, of a grid; prints its 95 % interval."""
    grid = torch.linspace(0.05, 2.0, 40)
    total = [log_score(found.log_posterior(log_prior, a), label).sum() for a in grid.tolist()]
    total = torch.stack(total).cpu()
    likely = grid[total > total.max() - 1.92]  # by the quantile of chi-squared, halved
    exponent = grid[total.argmax()].item()
    print(f"\nexponent {exponent:.2f}, 95 % interval {likely[0]:.2f} … {likely[-1]:.2f}", end="")
    print(f", by the log score of {len(label)} validation images")
    return exponent


def log_score(log_posterior, label):
    """log p(c | x) of the true class, in nats, ``(N,)``."""
    return log_posterior.gather(1, label[:, None]).squeeze(1)


def build(num_timesteps):
    network = UNet(
        (8, 8), num_classes=NUM_CLASSES, channels=(16, 32), layers_per_block=1, attention=(),
        dropout=0.1, num_outputs=NUM_LEVELS,
    )  # fmt: skip
    schedule = LogSNRSchedule(num_timesteps, log_snr_max=4.0, log_snr_min=-6.0)
    denoiser = NeuralDenoiser(
        network, schedule, (8, 8), prediction=LevelPrediction(NUM_LEVELS), variance=PosteriorVariance()
    )  # fmt: skip
    return DiffusionModel(denoiser)


def others(data):
    """Log posteriors by two classifiers of scikit-learn, fitted to all training images.

    Their settings are chosen by five-fold cross-validation on these images. A class without a neighbour would
    have a log posterior of minus infinity. A fraction of a neighbour is therefore divided among the classes;
    it is chosen by the log score.
    """
    (*x, y), (*label, _) = zip(*data, strict=True)
    x, y = (part.flatten(1).cpu().numpy() / (NUM_LEVELS - 1) for part in (torch.cat(x), y))
    label, folds = torch.cat(label).cpu().numpy(), StratifiedKFold(5, shuffle=True, random_state=0)
    logistic = GridSearchCV(
        LogisticRegression(max_iter=5_000), {"C": [0.1, 1, 10]}, scoring="neg_log_loss", cv=folds
    ).fit(x, label)
    nearest = GridSearchCV(KNeighborsClassifier(), {"n_neighbors": range(1, 11)}, cv=folds)
    k = nearest.fit(x, label).best_params_["n_neighbors"]

    def log_shares(shares, added):
        return np.log((k * shares + added / NUM_CLASSES) / (k + added))

    shares = cross_val_predict(nearest.best_estimator_, x, label, cv=folds, method="predict_proba")
    rows = np.arange(len(x))
    added = max(
        (0.01, 0.03, 0.1, 0.3, 1.0), key=lambda a: log_shares(shares, a)[rows, label].mean()
    )
    posteriors = {
        f"logistic regression, C = {logistic.best_params_['C']:g}": logistic.predict_log_proba(y),
        f"{k} nearest neighbour{'s' * (k > 1)}, {added:g} added": log_shares(
            nearest.predict_proba(y), added
        ),
    }
    return {name: torch.as_tensor(log_p) for name, log_p in posteriors.items()}


def report_race(found, num_timesteps, error):
    """Print what the race has decided, and what it cost."""
    rows = DRAWS * int((~found.difference.isnan()).sum())
    full = found.racing.numel() * num_timesteps
    decided, rounds = int(found.decided.sum()), len(found.difference)
    print(
        f"\n{decided} of {len(found.racing)} images decided within {rounds} rounds. For each image, "
        f"the class of the\ngreatest bound has left the race with a probability of at most {error:g}."
        f"\n{rows:,} network rows, {rows / full:.2%} of the {full:,} of full sums"
    )


def report(posteriors, label):
    """Print the accuracy, the log score and the calibration of each classifier."""
    print(f"\n{len(label)} held-out images, ± sampling error")
    print(f"{'':34}accuracy          log score, nats      calibration error")
    for name, log_p in posteriors.items():
        right, score = (log_p.argmax(-1) == label).double(), log_score(log_p, label)
        share, error = right.mean().item(), score.std().item() / len(label) ** 0.5
        binomial = (share * (1 - share) / len(label)) ** 0.5
        print(
            f"{name:34}{share:.4f} ± {binomial:.4f}   {score.mean():.4f} ± {error:.4f}"
            f"   {calibration_error(log_p, label):.4f}"
        )
    for name, log_p in list(posteriors.items())[:2]:
        print(f"\n{name}: how often the most probable class is right")
        print("posterior      images   mean posterior   right, ± if the posterior is right")
        for low, high, count, mean, share, error in reliability(log_p, label):
            print(f"{low:.2f} … {high:.2f}   {count:6}   {mean:14.3f}   {share:.3f} ± {error:.3f}")


def reliability(log_posterior, label):
    """For each band of the greatest posterior: edges, images, mean posterior, share that is right, its error.

    The error is the standard deviation that the share has if the posterior is right.
    """
    top, guess = log_posterior.exp().max(-1)
    rows = []
    for low, high in pairwise(BANDS):
        inside = (top > low) & (top <= high)
        if count := int(inside.sum()):
            p, right = top[inside], (guess == label)[inside].double()
            error = (p * (1 - p)).sum().sqrt().item() / count
            rows.append((low, high, count, p.mean().item(), right.mean().item(), error))
    return rows


def calibration_error(log_posterior, label):
    """Expected calibration error: |mean posterior − share right| of the bands, weighted by their images."""
    rows = reliability(log_posterior, label)
    return sum(count * abs(mean - share) for _, _, count, mean, share, _ in rows) / len(label)


def report_errors(found, log_prior, exponent, label):
    """Print the Monte Carlo error of the log scores, and the paired effect of the exponent."""
    scores, errors = [], []
    for a in (1.0, exponent):
        scores.append(log_score(found.log_posterior(log_prior, a), label))
        of_label = found.noise(log_prior, a)[:, torch.arange(len(label)), label]
        errors.append(of_label.mean(1).square().sum().sqrt().item())
    gain = scores[1] - scores[0]
    print(
        f"\nMonte Carlo error of the log score {errors[0]:.4f}, with the exponent {errors[1]:.4f}"
        f"\nlog score with the exponent less without: {gain.mean():.4f} ± {gain.std() / len(gain) ** 0.5:.4f}"
    )


def report_wrong(found, log_prior, exponent, label):
    """Print the images whose most probable class is wrong, with both posteriors."""
    log_p, error = found.log_posterior(log_prior), found.standard_error(log_prior)
    p, tempered = log_p.exp(), found.log_posterior(log_prior, exponent).exp()
    wrong = (log_p.argmax(-1) != label).nonzero().squeeze(-1).tolist()
    print(f"\n{len(wrong)} wrong decisions: posterior ± Monte Carlo error (with the exponent)")
    for i in wrong:
        words = [
            f"{c} {p[i, c]:.3f} ± {p[i, c] * error[i, c]:.3f} ({tempered[i, c]:.3f})"
            for c in p[i].topk(3).indices.tolist()
        ]
        state = "decided" if found.decided[i] else "undecided"
        print(f"  image {i:3}, a {label[i]}, {state}: {', '.join(words)}")


def write(folder, posteriors, exponent, label):
    """Write the numbers, under another name first."""
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {
        name: {
            "accuracy": (log_p.argmax(-1) == label).double().mean().item(),
            "log_score": log_score(log_p, label).mean().item(),
            "calibration_error": calibration_error(log_p, label),
        }
        for name, log_p in posteriors.items()
    }
    aside = folder / ".result.part"
    aside.write_text(json.dumps({"exponent": exponent} | numbers, indent=2) + "\n")
    os.replace(aside, folder / "result.json")


def plot(folder, posteriors, images, label):
    """The reliability of the classifiers; beside it the wrong and the least certain decisions."""
    fig = plt.figure(figsize=(11, 5), layout="constrained")
    left, right = fig.subfigures(1, 2, width_ratios=(1, 1.25))
    plot_reliability(left.subplots(), posteriors, label)
    right.suptitle("wrong decisions (red), and the least certain of the others")
    p = list(posteriors.values())[1].exp()
    top, guess = p.max(-1)
    cells = right.subplots(4, 4, height_ratios=(1.5, 1, 1.5, 1))
    pairs = zip(cells[::2].flat, cells[1::2].flat, strict=True)
    for i, (above, below) in zip((top + (guess == label)).argsort(), pairs, strict=False):
        above.imshow(images[i], cmap="gray_r", vmin=0, vmax=NUM_LEVELS - 1)
        above.axis("off")
        color = "C3" if guess[i] != label[i] else "black"
        above.set_title(f"a {label[i]}", color=color, fontsize="medium")
        below.bar(
            range(NUM_CLASSES), p[i], color=["C2" if c == label[i] else "C0" for c in range(10)]
        )
        below.set(ylim=(0, 1), yticks=(0, 1), xticks=range(NUM_CLASSES))
        below.tick_params(labelsize="x-small")
    right.supxlabel("posterior with the exponent; the true class is green", fontsize="medium")
    path, aside = folder / "classify.png", folder / ".classify.part"
    fig.savefig(aside, dpi=120, format="png")
    os.replace(aside, path)
    return path


def plot_reliability(ax, posteriors, label):
    """The share of right decisions against the mean posterior, by band; large bands have large marks."""
    ax.plot((0, 1), (0, 1), color="gray", linewidth=1)
    for i, (name, log_p) in enumerate(posteriors.items()):
        _, _, count, mean, share, error = zip(*reliability(log_p, label), strict=True)
        x = [m + 0.006 * (i - 1.5) for m in mean]  # so that error bars do not hide each other
        ax.errorbar(x, share, error, fmt="none", color=f"C{i}", linewidth=1)
        ax.scatter(x, share, [12 * n**0.5 for n in count], color=f"C{i}", label=name, alpha=0.8)
    ax.set(
        xlabel="mean posterior of the most probable class", ylabel="share of right decisions",
        xlim=(0, 1.03), ylim=(0, 1.03),
    )  # fmt: skip
    ax.legend()


def load_data(args):
    """Training, validation and held-out digits with their classes. The split does not depend on the seed."""
    x, label = load_digits(return_X_y=True)
    rest = torch.tensor(x, dtype=torch.float32).reshape(-1, 8, 8), torch.as_tensor(label)
    parts = []
    for count in (360, 180):  # held out, validation
        *halves, a, b = train_test_split(*rest, test_size=count, stratify=rest[1], random_state=0)
        rest, part = (halves[0], a), (halves[1], b)
        parts.insert(0, part)
    parts.insert(0, rest)
    few = (100, 40, 20) if args.smoke else (None, None, None)
    return [
        (x[:n].to(args.device), c[:n].to(args.device)) for (x, c), n in zip(parts, few, strict=True)
    ]


def parse_arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--error", type=float, default=0.01, help="of losing an image's best class")
    parser.add_argument("--plot", action="store_true", help="draw classify.png")
    parser.add_argument("--smoke", action="store_true", help="tiny, in seconds")
    parser.add_argument("--output", type=Path, default=Path("outputs/classify"))
    args = parser.parse_args()
    args.num_timesteps = 30 if args.smoke else 1000
    args.steps = 10 if args.smoke else 2000
    args.looks = (3, 6) if args.smoke else LOOKS
    return args


if __name__ == "__main__":
    main()
