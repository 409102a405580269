"""What `trainwright launch` prints is what schedulers read."""

from __future__ import annotations

import subprocess

import pytest
import yaml
from typer.testing import CliRunner

from trainwright.cli import app
from trainwright.errors import UserError


def printed(*words: str) -> str:
    result = CliRunner().invoke(app, ["launch", *words])
    if isinstance(result.exception, UserError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_slurm_file_for_16_gpus() -> None:
    text = printed("quickstart", "parallel.tp=2", "data.path=/my data/x.jsonl", "--slurm", "--hours", "1.5")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    for line in (
        "#SBATCH --nodes=2",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --time=1:30:00",
    ):
        assert f"\n{line}\n" in text
    assert "TP2PP1DP8" in text
    assert text.endswith("trainwright train quickstart parallel.tp=2 'data.path=/my data/x.jsonl' --resume\n")


def test_manifest_for_16_gpus() -> None:
    service, config, job = yaml.safe_load_all(printed("quickstart", "name=My_Run.1", "--k8s", "--image", "here/tw:1"))
    assert (service["kind"], config["kind"], job["kind"]) == ("Service", "ConfigMap", "Job")
    assert {part["metadata"]["name"] for part in (service, config, job)} == {"my-run-1"}
    assert yaml.safe_load(config["data"]["recipe.yaml"])["name"] == "My_Run.1"
    spec = job["spec"]
    assert (spec["completions"], spec["parallelism"], spec["completionMode"]) == (2, 2, "Indexed")
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 8
    assert container["image"] == "here/tw:1"
    assert "--master-addr=my-run-1-0.my-run-1" in container["command"][2]
    assert spec["template"]["spec"]["subdomain"] == service["metadata"]["name"]


def test_a_layout_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="3 processes do not divide the 16"):
        printed("quickstart", "parallel.tp=3", "--slurm")
    with pytest.raises(UserError, match="--slurm or --k8s"):
        printed("quickstart")
