"""`trainwright launch`: the batch file or manifest that runs a recipe on several machines. Prints, starts nothing."""

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from trainwright.cli.options import Overrides, RecipeName, finite
from trainwright.errors import UserError

if TYPE_CHECKING:
    from trainwright.recipe.schema import Recipe

PORT = 29500


def launch(
    recipe: RecipeName,
    overrides: Overrides = None,
    slurm: Annotated[bool, typer.Option("--slurm", help="a file for sbatch")] = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="a manifest for kubectl apply -f")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="machines")] = 2,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs of each machine")] = 8,
    cpus: Annotated[int, typer.Option(min=1, help="CPU cores for each GPU")] = 8,
    hours: Annotated[float, typer.Option(callback=finite, min=0.1, help="SLURM: the longest it may run")] = 24.0,
    image: Annotated[str, typer.Option(help="Kubernetes: a container image with Trainwright in it")] = "trainwright",
    claim: Annotated[str, typer.Option(help="Kubernetes: the volume claim that all machines share")] = "trainwright",
    mount: Annotated[str, typer.Option(help="Kubernetes: where the claim is seen")] = "/data",
) -> None:
    """Prints what sbatch or kubectl takes; the layout is checked against the number of GPUs and the model first."""
    from trainwright.recipe.load import load_recipe

    if slurm == k8s:
        raise UserError("say which: --slurm or --k8s")
    asked = load_recipe(recipe, overrides or ())
    layout = checked_layout(asked, nodes * gpus)
    if slurm:
        print(slurm_file(asked, [recipe, *(overrides or ())], layout, nodes, gpus, cpus, hours), end="")
    else:
        print(manifest(asked, layout, nodes, gpus, cpus, image, claim, mount), end="")


def checked_layout(recipe: "Recipe", gpus: int) -> str:
    """The layout's name. Raises UserError now for what the run would refuse after its wait in the queue."""
    from trainwright.parallel.layout import Layout, check_model
    from trainwright.parallel.split import check_micro_batches, estimate_costs, split_layers, stages_of_rank
    from trainwright.planner.build import model_config

    layout, settings = Layout.of(recipe.parallel, gpus), recipe.train
    if isinstance(settings.micro_batch_size, int):
        count = layout.accumulation(
            settings.micro_batch_size, settings.global_batch_size, settings.gradient_accumulation_steps
        )
        check_micro_batches(recipe.parallel.pp_schedule, layout.pp, count)
    try:
        config = model_config(recipe)
    except UserError:  # the model may lie where the machines of the job are, and not here
        return str(layout)
    asked, length = recipe.parallel, recipe.data.seq_len
    check_model(layout, config, length, kv_replication=asked.kv_replication)
    if layout.pp > 1:
        each = len(stages_of_rank(0, layout.pp, asked.pp_schedule, asked.pp_stages))
        counts = asked.pp_layers if isinstance(asked.pp_layers, list) else None
        split_layers(estimate_costs(config, length), layout.pp * each, counts, each)
    return str(layout)


def slurm_file(recipe: "Recipe", words: list[str], layout: str, nodes: int, gpus: int, cpus: int, hours: float) -> str:
    """One task a GPU; srun ends all of them when one fails, and a job that is queued again goes on where it was."""
    minutes = round(hours * 60)
    folder = Path(recipe.output) / recipe.name
    return f"""#!/bin/bash
# {recipe.name}: {layout} on {nodes} machines of {gpus} GPUs. Run it with: sbatch FILE
#SBATCH --job-name={_label(recipe.name)}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={gpus}
#SBATCH --gpus-per-node={gpus}
#SBATCH --cpus-per-task={cpus}
#SBATCH --time={minutes // 60}:{minutes % 60:02d}:00
#SBATCH --output={_label(recipe.name)}-%j.log
#SBATCH --signal=TERM@300
#SBATCH --requeue

# {folder} has to be on a file system that all machines see.
export OMP_NUM_THREADS={cpus}
srun --kill-on-bad-exit=1 trainwright train {shlex.join(words)} --resume
"""


def manifest(
    recipe: "Recipe", layout: str, nodes: int, gpus: int, cpus: int, image: str, claim: str, mount: str
) -> str:
    """An indexed Job with a pod a machine, the service by which they find each other, and the recipe itself."""
    import yaml

    from trainwright.recipe.show import to_yaml

    name = _label(recipe.name)
    start = (
        f"torchrun --nnodes={nodes} --nproc-per-node={gpus} --node-rank=$JOB_COMPLETION_INDEX "
        f"--master-addr={name}-0.{name} --master-port={PORT} "
        f"--no-python trainwright train /recipe/recipe.yaml --resume"
    )
    resources = {"nvidia.com/gpu": gpus, "cpu": cpus * gpus}
    pod = {
        "subdomain": name,
        "restartPolicy": "Never",
        "containers": [
            {
                "name": "train",
                "image": image,
                "command": ["bash", "-c", start],
                "workingDir": mount,
                "env": [{"name": "OMP_NUM_THREADS", "value": str(cpus)}],
                "ports": [{"containerPort": PORT}],
                "resources": {"limits": resources, "requests": resources},
                "volumeMounts": [
                    {"name": "data", "mountPath": mount},
                    {"name": "recipe", "mountPath": "/recipe"},
                    {"name": "memory", "mountPath": "/dev/shm"},
                ],
            }
        ],
        "volumes": [
            {"name": "data", "persistentVolumeClaim": {"claimName": claim}},
            {"name": "recipe", "configMap": {"name": name}},
            {"name": "memory", "emptyDir": {"medium": "Memory"}},
        ],
    }
    parts: list[dict[str, Any]] = [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": name},
            "spec": {"clusterIP": "None", "selector": {"job-name": name}, "publishNotReadyAddresses": True},
        },
        {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": name},
            "data": {"recipe.yaml": to_yaml(recipe, comments=False)},
        },
        {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": name},
            "spec": {
                "completionMode": "Indexed",
                "completions": nodes,
                "parallelism": nodes,
                "backoffLimit": 0,
                "template": {"spec": pod},
            },
        },
    ]
    head = f"# {recipe.name}: {layout} on {nodes} machines of {gpus} GPUs. Run it with: kubectl apply -f FILE\n"
    return head + "---\n".join(yaml.safe_dump(part, sort_keys=False, width=1000) for part in parts)


def _label(name: str) -> str:
    """A name that schedulers take: lower case letters, digits and hyphens, 53 at most."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:53] or "trainwright"
