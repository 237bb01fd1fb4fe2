"""Gateways of the built-in model: Bottom and Top at home, the Trunk at another daemon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from serving_fakes import daemon_in_thread

from splitlearn_core.quickstart import load_full_model
from splitlearn_manager import ModelConfig, ServerConfig
from splitlearn_manager.config import DaemonConfig

CUTS = [2, 6]
DEMO = "builtin:demo"


def trunk_config() -> ModelConfig:
    return ModelConfig(
        "trunk", DEMO, dtype="float32", config={"component": "trunk", "split_points": CUTS}
    )


def pipeline_config(url: str, model_id: str = "demo", **options: Any) -> ModelConfig:
    options = {"split_points": CUTS, "trunk": url, "trunk_model_id": "trunk", **options}
    return ModelConfig(model_id, DEMO, "pipeline", dtype="float32", config=options)


def whole_config(model_id: str = "whole", **options: Any) -> ModelConfig:
    return ModelConfig(model_id, DEMO, dtype="float32", config={"component": "full", **options})


@contextmanager
def daemon_of(*models: ModelConfig, **server: Any) -> Iterator[Any]:
    """Run a daemon in a thread, and yield it."""
    config = DaemonConfig(server=ServerConfig(**{"port": 0, **server}), models=models)
    with daemon_in_thread(config) as daemon:
        yield daemon


class Unsplit:
    """The whole built-in model, as transformers runs it."""

    def __init__(self) -> None:
        self.model, self.tokenizer = load_full_model(DEMO, dtype="float32")

    def tokens(self, prompt: str, new: int) -> list[int]:
        """Return the tokens that greedy generation makes of a prompt."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        made = self.model.generate(ids, max_new_tokens=new, do_sample=False)
        return list(made[0, ids.shape[1] :].tolist())

    def text(self, prompt: str, new: int) -> str:
        """Return the text of these."""
        return str(self.tokenizer.decode(self.tokens(prompt, new), skip_special_tokens=True))

    def logprobs(self, tokens: list[int]) -> torch.Tensor:
        """Return the logarithms of the probabilities of every token, at every place."""
        with torch.inference_mode():
            return torch.log_softmax(self.model(torch.tensor([tokens])).logits[0], dim=-1)
