"""The VQ-VAE of PaliGemma's <seg> tokens: encodes the mask of a box as sixteen codes, and decodes them.

The encoder turns a mask of 64 x 64 pixels into a grid of 4 x 4 vectors. Each vector is replaced by the nearest of the 128 vectors
in a codebook. The sixteen codes are the indices of these vectors, row by row. In an answer, they are tokens from <seg000> to
<seg127>. The decoder turns the codes back into a mask.

The weights are in a file with the names and shapes of Google's vae-oid.npz. The parameters here have the same names. Sources:
VQ-VAE (arXiv:1711.00937), google-research/big_vision (evaluators/proj/paligemma/transfers/segmentation.py). Checked in
tests/objects/test_mask_codec.py, also with outputs of Google's decoder (tests/oracle/segdecoder).
Shapes: M masks.
"""

import io
import math
import struct
import tokenize
import zipfile
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma import files
from paligemma.errors import CheckpointError, listed
from paligemma.objects.masks import paste
from paligemma.objects.outputs import ParsedObject
from paligemma.vocabulary import NUM_CODES

CODE_WIDTH = 512  # numbers per vector of the codebook
GRID = 4  # the codes form 4 rows of 4
MAX_FILE_BYTES = 64 << 20  # Google's file has 8 MB
# With other compression methods, zipfile may decompress more bytes than requested.
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
MAX_HEADER_BYTES = 10_000  # for the header of one array
HEADER_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# The exceptions of zipfile, zlib and numpy's header parser for a file that is not a valid npz. RuntimeError means that the file
# has a password or an unknown compression method.
FORMAT_ERRORS = (
    OSError, ValueError, TypeError, ArithmeticError, LookupError, EOFError, SyntaxError, MemoryError, RuntimeError, struct.error,
    zipfile.BadZipFile, zlib.error, tokenize.TokenError,
)  # fmt: skip


class Codebook(nn.Module):
    """The vectors of the 128 codes, with 512 numbers each."""

    def __init__(self):
        super().__init__()
        self._embedding = nn.Parameter(torch.empty(NUM_CODES, CODE_WIDTH).normal_(std=CODE_WIDTH**-0.5))

    def forward(self, codes: Tensor) -> Tensor:
        """The vectors of codes: int64[M, 16] -> float[M, 512, 4, 4], row by row."""
        return F.embedding(codes, self._embedding).transpose(1, 2).unflatten(2, (GRID, GRID))

    def nearest(self, x: Tensor) -> Tensor:
        """The codes with the nearest vectors: float[M, 512, 4, 4] -> int64[M, 16], row by row."""
        x = x.flatten(2).transpose(1, 2)
        return (self._embedding.square().sum(1) - 2 * x @ self._embedding.T).argmin(-1)


class ResidualBlock(nn.Module):
    """Adds three convolutions of x to x. There is no ReLU before the first convolution, and none after the sum."""

    def __init__(self, width: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MaskCodec(nn.Module):
    """Encoder, codebook and decoder, with random weights. `load_codec` returns a codec with trained weights."""

    def __init__(self):
        super().__init__()
        down: list[nn.Module] = []
        for inputs, outputs in ((1, 16), (16, 32), (32, 64), (64, 128)):  # 64 pixels -> 32 -> 16 -> 8 -> 4
            down += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        up: list[nn.Module] = []
        for inputs, outputs in ((128, 128), (128, 64), (64, 32), (32, 16)):  # 4 -> 8 -> 16 -> 32 -> 64 pixels
            up += [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1), nn.ReLU()]
        self.encoder = nn.Sequential(*down, ResidualBlock(128), ResidualBlock(128), nn.Conv2d(128, CODE_WIDTH, 1))
        self._vq_vae = Codebook()
        self.decoder = nn.Sequential(
            nn.Conv2d(CODE_WIDTH, 128, 1), nn.ReLU(), ResidualBlock(128), ResidualBlock(128), *up, nn.Conv2d(16, 1, 1)
        )

    def decode(self, codes: Tensor) -> Tensor:
        """Masks, float32[M, 64, 64]: about -1 outside and 1 inside, not clipped.

        Args:
            codes: int64[M, 16].
        Raises: ValueError for another shape, and for codes that do not exist.
        """
        if codes.dim() != 2 or codes.shape[1] != GRID**2:
            raise ValueError(f"codes have the shape {list(codes.shape)}; [M, {GRID**2}] is needed.")
        if codes.numel() and not 0 <= codes.min() <= codes.max() < NUM_CODES:
            given = f"codes are from {codes.min()} to {codes.max()}"
            raise ValueError(f"{given}; numbers from 0 to {NUM_CODES - 1} are needed.")
        return self.decoder(self._vq_vae(codes))[:, 0]

    def encode(self, masks: Tensor) -> Tensor:
        """The codes, int64[M, 16], of masks, float32[M, 64, 64] from 0 (outside) to 1 (inside), as returned by masks.crop."""
        return self._vq_vae.nearest(self.encoder(2 * masks[:, None] - 1))


