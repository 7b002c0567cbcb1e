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

from dataclasses import asdict, dataclass, field, fields
from typing import Any

from transformers import CONFIG_MAPPING, PreTrainedConfig

SOFTMAX = "softmax"
# What the fields of an anatomy that name a kind can be.
KINDS = {
    "rows": ("apart", "blocks", "groups"),
    "norm_over": ("head", "channels", "head_first"),
    "rotary": ("half", "pairs", "pairs_of_halves"),
}
_TYPES: dict[str, tuple[type, ...]] = {
    **{"str": (str,), "int": (int,), "float": (int, float), "bool": (bool,), "list[str]": (list,)},
    **{"list[float]": (list,), "str | None": (str, type(None)), "int | None": (int, type(None))},
    "float | None": (int, float, type(None)),
}


@dataclass(kw_only=True)
class AttentionAnatomy:
    """What one softmax attention module is made of, as plain data.

    `path` is the module's dotted name in the model. `scale` multiplies q.k. `window` is the teacher's own sliding
    window, None where it attends to everything.

    `inputs` are the names of the module's children that project its input: three for q, k and v where `rows` is
    "apart", else one that is fused, whose rows are "blocks" [q | k | v] or "groups", key group by key group its
    queries, its key and its value. `output` is the name of the child that takes the heads' outputs.

    `norms` are the names of the norms of queries and keys, before rotation, none or two. They are given `norm_over`:
    "head" [B, T, H, D], "channels" [B, T, H D], or "head_first" [B, H, T, D].

    `rotary_dim` leading channels of a head are rotated (0: none): channel i with i + rotary_dim / 2 ("half"), or with
    its neighbour ("pairs"; "pairs_of_halves" where the first half of cos and sin holds the angles). `rotary_wide`:
    turned in fp32 and rounded after, where others turn in the model's dtype.

    `logit_cap` c bounds the logits s: c tanh(s / c). `alibi` has a slope for each query head, which times the distance
    inside a document is taken off its logits; empty where there is none. `null_logits` is the name of the module's own
    parameter [H] that is one more logit in each head's denominator, with neither key nor value.

    `adds_residual`: the module is given `residual` too, and adds it to its output.
    """

    path: str
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    inputs: list[str] = field(default_factory=lambda: ["q_proj", "k_proj", "v_proj"])
    rows: str = "apart"
    output: str = "o_proj"
    norms: list[str] = field(default_factory=list)
    norm_over: str = "head"
    rotary_dim: int = 0
    rotary: str = "half"
    rotary_wide: bool = False
    logit_cap: float | None = None
    alibi: list[float] = field(default_factory=list)
    null_logits: str | None = None
    adds_residual: bool = False

    def __post_init__(self) -> None:
        for entry in fields(self):
            value = getattr(self, entry.name)
            known_types = _TYPES[str(entry.type)]
            if not isinstance(value, known_types) or (isinstance(value, bool) and bool not in known_types):
                raise ValueError(f"{self.path}: {entry.name} is {value!r}, and must be {entry.type}")
        for name in ("hidden_size", "num_heads", "num_kv_heads", "head_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{self.path}: {name} is {getattr(self, name)}, and must be positive")
        for name, known in KINDS.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{self.path}: {name} is {getattr(self, name)!r}, and can be: {', '.join(known)}")
        if len(self.inputs) != (3 if self.rows == "apart" else 1) or len(self.norms) not in (0, 2):
            raise ValueError(f"{self.path}: inputs {self.inputs} do not fit rows {self.rows!r}, or norms {self.norms}")
        if not 0 <= self.rotary_dim <= self.head_dim:
            raise ValueError(f"{self.path}: rotary_dim is {self.rotary_dim}, and heads have {self.head_dim} channels")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"{self.path}: {self.num_heads} query heads do not divide into {self.num_kv_heads} key heads"
            )
        if len(self.alibi) not in (0, self.num_heads):
            raise ValueError(f"{self.path}: {len(self.alibi)} slopes in alibi do not fit {self.num_heads} heads")

    @property
    def group_size(self) -> int:
        """Query heads to a key head; query head h reads key head h // group_size."""
        return self.num_heads // self.num_kv_heads

    @property
    def layer_path(self) -> str:
        """The decoder layer that holds the module."""
        return self.path.rpartition(".")[0]

    @property
    def stack_path(self) -> str:
        """The list of the decoder's layers."""
        return self.layer_path.rpartition(".")[0]

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

    def convert_rope_params_to_dict(self, **kwargs: Any) -> dict[str, Any]:
        """Nothing: the rotary settings seen here are the teacher's own, and transformers would write into them."""
        return kwargs

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The teacher's config: what generation and embedding resizing read from and write to."""
        return self.parent_config if self.parent_config is not None else self

    def swapped(self) -> list[int]:
        """Indices of the layers whose attention is a mixer's, wholly or in part."""
        return [index for index, layer in enumerate(self.layers) if layer["mixer"] != SOFTMAX]
