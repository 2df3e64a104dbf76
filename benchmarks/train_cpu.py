"""Training speed and memory on a CPU: saro_jax beside TRL, on the same rows, in one run.

    python benchmarks/train_cpu.py --peer-python=/path/to/python-with-trl

Every contestant trains in a process of its own, one after the other, in alternating order, and sees
the same texts through the same chat template, in the same order, with the same batches:

rw    one example a row: question -> answer with reasoning, as the file has it
srpo  one process pair a row: both answers begin with the first half of the row's reasoning; chosen
      goes on as the row does, rejected as the next row does from the middle of its reasoning

tokens/s  prompt and answer tokens of every sequence (of both branches of a pair), padding not
          counted, over the wall time of a step; the median of the steps after the warm-up. The last
          step is left out: it has no next one that a trainer could overlap it with. Loading,
          compiling, and scoring the reference are not in it; "whole run" has them.
peak RSS  the most memory the process ever held, from the kernel (`wait4`)
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
STAGES = {"rw": "RW (SFT)", "srpo": "SRPO (DPO)"}
# Transparent huge pages: what `make quickstart` sets.
HUGE_PAGES = "glibc.malloc.hugetlb=1"
# For torch, which frees and takes large tensors all the time, also: all from the heap, never given
# back to the kernel.
KEEP_PAGES = ":".join(
    (
        HUGE_PAGES,
        "glibc.malloc.mmap_max=0",
        f"glibc.malloc.trim_threshold={2**40}",
        f"glibc.malloc.top_pad={2**28}",
    )
)


class Contestant(NamedTuple):
    """One column of the comparison: a trainer and the memory allocator's settings it runs with."""

    name: str
    trainer: str  # saro_jax | trl
    tunables: str  # GLIBC_TUNABLES; empty = the allocator's defaults


CONTESTANTS = (
    Contestant("saro_jax", "saro_jax", HUGE_PAGES),
    Contestant("saro_jax, default malloc", "saro_jax", ""),
    Contestant("TRL", "trl", ""),
    Contestant("TRL, tuned malloc", "trl", KEEP_PAGES),
)


class Run(NamedTuple):
    """What one process measured of itself, and the kernel of it."""

    stage: str
    contestant: str
    tokens: list[int]  # of every step
    seconds: list[float]  # of every step
    loss: list[float]
    tokens_per_second: float
    peak_rss_gb: float  # 1e9 bytes
    whole_run_s: float
    load_before: float  # 1-minute load average: other work on the machine