def read_array(stream: IO[bytes], shape: tuple[int, ...]) -> Tensor:
    """The array in an npy file, as float32.

    Raises: ValueError for another shape (before memory is allocated), another type or version, NaN or infinity, and for more or
        fewer numbers than the shape has.

    numpy's own reader is not used, because it trusts the header: it would allocate memory for any shape, and could decompress a
    file of 2 MB into 2 GB.
    """
    data = io.BytesIO(stream.read(MAX_HEADER_BYTES + 8 * math.prod(shape) + 1))
    version = np.lib.format.read_magic(data)
    if version not in HEADER_READERS:
        raise ValueError(f"an array has version {version} of the npy format, which is not supported")
    actual_shape, is_fortran_order, dtype = HEADER_READERS[version](data, max_header_size=MAX_HEADER_BYTES)
    if dtype.kind not in "biuf":
        raise ValueError(f"an array holds {dtype}, not numbers")
    if actual_shape != shape:
        raise ValueError(f"an array has the shape {list(actual_shape)}; a mask codec needs {list(shape)}")
    values = np.frombuffer(data.read(), dtype)
    if not np.isfinite(values).all():
        raise ValueError("an array holds NaN or infinity")
    if values.size != math.prod(shape):
        raise ValueError(f"an array has {values.size} numbers, not {math.prod(shape)}")
    return torch.from_numpy(values.reshape(shape, order="F" if is_fortran_order else "C").astype(np.float32))


def read_arrays(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The arrays in an npz file with the names in `shapes`, as float32. Pickle is never used, so no code in the file can run.

    Raises: CheckpointError.
    """
    content = files.read_regular(path, MAX_FILE_BYTES)
    arrays, name = {}, None
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            counts = Counter(archive.namelist())
            for name in (name for name in shapes if f"{name}.npy" in counts):
                if counts[f"{name}.npy"] > 1:
                    raise ValueError("the file has this array twice")
                if archive.getinfo(f"{name}.npy").compress_type not in METHODS:
                    raise ValueError("the array is compressed with LZMA or bzip2, which numpy never uses")
                with archive.open(f"{name}.npy") as stream:
                    arrays[name] = read_array(stream, shapes[name])
    except FORMAT_ERRORS as error:
        reason = "".join(str(error).splitlines()[:1])[:200] or type(error).__name__
        detail = f"{name}: {reason}" if name else reason
        problem = f"is not a mask codec ({detail}). An npz file of arrays is needed. Fetch {files.CODEC_NAME} again"
        problem = files.describe_wrong_download(content) or problem
        raise CheckpointError(f"{path} {problem}.", path=path) from error
    missing = [name for name in shapes if name not in arrays]
    if missing:
        raise CheckpointError(
            f"{path} lacks {listed(missing)}. All {len(shapes)} arrays of {files.CODEC_NAME} are needed. Use the whole file.",
            path=path,
        )
    return arrays


def load_codec(path: str | Path) -> MaskCodec:
    """The trained codec from a file like vae-oid.npz, in float32 on the CPU. Other arrays in the file are ignored.

    Raises: CheckpointError if the file is not a valid npz file, or if an array is missing or has another shape.
    """
    codec = MaskCodec()
    shapes = {name: tuple(parameter.shape) for name, parameter in codec.state_dict().items()}
    codec.load_state_dict(read_arrays(Path(path), shapes))
    return codec.eval().requires_grad_(False)


def find_codec(folder: Path, given: str | Path | None = None) -> Path | None:
    """The path of the codec: `given`, otherwise vae-oid.npz in a checkpoint's folder, otherwise None.

    Raises: CheckpointError if `given` does not exist.
    """
    if given is not None:
        if not files.is_file(files.expand(given)):
            text = f"{given} is not a file. A mask codec ({files.CODEC_NAME}) is needed. Correct the path."
            raise CheckpointError(text, path=given)
        return files.expand(given)
    path = Path(folder) / files.CODEC_NAME
    return path if files.is_file(path) else None


@torch.no_grad()
def with_masks(objects: Sequence[ParsedObject], codec: MaskCodec, width: int, height: int) -> list[ParsedObject]:
    """The objects of one picture, with masks for those that have a box and codes. All masks are decoded in one batch.

    Args:
        width, height: size of the picture in pixels.
    """
    coded = [i for i, item in enumerate(objects) if item.codes is not None and item.box is not None]
    codes = torch.tensor([objects[i].codes for i in coded], dtype=torch.int64).view(-1, GRID**2)
    results = list(objects)
    for i, mask in zip(coded, codec.decode(codes).numpy(), strict=True):
        results[i] = replace(objects[i], mask=paste(mask, objects[i].box, height, width))
    return results
