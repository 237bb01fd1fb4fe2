"""The gateway that is measured, its clients, and what it is compared with.

python -m splitlearn_manager.bench.generate_gateway_child TASK '{"name": value, …}'
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    Figures = dict[str, Any]

MODEL_ID = "model"
WARM_UP_TOKENS = 2


def tokenizer(model: str) -> Figures:
    """Give a checkpoint a tokenizer, of which each token is a word: gateways need one."""
    from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: PLC0415

    folder = Path(model)
    if not (folder / "tokenizer.json").is_file():
        size = json.loads((folder / "config.json").read_text())["vocab_size"]
        words = Tokenizer(models.WordLevel({f"t{n}": n for n in range(size)}, unk_token="t0"))  # noqa: S106 - no secret, a word
        words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        words.save(str(folder / "tokenizer.json"))
        settings = {"tokenizer_class": "PreTrainedTokenizerFast"}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return {}


def gateway(
    model: str, points: list[int], dtype: str, quantization: str | None, trunk: str
) -> Figures:
    """Serve a pipeline; write the address when it is ready, and end with standard input."""
    from splitlearn_manager.config import DaemonConfig, ModelConfig, ServerConfig  # noqa: PLC0415
    from splitlearn_manager.server.daemon import Daemon  # noqa: PLC0415

    options = {"split_points": points, "trunk": trunk, "quantization": quantization}
    config = ModelConfig(MODEL_ID, model, "pipeline", dtype=dtype, config=options)
    server = ServerConfig(port=0, log_level="error")
    lines: queue.Queue[str] = queue.Queue()
    daemon_config = DaemonConfig(server=server, models=(config,))
    with Daemon(daemon_config, announce=lines.put) as daemon:

        def watch() -> None:
            while not lines.get().startswith("splitlearn: ready"):
                pass
            _say(daemon.url)
            sys.stdin.read()
            daemon.stop()

        threading.Thread(target=watch, daemon=True).start()
        daemon.run()
    return {}


def requests(url: str, requests: int, prompt: int, new: int, vocabulary: int) -> Figures:
    """Send requests at once, each from a thread of its own, and read their streams to the end."""
    import torch  # noqa: PLC0415

    prompts = torch.randint(
        3, vocabulary, (requests, prompt), generator=torch.Generator().manual_seed(0)
    ).tolist()
    _request(url, prompts[0], WARM_UP_TOKENS)  # pages in the weights, opens a session
    counts: list[int] = []
    threads = [
        threading.Thread(target=lambda one=one: counts.append(_request(url, one, new)))
        for one in prompts
    ]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - start
    if counts != [new] * requests:
        raise RuntimeError(f"answers of {new} tokens were asked for, and {counts} came")
    return {"seconds": seconds}


def _request(url: str, prompt: list[int], new: int) -> int:
    """Send a request, and return how many tokens its stream says it had."""
    body = {"model": MODEL_ID, "prompt": prompt, "max_tokens": new, "temperature": 0}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    connection = HTTPConnection(urlsplit(url).netloc)
    connection.request("POST", "/v1/completions", json.dumps(body))
    count = 0
    for line in connection.getresponse():
        if line.startswith(b"data: {") and b'"usage":{' in line:
            count = json.loads(line.removeprefix(b"data: "))["usage"]["completion_tokens"]
    connection.close()
    return int(count)


def static(model: str, dtype: str, batch: int, prompt: int, new: int) -> Figures:
    """Generate with the unsplit model, all prompts in one batch."""
    import torch  # noqa: PLC0415

    from splitlearn_core.quickstart import load_full_model  # noqa: PLC0415
    from splitlearn_core.utils.threads import configure_pytorch_threads  # noqa: PLC0415

    configure_pytorch_threads(single_threaded=True)
    unsplit: Any = load_full_model(model, dtype=dtype)[0]
    ids = torch.randint(
        3,
        unsplit.config.vocab_size,
        (batch, prompt),
        generator=torch.Generator().manual_seed(0),
    )
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    unsplit.generate(ids, max_new_tokens=WARM_UP_TOKENS, **settings)
    start = time.perf_counter()
    unsplit.generate(ids, max_new_tokens=new, min_new_tokens=new, **settings)
    return {"seconds": time.perf_counter() - start}


TASKS: Mapping[str, Callable[..., Figures]] = {
    "tokenizer": tokenizer,
    "gateway": gateway,
    "requests": requests,
    "static": static,
}

_ANSWERS = os.dup(sys.stdout.fileno())


def _say(line: str) -> None:
    os.write(_ANSWERS, line.encode() + b"\n")


if __name__ == "__main__":
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print is no answer
    _say(json.dumps(TASKS[sys.argv[1]](**json.loads(sys.argv[2]))))
