"""mask_codec.py: its architecture, equality with Google's decoder, faults of files, masks pasted into pictures."""

import os
import re
import warnings
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from paligemma.errors import CheckpointError
from paligemma.files import CODEC_NAME
from paligemma.objects import mask_codec
from paligemma.objects.mask_codec import MaskCodec, find_codec, load_codec, with_masks
from paligemma.objects.outputs import NormalizedBox, ParsedObject

ORACLE = Path(__file__).parents[1] / "oracle" / "segdecoder"
# Every array of vae-oid.npz that is needed, written out, because the code derives them from its modules.
SHAPES = {
    "_vq_vae._embedding": (128, 512), "encoder.0": (16, 1, 4, 4), "encoder.2": (32, 16, 4, 4), "encoder.4": (64, 32, 4, 4),
    "encoder.6": (128, 64, 4, 4), "encoder.8.net.0": (128, 128, 3, 3), "encoder.8.net.2": (128, 128, 3, 3),
    "encoder.8.net.4": (128, 128, 1, 1), "encoder.9.net.0": (128, 128, 3, 3), "encoder.9.net.2": (128, 128, 3, 3),
    "encoder.9.net.4": (128, 128, 1, 1), "encoder.10": (512, 128, 1, 1), "decoder.0": (128, 512, 1, 1),
    "decoder.2.net.0": (128, 128, 3, 3), "decoder.2.net.2": (128, 128, 3, 3), "decoder.2.net.4": (128, 128, 1, 1),
    "decoder.3.net.0": (128, 128, 3, 3), "decoder.3.net.2": (128, 128, 3, 3), "decoder.3.net.4": (128, 128, 1, 1),
    "decoder.4": (128, 128, 4, 4), "decoder.6": (128, 64, 4, 4), "decoder.8": (64, 32, 4, 4), "decoder.10": (32, 16, 4, 4),
    "decoder.12": (1, 16, 1, 1),
}  # fmt: skip
TRANSPOSED = ("decoder.4", "decoder.6", "decoder.8", "decoder.10")


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"_vq_vae._embedding": SHAPES["_vq_vae._embedding"]}
    for name, shape in SHAPES.items():
        if not name.startswith("_"):
            shapes |= {f"{name}.weight": shape, f"{name}.bias": (shape[1] if name in TRANSPOSED else shape[0],)}
    return shapes


def random_arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = expected_shapes()
    return {name: (rng.normal(size=shape) / np.prod(shape[1:]) ** 0.5).astype(np.float32) for name, shape in shapes.items()}


@cache
def fixture() -> dict[str, torch.Tensor]:
    with np.load(ORACLE / "fixture.npz") as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def google(tmp_path_factory) -> MaskCodec:
    """The decoder of the oracle, with a random encoder: a file needs both."""
    path = tmp_path_factory.mktemp("google") / CODEC_NAME
    with np.load(ORACLE / "weights.npz") as file:
        np.savez(path, **random_arrays() | dict(file))
    return load_codec(path)


def test_the_parameters_equal_those_of_the_official_file():
    assert {name: tuple(value.shape) for name, value in MaskCodec().state_dict().items()} == expected_shapes()


def test_the_decoder_equals_jax(google):
    # Sums have another order: the largest difference is 5.2e-6 in masks from -4.1 to 6.4.
    torch.testing.assert_close(google.decode(fixture()["codes"].long()), fixture()["masks"], rtol=0, atol=2e-5)


@pytest.mark.parametrize("change", [lambda codes: codes.view(-1, 4, 4).mT.flatten(1), lambda codes: codes.flip(1)])
def test_codes_in_another_order_give_another_mask(google, change):
    gap = google.decode(change(fixture()["codes"].long())) - fixture()["masks"]
    assert gap.abs().max() > 1


@torch.no_grad()
def test_the_encoder_equals_its_description(google):
    """Without modules: convolutions with stride 2, residual blocks, the nearest vector of the codebook by subtraction."""
    weights = {name: torch.from_numpy(value) for name, value in random_arrays().items()}
    weights |= {name: value for name, value in google.state_dict().items() if name.startswith("_")}
    conv, relu = torch.nn.functional.conv2d, torch.relu

    def layer(x, name, **options):
        return conv(x, weights[f"{name}.weight"], weights[f"{name}.bias"], **options)

    masks = torch.rand(5, 64, 64, generator=torch.Generator().manual_seed(0))
    x = 2 * (masks[:, None] - 0.5)
    for index in (0, 2, 4, 6):
        x = relu(layer(x, f"encoder.{index}", stride=2, padding=1))
    for index in (8, 9):
        inner = relu(layer(x, f"encoder.{index}.net.0", padding=1))
        inner = relu(layer(inner, f"encoder.{index}.net.2", padding=1))
        x = x + layer(inner, f"encoder.{index}.net.4")
    grid = layer(x, "encoder.10").permute(0, 2, 3, 1)  # rows, columns, numbers of a vector
    distances = ((grid[..., None, :] - weights["_vq_vae._embedding"]) ** 2).sum(-1)
    codes = google.encode(masks)
    assert codes.dtype == torch.int64 and len(codes.unique()) > 1
    assert codes.tolist() == distances.argmin(-1).flatten(1).tolist()


