"""Check that a changed digit of a JSON file with a checksum counts as damage."""

from pathlib import Path

import pytest

from sparseinst.checked import json_line, read_checked, read_json_lines, with_checksum


def test_every_flipped_bit_of_a_file_is_found() -> None:
    whole = with_checksum({"a": 1, "b": [1.5, None], "c": {"d": "text"}}).encode()
    assert read_checked(whole) == {"a": 1, "b": [1.5, None], "c": {"d": "text"}}
    assert read_checked(whole.replace(b"\n", b"")) == read_checked(whole), "spaces are no content"
    assert read_checked(b'{"a": 1}') == {"a": 1}, "as an earlier version wrote it"
    for place in range(whole.index(b"\n "), len(whole) - 1):
        if whole[place : place + 1] not in b" \n":
            damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
            try:
                content = read_checked(damaged)
            except ValueError:
                continue
            assert content.keys() - {"a", "b", "c"}, "the name of the checksum is damaged, and shows as an unknown field"
    with pytest.raises(ValueError, match="no JSON object"):
        read_checked(b"[]")


def test_a_flipped_bit_of_a_line_leaves_it_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Neighbours stay, except when the flip removes the end of a line. A file of an earlier version has no checksums."""
    entries = [{"iteration": number, "loss": 0.1 * number} for number in (1, 2, 3)]
    whole = "".join(map(json_line, entries)).encode()
    file = tmp_path / "metrics.jsonl"
    length = len(json_line(entries[0]))
    for place in range(2 * length):
        for bit in range(8):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << bit)]) + whole[place + 1 :])
            left = read_json_lines(file)
            assert left in (entries[1:], entries[::2], entries[:1], entries[2:])
        assert "damaged or incomplete and left out" in caplog.text
        caplog.clear()
    file.write_text('{"iteration": 1}\n' + json_line(entries[1]) + '{"iteration": 3}\n')
    assert [entry["iteration"] for entry in read_json_lines(file)] == [2]
    file.write_text('{"iteration": 1}\n{"iteration": 3}\n')
    assert [entry["iteration"] for entry in read_json_lines(file)] == [1, 3]
