"""LoRA: fine-tuning by a low-rank update B A of each frozen matrix W. Settings are those of PEFT's adapter_config.json.

    y = W x + scaling * B A x        A [R, X] random, B [O, R] zero at the start, so that training starts from the base model

W is not changed. A and B have R (X + O) numbers instead of X O, a few MB for a whole model. After training, W + scaling * B A is
an ordinary matrix: `merge` makes a plain model, which is as fast as before. load_model merges an adapter in the same way, matrix
by matrix, while it reads the base model (checkpoints/adapters.py reads and writes the files).

By default only the language model is trained. In PEFT, a target that is given as the last word of a name ("q_proj") also matches
the vision tower, whose matrices have the same names. Here the caller always says which part of the model is adapted.

Sources: LoRA (arXiv:2106.09685), equation 3; scaling alpha / sqrt(r): arXiv:2312.03732. Checked against peft in
tests/layers/test_lora.py.
Shapes: O outputs and X inputs of a matrix, R rank.
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paligemma.layers import patterns
from paligemma.layers.fast_cpu import FastLinear, product
from paligemma.parameter_names import all_spellings

PARTS = {"language": "language_model", "vision": "vision_tower"}
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "out_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2")
OTHER_MODULES = {"lm_head", "embed_tokens", "patch_embedding", "position_embedding"}  # PEFT can adapt or copy these; we cannot
# Keys of adapter_config.json that LoraConfig.from_peft reads, and keys that do not matter for a finished adapter because they say
# how it was trained or which modules it changes (the names of the tensors show that as well). Any other key is rejected unless
# its value is false, null, 0 or empty, and the error names it.
ACCEPTED_KEYS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "r", "lora_alpha", "lora_dropout", "use_rslora",
    "rank_pattern", "alpha_pattern",
    "fan_in_fan_out",  # PEFT itself sets it to false for nn.Linear, and all our adapted layers are nn.Linear
    # These are only used together with other keys.
    "megatron_config", "megatron_core", "qalora_group_size", "runtime_config", "ensure_weight_tying",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",  # settings of init_lora_weights, which is checked
)  # fmt: skip
# Values of init_lora_weights that leave W unchanged. The others (pissa, olora, corda, loftq, lora_ga) subtract a part from W.
KEEPS_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
MAX_ALPHA = 1e9  # a larger value can only come from a damaged file
MAX_KEYS = 2048  # the most keys of rank_pattern or alpha_pattern; the largest model has 485 matrices
MAX_EXPRESSIONS = 32  # the most keys that are regular expressions, not names


@lru_cache(maxsize=2 * MAX_KEYS)
def parsed_key(key: str) -> tuple[bool, re.Pattern | None, patterns.Pattern | None]:
    """Compiles a key of rank_pattern or alpha_pattern.

    A simple key, which consists of letters, digits, underscores and dots, is matched by `re` in linear time. With any other key
    `re` might never finish, so patterns.Pattern is used.

    Returns: the tuple (is_whole, simple, expression):
        is_whole: whether the key must match the whole name of a module, not only its end.
        simple: the compiled key if it is simple, else None.
        expression: the compiled key if it is not simple, else None.
    Raises: ValueError as in patterns.Pattern.
    """
    is_whole, text = key.startswith("^"), key.removeprefix("^").removesuffix("$")
    text = text.removeprefix("base_model.model.").removeprefix(r"base_model\.model\.")
    if re.fullmatch(r"[\w.]*", text):
        return is_whole, re.compile(text), None
    # Compiled first without the (.*\.)? that is added below, so that an error message shows only the text of the key.
    pattern = patterns.Pattern(text)
    return is_whole, None, pattern if is_whole else patterns.Pattern(rf"(.*\.)?({text})")


def fits(key: str, name: str) -> bool:
    """Whether a key matches the end of a module's name, in any spelling of the name, as in PEFT."""
    is_whole, simple, expression = parsed_key(key)
    if expression is not None:
        return any(expression.fullmatch(full) for full in all_spellings(name))
    for full in all_spellings(name):
        start = len(full) - len(simple.pattern)
        is_word_start = start == 0 or (start > 0 and full[start - 1] == "." and not is_whole)
        if is_word_start and simple.fullmatch(full, start):
            return True
    return False


