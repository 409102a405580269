"""A checkpoint is complete or absent, whatever happened to the process, the disk or the files."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections import namedtuple

import pytest
import torch

from tests.train.tiny import TinyModel
from tests.warm import python
from trainwright.device import get_rng_state, seed_everything, set_rng_state
from trainwright.errors import UserError
from trainwright.parallel.layout import Layout
from trainwright.parallel.mesh import World
from trainwright.train.checkpoint import Checkpoints, SaveError, list_checkpoints
from trainwright.train.chunks import Chunk, read_chunks, to_index, write_chunks

CPU = torch.device("cpu")
WORLD = World(0, Layout(), CPU)


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        "model.a": torch.randn(5, 7, generator=generator),
        "model.b": torch.randn(3, generator=generator).bfloat16(),
        "optimizer.a.step": torch.tensor(4.0),
        "optimizer.a.codes": torch.arange(6, dtype=torch.uint8).reshape(2, 3),
    }


def save(folder, step, seed=0, **options):
    checkpoints = Checkpoints(folder, WORLD, **options)
    return checkpoints.save(step, tensors(seed), {"step": step, "loader": {"consumed_rows": 7}}, get_rng_state(CPU))


def test_what_is_saved_comes_back(tmp_path):
    path = save(tmp_path / "checkpoints", 100)
    assert path.name == "step-00000100"
    checkpoints = Checkpoints(tmp_path / "checkpoints", WORLD)
    found = checkpoints.find()
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    state = checkpoints.load(found, target)
    assert state == {"step": 100, "loader": {"consumed_rows": 7}}
    for name, tensor in tensors().items():
        assert torch.equal(target[name], tensor), name


def test_only_safetensors_and_json(tmp_path):
    path = save(tmp_path, 1)
    assert {file.suffix for file in path.iterdir()} == {".safetensors", ".json"}
    manifest = json.loads((path / "manifest.json").read_text())
    assert set(manifest["files"]) == {file.name for file in path.iterdir()} - {"manifest.json"}


def test_all_random_numbers_come_back(tmp_path):
    import random

    import numpy as np

    def draw():
        return random.random(), random.gauss(0, 1), np.random.randn(3).tolist(), torch.rand(3).tolist()

    seed_everything(5)
    draw()  # leaves half of a pair of gaussians behind in python and numpy
    save(tmp_path, 1)
    expected = draw()
    checkpoints = Checkpoints(tmp_path, WORLD)
    draw()
    set_rng_state(checkpoints.random_numbers(checkpoints.find()), CPU)
    assert draw() == expected


def test_keep_last_and_keep_every(tmp_path):
    for step in range(1, 8):
        save(tmp_path, step, keep_last=2, keep_every=3)
    assert [c.step for c in list_checkpoints(tmp_path)] == [3, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{n:08d}" for n in (3, 6, 7)]


def test_unfinished_folders_are_not_seen_and_go(tmp_path):
    save(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    (tmp_path / "step-00000003").mkdir()
    assert [c.step for c in list_checkpoints(tmp_path)] == [1]
    assert Checkpoints(tmp_path, WORLD).find().step == 1
    save(tmp_path, 4)
    assert not (tmp_path / "step-00000002.partial").exists()


def test_the_same_step_may_be_written_again(tmp_path):
    save(tmp_path, 1, seed=0)
    save(tmp_path, 1, seed=1)
    target = {name: torch.zeros_like(tensor) for name, tensor in tensors().items()}
    checkpoints = Checkpoints(tmp_path, WORLD)
    checkpoints.load(checkpoints.find(), target)
    assert torch.equal(target["model.a"], tensors(1)["model.a"])


DAMAGE = {
    "a flipped byte": (
        "tensors-00000-000.safetensors",
        lambda f: f.write_bytes(f.read_bytes()[:-1] + b"\xff"),
        "SHA-256",
    ),
    "a cut file": ("tensors-00000-000.safetensors", lambda f: f.write_bytes(f.read_bytes()[:-9]), "bytes"),
    "a missing file": ("index.json", lambda f: f.unlink(), "index.json is missing"),
    "no manifest": ("manifest.json", lambda f: f.unlink(), "manifest.json is missing"),
    "an empty manifest": ("manifest.json", lambda f: f.write_text(""), "manifest.json"),
    "another format": ("manifest.json", lambda f: f.write_text('{"format": 99, "files": {}}'), "format 99"),
    "a manifest of nonsense": ("manifest.json", lambda f: f.write_text("[1]"), "manifest.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_corrupt_checkpoint_is_refused_by_name_and_the_one_before_offered(tmp_path, damage):
    file, harm, says = DAMAGE[damage]
    for step in (10, 20, 30):
        save(tmp_path, step, keep_last=3)
    harm(tmp_path / "step-00000030" / file)
    harm(tmp_path / "step-00000020" / file)
    checkpoints = Checkpoints(tmp_path, WORLD)
    with pytest.raises(UserError, match=r"step-00000030 is corrupt .*train.resume=10") as caught:
        checkpoints.find()
    assert says in str(caught.value)
    assert checkpoints.find(10).step == 10


def test_when_all_are_corrupt_it_says_so(tmp_path):
    path = save(tmp_path, 10)
    (path / "index.json").write_text("{}")
    with pytest.raises(UserError, match="no older one is good"):
        Checkpoints(tmp_path, WORLD).find()


def test_an_absent_step_is_refused_with_what_there_is(tmp_path):
    save(tmp_path, 10)
    with pytest.raises(UserError, match="no checkpoint of step 11: there are 10"):
        Checkpoints(tmp_path, WORLD).find(11)
    assert Checkpoints(tmp_path / "none", WORLD).find() is None


def test_going_on_from_an_older_one_sets_the_newer_aside(tmp_path):
    for step in (10, 20):
        save(tmp_path, step)
    Checkpoints(tmp_path, WORLD).set_aside_after(10)
    assert [c.step for c in list_checkpoints(tmp_path)] == [10]
    assert (tmp_path / "step-00000020.abandoned" / "manifest.json").exists()


def test_too_little_disk_is_said_before_anything_is_written(tmp_path, monkeypatch):
    save(tmp_path, 1)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 0, 1000))
    with pytest.raises(SaveError, match=r"needs 0.00 GiB and .* has 0.00 GiB free") as caught:
        save(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_fails_in_the_middle_leaves_the_old_checkpoint(tmp_path):
    """A real limit of the system on file size: write() fails half way through."""
    save(tmp_path, 1)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limit[1]))
    try:
        big = {"model.a": torch.zeros(100_000)}
        with pytest.raises(SaveError, match="could not be written on rank 0"):
            Checkpoints(tmp_path, WORLD).save(2, big, {}, get_rng_state(CPU))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert Checkpoints(tmp_path, WORLD).find().step == 1


@pytest.mark.slow
def test_kill_9_during_a_save_leaves_the_newest_whole(tmp_path):
    """A process that does nothing but save is killed at ten different moments; what is listed always verifies."""
    program = textwrap.dedent("""
        import sys, torch
        from trainwright.device import get_rng_state
        from trainwright.parallel.layout import Layout
        from trainwright.parallel.mesh import World
        from trainwright.train.checkpoint import Checkpoints
        from pathlib import Path
        cpu = torch.device("cpu")
        checkpoints = Checkpoints(Path(sys.argv[1]), World(0, Layout(), cpu))
        start = int(sys.argv[2])
        for step in range(start, start + 10_000):
            values = {f"model.{i}": torch.full((50_000,), float(step)) for i in range(4)}
            checkpoints.save(step, values, {"step": step}, get_rng_state(cpu))
            print(step, flush=True)
    """)
    reached = 0
    for attempt in range(4):
        process = subprocess.Popen([sys.executable, "-c", program, tmp_path, str(reached + 1)], stdout=subprocess.PIPE)
        process.stdout.readline()
        time.sleep(0.013 * (attempt + 1))
        process.kill()
        process.wait()
        checkpoints = Checkpoints(tmp_path, WORLD)
        found = checkpoints.find()
        assert found.step > reached
        reached = found.step
        target = {f"model.{i}": torch.zeros(50_000) for i in range(4)}
        assert checkpoints.load(found, target) == {"step": reached}
        assert all(bool((value == reached).all()) for value in target.values())


def test_files_stay_small_and_shared_memory_is_no_hindrance(tmp_path):
    stack = torch.randn(4, 100)
    chunks = [(Chunk(f"t{i}", (0,), (100,)), stack[i], (100,)) for i in range(4)]
    stored = write_chunks(tmp_path, 0, chunks, file_bytes=900)
    assert len({item.file for item in stored}) == 2
    target = {f"t{i}": torch.zeros(100) for i in range(4)}
    read_chunks(tmp_path, to_index(stored), target)
    assert torch.equal(torch.stack(list(target.values())), stack)


def test_another_model_is_refused(tmp_path):
    stored = write_chunks(tmp_path, 0, [(Chunk("a", (0, 0), (2, 2)), torch.ones(2, 2), (2, 2))])
    with pytest.raises(UserError, match="holds no b"):
        read_chunks(tmp_path, to_index(stored), {"b": torch.ones(1)})
    with pytest.raises(UserError, match=r"has shape \[2, 2\], this run needs \[4\]"):
        read_chunks(tmp_path, to_index(stored), {"a": torch.ones(4)})
    index = to_index(stored)
    index["a"]["shape"] = [3, 2]
    with pytest.raises(UserError, match="lacks 2 of 6 values"):
        read_chunks(tmp_path, index, {"a": torch.ones(3, 2)})


RANKS = textwrap.dedent("""
    import json, os, sys, torch
    from pathlib import Path
    from torch.distributed.tensor import distribute_tensor, Replicate, Shard
    from torch.distributed.device_mesh import init_device_mesh
    from trainwright.device import get_rng_state
    from trainwright.errors import UserError
    from trainwright.parallel.mesh import join_world, leave_world
    from trainwright.recipe.parallel import ParallelRecipe
    from trainwright.train.checkpoint import Checkpoints
    from trainwright.train import chunks

    folder, mode, shape = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
    world = join_world(ParallelRecipe())
    mesh = init_device_mesh("cpu", tuple(shape), mesh_dim_names=("a", "b"))
    def spread(tensor, *placements):
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)
    whole = {
        "uneven": torch.arange(35.0).reshape(5, 7), "both": torch.arange(48.0).reshape(6, 8),
        "twice": torch.arange(60.0).reshape(12, 5), "small": torch.arange(2.0), "plain": torch.arange(3.0),
    }
    placed = {
        "uneven": (Shard(0), Replicate()), "both": (Shard(1), Shard(0)), "twice": (Shard(0), Shard(0)),
        "small": (Replicate(), Shard(0)), "plain": None,
    }
    make = lambda t, p: t.clone() if p is None else spread(t, *p)
    checkpoints = Checkpoints(folder, world)
    if mode == "save":
        tensors = {n: make(t, placed[n]) for n, t in whole.items()}
        checkpoints.save(5, tensors, {"world": world.size}, get_rng_state(world.device))
    elif mode == "load":
        target = {n: make(torch.zeros_like(t), placed[n]) for n, t in whole.items()}
        checkpoints.load(checkpoints.find(), target)
        for n, t in whole.items():
            full = target[n].full_tensor() if placed[n] else target[n]
            assert torch.equal(full, t), (n, full)
        # one rank's disk fails: all ranks hear of it, none hangs
        if world.rank == world.size - 1:
            def broken(*args, **kwargs): raise OSError(28, "No space left on device")
            import trainwright.train.checkpoint as module
            module.write_chunks = broken
        try:
            checkpoints.save(6, {n: make(t, placed[n]) for n, t in whole.items()}, {}, get_rng_state(world.device))
        except UserError as error:
            (folder.parent / f"heard-{world.rank}.txt").write_text(str(error))
    leave_world()
