"""CUDA: every method, protocol and task on one card, and what the card and the CPU must agree on.

    pytest tests/test_cuda.py                          two or three minutes on a card; skipped without one
    CUDA_TESTS_DEVICE=cpu pytest tests/test_cuda.py    a dry run of the tests themselves, on the CPU

Training on a card varies in the last digits from run to run (fused attention, cuDNN, atomic additions), so no
trained weights are compared here. Each tolerance has its reason beside it.
"""

import copy
import functools
import json
import math
import os
import re
import sys

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from torch.testing import assert_close

import dense
import finetune
import train
import vit
from cae import DVAE
from conftest import ROOT, TINY, build, randomize, run, write_encoder
from test_processes import TORCHRUN, to_the_end
from test_train import checkpoint, rows

DEVICE = os.environ.get("CUDA_TESTS_DEVICE", "cuda")
if DEVICE == "cuda" and not torch.cuda.is_available():
    pytest.skip("needs a CUDA card", allow_module_level=True)

METHODS = (  # {} is a folder with a teacher and a tokenizer
    "mae",
    "mae --stem conv --patch-size 16 --image-size 64",
    "mixedae",
    "cae",
    "cae --target dvae:{}/tokenizer.pt",
    "mrmae --teacher {}/encoder.pt",
    "dvae",
)
TINY_DVAE = "--image-size 16 --batch-size 8 --workers 0 --device cpu --vocabulary 16 --channels 8".split()
TEN_STEPS = f"--device {DEVICE} --epochs 2 --log-every 1 --val-images 8".split()  # of the images in `folder`


def words_of(method, files, *flags):
    """The command line of a row of METHODS: tiny sizes, then `flags`, then the method's own."""
    name, *own = method.format(files).split()
    return ["--method", name, *(TINY_DVAE if name == "dvae" else TINY), *map(str, flags), *own]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with tokenizer.pt and encoder.pt, a teacher whose size and grid are not the students'."""
    folder = write_encoder(tmp_path_factory, (24, 24), 8, 24, 2, 2).parent
    torch.save(DVAE(train.parse_args(words_of("dvae", folder))).export(), folder / "tokenizer.pt")
    return folder


@pytest.fixture(scope="module")
def trained(folder, files, tmp_path_factory):
    """trained(method, *flags): the folder of a finished run of ten steps. Each is made once."""

    @functools.cache
    def make(method, *flags):
        out = tmp_path_factory.mktemp("run")
        run(*words_of(method, files, *TEN_STEPS, "--data", folder, "--out", out, *flags), defaults=())
        return out

    return make


def losses(out):
    """{step: loss}, without the steps that were skipped: at first fp16's scale is too large."""
    return {row["step"]: row["loss"] for row in rows(out) if "loss" in row}


# ------------------------------------------------------------------------------------------------------------
# The card and the CPU
# ------------------------------------------------------------------------------------------------------------
def predict(model, images, mask=None):
    if not isinstance(model, DVAE):
        return model.predict(images, mask)
    logits = model.logits(images)
    return {"logits": logits, "images": model.decode(logits.softmax(dim=1))}


