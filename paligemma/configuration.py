"""config.json as three frozen dataclasses: for the vision tower, for the decoder, and for the whole model. Values are checked.

Fields have the same names as in config.json. A setting that the model does not implement is an error.
Checked in tests/test_modeling_siglip.py, test_modeling_gemma.py, test_modeling_paligemma.py and checkpoints/test_hub_configs.py.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from paligemma.vocabulary import IGNORE_INDEX

# Real models are far below these limits; a larger number means a damaged config.json.
MAX_SIZE = 2**20  # widths, depths, vocabularies
MAX_IMAGE_SIZE = 2**12  # pixels; published models have at most 896
MAX_PATCHES = 2**16  # published models have at most 4096
MAX_NUMBER = 1e12  # rope_theta, eps, soft caps and scales; a number up to this limit and its inverse are finite in float32

# transformers does not write a field that has its default value. `model_type` tells which of these defaults apply.
DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma": {
        "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 24576, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 16,
    },
    "gemma2": {
        "vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
        "num_attention_heads": 8, "num_key_value_heads": 4, "query_pre_attn_scalar": 256, "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0, "sliding_window": 4096,
    },
}  # fmt: skip
# In Gemma 2, null in one of these fields turns the feature off, but a missing field has its default value.
NULL_DISABLES = ("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "sliding_window")


def check_whole_numbers(config: Any, section: str, limits: dict[str, int]) -> None:
    """Raises ValueError unless every int field is a whole number from 1 to limits[field name] or, by default, MAX_SIZE."""
    for field in fields(config):
        value, limit = getattr(config, field.name), limits.get(field.name, MAX_SIZE)
        if field.type is int and not (type(value) is int and 0 < value <= limit):
            raise ValueError(f"{section}.{field.name} is {value!r}; a whole number from 1 to {limit} is needed.")


@dataclass(frozen=True)
class SiglipVisionConfig:
    """The numbers that define a vision tower, under the names of `vision_config` in config.json.

    A field that is missing in config.json has transformers' default value, because transformers does not write defaults.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_whole_numbers(self, "vision_config", {"image_size": MAX_IMAGE_SIZE})
        if not (type(self.layer_norm_eps) is float and 1e-20 <= self.layer_norm_eps < 1):
            raise ValueError(f"vision_config.layer_norm_eps is {self.layer_norm_eps!r}; a small positive number is needed.")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config.num_attention_heads {self.num_attention_heads} does not divide hidden_size {self.hidden_size}."
            )
        if self.image_size % self.patch_size:
            raise ValueError(f"vision_config.patch_size {self.patch_size} does not divide image_size {self.image_size}.")
        if self.num_patches > MAX_PATCHES:
            raise ValueError(f"vision_config asks for {self.num_patches} patches per picture; at most {MAX_PATCHES} are allowed.")

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "SiglipVisionConfig":
        """Reads `vision_config` of config.json. Raises ValueError for settings that modeling_siglip.py does not implement.

        Fields that PaliGemma does not use are ignored: `vision_use_head` is true in some files only because true is the default,
        and `num_positions` and `num_image_tokens` do not always match the weights.
        """
        if raw.get("model_type") not in (None, "siglip_vision_model"):
            raise ValueError(f"vision_config.model_type is {raw['model_type']!r}; 'siglip_vision_model' is needed.")
        if raw.get("hidden_act") not in (None, "gelu_pytorch_tanh"):
            raise ValueError(f"vision_config.hidden_act is {raw['hidden_act']!r}; 'gelu_pytorch_tanh' is needed.")
        return cls(**{field.name: raw[field.name] for field in fields(cls) if raw.get(field.name) is not None})


