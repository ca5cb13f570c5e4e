"""The autoencoding loss: trains a VAE on pictures."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from snoopi.models.vae import VAE


class AutoencodingLoss(NamedTuple):
    """Parts of the loss, one number per sample, fp32 [b]."""

    total: Tensor
    squared: Tensor
    kl: Tensor


def autoencoding_loss(
    vae: VAE, pictures: Tensor, eps: Tensor, l1: float, kl: float
) -> AutoencodingLoss:
    """Reconstruction (squared + l1 |error|, means over pixels) + kl KL(q(z|x) || N(0, I)).

    The evidence lower bound of Kingma and Welling (2014) with the KL term, a mean over latent
    values, weighted down to keep detail. pictures [b 3 H W]; eps [b z h w] samples the latent.
    """
    mean, logvar = vae.moments(pictures)
    mean, logvar = mean.float(), logvar.float()
    latents = (mean + (0.5 * logvar).exp() * eps) * vae.config.scaling
    error = vae.decode(latents).float() - pictures
    squared = error.square().flatten(1).mean(1)
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)
    total = squared + l1 * error.abs().flatten(1).mean(1) + kl * divergence
    return AutoencodingLoss(total, squared, divergence)
