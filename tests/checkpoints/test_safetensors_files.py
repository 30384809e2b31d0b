"""safetensors_files.py: every kind of damage gives a message with the name of the file; safetensors reads what we write."""

import json
import os
import struct
from contextlib import suppress
from functools import partial

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from paligemma.checkpoints import headers, safetensors_files
from paligemma.errors import CheckpointError, PaliGemmaError
from paligemma.files import read_json

ENTRY = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}


def write_file(path, header: object, data: bytes = b"", length: int | None = None):
    """Writes a safetensors file with any header (an object, or bytes) and any length of the header, true or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def with_entry(**changes: object) -> dict:
    return {"w": ENTRY | changes}


def test_a_header_says_what_the_library_says(tmp_path):
    tensors = {"a": torch.rand(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.ones(0, 4), "d": torch.tensor(1.5)}
    file = tmp_path / "model.safetensors"
    save_file(tensors, file, metadata={"format": "pt"})
    header = headers.read_header(file)
    assert {name: list(stored.shape) for name, stored in header.items()} == {"a": [2, 3], "b": [5], "c": [0, 4], "d": []}
    for name, stored in header.items():
        assert torch.equal(torch.cat([torch.empty(0), *safetensors_files.read_chunks(stored)]), tensors[name].flatten().float())


@pytest.mark.parametrize(
    ("header", "data", "length", "says"),
    [
        (with_entry(), b"x" * 10, None, "cut off"),
        (with_entry(), b"x" * 30, None, "something after"),
        (with_entry(), b"x" * 24, 2**40, "claims 1099511627776"),
        (with_entry(), b"x" * 24, 2**64 - 1, "claims 18446744073709551615"),
        (with_entry(), b"x" * 24, 10, "damaged"),
        (b"\xff\xfe{}", b"", None, "not UTF-8"),
        (b"{nonsense", b"", None, "damaged"),
        (b"[1, 2]", b"", None, "not an object"),
        (b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0], "x": NaN}}', b"", None, "NaN is not a JSON number"),
        (b"[" * 100_000, b"", None, "recursion"),
        ({"w": 3}, b"", None, "not described"),
        ({"w": {"dtype": "F32"}}, b"", None, "not described"),
        (with_entry(dtype="F99"), b"x" * 24, None, "F99"),
        (with_entry(dtype=[]), b"x" * 24, None, "dtype"),
        (with_entry(shape=[2, 4]), b"x" * 24, None, "data_offsets"),
        (with_entry(shape=[-2, -3]), b"x" * 24, None, "whole numbers"),
        (with_entry(shape=[True, 6]), b"x" * 24, None, "whole numbers"),
        (with_entry(shape="23"), b"x" * 24, None, "whole numbers"),
        (with_entry(shape=[2**63, 2**63]), b"x" * 24, None, "whole numbers"),
        (with_entry(shape=[2**62, 2**62]), b"x" * 24, None, "data_offsets"),
        (with_entry(shape=[2**62] * 200_000), b"x" * 24, None, "at most 8 whole numbers"),  # their product has 4 million digits
        (with_entry(dtype="F4", shape=[7, 7]), b"x" * 24, None, "data_offsets"),
        ({"module." * 600_000: ENTRY}, b"x" * 24, None, "has 4200000 letters"),
        ({f"{'w' * 400}{i}": {} for i in range(10_000)}, b"", None, "not described"),
        (b"[" + b"[]," * 200_000 + b"[]]", b"", None, "not an object"),
        (b"{" + b'"w":{},' * 100_000 + b'"w":{}}', b"", None, "w occurs twice"),
        (b" " * 20_000_000, b"", None, "claims 20000000"),
        (with_entry(data_offsets=[24, 0]), b"x" * 24, None, "data_offsets"),
        (with_entry(data_offsets=[0, 24, 48]), b"x" * 24, None, "at most 2 whole numbers"),
        (with_entry(data_offsets=[0]), b"x" * 24, None, "data_offsets"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [-0, 4]}}', b"x" * 4, None, "whole numbers from 0"),
        ({"a\u202eb": ENTRY}, b"x" * 24, None, "cannot be shown"),
        ({"a\ud800": ENTRY}, b"x" * 24, None, "surrogates not allowed"),
        ({"a": ENTRY | {"\ud800": 1}}, b"x" * 24, None, "surrogates not allowed"),
        (with_entry() | {"__metadata__": {"format": "a\ud800"}}, b"x" * 24, None, "surrogates not allowed"),
        (with_entry() | {"__metadata__": []}, b"x" * 24, None, "not an object with texts"),
        (with_entry() | {"__metadata__": {"step": 3}}, b"x" * 24, None, "not an object with texts"),
        (with_entry(data_offsets=[8, 32]), b"x" * 32, None, "begins at"),
        ({"w": ENTRY, "v": ENTRY}, b"x" * 24, None, "begins at"),
        (b'{"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "w": {}}', b"x" * 4, None, "w occurs twice"),
        (b'{"w": {"dtype": "F32", "shape": [1], "shape": [1], "data_offsets": [0, 4]}}', b"x" * 4, None, "shape occurs twice"),
        (b'{"w": {"dtype": "F32", "shape": [0], "data_offsets": [-0, 0]}}', b"", None, "it holds -0"),
        ({"\ud800": ENTRY}, b"x" * 24, None, "surrogates"),
        ({"w": ENTRY, "__metadata__": []}, b"x" * 24, None, "__metadata__"),
        ({"w": ENTRY, "__metadata__": [1]}, b"x" * 24, None, "__metadata__"),
        ({"w": ENTRY, "__metadata__": {"step": 1}}, b"x" * 24, None, "__metadata__"),
        (b'{"w": {"dtype": "F32", "shape": [1' + b"0" * 5000 + b'], "data_offsets": [0, 4]}}', b"x" * 4, None, "damaged"),
    ],
)
def test_a_damaged_header_is_refused_with_the_name_of_the_file(tmp_path, header, data, length, says):
    file = write_file(tmp_path / "model.safetensors", header, data, length)
    with pytest.raises(CheckpointError, match=says) as caught:
        headers.read_header(file)
    assert str(file) in caught.value.message and len(caught.value.message) < 1000
    assert caught.value.path == str(file)


def test_every_dtype_of_the_format_is_read(tmp_path):
    for name, bits in headers.BITS.items():
        header = {"w": {"dtype": name, "shape": [4, 2], "data_offsets": [0, bits]}}
        assert headers.read_header(write_file(tmp_path / "w.safetensors", header, b"x" * bits))["w"].dtype == name


@pytest.mark.parametrize("size", [0, 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path, size):
    (tmp_path / "model.safetensors").write_bytes(b"\0" * size)
    with pytest.raises(CheckpointError, match=f"it has {size} bytes"):
        headers.read_header(tmp_path / "model.safetensors")


def test_a_truncated_file_is_told_with_both_sizes(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"w": torch.rand(100, 100)}, file)
    whole = file.stat().st_size
    os.truncate(file, whole - 1000)
    with pytest.raises(CheckpointError, match=f"{whole} bytes and the file has {whole - 1000}: it is cut off"):
        headers.read_header(file)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, 250), st.integers(0, 255)), min_size=1, max_size=4), cut=st.integers(0, 40))
def test_random_edits_raise_nothing_but_our_errors(tmp_path, edits, cut):
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.rand(2, 3), "b": torch.rand(4).half()}, file)
    data = bytearray(file.read_bytes())
    for place, value in edits:
        data[place % len(data)] = value
    file.unlink()  # the library has mapped it
    file.write_bytes(data[: len(data) - cut])
    try:
        header = headers.read_header(file)
    except PaliGemmaError:
        return
    for stored in header.values():  # an accepted header describes tensors that can be read
        if stored.dtype in safetensors_files.DTYPES:
            assert sum(len(part) for part in safetensors_files.read_chunks(stored)) == torch.Size(stored.shape).numel()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", ":1:1 is not JSON"),
        (b'{\n  "a": 1,\n  oops\n}', ":3:3 is not JSON"),
        (b'{"a": 1', ":1:8 is not JSON"),
        (b"\xff\xfe\x00", ":1:1 is not UTF-8"),
        (b"[1]", ":1:1 is a list"),
        (b"null", ":1:1 is null"),
        (b'{"a": ' + b"[" * 100_000, "not usable JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "not usable JSON"),
    ],
)
def test_broken_json_is_told_with_line_and_column(tmp_path, text, says):
    file = tmp_path / "config.json"
    file.write_bytes(text)
    with pytest.raises(CheckpointError, match=says):
        read_json(file)


def test_settings_of_absurd_size_are_not_read(tmp_path):
    file = tmp_path / "config.json"
    file.touch()
    os.truncate(file, 10**12)  # a sparse file, which takes no space on the disk
    with pytest.raises(CheckpointError, match="1000000000000 bytes"):
        read_json(file)


def write_index(folder, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


@pytest.mark.parametrize(
    "name",
    ["../x.safetensors", "/etc/passwd", "a\\b.safetensors", "a\0.safetensors", "a/b.safetensors", ".safetensors", "", 3, None,
     "..safetensors", "weights.bin", "x.safetensors\n", "é.safetensors", "x" * 300 + ".safetensors"],
)  # fmt: skip
def test_an_index_may_name_bare_file_names_only(tmp_path, name):
    write_index(tmp_path, {"w": name})
    with pytest.raises(CheckpointError, match="bare file name"):
        headers.find_files(tmp_path)


@pytest.mark.parametrize("weight_map", [None, {}, [], "model.safetensors"])
def test_an_index_without_a_map_is_refused(tmp_path, weight_map):
    write_index(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        headers.find_files(tmp_path)


def test_missing_shards_are_listed(tmp_path):
    names = [f"model-{i:05}-of-00003.safetensors" for i in (1, 2, 3)]
    write_index(tmp_path, {f"w{i}": name for i, name in enumerate(names)})
    save_file({"w1": torch.rand(1)}, tmp_path / names[1])
    with pytest.raises(CheckpointError, match=f"lacks 2 of 3 files.*{names[0]}, {names[2]}.*incomplete"):
        headers.find_files(tmp_path)


def test_the_index_rules_over_other_files(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("model-00001-of-00001.safetensors", "adapter_model.safetensors", "stale.safetensors"):
        save_file({"w": torch.rand(1)}, tmp_path / name)
    write_index(tmp_path, {"w": "model-00001-of-00001.safetensors"})
    files = headers.find_files(tmp_path)
    assert files == [tmp_path / "model-00001-of-00001.safetensors"] and not caplog.text
    headers.note_ignored(tmp_path, files)
    assert "the index does not name them: adapter_model.safetensors, stale.safetensors" in caplog.text
    caplog.clear()
    (tmp_path / "adapter_config.json").write_text("{}")  # now the adapter is used
    headers.note_ignored(tmp_path, files)
    assert caplog.text.strip().endswith("the index does not name them: stale.safetensors")


@pytest.mark.parametrize("index", ['{"weight_map": {"w": "model-00001-of-00002.safetensors"}}', '{"weight_map": 3}', "damaged"])
def test_a_single_file_is_complete_whatever_index_was_left_beside_it(tmp_path, caplog, index):
    caplog.set_level("INFO")
    save_file({"w": torch.rand(1)}, tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    files = headers.find_files(tmp_path)
    assert files == [tmp_path / "model.safetensors"] and not caplog.text
    headers.note_ignored(tmp_path, files)
    assert "next to it is ignored" in caplog.text


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("pytorch_model.bin", "never read.*safetensors"),
        ("pt_224.npz", "big_vision"),
        ("model-00001-of-00002.safetensors", "Download the index"),
        ("readme.txt", "no weights"),
    ],
)
def test_a_folder_without_weights_is_explained_by_what_it_holds(tmp_path, name, says):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(CheckpointError, match=says):
        headers.find_files(tmp_path)


def test_links_are_followed_as_in_the_cache_of_the_hub(tmp_path):
    (tmp_path / "blobs").mkdir()
    save_file({"w": torch.rand(2)}, tmp_path / "blobs" / "abc")
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "blobs" / "abc")
    assert list(headers.read_header(headers.find_files(tmp_path)[0])) == ["w"]
    (tmp_path / "blobs" / "abc").unlink()
    with pytest.raises(CheckpointError, match="broken link.*incomplete"):
        headers.read_header(headers.find_files(tmp_path)[0])


def test_a_pipe_in_place_of_a_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not a file"):
        headers.read_header(tmp_path / "model.safetensors")


def test_parts_come_in_order_whatever_their_size(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "CHUNK_ELEMENTS", 7)
    tensor = torch.rand(5, 6)
    save_file({"first": torch.rand(3), "w": tensor}, tmp_path / "model.safetensors")
    stored = headers.read_header(tmp_path / "model.safetensors")["w"]
    parts = [part.clone() for part in safetensors_files.read_chunks(stored)]
    assert [len(part) for part in parts] == [7, 7, 7, 7, 2]
    assert torch.equal(torch.cat(parts), tensor.flatten())


def test_what_is_written_the_library_reads(tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_files, "CHUNK_ELEMENTS", 7)
    tensors = {
        "matrix": torch.rand(5, 6).bfloat16(), "turned": torch.rand(3, 4).T, "one": torch.tensor(2.0), "none": torch.empty(0, 3),
        "bytes": torch.arange(9, dtype=torch.uint8), "half": torch.rand(3).half(),
    }  # fmt: skip
    safetensors_files.write_tensors(tmp_path / "model.safetensors", tensors)
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensor) and loaded[name].dtype == tensor.dtype for name, tensor in tensors.items())
    assert min(stored.start for stored in headers.read_header(tmp_path / "model.safetensors").values()) % 64 == 0


def test_shards_keep_to_their_size_and_an_index_names_them(tmp_path):
    state = {f"w{i}": torch.full((100,), float(i)) for i in range(10)}  # 400 bytes each
    safetensors_files.write_shards(state, tmp_path, max_shard_bytes=1300)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 4000
    assert sorted(set(index["weight_map"].values())) == [f"model-{i:05}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], state[name])


@pytest.mark.parametrize(("old_size", "new_size"), [(1200, 10**6), (10**6, 1200), (1200, 1200), (1200, 2400)])
def test_an_interrupted_replacement_never_leaves_a_mixture(tmp_path, monkeypatch, old_size, new_size):
    """After an interruption at any step, the folder holds the old weights, or the new ones, or is refused."""
    old, new = ({f"w{i}": torch.full((300,), value) for i in range(4)} for value in (0.0, 1.0))
    refused, unlink = 0, safetensors_files.Path.unlink
    for last in range(10):
        folder, source = tmp_path / f"folder{last}", tmp_path / f"source{last}"
        for place, state, size in ((folder, old, old_size), (source, new, new_size)):
            place.mkdir()
            safetensors_files.write_shards(state, place, size)
            (place / "config.json").write_text("{}")
        steps = iter(range(100))

        def step(real, *args, steps=steps, last=last, **options):
            if next(steps) == last:
                raise KeyboardInterrupt
            return real(*args, **options)

        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(os, "replace", partial(step, os.replace))
            patch.setattr(safetensors_files.Path, "unlink", lambda path, step=step, **options: step(unlink, path, **options))
            safetensors_files.replace_files(source, folder)
        try:
            files = headers.find_files(folder)
        except CheckpointError:
            refused += 1
            continue
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert found.keys() == old.keys()
        assert len({tensor.unique().item() for tensor in found.values()}) == 1
    assert refused == (5 if old_size == new_size else 0)  # after the old index is deleted, until the new one is in place


def test_the_fingerprint_knows_each_tensor_and_what_is_read_beside_them(tmp_path):
    big = {f"layer{i}": torch.zeros(200_000) for i in range(8)}
    small = big | {"projector": torch.zeros(10)}
    save_file(small, tmp_path / "model.safetensors")
    first = safetensors_files.fingerprint([tmp_path], {})
    assert safetensors_files.fingerprint([tmp_path], {}) == first
    (tmp_path / "left.safetensors").write_bytes(b"version https://git-lfs")  # is not read
    assert safetensors_files.fingerprint([tmp_path], {}) == first
    save_file(small | {"projector": torch.ones(10)}, tmp_path / "model.safetensors")
    assert safetensors_files.fingerprint([tmp_path], {}) != first
    save_file(small, tmp_path / "model.safetensors")
    for name in ("config.json", "generation_config.json", "processor_config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text("{}")
        assert safetensors_files.fingerprint([tmp_path], {}) != first
        (tmp_path / name).unlink()
