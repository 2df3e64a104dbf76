"""Plain torch training loops for DPO and SFT: the reference that the tests compare saro_jax with.

Written from the formulas, with padded batches and full logits; it shares no code with saro_jax.
Everything is float32 on the CPU. Import it behind `pytest.importorskip("torch")`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch  # pyright: ignore[reportMissingImports]  (only where tests are developed)
from torch.nn import functional  # pyright: ignore[reportMissingImports]


class Tokens(NamedTuple):
    """Token ids of one sequence, and which of them are scored."""

    ids: list[int]
    scored: list[bool]


class Pair(NamedTuple):
    """Two sequences that begin with the same prefix; a weight of 1 for each pair."""

    chosen: Tokens
    rejected: Tokens


class Trace(NamedTuple):
    """What every step saw before its update."""

    losses: list[float]
    grad_norms: list[float]
    margins: list[float]  # beta times the mean margin; empty for SFT


def tiny_model(kind: str, seed: int, **changes: Any) -> Any:
    """A random two-layer Llama or Qwen2 of transformers, hidden 64."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    settings = {
        "vocab_size": 300,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,  # far from uniform predictions, so that every token matters
        "tie_word_embeddings": kind == "qwen2",
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | changes
    torch.manual_seed(seed)
    model = model_class(config_class(**settings)).to(torch.float32)
    with torch.no_grad():  # biases and norms start at 0 and 1, where a mistake would not show
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def sequence_logps(model: Any, sequences: Sequence[Tokens]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of log p over the scored tokens, and their number, of each sequence; right-padded."""
    longest = max(len(sequence.ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    present = torch.zeros(len(sequences), longest, dtype=torch.long)
    scored = torch.zeros(len(sequences), longest, dtype=torch.float32)
    for k, sequence in enumerate(sequences):
        n = len(sequence.ids)
        ids[k, :n] = torch.tensor(sequence.ids)
        present[k, :n] = 1
        scored[k, :n] = torch.tensor(sequence.scored, dtype=torch.float32)
    logits = model(input_ids=ids, attention_mask=present).logits.float()
    logp = functional.log_softmax(logits[:, :-1], dim=-1)
    taken = logp.gather(-1, ids[:, 1:, None])[..., 0]
    mask = scored[:, 1:]  # the first token of a sequence has nothing that predicts it
    return (taken * mask).sum(-1), mask.sum(-1)


def dpo(model: Any, steps: Sequence[Sequence[Pair]], *, lr: float, beta: float) -> Trace:
    """DPO with the initial weights as reference: one SGD step a list of pairs, mean over pairs."""
    with torch.no_grad():
        reference = [_pair_logps(model, pairs) for pairs in steps]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trace = Trace([], [], [])
    for pairs, (reference_chosen, reference_rejected) in zip(steps, reference, strict=True):
        chosen, rejected = _pair_logps(model, pairs)
        margin = (chosen - reference_chosen) - (rejected - reference_rejected)
        loss = -functional.logsigmoid(beta * margin).mean()
        _step(model, optimizer, loss, trace)
        trace.margins.append(float(beta * margin.detach().mean()))
    return trace


def sft(model: Any, steps: Sequence[Sequence[Tokens]], *, lr: float) -> Trace:
    """SFT: one SGD step a list of sequences, the mean over all scored tokens of the step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    trace = Trace([], [], [])
    for sequences in steps:
        logp, count = sequence_logps(model, sequences)
        _step(model, optimizer, -logp.sum() / count.sum(), trace)
    return trace


def _pair_logps(model: Any, pairs: Sequence[Pair]) -> tuple[torch.Tensor, torch.Tensor]:
    both = [pair.chosen for pair in pairs] + [pair.rejected for pair in pairs]
    logp, _ = sequence_logps(model, both)
    return logp[: len(pairs)], logp[len(pairs) :]


def _step(model: Any, optimizer: Any, loss: torch.Tensor, trace: Trace) -> None:
    optimizer.zero_grad()
    loss.backward()
    squares = [p.grad.square().sum() for p in model.parameters() if p.grad is not None]
    trace.losses.append(float(loss.detach()))
    trace.grad_norms.append(float(torch.stack(squares).sum().sqrt()))
    optimizer.step()
