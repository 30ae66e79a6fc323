"""What methods and settings are called, so that runs of one name belong on one line."""

import json
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace

from memfold.reporting.records import Network, Run, Setting
from memfold.runs.data_names import name_data, source_of

__all__ = ["join_backbones", "label_methods", "label_settings"]

# A teacher is no detail, even if all runs of a strategy have one, an average, or given weights.
_ALWAYS_SHOWN = ("distill", "ema", "feedback_samples", "init_from")


def label_methods(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with their method set.

    A method is the strategy, followed by those of its options in which its runs differ among all
    that are given: `stable_rps (gradient_scale=projection)`. A run that does not know an option,
    because its version of memfold did not have it, differs from none in it.
    """
    values: dict[tuple[str, str], set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.options.items():
            values[run.strategy, key].add(_show(value))
    shown = {pair for pair, found in values.items() if len(found) > 1 or pair[1] in _ALWAYS_SHOWN}
    return [replace(run, method=_label(run, shown)) for run in runs]


def label_settings(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with data and backbones told apart that share a name and are not the same.

    Data of the user are named with what tells them from all others that are compared: `table
    flats.csv, price`. Options of a backbone, and what the data ask of it, are no part of its name;
    `mlp` of other widths is `mlp (1,066,440 bytes)`, after the bytes of its dense model.
    """
    runs = [_apart(run) for run in runs]
    names = name_data([_data(run) for run in runs])
    plain = [
        replace(run, setting=replace(run.setting, data=name))
        for run, name in zip(runs, names, strict=True)
    ]
    sizes: dict[Setting, set[int]] = defaultdict(set)
    for run in plain:
        sizes[run.setting].add(run.dense_bytes)
    return [_with_size(run) if len(sizes[run.setting]) > 1 else run for run in plain]


def join_backbones(runs: Sequence[Run]) -> list[Run]:
    """Return the runs with one setting for all backbones on the same data, judged by one metric.

    It is named after the network with the most runs. The methods of others say theirs, with those
    of its options in which it differs: `small, mlp (pooling=4)`; where the results do not have
    them, with the bytes of its dense model.

    Args:
        runs: With the settings and the methods that they have apart.
    """
    places: dict[object, dict[Setting, list[Run]]] = defaultdict(lambda: defaultdict(list))
    for run in runs:
        places[run.setting.data, run.setting.primary][run.setting].append(run)
    joined = []
    for networks in places.values():
        main = max(sorted(networks), key=lambda setting: len(networks[setting]))
        names = _name_networks(networks, main)
        first = networks[main][0]
        setting = replace(main, backbone=_plain(first))
        for own, group in networks.items():
            network = Network(_plain(group[0]), names[own], group[0].dense_bytes)
            joined += [
                replace(run, setting=setting)
                if own == main
                else replace(
                    run,
                    setting=setting,
                    network=network,
                    dense_bytes=first.dense_bytes,
                    method=f"{run.method}, {network.name}",
                )
                for run in group
            ]
    return joined


def _name_networks(networks: Mapping[Setting, Sequence[Run]], main: Setting) -> dict[Setting, str]:
    """Name each network by what tells it from those of its name; what `main` is goes unsaid."""
    plain = {setting: _plain(group[0]) for setting, group in networks.items()}
    options = {setting: _network_options(group) for setting, group in networks.items()}
    names = {}
    for setting, own in options.items():
        alike = [options[other] for other in networks if plain[other] == plain[setting]]
        usual = options[main] if plain[main] == plain[setting] else {}
        told = [
            f"{key}={value}"
            for key, value in sorted(own.items())
            if value != usual.get(key) and any(other.get(key, value) != value for other in alike)
        ]
        names[setting] = f"{plain[setting]} ({', '.join(told)})" if told else plain[setting]
    counts = Counter(names.values())
    return {
        setting: name if counts[name] == 1 else setting.backbone for setting, name in names.items()
    }


def _network_options(runs: Sequence[Run]) -> dict[str, str]:
    """Return the options of the backbone that all of its runs agree in, as far as they say them."""
    found: dict[str, set[str]] = defaultdict(set)
    for run in runs:
        for key, value in run.recipe.items():
            if key.startswith("backbone."):
                found[key.removeprefix("backbone.")].add(_show(value))
    return {key: values.pop() for key, values in found.items() if len(values) == 1}


def _data(run: Run) -> tuple[str, dict[str, object]]:
    """Return the kind of its data, and which they are; in older lines the recipe says it."""
    source = dict(run.source) or {"data": run.setting.data, **source_of({"recipe": run.recipe})}
    return str(source.pop("data", run.setting.data)), source


def _with_size(run: Run) -> Run:
    backbone = run.setting.backbone + _size(run)
    return replace(run, setting=replace(run.setting, backbone=backbone))


def _apart(run: Run) -> Run:
    """Undo what an earlier report has joined or added: other runs are compared now."""
    if own := run.network:
        setting = replace(run.setting, backbone=own.backbone)
        return replace(run, setting=setting, network=None, dense_bytes=own.dense_bytes)
    return replace(run, setting=replace(run.setting, backbone=_plain(run)))


def _plain(run: Run) -> str:
    return run.setting.backbone.removesuffix(_size(run))


def _size(run: Run) -> str:
    return f" ({run.dense_bytes:,} bytes)"


def _label(run: Run, shown: Container[tuple[str, str]]) -> str:
    options = [
        f"{key}={_show(value)}"
        for key, value in sorted(run.options.items())
        if (run.strategy, key) in shown
    ]
    return f"{run.strategy} ({', '.join(options)})" if options else run.strategy


def _show(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True)