def matching(pattern: Mapping[str, float] | None, name: str, default: float) -> float:
    """The value of the first key that matches the module, as in PEFT; `default` if no key does."""
    return next((value for key, value in (pattern or {}).items() if fits(key, name)), default)


def checked_pattern(pattern: object, what: str) -> dict[str, float]:
    """A rank_pattern or alpha_pattern as a dict. Raises: ValueError unless it is a mapping with usable keys."""
    if pattern is None:
        return {}
    if not (isinstance(pattern, Mapping) and all(isinstance(key, str) for key in pattern)):
        raise ValueError(f"{what} is {pattern!r:.200}; an object with names as keys and numbers as values is needed.")
    expressions = [key for key in pattern if not re.fullmatch(r"[\w.]+", key)]
    if len(pattern) > MAX_KEYS or len(expressions) > MAX_EXPRESSIONS:
        text = f"{what} has {len(pattern)} keys, {len(expressions)} of them expressions"
        raise ValueError(f"{text}; {MAX_KEYS} and {MAX_EXPRESSIONS} are the limits.")
    for key in pattern:
        parsed_key(key)  # raises a ValueError if the key cannot be used
    return dict(pattern)


@dataclass(frozen=True)
class LoraConfig:
    """The settings of an adapter, under the names of adapter_config.json.

    Args:
        r: rank of every matrix for which rank_pattern gives no other value.
        lora_alpha: numerator of the scaling of every matrix for which alpha_pattern gives no other value.
        rank_pattern, alpha_pattern: other values; the keys are regular expressions that match the end of a module's name.
        lora_dropout: share of the inputs of A that is set to 0 in training.
        use_rslora: scaling is alpha / sqrt(r) instead of alpha / r.
    Raises: ValueError for values out of range.
    """

    r: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_rslora: bool = False
    rank_pattern: Mapping[str, int] | None = None
    alpha_pattern: Mapping[str, float] | None = None

    def __post_init__(self):
        ranks, alphas = checked_pattern(self.rank_pattern, "rank_pattern"), checked_pattern(self.alpha_pattern, "alpha_pattern")
        for value in (self.r, *ranks.values()):
            if not (type(value) is int and 0 < value < 1 << 20):
                raise ValueError(f"the rank r is {value!r:.50}; a whole number from 1 up is needed.")
        for value in (self.lora_alpha, *alphas.values()):
            if not (type(value) in (int, float) and -MAX_ALPHA <= value <= MAX_ALPHA):
                raise ValueError(f"lora_alpha is {value!r:.50}; a number is needed.")
        if not (type(self.lora_dropout) in (int, float) and 0 <= self.lora_dropout < 1):
            raise ValueError(f"lora_dropout is {self.lora_dropout!r:.50}; a number from 0 to below 1 is needed.")
        if type(self.use_rslora) is not bool:
            raise ValueError(f"use_rslora is {self.use_rslora!r:.50}; true or false is needed.")

    def rank(self, name: str) -> int:
        """The rank of the module of that name."""
        return matching(self.rank_pattern, name, self.r)

    def scaling(self, name: str) -> float:
        """The factor of B A in the module of that name."""
        rank = self.rank(name)
        return matching(self.alpha_pattern, name, self.lora_alpha) / (math.sqrt(rank) if self.use_rslora else rank)

    def unused_keys(self, modules: Collection[str]) -> list[str]:
        """The keys of the patterns that match none of these modules."""
        keys = [*(self.rank_pattern or ()), *(self.alpha_pattern or ())]
        return [key for key in dict.fromkeys(keys) if not any(fits(key, name) for name in modules)]

    @classmethod
    def from_peft(cls, raw: dict) -> "LoraConfig":
        """Reads adapter_config.json. Raises: ValueError for other kinds of adapters and for unsupported settings."""
        if raw.get("peft_type") != "LORA":
            raise ValueError(f"peft_type is {raw.get('peft_type')!r:.50}; LORA is needed.")
        start = raw.get("init_lora_weights", True)
        if start not in KEEPS_BASE and start is not None:
            raise ValueError(
                f"init_lora_weights is {start!r:.50}: such an adapter also changes the base model's own weights, so the "
                "answers would be wrong. Save it as a plain adapter, with path_initial_model_for_weight_conversion of PEFT."
            )
        unsupported = {key: value for key, value in raw.items() if value and key not in (*ACCEPTED_KEYS, "init_lora_weights")}
        if unsupported.get("bias") == "none":
            del unsupported["bias"]
        if unsupported:
            asked = ", ".join(f"{key} {value!r:.50}" for key, value in [*unsupported.items()][:5])
            raise ValueError(f"it asks for {asked}, which is not implemented.")
        names = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
        defaults = {"r": 8, "lora_alpha": 8}  # PEFT's defaults for missing keys
        return cls(**defaults | {name: raw[name] for name in names if raw.get(name) is not None})

    def to_peft(self, base: str | None, targets: Collection[str], revision: str | None = None) -> dict:
        """The adapter_config.json that PEFT reads.

        Args:
            base: folder or hub id of the base model.
            targets: names of the adapted modules. They are written as one expression, which matches the modules under the
                names of every version of transformers. If only the language model is adapted, the expression matches no module
                of the vision tower, and the other way round.
            revision: branch, tag or commit of the hub id.
        """
        patterns = []
        for part in PARTS.values():
            words = sorted({name.rpartition(".")[2] for name in targets if name.startswith(part)})
            patterns += [rf"(.*\.)?{part}\..*\.({'|'.join(words)})"] if words else []
        return {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "revision": revision,
            "r": self.r,
            "lora_alpha": self.lora_alpha,
            "lora_dropout": self.lora_dropout,
            "use_rslora": self.use_rslora,
            "rank_pattern": dict(self.rank_pattern or {}),
            "alpha_pattern": dict(self.alpha_pattern or {}),
            "target_modules": patterns[0] if len(patterns) == 1 else "|".join(f"({pattern})" for pattern in patterns),
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
        }


