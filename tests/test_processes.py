"""Several processes: their gradients, and runs that are killed at random moments, saves included.

KILLS=20 pytest tests/test_processes.py -k killed    kills each kind of run twenty times
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image

import data
import dense
import finetune
import train
import vit
from conftest import ROOT, TINY, run
from test_cae import ROWS as CAE_ROWS
from test_mixedae import ROWS
from test_mrmae import ROWS as MRMAE_ROWS
from test_mrmae import flags_of
from test_train import checkpoint, rows, same_weights, without_clock

KILLS = int(os.environ.get("KILLS", 1))
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


# A fresh Python needs seconds to import torch. These processes are forked from one that has done it, and has
# done nothing else.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["train", "finetune", "dense", "conftest", "test_processes"])


def enter(program, words, environment, log):
    """What a forked process does: program.main(words), with all that it says in the file `log`."""
    os.setsid()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(environment)
    importlib.import_module(program).main(words)


class Forked:
    """`program WORDS` as one process, or as several that find each other as under torchrun."""

    def __init__(self, processes, log, program, *words):
        self.log = log
        log.write_text("")
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.ranks = []
        for rank in range(processes):
            environment = {"OMP_NUM_THREADS": "1"}
            if processes > 1:
                names = {"RANK": rank, "LOCAL_RANK": rank, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
                names |= {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
                environment |= {name: str(value) for name, value in names.items()}
            args = (program, list(map(str, words)), environment, log)
            self.ranks.append(FORKS.Process(target=enter, args=args))
            self.ranks[-1].start()

    def poll(self):
        """None while a process lives, as subprocess.Popen has it."""
        return None if any(rank.is_alive() for rank in self.ranks) else self.ranks[0].exitcode

    def kill(self):
        for rank in self.ranks:
            kill_all(rank.pid)
            rank.join()

    def finish(self, code=0, timeout=300):
        """Wait for the end -> what was said."""
        for rank in self.ranks:
            rank.join(timeout)
        output = self.log.read_text()
        assert [rank.exitcode for rank in self.ranks] == [code] * len(self.ranks), output[-3000:]
        return output


def start(*words):
    """A fresh Python, or torchrun, as a user starts it."""
    return subprocess.Popen(
        words,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def to_the_end(*words, code=0):
    """Start it and wait -> what was said."""
    process = start(*words)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output[-3000:]
    return output


def kill_all(pid):
    """SIGKILL to a process and all below it."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    below = children.read_text().split() if children.exists() else []
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)
    for child in below:
        kill_all(int(child))


@pytest.mark.parametrize(
    "processes, workers", [(1, 0), (2, 2)] if KILLS == 1 else [(p, w) for p in (1, 2, 3) for w in (0, 2)]
)
def test_killed_at_random_moments_equals_never_killed(processes, workers, folder, tmp_path):
    batch = {1: 8, 2: 4, 3: 4}[processes]
    per_epoch = 40 // (batch * processes)
    epochs = 50 * (KILLS + 1) // per_epoch

    def begin(name, workers):
        flags = ["--method", "mixedae", "--data", folder / "train", "--out", tmp_path / name]
        flags += ["--batch-size", batch, "--epochs", epochs, "--log-every", 5, "--save-every", 3]
        flags += ["--workers", workers]
        return Forked(processes, tmp_path / f"{name}.txt", "train", *TINY, *flags)

    def logged():
        path = tmp_path / "killed" / "log.jsonl"
        return int((re.findall(r'"step": (\d+)', path.read_text()) or [0])[-1]) if path.exists() else 0

    begin("whole", 0).finish(timeout=600)
    steps, killed_in_a_save, reached = checkpoint(tmp_path / "whole")["step"], 0, []
    for kill in range(KILLS):
        process, target = begin("killed", workers), random.randrange(50 * kill + 1, 50 * (kill + 1))
        while logged() < target and process.poll() is None:
            time.sleep(0.002)
        time.sleep(random.uniform(0, 0.03))
        while kill % 2 == 0 and process.poll() is None and not any((tmp_path / "killed").glob("*.pt.tmp")):
            pass  # every other kill comes during a save
        process.kill()
        killed_in_a_save += any((tmp_path / "killed").glob("*.pt.tmp"))
        reached.append(checkpoint(tmp_path / "killed")["step"])
    print(
        f"{processes} processes, {workers} workers: killed after the saves at steps {reached} of {steps}, "
        f"{killed_in_a_save} times during one"
    )
    assert reached[0] < steps
    begin("killed", workers).finish(timeout=600)
    assert same_weights(tmp_path / "killed", tmp_path / "whole")
    assert without_clock(rows(tmp_path / "killed")) == without_clock(rows(tmp_path / "whole"))