@pytest.mark.parametrize("method", METHODS)
@torch.no_grad()
def test_predict_and_loss_on_the_card_are_the_cpus_for_given_masks(method, files):
    """In fp32 every tensor, without TF32, as `--precision fp32` prepares the card. In half precision the
    loss: a mean over thousands of values, it errs by up to .1 %, and a key that TopK chooses otherwise adds
    to that."""
    flags = f"--image-size 24 32 --precision fp32 --device {DEVICE}".split()
    args = train.parse_args(words_of(method, files, *flags))
    model = randomize(train.METHODS[args.method](args)).eval()
    inputs = [torch.randn(8, 3, *args.image_size)]
    drawn = predict(model, *inputs)
    if method != "dvae":
        inputs.append(drawn["sources" if method == "mixedae" else "mask"])

    device = train.start_processes(args)
    try:
        card, inputs_there = copy.deepcopy(model).to(device), train.to_device(inputs, device)
        assert torch.get_float32_matmul_precision() == "highest"
        found, expected = predict(card, *inputs_there), predict(model, *inputs)
        assert_close(found, expected, atol=1e-4, rtol=1e-4, check_device=False)
        for dtype in (torch.bfloat16, torch.float16) if method != "dvae" else ():  # which has no masks
            with torch.autocast(device.type, dtype=dtype):
                loss, _ = card(*inputs_there)
            assert_close(loss.cpu(), model(*inputs)[0], atol=0, rtol=0.01)
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_features_under_autocast_are_the_cpus_to_bf16s_precision():
    """bf16 has 8 significant bits, so a rounding errs by .1 % on average. The some 30 in a row, in four
    blocks, add up like a random walk to less than 1 % of a whole tensor; 3 % leaves room."""
    encoder, images = randomize(vit.ViT((32, 32), 4, 64, 4, 4)).eval(), torch.randn(4, 3, 32, 32)
    expected = encoder.features(images, taps=[2, 4], attention=True)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        found = encoder.to(DEVICE).features(images.to(DEVICE), taps=[2, 4], attention=True)
    assert found["patches"].dtype == torch.float32  # as the residual stream is
    pairs = [(found[name], expected[name]) for name in ("cls", "patches", "attention")]
    for a, b in [*pairs, *zip(found["taps"], expected["taps"])]:
        assert (a.cpu().float() - b).norm() < 0.03 * b.norm()


@pytest.mark.parametrize("ties", [False, True])
@torch.no_grad()
def test_topk_keeps_exactly_k_keys_in_bf16(ties):
    """The paper's 49 of 196, in a real forward pass."""
    model = build("mixedae", "--image-size", 56).to(DEVICE)
    layer = model.encoder.blocks[1].attn
    layer.record = True
    if ties:
        layer.qkv.weight.zero_()  # all scores are 0
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        model.predict(torch.randn(8, 3, 56, 56, device=DEVICE))
    keep, attention = layer.recorded
    assert keep.device.type == DEVICE and (keep[..., 1:, 1:].sum(dim=-1) == 49).all()
    assert keep[..., 0].all() and keep[..., 0, :].all()
    assert torch.equal(attention > 0, keep)


# ------------------------------------------------------------------------------------------------------------
# One process
# ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("method", METHODS)
def test_each_method_trains_in_half_precision(method, precision, files, trained):
    args, out = train.parse_args(words_of(method, files)), trained(method, "--precision", precision)
    torch.manual_seed(args.seed)
    start = train.METHODS[args.method](args).named_parameters()  # what the run started from
    end = vit.load_file(out / "checkpoint.pt")["model"]
    assert [name for name, p in start if p.requires_grad and torch.equal(p, end[name])] == []
    curve = list(losses(out).values())
    assert len(curve) > 2 and all(map(math.isfinite, curve)) and min(curve) < curve[0]
    assert all(math.isfinite(row["val_loss"]) for row in rows(out) if row["epoch"] % 1 == 0)


@pytest.mark.parametrize("method", ["mae", "mixedae", "cae"])
def test_compiled_blocks_train_alike(method, trained):
    """No graph is broken, and no limit is reached at which dynamo would go on without compiling. Compiled
    code rounds to bf16 less often, as it keeps fused results in fp32, and CAE draws other drop paths: each
    moves the loss by .1 %."""
    torch._dynamo.reset()
    counters.clear()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = losses(trained(method, "--precision", "bf16", "--compile"))
    assert counters["stats"]["unique_graphs"] > 1 and not counters["graph_break"]
    assert compiled == pytest.approx(losses(trained(method, "--precision", "bf16")), rel=0.01)


