"""Trainers are found by name: ours in any case, others as nnU-Net finds them."""

from __future__ import annotations

import os
import sys
import types
from pathlib import Path

import pytest
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_ima.errors import UserError
from nnunet_ima.evaluation.environment import find_trainer, our_trainers_too, trainers_folder


@pytest.fixture
def lazy_module(request, monkeypatch) -> None:
    """A loaded module that imports another one when it is asked for an attribute it has not, as of a large library."""

    imports = getattr(request, "param", sys.maxsize)

    def attribute(name: str) -> object:
        # Whatever it imports; only that the number of loaded modules changes matters.
        number = sum(name.startswith("imported_lazily") for name in sys.modules)
        if number < imports:
            monkeypatch.setitem(sys.modules, f"imported_lazily_{number}", types.ModuleType("lazily"))
        raise AttributeError(name)

    module = types.ModuleType("a_lazy_module")
    vars(module)["__getattr__"] = attribute
    monkeypatch.setitem(sys.modules, "a_lazy_module", module)


@pytest.mark.parametrize("name", ["nnUNetTrainerSTD", "nnUNetTrainerIMA", "nnUNetTrainerIMA_50epochs"])
def test_ours_are_found_where_nnunet_s_look_up_fails(lazy_module, name, monkeypatch):
    monkeypatch.setenv("nnUNet_extTrainer", str(trainers_folder()))
    with pytest.raises(RuntimeError, match="changed size during iteration"):
        recursive_find_trainer_class_by_name(name)
    found = find_trainer(name)
    assert found.__name__ == name
    assert issubclass(found, nnUNetTrainer)


@pytest.mark.parametrize("lazy_module", [2], indirect=True)
def test_modules_that_import_lazily_have_done_so_when_nnunet_looks(lazy_module):
    with our_trainers_too():
        assert recursive_find_trainer_class_by_name("nnUNetTrainerIMA").__name__ == "nnUNetTrainerIMA"


def test_others_are_found_as_nnunet_finds_them(tmp_path: Path, monkeypatch):
    assert find_trainer("nnUNetTrainer") is nnUNetTrainer
    (tmp_path / "nnUNetTrainerOfSomebody.py").write_text(
        "from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer\n"
        "class nnUNetTrainerOfSomebody(nnUNetTrainer):\n    pass\n"
    )
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path))
    assert find_trainer("nnUNetTrainerOfSomebody").__name__ == "nnUNetTrainerOfSomebody"
    assert os.environ["nnUNet_extTrainer"] == str(tmp_path)
    with pytest.raises(UserError, match="There is no trainer nnUNetTrainerOfNobody"):
        find_trainer("nnUNetTrainerOfNobody")
