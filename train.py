"""Pre-train any of the methods: one loop for one process and for many, on CPU and on CUDA.

Reading order of the project: vit -> mrmae -> mixedae -> cae -> data -> **train** -> finetune -> dense.

    python train.py --method mixedae                                   # drawn images, a laptop, no network
    python train.py --method mae --data path/to/images --size base     # any folder
    torchrun --nproc_per_node=8 train.py --method mixedae ...          # the same lines, 8 processes
    python train.py --method mixedae -h                                # a method's flags and their defaults

How the functions call each other (finetune.py and dense.py come in at `run_loop`):

    main -> run_program -> pretrain -> open_sets, build_run      the images; model, optimizer and DDP in a Run
                                    -> run_loop -> resume        go on from checkpoint.pt, if there is one
                                                -> train_loop    **read this first**
    train_loop, in each step:  next(stream)        a batch
                               forward_backward    calls the method's `forward`; the gradients
                               scaler.step         the optimizer's update
                               save                now and then: encoder.pt and checkpoint.pt
                               write_row           now and then: calls test_pretraining, writes the log

A run lives in its folder (--out, default runs/<method>): args.json, log.jsonl, checkpoint.pt, encoder.pt,
pictures/. The same command again resumes it; on CPU, with the same number of processes, the result is bit for
bit that of a run that was never stopped. (On CUDA the order, the augmentation and the masks are the same, but
some kernels add in an order that varies.) Exit codes: 0 finished now or before, or stopped by --max-steps; 1
failed while running; 2 a mistake in flags or files; 128 + n saved and stopped after signal n. (A second
Ctrl-C exits with 130 at once and does not save. torchrun itself exits with 1 for every code but 0.)
"""

import argparse
import contextlib
import gc
import math
import os
import resource
import shlex
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from cae import CAE, DVAE
from cae import from_official as from_official_cae
from data import (
    MEAN,
    STD,
    STOP_SIGNALS,
    BrokenImages,
    ResumableBatchSampler,
    RunFolder,
    TrainDataset,
    add_data_args,
    add_statistics_args,
    available_cores,
    center_crop,
    check_data_args,
    curves,
    decode,
    fixed_images,
    heat_map,
    load_batches,
    normalize,
    object_awareness,
    open_sets,
    picture_sheet,
    seed_torch,
    train_transform,
)
from mixedae import MixedAE
from mrmae import MAE, MRMAE, from_published
from vit import (
    SIZES,
    UserError,
    add_size_args,
    all_blocks,
    bounded,
    cls_attention,
    file_name,
    find_weights,
    load_file,
    load_matching,
    load_strictly,
    natural_float,
    natural_int,
    one_line,
    pack_encoder,
    positive_float,
    positive_int,
    print_rank0,
    rename,
    resolve_sizes,
    strip_prefixes,
    unpack_encoder,
)

# A method is an nn.Module with
#     encoder                      a ViT: what transfers
#     add_args(parser)             static: its flags
#     __init__(args)
#     forward(images)              normalised images (B, 3, height, width) -> loss (), {name: ()} detached
# Optional:
#     visualize(images)            -> {title: pictures (b, 3, height, width) in [0, 1]}
#     numbers(images)              -> {name: number, or a list with one number per layer}, for a log row
#     export()                     -> what encoder.pt holds, if it is not the encoder as it is
#     sizes                        named sizes of its own, like vit.SIZES
#     export_file                  the name of what it exports, if it trains no encoder
# To add one, write its file and name it here.
METHODS = {"mae": MAE, "mrmae": MRMAE, "mixedae": MixedAE, "cae": CAE, "dvae": DVAE}

LAPTOP_LR = 2e-3  # ours, for the micro model and a global batch B' of 32; the papers scale --blr with B'
BAD_STEPS = 10  # ours: this many steps in a row whose loss or gradient is not finite end the run
SAVE_SECONDS = 600  # ours: a run is saved at least this often


# ------------------------------------------------------------------------------------------------------------
# The loop
# ------------------------------------------------------------------------------------------------------------
@dataclass
class Run:
    """What the loop works on. B' = batch size x processes x --accumulate is the global batch."""

    args: argparse.Namespace
    device: torch.device
    batches: ResumableBatchSampler  # knows B', and how many steps an epoch and the run have
    model: torch.nn.Module  # the method itself
    ddp: DistributedDataParallel  # the same, wrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler  # does nothing except under fp16
    lr: float  # the highest learning rate of the schedule
    min_lr: float  # the last one
    schedule: Callable  # (epoch, lr, warm-up epochs, epochs, min_lr) -> learning rate
    prepare: Callable  # (images, labels) on the device -> arguments of model.forward: here normalised images
    export: Callable  # () -> {file name: content}: what is saved beside the checkpoint
    facts: dict  # {"images": how many, "classes": their names}: what must stay the same in a resumed run
    folder: RunFolder | None = None  # None on all processes but rank 0, which alone writes
    state: dict = field(
        default_factory=lambda: dict(
            step=0,  # steps done
            skipped=0,  # those of them that were not finite
            sums={},  # of the log row that is being filled
            row_due=False,  # whether step `step` needs a log row that is not written yet
            best=-math.inf,  # the best test result (finetune.py, dense.py)
        )
    )