def test_two_processes_equal_one_for_given_masks(tmp_path):
    """The gradient over a batch is the mean of those over its halves, through the real wrapping: each method,
    each row of the ablations."""
    teacher = tmp_path / "teacher.pt"
    torch.save(vit.pack_encoder(vit.ViT((16, 16), 4, 24, 2, 2), "mae", "cls", data.MEAN, data.STD), teacher)
    table = [["mixedae", *flags] for flags in ROWS.values()] + [
        ["cae", "--drop-path", "0", *flags] for flags in CAE_ROWS.values()
    ]
    table += [["mrmae", *flags_of(row, teacher)] for row in MRMAE_ROWS.values()] + [["mae"], ["mixedae"]]
    table += [["mae", *"--patch-size 16 --image-size 64 --stem conv".split()]]
    output = Forked(2, tmp_path / "log", "test_processes", *map(shlex.join, table)).finish()
    assert output.count("all gradients agree") == 2


def main(table):
    """What each of the two processes does. table: methods with their flags."""
    for method, *flags in map(shlex.split, table):
        args = train.parse_args(["--method", method, *TINY, *flags])
        if not dist.is_initialized():
            device = train.start_processes(args)
        torch.manual_seed(0)
        alone = train.METHODS[method](args)
        torch.manual_seed(0)
        example = [torch.zeros(8, 3, *args.image_size)]
        wrapped = train.wrap_ddp(train.METHODS[method](args), args, device, example)
        assert all(p.grad is None or not p.grad.any() for p in wrapped.parameters())
        images = torch.randn(16, 3, *args.image_size)
        mask = alone.predict(images)["sources" if method == "mixedae" else "mask"]
        alone(images, mask)[0].backward()
        r = dist.get_rank()
        wrapped(images[8 * r : 8 * r + 8], mask[len(mask) // 2 * r :][: len(mask) // 2])[0].backward()
        for (name, p), q in zip(wrapped.module.named_parameters(), alone.parameters()):
            if p.requires_grad:
                torch.testing.assert_close(p.grad, q.grad, atol=1e-6, rtol=1e-4)
        del wrapped
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    print("all gradients agree", flush=True)


@pytest.mark.parametrize(
    "backend, code, calls",
    [("nccl", 0, ["destroy"]), ("nccl", 2, ["abort", "destroy"]), ("gloo", 2, ["destroy"])],
)
def test_after_an_error_no_process_waits_for_the_others_under_nccl(backend, code, calls, monkeypatch):
    called = []
    world = types.SimpleNamespace(abort=lambda: called.append("abort"))
    monkeypatch.setattr(dist, "get_backend", lambda: backend)
    monkeypatch.setattr(dist, "group", types.SimpleNamespace(WORLD=world))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: called.append("destroy"))
    train.leave_processes(code)
    assert called == calls


def test_under_torchrun_a_mistake_is_said_once():
    words = [*TORCHRUN, str(ROOT / "train.py"), "--method", "mixedae", "--mixing-ratio", "0.3"]
    output = to_the_end(*words, code=1)  # torchrun makes 1 of every code
    assert sum(line.startswith("train.py: ") for line in output.splitlines()) == 1


def test_sigterm_to_torchrun_saves(folder, tmp_path):
    flags = ["--method", "mae", "--data", folder, "--out", tmp_path, "--batch-size", 4, "--epochs", 100000]
    process = start(*TORCHRUN, str(ROOT / "train.py"), *TINY, *map(str, flags), "--workers", "2")
    while not (tmp_path / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert "the same command resumes" in output and checkpoint(tmp_path)["step"] > 0


ENDLESS = [*TINY, "--method", "mae", "--epochs", "100000"]
TRAIN = [sys.executable, str(ROOT / "train.py"), *ENDLESS]


def wait_for(path, process):
    """Until a file is there, as long as the process lives."""
    deadline = time.time() + 60
    while not path.exists() and process.poll() is None and time.time() < deadline:
        time.sleep(0.02)


def workers_of(process):
    pid = process.ranks[0].pid
    return Path(f"/proc/{pid}/task/{pid}/children").read_text().split()


def test_a_loader_process_that_dies_costs_no_step(folder, tmp_path):
    flags = [*ENDLESS, "--data", folder, "--out", tmp_path, "--workers", 2, "--log-every", 1]
    process = Forked(1, tmp_path / "log", "train", *flags)
    wait_for(tmp_path / "checkpoint.pt", process)
    os.kill(int(workers_of(process)[0]), signal.SIGKILL)
    output = process.finish(code=1, timeout=60)
    assert (
        "a loader process failed" in output.splitlines()[-1] and "lower --workers" in output.splitlines()[-1]
    )
    assert checkpoint(tmp_path)["step"] == rows(tmp_path)[-1]["step"]  # the steps so far


def test_too_many_broken_images_in_one_process_end_all(tmp_path):
    """Each process counts its own; the one that has too many says which, and none waits for it."""
    for i in range(120):
        path = tmp_path / "bad" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        if i % 3 == 0:
            path.write_text("nonsense")
        else:
            Image.new("RGB", (16, 16)).save(path)
    flags = [*ENDLESS, "--data", tmp_path / "bad", "--out", tmp_path / "run", "--batch-size", 4]
    output = Forked(2, tmp_path / "log", "train", *flags).finish(code=1, timeout=100)
    assert "too many broken images: 11 of" in output and "Traceback" not in output
    assert "the same command resumes" not in output
    assert checkpoint(tmp_path / "run")["step"] > 0


@pytest.mark.skipif(
    subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0
    if shutil.which("unshare")
    else True,
    reason="needs the right to mount a small /dev/shm",
)
def test_no_shared_memory_is_one_line_and_no_hang(folder, tmp_path):
    words = [*TRAIN, "--data", str(folder), "--out", str(tmp_path), "--workers", "2", "--image-size", "96"]
    small = 'mount -t tmpfs -o size=1M tmpfs /dev/shm && exec "$@"'
    process = start("unshare", "-m", "sh", "-c", small, "sh", *words)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 1 and "--shm-size" in output.splitlines()[-1], output[-2000:]


def test_output_may_vanish(folder, tmp_path):
    """A closed pipe, a full disk, closed streams, a terminal without accents: training goes on."""
    words = shlex.join([*TRAIN[:-1], "2", "--workers", "1", "--data", str(folder), "--out"])
    cases = {
        "pipe": "%s 2>&1 | head -1; exit ${PIPESTATUS[0]}",
        "full": "%s > /dev/full 2> /dev/full",
        "closed": "%s >&- 2>&-",
        "\u00e9t\u00e9": "PYTHONUTF8=0 PYTHONIOENCODING=ascii LC_ALL=C %s",
    }
    processes = {}
    for name, line in cases.items():
        processes[name] = start("bash", "-c", line % f"{words} '{tmp_path / name}'")
    for name, process in processes.items():
        output = process.communicate(timeout=100)[0]
        assert process.returncode == 0, (name, output[-2000:])
        assert rows(tmp_path / name)[-1]["step"] == 10


def test_a_hang_up_saves(folder, tmp_path):
    flags = [*ENDLESS, "--data", folder, "--out", tmp_path, "--workers", 2]
    process = Forked(1, tmp_path / "log", "train", *flags)
    wait_for(tmp_path / "checkpoint.pt", process)
    os.kill(process.ranks[0].pid, signal.SIGHUP)
    process.finish(code=128 + signal.SIGHUP, timeout=60)
    assert checkpoint(tmp_path)["step"] > 0


def test_two_processes_train_and_test_a_probe_as_one(folder, tmp_path, capsys):
    """finetune.py: the same accuracy and the same confusion of given weights, with batches that do not divide
    the test set."""
    torch.manual_seed(0)
    torch.save(
        vit.pack_encoder(vit.ViT((16, 16), 4, 32, 2, 2), "mae", "cls", data.MEAN, data.STD),
        tmp_path / "encoder.pt",
    )
    quick, outputs = ["--device", "cpu", "--workers", "0", "--data", str(folder)], []
    for processes in (1, 2):

        def output(*flags, processes=processes):
            if processes == 2:
                return Forked(2, tmp_path / "log", "finetune", *quick, *flags).finish()
            capsys.readouterr()
            run(*flags, main=finetune.main, defaults=quick)
            return capsys.readouterr().out

        out = tmp_path / f"run{processes}"
        flags = (
            "--encoder",
            tmp_path / "encoder.pt",
            "--protocol",
            "linear",
            "--cache-features",
            "--epochs",
            3,
            "--batch-size",
            6 // processes,
            "--out",
            out,
        )
        output(*flags)
        before = (out / "results.json").read_text()
        assert (
            "finished already" in output(*flags) and (out / "results.json").read_text() == before
        )  # all processes test with the same statistics
        outputs.append(output("--evaluate", tmp_path / "run1", "--batch-size", 3).splitlines()[-1])
        assert (
            sum(
                int(value)
                for line in (out / "confusion.csv").read_text().splitlines()[1:]
                for value in line.split(",")[1:]
            )
            == 8
        )  # every sample once
    assert outputs[0] == outputs[1] and "top1" in outputs[0]
    one, two = (
        json.loads((tmp_path / f"run{processes}" / "results.json").read_text()) for processes in (1, 2)
    )
    assert one["knn_top1"] == two["knn_top1"]


def test_two_processes_count_the_pixels_that_one_counts(tmp_path):
    """dense.py --task segment: of given weights the same confusion matrix."""
    for split, count in (("training", 8), ("validation", 5)):
        for part in ("images", "annotations"):
            (tmp_path / "scenes" / part / split).mkdir(parents=True)
        for i in range(count):
            pixels = np.random.default_rng(i).integers(0, 4, (20, 24)).astype(np.uint8)
            Image.fromarray(np.stack([pixels * 60] * 3, axis=2)).save(
                tmp_path / "scenes" / "images" / split / f"{i}.png"
            )
            Image.fromarray(pixels).save(tmp_path / "scenes" / "annotations" / split / f"{i}.png")
    (tmp_path / "scenes" / "classes.txt").write_text("a\nb\nc\n")
    assert_two_test_as_one(
        "confusion.csv",
        tmp_path,
        "segment",
        "--data",
        tmp_path / "scenes",
        "--batch-size",
        2,
        "--head-width",
        8,
    )


def test_two_processes_find_the_objects_that_one_finds(tmp_path):
    """dense.py --task detect: trained by two, of given weights the same predictions."""
    pytest.importorskip("pycocotools", reason="pycocotools is optional, and computes COCO's metric")
    (tmp_path / "coco" / "annotations").mkdir(parents=True)
    for split, count in (("train", 4), ("val", 3)):
        (tmp_path / "coco" / split).mkdir()
        notes = [
            {
                "id": 1 + i,
                "image_id": i,
                "category_id": 1,
                "bbox": [4, 4, 10, 9 + i],
                "iscrowd": 0,
                "area": 10 * (9 + i),
                "segmentation": [[4, 4, 14, 4, 14, 13 + i, 4, 13 + i]],
            }
            for i in range(count)
        ]
        images = [{"id": i, "file_name": f"{i}.png", "height": 24, "width": 32} for i in range(count)]
        content = {"images": images, "annotations": notes, "categories": [{"id": 1, "name": "thing"}]}
        (tmp_path / "coco" / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
        for i in range(count):
            Image.fromarray(np.random.default_rng(i).integers(0, 256, (24, 32, 3)).astype(np.uint8)).save(
                tmp_path / "coco" / split / f"{i}.png"
            )
    assert_two_test_as_one(
        "predictions.json",
        tmp_path,
        "detect",
        "--neck",
        "fpn",
        "--data",
        tmp_path / "coco",
        "--batch-size",
        2,
        "--image-size",
        32,
        "--head-width",
        16,
        "--proposals",
        20,
        "--rois",
        16,
    )


def assert_two_test_as_one(file, tmp_path, task, *flags):
    """A run of dense.py of two processes wrote the same file as one process that evaluates its weights."""
    encoder = vit.ViT((16, 16), 4, 32, 2, 2)
    torch.save(vit.pack_encoder(encoder, "mae", "cls", data.MEAN, data.STD), tmp_path / "encoder.pt")
    quick = ["--task", task, "--device", "cpu", "--workers", "0"]
    words = ["--encoder", tmp_path / "encoder.pt", *flags, "--out", tmp_path / "run", "--epochs", 1]
    Forked(2, tmp_path / "log", "dense", *quick, *words).finish()
    run("--evaluate", tmp_path / "run", "--out", tmp_path / "one", main=dense.main, defaults=quick)
    one, two = ((tmp_path / name / file).read_text() for name in ("one", "run"))
    assert one == two and len(one) > 20
