"""Seeds that depend on names and numbers alone, never on the process."""

import hashlib
from numbers import Integral

__all__ = ["derive_seed"]


def derive_seed(*parts: int | str) -> int:
    """Hash `parts` into a seed in [0, 2**63).

    Python's own `hash` differs between processes (PYTHONHASHSEED), so mappings, splits and
    shuffles derive their seeds here: the same parts give the same seed on every rank, machine
    and run.

    Args:
        parts: For example `(seed, "rotation", tensor_name)`. 1 and "1" are different parts.
    """
    tagged = (f"int:{int(p)}" if isinstance(p, Integral) else f"str:{p}" for p in parts)
    text = "\x1f".join(tagged)
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