def train_loop(run, dataset, test):
    """Train from step run.state["step"] to the end of the run -> exit code.

    dataset: dataset[epoch, i] is a sample, as in data.TrainDataset. test(run, epoch_ends) returns numbers for
    the log row; all processes call it before each row. At an epoch's end the checkpoint is saved before the
    test, so that a test that fails loses no training: the next start repeats it.
    """
    args, batches, state = run.args, run.batches, run.state
    last_step = min(batches.steps, args.max_steps or batches.steps)
    something_to_do = state["row_due"] or state["step"] < last_step  # else nothing is saved again

    # What this process alone knows: the signals it got, an error of its loader, its broken images.
    signals = []
    loader_error = None
    broken = BrokenImages()

    # What all processes agree on after each step: each is true if it is true on any process (`known` below).
    agreed = {"loader_failed": False, "too_many_broken": False, "stop": False, "save": False}
    loss_is_finite = True  # at the last try to save; if it was not, nothing was written

    bad_in_row = 0  # steps in a row whose loss or gradient was not finite
    saved_at = time.perf_counter()

    # Write the log row (`row_due` in Run) that a stop left unwritten after the last save.
    if state["row_due"]:
        write_row(run, test)

    quiet = run.folder is None
    bar = tqdm(total=last_step, initial=state["step"], unit="step", disable=quiet, mininterval=1)
    with bar, stop_signals(signals):
        stream = load_batches(dataset, batches, args.workers, run.device.type == "cuda")

        while state["step"] < last_step:
            # Fetch the micro-batches of this step, each as (images, labels). The loader has replaced broken
            # images already; `broken.count` notes their names. If the loader fails, use the micro-batches of
            # the step before once more: the other processes are waiting for our gradients. All learn of the
            # failure below, and nobody updates its weights.
            started = time.perf_counter()
            try:
                fetched = [broken.count(*next(stream)) for _ in range(args.accumulate)]
                micro_batches = to_device(fetched, run.device)
            except Exception as error:
                if state["step"] == batches.start:  # there is no step before
                    raise
                loader_error = error
            waited = time.perf_counter() - started

            # Set the learning rate; fine-tuning scales it layer by layer.
            epoch = state["step"] / batches.steps_per_epoch  # a fraction
            lr = run.schedule(epoch, run.lr, args.warmup_epochs, args.epochs, run.min_lr)
            for group in run.optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1.0)

            # Run forward and backward.
            values = forward_backward(run, micro_batches, state["step"])

            # Average the values over the processes. What each process knows alone travels with them, because
            # all must do the same: if it is true on one process, its average is above 0 on all.
            known = {
                "loader_failed": loader_error is not None,
                "too_many_broken": broken.too_many,
                "stop": bool(signals),
                "save": run.folder is not None and time.perf_counter() - saved_at > SAVE_SECONDS,
            }
            values = mean_over_processes({**values, **known}, run.device)
            agreed = {name: values.pop(name) > 0 for name in known}
            if agreed["loader_failed"]:
                break

            # Update the weights, unless the loss or a gradient is not finite. (`scaler.step` calls
            # `optimizer.step`.) Under fp16 always call the scaler: it leaves such a step out by itself, and
            # halves the factor by which it multiplies the loss. This factor starts too large on purpose.
            # As long as it is 1 or more, such steps are normal: they count as skipped, but not towards
            # BAD_STEPS.
            finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
            if finite or run.scaler.is_enabled():
                run.scaler.step(run.optimizer)
                run.scaler.update()
            still_normal = run.scaler.is_enabled() and run.scaler.get_scale() >= 1
            bad_in_row = 0 if finite or still_normal else bad_in_row + 1
            if bad_in_row == BAD_STEPS:
                raise UserError(
                    f"{BAD_STEPS} steps in a row, up to step {state['step'] + 1}, had a loss or gradient "
                    f"that is not finite; the last good checkpoint, if there is one, stays in {args.out}; "
                    f"try a lower learning rate (now {run.lr:g}) or --precision fp32",
                    code=1,
                )

            # Count the step, and add its values to the log row.
            state["step"] += 1
            added = {"steps": 1, "seconds": time.perf_counter() - started, "waited": waited}
            if finite:
                added |= {"finite": 1, **values}
            else:
                state["skipped"] += 1
            for name, value in added.items():
                state["sums"][name] = state["sums"].get(name, 0.0) + value
            epoch_ends = state["step"] % batches.steps_per_epoch == 0
            state["row_due"] = epoch_ends or state["step"] % args.log_every == 0
            bar.update()

            # Save if it is time to. `save` first tries the new weights on a micro-batch and writes nothing if
            # the loss is not finite. Once it has written, nothing that follows can lose the steps done.
            stopping = agreed["stop"] or agreed["too_many_broken"]
            ends = epoch_ends or stopping or state["step"] == last_step
            at_interval = args.save_every and state["step"] % args.save_every == 0
            if ends or at_interval or agreed["save"]:
                loss_is_finite = save(run, micro_batches[0])
                saved_at = time.perf_counter()
            if stopping:
                break

            # Test, draw and log.
            if state["row_due"]:
                row = write_row(run, test)
                loss = row.get("loss", math.nan)
                bar.set_postfix_str(f"loss {loss:.4f}, {row['images_per_s']:.0f} images/s")

        del stream  # ends the loader's processes

    # After a failed loader, save the steps done since the last save. At a normal end, save once more: the
    # checkpoint must know that its last log row has been written, or the next start would write it again.
    finished = state["step"] == last_step and not state["row_due"]
    if agreed["loader_failed"]:
        loss_is_finite = save(run, micro_batches[0])
    elif finished and something_to_do and loss_is_finite:
        save(run)
    elif finished and not something_to_do and run.folder:  # make again what may be missing, or older
        write_files(run, run.export())

    # Say how the run ended. If it was an error of this process alone, its own message says more.
    own_error = broken.error() if broken.too_many else loader_error
    return end_of_run(run, agreed, signals, own_error, loss_is_finite)


def end_of_run(run, agreed, signals, own_error, loss_is_finite):
    """Say how the run ended -> exit code, or raise the error that ended it. All processes come to the same
    decision, so that none of them waits for another.

    own_error: what ended the run and is known to this process alone, or None. The rest as in `train_loop`.
    """
    state, steps, out = run.state, run.batches.steps, run.args.out
    done = f"step {state['step']} of {steps}"
    if state["skipped"]:
        print_rank0(
            f"{state['skipped']} of {state['step']} steps were skipped: their loss or gradient was not finite"
        )

    # Raise the errors that ended the run.
    if own_error is not None:
        raise own_error
    if agreed["loader_failed"] or agreed["too_many_broken"]:
        raise UserError("another process could not read its images; its message says why", code=1)
    # Was no step at all finite? Under fp16 this is normal if there were only a few; if there are more of
    # them, BAD_STEPS has ended the run.
    all_skipped = state["step"] > 0 and state["skipped"] == state["step"] and not run.scaler.is_enabled()
    if not loss_is_finite or all_skipped:
        raise UserError(
            f"the loss is not finite after {done}; the last good checkpoint, if there is one, stays in "
            f"{out}; try a lower learning rate (now {run.lr:g})",
            code=1,
        )

    # Say that it is not finished, and choose the exit code.
    if state["step"] < steps or state["row_due"]:
        at_limit = run.args.max_steps and state["step"] >= run.args.max_steps
        limit = ", with a larger --max-steps or none" if at_limit else ""
        print_rank0(
            f"stopped after {done}; {out} holds the last checkpoint; the same command resumes from it{limit}"
        )
    save_failed = run.folder is not None and run.folder.failed
    if mean_over_processes({"failed": save_failed}, run.device)["failed"]:
        return 1
    if agreed["stop"]:
        number = signals[0] if signals else signal.SIGTERM  # another process got it; its number is not known
        return 128 + number
    return 0


