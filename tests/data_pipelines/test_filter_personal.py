"""Personal data is found by its form and masked; what only looks like it stays."""

import pyarrow as pa
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipelines import stages
from data_pipelines.stages import personal
from data_pipelines.stages.texts import Texts
from slmjax.config import MaskPersonalDataConfig

CONFIG = MaskPersonalDataConfig()
TOKEN = "A1b2C3d4E5f6G7h8I9j0K1l2M3n4O5p6Q7r8"  # 36 characters
KEY = "-----BEGIN RSA PRIVATE KEY-----\nMIIB\nabc=\n-----END RSA PRIVATE KEY-----"


def masked(text: str, config: MaskPersonalDataConfig = CONFIG) -> str:
    (changed,) = stages.rewrite(config, Texts.of([text]))[0].strings
    return changed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Mail john.doe+x@mail.example.co.uk, now", "Mail <EMAIL>, now"),
        ("<bob@example.com>;ann@example.org", "<<EMAIL>>;<EMAIL>"),
        ("mailto:me@example.com", "mailto:<EMAIL>"),
        ("from 8.8.8.8:53 to [2606:4700:4700::1111]", "from <IP>:53 to [<IP>]"),
        ("4111 1111 1111 1111 or 4111-1111-1111-1111 or 378282246310005.", "<CARD> or <CARD> or <CARD>."),
        ("3782 822463 10005", "<CARD>"),
        ("Call +44 20 7946 0958 or (415) 555-0132 today", "Call <PHONE> or <PHONE> today"),
        ("415.555.0132, 1-415-555-0132, +14155550132", "<PHONE>, <PHONE>, <PHONE>"),
        ("AKIAIOSFODNN7EXAMPLE", "<SECRET>"),
        (f"token=ghp_{TOKEN}", "token=<SECRET>"),
        (f'"github_pat_{TOKEN}"', '"<SECRET>"'),
        (f"glpat-{TOKEN} xox{'b'}-123456789012-abcdef", "<SECRET> <SECRET>"),
        (f"sk_{'live'}_{TOKEN}", "<SECRET>"),
        (f"AIza{TOKEN[:35]}", "<SECRET>"),
        (f"sk-{'ant'}-api03-{TOKEN}", "<SECRET>"),
        (f"hf_{TOKEN} npm_{TOKEN}", "<SECRET> <SECRET>"),
        (f"pypi-AgEI{TOKEN}{TOKEN}", "<SECRET>"),
        (f"SG.{TOKEN[:22]}.{TOKEN}", "<SECRET>"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.dozjgNryP4J3", "<SECRET>"),
        ("https://user:pa55word@example.com/x", "https://<SECRET>@example.com/x"),
        (f"a\n{KEY}\nb", "a\n<SECRET>\nb"),
        ("Grüße an jürgen@example.com", "Grüße an jürgen@example.com"),  # not an address in ASCII
        ("„a@example.com“", "„a@example.com“"),
    ],
)
def test_what_is_masked(text, expected):
    assert masked(text) == expected
    assert masked(f"Before. {text} After 日本.") == f"Before. {expected} After 日本."
    assert masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "@property\ndef f(): a @ b", "user@localhost", "a@b", "see @someone", "x@y.1", "http://a:b", "http://host:80/x@y",
        "127.0.0.1 192.168.0.1 10.1.2.3", "1.2.3", "1.2.3.4.5", "256.1.1.1", "fe80::1 2001:db8::1", "a::b 12:30:45",
        "4111 1111 1111 1112", "1234567812345678", "0.4111111111111111", "x4111111111111111", "5500000000000004e5",
        "2012-10-11 1,000,000 555-0132 12345-6789", "pages 100-200", "+12345678", "123-456-7890-1", "v1.2.3-4567",
        "AKIAIOSFODNN7EXAMPLEX", "ghp_short", "task-force-of-many-words-in-a-row", "eyJ.eyJ.x",
        "sk-with-no-digits-in-it-at-all", "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----", "PRIVATE KEY",
    ],
)  # fmt: skip
def test_what_only_looks_like_it_stays(text):
    assert masked(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "2024-01-15T10:20:30Z ISBN 978-3-16-148410-0", "550e8400-e29b-41d4-a716-446655440000", "(2012) 123-4567",
        "da39a3ee5e6b4b0d3255bfef95601890afd80709", "lat 52.5200066, lon 13.4049540", "$1,234,567.89 in 1999-2003",
        "3.14159265358979323846", "10.1109/5.771073 arXiv:1706.03762", "RFC 2822 section 3.2.1", "ratio 16:9:3",
        "0x2001:db8", "172.16.0.1 169.254.1.1 100.64.0.1 0.0.0.0 255.255.255.255", "fd00::1 fe80::1",
        "password=hunter2", "-----BEGIN EC PRIVATE KEY-----\nwithout an end", "\uff14" + "\uff11" * 15,
    ],
)  # fmt: skip
def test_numbers_of_other_kinds_stay(text):
    assert masked(text) == text


def with_luhn(prefix: str, length: int) -> str:
    """The digits with a last one that makes the checksum right, by the definition in ISO/IEC 7812-1, annex B."""
    body = prefix + "0" * (length - 1 - len(prefix))
    total = sum(
        (2 * int(digit) - 9 * (int(digit) > 4)) if i % 2 == 0 else int(digit) for i, digit in enumerate(body[::-1])
    )
    return body + str(-total % 10)


