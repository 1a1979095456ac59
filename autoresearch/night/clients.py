"""
The coding agents that `night.py agent` knows: how each is started, and what its output says.

The launch lines are tested against the real clients (tests/clients; docs/agents.md has versions).
"""

from __future__ import annotations

import json
import re
import zoneinfo
from collections import deque
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from autoresearch.common import cut, one_line, printable
from autoresearch.night.settings import NIGHT, TARGET

PROMPT = "Read program.md and continue the night."


@dataclass(frozen=True)
class Client:
    """A command-line agent. The last word of the command is the prompt."""

    command: tuple[str, ...]
    install: str
    environment: dict[str, str] = field(default_factory=dict)
    budget: tuple[str, ...] = ()  # the flag that takes the dollars a session may cost, if any


CLIENTS = {
    # Claude ignores the allow entries of .claude/settings.json until a person has trusted the folder,
    # so the line carries them; and ending a turn would end what it had put into the background.
    "claude": Client(
        command=(
            *("claude", "-p", "--permission-mode", "dontAsk", "--tools", "Read,Edit,Bash"),
            *("--allowedTools", *(f"Edit(/{file})" for file in TARGET.files), f"Bash({NIGHT} *)"),
            *("--output-format", "stream-json", "--verbose", "--", PROMPT),
        ),
        install="npm install -g @anthropic-ai/claude-code, then claude, to log in",
        environment={"CLAUDE_CODE_DISABLE_BACKGROUND_TASKS": "1"},
        budget=("--max-budget-usd",),
    ),
    # Without --trust Codex loads no rules from .codex; its login shell may lose the PATH to uv.
    "codex": Client(
        command=(
            *("codex", "exec", "--trust", "--sandbox", "workspace-write"),
            *("-c", "allow_login_shell=false", "--disable", "multi_agent", "--json", PROMPT),
        ),
        install="npm install -g @openai/codex, then codex login",
    ),
}

# ------------------------------------------------------------------------------- what it has said


class Reading:
    """A session's output, line by line: readable lines, what it cost, what it said last.

    Understands the JSON lines of Claude Code (stream-json, or its one line of json) and of Codex;
    any other line stands for itself.
    """

    def __init__(self):
        self.tokens: int | None = None  # read, from the cache too, and written
        self.dollars: float | None = None
        self.said: deque[str] = deque(maxlen=10)  # the agent's and the client's own words
        self.reset: float | None = None  # when a limit is over, in seconds since 1970
        self._messages: dict[str, int] = {}  # tokens of each answer, while there is no total

    def feed(self, line: str) -> list[str]:
        """The line as a person reads it, in a few lines."""
        try:
            event = json.loads(line) if line.startswith("{") else None
            if isinstance(event, dict) and "type" in event:
                return list(self._lines_of(event))
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):
            pass  # a line of another program
        return [self._say(line)] if line.strip() else []

    def last(self) -> str:
        return self.said[-1] if self.said else "it said nothing"

    def reset_time(self, now: float) -> float | None:
        """When the limit is over that its last words name; seconds since 1970."""
        if self.reset:
            return self.reset
        times = [reset_time(text, now) for text in reversed(self.said)]
        return next(filter(None, times), None)

    def _say(self, text: str) -> str:
        text = cut(printable(text.strip()), 2000)
        self.said.append(text)
        return text

    def _lines_of(self, event: dict):
        kind = event["type"]
        if kind == "assistant":  # Claude Code
            message = event["message"]
            self._messages[message["id"]] = _total(message.get("usage") or {})
            self.tokens = sum(self._messages.values())
            for part in message["content"]:
                if part["type"] == "text":
                    yield self._say(part["text"])
                elif part["type"] == "tool_use":
                    yield f"> {part['name']} {one_line(json.dumps(part['input']), 500)}"
        elif kind == "user":
            content = event["message"]["content"]
            for part in content if isinstance(content, list) else []:
                yield f"< {one_line(_text(part.get('content')), 500)}"
        elif kind == "result":
            self.dollars = event.get("total_cost_usd")
            self.tokens = _total(event.get("usage") or {}) or self.tokens
            words = event.get("result") or " ".join(event.get("errors") or [event["subtype"]])
            yield self._say(f"ended: {words}")
        elif kind == "rate_limit_event":
            limit = event["rate_limit_info"]
            self.reset = limit.get("resetsAt") if limit.get("status") == "rejected" else None
        elif kind == "item.completed":  # Codex
            item = event["item"]
            if item["type"] == "command_execution":
                yield f"> {one_line(item['command'], 500)}"
                yield f"< {item.get('exit_code')}: {one_line(item['aggregated_output'], 500)}"
            elif item["type"] in ("agent_message", "error"):
                yield self._say(item.get("text") or item.get("message") or "")
            else:
                yield f"> {one_line(json.dumps(item), 500)}"
        elif kind == "turn.completed":
            usage = event["usage"]
            self.tokens = (self.tokens or 0) + usage["input_tokens"] + usage["output_tokens"]
        elif kind in ("error", "turn.failed"):
            yield self._say(event.get("message") or event["error"]["message"])
        elif event.get("subtype") not in (None, "init"):
            yield one_line(json.dumps(event), 300)


