"""Closed forms in numpy, written from the formulas and not from the package.

A chain of one dimension with α_1 … α_T and Gaussian reverse kernels
p(x_{t-1} | x_t) = N(slope_t x_t + intercept_t, variance_t) is jointly Gaussian, so that every term of
the bound is an expectation of a quadratic form. Arrays over timesteps have index 0 for t = 1.
"""

import dataclasses
import math

import numpy as np


def log_normal(x, mean, variance):
    return -0.5 * (np.log(2 * np.pi * variance) + (x - mean) ** 2 / variance)


def alpha_bar(alpha):
    """ᾱ_0 … ᾱ_T."""
    return np.concatenate([[1.0], np.cumprod(alpha)])


def posterior_coefficients(alpha, t):
    """q(x_{t-1} | x_t, x_0): weight of x_0, weight of x_t, variance (Ho et al., eqs. 6-7)."""
    bar, beta = alpha_bar(alpha), 1 - alpha[t - 1]
    of_x_0 = np.sqrt(bar[t - 1]) * beta / (1 - bar[t])
    of_x_t = np.sqrt(alpha[t - 1]) * (1 - bar[t - 1]) / (1 - bar[t])
    return of_x_0, of_x_t, (1 - bar[t - 1]) / (1 - bar[t]) * beta


@dataclasses.dataclass
class GaussianReverseChain:
    """A one-dimensional chain whose reverse kernels are affine; all of its bound in closed form."""

    alpha: np.ndarray
    slope: np.ndarray
    intercept: np.ndarray
    variance: np.ndarray

    @classmethod
    def exact(cls, alpha, mean, std, variance=None):
        """Bayes' rule for x_0 ~ N(mean, std²): the exact kernels, or others' variances."""
        bar = alpha_bar(alpha)
        marginal = bar * std**2 + (1 - bar)  # variance of x_t, of a tiny std as well
        gain = np.sqrt(alpha) * marginal[:-1] / marginal[1:]
        exact = marginal[:-1] * (1 - alpha) / marginal[1:]
        intercept = np.sqrt(bar[:-1]) * mean - gain * np.sqrt(bar[1:]) * mean
        return cls(alpha, gain, intercept, exact if variance is None else variance)

    @property
    def num_timesteps(self):
        return len(self.alpha)

    def log_evidence(self, x_0):
        """log p(x_0) of the chain itself, by pushing N(0, 1) through its kernels."""
        mean, variance = 0.0, 1.0
        for t in range(self.num_timesteps, 0, -1):
            mean = self.slope[t - 1] * mean + self.intercept[t - 1]
            variance = self.slope[t - 1] ** 2 * variance + self.variance[t - 1]
        return log_normal(x_0, mean, variance)

    def reconstruction(self, x_0):
        """E_q log p(x_0 | x_1)."""
        bar = alpha_bar(self.alpha)
        slope, intercept, variance = self.slope[0], self.intercept[0], self.variance[0]
        error = x_0 - slope * np.sqrt(bar[1]) * x_0 - intercept
        square = error**2 + slope**2 * (1 - bar[1])
        return -0.5 * (np.log(2 * np.pi * variance) + square / variance)

    def prior_kl(self, x_0):
        """KL(q(x_T | x_0) ‖ N(0, 1))."""
        bar = alpha_bar(self.alpha)[-1]
        return 0.5 * (bar * x_0**2 + (1 - bar) - 1 - np.log(1 - bar))

    def transition_kl(self, x_0):
        """E10: E KL(q(x_t | x_{t+1}, x_0) ‖ p(x_t | x_{t+1})), rows t = 1 … T−1."""
        bar, rows = alpha_bar(self.alpha), []
        for t in range(1, self.num_timesteps):
            of_x_0, of_x_t, beta_tilde = posterior_coefficients(self.alpha, t + 1)
            slope = of_x_t - self.slope[t]
            bias = of_x_0 * x_0 - self.intercept[t] + slope * np.sqrt(bar[t + 1]) * x_0
            square = bias**2 + slope**2 * (1 - bar[t + 1])
            ratio = beta_tilde / self.variance[t]
            rows.append(0.5 * (ratio - 1 - np.log(ratio) + square / self.variance[t]))
        return np.array(rows).reshape(-1, *np.shape(x_0))

    def log_ratio(self, x_0):
        """E11: E log q(x_t | x_{t-1}) / p(x_t | x_{t+1}), rows t = 1 … T−1."""
        bar, rows = alpha_bar(self.alpha), []
        for t in range(1, self.num_timesteps):
            entropy = 0.5 * np.log(2 * np.pi * np.e * (1 - self.alpha[t - 1]))
            # x_t − slope x_{t+1} − intercept with x_{t+1} = √α x_t + √(1−α) ε
            keep = 1 - self.slope[t] * np.sqrt(self.alpha[t])
            bias = keep * np.sqrt(bar[t]) * x_0 - self.intercept[t]
            square = bias**2 + keep**2 * (1 - bar[t]) + self.slope[t] ** 2 * (1 - self.alpha[t])
            variance = self.variance[t]
            rows.append(0.5 * (np.log(2 * np.pi * variance) + square / variance) - entropy)
        return np.array(rows).reshape(-1, *np.shape(x_0))

    def prior_log_ratio(self, x_0):
        """E log q(x_T | x_{T-1}) / p(x_T)."""
        bar = alpha_bar(self.alpha)[-1]
        entropy = 0.5 * np.log(2 * np.pi * np.e * (1 - self.alpha[-1]))
        return 0.5 * (np.log(2 * np.pi) + bar * x_0**2 + 1 - bar) - entropy

    def printed_consistency_kl(self, x_0):
        """What lecture notes print: E KL(q(x_t | x_{t-1}) ‖ p(x_t | x_{t+1})), rows t = 1 … T−1.

        The expectation is over q(x_{t-1}, x_{t+1} | x_0), which couples the two.
        """
        bar, rows = alpha_bar(self.alpha), []
        for t in range(1, self.num_timesteps):
            # difference of means: √α_t x_{t-1} − slope x_{t+1} − intercept
            both = np.sqrt(self.alpha[t - 1] * self.alpha[t])  # x_{t+1} = both x_{t-1} + noise
            keep = np.sqrt(self.alpha[t - 1]) - self.slope[t] * both
            bias = keep * np.sqrt(bar[t - 1]) * x_0 - self.intercept[t]
            noise = 1 - self.alpha[t - 1] * self.alpha[t]
            square = bias**2 + keep**2 * (1 - bar[t - 1]) + self.slope[t] ** 2 * noise
            ratio = (1 - self.alpha[t - 1]) / self.variance[t]
            rows.append(0.5 * (ratio - 1 - np.log(ratio) + square / self.variance[t]))
        return np.array(rows).reshape(-1, *np.shape(x_0))

    def elbo(self, x_0):
        return self.reconstruction(x_0) - self.transition_kl(x_0).sum(0) - self.prior_kl(x_0)

    def gap(self, x_0):
        """E9: KL(q(x_{1:T} | x_0) ‖ p(x_{1:T} | x_0)) between joint Gaussians, for a number x_0."""
        T, bar = self.num_timesteps, alpha_bar(self.alpha)
        mean_q = np.sqrt(bar[1:]) * x_0
        cov_q = np.array(
            [
                [np.sqrt(bar[max(s, t)] / bar[min(s, t)]) * (1 - bar[min(s, t)]) for s in range(1, T + 1)]
                for t in range(1, T + 1)
            ]
        )  # fmt: skip
        # p as an affine map of T + 1 standard normals, states x_0 … x_T
        noise, shift = np.zeros((T + 1, T + 1)), np.zeros(T + 1)
        noise[T, T] = 1.0
        for t in range(T, 0, -1):
            noise[t - 1] = self.slope[t - 1] * noise[t]
            noise[t - 1, t - 1] = np.sqrt(self.variance[t - 1])
            shift[t - 1] = self.slope[t - 1] * shift[t] + self.intercept[t - 1]
        cov = noise @ noise.T
        gain = cov[1:, 0] / cov[0, 0]
        mean_p = shift[1:] + gain * (x_0 - shift[0])
        cov_p = cov[1:, 1:] - np.outer(gain, cov[0, 1:])
        precision, error = np.linalg.inv(cov_p), mean_p - mean_q
        log_dets = np.linalg.slogdet(cov_p)[1] - np.linalg.slogdet(cov_q)[1]
        return 0.5 * (np.trace(precision @ cov_q) + error @ precision @ error - T + log_dets)