def test_train_py_stops_resumes_and_times_itself_under_nccl(folder, tmp_path, trained, capsys):
    """Order and masks are those of the run that never stopped; sums in another order move last digits."""
    flags = f"--method mixedae --precision bf16 --data {folder} --out {tmp_path}".split()
    words = [sys.executable, str(ROOT / "train.py"), *TINY, *TEN_STEPS, *flags]
    output = to_the_end(*words, "--max-steps", "4", "--workers", "2")
    assert checkpoint(tmp_path)["step"] == 4 and "the same command resumes" in output
    assert not re.search("NCCL|ProcessGroup|barrier|device_id", output)  # in no warning
    run(*TEN_STEPS, *flags)
    assert losses(tmp_path) == pytest.approx(losses(trained("mixedae", "--precision", "bf16")), rel=0.01)
    capsys.readouterr()
    run("--method", "mixedae", "--device", DEVICE, "--benchmark")
    product, line = capsys.readouterr().out.splitlines()
    assert "TFLOP/s" in product and re.match("mixedae: .* images/s, .* ms/step", line)


def test_a_mistake_that_shows_late_is_one_line_under_nccl_too(folder, trained, capfd):
    """After an error train.leave_processes aborts the group before it destroys it."""
    out = trained("mae")
    capfd.readouterr()
    run("--method", "mixedae", "--data", folder, "--out", out, "--device", DEVICE, code=2)
    assert [line[:10] for line in capfd.readouterr().err.splitlines()] == ["train.py: "]
    run("--method", "mae", *TEN_STEPS, "--data", folder, "--out", out)  # another group can be made


def test_the_card_and_the_cpu_read_each_others_files(folder, tmp_path, trained):
    done = trained("mixedae", "--precision", "bf16")
    assert checkpoint(done)["model"]["segments"].device.type == DEVICE  # where nobody maps it
    saved = vit.load_file(done / "checkpoint.pt")
    moments = [value for state in saved["optimizer"]["state"].values() for value in state.values()]
    assert {tensor.device.type for tensor in [*saved["model"].values(), *moments]} == {"cpu"}

    words = ("--method", "mixedae", "--data", folder, "--precision", "bf16")
    for file in ("checkpoint.pt", "encoder.pt"):
        run(*words, "--out", tmp_path / file, "--epochs", 1, "--init", done / file)
        assert math.isfinite(rows(tmp_path / file)[-1]["loss"])
    for steps, device in ((3, DEVICE), (6, "cpu"), (10, DEVICE)):
        run(*words, *TEN_STEPS, "--out", tmp_path / "run", "--max-steps", steps, "--device", device)
    assert list(losses(tmp_path / "run")) == list(range(1, 11))
    run(*words, "--out", done, "--device", DEVICE, "--draw", *sorted(folder.glob("val/*/*.png"))[:4])


PROGRAMS = (
    "finetune --protocol finetune --precision fp16",
    "finetune --protocol linear --cache-features --precision fp16",
    "finetune --protocol attentive --cache-features --precision bf16",
    "dense --task segment --head uper --head-width 8 --precision bf16",
    "dense --task segment --head linear --precision fp16",
    "dense --task detect --neck fpn --image-size 32 --head-width 16 --proposals 20 --rois 16",
)


@pytest.mark.parametrize("words", PROGRAMS)
def test_protocols_and_tasks_train_and_evaluate(words, folder, tmp_path, trained, monkeypatch):
    """Of an encoder that the card has trained."""
    if "detect" in words:
        pytest.importorskip("pycocotools", reason="pycocotools is optional, and computes COCO's metric")
    monkeypatch.setattr(dense, "DRAWN", {"train": 16, "val": 4})
    program, *flags = words.split()
    encoder = trained("mixedae", "--precision", "bf16") / "encoder.pt"
    flags += ["--encoder", encoder, "--data", folder if program == "finetune" else "shapes"]
    quick = f"--device {DEVICE} --workers 0 --epochs 2 --batch-size 8 --log-every 1".split()
    start = functools.partial(run, main=(finetune if program == "finetune" else dense).main, defaults=quick)
    start(*flags, "--out", tmp_path / "run")
    start("--evaluate", tmp_path / "run", "--out", tmp_path / "again")
    assert losses(tmp_path / "run")
    for out in ("run", "again"):
        results = json.loads((tmp_path / out / "results.json").read_text())
        assert results and all(0 <= value <= 100 for value in results.values())


