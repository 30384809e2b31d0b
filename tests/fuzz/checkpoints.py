"""Fuzzers of what lies in a model's folder: weights and their index, settings, tokenizer, adapters, the mask codec."""

import copy
import io
import json
import lzma
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from paligemma.checkpoints import file_names, headers, hub, safetensors_files, weights
from paligemma.generation import generate
from paligemma.objects import mask_codec
from paligemma.opened import open_checkpoint
from paligemma.processing_paligemma import PaliGemmaProcessor
from tests.fuzz.harness import Files, Fuzzer, write_files
from tests.fuzz.mutations import HUGE, damaged_bytes, damaged_json, nasty_json
from tests.tiny_checkpoint import make_checkpoint
from tests.tiny_tokenizer import write_processor


def as_json(value: object) -> bytes:
    return json.dumps(value).encode()


def links_to(valid: Path, folder: Path) -> None:
    """Makes every file of a valid folder a link in another, as in the hub's cache."""
    for path in valid.iterdir():
        (folder / path.name).symlink_to(path)


def load(folder: Path) -> None:
    """What a program does with a model's folder, up to the first two tokens of an answer."""
    checkpoint = open_checkpoint(folder)
    assert checkpoint.fingerprint
    model = checkpoint.load()
    inputs = checkpoint.processor(np.zeros((4, 4, 3), np.uint8), "caption en", notes=[])
    generate(model, inputs, max_new_tokens=2, eos_token_id=checkpoint.config.eos_token_id)


# Weights