def merged_weight(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """W + scaling * B A for weight [O, X], A [R, X], B [O, R], computed in float32 and rounded once to the dtype of `weight`.

    The result is a new tensor, because `weight` may be a mapped file, which must not be written to.
    """
    return (weight.float() + (b.float() @ a.float()) * scaling).to(weight.dtype)


class LoRALinear(nn.Linear):
    """nn.Linear with A and B next to its frozen weight. `weight` and `bias` keep their names: base checkpoints load unchanged.

    Args:
        base: the nn.Linear that this layer replaces, and whose tensors it shares.
        rank, scaling, dropout: see LoraConfig.
        dtype: the dtype of A and B. It is float32 even if the base is bfloat16, because bfloat16 would round away an update
            that changes a number by 0.1 percent.
    """

    def __init__(self, base: nn.Linear, rank: int, scaling: float, dropout: float = 0.0, dtype: torch.dtype = torch.float32):
        with torch.device("meta"):
            super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.weight, self.bias = base.weight, base.bias
        self.product = product if isinstance(base, FastLinear) else F.linear
        self.scaling, self.dropout = scaling, dropout
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, dtype=dtype, device=device)
        self.lora_B = nn.Linear(rank, base.out_features, bias=False, dtype=dtype, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as PEFT
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        y = self.product(x, self.weight, self.bias)
        x = F.dropout(x, self.dropout, self.training)
        if not torch.is_autocast_enabled(x.device.type):  # autocast would cast x again
            x = x.to(self.lora_A.weight.dtype)
        low = self.lora_A(x) * self.scaling  # [..., R]
        return y + self.lora_B(low).to(y.dtype)

    def merged(self) -> nn.Linear:
        """A plain nn.Linear that computes the same."""
        with torch.device("meta"):
            plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None)
        weight = merged_weight(self.weight.detach(), self.lora_A.weight.detach(), self.lora_B.weight.detach(), self.scaling)
        plain.weight, plain.bias = nn.Parameter(weight, requires_grad=self.weight.requires_grad), self.bias
        return plain