""")


def ranks(program, count, *words):
    command = [python(), "-m", "torch.distributed.run", f"--nproc-per-node={count}", "--master-port=0"]
    command = [*command, "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(program), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr


def test_written_by_four_ranks_read_by_two_and_one(tmp_path):
    program = tmp_path / "ranks.py"
    program.write_text(RANKS)
    ranks(program, 4, tmp_path / "c", "save", "[2, 2]")
    files = {file.name for file in (tmp_path / "c" / "step-00000005").iterdir()}
    assert {f"random-{rank:05d}.safetensors" for rank in range(4)} < files
    ranks(program, 2, tmp_path / "c", "load", "[1, 2]")
    index = json.loads((tmp_path / "c" / "step-00000005" / "index.json").read_text())
    stored = {name: sum(torch.Size(b["sizes"]).numel() for b in entry["chunks"]) for name, entry in index.items()}
    assert stored == {"uneven": 35, "both": 48, "twice": 60, "small": 2, "plain": 3}  # replicas once
    target = {name: torch.zeros(entry["shape"]) for name, entry in index.items()}
    read_chunks(tmp_path / "c" / "step-00000005", index, target)
    assert torch.equal(target["both"], torch.arange(48.0).reshape(6, 8))
    heard = [(tmp_path / f"heard-{rank}.txt").read_text() for rank in range(2)]
    assert all("the checkpoint could not be written on rank 1" in text for text in heard)
    assert [c.step for c in list_checkpoints(tmp_path / "c")] == [5]
    assert not list((tmp_path / "c").glob("*.partial"))


def test_a_model_and_its_optimizer(tmp_path):
    """The names and shapes of real optimizer states go through the files."""
    from trainwright.train.optimizer import build_optimizer

    def state(model, optimizers):
        return {f"model.{n}": p for n, p in model.named_parameters()} | {
            f"optimizer.{n}": t for n, t in optimizers.state_tensors().items()
        }

    for name in ("adamw", "adafactor", "muon", "sgd"):
        pair = []
        for seed in (0, 1):
            model = TinyModel(seed=seed)
            optimizers = build_optimizer(model, name, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
            optimizers.create_states()
            pair.append(state(model, optimizers))
        checkpoints = Checkpoints(tmp_path / name, WORLD)
        checkpoints.save(1, pair[0], {}, get_rng_state(CPU))
        checkpoints.load(checkpoints.find(), pair[1])
        for key, tensor in pair[0].items():
            assert torch.equal(tensor, pair[1][key]), key
