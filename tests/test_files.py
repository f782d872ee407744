"""What is read and written: whole, or a sentence."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from nnunet_ima.errors import UserError
from nnunet_ima.files import read_json, sha256_of


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (2 << 20) + 7])
def test_the_digest_is_of_all_of_a_file(tmp_path, size):
    content = bytes(range(256)) * (size // 256 + 1)
    file = tmp_path / "weights.pth"
    file.write_bytes(content[:size])
    assert sha256_of(file) == hashlib.sha256(content[:size]).hexdigest()


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "is missing"), (b"{", "no valid JSON"), (b"\xff\xfe\x00", "no valid JSON"), (b"[1]", "no JSON table")],
)
def test_what_is_no_table_is_told_in_a_sentence(tmp_path, content, said):
    file: Path = tmp_path / "plans.json"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=said) as refusal:
        read_json(file)
    assert str(file) in str(refusal.value)
