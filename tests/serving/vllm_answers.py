"""Runs in vLLM's own environment: what the server makes of saved models, as ``answers.json`` in the folder of each.

Usage: python vllm_answers.py ASKED, where ASKED is a JSON file: {"models": [folder, ...], "prompts": [[id, ...], ...],
"new_tokens": N}. The first model that vLLM cannot serve ends it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def answers(folder: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder,
        trust_remote_code=True,
        skip_tokenizer_init=True,
        dtype="float32",
        max_model_len=64,
        enforce_eager=True,
        disable_log_stats=True,
    )
    wanted = SamplingParams(
        temperature=0.0, max_tokens=new_tokens, prompt_logprobs=0, ignore_eos=True, detokenize=False
    )
    done = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    return {
        "tokens": [list(each.outputs[0].token_ids) for each in done],
        "log_probabilities": [log_probabilities(each) for each in done],
    }


def log_probabilities(done: Any) -> list[float]:
    """Of each token of a prompt but the first."""
    following = zip(done.prompt_token_ids[1:], done.prompt_logprobs[1:], strict=True)
    return [step[token].logprob for token, step in following]


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    for folder in asked["models"]:
        found = answers(folder, asked["prompts"], asked["new_tokens"])
        Path(folder, "answers.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
