"""Every fuzzer, by name."""

from tests.fuzz import checkpoints, data, pictures, texts

FUZZERS = {fuzzer.name: fuzzer for module in (pictures, checkpoints, texts, data) for fuzzer in module.FUZZERS}