def forward_backward(run, micro_batches, step):
    """Compute the gradients of one step -> {"loss": (), each loss term: (), "grad_norm": ()}. The losses are
    means over the micro-batches; grad_norm is the norm of the step's gradient before it is clipped."""
    run.optimizer.zero_grad()
    values = {}
    for i, (images, labels) in enumerate(micro_batches):
        # Seed the draws of this micro-step: masks, mixing, drop path, MixUp.
        seed_torch(run.args.seed, "step", step, i, dist.get_rank())

        # Run the method's `forward` on the normalised images: the loss, and its terms for the log. DDP
        # averages the gradients over the processes in the last backward pass of the step alone.
        last = i == len(micro_batches) - 1
        exchange = contextlib.nullcontext() if last else run.ddp.no_sync()
        with exchange:
            with autocast(run.args, run.device):
                loss, terms = run.ddp(*run.prepare(images, labels))
            run.scaler.scale(loss / len(micro_batches)).backward()

        # Add this micro-batch's share to the means.
        for name, value in {"loss": loss.detach(), **terms}.items():
            values[name] = values.get(name, 0) + value / len(micro_batches)

    # Measure the norm of the gradient, which DDP has averaged, and clip it with --clip-grad.
    run.scaler.unscale_(run.optimizer)
    trained = [p for p in run.model.parameters() if p.grad is not None]
    values["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in trained])
    if run.args.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(trained, run.args.clip_grad, values["grad_norm"])
    return values


def mean_over_processes(values, device):
    """{name: () tensor or number} -> {name: float}, averaged. A NaN in one process is one in all of them."""
    vector = torch.stack(
        [torch.as_tensor(value, dtype=torch.float32, device=device) for value in values.values()]
    )
    dist.all_reduce(vector)
    return dict(zip(values, (vector / dist.get_world_size()).tolist()))


def save(run, micro_batch=None):
    """Write encoder.pt (what is used later) and checkpoint.pt (what a resumed run needs) -> whether the loss
    is finite with these weights. If it is not, nothing is written.

    micro_batch: what the loss is computed on, with the masks of the step just done; None: the weights were
    tried before.
    """
    # The step's own loss was that of the weights before its update. So compute the loss once more, with the
    # new ones, on all processes.
    if micro_batch is not None:
        run.model.eval()
        seed_torch(run.args.seed, "step", run.state["step"] - 1, 0, dist.get_rank())  # as that step did
        with inference(run.args, run.device):
            loss, _ = run.model(*run.prepare(*micro_batch))
        run.model.train()
        if not math.isfinite(mean_over_processes({"loss": loss}, run.device)["loss"]):
            warn(
                run,
                f"the loss is not finite after step {run.state['step']}: not saved, the old files stay",
            )
            return False
    if not run.folder:
        return True

    # Write checkpoint.pt first. Once it is written, nothing can lose the steps done: if the process is killed
    # before it has written encoder.pt, a resumed run writes that anew.
    saved = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "args": vars(run.args),
        "global_batch": run.batches.global_batch,
        "dataset": run.facts,
        "steps": run.batches.steps,
        **run.state,
    }
    write_files(run, {"checkpoint.pt": saved, **run.export()})
    return True


def write_files(run, files):
    """files: {name: content}. If a write fails, the old file stays, and the program goes on after a
    warning."""
    for name, content in files.items():
        try:
            run.folder.write(name, lambda file: torch.save(content, file))
        except UserError as error:
            run.folder.failed = True
            warn(run, str(error))


def write_row(run, test):
    """Test, and write the log row of the steps since the last one -> the row. If that fails with a UserError,
    such as a full disk, the run ends with code 1."""
    state, steps_per_epoch = run.state, run.batches.steps_per_epoch
    epoch_ends = state["step"] % steps_per_epoch == 0
    try:
        # Average what the steps added up. Only finite steps have added losses, so without one there are none.
        sums = dict(state["sums"])
        steps = sums.pop("steps", 0.0)
        seconds = max(sums.pop("seconds", 0.0), 1e-9)
        waited = sums.pop("waited", 0.0)
        finite_steps = sums.pop("finite", 0.0)
        means = {name: total / finite_steps for name, total in sums.items()}

        # Gather the numbers of the row.
        row = {
            "step": state["step"],
            "epoch": state["step"] / steps_per_epoch,
            "lr": max(group["lr"] for group in run.optimizer.param_groups),
            **means,
            "images_per_s": steps * run.batches.global_batch / seconds,
            "data_wait": waited / seconds,
            "memory_mb": peak_memory_mb(run.device),
            "skipped_steps": state["skipped"],
        }

        # Test.
        row |= test(run, epoch_ends)

        # Write the row; at an epoch's end draw the curves, and print the row without its lists and counts.
        if run.folder:
            run.folder.log(row)
        if run.folder and epoch_ends:
            chart = curves([run.folder.path])
            if chart:
                run.folder.write_picture("curves.png", chart)
            shown = [
                f"{name} {value:.4g}"
                for name, value in row.items()
                if isinstance(value, float) and name != "epoch"
            ]
            tqdm.write(f"epoch {round(row['epoch'])}/{run.args.epochs}: {', '.join(shown)}")
    except UserError as error:
        error.code = 1
        raise
    state["sums"] = {}
    state["row_due"] = False
    return row


@contextlib.contextmanager
def stop_signals(signals):
    """Ctrl-C, SIGTERM and SIGHUP are only noted in the list `signals`: the loop finishes its step, saves and
    leaves. A second Ctrl-C leaves at once. Under nohup, which ignores SIGHUP, it stays ignored."""

    def note(number, frame):
        if number == signal.SIGINT and number in signals:
            os._exit(128 + number)
        signals.append(number)

    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def warn(run, message):
    """Print a warning on rank 0 without breaking the progress bar."""
    if run.folder:
        tqdm.write(f"warning: {message}", file=sys.stderr)


