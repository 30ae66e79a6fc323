#!/usr/bin/env python
"""Print which layers of a trained network stay, by what they compute.

Others then compute with their weights, which is a map for compression=tied, or are left out.

python scripts/layer_map.py outputs/dense --keep 4
python scripts/layer_map.py outputs/dense --drop 2

docs/strategies/tied.md says how.
"""

import sys
from itertools import pairwise
from pathlib import Path

import memfold
from memfold.strategies.layers.similarity import kept_layers, layer_features, linear_cka, map_of
from memfold.studies.arguments import command_parser, ending_in_one_line, positive_integer
from memfold.training import load_model
from memfold.training.load import read_data


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", type=Path, help="folder of a run")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--keep", type=positive_integer, metavar="K", help="weights of so many")
    which.add_argument("--drop", type=positive_integer, metavar="N", help="so many layers go")
    parser.add_argument("--samples", type=positive_integer, default=512, metavar="N")
    parser.add_argument("--layers", metavar="GLOB", help="as compression.layers")
    given = parser.parse_args(arguments)
    if given.drop is not None and given.layers is not None:
        parser.error("--drop takes no --layers: init_layers counts the longest list of layers")

    def body(_: object) -> int:
        _, data = read_data(given.run)
        data.setup("fit")
        features = layer_features(
            memfold.densify(load_model(given.run)),
            data.scoring_batches(seed=0),
            layers=given.layers,
            num_samples=given.samples,
        )
        alike = [linear_cka(one, other) for one, other in pairwise(features)]
        print("similarity of neighbours:", " ".join(f"{value:.3f}" for value in alike))
        key, numbers = (
            ("init_layers", kept_layers(alike, given.drop))
            if given.drop is not None
            else ("compression.map", map_of(alike, given.keep))
        )
        print(f"{key}={list(numbers)}".replace(" ", ""))
        return 0

    return ending_in_one_line(body, "interrupted")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
