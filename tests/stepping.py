"""What tests of posteriors share: the noise of a sample and the end of a step, by hand."""

import torch

from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors.families import Scalars


def keyed(sample):
    return Key(0, Stream.NOISE, sample=sample)


def noise_of(posterior, key):
    """Return the noise [P] of a sample from its definition: tensor by tensor, by their numbers in the module."""
    number = {name: number for number, (name, _) in enumerate(posterior.module.named_parameters())}
    shapes = posterior.random.shapes.items()
    return torch.cat([key.child(number[name]).normal(shape.numel()) for name, shape in shapes]).to(posterior.dtype)


def complete(posterior, kl_weight=0.0, batch_norm_share=1.0):
    """Complete the gradients, add those of the KL, and return the KL."""
    scalars = Scalars.on("cpu")
    scalars.kl_weight.fill_(kl_weight)
    posterior.complete_(batch_norm_share)
    posterior.finish_(scalars)
    return posterior.add_kl_(scalars)