def main() -> int:
    args = arguments()
    if args.peer_job is not None:
        train_trl(json.loads(args.peer_job))
        return 0
    sys.path.insert(0, str(ROOT))  # this checkout's saro_jax, installed or not
    try:
        compare(args)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [contestant.name for contestant in CONTESTANTS]
    add = parser.add_argument
    rows = ROOT.parent / "shared" / "data" / "star1.jsonl"
    add("--rows", type=Path, default=rows, help="JSON lines with question and response")
    add("--model", default="quickstart", help="Hub id, folder, .gguf file or quickstart")
    add("--peer-python", default=sys.executable, help="interpreter that has trl and torch")
    add("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    add("--contestants", nargs="+", choices=names, default=names, metavar="NAME", help=str(names))
    add("--rounds", type=int, default=1, help="times every contestant runs; the median counts")
    add("--steps", type=int, default=8, help="optimizer steps of a run")
    add("--warmup", type=int, default=2, help="first steps that are not timed")
    add("--batch", type=int, default=8, help="examples or pairs of a step")
    add("--max-length", type=int, default=512, help="tokens of one sequence")
    add("--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the computation")
    add("--out", type=Path, default=ROOT / "runs" / "benchmarks" / "train_cpu")
    add(
        "--saro",
        action="append",
        default=[],
        metavar="A.B=VALUE",
        help="a further setting of saro_jax's config, such as train.micro_rows=2; may be repeated",
    )
    add("--peer-job", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    """Run everything and write train_cpu.md and train_cpu.json into `args.out`."""
    if args.steps < args.warmup + 2:
        raise ValueError(f"--steps={args.steps}: at least --warmup + 2 = {args.warmup + 2} steps")
    chosen = [c for c in CONTESTANTS if c.name in args.contestants]
    versions = own_versions()
    if any(contestant.trainer == "trl" for contestant in chosen):
        versions |= peer_versions(args.peer_python)
    args.out.mkdir(parents=True, exist_ok=True)
    files, model, prepared = prepare(args)
    print(f"{cpu()}; {prepared}", flush=True)
    runs: list[Run] = []
    for k in range(args.rounds):
        for stage in args.stages:
            # Forth and back, so that a drift of the machine's speed falls on all alike.
            for contestant in chosen if k % 2 == 0 else chosen[::-1]:
                runs.append(run(args, stage, contestant, files[stage], model))
                done = runs[-1]
                print(
                    f"{stage:5}{contestant.name:26}{done.tokens_per_second:8.0f} tokens/s"
                    f"{done.peak_rss_gb:8.2f} GB  whole run {done.whole_run_s:.0f} s, load before "
                    f"{done.load_before:.1f}",
                    flush=True,
                )
                check_same_work(runs)
                report(args, chosen, runs, versions, prepared)
    print((args.out / "train_cpu.md").read_text(), end="")


def prepare(args: argparse.Namespace) -> tuple[dict[str, Path], Path, str]:
    """Write the rows of both stages; their files, the model's folder, and a line about them."""
    from saro_jax.data.rows import read
    from saro_jax.data.tokenise import RowError, tokenise_row
    from saro_jax.models.hub import resolve
    from saro_jax.text.chat import load_tokenizer

    if not args.rows.is_file():
        raise ValueError(f"--rows={args.rows}: no such file of question and response lines")
    model = resolve(args.model)
    tokenizer = load_tokenizer(model)
    wanted = args.steps * args.batch
    source = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    try:
        rows = [(row["question"], row["response"]) for row in source]
    except (KeyError, TypeError):
        raise ValueError(f"--rows={args.rows}: every line needs question and response") from None
    halves = [middle_of_reasoning(response) for _, response in rows]
    candidates = args.out / "candidates.jsonl"
    pairs = [
        {
            "prompt": [{"role": "user", "content": question}],
            "prefix": response[:half],
            "chosen": [{"role": "assistant", "content": response[half:]}],
            "rejected": [{"role": "assistant", "content": other[other_half:]}],
        }
        for (question, response), half, (_, other), other_half in zip(
            rows, halves, rows[1:] + rows[:1], halves[1:] + halves[:1], strict=True
        )
    ]
    write_lines(candidates, pairs)
    # A pair whose prompt and shared half fill max_length has nothing left to compare.
    kept, shared, tokens = [], 0, 0
    for k, row in enumerate(read(str(candidates), "preference")[0]):
        try:
            item = tokenise_row(row, tokenizer, args.max_length)
        except RowError:
            continue
        kept.append(k)
        shared += len(item.prefix)
        tokens += sum(len(item.prefix) + len(branch.ids) for branch in item.branches)
        if len(kept) == wanted:
            break
    candidates.unlink()
    if len(kept) < wanted:
        raise ValueError(
            f"--rows={args.rows}: {len(kept)} usable rows, needs --steps x --batch = {wanted}"
        )
    files = {stage: args.out / f"{stage}.jsonl" for stage in STAGES}
    examples = [
        {
            "prompt": [{"role": "user", "content": rows[k][0]}],
            "completion": [{"role": "assistant", "content": rows[k][1]}],
        }
        for k in kept
    ]
    write_lines(files["rw"], examples)
    write_lines(files["srpo"], [pairs[k] for k in kept])
    share = 2 * shared / tokens
    text = f"{wanted} rows of {args.rows.name}; pairs share {share:.0%} of their tokens"
    return files, model, text


def middle_of_reasoning(response: str) -> int:
    """The character behind the last word of the first half of the text in <think>...</think>."""
    start = response.find("<think>") + len("<think>") if "<think>" in response else 0
    end = response.find("</think>") if "</think>" in response else len(response)
    middle = (start + end) // 2
    space = response.rfind(" ", start, middle)
    return space if space > 0 else middle


def write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def run(
    args: argparse.Namespace, stage: str, contestant: Contestant, rows: Path, model: Path
) -> Run:
    """One process of one contestant."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        if contestant.trainer == "saro_jax":
            command = saro_command(args, stage, rows, model, out)
        else:
            job = {"stage": stage, "rows": str(rows), "model": str(model), "out": str(out)}
            job |= {key: getattr(args, key) for key in ("steps", "batch", "max_length", "dtype")}
            command = [args.peer_python, str(Path(__file__)), f"--peer-job={json.dumps(job)}"]
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(Path(folder) / "datasets"),
            "TOKENIZERS_PARALLELISM": "false",
        }
        environment.pop("GLIBC_TUNABLES", None)
        if contestant.tunables:
            environment["GLIBC_TUNABLES"] = contestant.tunables
        load, started = os.getloadavg()[0], time.monotonic()
        log = args.out / f"{stage}-{contestant.name.replace(', ', '-').replace(' ', '_')}.log"
        with log.open("w") as stream:
            process = subprocess.Popen(
                command, env=environment, stdout=stream, stderr=subprocess.STDOUT, cwd=folder
            )
            # Not process.wait: the kernel tells the peak memory only to who collects the process.
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        whole = time.monotonic() - started
        if process.returncode:
            last = (log.read_text().strip().splitlines() or ["no output"])[-1]
            raise ValueError(f"{contestant.name}, {stage}: failed, see {log}: {last}")
        read = read_saro if contestant.trainer == "saro_jax" else read_trl
        tokens, seconds, loss = read(out)
    timed = range(args.warmup, args.steps - 1)
    return Run(
        stage,
        contestant.name,
        tokens,
        seconds,
        loss,
        statistics.median(tokens[k] / seconds[k] for k in timed),
        usage.ru_maxrss * 1024 / 1e9,
        whole,
        load,
    )


def saro_command(
    args: argparse.Namespace, stage: str, rows: Path, model: Path, out: Path
) -> list[str]:
    """The command line a user would type, with everything that a default might change spelt out."""
    settings = {
        "model.path": model,
        "model.dtype": args.dtype,
        "data.train": rows,
        "data.max_length": args.max_length,
        "data.shuffle": "false",
        "data.max_reject_share": 0,
        "train.steps": args.steps,
        "train.batch_rows": args.batch,
        "train.log_every": 1,
        "optimizer.learning_rate": 1e-6,
        "srpo.reference_cache": out.parent / "reference",
    } | dict(setting.split("=", 1) for setting in args.saro)
    command = [sys.executable, "-m", "saro_jax.train", f"--stage={stage}", "--config=quickstart"]
    return [*command, f"--out={out}", *(f"--{key}={value}" for key, value in settings.items())]


def read_saro(out: Path) -> tuple[list[int], list[float], list[float]]:
    """Tokens, seconds and loss of every step, from the run's own metrics."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    total = [0, *(line["num_tokens"] for line in lines)]
    tokens = [after - before for before, after in pairwise(total)]
    seconds = [n / line["tokens_per_second"] for n, line in zip(tokens, lines, strict=True)]
    return tokens, seconds, [line["loss"] for line in lines]


def read_trl(out: Path) -> tuple[list[int], list[float], list[float]]:
    found = json.loads((out / "steps.json").read_text())
    return found["tokens"], found["seconds"], found["loss"]


def train_trl(job: dict[str, Any]) -> None:
    """TRL's SFTTrainer or DPOTrainer on the rows of a job: runs in the peer's interpreter."""
    from datasets import Dataset  # the peer's packages are not saro_jax's
    from transformers import AutoTokenizer, TrainerCallback

    trl: Any = import_module("trl")

    class Clock(TrainerCallback):
        ends: list[float] = []  # noqa: RUF012 (one trainer a process)

        def on_train_begin(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            self.ends.append(time.perf_counter())

    rows = [json.loads(line) for line in Path(job["rows"]).read_text(encoding="utf-8").splitlines()]
    for row in rows:
        prefix = row.pop("prefix", "")
        for key in {"chosen", "rejected"} & row.keys():
            row[key][0]["content"] = prefix + row[key][0]["content"]
    common = {
        "output_dir": job["out"],
        "use_cpu": True,
        "bf16": job["dtype"] == "bfloat16",  # autocast over float32 weights, as saro_jax has them
        "max_steps": job["steps"],
        "per_device_train_batch_size": job["batch"],
        "max_length": job["max_length"],
        "learning_rate": 1e-6,
        "train_sampling_strategy": "sequential",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    if job["stage"] == "rw":
        trainer_class, config = trl.SFTTrainer, trl.SFTConfig(**common)
    else:
        trainer_class = trl.DPOTrainer
        config = trl.DPOConfig(**common, precompute_ref_log_probs=True)
    clock = Clock()
    trainer = trainer_class(
        model=job["model"],
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[clock],
    )
    trainer.train()
    logs = [line for line in trainer.state.log_history if "loss" in line]
    total = [0, *(int(line["num_tokens"]) for line in logs)]
    result = {
        "tokens": [b - a for a, b in pairwise(total)],
        "seconds": [b - a for a, b in pairwise(clock.ends)],
        "loss": [line["loss"] for line in logs],
    }
    Path(job["out"]).mkdir(parents=True, exist_ok=True)
    (Path(job["out"]) / "steps.json").write_text(json.dumps(result))


def check_same_work(runs: list[Run]) -> None:
    """The trainers count the tokens of each step themselves; the counts must agree.

    A template's newline after the last turn, which saro_jax leaves out, is the 1 % allowed.
    """
    first = next(run for run in runs if run.stage == runs[-1].stage)
    for k, (a, b) in enumerate(zip(first.tokens, runs[-1].tokens, strict=True)):
        if abs(a - b) > 0.01 * a:
            raise ValueError(
                f"{runs[-1].stage} step {k + 1}: {first.contestant} trained {a} tokens, "
                f"{runs[-1].contestant} {b}: not the same rows"
            )


def report(
    args: argparse.Namespace,
    chosen: list[Contestant],
    runs: list[Run],
    versions: dict[str, str],
    prepared: str,
) -> None:
    """Write the table and all measurements so far."""
    lines = [
        f"{cpu()}. {', '.join(f'{name} {version}' for name, version in versions.items())}.",
        f"{args.model}, {args.dtype}, {prepared}; batch {args.batch}, max {args.max_length} "
        f"tokens; median of steps {args.warmup + 1} to {args.steps - 1} of {args.steps}, of rounds "
        f"({args.rounds}).",
        "",
    ]
    peers = [c.name for c in chosen if c.trainer == "trl"]
    head = ["stage", "trainer", "tokens/s", "best", "peak RSS GB", "whole run s"]
    head += [f"x {name}" for name in peers]
    lines += ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for stage in args.stages:
        speeds = {
            c.name: [
                r.tokens_per_second for r in runs if (r.stage, r.contestant) == (stage, c.name)
            ]
            for c in chosen
        }
        for contestant in chosen:
            own = [r for r in runs if (r.stage, r.contestant) == (stage, contestant.name)]
            if not own:
                continue
            speed = statistics.median(speeds[contestant.name])
            cells = [STAGES[stage], contestant.name, f"{speed:.0f}"]
            cells += [
                f"{max(speeds[contestant.name]):.0f}",
                f"{max(r.peak_rss_gb for r in own):.2f}",
                f"{statistics.median(r.whole_run_s for r in own):.0f}",
            ]
            for peer in peers:
                known = bool(speeds[peer])
                cells.append(f"{speed / statistics.median(speeds[peer]):.2f}" if known else "")
            lines.append("| " + " | ".join(cells) + " |")
    (args.out / "train_cpu.md").write_text("\n".join(lines) + "\n")
    settings = {k: str(v) for k, v in vars(args).items() if k != "peer_job"}
    record = {
        "cpu": cpu(),
        "versions": versions,
        "settings": settings,
        "tunables": {c.name: c.tunables for c in chosen},
        "runs": [r._asdict() for r in runs],
    }
    (args.out / "train_cpu.json").write_text(json.dumps(record, indent=2) + "\n")


def own_versions() -> dict[str, str]:
    from saro_jax.config import provenance

    found = {k: v for k, v in provenance().items() if k in ("saro_jax", "jax", "git_commit") and v}
    return {"python": platform.python_version()} | {k: str(v)[:12] for k, v in found.items()}


def peer_versions(python: str) -> dict[str, str]:
    """Versions of the peer's packages; ValueError says what to install."""
    code = (
        "import json, torch, transformers, trl, accelerate\n"
        "print(json.dumps({m.__name__: m.__version__ for m in (trl, transformers, torch)}))"
    )
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--peer-python={python}: {error.strerror}") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(
            f"--peer-python={python}: {reason}; in an environment of its own, "
            "pip install 'trl==1.16.*' 'torch==2.13.0', or leave TRL out: --contestants saro_jax"
        )
    return json.loads(done.stdout.splitlines()[-1])


def cpu() -> str:
    """Name and number of the processors this process may use; whether they have bfloat16."""
    name, flags = platform.processor() or platform.machine(), ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = value
    except OSError:
        pass
    bf16 = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags.split()]
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{count} x {name}" + (f" ({', '.join(bf16)})" if bf16 else "")


if __name__ == "__main__":
    sys.exit(main())