def test_an_empty_batch_is_encoded_and_decoded(google):
    assert google.encode(torch.zeros(0, 64, 64)).shape == (0, 16)
    assert google.decode(torch.zeros(0, 16, dtype=torch.int64)).shape == (0, 64, 64)


@pytest.mark.parametrize("codes", [torch.zeros(2, 15, dtype=torch.int64), torch.full((1, 16), 128), torch.full((1, 16), -1)])
def test_codes_that_do_not_exist_are_refused(google, codes):
    with pytest.raises(ValueError, match=r"\[M, 16\] is needed|numbers from 0 to 127 are needed"):
        google.decode(codes)


# Files


def test_half_precision_and_unneeded_arrays_are_accepted(tmp_path):
    arrays = {name: value.astype(np.float16) for name, value in random_arrays().items()}
    further = {"_vq_vae._ema_w": np.zeros(3), "_vq_vae._ema_cluster_size": np.ones(128)}
    np.savez_compressed(tmp_path / CODEC_NAME, **arrays, **further)
    codec = load_codec(tmp_path / CODEC_NAME)
    assert {value.dtype for value in codec.state_dict().values()} == {torch.float32}
    assert not codec.training and not any(parameter.requires_grad for parameter in codec.parameters())
    np.testing.assert_array_equal(codec.state_dict()["decoder.4.weight"].numpy(), arrays["decoder.4.weight"].astype(np.float32))


def npy(dtype: str, shape: str, numbers: bytes = b"") -> bytes:
    """An npy file with this dtype and shape in its header."""
    header = f"{{'descr': {dtype}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + numbers


ENTRIES = {  # for encoder.0.bias; numpy's own reader fails on these in other ways, or trusts the header
    "no npy": b"16 numbers",
    "object header": npy("'|O'", "(16,)"),
    "huge shape": npy("'<f4'", f"({1 << 30},)"),
    "long shape": npy("'<f4'", f"({10**400},)"),
    "short": npy("'<f4'", "(16,)", bytes(12)),
    "nested": b"\x93NUMPY\1\0\xd0\7" + b"{'descr': " * 200,
}