def safetensors_file(header: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + body


class Headers(Fuzzer):
    """The header of a safetensors file. What the library refuses must be refused here, too."""

    name, codes = "headers", (4,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        tensors = {
            "a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0, 4), "c": torch.ones((), dtype=torch.bfloat16),
            "d": torch.arange(4, dtype=torch.int64), "e": torch.ones(3, dtype=torch.bool),
        }  # fmt: skip
        safetensors_files.write_tensors(folder / "valid", tensors)
        self.valid = (folder / "valid").read_bytes()
        length = struct.unpack("<Q", self.valid[:8])[0]
        self.header, self.body = json.loads(self.valid[8 : 8 + length]), self.valid[8 + length :]

    def sound(self) -> Files:
        return {"model.safetensors": self.valid}

    def known(self) -> list[Callable[[], Files]]:
        def entry(shape: str = "[0]", place: str = "[0,0]", name: str = "a", dtype: str = "F32") -> bytes:
            return f'{{"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{place}}}}}'.encode()

        def many(count: int, shape: str = "[0]") -> bytes:
            lines = (f'"{i}":{{"dtype":"F32","shape":{shape},"data_offsets":[0,0]}}' for i in range(count))
            return ("{" + ",".join(lines) + "}").encode()

        # The first: a product of three million numbers has ten million bits, and takes time by their square.
        headers: list[Callable[[], bytes]] = [
            lambda: entry("[" + "9," * 3_000_000 + "9]"),
            lambda: entry("[" + "9," * 3_000_000 + "0]"), lambda: entry(f"[{HUGE}]"),
            lambda: entry(f"[0,{HUGE}]"), lambda: entry("[" + "9" * 5000 + "]"), lambda: entry("[-1]"), lambda: entry("[1.0]"),
            lambda: entry("[true]"), lambda: entry("[18446744073709551616,0]"), lambda: entry(place="[1,1]"),
            lambda: entry(place="[0,-0]"), lambda: entry(dtype="x" * 6_000_000), lambda: entry(name="n" * 6_000_000),
            lambda: entry(name="\\ud800"), lambda: entry(name="\\u0000"), lambda: many(60_000), lambda: many(60_000, "[1]"),
            lambda: b"[" * 6_000_000, lambda: b'{"a":' * 1_000_000, lambda: b"{" + b",".join([b'"a":1'] * 700_000) + b"}",
            lambda: b'{"__metadata__":{"a":1}}', lambda: b'{"__metadata__":[]}', lambda: b"{}",
            lambda: b"{}" + b" " * 6_000_000, lambda: b" {}", lambda: b"null", lambda: b"", lambda: b"\xff",
        ]  # fmt: skip
        files = [lambda make=make: safetensors_file(make()) for make in headers]
        files += [lambda length=length: safetensors_file(b"{}", length=length) for length in (0, 1, 3, 2**40, 2**63, 2**64 - 1)]
        files += [lambda: b"", lambda: b"\0" * 7, lambda: b"\0" * 8, lambda: self.valid + b"\0", lambda: self.valid[:-1]]
        return [lambda make=make: {"model.safetensors": make()} for make in files]

    def make(self, random: Random) -> Files:
        kind = random.random()
        if kind < 0.7:
            data = safetensors_file(damaged_json(random, self.header), self.body)
        elif kind < 0.8:
            data = safetensors_file(as_json(self.header), damaged_bytes(random, self.body))
        else:
            data = damaged_bytes(random, self.valid)
        return {"model.safetensors": data}

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        path = folder / "model.safetensors"
        stored = headers.read_header(path)
        try:
            with safe_open(path, framework="pt") as theirs:
                assert set(theirs.keys()) == set(stored), "other names than the library's"
        except SafetensorError as error:
            raise AssertionError(f"the library refuses it: {error}") from error
        reader = safetensors_files.TensorReader(torch.device("cpu"), allow_nonfinite=True)
        for tensor in stored.values():
            if tensor.dtype in safetensors_files.DTYPES:
                reader.read(tensor, safetensors_files.DTYPES[tensor.dtype])


class Indexes(Fuzzer):
    """model.safetensors.index.json, beside two files of weights."""

    name, codes = "indexes", (4,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        (folder / "valid").mkdir()
        self.valid, names = folder / "valid", ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        self.index: dict = {"metadata": {"total_size": 24}, "weight_map": {}}
        for number, name in enumerate(names):
            safetensors_files.write_tensors(self.valid / name, {f"t{number}": torch.ones(3)})
            self.index["weight_map"][f"t{number}"] = name

    def sound(self) -> Files:
        return {file_names.INDEX_NAME: as_json(self.index)}

    def known(self) -> list[Callable[[], Files]]:
        def of(data: bytes) -> Callable[[], Files]:
            return lambda: {file_names.INDEX_NAME: data}

        names = (
            "../x.safetensors", "/etc/passwd", "a\\b.safetensors", "a\0.safetensors", "a" * 300 + ".safetensors",
            ".safetensors", "~/x.safetensors", "\ud800.safetensors", "", "model.safetensors.index.json",
        )  # fmt: skip
        many = {f"t{i}": f"m{i}.safetensors" for i in range(20_000)}
        return [
            *(of(as_json({"weight_map": {"t0": name}})) for name in names),
            lambda: {file_names.INDEX_NAME: as_json({"weight_map": many})},
            of(as_json({"weight_map": {"t0": [1]}})), of(as_json({"weight_map": {}})), of(as_json({"weight_map": []})),
            of(b"[" * 100_000), of(b""), of(b'{"weight_map":' * 3000), of(b"\xff"),
        ]  # fmt: skip

    def make(self, random: Random) -> Files:
        return {file_names.INDEX_NAME: damaged_json(random, self.index)}

    def check(self, files: Files, folder: Path) -> None:
        links_to(self.valid, folder)
        write_files(files, folder)
        hub.is_complete(folder)
        weights.find_tensors(folder)


# Settings


class Settings(Fuzzer):
    """config.json and the other small JSON files of a model's folder."""

    name, codes = "settings", (3, 4, 6)  # 3: a context too short for any prompt
    names = (
        "config.json",
        "generation_config.json",
        "preprocessor_config.json",
        "processor_config.json",
        "tokenizer_config.json",
    )

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.valid = make_checkpoint(folder / "valid")
        self.values = {name: json.loads((self.valid / name).read_text()) for name in self.names if (self.valid / name).exists()}
        self.values["config.json"] |= {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
        self.values["generation_config.json"] = {"bos_token_id": 2, "eos_token_id": [1], "pad_token_id": 0, "max_length": 20}
        self.values["preprocessor_config.json"] |= {"rescale_factor": 1 / 255, "do_resize": True, "image_seq_length": 4}
        self.values["processor_config.json"] = {"image_processor": copy.deepcopy(self.values["preprocessor_config.json"])}
        self.values["tokenizer_config.json"] |= {"bos_token": "<bos>", "eos_token": {"content": "<eos>"}, "pad_token": "<pad>"}

    def sound(self) -> Files:
        return {name: as_json(value) for name, value in self.values.items()}

    def known(self) -> list[Callable[[], Files]]:
        def of(name: str, where: str, text: str) -> Callable[[], Files]:
            """The valid file with the raw text as the value at a place such as text_config.rope_theta."""
            value = copy.deepcopy(self.values[name])
            *path, last = where.split(".")
            part = value
            for key in path:
                part = part[key]
            part[last] = "@@"
            return lambda: {name: as_json(value).replace(b'"@@"', text.encode())}

        preprocessor, config = "preprocessor_config.json", "config.json"
        nested = "[" * 5000 + "]" * 5000
        return [
            of(preprocessor, "rescale_factor", "[[1],[2]]"), of(preprocessor, "rescale_factor", HUGE),
            of(preprocessor, "image_std", HUGE), of(preprocessor, "image_mean", "[[0.5]]"),
            of(preprocessor, "image_mean", "{}"), of(preprocessor, "image_std", nested),
            of(preprocessor, "rescale_factor", "[" + "0," * 255 + "0]"), of(preprocessor, "rescale_factor", "1e999"),
            of(preprocessor, "size", f'{{"height":{HUGE}}}'), of(preprocessor, "resample", "[]"),
            of(preprocessor, "do_pad", nested), of(config, "text_config.rope_theta", HUGE),
            of(config, "text_config.rope_theta", "0"), of(config, "text_config.rope_theta", "1e999"),
            of(config, "text_config.rms_norm_eps", HUGE), of(config, "text_config.rms_norm_eps", "NaN"),
            of(config, "text_config.num_attention_heads", "0"), of(config, "text_config.head_dim", HUGE),
            of(config, "eos_token_id", HUGE), of(config, "eos_token_id", "[[1]]"), of(config, "eos_token_id", "[]"),
            of(config, "eos_token_id", "{}"), of(config, "image_token_index", HUGE),
            of(config, "vision_config.image_size", "[]"), of(config, "vision_config.image_size", HUGE),
            of(config, "text_config.hidden_activation", nested), of(config, "text_config.max_position_embeddings", HUGE),
            of(config, "quantization_config", "[1]"), of(config, "quantization_config", '{"quant_method":[]}'),
            of(config, "quantization_config", '{"quant_method":"paligemma_rows","kind":[]}'), of(config, "torch_dtype", "{}"),
            of(config, "text_config.query_pre_attn_scalar", "-1"), of(config, "text_config.query_pre_attn_scalar", HUGE),
            of("tokenizer_config.json", "bos_token", '{"content":[]}'), of("tokenizer_config.json", "pad_token", nested),
            of("generation_config.json", "eos_token_id", "[[1],{}]"), of("generation_config.json", "eos_token_id", HUGE),
            lambda: {config: b"[" * 100_000}, lambda: {config: b""}, lambda: {config: b"\xff\xfe"},
            lambda: {config: b'{"a":' + b"9" * 5000 + b"}"},
        ]  # fmt: skip

    def make(self, random: Random) -> Files:
        name = random.choice(self.names)
        if name == "config.json" and random.random() < 0.7:  # one field of a part
            value = copy.deepcopy(self.values[name])
            part = value[random.choice(("text_config", "vision_config"))]
            part[random.choice(list(part))] = "@@"
            data = as_json(value).replace(b'"@@"', nasty_json(random).encode("utf-8", "surrogatepass"))
        else:
            data = damaged_json(random, self.values[name])
        files = {name: data}
        if name == "processor_config.json":
            files["preprocessor_config.json"] = b"{}"
        return files

    def check(self, files: Files, folder: Path) -> None:
        links_to(self.valid, folder)
        write_files(files, folder)
        load(folder)


class Tokenizers(Fuzzer):
    """tokenizer.json, which is read by a library in Rust: its panics are no Exception, and write on stderr."""

    name, codes = "tokenizers", (3, 4)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.valid = folder / "valid"
        self.valid.mkdir()
        config = write_processor(self.valid)
        (self.valid / "config.json").write_text(json.dumps(config))
        self.value = json.loads((self.valid / "tokenizer.json").read_text(encoding="utf-8"))

    def sound(self) -> Files:
        return {"tokenizer.json": as_json(self.value)}

    def known(self) -> list[Callable[[], Files]]:
        def of(change: Callable[[dict], object]) -> Callable[[], Files]:
            def make() -> Files:
                value = copy.deepcopy(self.value)
                change(value)
                return {"tokenizer.json": json.dumps(value).encode("utf-8", "surrogatepass")}

            return make

        def model(**fields: object) -> Callable[[], Files]:
            return of(lambda value: value["model"].update(fields))

        def part(name: str, content: object) -> Callable[[], Files]:
            return of(lambda value: value.update({name: content}))

        everything = {"type": "Sequence", "normalizers": [{"type": "Precompiled", "precompiled_charsmap": "AAAA"}]}
        pads = {"pad_id": 0, "pad_type_id": 0}
        regex = {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": ""}
        return [
            model(continuing_subword_prefix="##"), model(continuing_subword_prefix="é"),
            model(continuing_subword_prefix="x" * 1000), model(end_of_word_suffix="</w>"), model(dropout=1.0),
            model(dropout=2.0), model(unk_token="nothing"), model(type="Unigram", vocab=[]), model(type="WordLevel"),
            model(type="WordPiece", max_input_chars_per_word=0), model(merges=["a"]), model(merges=[["a", "é", "b"]]),
            model(vocab={}), model(byte_fallback=False), model(fuse_unk=False, unk_token=None), model(ignore_merges=True),
            part("normalizer", everything), part("normalizer", regex),
            part("normalizer", {"type": "Prepend", "prepend": "x" * 10**5}),
            part("pre_tokenizer", {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Removed", "invert": False}),
            part("pre_tokenizer", {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
            part("post_processor", {"type": "RobertaProcessing", "sep": ["x", 2**32 - 1], "cls": ["y", 0]}),
            part("post_processor", {"type": "TemplateProcessing", "single": [], "pair": [], "special_tokens": {"a": 1}}),
            part("decoder", {"type": "WordPiece", "prefix": "", "cleanup": True}),
            part("decoder", {"type": "Strip", "content": "a", "start": 2**40, "stop": 0}),
            part("truncation", {"max_length": 0, "stride": 5, "strategy": "LongestFirst", "direction": "Right"}),
            part("padding", {"strategy": {"Fixed": 2**40}, "direction": "Left", "pad_to_multiple_of": 0, "pad_token": ""} | pads),
            of(lambda value: value["added_tokens"].append({**value["added_tokens"][0], "content": "", "id": 2**32 - 1})),
            of(lambda value: value["added_tokens"].clear()),
            of(lambda value: value["model"]["vocab"].update({"zz": 2**32 - 1})), lambda: {"tokenizer.json": b""},
            lambda: {"tokenizer.json": b"[" * 100_000}, lambda: {"tokenizer.json": b"\xff"}, lambda: {"tokenizer.json": b"{}"},
        ]  # fmt: skip

    def make(self, random: Random) -> Files:
        if random.random() < 0.15:
            return {"tokenizer.json": damaged_bytes(random, json.dumps(self.value, ensure_ascii=False).encode())}
        value = dict(self.value)
        name = random.choice([*value, "model", "model", "normalizer", "decoder", "pre_tokenizer"])
        if name == "model":
            value["model"] = dict(value["model"])
            field = random.choice(list(value["model"]))
            value["model"][field] = "@@"
            raw = damaged_json(random, self.value["model"][field])
        else:
            value[name] = "@@"
            raw = damaged_json(random, self.value[name])
        return {"tokenizer.json": json.dumps(value).encode().replace(b'"@@"', raw)}

    def check(self, files: Files, folder: Path) -> None:
        links_to(self.valid, folder)
        write_files(files, folder)
        processor = PaliGemmaProcessor.from_pretrained(folder)
        for prompt in ("caption en", " two  words <loc0001> é😀\n", "\0", "", "cat ; dog" * 50):
            batch = processor(None, prompt, "<seg001> answer", notes=[])
            ids = batch["input_ids"][0]
            assert int(ids.max()) < 2**20 and int(ids.min()) >= 0, ids
            processor.decode(ids)


# Adapters


class Adapters(Fuzzer):
    """adapter_config.json and adapter_model.safetensors, beside a base model that is sound."""

    name, codes = "adapters", (4, 5, 6)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.base = make_checkpoint(folder / "base")
        names = [f"base_model.model.model.language_model.layers.{i}.self_attn.q_proj" for i in (0, 1)]
        self.tensors = {}
        for name in names:
            self.tensors |= {
                f"{name}.lora_A.weight": torch.full((2, 40), 0.01),
                f"{name}.lora_B.weight": torch.full((64, 2), 0.01),
            }
        safetensors_files.write_tensors(folder / "valid", self.tensors)
        self.valid = (folder / "valid").read_bytes()
        self.config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.base), "revision": None, "r": 2,
            "lora_alpha": 4, "lora_dropout": 0.0, "use_rslora": False, "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"q_proj": 8.0}, "target_modules": ["q_proj"], "bias": "none", "fan_in_fan_out": False,
            "use_dora": False, "modules_to_save": None, "init_lora_weights": True, "layers_pattern": None,
            "layers_to_transform": None, "inference_mode": True,
        }  # fmt: skip

    def sound(self) -> Files:
        return self.files(as_json(self.config))

    def known(self) -> list[Callable[[], Files]]:
        def of(**fields: object) -> Callable[[], Files]:
            return lambda: self.files(as_json(self.config | fields).replace(b'"@@"', HUGE.encode()))

        patterns = (
            "(",
            "(([a-z_.0-9]+)+)+!",
            "(.*.*.*.*.*.*)*x",
            "(?P<a>",
            "\\1",
            "a{999999999}",
            "a{1,65535}" * 20,
            "(?s:" * 500,
            "\ud800",
            "",
        )
        return [
            of(lora_alpha="@@"), of(r="@@"), of(lora_alpha=1e308, r=1), of(r=0), of(r=True), of(lora_alpha=[]),
            of(lora_dropout="@@"), of(rank_pattern=[1]), of(rank_pattern="q"), of(alpha_pattern=[[1]]),
            of(rank_pattern={"q_proj": "@@"}), of(rank_pattern={"q_proj": [2]}),
            *(of(rank_pattern={pattern: 2}) for pattern in patterns), *(of(alpha_pattern={pattern: 2}) for pattern in patterns),
            of(alpha_pattern={f"{i}.q_proj": 2 for i in range(20_000)}), of(base_model_name_or_path="~nosuchuser/x"),
            of(base_model_name_or_path="a" * 300), of(base_model_name_or_path="a\0b"), of(base_model_name_or_path="\ud800"),
            of(base_model_name_or_path="/" + "a/" * 3000), of(base_model_name_or_path=[1]), of(revision="@@"), of(peft_type=[]),
            of(base_model_name_or_path="google/paligemma-3b", revision={"a": 1}), of(bias=["none"]),
            of(init_lora_weights="pissa"), of(init_lora_weights={"a": []}), of(target_modules={"a": 1}),
            of(modules_to_save="@@"),
        ]  # fmt: skip

    def files(self, config: bytes, tensors: bytes | None = None) -> Files:
        return {"adapter_config.json": config, "adapter_model.safetensors": self.valid if tensors is None else tensors}

    def make(self, random: Random) -> Files:
        if random.random() < 0.8:
            config = dict(self.config)
            field = random.choice(list(config))
            config[field] = "@@"
            raw = (
                damaged_json(random, self.config[field])
                if random.random() < 0.5
                else nasty_json(random).encode("utf-8", "surrogatepass")
            )
            return self.files(as_json(config).replace(b'"@@"', raw))
        if random.random() < 0.3:
            return self.files(damaged_json(random, self.config))
        length = struct.unpack("<Q", self.valid[:8])[0]
        header = damaged_json(random, json.loads(self.valid[8 : 8 + length]))
        return self.files(as_json(self.config), safetensors_file(header, self.valid[8 + length :]))

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        load(folder)


# The mask codec


def npy(header: bytes, body: bytes = b"", version: bytes = b"\1\0") -> bytes:
    size = struct.pack("<H" if version[0] == 1 else "<I", len(header))
    return b"\x93NUMPY" + version + size + header + body


def archive(entries: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(out, "w", method) as file:
        warnings.simplefilter("ignore")  # of a name that stands twice
        for name, data in entries:
            file.writestr(name, data)
    return out.getvalue()


class Codecs(Fuzzer):
    """vae-oid.npz: a ZIP archive of numpy arrays."""

    name, codes = "codecs", (4,)

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.needed = {name: tensor.numpy() for name, tensor in mask_codec.MaskCodec().state_dict().items()}
        self.names = list(self.needed)

    def entry(
        self, name: str, descr: str = "<f4", shape: object = None, body: bytes | None = None, order: bool = False
    ) -> tuple[str, bytes]:
        """An array of zeros of the right shape, or of what a header claims."""
        shape = self.needed[name].shape if shape is None else shape
        header = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n".encode("utf-8", "surrogatepass")
        return f"{name}.npy", npy(header, bytes(self.needed[name].nbytes) if body is None else body)

    def sound(self) -> Files:
        return {"codec.npz": archive([self.entry(name, "'<f4'") for name in self.names])}

    def known(self) -> list[Callable[[], Files]]:
        first = self.names[0]

        def of(*entries: tuple[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> Callable[[], Files]:
            return lambda: {"codec.npz": archive(list(entries), method)}

        def one(**fields: object) -> Callable[[], Files]:
            return lambda: {"codec.npz": archive([self.entry(first, **fields)])}

        def unpacks_to(gigabytes: int) -> Files:
            """2 MB a gigabyte: 16 MB of zeros are packed once, and their packed form is repeated."""
            packer = zlib.compressobj(9, zlib.DEFLATED, -15)
            header = self.entry(first, "'<f4'", f"({gigabytes << 28},)", b"")[1]
            packed = packer.compress(header) + packer.flush(zlib.Z_FULL_FLUSH)
            zeros = packer.compress(bytes(1 << 24)) + packer.flush(zlib.Z_FULL_FLUSH)
            data = bytearray(archive([(f"{first}.npy", packed + zeros * 64 * gigabytes + packer.flush())], zipfile.ZIP_STORED))
            for start, method, size in ((0, 8, 22), (data.rindex(b"PK\1\2"), 10, 24)):  # of the entry, and of the directory
                struct.pack_into("<H", data, start + method, zipfile.ZIP_DEFLATED)
                struct.pack_into("<I", data, start + size, len(header) + (gigabytes << 30))
            return {"codec.npz": bytes(data)}

        def damaged_lzma() -> Files:
            data = bytearray(archive([self.entry(first, "'<f4'")], zipfile.ZIP_LZMA))
            data[60:90] = b"\xff" * 30
            return {"codec.npz": bytes(data)}

        def two_names() -> Files:
            """Two entries of one name, and sizes in the directory that the entries do not have."""
            data = archive([self.entry(first, "'<f4'", "(1,)", b"\0" * 4)] * 2)
            return {"codec.npz": data.replace(struct.pack("<I", 4), struct.pack("<I", 2**31 - 1))}

        text = f"{first}.npy"
        return [
            partial(unpacks_to, 2), damaged_lzma, two_names, of((text, b"no npy")), of((text, b"")), of((first, b"raw")),
            of((text, b"\x93NUMPY")), of((text, npy(b"("))), of((text, npy(b"{'descr': " * 3000))),
            of((text, npy(b"1" * 65000))), of((text, npy(b"{" * 60_000, version=b"\2\0"))),
            of((text, npy(b"x", version=b"\3\0"))), of((text, npy(b"x", version=b"\x09\0"))), one(descr="'|O'"),
            one(descr="'<U5'"), one(descr="'<M8[ns]'"), one(descr="'<c16'"), one(descr="[('a', '<f4')]"), one(descr="'|V4'"),
            one(descr="'>f8'"), one(descr="'<f2'"), one(descr="'?'"), one(descr="'" + "x" * 5000 + "'"),
            one(descr="'<U2147483647'"), one(descr="'<f4'", shape="(4611686018427387904,)"),
            one(descr="'<f4'", shape=f"({HUGE},)"), one(descr="'<f4'", shape="(-1,)"), one(descr="'<f4'", shape="(0,)" ),
            one(descr="'<f4'", shape="(1.5,)"), one(descr="'<f4'", shape="(True, 2)"), one(descr="'<f4'", shape="(1,)" * 1),
            one(descr="'<f4'", shape="(" + "1," * 40 + ")"), one(descr="'<f4'", shape="(1 << 40,)"),
            one(descr="'<f4'", body=b"\0" * 7), one(descr="'<f4'", order=True), lambda: {"codec.npz": b""},
            lambda: {"codec.npz": b"PK\5\6" + b"\0" * 18}, lambda: {"codec.npz": b"\x93NUMPY\1\0"},
            lambda: {"codec.npz": lzma.compress(b"x")},
            lambda: {"codec.npz": archive([(f"{i}.npy", b"") for i in range(20_000)])},
        ]  # fmt: skip

    def make(self, random: Random) -> Files:
        name = random.choice(self.names[:6])
        method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
        kind = random.random()
        if kind < 0.3:
            descr = random.choice(("'<f4'", "'>f8'", "'|O'", "'<i8'", "'|b1'", "None", "[]", "'<f4', 'x': 1", "['<f4']"))
            shape = random.choice(
                ("()", "(1,)", "(16,)", "[16]", "16", "(16, 1, 4, 4)", "None", "(10**9,)", "(65536, 65536)", "(2**62, 4)")
            )
            entries = [self.entry(name, descr, shape, bytes(random.choice((0, 64, 1024))))]
        else:
            entries = [self.entry(name, "'<f4'")]
            if kind < 0.7:
                entries = [(entries[0][0], damaged_bytes(random, entries[0][1][:200]) + entries[0][1][200:])]
        data = archive(entries, method)
        return {"codec.npz": damaged_bytes(random, data) if random.random() < 0.7 else data}

    def check(self, files: Files, folder: Path) -> None:
        write_files(files, folder)
        mask_codec.load_codec(mask_codec.find_codec(folder, folder / "codec.npz"))


FUZZERS = (Headers, Indexes, Settings, Tokenizers, Adapters, Codecs)
