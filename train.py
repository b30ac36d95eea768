"""Pre-train any of the methods: one loop for one process and for many, on CPU and on CUDA.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> **train** -> finetune.

    python train.py --method mixedae                                   # drawn images, a laptop, no network
    python train.py --method mae --data path/to/images --size base     # any folder
    torchrun --nproc_per_node=8 train.py --method mixedae ...          # the same lines, 8 processes
    python train.py --method mixedae -h                                # the flags of a method, with their defaults
    python train.py --method mixedae --out runs/mixedae --draw a.jpg b.jpg c.jpg d.jpg      # a run's pictures of these images

A run lives in its folder (--out, default runs/<method>): args.json, log.jsonl, checkpoint.pt, encoder.pt, pictures/. The same
command again resumes it; on CPU, with the same number of processes, the result is bit for bit that of a run never stopped.
Exit codes: 0 finished (or finished already), 1 failed while running, 2 a mistake in flags or files, 128 + n saved after signal n.
"""
import argparse
import contextlib
import gc
import math
import os
import resource
import shlex
import signal
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

from cae import CAE, DVAE
from cae import from_official as from_official_cae
from data import (Batches, BrokenImages, RunFolder, Samples, add_data_args, centred, decode, heat_map, loader, normalize,
                  object_awareness, open_sets, outline, patch_scatter, picture_sheet, seed_torch, some_images, train_transform)
from mixedae import MixedAE
from mrmae import MAE, MRMAE, from_published
from vit import SIZES, UserError, ViT, add_size_args, cls_attention, fill, load_encoder, load_file, recompute, resolve_sizes, unpack_encoder

# A method is an nn.Module with: add_args(parser), static; __init__(args); encoder, a ViT; forward(images) -> loss (), {name: ()};
# visualize(images) -> pictures (at most B, len(panels), 3, H, W), {name: number, or a list with one a layer}; panels, a list of titles;
# export() -> what encoder.pt holds. One that trains no encoder names its file in `export_file`; one with sizes of its own has `sizes`.
# Before each step the loop sets `progress`, the share of the run that is done, for methods with schedules of their own. --recompute and
# --compile are for modules with a `drop_path`: the blocks.
# A new one: write its file, add it here.
METHODS = {"mae": MAE, "mrmae": MRMAE, "mixedae": MixedAE, "cae": CAE, "dvae": DVAE}
LAPTOP_LR = 2e-3  # ours, for the micro model; the papers' rates are --blr, scaled with the batch
FREE_FLAGS = {"out", "data_root", "download", "workers", "device", "compile", "recompute", "log_every", "save_every", "benchmark",
              "draw", "beside", "segment_export", "batch_size", "accumulate"}  # may differ when a run resumes (the last two if B' stays)
RANGES = {**dict.fromkeys(("epochs", "batch_size", "accumulate", "log_every"), (1, math.inf)), **dict.fromkeys(("lr", "blr", "clip_grad"), (1e-12, math.inf)),
          **dict.fromkeys(("workers", "val_images", "save_every", "warmup_epochs", "weight_decay", "min_lr"), (0, math.inf)), "beta2": (0, 1), "seed": (0, 2**63)}
BAD_STEPS = 10  # ours: as many non-finite steps in a row stop the run


# --------------------------------------------------------------------------------------------------------------------
# Flags
# --------------------------------------------------------------------------------------------------------------------
class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} -h lists the flags)")


def add_run_args(parser):
    """The flags of any run, pre-training or not."""
    add = parser.add_argument_group("training").add_argument
    add("--out", help="the run's folder [runs/METHOD; finetune.py: runs/METHOD-PROTOCOL-DATA]")
    add("--epochs", type=int, default=3, help="passes over the set (pre-training: ours; the papers have 300 to 1600)")
    add("--warmup-epochs", type=float, default=1, help="linear warm-up, then cosine, both per step (pre-training: ours; MAE and MixedAE have 40)")
    add("--batch-size", type=int, default=32, help="images per process and micro-step (ours)")
    add("--accumulate", type=int, default=1, help="micro-steps per optimizer step; B' = batch size x processes x this")
    add("--blr", type=float, help="base learning rate, scaled: lr = blr x B' / 256 (the papers' numbers are of this kind)")
    add("--lr", type=float, help="absolute learning rate, wins over --blr [neither: ours, for a laptop]")
    add("--clip-grad", type=float, metavar="NORM", help="scale gradients down to this norm (CAE's code: 3) [off, as in MAE's]")
    add("--weight-decay", type=float, default=0.05, help="not on biases and one-dimensional parameters (MAE's code; MixedAE Sec. 4.1: as MAE)")
    add("--seed", type=int, default=0, help="of initialisation, order, augmentation, masks")
    add("--precision", choices=("auto", "bf16", "fp16", "fp32"), default="auto", help="auto: on CUDA bf16, or fp16 on older cards; on CPU fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a card")
    add("--compile", action="store_true", help="torch.compile the blocks (needs a C++ compiler on CPU)")
    add("--recompute", action="store_true", help="activation checkpointing: less memory, about a third more time")
    add("--log-every", type=int, default=50, metavar="STEPS", help="a log row each STEPS steps (ours), and at each epoch's end")
    add("--save-every", type=int, default=0, metavar="STEPS", help="save each STEPS steps too; always each epoch and ten minutes")


