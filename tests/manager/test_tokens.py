"""Bearer tokens: where they come from, and that no message shows one."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitlearn_manager.client import RemoteTrunk
from splitlearn_manager.client.address import Address
from splitlearn_manager.config.secrets import read_token
from splitlearn_manager.errors import ConfigError


@pytest.mark.parametrize(
    "token", ["secret\n", "sec ret", "secret\r\nX: y", "", "s\u00e9cret", " secret"]
)
def test_what_no_header_can_carry_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ValueError, match="must be one word of printable ASCII") as caught:
        RemoteTrunk("http://host:8000", "trunk", token=token)

    shown = f"{caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}"
    assert "cret" not in shown


def test_an_address_never_shows_its_token() -> None:
    assert "secret" not in repr(Address.parse("http://host", "secret"))


@pytest.mark.parametrize("length", [4095, 4096])
def test_a_long_token_is_read_whole(tmp_path: Path, length: int) -> None:
    file = tmp_path / "token"
    file.write_text("x" * length)
    file.chmod(0o600)

    assert read_token(str(file), None) == "x" * length


def test_one_that_is_too_long_is_refused_not_cut(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("x" * 4097)
    file.chmod(0o600)

    with pytest.raises(ConfigError, match="holds more than the 4096 characters") as caught:
        read_token(str(file), None)
    with pytest.raises(ConfigError, match="environment variable TOKEN holds more than the 4096"):
        read_token(None, "TOKEN", {"TOKEN": "x" * 4097})
    assert "xx" not in str(caught.value)
