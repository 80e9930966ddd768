"""What the workers of peers.py share: the rounds, and the lines by which they are asked for.

A worker says that it is ready by a line of JSON. For each line on standard input it feeds the prompt to an empty cache
(logits of the last position alone), decodes, and answers {"prefill_s", "decode_s"}, in seconds.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

_WARM_STEPS = 4  # of decoding, before anything counts


def serve(begin: Callable[[], Callable[[Any], object]], ids: Any, prompt: int) -> None:
    """Serves until standard input ends.

    `begin` makes the cache empty and returns what feeds it tokens, ids[a:b]. The first `prompt` of `ids` are the
    prompt, each of the others is a step of decoding.
    """
    _round(begin, ids[: prompt + _WARM_STEPS], prompt)
    print(json.dumps({"ready": True}), flush=True)
    for _ in sys.stdin:
        print(json.dumps(_round(begin, ids, prompt)), flush=True)


def _round(begin: Callable[[], Callable[[Any], object]], ids: Any, prompt: int) -> dict[str, float]:
    feed = begin()
    start = time.perf_counter()
    feed(ids[:prompt])
    prefilled = time.perf_counter()
    for i in range(prompt, len(ids)):
        feed(ids[i : i + 1])
    return {"prefill_s": prefilled - start, "decode_s": time.perf_counter() - prefilled}
