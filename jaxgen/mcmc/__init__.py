"""Markov chains: denoising MCMC on a state and its noise level."""

from jaxgen.mcmc import denoising_gibbs
from jaxgen.mcmc.denoising import (
    Denoised,
    DenoisingMCMC,
    Spent,
    denoise,
    denoising_mcmc,
    mode_changes,
)
from jaxgen.mcmc.denoising_gibbs import ChainInfo, ChainRun, GibbsState, Initial, Start

__all__ = [
    "ChainInfo",
    "ChainRun",
    "Denoised",
    "DenoisingMCMC",
    "GibbsState",
    "Initial",
    "Spent",
    "Start",
    "denoise",
    "denoising_gibbs",
    "denoising_mcmc",
    "mode_changes",
]