@dataclasses.dataclass
class MixturePosterior:
    """p(x | y) and p(y) of x ~ Σ_k w_k N(m_k, C_k), y | x ~ N(A x, R), by Bayes' rule."""

    log_evidence: float
    weights: np.ndarray
    means: np.ndarray
    covariances: np.ndarray

    @classmethod
    def of(cls, weights, means, covariances, operator, y, noise):
        """Shapes (K,), (K, D), (K, D, D), (m, D), (m,), (m, m)."""
        terms, new_means, new_covariances = [], [], []
        for w, m, c in zip(weights / np.sum(weights), means, covariances, strict=True):
            s = operator @ c @ operator.T + noise
            error, gain = y - operator @ m, np.linalg.solve(s, operator @ c).T
            log_det = np.linalg.slogdet(s)[1] + len(y) * np.log(2 * np.pi)
            terms.append(np.log(w) - 0.5 * (error @ np.linalg.solve(s, error) + log_det))
            new_means.append(m + gain @ error)
            new_covariances.append(c - gain @ operator @ c)
        log_evidence = np.logaddexp.reduce(terms)
        shares = np.exp(np.array(terms) - log_evidence)
        return cls(log_evidence, shares, np.array(new_means), np.array(new_covariances))

    @property
    def mean(self):
        return self.weights @ self.means

    @property
    def covariance(self):
        second = self.covariances + self.means[:, :, None] * self.means[:, None, :]
        return np.tensordot(self.weights, second, 1) - np.outer(self.mean, self.mean)

    @property
    def std(self):
        return np.sqrt(np.diag(self.covariance))

    def log_density(self, x):
        """log p(x | y) at (…, D)."""
        terms = []
        for w, m, c in zip(self.weights, self.means, self.covariances, strict=True):
            error = x - m
            squares = (error * np.linalg.solve(c, error[..., None])[..., 0]).sum(-1)
            log_det = np.linalg.slogdet(c)[1] + len(m) * np.log(2 * np.pi)
            terms.append(np.log(w) - 0.5 * (squares + log_det))
        return np.logaddexp.reduce(terms, axis=0)

    def quantile(self, q, entry):
        """The quantile of an entry, by bisection."""
        low, high = -50.0, 50.0
        scales = np.sqrt(self.covariances[:, entry, entry])
        for _ in range(80):
            middle = (low + high) / 2
            below = [
                0.5 * (1 + math.erf(z / math.sqrt(2)))
                for z in (middle - self.means[:, entry]) / scales
            ]
            low, high = (middle, high) if self.weights @ below < q else (low, middle)
        return low


def gaussian_posterior(mean, covariance, operator, y, noise):
    """The same for a single Gaussian, with shapes (D,) and (D, D)."""
    return MixturePosterior.of([1.0], mean[None], covariance[None], operator, y, noise)
