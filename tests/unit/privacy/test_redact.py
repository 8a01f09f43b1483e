"""What is recognised and replaced, on Presidio's own recognisers, and that hostile text does not stop it."""

from __future__ import annotations

import sys

import pytest

from noria.errors import SettingsError
from noria.settings import PrivacySettings
from noria.settings.privacy import RedactKind
from serve.privacy.redact import Redactor, redactor_of

ALL: tuple[RedactKind, ...] = ("email", "phone", "card", "key")


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return Redactor(ALL, ("US", "GB", "DE"))


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ("write to jane.doe+x@mail.example.co.uk!", "write to <EMAIL>!"),
        ("jane@intern.local and JOE@EXAMPLE.ORG", "<EMAIL> and <EMAIL>"),
        ("call +1 (212) 555-0187 or 030 901820.", "call <PHONE> or <PHONE>."),
        ("card 4111 1111 1111 1111, amex 3782-822463-10005", "card <CARD>, amex <CARD>"),
        ("4111 1111 1111 1112 fails its checksum", "4111 1111 1111 1112 fails its checksum"),
        ("sk-proj-Ab3dEf6hIj9lMn0pQr and AKIAIOSFODNN7EXAMPLE", "<KEY> and <KEY>"),
        (f"noria-0123456789abcdef-{'0f' * 32} is ours", "<KEY> is ours"),
        (f"Authorization: Bearer {'a1' * 20}", "Authorization: <KEY>"),
        ("-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----", "<KEY>"),
        ("In 2024, 12 of 3500 apples cost 1.99 @ the shop", "In 2024, 12 of 3500 apples cost 1.99 @ the shop"),
        ("sk-abcdefghijklmnop1234@corp.com", "<KEY>@corp.com"),
        ("pk_orders_by_customer_name and sk-learn-like-words", "pk_orders_by_customer_name and sk-learn-like-words"),
        ("<EMAIL> stays", "<EMAIL> stays"),
    ],
)
def test_what_is_replaced(redactor: Redactor, said: str, kept: str) -> None:
    redacted, found = redactor.redact(said)
    assert redacted == kept
    assert sum(found.values()) == sum(kept.count(f"<{kind.upper()}>") for kind in ALL) - said.count("<EMAIL>")


def test_only_the_asked_kinds_are_replaced() -> None:
    said = "jane@x.org, +1 212 555 0187"
    assert Redactor(("phone",)).redact(said) == ("jane@x.org, <PHONE>", {"phone": 1})


def test_a_match_on_the_seam_of_two_pieces_is_found(redactor: Redactor) -> None:
    for before in (690, 700, 704, 1000, 1020, 1023):
        said = "a@ " * (before // 3) + " " * (before % 3) + "jane.doe@example.org"
        assert redactor.redact(said)[1]["email"] == 1


@pytest.mark.parametrize(
    "said", ["a." * 50_000, "a@" * 30_000, "(" * 100_000, "1" * 60_000, "eyJ-" * 20_000, "sk-" * 30_000]
)
def test_hostile_text_is_read_in_linear_steps(redactor: Redactor, said: str) -> None:
    """Quadratic patterns over the whole of these would take minutes; nothing in them is anybody's."""
    assert len(redactor.redact(said)[0]) > 0


def test_without_the_library_the_setting_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "presidio_analyzer", None)
    assert redactor_of(PrivacySettings()) is None
    with pytest.raises(SettingsError, match=r"pip install 'noria\[privacy\]'") as refused:
        redactor_of(PrivacySettings(redact=("email",)))
    assert refused.value.param == "privacy.redact"


def test_a_country_that_is_none_is_refused() -> None:
    with pytest.raises(SettingsError, match="'XX'"):
        Redactor(("phone",), ("XX",))
    with pytest.raises(ValueError, match="country code"):
        PrivacySettings(phone_regions=("de",))
