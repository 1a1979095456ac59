"""
The locked judge: how many records does extract.py read right? `python3 judge.py [--held-out]`

It draws records after the program stands fixed, gives it the text alone, in a process of its own, and
compares with what the text was made from. --held-out draws formats that the other records never have.
"""

import datetime
import json
import os
import random
import subprocess
import sys

RECORDS = 2000
SECONDS = 20  # for all of them
MONTHS = (
    "January February March April May June July August September October November December".split()
)
SIGNS = {"EUR": "€", "USD": "$", "GBP": "£"}


def date_text(draw: random.Random, date: datetime.date, held_out: bool) -> str:
    month = MONTHS[date.month - 1]
    forms = [
        f"{date:%Y-%m-%d}",
        f"{date:%d.%m.%Y}",
        f"{date.day} {month[:3]} {date.year}",
        f"{month} {date.day}, {date.year}",
        f"{date.day}. {month} {date.year}",
        f"{date.year}/{date.month}/{date.day}",
    ]
    if held_out:
        forms = [f"{date:%Y%m%d}", f"{month[:3]}. {date.day} {date.year}", *forms[1:3]]
    return draw.choice(forms)


def amount_text(draw: random.Random, cents: int, currency: str, held_out: bool) -> str:
    whole, rest = divmod(cents, 100)
    english, german, swiss = (
        f"{whole:,}",
        f"{whole:,}".replace(",", "."),
        f"{whole:,}".replace(",", "'"),
    )
    forms = [
        f"{currency} {whole}.{rest:02}",
        f"{english}.{rest:02} {currency}",
        f"{german},{rest:02} {currency}",
        f"{SIGNS[currency]}{english}.{rest:02}",
        f"{german},{rest:02}{SIGNS[currency]}",
    ]
    if held_out:
        forms = [
            f"{currency} {swiss}.{rest:02}",
            f"{whole},{rest:02} {SIGNS[currency]}",
            *forms[1:3],
        ]
    return draw.choice(forms)


def record(draw: random.Random, held_out: bool) -> tuple[str, dict]:
    """(a line of text, what it says)."""
    date = datetime.date(2019, 1, 1) + datetime.timedelta(days=draw.randrange(2500))
    cents = int(10 ** draw.uniform(1, 7))
    currency = draw.choice([*SIGNS])
    number = str(draw.randrange(1, 10**6)).zfill(draw.choice([1, 4, 6]))
    forms = [f"#{number}", f"Invoice {number}", f"No. {number}", f"Ref:{number}", f"INV-{number}"]
    named = draw.choice(forms)
    parts = [named, date_text(draw, date, held_out), amount_text(draw, cents, currency, held_out)]
    said = {
        "id": number,
        "date": date.isoformat(),
        "amount": f"{cents / 100:.2f}",
        "currency": currency,
    }
    if draw.random() < 0.1:
        del parts[1]
        said["date"] = None
    draw.shuffle(parts)
    noise = draw.choice(["", "paid", "due in 30 days", "2 items", "see page 3", "VAT 19%"])
    if noise:
        parts.insert(draw.randrange(len(parts) + 1), noise)
    separator = draw.choice([" | ", "; ", "  ", "\t", " - "])
    return separator.join(parts), said


def main():
    held_out = "--held-out" in sys.argv
    draw = random.Random(f"{held_out} {os.environ.get('AUTORESEARCH_SEED', '42')}")
    records = [record(draw, held_out) for _ in range(RECORDS)]
    given = "".join(f"{text}\n" for text, _ in records)
    command = [sys.executable, "-I", "extract.py"]
    ran = subprocess.run(command, input=given, capture_output=True, text=True, timeout=SECONDS)
    if ran.returncode:
        sys.exit(f"FAIL: extract.py: {ran.stderr.strip().splitlines()[-1]}")
    answers = ran.stdout.splitlines()
    if len(answers) != len(records):
        sys.exit(f"FAIL: extract.py printed {len(answers)} lines for {len(records)} records")
    right, wrong = 0, []
    for (text, said), answer in zip(records, answers):
        try:
            same = json.loads(answer) == said
        except ValueError:
            same = False
        right += same
        if not same and len(wrong) < 5 and not held_out:
            wrong.append(f"  {text!r} is {json.dumps(said)}, not {answer[:120]}")
    print("wrong, for example:", *wrong, sep="\n")
    print(f"METRIC pass_rate={right / len(records):.4f}")


if __name__ == "__main__":
    main()