def check_ranges(parser, args, ranges=RANGES):
    """One clear line for a number that cannot be."""
    for flag, (least, bound) in ranges.items():
        value = getattr(args, flag, None)
        if value is not None and not least <= value < bound:  # so written, NaN is refused too
            parser.error(f"--{flag.replace('_', '-')} {value}: out of range, it must be at least {least} and below {bound}")
    if args.image_size and len(args.image_size) > 2:
        parser.error(f"--image-size takes one number or two (H W), not {len(args.image_size)}")
    if hasattr(args, "crop_scale") and not 0 < args.crop_scale[0] <= args.crop_scale[1] <= 1:
        parser.error(f"--crop-scale {args.crop_scale[0]} {args.crop_scale[1]}: needs 0 < MIN <= MAX <= 1")


def parse_args(argv=None, base=()):
    """Flags -> args with every size explicit. Two phases, --method first, because each method adds flags and defaults of its own.

    base: an earlier command whose flags are taken over where this method knows them (--benchmark).
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    first = Parser(prog="train.py", add_help=False, allow_abbrev=False)
    first.add_argument("--method", choices=METHODS, default="mixedae", help="what to train")
    method = first.parse_known_args(argv)[0].method

    parser = Parser(prog=f"train.py --method {method}", parents=[first], allow_abbrev=False, description=__doc__.splitlines()[0],
                    formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_run_args(parser)
    add = parser.add_argument_group("pre-training").add_argument
    add("--min-lr", type=float, default=0.0, help="where the cosine ends (MAE's code: 0; CAE's: 1e-5)")
    add("--beta2", type=float, default=0.95, help="AdamW's second beta; the first is .9 (MAE's code; MixedAE Sec. 4.1: as MAE)")
    add("--init", metavar="FILE", help="start from these weights alone: a checkpoint.pt, an encoder.pt or a published file of MAE or MCMAE (for --method cae of CAE)")
    add("--val-images", type=int, default=512, help="images of the val set for val_loss (ours); 0: none")
    add("--benchmark", nargs="*", metavar="OTHER", help="time the step and stop, interleaved with OTHER methods ('mae --norm-pix' in quotes)")
    add("--draw", nargs="+", metavar="IMAGE", help="draw pictures of these images with the run in --out, and stop")
    add("--beside", nargs="+", metavar="ENCODER", help="with --draw: also where the CLS token of these encoder.pt files looks (MR-MAE Fig. 3)")
    add_data_args(parser)
    has_vit = not hasattr(METHODS[method], "export_file")  # a tokenizer trains none
    add_size_args(parser, encoder=has_vit, decoder=has_vit)
    METHODS[method].add_args(parser)

    args = parser.parse_args(argv, parser.parse_known_args(base)[0])
    args.out = args.out or f"runs/{method}"
    if args.beside and not args.draw:
        parser.error("--beside goes with --draw")
    check_ranges(parser, args)
    resolve_sizes(args, getattr(METHODS[method], "sizes", SIZES))
    return args


# --------------------------------------------------------------------------------------------------------------------
# Processes, precision, randomness
# --------------------------------------------------------------------------------------------------------------------
def start_processes(args):
    """Join the process group of torchrun, or make one of this process alone -> device."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA card is usable here; use --device cpu")
    cuda, local_rank = args.device != "cpu" and torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if cuda else torch.device("cpu")
    if cuda and local_rank >= torch.cuda.device_count():
        raise UserError(f"process {local_rank} of this machine has no card: there are {torch.cuda.device_count()}; lower --nproc_per_node")
    if cuda:
        torch.cuda.set_device(device)
    backend = "nccl" if cuda else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return device


def amp_dtype(args, device):
    """--precision -> the dtype of autocast, or None for fp32."""
    if args.precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)


