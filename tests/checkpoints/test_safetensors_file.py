"""Malformed safetensors files are refused with the file's name, before any tensor is read."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from runtime.checkpoints.safetensors_file import MAX_HEADER_BYTES, open_safetensors_file, read_tensor
from runtime.common.errors import CheckpointError

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write_raw(path, header, data=b"\0" * 32, length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)
    return path


def changed(name, **entries):
    return {**GOOD, name: {**GOOD[name], **entries}}


def test_tensors_equal_what_the_library_reads(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {
        "bf16": torch.randn(3, 5).bfloat16(),
        "f16": torch.randn(7).half(),
        "f32": torch.randn(2, 2, 2),
        "int32": torch.arange(6, dtype=torch.int32).view(2, 3),
        "int8": torch.arange(-3, 3, dtype=torch.int8),
        "scalar": torch.tensor(7, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    shard = open_safetensors_file(path)
    assert shard.tensors.keys() == tensors.keys() and shard.size == path.stat().st_size
    for name, expected in load_file(path).items():
        tensor = read_tensor(name, shard.tensors[name])
        assert tensor.dtype == expected.dtype and torch.equal(tensor, expected)


def test_a_tensor_owns_its_memory(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.zeros(4)}, path)
    stored = open_safetensors_file(path).tensors["a"]
    read_tensor("a", stored).add_(1)
    assert torch.equal(read_tensor("a", stored), torch.zeros(4))


ATTACKS = {
    "empty file": (b"", "0 bytes"),
    "length beyond the file": ((1000).to_bytes(8, "little") + b"{}", "claims a header of 1000"),
    "length of exabytes": (b"\xff" * 8 + b"{}", "claims a header of 18446744073709551615"),
    "not JSON": (write_raw, b"{nonsense", "not a safetensors header"),
    "not UTF-8": (write_raw, b"\xff\xfe{}", "not a safetensors header"),
    "UTF-16": (write_raw, json.dumps(GOOD).encode("utf-16"), "does not begin with a brace"),
    "UTF-16 without a mark": (write_raw, json.dumps(GOOD).encode("utf-16-le"), "not a safetensors header"),
    "a byte order mark": (write_raw, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "does not begin with a brace"),
    "a space first": (write_raw, b" " + json.dumps(GOOD).encode(), "does not begin with a brace"),
    "a lone surrogate": (write_raw, {"\ud800": GOOD["a"]}, "not a safetensors header"),
    "NaN": (write_raw, b'{"__metadata__": {}, "a": NaN}', "NaN is not JSON"),
    "metadata that is no text": (write_raw, GOOD | {"__metadata__": {"format": 1}}, "__metadata__ holds other"),
    "metadata that is a list": (write_raw, GOOD | {"__metadata__": [1]}, "not a safetensors header"),
    "a number of thousands of digits": (write_raw, b'{"a": ' + b"9" * 5000 + b"}", "not a safetensors header"),
    "a hundred thousand dimensions": (write_raw, changed("a", shape=[1] * 100_000), "a has 100000 dimensions; "),
    "a list": (write_raw, b"[]", "not a safetensors header"),
    "nested a million deep": (write_raw, b"[" * 1_000_000, "not a safetensors header"),
    "a name twice": (write_raw, b'{"a": {}, "a": {}}', "twice"),
    "entry that is no object": (write_raw, {"a": 5}, "a is described by 5"),
    "entry without dtype": (write_raw, {"a": {"shape": [1], "data_offsets": [0, 4]}}, "a is described by"),
    "three offsets": (write_raw, changed("a", data_offsets=[0, 24, 24]), "a is described by"),
    "unknown dtype": (write_raw, changed("b", dtype="F4"), "b has dtype 'F4'"),
    "dtype that is a list": (write_raw, changed("b", dtype=["F32"]), "b has dtype"),
    "negative shape": (write_raw, changed("a", shape=[-2, -3]), r"a has shape \[-2, -3\]"),
    "fractional shape": (write_raw, changed("a", shape=[2.0, 3]), "a has shape"),
    "true as a shape": (write_raw, changed("a", shape=[True, 6]), "a has shape"),
    "shape as text": (write_raw, changed("a", shape="23"), "a has shape"),
    "negative offset": (write_raw, changed("a", data_offsets=[-24, 0]), "a has shape"),
    "range shorter than the shape": (write_raw, changed("a", shape=[2, 4]), "takes 32 bytes"),
    "wrong dtype size": (write_raw, changed("b", dtype="F32"), "b with dtype F32"),
    "shape of exabytes": (write_raw, changed("a", shape=[2**62, 2**62]), "a with dtype F32"),
    "reversed range": (write_raw, changed("a", data_offsets=[24, 0]), "its range is 24 to 0"),
    "overlap": (write_raw, changed("b", data_offsets=[16, 24]), "b overlaps"),
    "the same bytes twice": (write_raw, changed("b", shape=[12], data_offsets=[0, 24]), "overlaps"),
    "gap": (write_raw, changed("b", data_offsets=[32, 40]), "b leaves a gap"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_malformed_header_is_refused(tmp_path, attack):
    *how, content, named = ATTACKS[attack]
    path = tmp_path / "evil.safetensors"
    if how:
        write_raw(path, content)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError, match=named) as caught:
        open_safetensors_file(path)
    assert str(caught.value).startswith(str(path))


@pytest.mark.parametrize("data, named", [(31, "cut short: .* of"), (0, "cut short"), (33, "1 bytes after its last")])
def test_the_header_must_account_for_every_byte(tmp_path, data, named):
    open_safetensors_file(write_raw(tmp_path / "good.safetensors", GOOD))
    with pytest.raises(CheckpointError, match=named):
        open_safetensors_file(write_raw(tmp_path / "evil.safetensors", GOOD, b"\0" * data))


def test_a_huge_header_is_refused_unread(tmp_path):
    path = tmp_path / "evil.safetensors"
    with open(path, "wb") as file:
        file.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        file.truncate(MAX_HEADER_BYTES + 100)  # sparse
    with pytest.raises(CheckpointError, match="above the limit"):
        open_safetensors_file(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="gone.safetensors cannot be read: No such file"):
        open_safetensors_file(tmp_path / "gone.safetensors")


def test_a_short_read_names_file_and_tensor(tmp_path):
    path = write_raw(tmp_path / "x.safetensors", GOOD)
    stored = open_safetensors_file(path).tensors["b"]
    with open(path, "rb+") as file:
        file.truncate(path.stat().st_size - 3)
    with pytest.raises(CheckpointError, match="x.safetensors: b ends after 5 of 8 bytes"):
        read_tensor("b", stored)
    path.unlink()
    with pytest.raises(CheckpointError, match="x.safetensors: b cannot be read: No such file"):
        read_tensor("b", stored)


@settings(max_examples=200, deadline=None)
@given(position=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_flipped_byte_is_refused_or_harmless(tmp_path_factory, position, byte):
    """With any one byte of the header changed, the result is a CheckpointError or equals the library's."""
    directory = tmp_path_factory.getbasetemp()
    path = write_raw(directory / "flipped.safetensors", GOOD, bytes(range(32)))
    content = bytearray(path.read_bytes())
    content[position % (len(content) - 32)] = byte
    path.write_bytes(bytes(content))
    try:
        shard = open_safetensors_file(path)
    except CheckpointError:
        return
    try:
        theirs = load_file(path)
    except SafetensorError:
        return  # the library is stricter on names and unknown keys
    for name, stored in shard.tensors.items():
        assert torch.equal(read_tensor(name, stored).view(torch.uint8), theirs[name].view(torch.uint8))
