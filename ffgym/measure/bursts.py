"""Bursts of requests to servers that take turns: what every request got, and when.

A burst is a number of requests at the same moment, each with a prompt of its own and an answer of a fixed length,
streamed. The server counts the tokens.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from statistics import median
from string import ascii_lowercase
from typing import Any

from ffgym.measure.engines import Setting
from ffgym.measure.server import HOST, Running, Server, running
from ffgym.measure.speed import Workload
from ffgym.report.progress import Reporter

ANSWER_SECONDS = 900
END_SECONDS = 1  # a connection may close a moment before its server has ended


@dataclass(frozen=True)
class Answer:
    """What one request got, and when.

    Attributes:
        tokens: as the server counts them.
        begun, first, last: seconds at which it was asked, and its first and last tokens came.
    """

    tokens: int
    begun: float
    first: float
    last: float


@dataclass(frozen=True)
class Burst:
    """What the requests of one burst got."""

    answers: tuple[Answer, ...]

    @property
    def seconds(self) -> float:
        """From the first request to the last token."""
        return max(answer.last for answer in self.answers) - min(answer.begun for answer in self.answers)

    @property
    def rate(self) -> float:
        """Tokens per second, from the first request to the last token."""
        return sum(answer.tokens for answer in self.answers) / self.seconds

    @property
    def first(self) -> float:
        """Seconds to the first token, the median of the requests."""
        return median(answer.first - answer.begun for answer in self.answers)

    @property
    def following(self) -> float:
        """Seconds of every further token, the median of the requests."""
        return median((answer.last - answer.first) / max(1, answer.tokens - 1) for answer in self.answers)


Bursts = dict[tuple[str, Workload], list[Burst]]
"""Of every model under every workload, one a repetition."""


def serve_in_turn(
    servers: Sequence[Server],
    workloads: Sequence[Workload],
    prompt: Callable[[int, str], str],
    setting: Setting,
    reporter: Reporter,
    *,
    together: bool,
) -> Bursts:
    """Serve every workload several times, each time by all servers, and once more after a server's start.

    Args:
        workloads: requests at the same time, and tokens of a prompt.
        prompt: makes a prompt of so many tokens from a seed.
        setting: how long answers are, how often all is repeated, and where what servers print goes.
        together: all servers run at the same time; else each is started for its turn.

    Raises:
        ModelError: a server that dies, or does not answer as it should.
    """
    found: Bursts = {}
    up: dict[str, Running] = {}

    def burst(server: Server, workload: Workload, seed: str) -> Burst:
        prompts = [prompt(workload.length, f"{seed} {workload} {index}") for index in range(workload.batch)]
        return send(up[server.role], prompts, setting.output_tokens)

    order = list(product(range(setting.repetitions), servers, workloads))
    with reporter.stage("serve, in turn", len(order), "bursts") as stage, ExitStack() as stack:

        def start(server: Server) -> None:
            if not together:
                up.clear()
                stack.close()
            stage.advance(0, f"starting: {server.role}")
            up[server.role] = stack.enter_context(running(server, setting.scratch / f"{server.role}.log"))
            for workload in workloads:
                burst(server, workload, "warm")

        if together:
            for server in servers:  # warmed up before any turn is measured
                start(server)
            stage.restart()
            order.sort(key=lambda turn: (turn[0], workloads.index(turn[2])))
        for repetition, server, workload in order:
            if server.role not in up:
                start(server)
            found.setdefault((server.role, workload), []).append(burst(server, workload, str(repetition)))
            stage.advance(1, f"serving: {server.role}")
    return found


def send(server: Running, prompts: Sequence[str], output_tokens: int) -> Burst:
    """Ask for the answers to all prompts at the same moment.

    Raises:
        ModelError: one of them was not answered.
    """
    pool = ThreadPoolExecutor(len(prompts))
    try:
        answers = pool.map(partial(ask, server, output_tokens=output_tokens), prompts)
        return Burst(tuple(answers))
    except (OSError, http.client.HTTPException, ValueError) as error:
        ending = server.ending(END_SECONDS)
        unanswered = f"did not answer a request: {error or type(error).__name__}"
        raise server.failed(unanswered if ending is None else f"{ending} while it answered") from error
    finally:  # after Ctrl-C, requests under way end with their server
        pool.shutdown(wait=False, cancel_futures=True)


def ask(server: Running, prompt: str, *, output_tokens: int) -> Answer:
    """Ask for one answer.

    Raises:
        OSError, HTTPException, ValueError: there is none, or not the whole of it.
    """
    body = {"model": server.name, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "seed": 0}
    body |= {"stream": True, "stream_options": {"include_usage": True}, **server.server.body}
    times: list[float] = []
    tokens = 0
    begun = time.perf_counter()
    with contextlib.closing(http.client.HTTPConnection(HOST, server.port, timeout=ANSWER_SECONDS)) as connection:
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != http.client.OK:
            raise ValueError(f"it was refused: {response.read(500).decode(errors='replace')}")
        for line in response:
            if not line.startswith(b"data: {"):
                continue
            chunk: dict[str, Any] = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(f"the answer was broken off: {chunk['error']}")
            if chunk.get("choices"):
                times.append(time.perf_counter())
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
    if not tokens or not times:
        raise ValueError("there were no tokens, or they were not counted")
    return Answer(tokens, begun, times[0], times[-1])


def prompt_maker(tokenizer: Any) -> Callable[[int, str], str]:
    """A function that makes text of so many tokens from a seed: words at random, each a token of its own.

    Texts instead of token ids, because not every engine takes these. No two prompts begin alike, so that nothing of
    one is in an engine's cache for another.
    """
    marked = (token for token in tokenizer.get_vocab() if token[:1] in "Ġ▁" and token[1:].isascii())
    words = sorted(token[1:] for token in marked if token[1:].isalpha() and token.islower()) or list(ascii_lowercase)

    def prompt(length: int, seed: str) -> str:
        chosen = random.Random(seed).choices(words, k=length)
        while len(chosen) > 1 and len(tokenizer(" ".join(chosen)).input_ids) > length:
            chosen.pop()
        return " ".join(chosen)

    return prompt