def to_device(batch, device):
    """Move a tensor, or lists, tuples and dicts of tensors (objects, for detection), to the device."""
    if isinstance(batch, torch.Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    return [to_device(value, device) for value in batch]


def peak_memory_mb(device, restart=False):
    """Peak memory of the card, or of this process on CPU; restart: measure from now on."""
    if device.type == "cuda":
        if restart:
            torch.cuda.reset_peak_memory_stats()
        return torch.cuda.max_memory_allocated() / 2**20
    if restart:
        with contextlib.suppress(OSError):  # Linux alone can
            Path("/proc/self/clear_refs").write_text("5")
    unit = 1 if sys.platform == "darwin" else 1024  # getrusage speaks of bytes there, of KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


# ------------------------------------------------------------------------------------------------------------
# Optimization, precision
# ------------------------------------------------------------------------------------------------------------
def lr_at(epoch, lr, warmup_epochs, epochs, min_lr=0.0):
    """Learning rate at a fractional epoch: linear from 0 during warm-up, then half a cosine down to min_lr
    (MAE's; MixedAE Sec. 4.1)."""
    if epoch < warmup_epochs:
        return lr * epoch / warmup_epochs
    progress = (epoch - warmup_epochs) / (epochs - warmup_epochs)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def build_optimizer(model, args):
    """Fused AdamW. As in MAE, biases and one-dimensional parameters have no weight decay; CLS and [MASK] do,
    because they have three dimensions."""
    decayed, plain = [], []
    for name, p in model.named_parameters():
        if not p.requires_grad:  # a position table, or a norm that no loss trains
            continue
        if p.ndim == 1 or name.endswith(".bias"):
            plain.append(p)
        else:
            decayed.append(p)
    groups = [{"params": decayed, "weight_decay": args.weight_decay}, {"params": plain, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, args.beta2), fused=True)


def amp_dtype(args, device):
    """--precision -> the dtype of autocast, or None for fp32."""
    if args.precision == "auto" and device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(args.precision)


def autocast(args, device):
    """Matrix products in the dtype of --precision; does nothing for fp32."""
    dtype = amp_dtype(args, device)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def eager(args):
    """Without torch.compile, for batches of other sizes than the training step's. Each size would make graphs
    of its own, which take minutes, and torch compiles a limited number of them."""
    return torch.compiler.set_stance("force_eager") if args.compile else contextlib.nullcontext()


@contextlib.contextmanager
def inference(args, device):
    """For tests, for pictures and for the check in `save`: autocast as in training, but without gradients and
    without torch.compile."""
    with torch.no_grad(), autocast(args, device), eager(args):
        yield


def wrap_ddp(model, args, device, example):
    """DDP around the model, also for a single process, so that all runs take the same path. Applies --compile
    and --recompute. example: what the model is called with."""
    blocks = all_blocks(model)
    if args.compile:
        # A graph for each drop path rate, with and without gradient: more than torch allows by itself.
        torch._dynamo.config.recompile_limit = 8 + 4 * len(blocks)
    for block in blocks:
        block.recompute = args.recompute
        if args.compile:
            block.compile(dynamic=False)  # in place: the names in the state dict stay
    device_ids = [device.index] if device.type == "cuda" else None
    # A gradient of shape (1, 1, D) may have other strides than DDP's bucket, which changes no number.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    ddp = DistributedDataParallel(model, device_ids=device_ids, gradient_as_bucket_view=True)

    # After its first backward pass DDP regroups the buckets of gradients, which changes the order of sums: a
    # resumed run would not be bitwise equal. So trigger it now by a step that is thrown away. (Put the
    # buffers back, because a BatchNorm would keep that step's statistics.)
    if dist.get_world_size() > 1:
        buffers = [buffer.clone() for buffer in model.buffers()]
        with eager(args):
            with autocast(args, device):
                loss, _ = ddp(*example)
            loss.backward()
        ddp.zero_grad()
        for buffer, before in zip(model.buffers(), buffers):
            buffer.copy_(before)
    return ddp


# ------------------------------------------------------------------------------------------------------------
# Starting a run, and starting it again
# ------------------------------------------------------------------------------------------------------------
def create_run(args, device, model, optimizer, example, facts, default_lr, **fields):
    """Make a run at its start. example: what the model is called with; facts: see Run; default_lr: the rate
    where neither --lr nor --blr is given; fields: the other fields of Run (min_lr, schedule, prepare, export,
    and folder if it was taken before)."""
    world = dist.get_world_size()
    batches = ResumableBatchSampler(
        facts["images"], args.batch_size, args.accumulate, dist.get_rank(), world, args.seed, args.epochs
    )
    # MAE's rule, and MixedAE's (Sec. 4.1): lr = base lr x B' / 256.
    lr = args.lr or (args.blr * batches.global_batch / 256 if args.blr else default_lr)
    if lr < fields["min_lr"]:
        raise UserError(
            f"the learning rate {lr:g} is below {fields['min_lr']:g}, where its schedule ends; give a higher "
            f"--lr or --blr (train.py: or a lower --min-lr)"
        )
    scaler = torch.amp.GradScaler(device.type, enabled=amp_dtype(args, device) == torch.float16)
    ddp = wrap_ddp(model, args, device, example)
    return Run(
        args=args,
        device=device,
        batches=batches,
        model=model,
        ddp=ddp,
        optimizer=optimizer,
        scaler=scaler,
        lr=lr,
        facts=facts,
        **fields,
    )


def facts_of(dataset):
    """What must not change under a run: the number of training images, and the names of their classes."""
    return {"images": len(dataset), "classes": list(dataset.classes)}


def build_run(args, facts, device):
    """A run of --method. facts: of its data set, as `facts_of` gives them."""
    # Build the model; every process starts from the same weights.
    torch.manual_seed(args.seed)
    model = METHODS[args.method](args).to(device)

    # Say what it is called with, and what is saved of it.
    count = min(args.batch_size, facts["images"])  # `create_run` refuses a batch that is larger than the set
    example = [torch.zeros(count, 3, *args.image_size, device=device)]

    def prepare(images, labels):  # pre-training needs no labels
        return (normalize(images, args.mean, args.std),)

    def export():
        return {getattr(model, "export_file", "encoder.pt"): export_encoder(model, args)}

    return create_run(
        args,
        device,
        model,
        optimizer=build_optimizer(model, args),
        example=example,
        facts=facts,
        default_lr=LAPTOP_LR,
        prepare=prepare,
        export=export,
        min_lr=args.min_lr,
        schedule=lr_at,
    )


def export_encoder(model, args):
    """What encoder.pt holds: what the method says, else its encoder as it is."""
    if hasattr(model, "export"):
        return model.export()
    feature = "cls" if model.encoder.num_prefix_tokens else "mean"
    return pack_encoder(model.encoder, args.method, feature, args.mean, args.std)


def program_of(flags):
    """Which program has these flags."""
    if "protocol" in flags:
        return "finetune.py"
    return "dense.py" if "task" in flags else "train.py"


def load_checkpoint(path, args):
    """checkpoint.pt as `save` wrote it, of the same program and method as `args`."""
    if not os.path.exists(path):
        raise UserError(f"{path}: no such file; --out must be the folder of a run that has saved")
    saved = load_file(path)

    # Check that it is whole, and of this program and method.
    names = "model optimizer scaler args global_batch dataset steps step sums row_due"
    keys = set(names.split())
    if not isinstance(saved, dict) or not keys <= saved.keys():
        raise UserError(
            f"{path}: not a checkpoint of this version of the program; move it away or choose another --out"
        )
    then = program_of(saved["args"])
    now = program_of(vars(args))
    if then != now:
        raise UserError(f"{path} is of a run of {then} (now {now}); choose another --out")
    if saved["args"]["method"] != args.method:
        raise UserError(
            f"{path} was made with method {saved['args']['method']} (now {args.method}); use that, or "
            "another --out"
        )
    return saved


# Flags that may differ when a run resumes. Most do not shape the result, or only its rounding. Batch size and
# accumulation (and the number of processes) may change if B' stays: each step keeps its images, but other
# masks are drawn. On another device, too, masks are drawn otherwise, and with --compile drop path is.
FREE_FLAGS = set(
    "out data_root download workers device compile recompute log_every save_every max_steps batch_size "
    "accumulate".split()
)


def load_begun(args):
    """The checkpoint of the run in --out, or None if none was begun. All flags but FREE_FLAGS must be as they
    were. Without a checkpoint, refuse to write over what a run has made."""
    # Is there a checkpoint? If there is none, encoder.pt or results may still lie there: do not lose them.
    path = Path(args.out) / "checkpoint.pt"
    if not os.path.exists(path):
        for name in ("encoder.pt", "tokenizer.pt", "results.json"):
            if os.path.exists(path.with_name(name)):
                raise UserError(
                    f"--out {args.out}: holds {name} but no checkpoint.pt to go on from; choose another "
                    f"--out, or move {name} away"
                )
        return None
    saved = load_checkpoint(path, args)

    # Compare the flags, and with them B'.
    then = {**saved["args"], "global batch": saved["global_batch"]}
    now = {**vars(args), "global batch": args.batch_size * args.accumulate * dist.get_world_size()}
    changed = [
        f"{key.replace('_', '-')} {then.get(key)} (now {now.get(key)})"
        for key in sorted((then.keys() | now.keys()) - FREE_FLAGS)
        if then.get(key) != now.get(key)
    ]
    if changed:
        advice = "use those, or another --out for a new run"
        has_encoder = any(name.startswith("encoder.") for name in saved["model"])
        if saved["step"] == saved["steps"] and hasattr(args, "init") and has_encoder:
            advice += f" (to train on from its weights: --init {path})"
        raise UserError(f"{path} was made with other flags: {', '.join(changed)}; {advice}")
    return saved


def resume(run):
    """Continue from checkpoint.pt, if there is one."""
    path = Path(run.args.out) / "checkpoint.pt"
    saved = load_begun(run.args)
    if saved is None:
        return

    # The training set, too, must be as it was. (A finished run needs it no more.)
    old, new = saved["dataset"], run.facts
    if saved["step"] == saved["steps"]:
        run.batches.steps = saved["steps"]
    elif old != new:
        names = sorted(set(old["classes"]) ^ set(new["classes"]))
        classes = f", and the first class that differs is {names[0]}" if names else ""
        raise UserError(
            f"--data {run.args.data} has changed since {path} was made: it had {old['images']} images and "
            f"has {new['images']}{classes}; bring it back, or choose another --out for a new run"
        )

    # Load the weights and the optimizer. Check the shapes of the optimizer's states, which torch does not:
    # fused AdamW would write beyond the end of a state that is too small.
    try:
        load_strictly(run.model, saved["model"])
        run.optimizer.load_state_dict(saved["optimizer"])
        # The states of a parameter, by name: AdamW has exp_avg and exp_avg_sq, LARS mu, SGD momentum_buffer.
        names = set().union(*run.optimizer.state.values()) - {"step"}
        for p, state in run.optimizer.state.items():
            for name in names:
                value = state.get(name)
                fits = isinstance(value, torch.Tensor) and value.shape == p.shape
                if not fits or not value.isfinite().all():
                    raise ValueError(f"the optimizer's {name} is missing, not finite or of a wrong shape")
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: does not fit this model ({one_line(error)}); choose another --out"
        ) from None
    if run.scaler.is_enabled() and saved["scaler"]:
        run.scaler.load_state_dict(saved["scaler"])
    run.state = {key: saved[key] for key in run.state}
    run.batches.start = saved["step"]


