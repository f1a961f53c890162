"""Train a small mixture of experts on demo text, so that there is one to prune, and write the text that is left.

    python experiments/experts/train.py mixtures/small
    ffgym bench experiments/experts/small.toml

A Mixtral of 4 layers with 16 experts each, 2 to a token, and a tokenizer of 2,048 tokens, from English, technical text
and code. Training reads the first four fifths of each; the rest becomes search.txt and report.txt beside the model.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from rich.progress import track
from tokenizers import ByteLevelBPETokenizer
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

from ffgym.data.corpora import load_text
from ffgym.data.splits import SEPARATOR

CORPORA = ("demo:c4", "demo:technical", "demo:code")
LENGTH, BATCH, STEPS, WARM_UP, RATE = 128, 32, 500, 50, 2e-3


def cut(text: str, *shares: float) -> list[str]:
    """A text in parts that end with a line."""
    ends = [text.index("\n", int(len(text) * share)) for share in shares]
    return [text[begin:end] for begin, end in zip([0, *ends], [*ends, len(text)], strict=True)]


def model_of(vocabulary: int) -> MixtralForCausalLM:
    """The untrained model."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=16,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        router_aux_loss_coef=0.01,
        output_router_logits=True,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    return MixtralForCausalLM(config)


def train(model: MixtralForCausalLM, ids: torch.Tensor) -> None:
    """Language modelling with the router's own balancing loss; AdamW, warm-up, then a cosine to 0."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.1)
    warm = torch.optim.lr_scheduler.LinearLR(optimiser, 0.01, total_iters=WARM_UP)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, STEPS - WARM_UP)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [warm, fall], [WARM_UP])
    generator = torch.Generator().manual_seed(0)
    for step in track(range(STEPS), "training"):
        starts = torch.randint(len(ids) - LENGTH, (BATCH,), generator=generator)
        batch = ids[starts[:, None] + torch.arange(LENGTH)]
        loss = model(batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 100 == 0 or step == STEPS - 1:
            print(f"step {step:,}: {loss.item():.2f} nats per token")


def main(folder: Path) -> None:
    """Write model, tokenizer and text."""
    parts = [cut(SEPARATOR.join(load_text(name, role="search").documents), 0.8, 0.9) for name in CORPORA]
    shortest = min(len(texts[0]) for texts in parts)
    training = [texts[0][:shortest] for texts in parts]
    folder.mkdir(parents=True)
    for index, name in enumerate(("search", "report"), start=1):
        least = min(len(texts[index]) for texts in parts)
        (folder / f"{name}.txt").write_text("\n".join(texts[index][:least] for texts in parts), encoding="utf-8")
    learnt = ByteLevelBPETokenizer()
    learnt.train_from_iterator(training, vocab_size=2048, special_tokens=["<end>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=learnt._tokenizer, eos_token="<end>", model_max_length=1024)
    ids = torch.cat([torch.tensor(tokenizer(text, verbose=False)["input_ids"]) for text in training])
    print(f"{len(ids):,} tokens to train on")
    model = model_of(len(tokenizer))
    train(model, ids)
    model.config.output_router_logits = False
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
