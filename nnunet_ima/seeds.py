"""Random numbers that belong to a sample, not to its place in a batch."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def sample_generators(images: Tensor, seed: int, *purpose: str | int) -> list[torch.Generator]:
    """One CPU generator for each image, seeded from ``seed``, the ``purpose`` and the image's own intensities.

    The same image gets the same random numbers whatever the batch size, its place in the batch or the device, and no
    global generator is touched.
    """
    prefix = repr((seed, *purpose)).encode()
    return [_generator(prefix, image) for image in images.detach()]


def _generator(prefix: bytes, image: Tensor) -> torch.Generator:
    content = image.float().cpu().contiguous().numpy().tobytes()
    digest = hashlib.blake2b(prefix + content, digest_size=8).digest()
    # torch takes seeds below 2**63.
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
