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

from collections.abc import Mapping
from typing import Any

from splitlearn_core.checkpoint.minimind.experts import as_granite, moe_config
from splitlearn_core.checkpoint.minimind.made import Made, MiniMindModel, Shapes
from splitlearn_core.checkpoint.minimind.options import OPTIONS, YARN, check_options
from splitlearn_core.checkpoint.minimind.stored import StoredTensors
from splitlearn_core.checkpoint.minimind.tensor_names import HEAD, TABLE
from splitlearn_core.errors import CheckpointError

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
}
_DEFAULTS: dict[int, dict[str, Any]] = {
    1: {"max_position_embeddings": 8192, "rms_norm_eps": 1e-5},
    2: {"max_position_embeddings": 32768, "rms_norm_eps": 1e-5},
    3: {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6},
}
for _settings in _DEFAULTS.values():
    _settings |= {"bos_token_id": 1, "eos_token_id": 2}


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
    return _Reading(StoredTensors(shapes, where), tied, dtype, check_options(options or {})).model()


class _Reading:
    """One file being read: its tensors, and what is given besides."""

    def __init__(
        self, stored: StoredTensors, tied: bool, dtype: str, options: Mapping[str, Any]
    ) -> None:
        self._stored = stored
        self._tied = tied
        self._dtype = dtype
        self._options = options

    def model(self) -> MiniMindModel:
        """Return the model."""
        config = self._config()
        heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
        tensors = {name: self._plain(name, heads) for name in self._stored.names}
        if self._stored.is_moe and not self._stored.has_norms:
            tensors = as_granite(self._stored, tensors, config)
        if not config["tie_word_embeddings"] and HEAD not in tensors:
            raise CheckpointError(
                f"{self._stored.where} lacks {HEAD}, and tie_word_embeddings is False: say nothing"
                " of it"
            )
        return MiniMindModel(self._stored.generation, config, tensors, self._stored.ignored)

    def _plain(self, name: str, heads: Mapping[str, int]) -> Made:
        """Return a tensor as it is stored, but for the rope of generation 1."""
        module = name.removesuffix(".weight").rpartition(".")[2]
        pairs_of = heads.get(module, 0) if self._stored.is_first else 0
        return Made(((self._stored.names[name],),), pairs_of=pairs_of)

    def _config(self) -> dict[str, Any]:
        """Return the config: what the shapes tell, what is given, and MiniMind's defaults."""
        vocabulary, hidden = self._stored.shape(TABLE)
        told = {
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": self._stored.count_layers(),
            "intermediate_size": self._stored.width(),
            **self._heads(hidden),
        }
        self._check_told(told)
        given = {k: v for k, v in self._options.items() if k in OPTIONS - told.keys()}
        scaling = given.pop("rope_scaling", None)
        if given.pop("inference_rope_scaling", False):
            scaling = scaling or dict(YARN)
        moe = moe_config(self._stored, told, given) if self._stored.is_moe else {}
        defaults = _DEFAULTS[self._stored.generation] | {
            "rope_theta": self._rope_theta(told),
            "tie_word_embeddings": self._tied,
        }
        kind = "qwen3" if self._stored.has_norms else "llama"
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

    def _heads(self, hidden: int) -> dict[str, int]:
        """Return heads, key-value heads and the width of one, which must go with the shapes."""
        rows = self._stored.shape("model.layers.0.self_attn.q_proj.weight")[0]
        key_rows = self._stored.shape("model.layers.0.self_attn.k_proj.weight")[0]
        heads = self._options.get("num_attention_heads")
        key_heads = self._options.get("num_key_value_heads")
        if self._stored.has_norms:
            width = self._stored.shape("model.layers.0.self_attn.q_norm.weight", 1)[0]
        elif heads is not None or key_heads is None:
            # of generation 1, releases with as many keys as half the queries had 16 heads
            usual = 16 if self._stored.is_first and key_rows * 2 == rows else 8
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
        if not (fits and agrees and (self._stored.has_norms or rows == hidden)):
            raise CheckpointError(
                f"{self._stored.where}: {heads or found['num_attention_heads'] or 8} heads and"
                f" {key_heads or 'as many'} key-value heads don't go with {rows} rows of q_proj and"
                f" {key_rows} of k_proj (hidden size {hidden}); give num_attention_heads and"
                " num_key_value_heads as they were in training"
            )
        return found

    def _rope_theta(self, told: Mapping[str, int]) -> float:
        """Return the rope base of the release that had such heads."""
        old = (
            self._stored.is_first and told["num_key_value_heads"] * 2 == told["num_attention_heads"]
        )
        return 1e4 if old else 1e6

    def _check_told(self, told: Mapping[str, Any]) -> None:
        """Refuse options that contradict the file."""
        wrong = {k: v for k, v in self._options.items() if k in told and v != told[k]}
        if wrong:
            said = ", ".join(f"{key} {value}" for key, value in wrong.items())
            found = ", ".join(f"{key} {told[key]}" for key in wrong)
            raise CheckpointError(f"{self._stored.where} has {found}; {said} was given")