@dataclass(frozen=True)
class GemmaConfig:
    """The numbers that define a decoder, under the names of `text_config` in config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int = 256
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    model_type: str = "gemma"
    query_pre_attn_scalar: float | None = None  # scores are divided by its square root; Gemma 1 uses head_dim instead
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    sliding_window: int | None = None  # used only if the model is made with sliding_window="config"

    def __post_init__(self) -> None:
        check_whole_numbers(self, "text_config", {})
        for field in fields(self):
            value = getattr(self, field.name)
            is_absent = field.type == float | None and value is None
            is_in_range = type(value) in (int, float) and 1 / MAX_NUMBER <= value <= MAX_NUMBER
            if field.type in (float, float | None) and not (is_absent or is_in_range):
                raise ValueError(f"text_config.{field.name} is {value!r}; a positive number is needed, at most {MAX_NUMBER:g}.")
        if self.model_type not in ("gemma", "gemma2"):
            raise ValueError(f"text_config.model_type is {self.model_type!r}; 'gemma' or 'gemma2' is needed.")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config.num_key_value_heads {self.num_key_value_heads} does not divide "
                f"num_attention_heads {self.num_attention_heads}."
            )
        if self.head_dim % 2:
            raise ValueError(f"text_config.head_dim is {self.head_dim}; RoPE rotates pairs, so an even number is needed.")
        if self.sliding_window is not None and not (type(self.sliding_window) is int and 0 < self.sliding_window < 2**31):
            raise ValueError(f"text_config.sliding_window is {self.sliding_window!r}; a whole number above 0 is needed.")

    @property
    def is_gemma2(self) -> bool:
        return self.model_type == "gemma2"

    @property
    def query_scale(self) -> float:
        scale: float = (self.query_pre_attn_scalar or self.head_dim) ** -0.5
        return scale

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "GemmaConfig":
        """Reads `text_config` of config.json. A missing field has the default value of transformers.

        Raises: ValueError for settings that modeling_gemma.py does not implement.
        """
        given = {key: value for key, value in raw.items() if value is not None}
        # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters; rope_scaling takes precedence.
        rope_key = "rope_scaling" if given.get("rope_scaling") else "rope_parameters"
        rope = given.get(rope_key, {})
        if not isinstance(rope, dict):
            raise ValueError(f"text_config.{rope_key} is {rope!r}; an object is needed.")
        is_gemma2 = given.get("model_type") == "gemma2"
        supported = {
            "hidden_act": ("gelu", "gelu_pytorch_tanh"),  # Gemma's first files have "gelu", but Gemma was trained with tanh
            "hidden_activation": ("gelu_pytorch_tanh",) if is_gemma2 else ("gelu", "gelu_pytorch_tanh"),
            "attention_bias": (False,),
            "use_bidirectional_attention": (True, False),
        }
        unsupported = {key: given[key] for key, values in supported.items() if key in given and given[key] not in values}
        has_types = any(isinstance(value, dict) for value in rope.values())  # separate RoPE settings for each type of layer
        if rope.get("rope_type", rope.get("type", "default")) != "default" or has_types:
            unsupported[rope_key] = rope
        layers, alternating = given.get("layer_types", []), ("sliding_attention", "full_attention")
        if not isinstance(layers, list) or any(kind != alternating[i % 2] for i, kind in enumerate(layers)):
            unsupported["layer_types"] = layers
        if unsupported:
            raise ValueError(f"text_config asks for {unsupported}, which modeling_gemma.py does not implement.")
        defaults = DEFAULTS["gemma2" if is_gemma2 else "gemma"]
        given = {key: value for key, value in defaults.items() if not (key in raw and key in NULL_DISABLES)} | given
        if "rope_theta" in rope:
            given["rope_theta"] = rope["rope_theta"]
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


@dataclass(frozen=True)
class PaliGemmaConfig:
    """A whole config.json: the configs of tower and decoder, and the token ids that the model uses."""

    vision_config: SiglipVisionConfig
    text_config: GemmaConfig
    image_token_index: int
    pad_token_id: int = 0
    bos_token_id: int = 2
    eos_token_id: int | tuple[int, ...] = 1

    def __post_init__(self) -> None:
        for name in ("image_token_index", "pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            ids = value if name == "eos_token_id" and isinstance(value, tuple) else (value,)
            if not (ids and all(type(token) is int and 0 <= token < 2**31 for token in ids)):
                raise ValueError(f"{name} is {value!r}; a token id is needed.")

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.eos_token_id if isinstance(self.eos_token_id, tuple) else (self.eos_token_id,)

    @property
    def num_image_tokens(self) -> int:
        """P, the number of <image> tokens per picture."""
        return self.vision_config.num_patches

    @classmethod
    def from_hf(cls, raw: dict[str, Any]) -> "PaliGemmaConfig":
        """Reads a whole config.json in the forms that transformers 4 and 5 write and that the published checkpoints use.

        Two fields are ignored. The top-level `hidden_size` is 2048 in all files of PaliGemma 2, even if the decoder has another
        width. For vision_config's `projection_dim`, transformers uses the value of the top-level `projection_dim`.
        Raises: ValueError for another type of model, a missing or absurd number, or a setting that is not implemented.
        """
        if raw.get("model_type") != "paligemma":
            raise ValueError(f"this is a {raw.get('model_type')!r} model; model_type 'paligemma' is needed.")
        for key in ("vision_config", "text_config"):
            if not isinstance(raw.get(key), dict):
                raise ValueError(f"{key} is {raw.get(key)!r}; an object is needed.")
        ids: dict[str, Any] = {}
        for key in ("pad_token_id", "bos_token_id", "eos_token_id"):  # transformers 5 writes these into text_config only
            value = raw.get(key) if raw.get(key) not in (None, []) else raw["text_config"].get(key)
            # Some programs write -1 if there is no padding token.
            is_absent = value in (None, []) or key == "pad_token_id" and value == -1
            if not is_absent:
                ids[key] = tuple(value) if isinstance(value, list) else value
        image_token = raw.get("image_token_index") if raw.get("image_token_index") is not None else raw.get("image_token_id")
        if image_token is None:
            raise ValueError("image_token_index is missing.")
        vision, text = SiglipVisionConfig.from_hf(raw["vision_config"]), GemmaConfig.from_hf(raw["text_config"])
        config = cls(vision, text, image_token, **ids)
        if raw.get("projection_dim") not in (None, text.hidden_size):
            raise ValueError(f"projection_dim is {raw['projection_dim']!r}, but the decoder is {text.hidden_size} wide.")
        return config

    def to_hf(self) -> dict[str, Any]:
        """The config.json that describes this model, for transformers and from_hf."""
        # Gemma 2 needs the null fields: null disables a feature, while a missing field would be read as the default.
        is_gemma2 = self.text_config.is_gemma2
        text = {key: value for key, value in asdict(self.text_config).items() if value is not None or is_gemma2}
        text |= {"hidden_activation": "gelu_pytorch_tanh", "num_image_tokens": self.num_image_tokens}
        vision = asdict(self.vision_config) | {
            "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh",
            "num_image_tokens": self.num_image_tokens,
            "projection_dim": self.text_config.hidden_size,
            "vision_use_head": False,
        }
        eos = list(self.eos_token_id) if isinstance(self.eos_token_id, tuple) else self.eos_token_id
        return {
            "architectures": ["PaliGemmaForConditionalGeneration"],
            "model_type": "paligemma",
            "image_token_index": self.image_token_index,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": eos,
            "hidden_size": self.text_config.hidden_size,
            "projection_dim": self.text_config.hidden_size,
            "vocab_size": self.text_config.vocab_size,
            "ignore_index": IGNORE_INDEX,
            "text_config": text,
            "vision_config": vision,
        }
