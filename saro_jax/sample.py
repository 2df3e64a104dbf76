"""Rollouts: `python -m saro_jax.sample [--config=RECIPE] --out=DIR [--sample.KEY=VALUE ...]`.

Answers prompts with the model of the recipe (model.path: a model folder, an adapter folder, a .gguf
file, a Hub id, 'quickstart'), sample.n times each. OUT gets

traces.jsonl   the answers, taken apart; meta has the sampled token ids and their log-probs
prompts.jsonl  the prompts they are of
rejects/       rows that are no prompts, and prompts that the model has no room for
manifest.json  inputs, hashes, counts, what came of each kind: how it was made

Prompts are rows as `synthesize` takes them, or its prompts.jsonl. The same command goes on where an
earlier one was stopped; the same inputs, seed, model and sample.slots give the same files. On
several hosts each has the model on its own devices, cut by mesh.*, and answers its part.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from saro_jax import config as configuration
from saro_jax import records
from saro_jax.config import Config, SampleConfig
from saro_jax.data import prompts as pool
from saro_jax.generation import local, served
from saro_jax.generation.requests import Generator, Request
from saro_jax.parallel import distributed
from saro_jax.parallel.mesh import make_mesh
from saro_jax.records import (
    Input,
    Journal,
    Parsed,
    Prompt,
    Reject,
    Sampler,
    Stage,
    TokenCounts,
    Trace,
)
from saro_jax.text import policy as policies
from saro_jax.text import reasoning
from saro_jax.text.traces import decided, trace_steps

UNREAD = ("slots", "dtype", "url")  # settings of speed and place; dtype is in the model's hash


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit code."""
    flags = [
        configuration.CONFIG,
        configuration.OUT,
        *distributed.FLAGS,
    ]
    try:
        args = configuration.parse_command_line("python -m saro_jax.sample", __doc__, argv, flags)
        distributed.start(args)
        # The tree needs training rows, which this stage has not.
        rows = f"--data.train={args.out / 'traces.jsonl'}"
        config = configuration.load(args.config, [*args.overrides, rows], "rw")
        manifest = run(config, args.out, progress=sys.stderr.isatty())
    except ValueError as error:
        return distributed.refuse(error)
    except distributed.Stopped as stop:
        return 128 + stop.number
    except KeyboardInterrupt:
        print("stopped; the same command continues", file=sys.stderr)
        return 130
    print(summary(manifest, args.out))
    return 0


