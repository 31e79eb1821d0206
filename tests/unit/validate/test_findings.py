from megatron_sstoken.validate.findings import divisors


def test_divisors():
    assert (divisors(1), divisors(7), divisors(12)) == ("1", "1 or 7", "1, 2, 3, 4, 6 or 12")
    assert divisors(128) == "1, 2, 4, 8, 16, 32 or 64"