def targets(model: nn.Module, parts: Collection[str] = ("language",), matrices: Collection[str] = MATRICES) -> list[str]:
    """Names of the matrices to adapt.

    Args:
        parts: "language", "vision" or both.
        matrices: last parts of the matrices' names, such as "q_proj"; by default all matrices of the layers.
    Raises: ValueError for parts and matrices that the model does not have.
    """
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a part of the model that can be adapted; language or vision is needed.")
    roots = tuple(f"{PARTS[part]}." for part in parts)
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and name.startswith(roots)]
    known = {name.rpartition(".")[2] for name in linear}
    if matrices is not MATRICES and not known.issuperset(matrices):
        wrong = sorted(set(matrices) - known)
        raise ValueError(f"{', '.join(wrong)} names no matrix of {' and '.join(parts)}; there are {', '.join(sorted(known))}.")
    return [name for name in linear if name.rpartition(".")[2] in matrices]


def inject(model: nn.Module, config: LoraConfig, names: Collection[str]) -> None:
    """Freezes the model and adds an A and a B, the only trained weights, to the matrices of these names (see `targets`).

    Raises: ValueError for a float16 model, whose gradients would be too small or too large for float16.
    """
    if any(model.get_submodule(name).weight.dtype == torch.float16 for name in names):
        raise ValueError("an adapter needs a base model in bfloat16 or float32, but this one is in float16.")
    model.requires_grad_(False)
    for name in names:
        layer = LoRALinear(model.get_submodule(name), config.rank(name), config.scaling(name), config.lora_dropout)
        model.set_submodule(name, layer)


def adapted(model: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The layers that `inject` created, with their names."""
    return ((name, module) for name, module in list(model.named_modules()) if isinstance(module, LoRALinear))


def merge(model: nn.Module) -> None:
    """Replaces each W by W + scaling * B A: the model computes the same without an adapter. Raises: ValueError if it has none."""
    layers = list(adapted(model))
    if not layers:
        raise ValueError("the model has no adapter: either it was already merged, or the model never had one.")
    for name, layer in layers:
        model.set_submodule(name, layer.merged())


def adapter_state(model: nn.Module) -> dict[str, Tensor]:
    """A and B of every adapted layer as full tensors, by parameter name. With FSDP, all processes must call this."""
    state = {}
    for name, layer in adapted(model):
        for matrix in ("lora_A", "lora_B"):
            weight = getattr(layer, matrix).weight.detach()
            state[f"{name}.{matrix}.weight"] = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
    return state


def modules_of(shapes: Mapping[str, tuple[int, ...]], config: LoraConfig, bases: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the modules that an adapter file changes, after a check that it fits the base model.

    Args:
        shapes: shapes of the tensors in the file, under our names: "<module>.lora_A.weight" and "<module>.lora_B.weight".
        config: settings of the adapter.
        bases: shape of each matrix of the base model, under our names: "<module>.weight".
    Raises: ValueError for a tensor that is neither A nor B, for an A without B, and for shapes that do not fit this base model.
    """
    modules = dict.fromkeys(re.sub(r"\.lora_[AB]\.weight$", "", name) for name in shapes)
    for module in modules:
        if module in shapes:
            raise ValueError(f"it holds {module}, which is neither an A nor a B.")
        found = shapes.get(f"{module}.lora_A.weight"), shapes.get(f"{module}.lora_B.weight")
        base = bases.get(f"{module}.weight")
        if base is None or len(base) != 2:
            raise ValueError(f"it adapts {module}, a matrix that the base model does not have.")
        rank = config.rank(module)
        needed = (rank, base[1]), (base[0], rank)
        if found != needed:
            a, b = (list(shape) if shape else "missing" for shape in found)
            text = f"the shapes of A and B of {module} are {a} and {b}"
            raise ValueError(f"{text}; {list(needed[0])} and {list(needed[1])} are needed.")
    return list(modules)