def run_loop(run, argv, header, dataset, test):
    """Resume the run if it was begun, say what is about to happen, train -> exit code."""
    # Make the run's folder and lock it, unless finetune.py has done so. This comes only now, so that a start
    # that fails before leaves no folder behind.
    if dist.get_rank() == 0 and run.folder is None:
        run.folder = RunFolder(run.args.out)
    resume(run)
    dist.barrier()  # all have read the checkpoint before rank 0 writes the next
    args, batches, state, world = run.args, run.batches, run.state, dist.get_world_size()
    if run.folder and (state["step"] < batches.steps or state["row_due"]):
        run.folder.write_args(args, argv)

        # Drop log rows of steps after the checkpoint, and a row that `train_loop` is about to write again.
        last_row = state["step"] - 1 if state["row_due"] else state["step"]
        run.folder.cut_log(last_row)

        # Print what shapes the run: its size, precision, batch, learning rate and steps.
        parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad) / 1e6
        precision = str(amp_dtype(args, run.device) or torch.float32).removeprefix("torch.")
        rule = "the default"
        if args.lr:
            rule = "--lr"
        elif args.blr:
            rule = f"blr {args.blr:g} x {batches.global_batch} / 256"
        if args.warmup_epochs > args.epochs / 2:
            rule += f"; the warm-up of {args.warmup_epochs:g} epochs is longer than half of the run: lower "
            rule += "--warmup-epochs"
        print_rank0(
            f"{header}\n{parameters:.4g} M trained parameters, {precision}, {world} x {run.device}\n"
            f"batch: {args.batch_size} images x {world} processes x {args.accumulate} accumulated = "
            f"{batches.global_batch}; learning rate {run.lr:g} ({rule})\n"
            f"{args.epochs} epochs x {batches.steps_per_epoch} steps, starting at step {state['step']}"
            + ("; so few teach little: raise --epochs or lower --batch-size" if batches.steps < 100 else "")
        )
    return train_loop(run, dataset, test)


def load_weights(model, path):
    """--init: load weights alone, from a checkpoint.pt, best.pt or encoder.pt, or from a published file: of
    CAE if the model is a CAE, else of MAE or MCMAE. Returns what was filled (see vit.load_matching)."""
    state = load_file(path)
    if not hasattr(model, "encoder"):
        raise UserError(f"--init {path}: is for methods that train an encoder")

    # Find the weights, named as in a whole model ("encoder." in front), and what the file says of the shape
    # of its encoder.
    try:
        if {"config", "state_dict"} <= state.keys():  # encoder.pt
            weights = {f"encoder.{name}": value for name, value in state["state_dict"].items()}
            shape = state["config"]
        elif {"config", "model", "metric"} <= state.keys():  # best.pt; dense.py's detectors hold a backbone
            weights = rename(state["model"], [(r"^backbone\.encoder\.", "encoder.")])
            shape = state["config"]
        elif "global_batch" in state:  # checkpoint.pt
            if program_of(state["args"]) != "train.py":
                raise UserError(f"--init {path}: does not say its encoder's shape; give the run's best.pt")
            weights, shape = state["model"], state["args"]
        else:
            convert = from_official_cae if isinstance(model, CAE) else from_published
            found = strip_prefixes(find_weights(state, path), "module|_orig_mod|backbone")
            weights, shape = convert(found), {}

        # Leave out what is no tensor.
        weights = {name: value for name, value in weights.items() if isinstance(value, torch.Tensor)}
        if not weights or not isinstance(shape, dict):
            raise KeyError("weights")
    except (AttributeError, KeyError, TypeError):  # lists, numbers ... where dicts by name should be
        raise UserError(f"--init {path}: holds no weights by name") from None
    return load_matching(model, weights, shape, f"--init {path}")


def local_rank0_first(args, open_them):
    """Call open_them(). With --download one process of each machine goes first; the others wait for it."""
    later = args.download and int(os.environ.get("LOCAL_RANK", 0)) > 0
    if later:
        dist.barrier()
    sets = open_them()
    if args.download and not later:
        dist.barrier()
    return sets


