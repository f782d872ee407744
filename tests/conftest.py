"""What all tests share: modest, repeatable property tests."""

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "nnunet_ima", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("nnunet_ima")

# Tiny networks gain nothing from a second thread, and wait for it on a busy machine.
torch.set_num_threads(1)
