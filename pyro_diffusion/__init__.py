r"""Diffusion as a generative model in Pyro: three programs, one bound.

The forward chain is a guide of fixed linear-Gaussian sites, the reverse chain is a model with neural
denoiser sites, and Pyro's own ``SVI`` and ``Trace_ELBO`` compute the hierarchical bound, timestep by
timestep. Start at :class:`DiffusionModel`; the equations are in :mod:`~pyro_diffusion.kernels` and
:mod:`~pyro_diffusion.chains`.
"""

from pyro_diffusion.batches import OrderedBatches, ShuffledBatches
from pyro_diffusion.bounds import (
    BoundEvaluation,
    ELBOTerms,
    Estimate,
    elbo_terms,
    evaluate_bound,
    snr_weight,
)
from pyro_diffusion.chains import (
    BottomUpGuide,
    GenerativeChain,
    ImportanceTimesteps,
    JointStrata,
    StratifiedTimesteps,
    TimestepPlate,
    TopDownGuide,
    UniformTimesteps,
)
from pyro_diffusion.compilation import compile_elbo
from pyro_diffusion.denoisers import (
    BernoulliDenoiser,
    DataPrediction,
    Denoised,
    Denoiser,
    EnumeratedDenoiser,
    ForwardVariance,
    GaussianDenoiser,
    GaussianMixtureDenoiser,
    LearnedVariance,
    LevelPrediction,
    NeuralBernoulliDenoiser,
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
    randomized_pit,
    simulation_based_calibration,
    to_arviz,
)
from pyro_diffusion.diffusion import BernoulliDiffusion, DiffusionModel
from pyro_diffusion.encoders import (
    BottomUpEncoder,
    GaussianLayer,
    LadderEncoder,
    TopDownEncoder,
)
from pyro_diffusion.evidence import (
    Evidence,
    Summary,
    importance_evidence,
    ode_log_likelihood,
    smc_evidence,
    summary,
)
from pyro_diffusion.hvae import HierarchicalVAE
from pyro_diffusion.likelihoods import (
    BernoulliLikelihood,
    CategoricalLikelihood,
    DiscretizedGaussianLikelihood,
    GaussianLikelihood,
    LevelLikelihood,
    Likelihood,
    PoissonLikelihood,
)
from pyro_diffusion.networks import MLP, FeedForward, UNet
from pyro_diffusion.objectives import FreeBitsELBO, KLWarmup, MinimumVarianceELBO, bound_by_datum
from pyro_diffusion.parallel import over_ranks
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
    forward_increment,
    forward_marginal,
    forward_posterior,
    forward_transition,
    terminal_prior,
)
from pyro_diffusion.samplers import AncestralSampler, DDIMSampler, ODESampler, Sampler
from pyro_diffusion.schedules import (
    AlphaSchedule,
    CosineSchedule,
    LinearDecaySchedule,
    LinearSchedule,
    LogSNRSchedule,
    MonotoneSchedule,
    NoiseSchedule,
    StridedSchedule,
    VarianceExploding,
)
from pyro_diffusion.transforms import Standardize

__version__ = "0.1.0"

__all__ = [
    "MLP",
    "AlphaSchedule",
    "AncestralSampler",
    "BernoulliDenoiser",
    "BernoulliDiffusion",
    "BernoulliLikelihood",
    "BottomUpEncoder",
    "BottomUpGuide",
    "BoundEvaluation",
    "CategoricalLikelihood",
    "CosineSchedule",
    "DDIMSampler",
    "DataPrediction",
    "Denoised",
    "Denoiser",
    "DiffusionModel",
    "DiscretizedGaussianLikelihood",
    "ELBOTerms",
    "EnumeratedDenoiser",
    "Estimate",
    "Evidence",
    "FeedForward",
    "ForwardVariance",
    "FreeBitsELBO",
    "GaussianDenoiser",
    "GaussianLayer",
    "GaussianLikelihood",
    "GaussianMixtureDenoiser",
    "GenerativeChain",
    "HierarchicalVAE",
    "ImportanceTimesteps",
    "JointStrata",
    "KLWarmup",
    "LadderEncoder",
    "LearnedVariance",
    "LevelLikelihood",
    "LevelPrediction",
    "Likelihood",
    "LinearDecaySchedule",
    "LinearSchedule",
    "LogSNRSchedule",
    "MinimumVarianceELBO",
    "MonotoneSchedule",
    "NeuralBernoulliDenoiser",
    "NeuralDenoiser",
    "NoisePrediction",
    "NoiseSchedule",
    "ODESampler",
    "OptimalVariance",
    "OrderedBatches",
    "PoissonLikelihood",
    "PosteriorVariance",
    "Sampler",
    "ScorePrediction",
    "ShuffledBatches",
    "Standardize",
    "StratifiedTimesteps",
    "StridedSchedule",
    "Summary",
    "TimestepPlate",
    "TopDownEncoder",
    "TopDownGuide",
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
    "forward_increment",
    "forward_marginal",
    "forward_posterior",
    "forward_transition",
    "importance_evidence",
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
    "simulation_based_calibration",
    "smc_evidence",
    "snr_weight",
    "summary",
    "terminal_prior",
    "to_arviz",
]
