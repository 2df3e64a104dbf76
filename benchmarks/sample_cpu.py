"""Tokens a second of sampling, beside transformers' `generate`, on the same prompts and cores.

`python benchmarks/sample_cpu.py [--model quickstart] [--rounds 5] [--case fixed|varied]
[--cores 2] [--new 128]`

fixed    16 prompts, 128 tokens each, greedy, no stop
varied   64 prompts whose answers end after 8 to 256 tokens: transformers takes them in batches of
         16 that last as long as their longest answer, ours refills its 16 slots

Each library and dtype has a process of its own, and they take turns, so that whatever else the
machine does falls on all of them alike; the ratio of a round compares neighbours. On a machine
that does other things, `--cores 1` and CPU time say most: torch's threads wait for each other by
spinning. Needs torch.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from typing import Any

import numpy as np

SLOTS = 16


def prompts_and_lengths(folder: str, case: str, new: int) -> tuple[list[np.ndarray], list[int]]:
    """Ids of the prompts, and after how many new tokens each answer ends."""
    from saro_jax.data.sources import QUICKSTART
    from saro_jax.text import chat

    tokenizer = chat.load_tokenizer(folder)
    number = 16 if case == "fixed" else 64
    rows = [
        json.loads(row)["prompt"]
        for name in ("held_out", "ritd")
        for row in (QUICKSTART / f"{name}.jsonl").read_text().splitlines()
    ]
    texts = list(dict.fromkeys(rows))[:number]
    ids = [chat.prompt_ids(tokenizer, (chat.Message("user", text),)) for text in texts]
    if case == "fixed":
        return ids, [new] * number
    # Most answers short, some long, as those of a reasoning model are.
    draws = np.exp(np.random.default_rng(0).uniform(np.log(8), np.log(2 * new), number))
    return ids, [int(n) for n in draws]


def theirs(connection: Any, folder: str, case: str, new: int, dtype: str, cores: int) -> None:
    """A process that samples with transformers whenever it is told to."""
    os.sched_setaffinity(0, range(cores))
    import torch
    from transformers import AutoModelForCausalLM, StoppingCriteria, StoppingCriteriaList

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    prompts, lengths = prompts_and_lengths(folder, case, new)

    class Ends(StoppingCriteria):
        """Ends each row after its own number of new tokens."""

        def __init__(self, start: int, new: list[int]):
            self.start, self.new = start, torch.tensor(new)

        def __call__(self, input_ids, scores, **_):  # type: ignore[override]
            return self.new <= input_ids.shape[1] - self.start

    def run() -> None:
        for at in range(0, len(prompts), SLOTS):
            rows, ends = prompts[at : at + SLOTS], lengths[at : at + SLOTS]
            longest = max(map(len, rows))
            ids = torch.zeros((len(rows), longest), dtype=torch.int64)
            mask = torch.zeros_like(ids)
            for i, row in enumerate(rows):
                ids[i, longest - len(row) :] = torch.tensor(np.asarray(row, np.int64))
                mask[i, longest - len(row) :] = 1
            with torch.no_grad():
                model.generate(
                    ids,
                    attention_mask=mask,
                    do_sample=False,
                    max_new_tokens=max(ends),
                    min_new_tokens=max(ends),
                    pad_token_id=0,
                    stopping_criteria=StoppingCriteriaList([Ends(longest, ends)]),
                )

    serve(connection, run)


def ours(connection: Any, folder: str, case: str, new: int, dtype: str, cores: int) -> None:
    """A process that samples with this project whenever it is told to."""
    os.sched_setaffinity(0, range(cores))
    from saro_jax.generation.engine import Engine, Job
    from saro_jax.models import huggingface

    arch = huggingface.load_architecture(folder)
    params = huggingface.load_params(folder, arch, dtype)
    engine = Engine(arch, params, slots=SLOTS, stop_ids=[], dtype=dtype)
    jobs = [Job(*both) for both in zip(*prompts_and_lengths(folder, case, new), strict=True)]

    def run() -> None:
        for _ in engine.run(jobs):
            pass

    serve(connection, run)


def serve(connection: Any, run: Any) -> None:
    """Answer every message with the seconds (wall, CPU) of a run, after one that warms up."""
    run()
    connection.send(None)
    while connection.recv():
        wall, cpu = time.perf_counter(), time.process_time()
        run()
        connection.send((time.perf_counter() - wall, time.process_time() - cpu))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="quickstart")
    parser.add_argument("--case", choices=("fixed", "varied"), default="fixed")
    parser.add_argument("--new", type=int, default=128, help="tokens; of varied, half the most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cores", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--ours", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--theirs", nargs="*", default=["float32", "bfloat16"])
    args = parser.parse_args()
    from saro_jax.models import hub

    folder = str(hub.resolve(args.model))
    tokens = sum(prompts_and_lengths(folder, args.case, args.new)[1])
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Any] = {}
    for name, work, dtypes in (("ours", ours, args.ours), ("transformers", theirs, args.theirs)):
        for dtype in dtypes:
            here, there = context.Pipe()
            context.Process(
                target=work,
                args=(there, folder, args.case, args.new, dtype, args.cores),
                daemon=True,
            ).start()
            here.recv()  # one after the other: warm before the next loads
            workers[f"{name} {dtype}"] = here
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in workers}
    for _ in range(args.rounds):
        for name, connection in workers.items():
            connection.send(True)
            seconds[name].append(connection.recv())
    for connection in workers.values():
        connection.send(False)
    print(f"case {args.case}: {tokens} tokens, {SLOTS} at a time, {args.rounds} rounds")
    for name, found in seconds.items():
        wall, cpu = (statistics.median(x) for x in zip(*found, strict=True))
        print(f"{name:22} {tokens / wall:7.1f} tokens/s   wall {wall:6.2f} s   cpu {cpu:6.2f} s")
    for mine in [name for name in seconds if name.startswith("ours")]:
        for other in [name for name in seconds if not name.startswith("ours")]:
            pairs = list(zip(seconds[mine], seconds[other], strict=True))
            wall, cpu = ([b[i] / a[i] for a, b in pairs] for i in (0, 1))
            print(
                f"{mine} / {other}: {statistics.median(wall):.2f}x by wall "
                f"({min(wall):.2f} to {max(wall):.2f}), {statistics.median(cpu):.2f}x by CPU time"
            )


if __name__ == "__main__":
    main()
