"""MiniMind's files: their names, their tensors, and the Hugging Face architecture that they are.

A file of jingyaogong/minimind is a state dict that says nothing of heads, rope or epsilons.  Three
generations of it are known by their tensors:

* `llama2.c` names (`layers.0.attention.wq.weight`), rope over neighbouring pairs: a Llama, once the
  rows of wq and wk are sorted into halves, as Hugging Face's rope has them;
* Hugging Face names without `q_norm`: a Llama; a mixture of experts, with experts that every token
  passes (`shared_experts`), is a Granite MoE whose multipliers are 1;
* Hugging Face names with `q_norm`: a Qwen3, or a Qwen3 MoE.

Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from splitlearn_core.errors import CheckpointError, UnsupportedModelError
from splitlearn_core.headers import listed
from splitlearn_core.messages import short

MINIMIND = "minimind"
"""What `model_type` is called."""

AUTO = "auto"

Shapes = Mapping[str, tuple[int, ...]]

_NAME = re.compile(
    r"(?P<stage>[a-z][a-z0-9_]*?)_(?P<hidden>[1-9]\d{0,5})(?P<moe>_moe)?(?P<resume>_resume)?"
    r"\.(?:pth|pt|bin|safetensors)"
)
_LORA = "lora_"
LORA_FACTOR = ".lora.A.weight"
"""How the names of an adapter's tensors end, every second one."""


@dataclass(frozen=True)
class MiniMindName:
    """What a file's name says: `{stage}_{hidden_size}{_moe}.pth`, `…_resume.pth` for training.

    Attributes:
        stage: `pretrain`, `full_sft`, `dpo`, …; of an adapter `lora_medical`, …
        hidden_size: Width of the model.
        is_moe: Whether it is a mixture of experts.
        is_resume: Whether training goes on from it.
    """

    stage: str
    hidden_size: int
    is_moe: bool = False
    is_resume: bool = False

    @classmethod
    def parse(cls, name: str) -> MiniMindName | None:
        """Read a file's name; `None` where it does not follow the rule."""
        found = _NAME.fullmatch(name)
        if found is None:
            return None
        return cls(found["stage"], int(found["hidden"]), bool(found["moe"]), bool(found["resume"]))

    @property
    def is_lora(self) -> bool:
        """Whether it is an adapter's."""
        return self.stage.startswith(_LORA)

    @property
    def file_name(self) -> str:
        """The file's name."""
        moe, resume = "_moe" * self.is_moe, "_resume" * self.is_resume
        return f"{self.stage}_{self.hidden_size}{moe}{resume}.pth"


@dataclass(frozen=True)
class Made:
    """How a tensor of the Hugging Face model is made of stored ones.

    Attributes:
        groups: Names of stored tensors; those of a group are joined.
        stacked: Whether each group becomes one entry of a new first dimension.
        dim: Along which those of a group are joined.
        pairs_of: Heads whose rows are sorted from neighbouring pairs into halves; 0 for none.
    """

    groups: tuple[tuple[str, ...], ...]
    stacked: bool = False
    dim: int = 0
    pairs_of: int = 0

    @property
    def sources(self) -> Iterable[str]:
        """Every stored tensor that is needed."""
        return (name for group in self.groups for name in group)

    def shape(self, shapes: Shapes) -> tuple[int, ...]:
        """Return the shape that comes out."""
        joined = [list(shapes[group[0]]) for group in self.groups]
        for shape, group in zip(joined, self.groups, strict=True):
            shape[self.dim] = sum(shapes[name][self.dim] for name in group)
        return (len(joined), *joined[0]) if self.stacked else tuple(joined[0])


@dataclass(frozen=True)
class MiniMindModel:
    """A file as a Hugging Face model.

    Attributes:
        generation: 1, 2 or 3, as above.
        config: What its `config.json` would hold.
        tensors: The model's names -> how they are made.
        ignored: Stored tables that are computed.
    """

    generation: int
    config: dict[str, Any]
    tensors: dict[str, Made] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()


# Buffers: rope tables, causal masks.
_TABLES = re.compile(r"(^|\.)(freqs_cos|freqs_sin|pos_cis|freqs_cis|mask|inv_freq)$")
_LAYER = re.compile(r"(?:model\.)?layers\.(\d+)\.(.+)")