def autocast(args, device):
    dtype = amp_dtype(args, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


# --------------------------------------------------------------------------------------------------------------------
# Optimization
# --------------------------------------------------------------------------------------------------------------------
def lr_at(epoch, lr, warmup_epochs, epochs, min_lr=0.0):
    """Learning rate at a fractional epoch: linear from 0 during warm-up, then half a cosine down to min_lr (MAE's; MixedAE Sec. 4.1)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * (epoch - warmup_epochs) / (epochs - warmup_epochs)))


def build_optimizer(model, args):
    """Fused AdamW; no weight decay on biases and one-dimensional parameters (MAE's rule: tokens do decay, frozen tables are out)."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
    decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), fused=True)


def wrap(model, args, device, *example):
    """DDP around the model, for one process too, so that there is one path. Applies --compile and --recompute. example: what it is called with."""
    for block in [m for m in model.modules() if hasattr(m, "drop_path")]:
        if args.recompute:
            recompute(block)
        if args.compile:
            torch._dynamo.config.recompile_limit = 64  # a graph for each block, as each has its own drop path
            block.compile(dynamic=False)  # in place: the names in the state dict stay
    ddp = DistributedDataParallel(model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)
    if dist.get_world_size() > 1:  # DDP orders its buckets anew after the first step, which changes sums: a resumed run would differ
        buffers = [buffer.clone() for buffer in model.buffers()]  # a BatchNorm would remember the example
        with autocast(args, device):
            loss, _ = ddp(*example)
        loss.backward()
        ddp.zero_grad()
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return ddp


# --------------------------------------------------------------------------------------------------------------------
# Starting from a file
# --------------------------------------------------------------------------------------------------------------------
def load_weights(model, path):
    """--init: weights alone, from a checkpoint.pt, an encoder.pt or a published file of MAE or MCMAE, for CAE of CAE -> what was filled (see vit.fill)."""
    state = load_file(path)
    if not hasattr(model, "encoder"):
        raise UserError(f"--init {path}: is for methods that train an encoder")
    try:
        if "state_dict" in state:  # encoder.pt
            weights, shape = {"encoder." + name: value for name, value in state["state_dict"].items()}, state.get("config", {})
        elif "global_batch" in state:  # checkpoint.pt
            weights, shape = state["model"], state["args"]
        else:
            weights, shape = (from_official_cae if isinstance(model, CAE) else from_published)(state), {}
        weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
    except (AttributeError, KeyError, TypeError):  # lists, numbers ... where dicts by name should be
        raise UserError(f"--init {path}: holds no weights by name") from None
    return fill(model, weights, shape, f"--init {path}")


def load_checkpoint(path, args):
    """checkpoint.pt as `save` wrote it, of the same method as `args`."""
    saved = load_file(path)
    if not isinstance(saved, dict) or not {"model", "optimizer", "scaler", "step", "sums", "args", "global_batch"} <= saved.keys():
        raise UserError(f"{path}: not a checkpoint of train.py; move it away or choose another --out")
    if saved["args"]["method"] != args.method:
        raise UserError(f"{path} was made with method {saved['args']['method']} (now {args.method}); use that, or another --out")
    return saved


def resume(run, free_flags=FREE_FLAGS):
    """checkpoint.pt, if there is one, into the run -> the sums of the unfinished log interval. free_flags may have changed."""
    path = Path(run.args.out) / "checkpoint.pt"
    if not path.exists():
        return {}
    saved = load_checkpoint(path, run.args)
    then = {**saved["args"], "global batch": saved["global_batch"]}
    now = {**vars(run.args), "global batch": run.batches.global_batch}
    changed = [f"{key.replace('_', '-')} {then.get(key)} (now {now.get(key)})"
               for key in sorted((then.keys() | now.keys()) - free_flags) if then.get(key) != now.get(key)]
    if changed:
        raise UserError(f"{path} was made with other flags: {', '.join(changed)}; use those, or another --out for a new run")
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    if run.scaler.is_enabled() and saved["scaler"]:
        run.scaler.load_state_dict(saved["scaler"])
    run.batches.start = saved["step"]
    return saved["sums"]


