"""Train a network on VOC, COCO or Darknet data: `python -m training.train --data DIR --output DIR`.

Writes `last.safetensors` (with all that --resume needs), `best.safetensors` whenever the validation
mAP50 rises, TensorBoard scalars and pictures, one JSON line per epoch to `log.jsonl`, and
`curves.png` at the end. `yolov4-fast build` takes either checkpoint. Under torchrun all its
processes train together.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import warnings
from collections.abc import Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist

from training.config import TrainConfig
from training.distributed import Processes
from training.interrupts import Interrupts
from training.loader import CACHE_BYTES, TrainingSet
from training.lock import alone
from training.model import load_initial, make_network
from training.multi_scale import largest_size
from training.options import configuration, parse
from training.progress import Progress
from training.resume import restore
from training.run import BEST, LAST, Course, Run, Stopped
from training.schedule import warmup_steps
from training.trainer import Trainer
from yolov4_fast.commands.arguments import check_folder
from yolov4_fast.datasets import Dataset, DatasetWarning, open_datasets
from yolov4_fast.network.layers import Network

SHOWN = 5  # problems of a data set that are printed


def open_data(
    paths: Sequence[str], split: str, val_split: str, val_paths: Sequence[str] | None = None
) -> tuple[Dataset, Dataset]:
    """What to train on and what to validate on (None: another split of the same), with the classes
    of the first.
    """
    for path in paths:
        if path.endswith(".json") and path in (val_paths or paths):
            raise ValueError(
                f"{path}: one COCO file is one split; give the folder that holds it, or --val-data"
            )
    training = open_datasets(paths, split)
    val_paths = val_paths or paths
    validation = open_datasets(val_paths, val_split, training.class_names)
    for dataset, given in ((training, paths), (validation, val_paths)):
        if not any((~(a.difficult | a.crowd)).any() for a in dataset.annotations):
            raise ValueError(f"{', '.join(given)}: split {dataset.split!r} has no objects to find")
    return training, validation


def train(
    arguments: argparse.Namespace,
    config: TrainConfig,
    processes: Processes,
    interrupts: Interrupts,
) -> None:
    last = arguments.output / LAST
    if last.exists() and not arguments.resume:
        raise ValueError(
            f"{arguments.output} already holds a run: give --resume or another --output"
        )
    check_folder(arguments.output)  # not after all pictures have been read
    training, validation = open_data(
        arguments.data, arguments.split, arguments.val_split, arguments.val_data
    )
    network = make_network(config, len(training.class_names))
    steps = len(training) // config.batch_size
    if not steps:
        raise ValueError(f"{len(training)} images do not fill one batch of {config.batch_size}")
    trainer = Trainer(config, network, steps, processes)
    progress = Progress()
    if arguments.resume and last.exists():
        progress = restore(last, trainer, training.class_names)
    else:
        if arguments.resume:
            _say(processes, f"{last} is not there: the run begins at its beginning")
        if arguments.weights:
            _say(processes, load_initial(trainer, arguments.weights))
    best = arguments.output / BEST
    if progress.best_epoch and not best.exists():
        _say(processes, f"{best} is gone: the best of the epochs from here on will be kept")
        progress.best, progress.best_epoch = Progress.best, 0
    if processes.main:
        describe(trainer, training, validation)
    course = Course(arguments.output, arguments.val_every, arguments.save_every, arguments.workers)
    with alone(arguments.output) if processes.main else nullcontext():
        examples = open_examples(arguments, config, network, training, processes)
        if processes.main:
            tell(examples.misfits(), "pictures are not of the size that was annotated")
        Run(trainer, examples, validation, progress, course, interrupts).train()
    if progress.best_epoch:
        _say(processes, f"best mAP50 {progress.best:.4f} after epoch {progress.best_epoch}: {best}")


def open_examples(
    arguments: argparse.Namespace,
    config: TrainConfig,
    network: Network,
    training: Dataset,
    processes: Processes,
) -> TrainingSet:
    """The pictures to train on, read into the cache that was asked for."""
    largest = None
    if config.multi_scale:
        low, high = config.multi_scale
        largest = largest_size(low, high, config.height, config.width, network.max_stride)
    if arguments.cache == "disk" and not processes.main:
        processes.barrier()  # rank 0 writes the file
    examples = TrainingSet(
        training,
        config.height,
        config.width,
        config.augment,
        seed=config.seed,
        resize="letterbox" if network.letter_box else "stretch",
        largest=largest,
        cache=arguments.cache,
        cache_bytes=CACHE_BYTES // processes.local_world,
        cache_folder=arguments.cache_folder or arguments.output,
        progress=processes.main and sys.stderr.isatty(),
    )
    if arguments.cache == "disk" and processes.main:
        processes.barrier()
    return examples


def describe(trainer: Trainer, training: Dataset, validation: Dataset) -> None:
    network, config, processes = trainer.network, trainer.config, trainer.processes
    print(
        f"{config.model}: {network.parameters():,} parameters, "
        f"{network.operations() / 1e9:.2f} Gops at {network.width}x{network.height}, "
        f"{network.num_classes} classes ({', '.join(training.class_names)})"
    )
    if processes.world > 1:
        print(f"{processes.world} processes, {config.batch_size // processes.world} images each")
    for name, dataset in (("train", training), ("val", validation)):
        print(f"{name}: {len(dataset)} images")
        tell(dataset.problems, f"problems in the annotations of {name}")
    warmup = warmup_steps(config, trainer.total_steps, trainer.steps_per_epoch)
    if 2 * warmup > trainer.total_steps:
        print(
            f"note: the learning rate rises in the first {warmup} of {trainer.total_steps} steps; "
            "--warmup-steps and --warmup-epochs set that"
        )
    augment = config.augment
    if max(augment.mosaic, augment.cutmix, augment.mixup) and (
        trainer.total_steps <= config.mosaic_off_epochs * trainer.steps_per_epoch
    ):
        print(
            f"note: pictures are joined in no epoch, as the last {config.mosaic_off_epochs} see "
            "whole ones only; --mosaic-off-epochs sets that"
        )


def tell(problems: Sequence[str], what: str) -> None:
    """How many there are, and the first of them."""
    if problems:
        print(f"{what}: {len(problems)}")
    for problem in problems[:SHOWN]:
        print(f"  {problem}")
    if len(problems) > SHOWN:
        print(f"  and {len(problems) - SHOWN} more")


def main(argv: Sequence[str] | None = None) -> int:
    """-> exit status: 0; 2 after an error that was told; 130 after Ctrl-C or SIGTERM."""
    arguments = parse(argv)
    processes = Processes(torch.device("cpu"))
    with Interrupts() as interrupts:
        try:
            if not arguments.print_config:
                processes = Processes.start(arguments.device)
            config, notes = configuration(arguments)
            if notes:
                _say(processes, f"note: not honoured: {', '.join(notes)}")
            if arguments.print_config:
                print(json.dumps(config.to_json(), indent=1))
                return 0
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DatasetWarning)  # `describe` names the problems
                train(arguments, config, processes, interrupts)
        except (ValueError, OSError) as error:
            if processes.claim_error():
                print(f"error: {error}", file=sys.stderr)
            return 2
        except Stopped as stopped:
            _say(processes, f"\n{stopped}; go on with:\n{_command(argv, processes)}")
            return 130
        except KeyboardInterrupt:
            last = arguments.output / LAST
            told = f"{last} holds the run up to its last save" if last.exists() else "nothing saved"
            _say(processes, f"\ninterrupted, {told}; go on with:\n{_command(argv, processes)}")
            return 130
        except RuntimeError as error:
            return _failed(error, processes, interrupts)
        finally:
            processes.close()
    return 0


def _failed(error: RuntimeError, processes: Processes, interrupts: Interrupts) -> int:
    """What torch raises: for a peer that has gone, for a full GPU, or for a mistake of ours."""
    if processes.world > 1 and interrupts.requested:
        return 130
    first = processes.claim_error()
    if isinstance(error, torch.cuda.OutOfMemoryError):
        if first:
            print(
                f"error: {error}; more --subdivisions, --precision bf16 or a smaller --batch need "
                "less memory",
                file=sys.stderr,
            )
        return 2
    if processes.world > 1 and not first:
        return 2  # because another process failed, which has said why
    if processes.world > 1 and ("gloo" in str(error) or isinstance(error, dist.DistError)):
        reason = str(error).splitlines()[0]
        print(f"error: another process of the run has ended ({reason})", file=sys.stderr)
        return 2
    raise error


def _command(argv: Sequence[str] | None, processes: Processes) -> str:
    """The command that goes on with the run."""
    given = list(sys.argv[1:] if argv is None else argv)
    if "--resume" not in given:
        given.append("--resume")
    start = ["python", "-m", "training.train"]
    if processes.world > 1:
        start = ["torchrun", "--nproc-per-node", str(processes.local_world), *start[1:]]
    return shlex.join([*start, *given])


def _say(processes: Processes, text: str) -> None:
    if processes.main:
        print(text, file=sys.stderr if text.startswith("\n") else sys.stdout, flush=True)


if __name__ == "__main__":
    sys.exit(main())
