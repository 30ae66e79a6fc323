"""Files of the user are still what they were, or are not."""

from pathlib import Path

import pytest

from memfold.data import own_files
from memfold.data.own_files import checksum_of
from memfold.errors import InputError


def test_names_sizes_and_contents_count_and_places_do_not(tmp_path: Path) -> None:
    def write(folder: str, *texts: str) -> dict[str, Path]:
        (tmp_path / folder).mkdir()
        for number, text in enumerate(texts):
            (tmp_path / folder / str(number)).write_text(text)
        return {str(number): tmp_path / folder / str(number) for number in range(len(texts))}

    one = write("one", "abc", "", "d")
    assert checksum_of(one) == checksum_of(write("two", "abc", "", "d"))
    others = [write("three", "abx", "", "d"), write("four", "ab", "c", "d"), {"x": one["0"]}]
    assert len({checksum_of(files) for files in [one, *others]}) == 4
    assert checksum_of({}) is None
    with pytest.raises(InputError, match=r"none cannot be read: No such file"):
        checksum_of({"0": tmp_path / "none"})


def test_of_much_it_reads_what_is_spread_evenly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_files, "_BLOCK", 4)
    monkeypatch.setattr(own_files, "_MOST_BLOCKS", 5)
    files = {name: tmp_path / name for name in "abc"}
    content = {"a": b"0123456789", "b": b"", "c": bytes(30)}
    for name, path in files.items():
        path.write_bytes(content[name])
    before = checksum_of(files)
    seen = []
    for position in range(40):
        name, place = ("a", position) if position < 10 else ("c", position - 10)
        changed = bytearray(content[name])
        changed[place] ^= 255
        files[name].write_bytes(changed)
        seen.append(checksum_of(files) != before)
        files[name].write_bytes(content[name])
    # Blocks of 4 at 0, 8, 16, 24, 32; the one at 8 ends with its file.
    assert [i for i, is_seen in enumerate(seen) if is_seen] == [
        *range(4),
        8,
        9,
        *range(16, 20),
        *range(24, 28),
        *range(32, 36),
    ]