# --------------------------------------------------------------------------------------------------------------------
# The loop
# --------------------------------------------------------------------------------------------------------------------
def peak_memory_mb(device, restart=False):
    """Peak memory of the card, or of this process on CPU. restart: forget it and start from what is in use now."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if restart:
        with contextlib.suppress(OSError):  # Linux alone can
            Path("/proc/self/clear_refs").write_text("5")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage speaks of bytes there, of KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


@dataclass
class Run:
    """What the functions of a run share."""

    args: argparse.Namespace
    device: torch.device
    batches: Batches  # knows the global batch B', the steps of an epoch and of the run, and where to start
    model: torch.nn.Module  # the method itself
    ddp: DistributedDataParallel  # the same, wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing but under fp16
    lr: float  # the peak of the schedule
    folder: RunFolder | None = None  # on rank 0
    inputs: Callable = lambda images, labels: (normalize(images),)  # a micro-batch -> what the model is called with
    min_lr: float = 0.0  # the end of the schedule
    schedule: Callable = lr_at  # (epoch, lr, warm-up epochs, epochs, min_lr) -> rate


def assemble(args, model, optimizer, example, length, laptop_lr, device, **more):
    """A run of a model over a set of `length` images. example: what the model is called with; more: further fields of Run."""
    batches = Batches(length, args.batch_size, args.accumulate, dist.get_rank(), dist.get_world_size(), args.seed, args.epochs)
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)
    # MAE's rule, and MixedAE's (Sec. 4.1): lr = base lr x B' / 256
    lr = args.lr or (args.blr * batches.global_batch / 256 if args.blr else laptop_lr)
    return Run(args, device, batches, model, wrap(model, args, device, *example), optimizer, scaler, lr, **more)


def build_run(args, length, device):
    """A run of --method."""
    torch.manual_seed(args.seed)  # every process starts from the same weights
    model = METHODS[args.method](args).to(device)
    example = torch.zeros(args.batch_size, 3, *args.image_size, device=device)
    return assemble(args, model, build_optimizer(model, args), [example], length, LAPTOP_LR, device, min_lr=args.min_lr)


def write_export(run):
    return run.folder.write(getattr(run.model, "export_file", "encoder.pt"), lambda file: torch.save(run.model.export(), file))


def save(run, step, sums):
    """encoder.pt or tokenizer.pt (transfers) and checkpoint.pt (resumes), after `step` steps. In this order: a kill between the two is mended by resuming."""
    saved = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "scaler": run.scaler.state_dict(), "step": step,
             "sums": sums, "args": vars(run.args), "global_batch": run.batches.global_batch}
    if not hasattr(run.model, "export") or write_export(run):  # a classifier has nothing to export
        run.folder.write("checkpoint.pt", lambda file: torch.save(saved, file))


def forward_backward(run, micro_batches, step):
    """Gradients of one optimizer step: micro-batches (uint8 images, labels) -> {"loss": (), each loss term: (), "grad_norm": ()}, on the device."""
    run.optimizer.zero_grad()
    sums = {}
    for i, micro_batch in enumerate(micro_batches):
        seed_torch(run.args.seed, "step", step, i, dist.get_rank())  # masks, mixing and all other draws of this micro-step
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last else run.ddp.no_sync():  # processes exchange gradients once a step
            with autocast(run.args, run.device):
                loss, metrics = run.ddp(*run.inputs(*micro_batch))
            run.scaler.scale(loss / len(micro_batches)).backward()
        for name, value in {"loss": loss.detach(), **metrics}.items():
            sums[name] = sums.get(name, 0) + value / len(micro_batches)
    run.scaler.unscale_(run.optimizer)
    trained = [p for p in run.model.parameters() if p.grad is not None]
    sums["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if run.args.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(trained, run.args.clip_grad, sums["grad_norm"])
    return sums


def mean_over_processes(values, device):
    """{name: () tensor or number} -> {name: float}, averaged. The one synchronisation of a step; a NaN anywhere shows everywhere."""
    vector = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()])
    dist.all_reduce(vector)
    return dict(zip(values, (vector / dist.get_world_size()).tolist()))


def optimizer_step(run, micro_batches, step, stop_asked):
    """One step on this process's micro-batches -> (values as floats, finite). A step that is not finite changes no weight."""
    lr = run.schedule(step / run.batches.steps_per_epoch, run.lr, run.args.warmup_epochs, run.args.epochs, run.min_lr)
    for group in run.optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)  # finetune.py's layer-wise decay
    run.model.progress = step / run.batches.steps
    values = forward_backward(run, micro_batches, step)
    values = mean_over_processes({**values, "stop": float(stop_asked)}, run.device)
    finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
    if finite or run.scaler.is_enabled():  # the scaler skips such a step itself and lowers its scale
        run.scaler.step(run.optimizer)
        run.scaler.update()
    return values, finite


@contextlib.contextmanager
def inference(args, device):
    """For testing and pictures: autocast as in training, but without torch.compile, whose limit of graphs is for the training step."""
    with torch.no_grad(), autocast(args, device), torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext():
        yield


