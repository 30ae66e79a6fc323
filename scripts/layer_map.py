#!/usr/bin/env python
"""Print a map for compression=tied: which layers of a trained network stay, by what they compute.

python scripts/layer_map.py outputs/dense --keep 4

docs/strategies/tied.md says how.
"""

import sys
from itertools import pairwise
from pathlib import Path

import memfold
from memfold.strategies.layers.similarity import layer_features, linear_cka, map_of
from memfold.studies.arguments import command_parser, ending_in_one_line, positive_integer
from memfold.training import load_model
from memfold.training.load import read_data


def main(arguments: list[str]) -> int:
    """Return the exit status."""
    parser = command_parser(__doc__ or "")
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("--keep", type=positive_integer, required=True, metavar="K")
    parser.add_argument("--samples", type=positive_integer, default=512, metavar="N")
    parser.add_argument("--layers", metavar="GLOB", help="as compression.layers")
    given = parser.parse_args(arguments)

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
        print(f"compression.map={list(map_of(alike, given.keep))}".replace(" ", ""))
        return 0

    return ending_in_one_line(body)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