# The names of generation 1 -> Hugging Face's.
_FIRST = {"tok_embeddings.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight"}
_FIRST |= {"output.weight": "lm_head.weight"}
_FIRST_IN_LAYERS = {
    "attention.wq.weight": "self_attn.q_proj.weight",
    "attention.wk.weight": "self_attn.k_proj.weight",
    "attention.wv.weight": "self_attn.v_proj.weight",
    "attention.wo.weight": "self_attn.o_proj.weight",
    "attention_norm.weight": "input_layernorm.weight",
    "ffn_norm.weight": "post_attention_layernorm.weight",
}
_FIRST_LINEARS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}

_TABLE, _HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What a user may say of a file, by the names that Hugging Face has; what the file tells besides,
# it must agree with.
_OPTIONS = {
    "bos_token_id", "eos_token_id", "hidden_act", "hidden_size", "inference_rope_scaling",
    "intermediate_size", "max_position_embeddings", "norm_topk_prob", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "rms_norm_eps",
    "rope_scaling", "rope_theta", "tie_word_embeddings", "vocab_size",
}  # fmt: skip
_TOKENS = {"bos_token_id", "eos_token_id"}
# Other names of the same, from MiniMind's own configs.
_SYNONYMS = {
    "dim": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads", "norm_eps": "rms_norm_eps",
    "max_seq_len": "max_position_embeddings", "hidden_dim": "intermediate_size",
}  # fmt: skip
# What MiniMind's `inference_rope_scaling=True` stands for.
_YARN = {
    "rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 2048,
    "beta_fast": 32.0, "beta_slow": 1.0, "attention_factor": 1.0,
}  # fmt: skip
_NO_MOE = (
    "a MiniMind mixture of experts loads where transformers has an architecture that computes the"
    " same: softmax over all experts, the best {count} normalised.  This one"
)


def is_minimind(names: Iterable[str]) -> bool:
    """Whether tensors have the names of one of the generations."""
    known = set(names)
    layer = {_LAYER.sub(r"\2", name) for name in known}
    first = {"tok_embeddings.weight", "norm.weight"} <= known and "attention.wq.weight" in layer
    later = {_TABLE, "model.norm.weight"} <= known and "self_attn.q_proj.weight" in layer
    biased = any(name.endswith(".bias") for name in known)
    return (first or later) and not biased


def may_be_minimind(
    file: str | None, config_type: object, model_type: str, options: Mapping[str, Any] | None
) -> bool:
    """Whether a model is one of MiniMind's, as far as can be told without its tensors.

    Args:
        file: The weights file that was named; `None` where it was a folder.
        config_type: The `model_type` in the `config.json` beside; `None` where there is none.
        model_type: What the caller says: `minimind`, or `auto`; another says that it is none.
        options: What the caller says of a MiniMind file; that there are any says that it is one.
    """
    if model_type not in {AUTO, MINIMIND}:
        return False
    if model_type == MINIMIND or options is not None or config_type == MINIMIND:
        return True
    name = None if file is None or config_type is not None else MiniMindName.parse(file)
    return name is not None and not name.is_lora