@pytest.mark.parametrize(
    ("issuer", "prefixes", "lengths"),
    [
        ("American Express", ("34", "37"), (15,)),
        ("Diners", ("300", "305", "36", "38"), (14,)),
        ("Discover", ("6011", "644", "65"), (16,)),
        ("JCB", ("3528", "3589"), (16,)),
        ("Maestro", ("5018", "6304", "6759", "6763"), (13, 16, 19)),
        ("Mastercard", ("51", "55", "2221", "2720"), (16,)),
        ("Visa", ("4",), (13, 16, 19)),
    ],
)
def test_cards_of_every_issuer(issuer, prefixes, lengths):
    for prefix in prefixes:
        for length in lengths:
            digits = with_luhn(prefix, length)
            assert masked(f"paid with {digits}.") == "paid with <CARD>.", issuer
            wrong = digits[:-1] + str((int(digits[-1]) + 5) % 10)
            assert masked(f"paid with {wrong}.") == f"paid with {wrong}.", issuer
            too_long = with_luhn(prefix, 20)
            assert masked(too_long) == too_long


def test_numbers_with_a_right_checksum_that_no_issuer_has_stay():
    for prefix in ("1", "7", "8", "9", "56", "2220", "2721", "301" * 2, "3527"):
        digits = with_luhn(prefix, 16)
        assert masked(digits) == digits


@pytest.mark.parametrize("digits", range(6, 18))
def test_telephone_numbers_have_8_to_15_digits(digits):
    separated = "+49 " + "12345678901234567"[: digits - 2]
    assert masked(separated) == ("<PHONE>" if 8 <= digits <= 15 else separated)
    together = "+" + "49123456789012345"[:digits]
    assert masked(together) == ("<PHONE>" if 10 <= digits <= 15 else together)


def test_kinds_are_counted_and_chosen():
    texts = ["a@example.com 8.8.8.8 b@example.com", "", "4111111111111111", "10.0.0.1"]
    _, attributes = stages.rewrite(CONFIG, Texts.of(texts))
    rows = pa.record_batch(attributes).to_pylist()
    assert [row["masked_email"] for row in rows] == [2, 0, 0, 0]
    assert [row["masked_ip"] for row in rows] == [1, 0, 0, 0]
    assert [row["masked_card"] for row in rows] == [0, 0, 1, 0]
    assert rows[0].keys() == {"bytes", *(f"masked_{kind}" for kind in CONFIG.kinds)}
    emails = MaskPersonalDataConfig(kinds=("email",))
    assert masked(texts[0], emails) == "<EMAIL> 8.8.8.8 <EMAIL>"
    assert masked("10.0.0.1", MaskPersonalDataConfig(public_ips_only=False)) == "<IP>"
    assert stages.failed_rules(CONFIG, pa.record_batch(attributes)).tolist() == ["", "empty", "", ""]


def test_where_kinds_overlap_the_first_one_wins():
    assert masked("https://me@example.com:pw@8.8.8.8/") == "https://<EMAIL>:<EMAIL>/"[:15] + ":pw@<IP>/"
    assert masked(f"{KEY.replace('abc=', 'a@example.com')}") == "<SECRET>"


def test_the_luhn_checksum_is_that_of_the_standard():
    right = ["4539578763621486", "5555555555554444", "6011111111111117", "30569309025904", "3530111333300000"]
    assert all(map(personal._is_card, right))
    assert not personal._is_card("79927398713")  # no issuer's
    for digits in right:
        wrong = [digits[:i] + str((int(digit) + 1) % 10) + digits[i + 1 :] for i, digit in enumerate(digits) if i > 5]
        assert not any(map(personal._is_card, wrong))


_PIECES = st.sampled_from(
    [
        *(
            "a@b.co",
            "x",
            "@",
            ".",
            "8.8.4.4",
            "1.2.3.4",
            ":",
            "2606:4700::1",
            "4111111111111111",
            "4111 1111 1111 1111",
        ),
        *("415-555-0132", "+1 415 555 0132", "(415) 555-0132", " ", " ", "\n", "é", "\xa0", "-", "+", "12", "://u:p@h"),
        *("AKIAIOSFODNN7EXAMPLE", f"ghp_{TOKEN}", f"SG.{TOKEN[:20]}.{TOKEN[:20]}", KEY, "PRIVATE KEY", "-----BEGIN "),
    ]
)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.lists(_PIECES, max_size=12).map("".join), max_size=4))
@example([KEY, KEY[:40], KEY])
@example(["a@b.co\xa0", "\xa08.8.4.4", "\xa0AKIAIOSFODNN7EXAMPLE", "éAKIAIOSFODNN7EXAMPLE"])
def test_a_batch_is_searched_as_every_word_and_line_would_be(texts):
    batch = Texts.of(texts)
    found = personal._first_of_overlapping(personal._find(CONFIG, batch))
    expected = [
        (int(start) + a, int(start) + b, kind)
        for start, text in zip(batch.starts, texts, strict=True)
        for a, b, kind in personal.find_plainly(CONFIG, text)
    ]
    assert found == expected


def test_much_that_is_suspicious_takes_little_time():
    pieces = ("@", "a@", "1-", "8.", "+1", "-----BEGIN ", "ffff:", "4111 ")
    for text in (*(piece * 100_000 for piece in pieces), "f" * 10**7):
        assert masked(text) == text
