"""The config of a converted model: the teacher's own config, and a plain record of what each layer became.

`parent_config` is the teacher's config, whole; the attributes that the ecosystem reads from a config (`vocab_size`,
`hidden_size`, `num_hidden_layers`, ...) fall through to it. `layers` has one entry a decoder layer:

    {"mixer": "softmax"}                                  left as it was, the teacher's own module
    {"mixer": "based", "softmax_heads": [3], "anatomy": {...}}   swapped; the listed query heads stay softmax, and with
                                                          "softmax_window" see that many keys and the
                                                          document's first "softmax_sinks"

and `mixer_options` what all swapped layers share (window, sinks, feature map, ...).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

SOFTMAX = "softmax"


@dataclass(kw_only=True)
class AttentionAnatomy:
    """What one softmax attention module is made of, as plain data.

    `path` is the module's dotted name in the model. `rotary_dim` leading channels of a head are rotated (0: none), in
    the half-split layout. `qk_norm_eps` is the epsilon of an RMS norm over each head's channels, None without one.
    `window` is the teacher's own sliding window, None where it attends to everything. `scale` multiplies q.k.
    """

    path: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    rotary_dim: int
    q_bias: bool = False
    k_bias: bool = False
    v_bias: bool = False
    o_bias: bool = False
    qk_norm_eps: float | None = None
    window: int | None = None

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.path}: {self.num_heads} query heads do not divide into {self.num_kv_heads} key heads"
            )

    @property
    def group_size(self) -> int:
        """Query heads to a key head; query head h reads key head h // group_size."""
        return self.num_heads // self.num_kv_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


class LinearizeConfig(PreTrainedConfig):
    """Config of a model whose softmax attention was swapped for linear-time mixers.

    Args:
        parent_config: the teacher's config, as an object or as the dict that config.json holds.
        layers: one entry a decoder layer, see the module's docstring.
        mixer_options: keyword arguments of every swapped layer's mixer.
    """

    model_type = "linearize"
    has_no_defaults_at_init = True

    def __init__(
        self,
        parent_config: PreTrainedConfig | dict[str, Any] | None = None,
        layers: list[dict[str, Any]] | None = None,
        mixer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if isinstance(parent_config, dict):
            fields = dict(parent_config)
            model_type = fields.pop("model_type", None)
            if model_type not in CONFIG_MAPPING:
                raise ValueError(f"parent_config.model_type is {model_type!r}, which transformers does not know")
            parent_config = CONFIG_MAPPING[model_type](**fields)
        self.parent_config = parent_config
        self.layers = layers or []
        self.mixer_options = mixer_options or {}
        if parent_config is not None:
            for name in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"):
                kwargs.setdefault(name, getattr(parent_config, name, None))
            kwargs.setdefault("dtype", parent_config.dtype)
        super().__init__(**kwargs)

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not set here. Private and serialised names must fail plainly, or copying loops.
        parent = self.__dict__.get("parent_config")
        if parent is None or name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(parent, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # Trainers switch the cache off on the model's config; the teacher's own class reads the teacher's.
        parent = self.__dict__.get("parent_config")
        if name == "use_cache" and isinstance(parent, PreTrainedConfig):
            parent.use_cache = value
        else:
            super().__setattr__(name, value)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The teacher's config: what generation and embedding resizing read from and write to."""
        return self.parent_config if self.parent_config is not None else self

    def swapped(self) -> list[int]:
        """Indices of the layers whose attention is a mixer's, wholly or in part."""
        return [index for index, layer in enumerate(self.layers) if layer["mixer"] != SOFTMAX]
