"""Made-up comparisons with the shape of real ones."""

import math
import random

from memfold.reporting.records import Comparison, Curve, Problem, Reference, Run, Setting
from memfold.runs.primary import Primary

FASHION = Setting("fashion_mnist", "cnn")
DIGITS = Setting("digits", "resnet20")
LANGUAGE = Setting("shakespeare", "gpt", Primary("val/bpb", "min", "bits per byte"))
TENSORS = ("features.0.weight", "features.4.weight", "features.8.weight", "head.weight")
PRUNED = ("rand", "mag", "snip", "grasp", "synflow", "ltr", "set", "rigl")
METHODS = (
    "stable_rps (gradient_scale=length)",
    "stable_rps (gradient_scale=projection)",
    "roast",
    "hashednet",
    *PRUNED,
    "small",
    "low_rank",
)
RATIOS = (0.3, 0.1, 0.03, 0.01, 0.003)
DENSE_BYTES = 1_497_640
PROBLEMS = (
    Problem("multirun/first/17", "failed: RuntimeError: loss is nan at step 412"),
    Problem("multirun/first/18", "result.json is truncated (line 31)"),
    Problem("multirun/first/44", "missing: planned by the sweep, never run (grasp, 0.003, seed 3)"),
)


def one_run(method="dense", *, ratio=None, seed=1, bits=32, accuracy=0.9, **changes):
    """A run with plausible numbers that `changes` replaces."""
    strategy = method.partition(" (")[0]
    share = 1.0 if ratio is None else ratio
    indices = 1.4 if strategy in PRUNED else 1.0
    values = dict(
        folder=f"multirun/first/{method}-{ratio}-{seed}".replace(" ", ""),
        setting=FASHION,
        strategy=strategy,
        method=method,
        seed=seed,
        ratio=share * 1.0002,
        requested_ratio=ratio,
        bits=bits,
        test=accuracy,
        val=accuracy + 0.004,
        stored_bytes=round(DENSE_BYTES * share * indices * bits / 32) + 3_648,
        dense_bytes=DENSE_BYTES,
        train_state_bytes=round(3 * DENSE_BYTES * (share if strategy not in PRUNED else 1)),
        peak_bytes=round(9e7 + 4e7 * share + 1e6 * seed),
        fit_seconds=60.0 + 3 * seed + 40 * share,
        step_seconds=0.021 + 0.01 * share,
        operations=round(26_000 + 1_000 * share),
        epochs=6.0,
        steps=564,
        rounds=12 if strategy == "ltr" else 1,
        command=f"python train.py compression={strategy} ratio={ratio} seed={seed}",
        environment={
            "git_commit": "3a504b3e11cbadbb3c9a56cc93c48740e48bd449",
            "git_dirty": seed == 3,
            "python": "3.11.7",
            "torch": "2.13.0+cpu",
            "device": "cpu",
        },
    )
    return Run(**(values | changes))


def curves(accuracy, noise, num_points=60):
    """Training as it looks: quick at first, then slow, never smooth."""
    steps = tuple(range(9, 9 * num_points + 1, 9))
    rising = [1 - math.exp(-4 * (i + 1) / num_points) for i in range(num_points)]
    return {
        "train/loss": Curve(
            steps, tuple(2.3 - 2 * r * accuracy + noise.gauss(0, 0.03) for r in rising)
        ),
        "val/acc": Curve(
            steps, tuple(0.1 + (accuracy - 0.1) * r + noise.gauss(0, 0.004) for r in rising)
        ),
    }


def _accuracy(number, strategy, ratio, bits, noise):
    slope = 0.012 if strategy == "stable_rps" else 0.02 + 0.004 * number
    lost = slope * (-math.log10(ratio)) ** 1.6 + {32: 0.0, 8: 0.001, 4: 0.03}[bits]
    return max(0.1, 0.905 - lost + noise.gauss(0, 0.004))


def realistic(
    *, methods=METHODS, ratios=RATIOS, seeds=(1, 2, 3), all_bits=(32, 8, 4), setting=FASHION
):
    """The size of the comparison that is shown with the project."""
    noise = random.Random(0)
    runs = []
    for seed in seeds:
        for bits in all_bits:
            accuracy = _accuracy(0, "dense", 1.0, bits, noise)
            runs.append(
                one_run(
                    seed=seed,
                    bits=bits,
                    accuracy=accuracy,
                    setting=setting,
                    curves=curves(accuracy, noise) if bits == 32 else {},
                )
            )
    for number, method in enumerate(methods):
        strategy = method.partition(" (")[0]
        for ratio in ratios:
            for seed in seeds:
                for bits in all_bits:
                    accuracy = _accuracy(number, strategy, ratio, bits, noise)
                    kept = (min(1.0, 4 * ratio), ratio, 0.7 * ratio, min(1.0, 9 * ratio))
                    is_pruned = strategy in PRUNED and bits == 32
                    runs.append(
                        one_run(
                            method,
                            ratio=ratio,
                            seed=seed,
                            bits=bits,
                            accuracy=accuracy,
                            setting=setting,
                            curves=curves(accuracy, noise) if bits == 32 else {},
                            densities={
                                t: min(1, k * (1 + number / 20))
                                for t, k in zip(TENSORS, kept, strict=True)
                            }
                            if is_pruned
                            else {},
                        )
                    )
    references = tuple(
        Reference(setting, name, ratio, 0.9 - slope * -math.log10(ratio))
        for name, slope in (("synflow", 0.02), ("Tanaka et al.", 0.03))
        for ratio in (0.3, 0.1, 0.03, 0.01)
    )
    return Comparison(tuple(runs), PROBLEMS, references)


SMALL = Comparison(
    realistic(
        methods=("stable_rps", "hashednet", "snip"), ratios=(0.1, 0.01), all_bits=(32, 8)
    ).runs
)
NAMES = {"dense", "stable_rps", "hashednet", "snip"}


def _two_tasks():
    """Language models, of which one method has collapsed, and fewer runs of a classification."""
    curves = {"val/bpb": Curve((10, 20), (4.0, 2.5)), "train/loss": Curve((10, 20), (3.0, 2.0))}
    curves |= {"val/acc": Curve((10, 20), (0.3, 0.5))}
    runs = [one_run("mag", ratio=0.1, seed=seed, accuracy=0.8) for seed in (1, 2)]
    runs += [one_run(seed=seed, accuracy=2.2, setting=LANGUAGE) for seed in (1, 2)]
    for method, mean in (("stable_rps", 2.4), ("mag", 2.45), ("snip", 5.0)):
        for ratio, more in ((0.1, 0.0), (0.01, 0.1)):
            runs += [
                one_run(
                    method,
                    ratio=ratio,
                    seed=seed,
                    accuracy=mean + more + spread,
                    setting=LANGUAGE,
                    curves=curves,
                )
                for seed, spread in ((1, -0.004), (3, 0.004))
            ]
    return Comparison(tuple(runs))


TWO_TASKS = _two_tasks()