# ------------------------------------------------------------------------------------------------------------
# Two processes on one card, under gloo: NCCL wants a card for each
# ------------------------------------------------------------------------------------------------------------
TWO_PROCESSES = """
import sys, torch, torch.distributed as dist
root, place, data, out = sys.argv[1:]
sys.path[:0] = [root, root + "/tests"]
import dense, train
from conftest import TINY
from mixedae import draw_sources

device = torch.device(place)
torch.backends.cudnn.allow_tf32 = False
dist.init_process_group("gloo")

def parse(*flags):
    sizes = (*TINY, "--batch-size", "4", "--accumulate", "2")
    return train.parse_args(["--method", "mixedae", *sizes, *flags])

# The gradient of 2 processes x 2 micro-batches x 4 images is that of one process with all 16.
for precision, tolerance in (("fp32", 1e-4), ("bf16", 5e-2)):
    args = parse("--precision", precision)
    run = train.build_run(args, {"images": 16, "classes": []}, device)
    torch.manual_seed(args.seed)
    alone = train.METHODS["mixedae"](args).to(device)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8).to(device)
    sources = draw_sources(4, 4, 16, "cpu").to(device)
    with train.autocast(args, device):
        loss, _ = alone(*run.prepare(images, None), sources)
    loss.backward()

    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    real, masks = run.model.predict, iter(sources.split(1)[mine])
    run.model.predict = lambda images, mask: real(images, next(masks))
    train.forward_backward(run, [(part, None) for part in images.split(4)[mine]], 0)
    for (name, p), q in zip(run.model.named_parameters(), alone.parameters()):
        if p.requires_grad:
            assert (p.grad - q.grad).norm() <= tolerance * q.grad.norm(), (precision, name)

# A run that stops and goes on sees the images of one that never stops.
seen = {}
forward_backward = train.forward_backward

def watch(run, micro_batches, step):
    seen.setdefault(run.args.out, {})[step] = [images.sum().item() for images, _ in micro_batches]
    return forward_backward(run, micro_batches, step)

train.forward_backward = watch
flags = ["--precision", "bf16", "--epochs", "4", "--log-every", "1", "--val-images", "8", "--data", data]
for name, more in (("whole", []), ("cut", ["--max-steps", "3"]), ("cut", ["--workers", "2"])):
    assert train.pretrain(parse(*flags, "--out", f"{out}/{name}", *more), sys.argv, device) == 0
assert seen[f"{out}/whole"] == seen[f"{out}/cut"] and len(seen[f"{out}/cut"]) == 8

# On CUDA the BatchNorms of dense.py are synchronised. (Its main leaves the process group.)
dense.DRAWN.update(train=8, val=4)
train.start_processes = lambda args: device
flags = "--task segment --head-width 8 --workers 0 --epochs 1 --batch-size 2 --encoder".split()
dense.main([*flags, f"{out}/whole/encoder.pt", "--out", f"{out}/segment"])
print("all agree")
"""


def test_two_processes_on_one_card_do_what_one_does(folder, tmp_path):
    """The gradients' tolerances: in fp32 sums in another order; in bf16 each micro-batch's gradient is
    rounded before they are averaged, and TopK may choose the other of two keys that nearly tie."""
    (tmp_path / "script.py").write_text(TWO_PROCESSES)
    place = "cuda:0" if DEVICE == "cuda" else "cpu"
    output = to_the_end(*TORCHRUN, *map(str, (tmp_path / "script.py", ROOT, place, folder, tmp_path)))
    assert output.count("all agree") == 2 and (tmp_path / "segment" / "results.json").exists()
    assert losses(tmp_path / "cut") == pytest.approx(losses(tmp_path / "whole"), rel=0.01)