# ------------------------------------------------------------------------------------------------------------
# Pre-training
# ------------------------------------------------------------------------------------------------------------
def pretrain(args, argv, device):
    """One run, from its flags to its last checkpoint -> exit code."""
    # Open the data, and make the model.
    train_set, val_set = local_rank0_first(args, partial(open_sets, args))
    run = build_run(args, facts_of(train_set), device)
    if args.init and not os.path.exists(f"{args.out}/checkpoint.pt"):
        print_rank0(f"--init {args.init}: fills {load_weights(run.model, args.init)}")

    # Choose the images for val_loss, for `numbers` and for the pictures. They are the same at every epoch. On
    # `shapes` there is a mask of the object in each.
    held_out = val_set is not None and min(len(val_set), args.val_images) >= args.batch_size
    chosen, count = (val_set, args.val_images) if held_out else (train_set, 64)
    images, object_masks = fixed_images(chosen, args.image_size, count)
    note_grey(images, args)

    # Train.
    val = "no val images of a batch or more, so no val_loss"
    if held_out:
        val = f"val_loss on {len(images) // args.batch_size * args.batch_size} images"
    header = f"{args.method} on {args.data}: {len(train_set)} images, {val}"
    samples = TrainDataset(train_set, train_transform(args), args.seed)
    test = partial(test_pretraining, images=images, object_masks=object_masks, held_out=held_out)
    code = run_loop(run, argv, header, samples, test)
    if code or run.state["step"] < run.batches.steps:
        return code

    # Say what there is now, and what to run next.
    made = getattr(run.model, "export_file", "encoder.pt")
    following = f"What is it worth? python finetune.py --encoder {args.out}/{made} --cache-features --data "
    labelled = val_set is not None and val_set.classes
    following += args.data if labelled else "SET (labelled, with train/ and val/)"
    if made == "tokenizer.pt":
        target = f"dvae:{args.out}/{made} --out {args.out}-cae --data {args.data}"
        following = f"Predict its ids: python train.py --method cae --target {target}"
    already = " already" if run.batches.start == run.batches.steps else ""
    print_rank0(
        f"finished{already}: {args.out} holds {made} (what transfers), checkpoint.pt, log.jsonl and "
        f"pictures/. {following}"
    )
    return code


def note_grey(images, args):
    """Grey images are no longer grey once each channel is normalised by a mean and deviation of its own."""
    grey = int((images == images[:, :1]).flatten(1).all(dim=1).sum())
    if grey and (len(set(args.mean)) > 1 or len(set(args.std)) > 1):
        print_rank0(
            f"note: {grey} of {len(images)} sampled images are grey; with a mean and deviation per channel "
            f"they are no longer so once normalised. In a grey set --mean .5 .5 .5 --std .25 .25 .25 "
            f"keeps them grey"
        )


def test_pretraining(run, epoch_ends, images, object_masks, held_out):
    """The numbers of a log row; at an epoch's end also val_loss, the pictures, and on `shapes` the object
    awareness.

    images: uint8, the same each time; object_masks: of the objects in them, or None; held_out: whether they
    are of a val set.
    """
    # Measure the loss on held-out data, on all processes. Rank 0 alone does the rest.
    args, model, numbers = run.args, run.model, {}
    if epoch_ends and held_out:
        numbers["val_loss"] = evaluate(run, images)
    if not run.folder:
        return numbers

    # Ask the method for its numbers, without drop path.
    model.eval()
    if hasattr(model, "numbers"):
        seed_torch(args.seed, "numbers")  # the same masks each time
        with inference(args, run.device):
            numbers |= model.numbers(normalize(images[:64].to(run.device), args.mean, args.std))

    # Draw its pictures, and measure how much attention falls on the objects.
    if epoch_ends:
        panels = render_panels(model, args, images[:64], run.device)
        if panels:
            epoch = run.state["step"] // run.batches.steps_per_epoch
            sheet = picture_sheet({title: pictures[:8] for title, pictures in panels.items()})
            run.folder.write_picture(f"epoch-{epoch:04d}.png", sheet)
        maps = None
        if object_masks is not None:
            maps = exported_attention(model, args, images, run.device)
        if maps is not None:
            numbers["object_attention"], numbers["object_area"] = object_awareness(maps, object_masks)
    model.train()
    return numbers