def run(
    config: Config,
    out: Path,
    *,
    generator: Callable[[], Generator] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Sample in `out` and return the manifest; nothing is done where it is there already.

    `generator` opens the model; None = that of the config. ValueError, in one line, for wrong
    inputs.
    """
    prompts, rejects, inputs = read(config.sample, config.seed)
    model = generator() if generator else opened(config)
    try:
        return _sampled(config, out, model, prompts, rejects, inputs, progress)
    finally:
        getattr(model, "close", lambda: None)()


def _sampled(
    config: Config,
    out: Path,
    model: Generator,
    prompts: Sequence[Prompt],
    rejects: list[Reject],
    inputs: list[Input],
    progress: bool,
) -> dict[str, Any]:
    """The manifest of what the model answers."""
    settings = config.sample
    stage = Stage(
        "sample",
        settings.model_dump(mode="json", exclude=set(UNREAD)),
        inputs,
        config.seed,
        prompts[0].policy_version if prompts else "",
        model.name,
        model.sha,
    )
    before = records.finished(stage, out)
    if before is not None:
        return before
    distributed.check_stop()
    distributed.same("the prompts", records.sha256(records.to_json([one.id for one in prompts])))
    asked = {one.id: request(one, settings, config.seed) for one in prompts}
    refused = _refused(model, asked)
    wanted = [one.id for one in prompts if one.id not in refused]
    started = time.time()
    drawn = _ask(model, [asked[name] for name in wanted], stage, out, progress)
    replies, tokens = drawn.replies, drawn.tokens
    refused |= {name: f"no answer: {why}" for name, why in drawn.failures.items()}
    rejects = [*rejects, *(Reject(one.id, refused[one.id]) for one in prompts if one.id in refused)]
    stage.run |= {"new_tokens": tokens, "tokens_per_s": round(tokens / (time.time() - started), 1)}
    if isinstance(model, served.Served):
        stage.run |= {"server": model.api.report(), "cost": model.api.report()["cost"]}
    count = getattr(model, "count", lambda text: None)
    traces: list[Trace] = []
    withheld: list[Reject] = []
    for one in prompts:
        for i, reply in enumerate(replies.get(one.id, [])):
            if reply["finish"] == "filter":
                name = records.content_id(one.id, model.name, asked[one.id].sampler.seed, i)
                withheld.append(Reject(name, "filter: withheld by the server", record=reply))
            else:
                traces.append(trace(one, asked[one.id], i, reply, model, count))
    if not distributed.writes():
        return {"n_out": len(traces)}
    kept = [one for one in prompts if replies.get(one.id)]
    return records.finish(
        stage,
        out,
        {"traces.jsonl": traces, "prompts.jsonl": kept},
        {"prompts.jsonl": rejects} | ({"traces.jsonl": withheld} if withheld else {}),
        n_in=sum(one.rows for one in inputs),
        n_out=len(traces),
        report=report(kept, traces),
    )


def opened(config: Config) -> local.Local | served.Served:
    """The model of the config, on the devices of this process or behind a server."""
    settings = config.sample
    if settings.url is not None:
        return served.opened(settings.url, settings.served_name, config.model, config.server)
    devices = jax.local_devices()
    mesh = make_mesh(**dict(config.mesh), devices=devices)
    return local.load(
        config.model.path,
        revision=config.model.revision,
        chat_template=config.model.chat_template,
        dtype=settings.dtype,
        slots=settings.slots,
        mesh=mesh if len(devices) > 1 else None,
    )


def read(settings: SampleConfig, seed: int) -> tuple[list[Prompt], list[Reject], list[Input]]:
    """The prompts of sample.prompts, rows that are none or not drawn, and what was read."""
    names = configuration.names(settings.prompts)
    policy = policies.load(settings.policy)
    columns = pool.column_map(configuration.names(settings.columns), "--sample.columns")
    found: dict[str, Prompt] = {}
    rejects: list[Reject] = []
    inputs: list[Input] = []
    for source in pool.sources(names, "--sample.prompts"):
        path = Path(source.name).expanduser()
        if source.kind is None and path.is_file() and _are_prompts(path):
            mine, dropped = [], []
            for one in records.read(path, Prompt):
                if settings.split in (one.split, "all"):
                    mine.append(one)
                else:
                    reason = f"split: {one.split}, not sample.split={settings.split}"
                    dropped.append(Reject(one.id, reason))
            about = [Input.of_file(path)]
        else:
            mine, dropped, about = pool.read([source], columns, policy, settings.split)
        for one in mine:
            if one.id in found:
                dropped.append(Reject(one.id, f"duplicate prompt: of {found[one.id].source}"))
            else:
                found[one.id] = one
        rejects += dropped
        inputs += about
    if not found:
        raise ValueError(f"--sample.prompts={','.join(names)}: no prompts")
    prompts = list(found.values())
    if settings.limit is not None:
        prompts = pool.drawn(prompts, settings.limit, seed)
        kept = {one.id for one in prompts}
        rejects += [Reject(name, "limit: not drawn") for name in found if name not in kept]
    return prompts, rejects, inputs


def _are_prompts(path: Path) -> bool:
    """Whether the first row of a shard is a `records.Prompt`."""
    if ".jsonl" not in path.name:
        return False
    for _, line in records.read_lines(path):
        try:
            row = json.loads(line)
        except ValueError:
            return False
        return isinstance(row, dict) and {"id", "text", "source", "kind", "split"} <= row.keys()
    return False


def request(prompt: Prompt, settings: SampleConfig, seed: int) -> Request:
    """What the model is asked; the request's seed depends on the stage's and the prompt."""
    sampler = Sampler(
        temperature=settings.temperature,
        top_p=settings.top_p,
        top_k=settings.top_k,
        min_p=settings.min_p,
        seed=int(records.sha256(f"{seed}:{prompt.id}")[:8], 16),
        max_new_tokens=settings.max_new_tokens,
        think_tokens=settings.think_tokens,
        stop=tuple(configuration.names(settings.stop)),
    )
    system = ({"role": "system", "content": settings.system},) if settings.system else ()
    messages = (*system, {"role": "user", "content": prompt.text})
    return Request(prompt.id, messages, sampler, settings.n, settings.prefix or "")


def _refused(model: Generator, asked: Mapping[str, Request]) -> dict[str, str]:
    """Why requests cannot be asked, by id; of a generator that can tell beforehand."""
    check = getattr(model, "job", lambda one: None)
    found: dict[str, str] = {}
    for name, one in asked.items():
        try:
            check(one)
        except ValueError as error:
            found[name] = f"can not be asked: {str(error).removeprefix(f'{name}: ')}"
    return found


@dataclass(frozen=True)
class Drawn:
    """Replies by prompt, those of earlier runs too; tokens that are new; why some are missing."""

    replies: dict[str, list[dict[str, Any]]]
    tokens: int
    failures: dict[str, str]


def _ask(
    model: Generator, asked: Sequence[Request], stage: Stage, out: Path, progress: bool
) -> Drawn:
    """What all requests came to; a server's failures are asked for again by the next run."""
    mine = asked[distributed.index() :: distributed.count()]
    key = stage.key() | {"processes": distributed.count()}
    ending = f"-{distributed.index()}" if distributed.several() else ""
    name = f"samples-{records.sha256(records.to_json(key))[:12]}{ending}.jsonl"
    tokens = 0
    partial: dict[str, list[dict[str, Any]]] = {}
    failures: Mapping[str, str] = getattr(model, "failures", {})
    bar = tqdm(
        total=len(mine),
        unit="prompt",
        desc="sample",
        disable=not (progress and distributed.writes()),
    )
    with bar, Journal(out / "journal" / name, key) as journal, distributed.unguarded():
        todo = [one for one in mine if one.id not in journal.values]
        bar.update(len(mine) - len(todo))
        started = time.time()
        for one, samples in model.generate(_longest_first(model, todo)):
            found = [_reply(sample) for sample in samples]
            if one.id in failures:
                partial[one.id] = found
            else:
                journal.append(one.id, found)
            tokens += sum(sample.tokens or 0 for sample in samples)
            bar.set_postfix_str(f"{tokens / (time.time() - started):.0f} tokens/s")
            bar.update(1)
        kept = journal.values
        replies = partial | {one.id: kept[one.id] for one in mine if one.id in kept}
    drawn = Drawn(replies, tokens, {name: failures[name] for name in partial})
    if distributed.several():
        parts = [
            Drawn(**json.loads(text))
            for text in distributed.gather("samples", json.dumps(vars(drawn)))
        ]
        drawn = Drawn(
            {name: replies for part in parts for name, replies in part.replies.items()},
            sum(part.tokens for part in parts),
            {name: why for part in parts for name, why in part.failures.items()},
        )
    if drawn.failures and not any(drawn.replies.values()):
        raise ValueError(f"{model.name}: no request succeeded: {min(drawn.failures.values())}")
    return drawn


def _longest_first(model: Generator, requests: list[Request]) -> Iterator[Request]:
    """Requests by the length of their prompt: memory runs out at once or never."""
    yield from sorted(requests, key=lambda one: -sum(len(m["content"]) for m in one.messages))


def _reply(sample: Any) -> dict[str, Any]:
    """What the journal keeps of a sample, without what is at its default."""
    value = {
        "text": sample.text,
        "finish": sample.finish,
        "prompt_tokens": sample.prompt_tokens,
        "tokens": sample.tokens,
        "ids": sample.ids,
        "logprobs": sample.logprobs,
    }
    return value | ({"forced": True} if sample.forced else {})


def trace(
    prompt: Prompt,
    asked: Request,
    i: int,
    reply: Mapping[str, Any],
    model: Generator,
    count: Callable[[str], int | None],
) -> Trace:
    """The record of one sample; `raw` begins with what the template or the request wrote."""
    prefill = "" if asked.prefix else getattr(model, "prefill", "")
    raw = (asked.prefix or prefill) + reply["text"]
    parsed = reasoning.parse(
        asked.prefix + reply["text"],
        finished=reply["finish"] != "length",
        prefilled_open="<think>" in prefill,
    )
    answer = count(parsed.answer)
    if answer is not None and reply["tokens"] is not None:
        answer = min(answer, reply["tokens"])  # tokenised again, a part can come out longer
    thought = None if answer is None or reply["tokens"] is None else reply["tokens"] - answer
    meta = {"i": i, "ids": reply["ids"], "logprobs": reply["logprobs"]}
    if asked.prefix:
        meta["prefix"] = asked.prefix
    return Trace(
        id=records.content_id(prompt.id, model.name, model.sha, asked.sampler.seed, i, raw),
        parent_ids=(prompt.id,),
        meta={k: v for k, v in meta.items() if v is not None}
        | ({"forced": True} if reply.get("forced") else {}),
        prompt_id=prompt.id,
        model=model.name,
        sampler=asked.sampler,
        raw=raw,
        parsed=Parsed(**vars(parsed)),
        steps=trace_steps(parsed.reasoning),
        decision=decided(parsed.reasoning),
        n_tok=TokenCounts(prompt=reply["prompt_tokens"], reason=thought, answer=answer),
        tokenizer_sha=getattr(model, "tokenizer_sha", None),
        finish=reply["finish"],
        origin="injected" if asked.prefix else "self",
    )


def report(prompts: Sequence[Prompt], traces: Sequence[Trace]) -> dict[str, Any]:
    """By kind of prompt: samples, how they parsed and ended, mean tokens, distinct answers."""
    kinds = {one.id: one.kind for one in prompts}
    table: dict[str, Any] = {}
    for kind in records.KINDS:
        mine = [one for one in traces if kinds[one.prompt_id] == kind]
        if not mine:
            continue
        tokens = [
            one.n_tok.reason + one.n_tok.answer
            for one in mine
            if one.n_tok.reason is not None and one.n_tok.answer is not None
        ]
        table[kind] = {
            "prompts": sum(one.kind == kind for one in prompts),
            "samples": len(mine),
            "distinct": len({(one.prompt_id, one.raw) for one in mine}),
            "mean_tokens": round(sum(tokens) / len(tokens), 1) if tokens else None,
            "forced": sum("forced" in one.meta for one in mine),
            "statuses": dict(sorted(Counter(one.parsed.status for one in mine).items())),
            "finish": dict(sorted(Counter(one.finish for one in mine).items())),
        }
    return table


def summary(manifest: Mapping[str, Any], out: Path) -> str:
    """The report as a table, what was dropped, and where the traces are."""
    lines = [
        "| kind | prompts | samples | distinct | tokens | cut off | parsed |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, one in manifest.get("report", {}).items():
        statuses = ", ".join(f"{count} {name}" for name, count in one["statuses"].items())
        tokens = "-" if one["mean_tokens"] is None else f"{one['mean_tokens']:.0f}"
        lines.append(
            f"| {kind} | {one['prompts']} | {one['samples']} | {one['distinct']} | {tokens} | "
            f"{one['finish'].get('length', 0)} | {statuses} |"
        )
    dropped = manifest.get("drop_reasons", {})
    reasons = ", ".join(f"{count} {name}" for name, count in dropped.items())
    lines += ["", f"dropped    {reasons or 'nothing'}"]
    if speed := manifest.get("run", {}).get("tokens_per_s"):
        lines.append(f"new tokens {manifest['run']['new_tokens']}, {speed:.0f} a second")
    lines.append(f"traces     {manifest['n_out']} in {out / 'traces.jsonl'}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
