"""
Reads records, one a line, from standard input; prints a JSON object for each: id, date, amount, currency.

date: YYYY-MM-DD. amount: a number with two decimals, as text. currency: three letters. What a record does
not say is null. This is the file to change.
"""

import json
import re
import sys

MONTHS = {"Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6}


def extract(line: str) -> dict:
    number = re.search(r"#(\d+)", line)
    date = re.search(r"(\d{4})-(\d{2})-(\d{2})", line)
    amount = re.search(r"(\d+\.\d{2})", line)
    currency = re.search(r"\b(EUR|USD|GBP)\b", line)
    return {
        "id": number[1] if number else None,
        "date": date[0] if date else None,
        "amount": amount[1] if amount else None,
        "currency": currency[1] if currency else None,
    }


for line in sys.stdin:
    print(json.dumps(extract(line)))
