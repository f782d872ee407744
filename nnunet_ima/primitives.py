"""Room for the kernels that oneDNN makes on a CPU."""

from __future__ import annotations

import os

import torch

CAPACITY = "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
# IMA's passes are of every size up to the batch: 32 sizes, some 22 convolutions, each forward and backward, with what
# lays out its inputs, and all that in two precisions, are several thousand.
PRIMITIVES = 16384


def keep_primitives(device: torch.device) -> None:
    """Let oneDNN keep the kernels of passes of many sizes, which it makes anew for each shape; its default is 1024.

    More than fit push each other out, least recently used first, and are made again in each step, which costs IMA a
    good part of it (docs/speed.md). No number changes by it. It has to be said before the first convolution of the
    process; what the user has set is left alone.
    """
    if device.type == "cpu" and "DNNL_PRIMITIVE_CACHE_CAPACITY" not in os.environ:
        os.environ.setdefault(CAPACITY, str(PRIMITIVES))
