r"""Diffusion as a generative model in Pyro: three programs, one bound.

The forward chain is a guide of fixed linear-Gaussian sites, the reverse chain is a model with neural
denoiser sites, and Pyro's own ``SVI`` and ``Trace_ELBO`` compute the hierarchical bound, timestep by
timestep. Start at :class:`DiffusionModel`. The equations of the forward process are in
:mod:`~pyro_diffusion.processes`, the programs in :mod:`~pyro_diffusion.chains`.

The names here are those that a user needs. What an extension needs (abstract classes, programs, laws) is in
the subpackages, such as :mod:`pyro_diffusion.denoisers`.
"""

from pyro_diffusion.bounds import ELBOTerms, Estimate, elbo_terms, evaluate_bound, snr_weight
from pyro_diffusion.chains import ImportanceTimesteps, StratifiedTimesteps, UniformTimesteps
from pyro_diffusion.denoisers import (
    DataPrediction,
    EnumeratedDenoiser,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LearnedVariance,
    LevelPrediction,
    NeuralBernoulliDenoiser,
    NeuralCategoricalDenoiser,
    NeuralDenoiser,
    NoisePrediction,
    OptimalVariance,
    PosteriorVariance,
    ScorePrediction,
    VelocityPrediction,
)
from pyro_diffusion.diagnostics import (
    active_units,
    compare,
    expected_coverage,
    randomized_pit,
    simulation_based_calibration,
    to_arviz,
)
from pyro_diffusion.diffusion import BernoulliDiffusion, DiffusionModel
from pyro_diffusion.encoders import BottomUpEncoder, GaussianLayer, LadderEncoder
from pyro_diffusion.evidence import (
    Evidence,
    global_evidence,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
    summary,
)
from pyro_diffusion.hvae import HierarchicalVAE
from pyro_diffusion.inference import (
    DiffusionPrior,
    LinearGaussian,
    impute,
    posterior_samples,
)
from pyro_diffusion.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    LevelLikelihood,
    PoissonLikelihood,
)
from pyro_diffusion.moved import keep_modules, keep_names
from pyro_diffusion.networks import MLP, FeedForward, UNet
from pyro_diffusion.plots import (
    plot_bound,
    plot_compare,
    plot_denoised,
    plot_khat,
    plot_pit,
    plot_samples,
    plot_schedule,
    plot_training,
    plot_trajectory,
)
from pyro_diffusion.processes import (
    forward_marginal,
    forward_posterior,
    forward_transition,
    terminal_prior,
)
from pyro_diffusion.samplers import AncestralSampler, DDIMSampler, Guidance, ODESampler
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    StridedSchedule,
    VarianceExploding,
)
from pyro_diffusion.training import (
    Fit,
    FreeBitsELBO,
    KLWarmup,
    MinimumVarianceELBO,
    OrderedBatches,
    Recipe,
    ShuffledBatches,
    bound_by_datum,
    compile_elbo,
    fit,
    over_ranks,
)
from pyro_diffusion.transforms import Logit, Standardize

__version__ = "0.2.0"

keep_modules()

keep_names(
    "pyro_diffusion",
    {
        "BernoulliDenoiser": "denoisers",
        "BottomUpGuide": "chains",
        "BoundEvaluation": "bounds",
        "Denoised": "denoisers",
        "Denoiser": "denoisers",
        "GenerativeChain": "chains",
        "JointStrata": "chains",
        "Likelihood": "likelihoods",
        "NoiseSchedule": "schedules",
        "Sampler": "samplers",
        "Summary": "evidence",
        "TimestepPlate": "chains",
        "TopDownEncoder": "encoders",
        "TopDownGuide": "chains",
        "forward_increment": "processes",
    },
)

__all__ = [
    "AlphaSchedule",
    "AncestralSampler",
    "BernoulliDiffusion",
    "BernoulliLikelihood",
    "BottomUpEncoder",
    "CategoricalLikelihood",
    "CosineSchedule",
    "DDIMSampler",
    "DataPrediction",
    "DiffusionModel",
    "DiffusionPrior",
    "DiscretizedGaussianLikelihood",
    "ELBOTerms",
    "EnumeratedDenoiser",
    "Estimate",
    "Evidence",
    "FeedForward",
    "ForwardVariance",
    "Fit",
    "FreeBitsELBO",
    "GaussianDenoiser",
    "GaussianLayer",
    "GaussianLikelihood",
    "GaussianMixtureDenoiser",
    "Guidance",
    "HierarchicalVAE",
    "ImportanceTimesteps",
    "KLWarmup",
    "LadderEncoder",
    "LearnedVariance",
    "LevelLikelihood",
    "LevelPrediction",
    "LinearDecaySchedule",
    "LinearGaussian",
    "LinearSchedule",
    "LogSNRSchedule",
    "Logit",
    "MLP",
    "MinimumVarianceELBO",
    "MonotoneSchedule",
    "NeuralBernoulliDenoiser",
    "NeuralCategoricalDenoiser",
    "NeuralDenoiser",
    "NoisePrediction",
    "ODESampler",
    "OptimalVariance",
    "OrderedBatches",
    "PoissonLikelihood",
    "PosteriorVariance",
    "Recipe",
    "ScorePrediction",
    "ShuffledBatches",
    "Standardize",
    "StratifiedTimesteps",
    "StridedSchedule",
    "UNet",
    "UniformTimesteps",
    "VarianceExploding",
    "VelocityPrediction",
    "active_units",
    "bound_by_datum",
    "compare",
    "compile_elbo",
    "elbo_terms",
    "evaluate_bound",
    "expected_coverage",
    "fit",
    "forward_marginal",
    "forward_posterior",
    "forward_transition",
    "global_evidence",
    "importance_evidence",
    "impute",
    "ode_log_likelihood",
    "over_ranks",
    "plot_bound",
    "plot_compare",
    "plot_denoised",
    "plot_khat",
    "plot_pit",
    "plot_samples",
    "plot_schedule",
    "plot_training",
    "plot_trajectory",
    "randomized_pit",
    "posterior_samples",
    "simulation_based_calibration",
    "smc_evidence",
    "snr_weight",
    "summary",
    "terminal_prior",
    "to_arviz",
]
