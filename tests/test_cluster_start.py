"""Which Ray a campaign starts or joins: inside a Ray job, under `uv run`, and where a cluster refuses it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.hosts import NEEDS_HOSTS, PORT, ROOT, Network
from tests.helpers.tiny_campaign import write_file

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
RUN = [sys.executable, ROOT / "run_campaign.py"]
UV = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
PHASES = """
  - name: alpha
    vary: {alpha: [0.05]}
"""
TOO_LARGE = 600 << 20  # bytes, for Ray to send a folder to the nodes


@pytest.mark.skipif(UV is None, reason="uv is not installed")
def test_a_private_ray_runs_under_uv_in_a_large_folder_with_the_variables_of_a_job(
    tmp_path: Path, corpus: Path
) -> None:
    file = write_file(tmp_path, corpus, phases=PHASES)
    with (tmp_path / "large.bin").open("wb") as large:
        large.truncate(TOO_LARGE)
    job = {"RAY_JOB_CONFIG_JSON_ENV_VAR": '{"runtime_env": {"working_dir": "gcs://x.zip"}}'}
    command = [str(UV), "run", "--no-sync", "--no-project", "--python", *RUN, file]
    done = subprocess.run(
        list(map(str, command)),
        cwd=tmp_path,
        env=os.environ | job | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@NEEDS_HOSTS
def test_a_cluster_that_cannot_be_joined_is_refused_in_one_line(tmp_path: Path, corpus: Path) -> None:
    run = [*RUN, write_file(tmp_path, corpus), "--out", tmp_path / "results", "--address"]
    join = "import sys; from tune.cluster.connection import join_cluster; join_cluster(sys.argv[1])"
    with Network() as network:
        head, other = network.host("one"), network.host("two")
        for host in (head, other):
            del host.environment["RAY_AUTH_MODE"]
        token = head.home / ".ray/auth_token"
        token.parent.mkdir()
        token.write_text("ab" * 32)
        head.start_ray()  # with a token, since there is one
        address = f"{head.address}:{PORT}"
        refusals = {
            f"set RAY_AUTH_MODE=token to send that of {token}": head.run([*run, address]),
            "it asks for a token; copy ~/.ray/auth_token": other.run([sys.executable, "-c", join, address]),
        }
        other.environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "ab" * 32}
        refusals["this host is none of its nodes (1)"] = other.run([sys.executable, "-c", join, address])
    for reason, done in refusals.items():
        last = done.stderr.splitlines()[-1].removeprefix("ngpt.config.base.ConfigError: ")
        assert last.startswith(f"--address {address}: ") and reason in last
        assert "rpc_client.h" not in done.stderr and "gcs_client.cc" not in done.stderr  # warnings of Ray's C++ code
    whole = next(iter(refusals.values()))
    assert whole.returncode == 2 and "Traceback" not in whole.stderr


@NEEDS_HOSTS
def test_inside_a_ray_job_a_campaign_joins_the_cluster_of_the_job(tmp_path: Path, corpus: Path) -> None:
    folder, results = tmp_path / "job", tmp_path / "results"
    folder.mkdir()
    file = write_file(folder, corpus, phases=PHASES)
    ray = [sys.executable, "-m", "ray.scripts.scripts"]
    with Network() as network:
        host = network.host("one")
        started = host.run([*ray, "start", "--head", "--num-cpus=1", "--object-store-memory=80000000"])
        assert started.returncode == 0, started.stdout + started.stderr
        submit = [*ray, "job", "submit", "--address=http://127.0.0.1:8265", f"--working-dir={folder}", "--"]
        done = host.run([*submit, *RUN, file.name, "--out", results])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "inside a Ray job: joining its cluster at " in done.stdout
    lines = [line for path in results.glob("tiny/*/trials.jsonl") for line in path.read_text().splitlines()]
    records = [json.loads(line) for line in lines]
    assert records and {(each["status"], each["provenance"]["host"]) for each in records} == {("finished", "one")}
