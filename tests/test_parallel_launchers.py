"""Launchers: what each says of the process, and that what is missing is named."""

import http.server
import os
import threading

import pytest

from saro_jax.parallel import launchers
from saro_jax.parallel.launchers import PORT, find, first_node

VARIABLES = ("JAX_", "JOB_", "TPU_", "MEGASCALE_", "SLURM_")
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NODELIST": "node[007-9],b",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
}


@pytest.fixture(autouse=True)
def nowhere(monkeypatch):
    """No launcher but the one that the test sets up."""
    for name in list(os.environ):
        if name.startswith(VARIABLES):
            monkeypatch.delenv(name)
    monkeypatch.setattr(launchers, "tpu_here", lambda: False)


def launched(coordinator=None, processes=None, process=None):
    found = find(coordinator, processes, process)
    assert found is not None
    return found


def set_all(monkeypatch, **variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_a_lone_process_is_none():
    assert find(None, None, None) is None


def test_flags():
    assert launched("10.0.0.1:1234", 4, 3)[1:] == (("10.0.0.1", 1234), 4, 3, None)
    assert launched("[::1]:1234", 2, 0)[1] == ("::1", 1234)


def test_environment(monkeypatch):
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="a:1", JAX_NUM_PROCESSES="2", JAX_PROCESS_ID="1")
    assert launched()[1:4] == (("a", 1), 2, 1)
    assert launched("b:2")[1:4] == (("b", 2), 2, 1)  # a flag wins


def test_a_job_set_numbers_its_pods(monkeypatch):
    set_all(monkeypatch, JOB_COMPLETION_INDEX="1")
    assert find(None, None, None) is None
    set_all(monkeypatch, JAX_COORDINATOR_ADDRESS="job-0:1", JAX_NUM_PROCESSES="2")
    assert launched()[1:4] == (("job-0", 1), 2, 1)


def test_one_process_is_none():
    assert find(None, 1, None) is None
    assert find("a:1", 1, 0) is None


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (("a:1", None, None), r"--processes \(or JAX_NUM_PROCESSES\) and --process \(or JAX_PROCE"),
        ((None, 2, 0), r"--processes=2, --process=0: --coordinator \(or JAX_COORDINATOR_ADDRESS\)"),
        (("a:1", 2, 2), "process 2 of 2; they count from 0 to 1"),
        (("a", 2, 0), "--coordinator=a: expected HOST:PORT"),
        (("a:99999", 2, 0), "--coordinator=a:99999: expected HOST:PORT"),
        (("a:1", -2, 0), "--processes=-2: expected a whole number"),
    ],
)
def test_what_is_missing_is_named(flags, line):
    with pytest.raises(ValueError, match=line):
        find(*flags)


def test_gke(monkeypatch):
    monkeypatch.setattr(launchers, "tpu_here", lambda: True)
    set_all(monkeypatch, TPU_WORKER_HOSTNAMES="a-0.svc,a-1.svc", TPU_WORKER_ID="1")
    assert launched()[1:4] == (("a-0.svc", PORT), 2, 1)
    set_all(
        monkeypatch,
        MEGASCALE_COORDINATOR_ADDRESS="s-0.svc:8080",
        MEGASCALE_NUM_SLICES="2",
        MEGASCALE_SLICE_ID="1",
    )
    assert launched()[1:4] == (("s-0.svc", PORT), 4, 3)
    monkeypatch.delenv("TPU_WORKER_ID")
    with pytest.raises(ValueError, match="TPU_WORKER_ID is missing"):
        find(None, None, None)


def test_gke_of_one_host_and_without_a_tpu(monkeypatch):
    set_all(monkeypatch, TPU_WORKER_HOSTNAMES="a,b", TPU_WORKER_ID="1")
    assert find(None, None, None) is None
    monkeypatch.setattr(launchers, "tpu_here", lambda: True)
    set_all(monkeypatch, TPU_WORKER_HOSTNAMES="localhost", TPU_WORKER_ID="0")
    assert find(None, None, None) is None


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server with the attributes that the test puts into it."""
    attributes = {}

    class Server(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            assert self.headers["Metadata-Flavor"] == "Google"
            found = attributes.get(
                self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            )
            self.send_response(404 if found is None else 200)
            self.end_headers()
            self.wfile.write((found or "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    monkeypatch.setattr(launchers, "tpu_here", lambda: True)
    yield attributes
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("endpoints", ["10.0.0.5,10.0.0.6", "x:0:10.0.0.5,y:1:10.0.0.6"])
def test_tpu_vm(metadata, endpoints):
    metadata |= {"agent-worker-number": "1", "worker-network-endpoints": endpoints}
    assert launched()[1:4] == (("10.0.0.5", PORT), 2, 1)
    metadata["tpu-env"] = (
        "ZONE: 'z'\nMEGASCALE_COORDINATOR_ADDRESS: '10.9.9.9:8080'\n"
        "MEGASCALE_NUM_SLICES: '3'\nMEGASCALE_SLICE_ID: '2'\n"
    )
    assert launched()[1:4] == (("10.9.9.9", PORT), 6, 5)


def test_a_tpu_vm_of_one_host_is_none(metadata, monkeypatch):
    assert find(None, None, None) is None  # no such attributes
    metadata |= {"agent-worker-number": "0", "worker-network-endpoints": "10.0.0.5"}
    assert find(None, None, None) is None
    metadata["worker-network-endpoints"] = "10.0.0.5,10.0.0.6"
    assert find(None, None, None) is not None
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    assert find(None, None, None) is None


def test_slurm(monkeypatch):
    set_all(monkeypatch, **SLURM)
    assert launched()[1:] == (("node007", 61440 + 1234 * 2), 4, 2, None)
    set_all(monkeypatch, SLURM_STEP_TASKS_PER_NODE="2(x2)")
    assert launched().local_devices == [1]


def test_slurm_outside_a_step_is_none(monkeypatch):
    set_all(monkeypatch, **SLURM)
    monkeypatch.delenv("SLURM_STEP_NODELIST")
    assert find(None, None, None) is None


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("a,b", "a"), ("n-1", "n-1"), ("a[001-4]", "a001"), ("a[3,7-9]b,c", "a3b"), ("[01,3]", "01")],
)
def test_the_first_of_a_list_of_nodes(nodes, first):
    assert first_node(nodes) == first


def test_a_cpu_run_looks_for_no_tpu(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launchers.tpu_here() is False
