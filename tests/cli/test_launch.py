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


def test_what_the_run_would_refuse_is_refused_before_the_queue() -> None:
    """Heads, experts, the order of micro batches: the run would say so hours later."""
    with pytest.raises(UserError, match=r"parallel.ep=2: this model has no experts"):
        printed("quickstart", "parallel.ep=2", "--slurm")
    with pytest.raises(UserError, match=r"parallel.tp=16 does not divide \d+ attention heads: use parallel.tp=\d"):
        printed("quickstart", "parallel.tp=16", "--k8s")
    with pytest.raises(UserError, match=r"16 pipeline stages cannot share \d layers, .* with 2 stages a rank"):
        printed("quickstart", "parallel.pp=8", "parallel.pp_schedule=zbv", "--slurm")
    words = ["parallel.pp=2", "parallel.pp_schedule=interleaved", "train.gradient_accumulation_steps=5"]
    with pytest.raises(UserError, match="cannot order 5 micro batches over pp=2 ranks: use 4"):
        printed("quickstart", *words, "--slurm")


def test_a_model_that_lies_elsewhere_is_no_reason_to_refuse() -> None:
    assert "TP2PP1DP8" in printed("quickstart", "model.path=/on/the/cluster", "parallel.tp=2", "--slurm")
