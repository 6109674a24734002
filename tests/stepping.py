"""What tests of posteriors share: the end of a step, by hand."""

from hpc_bnn.noise import Key, Stream
from hpc_bnn.posteriors.families import Scalars


def keyed(sample):
    return Key(0, Stream.NOISE, sample=sample)


def complete(posterior, kl_weight=0.0, batch_norm_share=1.0):
    """Complete the gradients, add those of the KL, and return the KL."""
    scalars = Scalars.on("cpu")
    scalars.kl_weight.fill_(kl_weight)
    posterior.complete_(batch_norm_share)
    posterior.finish_(scalars)
    return posterior.add_kl_(scalars)
