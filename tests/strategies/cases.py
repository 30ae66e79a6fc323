"""One row per strategy: options under which it fits the small models of these tests."""

STRATEGIES = {
    "dense": {},
    "stable_rps": {},
    "roast": {"tile_rows": 2, "tile_columns": 3},
    "hashednet": {},
}

SHARING = ("stable_rps", "roast", "hashednet")
