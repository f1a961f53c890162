"""No part of a password or token is left in a message, whatever signs it holds; what is no secret is still there."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffgym.tracking.masking import masked, shown

MARK = "s3cret"  # stands in every part of every secret
SCHEMES = st.sampled_from(["postgresql", "mysql+pymysql", "mssql+pyodbc", "http", "https", "sqlite+pysqlcipher"])
# Parts of a password, between signs that a reader of URIs may take for its end.
PASSWORDS = st.lists(
    st.sampled_from(["@", "/", ":", "?", "#", "&", "=", ";", "%", "+", "//", "@/", ":@"]), max_size=4
).map(lambda signs: MARK + "".join(sign + MARK for sign in signs))
QUERIES = st.lists(st.sampled_from(["token", "password", "sslkey", "email"]), max_size=3)


@st.composite
def addresses(draw: st.DrawFn) -> str:
    scheme, password = draw(SCHEMES), draw(PASSWORDS)
    user = draw(st.sampled_from(["", "me", "me@company"]))
    login = draw(st.sampled_from([f"{user}:{password}@", f"{user}:{quote(password, safe='')}@", ""]))
    place = draw(st.sampled_from(["host", "10.0.0.1:5432", "[::1]:80", "db.example:1/name", ""]))
    query = "&".join(f"{name}={draw(st.sampled_from([password, quote(password)]))}" for name in draw(QUERIES))
    return f"{scheme}://{login}{place}{'?' if query else ''}{query}"


@given(addresses())
def test_an_address_is_shown_without_its_secrets(uri: str) -> None:
    assert MARK not in shown(uri)
    assert shown(uri).startswith(uri.partition("://")[0])


@given(addresses())
def test_so_is_a_text_that_holds_it(uri: str) -> None:
    text = masked(f"cannot open {uri} (refused)")
    assert MARK not in text
    assert text.startswith("cannot open ")


@given(PASSWORDS)
def test_a_known_password_is_masked_wherever_it_stands(password: str) -> None:
    quoted = quote(password, safe="")
    uri = f"postgresql://me:{quoted}@host/db?token={quoted}"
    text = masked(f"password {password} of me is wrong, url: /api?token={quoted}", uri)
    assert text == "password *** of me is wrong, url: /api?token=***"


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("sqlite:////home/me@work/ml:runs/mlflow.db", "/home/me@work/ml:runs/mlflow.db"),
        ("/home/me@work/mlruns", "/home/me@work/mlruns"),
        ("https://tracking.example/mlflow", "https://tracking.example/mlflow"),
        ("http://token@host", "http://***@host"),
        ("postgresql://me:p@ss/word@host:5432/db", "postgresql://***@host:5432/db"),
        ("https://host/path?token=abc", "https://host/path?***"),
        ("postgresql://me:pass?w@rd@host/db", "postgresql://***"),
        ("postgresql://me:no-host/db", "postgresql://me:***"),
        ("postgresql:/me:one-slash@host/db", "postgresql://***@host/db"),
    ],
)
def test_what_is_no_secret_is_shown(uri: str, expected: str) -> None:
    assert shown(uri) == expected


def test_words_are_left_alone() -> None:
    said = "FATAL: no such host: port 5432 (see https://mlflow.org/docs/latest/tracking.html for help)"
    assert masked(said, "postgresql://me:abcdef@host/db") == said


def test_a_password_of_two_letters_garbles_no_message() -> None:
    assert masked("a bad day", "mysql://me:ba@host/db") == "a bad day"
