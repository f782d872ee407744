"""What oneDNN has compiled is there still when it is needed again."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from nnunet_project import make_trainer

from nnunet_ima.primitives import CAPACITY, keep_primitives
from nnunet_ima.trainers.nnUNetTrainerIMA import nnUNetTrainerIMA

OLD_NAME = "DNNL_PRIMITIVE_CACHE_CAPACITY"
# More shapes than oneDNN keeps on its own, twice in the same order; oneDNN tells of each kernel that it makes.
CONVOLUTIONS = """
import torch
from nnunet_ima.primitives import keep_primitives
{call}
convolution = torch.nn.Conv2d(16, 16, 3)
with torch.no_grad():
    for again in range(2):
        for n in range(400):
            convolution(torch.zeros(4, 16, 8 + n % 20, 8 + n // 20))
        print("round ends", flush=True)
"""


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    for name in (CAPACITY, OLD_NAME):
        # Set first: monkeypatch then takes away afterwards what the code has put there.
        monkeypatch.setenv(name, "1")
        monkeypatch.delenv(name)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize(("call", "all_kept"), [("keep_primitives(torch.device('cpu'))", True), ("", False)])
def test_no_kernel_is_made_twice(call, all_kept):
    found = subprocess.run(
        [sys.executable, "-c", CONVOLUTIONS.format(call=call)],
        env={**os.environ, "ONEDNN_VERBOSE": "profile_create"},
        capture_output=True,
        text=True,
        check=True,
    )
    first, second, _ = found.stdout.split("round ends")
    assert first.count("create:cache_miss") > 1024
    assert (second.count("create:cache_miss") == 0) == all_kept


@pytest.mark.parametrize("name", [CAPACITY, OLD_NAME])
def test_what_the_user_said_counts(monkeypatch, name):
    monkeypatch.setenv(name, "77")
    keep_primitives(torch.device("cpu"))
    assert {os.environ.get(one) for one in (CAPACITY, OLD_NAME)} == {"77", None}


def test_on_a_gpu_nothing_is_said():
    keep_primitives(torch.device("cuda"))
    assert CAPACITY not in os.environ


def test_a_trainer_says_it_before_its_network_is_made(project, results):
    make_trainer(project, nnUNetTrainerIMA)
    assert int(os.environ[CAPACITY]) > 1024
