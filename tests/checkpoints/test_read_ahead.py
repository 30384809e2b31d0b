"""read_ahead.py: reading ahead changes nothing about the loaded model and its errors, and every failure of it goes unnoticed."""

import errno
import subprocess
import sys
import threading
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from paligemma import inference
from paligemma import model as api
from paligemma.checkpoints import read_ahead, safetensors_files, weights
from paligemma.checkpoints.headers import read_header
from paligemma.checkpoints.read_ahead import Part
from paligemma.errors import CheckpointError, DeviceError
from paligemma.machine import GIB
from paligemma.programs import commandline
from tests.tiny_checkpoint import make_checkpoint

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}
NORM = "language_model.model.norm.weight"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A tiny checkpoint, which is read ahead although it is small."""
    monkeypatch.setattr(read_ahead, "MIN_BYTES", 1)
    monkeypatch.setattr(read_ahead, "free_cpu_memory", lambda: 4 * GIB)
    return make_checkpoint(tmp_path / "model")


@pytest.fixture
def looked_at(monkeypatch):
    """The names of the tensors whose values were looked at while a model was loaded."""
    names, aminmax, mv = [], torch.aminmax, torch.mv
    real = safetensors_files.check_values

    def check(x, tensor, is_finite=False):
        for name, function in (("aminmax", aminmax), ("mv", mv)):
            monkeypatch.setattr(torch, name, lambda *args, f=function: names.append(tensor.name) or f(*args))
        real(x, tensor, is_finite)

    monkeypatch.setattr(safetensors_files, "check_values", check)
    return names


def load(folder, ahead, **options):
    files = weights.ModelFiles(folder)
    files.ahead = ahead
    return files.load(**options)


@pytest.mark.parametrize("name", DTYPES)
def test_nan_and_infinity_are_found_in_every_dtype_and_place(name):
    dtype = DTYPES[name]
    info = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, 1, -1, info.max, info.min, info.tiny, -info.smallest_normal, info.eps], dtype=dtype)

    def is_finite(x):
        return read_ahead.is_finite(x.view(torch.uint8).numpy(), name)

    assert is_finite(finite) and is_finite(finite[finite < 0]) and is_finite(finite[finite >= 0])
    nan = torch.tensor([float("nan")], dtype=dtype)
    for bad in (nan, -nan, torch.tensor([float("inf")], dtype=dtype), torch.tensor([float("-inf")], dtype=dtype)):
        for place in range(len(finite) + 1):
            assert not is_finite(torch.cat([finite[:place], bad, finite[place:]]))


def test_a_file_is_read_in_few_large_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(read_ahead, "MIN_BYTES", 64)
    sizes = [("a", "bfloat16", 16), ("b", "bfloat16", 16), ("c", "uint8", 80), ("d", "float32", 4), ("e", "float32", 16)]
    tensors = {name: torch.zeros(size, dtype=getattr(torch, dtype)) for name, dtype, size in sizes}
    safetensors_files.write_tensors(tmp_path / "w", tensors)
    first = min(tensor.start for tensor in read_header(tmp_path / "w").values())
    found = [(part.dtype, part.start - first, part.end - first) for part in read_ahead.parts_of(tmp_path / "w")]
    assert found == [("BF16", 0, 64), (None, 64, 144), ("F32", 144, 224)]
    monkeypatch.setattr(read_ahead, "MIN_BYTES", 65)
    assert [part.dtype for part in read_ahead.parts_of(tmp_path / "w")] == [None, "F32"]


def test_reading_ahead_changes_nothing_about_the_model(folder, looked_at):
    plain = weights.load_model(folder).state_dict()
    assert looked_at
    looked_at.clear()
    ahead = read_ahead.begin(str(folder), "cpu", None)
    loaded = load(folder, ahead).state_dict()
    assert not looked_at  # the thread has checked everything
    assert loaded.keys() == plain.keys()
    assert all(torch.equal(loaded[name], plain[name]) for name in plain)
    assert not ahead.thread.is_alive() and ahead.thread not in threading.enumerate()
    file = folder / "model.safetensors"
    start = np.frombuffer(ahead.maps[file], np.uint8).ctypes.data
    assert all(loaded[name].data_ptr() == start + stored.start for name, stored in read_header(file).items())


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_what_is_not_finite_is_refused_by_name_as_without_reading_ahead(folder, value):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in weights.load_model(folder).state_dict().items()}
    tensors[NORM][1] = value
    save_file(tensors, file)
    for ahead in (None, read_ahead.begin(str(folder), "cpu")):
        with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinity"):
            load(folder, ahead)
    ahead = read_ahead.begin(str(folder), "cpu")
    assert not load(folder, ahead, allow_nonfinite=True).language_model.model.norm.weight[1].isfinite()
    assert not ahead.thread.is_alive()


def test_values_are_checked_again_if_they_change_their_dtype(folder):
    """A finite number of float32 can be infinite in float16."""
    tensors = {name: tensor.float() for name, tensor in weights.load_model(folder).state_dict().items()}
    tensors[NORM][1] = 1e30
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinity as float16"):
        load(folder, read_ahead.begin(str(folder), "cpu"), dtype="fp16")


def test_a_matrix_of_equal_values_is_still_told(folder, caplog):
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in weights.load_model(folder).state_dict().items()}
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    tensors[name][:] = 2
    save_file(tensors, file)
    load(folder, read_ahead.begin(str(folder), "cpu"))
    assert f"every value of {name} is 2" in caplog.text


def test_a_thread_that_runs_out_of_memory_is_no_error(folder, monkeypatch, looked_at):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(read_ahead, "is_finite", fail)
    ahead = read_ahead.begin(str(folder), "cpu")
    load(folder, ahead)
    assert looked_at and not ahead.finite


def test_without_another_thread_the_files_are_only_mapped(folder, monkeypatch, looked_at):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    ahead = read_ahead.begin(str(folder), "cpu")
    load(folder, ahead)
    assert looked_at and not ahead.finite


def test_a_file_that_is_replaced_after_it_was_mapped_is_mapped_again(folder):
    tensors = {name: tensor.clone() + 1 for name, tensor in weights.load_model(folder).state_dict().items()}
    save_file(tensors, folder / "other")  # with a header of another size
    ahead = read_ahead.begin(str(folder), "cpu")
    ahead.wait()
    (folder / "other").replace(folder / "model.safetensors")
    loaded = load(folder, ahead).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_values_that_are_written_after_they_were_read_are_checked(folder):
    file = folder / "model.safetensors"
    ahead = read_ahead.begin(str(folder), "cpu")
    ahead.wait()
    with open(file, "r+b") as stream:
        stream.seek(read_header(file)[NORM].start)
        stream.write(b"\xff" * 4)
    with pytest.raises(CheckpointError, match=f"{NORM} holds NaN or infinity"):
        load(folder, ahead)


@pytest.mark.parametrize("case", ["no folder", "no weights", "damaged", "small", "little memory", "GPU", "dtype", "quantize"])
def test_nothing_is_read_ahead_that_would_not_be_used(case, folder, monkeypatch):
    arguments = {"GPU": ("cuda", None, None), "dtype": ("cpu", "fp32", None), "quantize": ("auto", None, "int8")}
    file = folder / "model.safetensors"
    size = file.stat().st_size
    if case == "no weights":
        file.unlink()
    if case == "damaged":
        file.write_bytes(file.read_bytes()[:-1])
    if case == "small":
        monkeypatch.setattr(read_ahead, "MIN_BYTES", size + 1)
    if case == "little memory":
        monkeypatch.setattr(read_ahead, "free_cpu_memory", lambda: size + read_ahead.ROOM - 1)
    name = str(folder / "nowhere" if case == "no folder" else folder)
    assert read_ahead.begin(name, *arguments.get(case, ("cpu",))) is None


def test_files_are_not_kept_mapped_if_the_address_space_is_then_too_small_to_load(folder, monkeypatch):
    size, mapped, real = (folder / "model.safetensors").stat().st_size, [], read_ahead.map_file
    monkeypatch.setattr(read_ahead, "map_file", lambda file: mapped.append(weakref.ref(found := real(file))) or found)
    monkeypatch.setattr(read_ahead, "free_cpu_memory", lambda: size * (2 - len(mapped)) + read_ahead.ROOM - 1)
    assert read_ahead.begin(str(folder), "cpu") is None
    assert [reference() for reference in mapped] == [None]


def test_just_enough_memory_is_enough(folder, monkeypatch):
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(read_ahead, "free_cpu_memory", lambda: size + read_ahead.ROOM)
    read_ahead.begin(str(folder), "auto", None).wait()


def test_a_file_that_became_shorter_before_it_was_mapped_is_an_error(folder):
    files = weights.ModelFiles(folder)
    assert files.tensors
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(CheckpointError, match="became shorter"):
        files.load()


def test_an_address_space_without_room_is_an_error_about_memory(folder, monkeypatch):
    def fail(_):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(read_ahead, "map_file", fail)
    assert read_ahead.begin(str(folder), "cpu") is None
    with pytest.raises(DeviceError, match="memory ran out while loading"):
        weights.load_model(folder)


@pytest.mark.parametrize("caller", ["inference", "annotate", "load"])
def test_the_programs_and_the_library_read_ahead(caller, folder, tmp_path, monkeypatch):
    from paligemma.programs import annotate

    begun, begin = [], read_ahead.begin
    monkeypatch.setattr(read_ahead, "begin", lambda *args, **options: begun.append(begin(*args, **options)) or begun[-1])
    if caller == "load":
        api.load(folder, device="cpu")
    elif caller == "inference":
        given = [f"--model_path={folder}", "--prompt=ocr", "--only_cpu", "--max_tokens_to_generate=2"]
        assert commandline.run(inference.Flags, inference.program, given) == 0
    else:
        picture = str(inference.BUNDLED_PICTURE)
        given = [picture, f"--model_path={folder}", "--task=ocr", "--only_cpu", f"--output={tmp_path / 'rows.jsonl'}"]
        assert commandline.run(annotate.Flags, annotate.program, given) == 0
    (ahead,) = begun
    assert ahead.finite == [(folder / "model.safetensors", part) for part in read_ahead.parts_of(folder / "model.safetensors")]
    assert not ahead.thread.is_alive()


def test_hub_models_are_read_ahead_from_the_cache(folder, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert read_ahead.begin("owner/model", "cpu") is None
    cached = tmp_path / "hub" / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "tuned").write_text("a" * 40)
    (cached / "snapshots").mkdir()
    folder.rename(cached / "snapshots" / ("a" * 40))
    assert read_ahead.begin("owner/model", "cpu") is None  # the branch main is not there
    ahead = read_ahead.begin("owner/model", "cpu", revision="tuned")
    ahead.wait()
    assert [file for file, _ in ahead.finite] == [cached / "snapshots" / ("a" * 40) / "model.safetensors"]


@pytest.mark.parametrize("caller", ["inference", "load"])
def test_left_over_files_are_noted_once(caller, folder, capsys, caplog):
    caplog.set_level("INFO")
    (folder / "model.safetensors.index.json").write_text("{}")
    if caller == "load":
        api.load(folder, device="cpu")
        told = caplog.text
    else:
        given = [f"--model_path={folder}", "--prompt=ocr", "--only_cpu", "--max_tokens_to_generate=2", "--verbose"]
        assert commandline.run(inference.Flags, inference.program, given) == 0
        told = capsys.readouterr().err
    assert told.count("next to it is ignored") == 1


def test_reading_ahead_does_not_import_torch():
    code = "import sys; from paligemma.checkpoints import read_ahead; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_parts_are_compared_by_what_they_cover():
    ahead = read_ahead.ReadAhead({})
    assert not ahead.is_finite(stored := read_ahead.StoredTensor("w", "file", "F32", (2,), 8, 8))
    ahead.finite.append(("file", Part("F32", 8, 15)))
    assert not ahead.is_finite(stored)
    ahead.finite.append(("file", Part("F32", 8, 16)))
    assert ahead.is_finite(stored)