def evaluate(run, images):
    """Mean loss over whole batches of uint8 val images, with the same masks each time; each process takes every world-th batch."""
    size, total = run.args.batch_size, torch.zeros(2, device=run.device)  # sum, count
    run.model.eval()  # no drop path
    for j in range(dist.get_rank(), len(images) // size, dist.get_world_size()):
        seed_torch(run.args.seed, "val", j)
        with inference(run.args, run.device):
            loss, _ = run.model(normalize(images[j * size :][:size].to(run.device)))
        total += torch.stack([loss.float(), torch.ones_like(loss, dtype=torch.float32)])
    run.model.train()
    dist.all_reduce(total)
    return (total[0] / total[1]).item()


def look(run, images):
    """The method's pictures of uint8 images (B, 3, H, W), with the same masks each time, and its numbers, such as accuracy."""
    seed_torch(run.args.seed, "look")
    run.model.eval()
    with inference(run.args, run.device):
        seen = run.model.visualize(normalize(images.to(run.device)))
    run.model.train()
    return seen


def illustrate(run, images, regions=None):
    """The method's pictures of the first 64 uint8 images (B, 3, H, W), and as one more panel the attention of CLS (MixedAE Fig. 5) in
    the encoder that transfers, on clean images, with an outline that holds half of it (CAE Fig. 4) -> panels (B, k, 3, H, W), their
    titles, numbers.

    regions: what the images show, as `some_images` gives it; then the numbers say how much of that attention falls on the objects.
    """
    panels, numbers = look(run, images[:64])
    if not hasattr(run.model, "encoder") or not run.model.encoder.first:  # no CLS, no attention of it
        return panels.cpu(), run.model.panels, numbers
    encoder = unpack_encoder(run.model.export())[0].to(run.device)
    batches = (images[:64] if regions is None else images).split(run.args.batch_size)  # all for the number, 64 for the pictures
    maps = torch.cat([cls_attention(encoder, normalize(batch.to(run.device))) for batch in batches]).cpu()  # (B, h, w)
    if regions is not None:
        numbers["object_attention"], numbers["object_area"] = object_awareness(maps, regions > 0)
    heat = attention_panel(maps[: len(panels)], images[: len(panels)])
    return torch.cat([panels.cpu(), heat], dim=1), [*run.model.panels, "attention of CLS,\nblue: half of it"], numbers


def attention_panel(maps, images):
    """Attention maps (B, h, w) over uint8 images (B, 3, H, W), with an outline that holds half of each -> one panel, (B, 1, 3, H, W)."""
    return outline(maps, heat_map(maps, images.cpu() / 255)).unsqueeze(1)


@torch.no_grad()
def draw_patches(run, name, images, regions):
    """A picture of the patch features of uint8 images by what the patches show, beside those of random weights (CAE Fig. 6)."""
    trained, sheet = unpack_encoder(run.model.export())[0], Image.new("RGB", (680, 360))
    for i, (encoder, title) in enumerate(((trained, "trained, PCA"), (ViT(**trained.config), "random weights, PCA"))):
        encoder.to(run.device).eval()
        features = torch.cat([encoder.features(normalize(batch.to(run.device)))["patches"].cpu() for batch in images.split(run.args.batch_size)])
        sheet.paste(patch_scatter(features.unflatten(1, encoder.grid), regions, title), (340 * i, 0))
    run.folder.picture(name, sheet)


class Meter:
    """What a log row averages: the metrics of the steps since the last row, images per second, the share of time spent waiting for data."""

    def __init__(self, step, sums=()):
        self.step, self.started, self.waited, self.sums = step, time.perf_counter(), 0.0, dict(sums)

    def add(self, values):
        for name, value in {**values, "count": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def row(self, run, done):
        seconds = time.perf_counter() - self.started
        means = {name: total / self.sums["count"] for name, total in self.sums.items() if name != "count"}
        return {"step": done, "epoch": done / run.batches.steps_per_epoch, "lr": max(group["lr"] for group in run.optimizer.param_groups), **means,
                "images_per_s": (done - self.step) * run.batches.global_batch / seconds, "data_wait": self.waited / seconds,
                "memory_mb": peak_memory_mb(run.device)}


def report(run, row, images, epoch_ends, held_out):
    """A log row, completed and written: the method's numbers of `images`; at the end of an epoch val_loss and the pictures as well.

    held_out: (uint8 val images, regions or None), or None: then the pictures are of `images`.
    """
    if epoch_ends and held_out:
        row["val_loss"] = evaluate(run, held_out[0])
    if not run.folder:
        return
    row |= look(run, images[:64])[1]
    if not epoch_ends:
        return run.folder.log(row)
    epoch = round(row["epoch"])
    panels, titles, numbers = illustrate(run, *(held_out or (images,)))
    row = {**numbers, **row}  # the row's own accuracy, of training images, stays
    run.folder.picture(f"epoch-{epoch:04d}.png", picture_sheet(panels[:8], titles))
    if held_out and held_out[1] is not None and hasattr(run.model, "encoder"):
        draw_patches(run, f"patches-{epoch:04d}.png", *held_out)
    end_epoch(run, row)


def end_epoch(run, row):
    """Rank 0: the last log row of an epoch, written, drawn and told."""
    run.folder.log(row)
    run.folder.curves()
    shown = (f"{name} {value:.4g}" for name, value in row.items() if isinstance(value, float) and name != "epoch")
    tqdm.write(f"epoch {round(row['epoch'])}/{run.args.epochs}: {', '.join(shown)}")


def on_device(batch, device):
    """A tensor, or lists and dicts of tensors (objects, for detection), moved."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: on_device(value, device) for key, value in batch.items()}
    return [on_device(value, device) for value in batch]


def run_steps(run, stream, sums, stop, broken, report):
    """The loop: the steps from run.batches.start on, with the batches of `stream` -> steps done.

    sums: totals of a log interval that a stop cut in two. stop: a list, empty until a signal comes. report(run, row, images, epoch_ends)
    writes a log row; every process calls it.
    """
    args, folder, start = run.args, run.folder, run.batches.start
    meter, bad_in_row, saved_at = Meter(start, sums), 0, time.perf_counter()
    with tqdm(total=run.batches.steps, initial=start, unit="step", disable=folder is None, mininterval=1.0) as bar:
        for done in range(start + 1, run.batches.steps + 1):  # steps done once this one is
            asked, micro_batches = time.perf_counter(), []
            for _ in range(args.accumulate):
                images, labels, names = next(stream)
                broken.count(images, names)
                micro_batches.append(on_device((images, labels), run.device))
            meter.waited += time.perf_counter() - asked

            values, finite = optimizer_step(run, micro_batches, done - 1, bool(stop) or broken.too_many)
            leave = values.pop("stop") > 0
            if finite:
                bad_in_row = 0
                meter.add(values)
            elif not run.scaler.is_enabled() or run.scaler.get_scale() < 1:  # fp16's own search for a scale does not count
                bad_in_row += 1
                if bad_in_row == BAD_STEPS:
                    raise UserError(f"{BAD_STEPS} steps in a row, up to step {done}, had a loss or gradient that is not finite; the last good "
                                    f"checkpoint stays in {args.out}; try a lower learning rate (now {run.lr:g}) or --precision fp32", code=1)

            bar.update()
            epoch_ends = done % run.batches.steps_per_epoch == 0
            if (done % args.log_every == 0 or epoch_ends) and meter.sums:
                row = meter.row(run, done)
                if folder:
                    bar.set_postfix_str(f"loss {row['loss']:.4f}, {row['images_per_s']:.0f} images/s")
                report(run, row, micro_batches[-1][0], epoch_ends)
                meter = Meter(done)
            due = epoch_ends or time.perf_counter() - saved_at > 600 or (args.save_every and done % args.save_every == 0)
            must_save = leave or done == run.batches.steps or (due and not bad_in_row)
            if folder and must_save:
                save(run, done, meter.sums)
                saved_at = time.perf_counter()
            if leave:
                break
    return done


def in_turn(args, open_them):
    """open_them(); with --download one process of each machine goes first."""
    later = args.download and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        dist.barrier()
    sets = open_them()
    if args.download and not later:
        dist.barrier()
    return sets


def train(args, argv, device):
    """One run, from its flags to its last checkpoint -> exit code."""
    train_set, val_set = in_turn(args, partial(open_sets, args))
    folder = RunFolder(args.out) if dist.get_rank() == 0 else None
    run = build_run(args, len(train_set), device)
    run.folder, batches, held_out = folder, run.batches, None
    if args.init and not (Path(args.out) / "checkpoint.pt").exists():
        filled = load_weights(run.model, args.init)
        if folder:
            print(f"--init {args.init}: fills {filled}")
    sums = resume(run)
    dist.barrier()  # all have read the checkpoint before rank 0 writes the next
    done = batches.start
    if done == batches.steps:
        if folder:  # again, because --segment-export may have changed
            write_export(run)
        farewell(run)
        return int(bool(folder and folder.failed))
    if val_set and len(val_set) >= args.batch_size and args.val_images >= args.batch_size:
        held_out = some_images(val_set, args.image_size, args.val_images)
    if folder:
        folder.describe(args, argv)
        folder.cut_log(done)
        announce(run, held_out)

    code = work(run, Samples(train_set, train_transform(args), args.seed), sums, partial(report, held_out=held_out))
    if not code:
        farewell(run)
    return code


def work(run, samples, sums, report):
    """A run from its first step here to its last one: loader, signals, loop -> exit code."""
    batches, stop, broken = run.batches, [], BrokenImages()
    signals = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]  # the loader's processes inherit this: they must outlive the save
    try:
        stream = iter(loader(samples, batches, run.args.workers, run.device.type == "cuda"))
        for number in signals:
            signal.signal(number, lambda number, frame: stop.append(number))  # only a note: the loop finishes its step, saves and returns
        done = run_steps(run, stream, sums, stop, broken, report)
    finally:
        for number, handler in zip(signals, before):
            signal.signal(number, handler)
    if run.folder and done < batches.steps:
        print(f"stopped after step {done} of {batches.steps}; {run.args.out} holds the last checkpoint, and the same command resumes from it", flush=True)
    if broken.too_many:
        raise broken.error()
    if run.folder and run.folder.failed:
        return 1
    if done == batches.steps:
        return 0
    return 128 + (stop[0] if stop else signal.SIGTERM)  # where another process got the signal, its number is not known here


def learning_rate(run):
    """The rate, where it comes from, and a warning if it will never be reached: for the line that starts a run."""
    args = run.args
    rule = "--lr" if args.lr else f"blr {args.blr:g} x {run.batches.global_batch} / 256" if args.blr else "our default"
    short = f"; the warm-up of {args.warmup_epochs:g} epochs is longer than the run, give --warmup-epochs" if args.warmup_epochs > args.epochs else ""
    return f"learning rate {run.lr:g} ({rule}{short})"


def announce(run, held_out):
    """What is about to run, with the numbers that users ask for first."""
    args, batches, world = run.args, run.batches, dist.get_world_size()
    precision = str(amp_dtype(args, run.device) or torch.float32).removeprefix("torch.")
    val = "no val set of a batch or more, so no val_loss" if held_out is None else f"val_loss on {len(held_out[0])} images"
    print(f"{args.method}: {sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6:.2f} M parameters, {precision}, {world} x {run.device}\n"
          f"batch: {args.batch_size} images x {world} processes x {args.accumulate} accumulated = {batches.global_batch}; {learning_rate(run)}\n"
          f"data: {args.data}, {batches.length} images, {val}; {args.epochs} epochs x {batches.steps_per_epoch} steps, starting at step {batches.start}", flush=True)


def farewell(run):
    """The last line of a finished run: what there is now, and what to run next."""
    args, steps = run.args, run.batches.steps
    if not run.folder:
        return
    made = getattr(run.model, "export_file", "encoder.pt")
    following = (f"Predict its ids: python train.py --method cae --target dvae:{args.out}/tokenizer.pt --out {args.out}-cae" if made == "tokenizer.pt" else
                 f"What is it worth? python finetune.py --encoder {args.out}/encoder.pt --cache-features")
    print(f"{'finished' if run.batches.start < steps else 'finished already'}: {args.out} holds {made} (what transfers), checkpoint.pt, "
          f"log.jsonl and pictures/. {following} --data {args.data}", flush=True)


# --------------------------------------------------------------------------------------------------------------------
# --draw
# --------------------------------------------------------------------------------------------------------------------
def draw(args, argv, device):
    """--draw: the pictures of a run, as at the end of an epoch, for given images; a run that is going on is not disturbed."""
    if len(args.draw) > 64:
        raise UserError(f"--draw: {len(args.draw)} images are too many for a sheet; give 64 at most")
    folder = Path(args.out)
    saved = load_checkpoint(folder / "checkpoint.pt", args)
    run_args = argparse.Namespace(**{**vars(args), **saved["args"], "compile": False})  # flags that are newer than the run have their defaults
    run = build_run(run_args, saved["global_batch"] * dist.get_world_size(), device)  # length: any set of a batch or more
    run.model.load_state_dict(saved["model"])
    images = []
    for file in args.draw:
        try:
            images.append(centred(run_args.image_size)(decode(file)))
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            raise UserError(f"--draw {file}: cannot be read as an image ({(str(error) or 'it is empty').splitlines()[0]})") from None
    images = torch.stack(images)
    panels, titles, numbers = illustrate(run, images)
    if len(panels) < len(images):
        raise UserError(f"--draw: of {len(images)} images the last {len(images) - len(panels)} make no whole group; give {len(panels)}")
    for path in args.beside or ():
        encoder, info = load_encoder(path)
        if not encoder.first:
            raise UserError(f"--beside {path}: has no class token, so there is no attention of it")
        seen = v2.functional.resize(images.to(device), info["config"]["image_size"], antialias=True)  # each at the size that it was trained at
        maps = cls_attention(encoder.to(device), normalize(seen, info["mean"], info["std"])).cpu()
        panels, titles = torch.cat([panels, attention_panel(maps, images)], dim=1), [*titles, f"attention of CLS,\n{info['method']}"]
    if dist.get_rank() == 0:
        path = folder / "pictures" / f"draw-{Path(args.draw[0]).stem}.png"
        try:
            path.parent.mkdir(exist_ok=True)
            picture_sheet(panels, titles).save(path)
        except OSError as error:
            raise UserError(f"--draw: {path} cannot be written ({error.strerror})") from None
        print(f"{path}: step {saved['step']}{''.join(f', {name} {value:.4g}' for name, value in numbers.items() if isinstance(value, float))}", flush=True)
    return 0


# --------------------------------------------------------------------------------------------------------------------
# --benchmark
# --------------------------------------------------------------------------------------------------------------------
def timed(function, device):
    """Seconds that one call takes, the device's queue included."""
    synchronize = getattr(torch, device.type).synchronize  # torch.cpu's does nothing
    synchronize()
    started = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - started


def benchmark(args, argv, device):
    """Time the real step of --method and of the OTHER methods in turns, beside a plain matrix product; prints medians of 10 rounds."""
    try:
        all_args = [args] + [parse_args(["--method", *shlex.split(other)], base=argv) for other in args.benchmark]
    except ValueError as error:
        raise UserError(f"--benchmark {' '.join(args.benchmark)}: {error}") from None
    steps, flops, memory = [], [], []
    for its_args in all_args:
        before = peak_memory_mb(device, restart=True)
        run = build_run(its_args, its_args.batch_size * its_args.accumulate * dist.get_world_size(), device)
        batch = torch.randint(0, 256, (its_args.batch_size, 3, *its_args.image_size), dtype=torch.uint8, device=device)
        steps.append(partial(optimizer_step, run, [(batch, None)] * its_args.accumulate, 0, False))  # at step 0 of a warm-up the rate is 0
        steps[-1]()
        memory.append(peak_memory_mb(device) - before)
        with FlopCounterMode(display=False) as counter:
            steps[-1]()
        flops.append(counter.get_total_flops())
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, size, size, device=device, dtype=amp_dtype(args, device) or torch.float32)
    products = 8  # in a row, so that one quiet moment does not stand for the machine
    rounds = [[timed(function, device) for function in (lambda: [a @ b for _ in range(products)], *steps)] for _ in range(10)]
    product_seconds, *step_seconds = zip(*rounds)
    rates = [products * 2 * size**3 / seconds for seconds in product_seconds]  # FLOP/s, round by round
    if dist.get_rank() == 0:
        print(f"matrix product of {size} x {size}: {statistics.median(rates) / 1e12:.3g} TFLOP/s ({a.dtype}); medians of {len(rounds)} rounds in turns")
        for name, its_args, seconds, f, m in zip([args.method, *args.benchmark], all_args, step_seconds, flops, memory):
            images, typical = its_args.batch_size * its_args.accumulate * dist.get_world_size(), statistics.median(seconds)
            share = statistics.median(f / s / rate for s, rate in zip(seconds, rates))
            ratio = statistics.median(s / first for s, first in zip(seconds, step_seconds[0]))
            print(f"{name}: {images / typical:.4g} images/s, {1000 * typical:.4g} ms/step of {images} images, {m:.0f} MB, {f / 1e9:.4g} GFLOP/step = "
                  f"{100 * share:.0f} % of the matrix product's rate, {ratio:.3f} x {args.method}'s time")
    return 0


# --------------------------------------------------------------------------------------------------------------------
def main(argv=None):
    """Parse, join the processes, train or time or draw, leave."""
    def what(args, argv, device):
        return (draw if args.draw else benchmark if args.benchmark is not None else train)(args, argv, device)

    run_program("train.py", argv, parse_args, what)


def run_program(name, argv, parse, what):
    """what(args, argv, device) -> exit code, between joining the processes and leaving them. Raises SystemExit for every exit code but 0."""
    argv = sys.argv[1:] if argv is None else list(argv)
    try:
        args = parse(argv)
        device = start_processes(args)
        code = what(args, argv, device)
        gc.collect()  # the DDP module goes before its process group, or gloo aborts now and then
        dist.barrier()
    except UserError as error:
        code = error.code
        if os.environ.get("RANK", "0") != "0":  # most mistakes are the same everywhere: let rank 0 say its line, then torchrun ends this one
            time.sleep(15)
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    except Exception:  # not re-raised: its frames would hold the loader, whose processes ignore the signal that ends them at exit
        traceback.print_exc()
        code = 1
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