def evaluate(run, images):
    """Mean loss over whole batches of uint8 val images, with the same masks each time; each process takes
    every world-th batch."""
    size, losses = run.args.batch_size, []
    run.model.eval()
    for j in range(dist.get_rank(), len(images) // size, dist.get_world_size()):
        seed_torch(run.args.seed, "val", j)
        batch = images[j * size : (j + 1) * size].to(run.device)
        with inference(run.args, run.device):
            loss, _ = run.model(*run.prepare(batch, None))
        losses.append(loss.float())
    run.model.train()
    means = mean_over_processes({"sum": sum(losses), "count": len(losses)}, run.device)
    return means["sum"] / means["count"]


def exported_attention(model, args, images, device):
    """Where CLS looks (MixedAE Fig. 5) in the encoder that transfers, on clean uint8 images -> maps (B, h,
    w), or None where there is no encoder with a class token."""
    if not hasattr(model, "encoder") or not model.encoder.num_prefix_tokens:
        return None
    encoder = unpack_encoder(export_encoder(model, args))[0].to(device)
    clean = [normalize(batch.to(device), args.mean, args.std) for batch in images.split(64)]
    return torch.cat([cls_attention(encoder, batch) for batch in clean]).cpu()


def render_panels(model, args, images, device):
    """Draw the method's pictures of uint8 images (B, 3, height, width), and one more: where CLS looks in the
    encoder that transfers -> {title: pictures (b, 3, height, width) in [0, 1]}. The model is in eval mode."""
    panels = {}
    if hasattr(model, "visualize"):
        seed_torch(args.seed, "pictures")  # the same masks each time
        with inference(args, device):
            panels = model.visualize(normalize(images.to(device), args.mean, args.std))
    maps = exported_attention(model, args, images, device)
    if maps is not None:
        panels["attention of CLS"] = heat_map(maps, images)
    count = min((len(pictures) for pictures in panels.values()), default=0)  # a method may leave images out
    return {title: pictures[:count].cpu() for title, pictures in panels.items()}


# ============================================================================================================
# A first reading may stop here. What follows: flags, processes, --draw, --benchmark.
# ============================================================================================================
class Help(argparse.ArgumentDefaultsHelpFormatter):
    """-h with the defaults of flags that have one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message} ({self.prog} -h lists the flags)")


def first_phase(program, flag, choices, default, what, argv):
    """Read the one flag on which the other flags and their defaults depend -> (its value, a parser for them
    all)."""
    first = Parser(prog=program, add_help=False, allow_abbrev=False)
    first.add_argument(f"--{flag}", choices=choices, default=default, help=what)
    value = getattr(first.parse_known_args(argv)[0], flag)
    prog = f"{program} --{flag} {value}"
    return value, Parser(prog=prog, parents=[first], allow_abbrev=False, formatter_class=Help)


def share_of_batch(images, multiple=1):
    """Divide our default batch of so many images among the processes: thus the default command trains on 8 as
    it does on one. Each process gets at least `multiple` images, and a multiple of it."""
    world = int(os.environ["WORLD_SIZE"]) if {"RANK", "WORLD_SIZE"} <= os.environ.keys() else 1
    return multiple * max(1, images // multiple // world)


def add_run_args(parser):
    """The flags of any run, pre-training or not."""
    add = parser.add_argument_group("training").add_argument

    # Where it writes, and how long it runs.
    add(
        "--out",
        type=file_name,
        help="the run's folder [runs/METHOD; finetune.py: runs/METHOD-PROTOCOL-DATA; dense.py: "
        "runs/METHOD-TASK-DATA; with --evaluate runs/evaluate]",
    )
    add(
        "--epochs",
        type=positive_int,
        default=3,
        help="passes over the set (ours; the papers pre-train for 200 to 1600)",
    )
    add(
        "--max-steps",
        type=positive_int,
        help="stop and save after so many steps; the schedule stays as it is",
    )
    add(
        "--warmup-epochs",
        type=natural_float,
        help="linear warm-up, then the schedule [1, probes 10, dense.py a tenth of the run; at most a third "
        "of it. MAE, MixedAE: 40; MR-MAE: a fifth of the run]",
    )

    # How many images a step has.
    add(
        "--batch-size",
        type=positive_int,
        default=share_of_batch(32, multiple=4),
        help="images per process and micro-step (ours; by default shared out over the processes)",
    )
    add(
        "--accumulate",
        type=positive_int,
        default=1,
        help="micro-steps per step; B' = batch size x processes x this",
    )

    # The optimizer.
    add(
        "--blr",
        type=positive_float,
        help="base learning rate, scaled as the papers' are: lr = blr x B' / 256",
    )
    add(
        "--lr",
        type=positive_float,
        help="absolute learning rate, wins over --blr [neither: ours, for a laptop]",
    )
    add(
        "--clip-grad",
        type=positive_float,
        metavar="NORM",
        help="scale gradients down to this norm (CAE: 3) [off]",
    )
    add(
        "--weight-decay",
        type=natural_float,
        default=0.05,
        help="not on biases and one-dimensional parameters (MAE's code)",
    )

    # What is random, and how it is computed.
    add(
        "--seed",
        type=bounded(int, 0, 2**63 - 1),
        default=0,
        help="of initialisation, order, augmentation, masks",
    )
    add(
        "--precision",
        choices=("auto", "bf16", "fp16", "fp32"),
        default="auto",
        help="auto: on CUDA bf16, or fp16 on older cards; on CPU fp32",
    )
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is a card")
    add(
        "--compile",
        action="store_true",
        help="torch.compile the blocks (minutes at the start; needs a C compiler on CUDA, a C++ one on CPU)",
    )
    add(
        "--recompute",
        action="store_true",
        help="activation checkpointing: less memory, about a third more time",
    )
    add(
        "--workers",
        type=bounded(int, 0, 1024),
        default=min(16, available_cores()),
        help="loader processes of each training process",
    )

    # When it logs and saves.
    add(
        "--log-every",
        type=positive_int,
        default=50,
        metavar="STEPS",
        help="a log row each STEPS steps, and at each epoch's end",
    )
    add(
        "--save-every",
        type=natural_int,
        default=0,
        metavar="STEPS",
        help="save each STEPS steps too, not only each epoch and every ten minutes",
    )


def parse_args(argv=None, base=()):
    """Flags -> args with every size explicit. --method is read first, because each method adds flags and
    defaults of its own.

    base: for --benchmark, the flags of another command; they count where this method knows them and argv does
    not give them.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    method, parser = first_phase("train.py", "method", METHODS, "mixedae", "what to train", argv)

    # Collect the flags of the run, of the data, of the sizes and of the method.
    add_run_args(parser)
    add = parser.add_argument_group("pre-training").add_argument
    add(
        "--min-lr", type=natural_float, default=0.0, help="where the cosine ends (MAE's code: 0; CAE's: 1e-5)"
    )
    add(
        "--beta2",
        type=bounded(float, 0, 0.999999),
        default=0.95,
        help="AdamW's second beta; the first is .9 (MAE's code)",
    )
    add(
        "--init",
        type=file_name,
        metavar="FILE",
        help="start from these weights alone: a checkpoint.pt, best.pt or encoder.pt, or a published "
        "file of MAE or MCMAE (for --method cae of CAE)",
    )
    add_statistics_args(add, "of the images; ImageNet's", list(MEAN), list(STD))
    add(
        "--val-images",
        type=natural_int,
        default=512,
        help="images of the val set for val_loss and the pictures (ours); if they are no whole batch, there "
        "is no val_loss, and the pictures are of training images",
    )
    add(
        "--benchmark",
        nargs="*",
        metavar="OTHER",
        help="time the step and stop, in turns with OTHER methods ('mae --norm-pix' in quotes)",
    )
    add(
        "--draw",
        nargs="+",
        metavar="IMAGE",
        help="draw pictures of these images with the run in --out and its flags, and stop",
    )
    add_data_args(parser)
    has_vit = not hasattr(METHODS[method], "export_file")  # a tokenizer has none
    add_size_args(parser, encoder=has_vit, decoder=has_vit)
    METHODS[method].add_args(parser)

    # Parse, and make explicit what was not given.
    from_base = parser.parse_known_args(base)[0]
    args = parser.parse_args(argv, from_base)
    args.out = args.out or f"runs/{method}"
    resolve_warmup(args, most=1)
    check_data_args(parser, args)
    resolve_sizes(args, getattr(METHODS[method], "sizes", SIZES))
    return args


def resolve_warmup(args, most):
    """Make the default of --warmup-epochs explicit: `most`, but at most a third of the run."""
    if args.warmup_epochs is None:
        args.warmup_epochs = min(most, args.epochs / 3)


def start_processes(args):
    """Join the process group of torchrun, or make one of this process alone -> device."""
    # Choose the device.
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA card is usable here; use --device cpu")
    device = torch.device("cpu")
    if args.device != "cpu" and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise UserError(
                f"process {device.index} of this machine has no card: there are {torch.cuda.device_count()}; "
                f"lower --nproc_per_node"
            )
        torch.cuda.set_device(device)
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"  # fp32 means fp32, in convolutions too

    # Join the others. NCCL wants to know the card of each process.
    backend, options = ("nccl", {"device_id": device}) if device.type == "cuda" else ("gloo", {})
    missing = [name for name in ("WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if "RANK" not in os.environ:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    elif missing:
        raise UserError(f"RANK is set, but not {', '.join(missing)}; start with torchrun, or unset RANK")
    # While one downloads a data set, the others wait for it in a barrier: for an hour at most.
    dist.init_process_group(backend, timeout=timedelta(hours=1), **options)
    return device


def leave_processes(code):
    """Leave the process group at the end of the program, whose exit code is `code`."""
    # Under NCCL, destroying the group waits for the other processes. After an error these may be waiting for
    # this one, in a collective that it never joins. So give that up first: this process ends, torchrun sees
    # its exit code and ends the others.
    if code and dist.get_backend() == "nccl":
        dist.group.WORLD.abort()
    dist.destroy_process_group()


class SafeStream:
    """stdout or stderr for a program that must not stop because of them: what cannot be printed (a closed
    pipe, a full disk, a terminal without accents) is dropped or escaped."""

    def __init__(self, stream):
        self.stream = stream

    def write(self, text):
        try:
            return self.stream.write(text)
        except UnicodeEncodeError:
            return self.write(text.encode("ascii", "backslashreplace").decode())
        except (OSError, ValueError):
            return len(text)

    def flush(self):
        with contextlib.suppress(OSError, ValueError):
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)


def protect_output():
    """Let nothing that happens to stdout and stderr stop the program."""
    # The number of a closed stream is given to the next file that is opened, and messages would land in that
    # file. So open the null device in its place.
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = SafeStream(sys.stdout or open(os.devnull, "w"))
    sys.stderr = SafeStream(sys.stderr or open(os.devnull, "w"))


def run_program(name, argv, parse, program):
    """Parse the flags, join the other processes, call program(args, argv, device) -> exit code, and leave the
    others. Raises SystemExit for every exit code but 0."""
    if argv is None:
        argv = sys.argv[1:]
        protect_output()
    code = 1
    try:
        args = parse(argv)
        device = start_processes(args)
        code = program(args, argv, device)
        dist.barrier()
    except UserError as error:
        code = error.code
        if os.environ.get("RANK", "0") != "0":
            time.sleep(15)  # most mistakes are the same everywhere: let rank 0 print its line and end first
        print(f"{name}: {error}", file=sys.stderr, flush=True)
    except Exception:
        traceback.print_exc()
    finally:
        # Free what the traceback of an error still holds. The DDP module must be gone before the process
        # group is, or gloo may abort; the loader too, or its processes would keep this one from ending.
        gc.collect()
        if dist.is_initialized():
            leave_processes(code)
    if code:
        raise SystemExit(code)


def draw(args, device):
    """--draw: the pictures of a run, as at the end of an epoch, for given images; a run that is going on is
    not disturbed."""
    # Build the run's model again. Flags that are newer than the run have their defaults.
    folder = Path(args.out)
    saved = load_checkpoint(folder / "checkpoint.pt", args)
    run_args = argparse.Namespace(**{**vars(args), **saved["args"], "compile": False})
    model = METHODS[args.method](run_args).to(device).eval()
    try:
        load_strictly(model, saved["model"])
    except (RuntimeError, ValueError) as error:
        raise UserError(f"{folder}: its checkpoint does not fit this model ({one_line(error)})") from None

    # Read the images.
    images = []
    for file in args.draw:
        try:
            images.append(center_crop(run_args.image_size)(decode(file)))
        except Exception as error:  # bad files make PIL and torchvision raise all kinds
            raise UserError(f"--draw {file}: cannot be read as an image ({one_line(error)})") from None
    images = torch.stack(images)

    # Draw them.
    panels = render_panels(model, run_args, images, device)
    if not panels:
        raise UserError(f"--draw: --method {args.method} has no `visualize`, and its encoder no class token")
    count = min(map(len, panels.values()))
    if count < len(images):
        raise UserError(
            f"--draw: of {len(images)} images the last {len(images) - count} make no whole group; give "
            f"{count}"
        )
    path = folder / "pictures" / f"draw-{Path(args.draw[0]).stem}.png"
    try:
        if dist.get_rank() == 0:
            path.parent.mkdir(exist_ok=True)
            picture_sheet(panels).save(path)
    except OSError as error:
        raise UserError(f"--draw: {path} cannot be written ({error.strerror})") from None
    print_rank0(f"{path}: step {saved['step']}")
    return 0


PRODUCT_SIZE = {"cuda": 8192, "cpu": 2048}  # of the matrix product that --benchmark compares with


def benchmark(args, argv, device):
    """--benchmark: time the real step of --method and of the OTHER methods in turns, beside a plain matrix
    product; prints medians of 10 rounds."""
    try:
        others = [parse_args(["--method", *shlex.split(other)], base=argv) for other in args.benchmark]
    except ValueError as error:
        raise UserError(f"--benchmark {' '.join(args.benchmark)}: {error}") from None
    names, all_args, world = [args.method, *args.benchmark], [args, *others], dist.get_world_size()

    def make_step(its_args, count):
        run = build_run(its_args, {"images": count, "classes": []}, device)
        shape = (its_args.batch_size, 3, *its_args.image_size)
        batch = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)

        def step():  # at step 0 of the warm-up, where the learning rate is 0
            mean_over_processes(forward_backward(run, [(batch, None)] * its_args.accumulate, 0), device)
            run.scaler.step(run.optimizer)
            run.scaler.update()

        return step

    # Warm each step up, and count its images, and this process's memory and FLOPs. (Code that is compiled
    # while FLOPs are counted would not be used again, so they are counted eagerly.)
    steps, counts, memory, flops = [], [], [], []
    for its_args in all_args:
        before = peak_memory_mb(device, restart=True)
        counts.append(its_args.batch_size * its_args.accumulate * world)
        steps.append(make_step(its_args, counts[-1]))
        steps[-1]()
        memory.append(peak_memory_mb(device) - before)
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            steps[-1]()
        flops.append(counter.get_total_flops())

    # Time them in turns, ten rounds, so that a busy moment of the machine hits each of them alike. The matrix
    # product comes first in a round, eight times in a row, so that it lasts long enough to be timed.
    size = PRODUCT_SIZE[device.type]
    a, b = torch.randn(2, size, size, device=device, dtype=amp_dtype(args, device) or torch.float32)

    def seconds_of(function):
        getattr(torch, device.type).synchronize()  # torch.cpu's does nothing
        started = time.perf_counter()
        function()
        getattr(torch, device.type).synchronize()
        return time.perf_counter() - started

    functions = [lambda: [a @ b for _ in range(8)], *steps]
    rounds = torch.tensor(
        [[seconds_of(function) for function in functions] for _ in range(10)]
    )  # (10, 1 + methods)
    rate = 8 * 2 * size**3 / rounds[:, 0]  # FLOP/s, (10,)
    step_seconds = rounds[:, 1:]

    # Print a line for each.
    print_rank0(
        f"matrix product of {size} x {size}: {rate.median() / 1e12:.3g} TFLOP/s ({a.dtype}); medians of 10 "
        "rounds"
    )
    for i, name in enumerate(names):
        typical = step_seconds[:, i].median()
        share = (flops[i] / step_seconds[:, i] / rate).median()
        ratio = (step_seconds[:, i] / step_seconds[:, 0]).median()
        print_rank0(
            f"{name}: {counts[i] / typical:.4g} images/s, {1000 * typical:.4g} ms/step of {counts[i]} "
            "images, "
            f"{memory[i]:.0f} MB, {flops[i] / 1e9:.4g} GFLOP/step = {100 * share:.0f} % of the matrix "
            f"product's rate, {ratio:.3f} x {args.method}'s time"
        )
    return 0


def main(argv=None):
    """Parse, join the processes, then train or time or draw."""

    def program(args, argv, device):
        if args.draw:
            return draw(args, device)
        if args.benchmark is not None:
            return benchmark(args, argv, device)
        return pretrain(args, argv, device)

    run_program("train.py", argv, parse_args, program)


if __name__ == "__main__":
    main()
