import pytest

from pipelines.data.addresses import without_secrets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("https://me:p@ss@hub.example:80/a is away", "https://hub.example:80/a is away"),
        ("(https://cdn.example/a?sig=abc&x=1)", "(https://cdn.example/a?...)"),
        ("hf://datasets/a/b@main/c.parquet: damaged", "hf://datasets/a/b@main/c.parquet: damaged"),
        ("no address: me@example.org", "no address: me@example.org"),
    ],
)
def test_addresses_are_shown_without_login_and_query(text: str, expected: str):
    assert without_secrets(text) == expected
