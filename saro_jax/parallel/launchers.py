"""Who launched this process: its number, how many there are, and where the first one listens.

Looked at in this order, the first that says anything decides:
flags or environment   --coordinator --processes --process, JAX_COORDINATOR_ADDRESS,
                       JAX_NUM_PROCESSES, JAX_PROCESS_ID (or JOB_COMPLETION_INDEX of a JobSet)
GKE, JobSet, XPK       TPU_WORKER_HOSTNAMES, TPU_WORKER_ID, with several slices MEGASCALE_*
TPU VM                 the metadata server: worker-network-endpoints, agent-worker-number, tpu-env
SLURM                  the variables of an `srun` step
A lone process is none of these.
"""

import os
import re
import urllib.error
import urllib.request
from pathlib import Path
from typing import NamedTuple

PORT = 8482  # what jax uses on TPUs
_EXPLICIT = {
    "coordinator": ("JAX_COORDINATOR_ADDRESS",),
    "processes": ("JAX_NUM_PROCESSES",),
    "process": ("JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"),
}


class Launch(NamedTuple):
    """One process of several."""

    by: str  # what said so
    coordinator: tuple[str, int]  # host and port where process 0 listens
    processes: int
    process: int
    local_devices: list[int] | None = None  # None = all of the host


def find(coordinator: str | None, processes: int | None, process: int | None) -> Launch | None:
    """What launched this process, None where it is the only one.

    The arguments are flags, None where not given. Raises a one-line ValueError that names what is
    missing or wrong.
    """
    found = _explicit(coordinator, processes, process)
    if found is None and tpu_here():
        found = _gke() or _tpu_vm()
    if found is None:
        found = _slurm()
    if found is None or found.processes == 1:
        return None
    if not 0 <= found.process < found.processes:
        raise ValueError(
            f"{found.by}: process {found.process} of {found.processes}; they count from 0 to "
            f"{found.processes - 1}"
        )
    return found


def tpu_here() -> bool:
    """Whether this host has TPU chips that JAX is allowed to use."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if platforms and "tpu" not in platforms:
        return False
    google = "0x1ae0"
    return any(
        file.read_text().strip() == google for file in Path("/sys/bus/pci/devices").glob("*/vendor")
    )


def _explicit(coordinator: str | None, processes: int | None, process: int | None) -> Launch | None:
    flags = {"coordinator": coordinator, "processes": processes, "process": process}
    given, where = {}, {}
    for name, variables in _EXPLICIT.items():
        if flags[name] is not None:
            given[name], where[name] = str(flags[name]), f"--{name}={flags[name]}"
            continue
        for variable in variables:
            if name not in given and os.environ.get(variable):
                given[name] = os.environ[variable]
                where[name] = f"{variable}={given[name]}"
    # A JobSet numbers its pods, and a pod of a TPU slice may carry jax's address, in any case:
    # without the number of processes nothing explicit is meant.
    if all(value is None for value in flags.values()) and "processes" not in given:
        return None
    missing = [name for name in _EXPLICIT if name not in given]
    if given.get("processes") == "1" and "coordinator" in missing:
        return Launch(where["processes"], ("localhost", PORT), 1, 0)
    if missing:
        names = " and ".join(f"--{name} (or {_EXPLICIT[name][0]})" for name in missing)
        raise ValueError(f"{', '.join(where.values())}: {names} is missing; all three go together")
    numbers = {}
    for name in ("processes", "process"):
        if not re.fullmatch("[0-9]+", given[name]):
            raise ValueError(f"{where[name]}: expected a whole number, got {given[name]!r}")
        numbers[name] = int(given[name])
    address = _address(given["coordinator"], where["coordinator"])
    by = f"{where['processes']}, {where['process']}"
    return Launch(by, address, numbers["processes"], numbers["process"])


def _address(text: str, where: str) -> tuple[str, int]:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:]+)\]|([^:\[\]]+)):([0-9]+)", text)
    if match is None or not 0 < int(match[3]) < 65535:
        raise ValueError(f"{where}: expected HOST:PORT, a port below 65535, got {text!r}")
    return match[1] or match[2], int(match[3])


def _slices(value) -> tuple[int, int, str | None]:
    """(number of slices, which one this is, host of process 0) of a multislice run."""
    host = value("MEGASCALE_COORDINATOR_ADDRESS")
    if not host:
        return 1, 0, None
    return (
        int(value("MEGASCALE_NUM_SLICES") or 1),
        int(value("MEGASCALE_SLICE_ID") or 0),
        host.split(":")[0],
    )


def _in_slices(by: str, hosts: list[str], worker: int, value) -> Launch:
    count, number, first = _slices(value)
    address = (first or hosts[0], PORT)
    return Launch(by, address, len(hosts) * count, worker + number * len(hosts))


def _gke() -> Launch | None:
    names = os.environ.get("TPU_WORKER_HOSTNAMES")
    worker = os.environ.get("TPU_WORKER_ID")
    if not names:
        return None
    hosts = names.split(",")
    if worker is None:
        if len(hosts) == 1:
            return None
        raise ValueError(f"TPU_WORKER_HOSTNAMES={names}: TPU_WORKER_ID is missing beside it")
    if not re.fullmatch("[0-9]+", worker):
        raise ValueError(f"TPU_WORKER_ID={worker}: expected a whole number")
    return _in_slices("TPU_WORKER_HOSTNAMES, TPU_WORKER_ID", hosts, int(worker), os.environ.get)


def _tpu_vm() -> Launch | None:
    if os.environ.get("TPU_SKIP_MDS_QUERY"):  # what libtpu understands too: there is no such server
        return None
    worker = _metadata("agent-worker-number")
    endpoints = None if worker is None else _metadata("worker-network-endpoints")
    if worker is None or endpoints is None:
        return None
    # Each is a host, or uid:number:address as older images have it.
    hosts = [entry.split(":")[-1] for entry in endpoints.split(",")]
    facts = {}
    for line in (_metadata("tpu-env") or "").splitlines():
        key, colon, value = line.partition(":")
        if colon:
            facts[key.strip()] = value.strip().strip("'")
    return _in_slices("the metadata of this TPU VM", hosts, int(worker), facts.get)


def _metadata(key: str) -> str | None:
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/attributes/{key}",
        headers={"Metadata-Flavor": "Google"},
    )
    try:
        # No proxy: the metadata server is on the host itself.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=10) as answer:
            return answer.read().decode()
    except (urllib.error.URLError, OSError):
        return None


def _slurm() -> Launch | None:
    names = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_PROCID", "SLURM_LOCALID")
    job, nodes, process, local = map(os.environ.get, names)
    processes = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS")
    if not (job and nodes and process and local and processes):
        return None
    # Ports of one job, two each, in the upper part of what is free to use.
    port = 61440 + int(job) % 2047 * 2
    # Several tasks on one host share its devices out; one task has them all.
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1")
    devices = [int(local)] if re.search(r"(^|,)([2-9]|[1-9][0-9])", tasks) else None
    by = "the variables of SLURM"
    return Launch(by, (first_node(nodes), port), int(processes), int(process), devices)


def first_node(nodes: str) -> str:
    """The first host of a SLURM list such as `a,b`, `a[001-4]` or `a[3,7-9]b,c`."""
    match = re.match(r"([^,\[]*)(?:\[([^,\-\]]+)[^\]]*\])?([^,\[]*)", nodes)
    assert match is not None  # every part of it may be empty
    return match[1] + (match[2] or "") + match[3]