def _total(usage: dict) -> int:
    names = ("input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens")
    return sum(usage.get(name) or 0 for name in (*names, "output_tokens"))


def _text(content) -> str:
    if isinstance(content, list):
        return " ".join(part.get("text", "") for part in content if isinstance(part, dict))
    return str(content)


# ------------------------------------------------------------------------------------------ limits

UNITS = {"ms": 0.001, "s": 1, "m": 60, "h": 3600, "d": 86400}
A_LIMIT = re.compile(r"limit|quota|credit|too many|overloaded|\b429\b", re.I)
EPOCH = re.compile(r'(?:\||resets?_?at"?\s*[:=]\s*)(\d{10})(?:\d{3})?\b', re.I)
DURATION = re.compile(
    r"\b(?:again|resets?|retry)[ -](?:in|after) ((?:\d+(?:\.\d+)? ?[a-z]+\b[, ]*(?:and )?)+)", re.I
)
TIME_OF_DAY = re.compile(
    r"\b(?:again|resets?)(?: at| on)? "
    r"(?:(?P<month>[A-Z][a-z]{2})[a-z]* (?P<day>\d{1,2})(?:st|nd|rd|th)?,?(?: (?P<year>\d{4}),?)?"
    r"(?: at)? )?"
    r"(?P<hour>\d{1,2})(?::(?P<minute>\d\d))? ?(?P<half>[ap]m)?\b(?: ?\((?P<zone>[\w/+-]+)\))?",
    re.I,
)


def reset_time(text: str, now: float) -> float | None:
    """When the limit is over that a text names, in seconds since 1970; None where it names none.

    now: seconds since 1970. A time of day without a zone is local.
    """
    if not A_LIMIT.search(text):
        return None
    if found := EPOCH.search(text):
        return float(found[1])
    if found := DURATION.search(text):
        parts = re.findall(r"(\d+(?:\.\d+)?) ?(ms|[smhd])", found[1].lower())
        return now + sum(float(number) * UNITS[unit] for number, unit in parts)
    found = TIME_OF_DAY.search(text)
    if not found or not (found["minute"] or found["half"]):
        return None
    try:
        moment = datetime.fromtimestamp(now).astimezone()
        if found["zone"]:
            moment = moment.astimezone(zoneinfo.ZoneInfo(found["zone"]))
        hour = int(found["hour"]) % (12 if found["half"] else 24)
        hour += 12 * ((found["half"] or "").lower() == "pm")
        then = moment.replace(hour=hour, minute=int(found["minute"] or 0), second=0, microsecond=0)
        if found["month"]:
            month = datetime.strptime(found["month"], "%b").month
            year = int(found["year"] or moment.year)
            return then.replace(year=year, month=month, day=int(found["day"])).timestamp()
        # A time that has just passed is over; an earlier one is tomorrow's.
        late = moment - then > timedelta(minutes=10)
        return (then + timedelta(days=late)).timestamp()
    except (ValueError, KeyError, OSError):  # no such time, no such zone
        return None