def check_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by the names that Hugging Face has.

    Raises:
        ValueError: One is unknown, or of the wrong type.
    """
    renamed = {_SYNONYMS.get(name, name): value for name, value in options.items()}
    if unknown := renamed.keys() - _OPTIONS:
        raise ValueError(
            f"minimind does not take {listed(unknown)}; it takes {', '.join(sorted(_OPTIONS))}"
        )
    for name, value in renamed.items():
        if not _is_sound(name, value):
            raise ValueError(f"minimind: {name} can't be {short(value)}")
    return renamed


def _is_sound(name: str, value: object) -> bool:
    """Whether an option has a value of its kind."""
    if name in {"norm_topk_prob", "tie_word_embeddings", "inference_rope_scaling"}:
        return isinstance(value, bool)
    if name == "rope_scaling":
        return value is None or isinstance(value, Mapping)
    if name == "hidden_act":
        return isinstance(value, str)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    if name in {"rope_theta", "rms_norm_eps"}:
        return value > 0
    return isinstance(value, int) and value >= (name not in _TOKENS)


def describe(
    shapes: Shapes, where: str, *, tied: bool, dtype: str, options: Mapping[str, Any] | None = None
) -> MiniMindModel:
    """Work out which Hugging Face model a MiniMind file is.

    Args:
        shapes: The file's tensors.
        where: Names the file in errors.
        tied: Whether the head's values are the embeddings'.
        dtype: Of the weights.
        options: What the file does not tell, see `check_options`; MiniMind's defaults hold
            otherwise.

    Raises:
        CheckpointError: (a `ValueError`) Tensors are missing, strange, or don't go with the
            options; names them.
        UnsupportedModelError: (a `KeyError`) A mixture of experts that transformers has no
            architecture for; says why.
        ValueError: An option is unknown.
    """
    return _Reading(shapes, where, tied, dtype, check_options(options or {})).model()


class _Reading:
    """One file being read: its tensors by Hugging Face's names, and what is given besides."""

    def __init__(
        self, shapes: Shapes, where: str, tied: bool, dtype: str, options: Mapping[str, Any]
    ) -> None:
        self._shapes = shapes
        self._where = where
        self._tied = tied
        self._dtype = dtype
        self._options = options
        self._ignored = tuple(sorted(name for name in shapes if _TABLES.search(name)))
        own = [name for name in shapes if not _TABLES.search(name)]
        if any(name.endswith(LORA_FACTOR) for name in own):
            raise CheckpointError(
                f"{where} is a LoRA adapter, no model: load its model, and then the adapter"
                " (splitlearn_core.checkpoint.load_lora)"
            )
        if not is_minimind(own):
            raise CheckpointError(
                f"{where} is no MiniMind model: it has neither tok_embeddings and"
                " layers.N.attention.wq nor model.embed_tokens and model.layers.N.self_attn.q_proj;"
                f" it has {listed(own, 6)}"
            )
        self._is_first = "tok_embeddings.weight" in shapes
        self._names = {hugging_face_name(name): name for name in own} if self._is_first else None
        self._stored = self._names or {name: name for name in own}
        self._has_norms = self._has("self_attn.q_norm.weight")
        self._is_moe = self._has("mlp.gate.weight")

    def _has(self, name: str) -> bool:
        return f"model.layers.0.{name}" in self._stored

    @property
    def _generation(self) -> int:
        return 1 if self._is_first else 3 if self._has_norms else 2

    def _shape(self, name: str, dimensions: int = 2) -> tuple[int, ...]:
        """Return a tensor's shape, which must have so many dimensions."""
        stored = self._stored.get(name)
        if stored is None:
            raise CheckpointError(f"{self._where} lacks {name}, which every MiniMind model has")
        shape = self._shapes[stored]
        if len(shape) != dimensions or not all(shape):
            raise CheckpointError(f"{self._where}: {stored} has the shape {list(shape)}")
        return shape

    def model(self) -> MiniMindModel:
        """Return the model."""
        config = self._config()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        tensors = {name: self._plain(name, heads) for name in self._stored}
        if self._is_moe and not self._has_norms:
            tensors = self._as_granite(tensors, config)
        if not config["tie_word_embeddings"] and _HEAD not in tensors:
            raise CheckpointError(
                f"{self._where} lacks {_HEAD}, and tie_word_embeddings is False: say nothing of it"
            )
        return MiniMindModel(self._generation, config, tensors, self._ignored)

    def _plain(self, name: str, heads: Mapping[str, int]) -> Made:
        """Return a tensor as it is stored, but for the rope of generation 1."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        return Made(((self._stored[name],),), pairs_of=self._is_first * heads.get(module, 0))

    def _config(self) -> dict[str, Any]:
        """Return the config: what the shapes tell, what is given, and MiniMind's defaults."""
        vocabulary, hidden = self._shape(_TABLE)
        told = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": self._count_layers(),
            "intermediate_size": self._width(),
            **self._heads(hidden),
        }
        self._check_told(told)
        given = {k: v for k, v in self._options.items() if k in _OPTIONS - told.keys()}
        scaling = given.pop("rope_scaling", None)
        if given.pop("inference_rope_scaling", False):
            scaling = scaling or dict(_YARN)
        moe = self._moe_config(told, given) if self._is_moe else {}
        defaults = _DEFAULTS[self._generation] | {
            "rope_theta": self._rope_theta(told),
            "tie_word_embeddings": self._tied,
        }
        kind = "qwen3" if self._has_norms else "llama"
        settings = {k: v for k, v in given.items() if k in {*defaults, "hidden_act"}}
        return {
            "model_type": kind,
            "architectures": [_CLASSES[kind]],
            **_COMMON,
            **defaults,
            **settings,
            **told,
            "rope_scaling": None if scaling is None else dict(scaling),
            "dtype": self._dtype,
            **moe,
        }

    def _count_layers(self) -> int:
        """Return the number of layers, which must be there without a gap."""
        numbers = {int(m[1]) for name in self._stored if (m := _LAYER.fullmatch(name))}
        if numbers != set(range(len(numbers))):
            absent = sorted(set(range(max(numbers, default=0))) - numbers)
            raise CheckpointError(f"{self._where} lacks layers {', '.join(map(str, absent))}")
        return len(numbers)

    def _width(self) -> int:
        """Return the width within a layer's MLP, or an expert's."""
        path = "mlp.experts.0" if self._is_moe else "mlp"
        return self._shape(f"model.layers.0.{path}.gate_proj.weight")[0]

    def _heads(self, hidden: int) -> dict[str, int]:
        """Return heads, key-value heads and the width of one, which must go with the shapes."""
        rows = self._shape("model.layers.0.self_attn.q_proj.weight")[0]
        key_rows = self._shape("model.layers.0.self_attn.k_proj.weight")[0]
        heads = self._options.get("num_attention_heads")
        key_heads = self._options.get("num_key_value_heads")
        if self._has_norms:
            width = self._shape("model.layers.0.self_attn.q_norm.weight", 1)[0]
        elif heads is not None or key_heads is None:
            # of generation 1, releases with as many keys as half the queries had 16 heads
            usual = 16 if self._is_first and key_rows * 2 == rows else 8
            width = rows // (heads or usual)
        else:
            width = key_rows // key_heads
        found = {
            "num_attention_heads": rows // width if width else 0,
            "num_key_value_heads": key_rows // width if width else 0,
            "head_dim": width,
        }
        fits = width and rows % width == 0 and key_rows % width == 0 and width % 2 == 0
        agrees = heads in {None, found["num_attention_heads"]} and key_heads in {
            None,
            found["num_key_value_heads"],
        }
        if not (fits and agrees and (self._has_norms or rows == hidden)):
            raise CheckpointError(
                f"{self._where}: {heads or found['num_attention_heads'] or 8} heads and"
                f" {key_heads or 'as many'} key-value heads don't go with {rows} rows of q_proj and"
                f" {key_rows} of k_proj (hidden size {hidden}); give num_attention_heads and"
                " num_key_value_heads as they were in training"
            )
        return found

    def _rope_theta(self, told: Mapping[str, int]) -> float:
        """Return the rope base of the release that had such heads."""
        old = self._is_first and told["num_key_value_heads"] * 2 == told["num_attention_heads"]
        return 1e4 if old else 1e6

    def _check_told(self, told: Mapping[str, Any]) -> None:
        """Refuse options that contradict the file."""
        wrong = {k: v for k, v in self._options.items() if k in told and v != told[k]}
        if wrong:
            said = ", ".join(f"{key} {value}" for key, value in wrong.items())
            found = ", ".join(f"{key} {told[key]}" for key in wrong)
            raise CheckpointError(f"{self._where} has {found}; {said} was given")

    def _moe_config(self, told: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the config of a mixture of experts has besides, and refuse what none has."""
        experts, _ = self._shape("model.layers.0.mlp.gate.weight")
        count = given.get("num_experts_per_tok", 1 if self._has_norms else 2)
        normalised = given.get("norm_topk_prob", True)
        if not 0 < count <= experts:
            raise CheckpointError(f"{self._where}: {count} of {experts} experts can't be chosen")
        if self._has_norms:
            return {
                "model_type": "qwen3_moe",
                "architectures": [_CLASSES["qwen3_moe"]],
                "num_experts": experts,
                "num_experts_per_tok": count,
                "norm_topk_prob": normalised,
                "moe_intermediate_size": told["intermediate_size"],
                "decoder_sparse_step": 1,
                "mlp_only_layers": [],
            }
        if count == 1 or not normalised:
            why = "weighs its one expert by" if count == 1 else "does not normalise"
            raise UnsupportedModelError(
                f"{self._where}: {_NO_MOE.format(count=count)} {why} the softmax over all of them,"
                " with experts beside that every token passes: no architecture of transformers"
                " does"
            )
        return {
            "model_type": "granitemoeshared",
            "architectures": [_CLASSES["granitemoeshared"]],
            "num_local_experts": experts,
            "num_experts_per_tok": count,
            "shared_intermediate_size": told["intermediate_size"] * self._count_shared(),
            "embedding_multiplier": 1.0,
            "logits_scaling": 1.0,
            "residual_multiplier": 1.0,
            "attention_multiplier": told["head_dim"] ** -0.5,
        }

    def _count_shared(self) -> int:
        """Return the number of experts that every token passes."""
        if self._has("mlp.shared_experts.gate_proj.weight"):
            return 1
        pattern = re.compile(r"model\.layers\.0\.mlp\.shared_experts\.\d+\.gate_proj\.weight")
        return sum(pattern.fullmatch(name) is not None for name in self._stored)

    def _as_granite(self, plain: Mapping[str, Made], config: dict[str, Any]) -> dict[str, Made]:
        """Return the tensors of a mixture of experts by the names that Granite MoE has."""
        tensors = {name: made for name, made in plain.items() if ".mlp." not in name}
        for layer in range(config["num_hidden_layers"]):
            prefix = f"model.layers.{layer}."
            mlp, moe = f"{prefix}mlp.", f"{prefix}block_sparse_moe."
            experts = [f"{mlp}experts.{n}." for n in range(config["num_local_experts"])]
            shared = self._shared(mlp)
            tensors[f"{moe}router.weight"] = Made(((self._at(f"{mlp}gate.weight"),),))
            both = tuple(self._linears([path], "gate_proj", "up_proj") for path in experts)
            tensors[f"{moe}experts.gate_up_proj"] = Made(both, stacked=True)
            down = tuple(self._linears([path], "down_proj") for path in experts)
            tensors[f"{moe}experts.down_proj"] = Made(down, stacked=True)
            if shared:
                ways = self._linears(shared, "gate_proj", "up_proj")
                tensors[f"{prefix}shared_mlp.input_linear.weight"] = Made((ways,))
                back = self._linears(shared, "down_proj")
                tensors[f"{prefix}shared_mlp.output_linear.weight"] = Made((back,), dim=1)
        used = {name for made in tensors.values() for name in made.sources}
        if left := self._stored.items() and set(self._stored.values()) - used:
            raise CheckpointError(f"{self._where}: nothing is known of {listed(left)}")
        return tensors

    def _shared(self, mlp: str) -> list[str]:
        """Return the paths of the experts that every token passes."""
        if f"{mlp}shared_experts.gate_proj.weight" in self._stored:
            return [f"{mlp}shared_experts."]
        return [f"{mlp}shared_experts.{n}." for n in range(self._count_shared())]

    def _linears(self, paths: Iterable[str], *names: str) -> tuple[str, ...]:
        """Return the stored names of some linear layers: the first of every path, and so on."""
        return tuple(self._at(f"{path}{name}.weight") for name in names for path in paths)

    def _at(self, name: str) -> str:
        """Return the stored name of a tensor that must be there."""
        if name not in self._stored:
            raise CheckpointError(f"{self._where} lacks {name}, which its other experts have")
        return self._stored[name]


_COMMON = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_CLASSES = {
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "granitemoeshared": "GraniteMoeSharedForCausalLM",
}
_DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    2: {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    3: {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
}
for _settings in _DEFAULTS.values():
    _settings |= {"bos_token_id": 1, "eos_token_id": 2}


def hugging_face_name(name: str) -> str:
    """Return Hugging Face's name for a tensor of generation 1; any other as it is."""
    found = _LAYER.fullmatch(name)
    if found is None:
        return _FIRST.get(name, name)
    rest = _FIRST_IN_LAYERS.get(found[2])
    if rest is None:
        rest = re.sub(r"^feed_forward\.", "mlp.", found[2])
        rest = re.sub(r"\.(w[123])\.weight$", lambda m: f".{_FIRST_LINEARS[m[1]]}.weight", rest)
    return f"model.layers.{found[1]}.{rest}"