def damaged(path: Path, damage: str) -> None:
    if damage == "twice":
        with warnings.catch_warnings(), zipfile.ZipFile(path, "w") as archive:
            warnings.simplefilter("ignore")
            for _ in range(2):
                archive.writestr("encoder.0.bias.npy", npy("'<f4'", "(16,)", bytes(64)))
        return
    if damage in ("lzma", "password", *ENTRIES):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA if damage == "lzma" else zipfile.ZIP_STORED) as archive:
            archive.writestr("encoder.0.bias.npy", ENTRIES.get(damage, npy("'<f4'", "(16,)", bytes(64))))
        content = bytearray(path.read_bytes())
        if damage == "lzma":
            content[70:80] = b"\xff" * 10
        if damage == "password":
            content[6] |= 1
            content[content.index(b"PK\1\2") + 8] |= 1
        path.write_bytes(content)
        return
    arrays = random_arrays()
    if damage == "missing":
        del arrays["decoder.3.net.2.bias"], arrays["encoder.10.weight"]
    if damage == "misshapen":
        arrays["decoder.6.weight"] = arrays["decoder.6.weight"].transpose(1, 0, 2, 3)
    if damage == "pickled":
        arrays["encoder.0.bias"] = np.array([{"a": 1}], dtype=object)
    if damage == "NaN":
        arrays["encoder.0.bias"][3] = np.nan
    if damage == "words":
        arrays["encoder.0.bias"] = np.array(["a"] * 16)
    if damage == "array":
        with open(path, "wb") as file:
            np.save(file, np.zeros(3))
        return
    np.savez(path, **arrays)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    if damage == "flipped":
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255
        path.write_bytes(content)
    if damage == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1\n")
    if damage == "empty":
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("lzma", "encoder.0.bias: the array is compressed with LZMA"), ("no npy", "encoder.0.bias: the magic string"),
        ("object header", "encoder.0.bias: an array holds object"),
        ("huge shape", r"encoder.0.bias: an array has the shape \[1073741824\]"), ("long shape", "not a mask codec"),
        ("short", "encoder.0.bias: an array has 3 numbers, not 16"), ("password", "password"), ("nested", "not a mask codec"),
        ("missing", "lacks .*encoder.10.weight.*decoder.3.net.2.bias"),
        ("misshapen", r"decoder.6.weight: an array has the shape \[64, 128, 4, 4\]; a mask codec needs \[128, 64, 4, 4\]"),
        ("pickled", "not a mask codec"), ("words", "not a mask codec"), ("array", "not a mask codec"),
        ("cut", "not a mask codec"), ("flipped", "not a mask codec"), ("text", "a pointer of git-lfs"),
        ("twice", "this array twice"), ("NaN", "NaN or infinity"),
        ("empty", "not a mask codec"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_an_error_of_one_line(tmp_path, damage, message):
    path = tmp_path / "codec.npz"
    damaged(path, damage)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_codec(path)
    text = str(raised.value)
    assert "\n" not in text and str(path) in text and re.search(r"\. [A-Z].*\.$", text)


def test_an_entry_that_is_far_too_large_is_not_decompressed(tmp_path, monkeypatch):
    taken = []
    monkeypatch.setattr(zipfile.ZipExtFile, "read", lambda _, count=-1: taken.append(count) or b"")
    with zipfile.ZipFile(tmp_path / "codec.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("encoder.0.bias.npy", npy("'<f4'", "(16,)", bytes(1 << 24)))
    with pytest.raises(CheckpointError, match="not a mask codec"):
        load_codec(tmp_path / "codec.npz")
    assert len(taken) == 1 and 0 < taken[0] < 20_000


def test_a_missing_file(tmp_path):
    with pytest.raises(CheckpointError, match=f"{CODEC_NAME} is missing"):
        load_codec(tmp_path / CODEC_NAME)


def test_pipes_and_files_that_are_too_large_are_refused(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.npz")
    with pytest.raises(CheckpointError, match="is a pipe"):
        load_codec(tmp_path / "pipe.npz")
    np.savez(tmp_path / CODEC_NAME, **random_arrays())
    monkeypatch.setattr(mask_codec, "MAX_FILE_BYTES", 1000)
    with pytest.raises(CheckpointError, match="1000 is the limit"):
        load_codec(tmp_path / CODEC_NAME)


@pytest.mark.parametrize("name", ["~nosuchuser/x.npz", "x" * 300, "a\0b"])
def test_an_impossible_name_is_refused(tmp_path, name):
    with pytest.raises(CheckpointError):
        find_codec(tmp_path, given=name)


def test_the_codec_is_the_given_one_or_the_one_in_the_folder(tmp_path):
    assert find_codec(tmp_path) is None
    (tmp_path / CODEC_NAME).touch()
    assert find_codec(tmp_path) == tmp_path / CODEC_NAME
    (tmp_path / "other.npz").touch()
    assert find_codec(tmp_path, given=tmp_path / "other.npz") == tmp_path / "other.npz"
    with pytest.raises(CheckpointError, match="nowhere.npz is not a file"):
        find_codec(tmp_path, given=tmp_path / "nowhere.npz")


# Objects


def test_objects_with_codes_get_masks_and_others_are_unchanged(google):
    box = NormalizedBox(y_min=0.25, x_min=0.5, y_max=0.75, x_max=1.0)
    codes = [tuple(row) for row in fixture()["codes"].tolist()]
    things = [
        ParsedObject("a", box, codes=codes[2]),
        ParsedObject("b", box),
        ParsedObject("c", None, codes=codes[3]),
        ParsedObject("d", box, codes=codes[7]),
    ]
    found = with_masks(things, google, width=128, height=128)  # the box is 64 x 64: nothing is resized
    for index, row in ((0, 2), (3, 7)):
        expected = np.zeros((128, 128), dtype=bool)
        expected[32:96, 64:128] = fixture()["masks"][row].numpy() > 0
        assert (found[index].mask != expected).sum() <= 1  # one value is 0 up to rounding
        assert replace(found[index], mask=None) == things[index]
    assert found[1] is things[1] and found[2] is things[2]
    assert with_masks([], google, width=5, height=5) == []
