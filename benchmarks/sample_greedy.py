"""Greedy answers beside transformers', token by token, and log-probs beside `score`'s forward pass.

`python benchmarks/sample_greedy.py [--model quickstart] [--prompts 64] [--new 64]`

Both in float32 on a CPU. For each answer the first token that differs, if any, with the difference
of the two tokens' logits under transformers: below 1e-3 it is rounding, which decides a tie. Then
the largest difference of the sampler's log-probs from those of one pass over prompt and answer, by
transformers and by this project's scoring. Needs torch.
"""

import argparse
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--new", type=int, default=64)
    args = parser.parse_args()
    import torch
    from transformers import AutoModelForCausalLM

    from saro_jax.data.sources import QUICKSTART
    from saro_jax.generation.engine import generate
    from saro_jax.models import decoder, hub, huggingface
    from saro_jax.models.attention import Tokens
    from saro_jax.text import chat

    folder = hub.resolve(args.model)
    tokenizer = chat.load_tokenizer(folder)
    rows = [
        json.loads(row)["prompt"]
        for name in ("held_out", "ritd")
        for row in (QUICKSTART / f"{name}.jsonl").read_text().splitlines()
    ]
    texts = list(dict.fromkeys(rows))[: args.prompts]
    prompts = [chat.prompt_ids(tokenizer, (chat.Message("user", text),)) for text in texts]
    arch = huggingface.load_architecture(folder)
    params = huggingface.load_params(folder, arch, jnp.float32)
    stops = {chat.end_of_turn(tokenizer), *arch.eos_token_ids}
    found = generate(arch, params, prompts, max_new_tokens=args.new, batch_size=16, stop_ids=stops)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    apart, ties, worst = 0, 0, [0.0, 0.0]
    forward = jax.jit(lambda params, tokens, where: decoder.forward(arch, params, tokens, where))
    for prompt, one in zip(prompts, found, strict=True):
        ids = torch.tensor(prompt[None].astype(np.int64))
        with torch.no_grad():
            theirs = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=args.new,
                eos_token_id=sorted(stops),
                pad_token_id=0,
            )[0, len(prompt) :].numpy()
            whole = np.concatenate([prompt, one.ids]).astype(np.int64)
            logits = model(torch.tensor(whole[None])).logits[0, len(prompt) - 1 : -1].float()
        n = min(len(theirs), len(one.ids))
        if not np.array_equal(theirs, one.ids):
            apart += 1
            at = int(np.argmax(theirs[:n] != one.ids[:n]))
            gap = float(logits[at, int(theirs[at])] - logits[at, int(one.ids[at])])
            ties += gap < 1e-3
            print(f"differs at token {at}, logits by {gap:.2g}")
        logps = torch.log_softmax(logits, -1).numpy()[np.arange(len(one.ids)), one.ids]
        tokens = np.zeros((1, 512), np.int32)
        tokens[0, : len(whole)] = whole
        ones = jnp.ones_like(tokens)
        where = Tokens(ones, 0 * ones, jnp.arange(512, dtype=jnp.int32)[None])
        hidden = forward(params, tokens, where)[0, len(prompt) - 1 : len(whole) - 1]
        ours = jax.nn.log_softmax(decoder.logits(arch, params, hidden))
        ours = np.asarray(ours)[np.arange(len(one.ids)), one.ids]
        for i, other in enumerate((logps, ours)):
            worst[i] = max(worst[i], float(np.abs(one.logps - other).max()))
    tokens = sum(len(one.ids) for one in found)
    print(
        f"{len(prompts)} prompts, {tokens} tokens: {apart} answers differ, {ties} of them by a tie"
    )
    print(f"log-probs differ by {worst[0]:.1e} from transformers', {worst[1]:.1e} from forward's")


if __name__ == "__main__":
    main()
