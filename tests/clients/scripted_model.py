"""
A model on loopback that follows a script: it speaks as much of Anthropic's Messages and of OpenAI's
Responses, streamed, as the clients need.

A script is a list of (tool, arguments), one call a turn; arguments may be a function without
parameters. A conversation says itself how far it has come, because our calls are numbered: a client
that repeats a request gets the same answer.
"""

import http.server
import json
import re
import threading
import time

PROMPT = "continue the night"  # stands in the requests of the main conversation alone


def text_of(content) -> str:
    """The text in a message's or a result's content, however it is wrapped."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return text_of(content.get("text") or content.get("content") or "")
    return "\n".join(map(text_of, content or []))


class ScriptedModel:
    """A server while the `with` lasts.

    scripts: of the conversations, in turn; the last one is repeated.
    answers: one list a conversation, with what the client answered to each call.
    """

    def __init__(self, scripts: list[list[tuple]]):
        self.scripts = scripts
        self.answers: list[list[str]] = []
        self.said: dict[int, tuple] = {}  # by turn, in the present conversation
        model = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                self.answer(b'{"data": [], "models": []}', "application/json")

            do_HEAD = do_GET

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
                path = self.path.split("?")[0]
                if path.endswith("/messages"):
                    return self.answer(model.messages(body))
                if path.endswith("/responses"):
                    return self.answer(model.responses(body))
                self.answer(b'{"input_tokens": 1}', "application/json")

            def answer(self, content: bytes, kind="text/event-stream"):
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *words):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.server.handle_error = lambda *_: None  # a client that went away
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def next_call(self, answers: dict[int, str]) -> tuple[str, str, object] | None:
        """(id, tool, arguments) after the calls that were answered; None at the end of the script."""
        if not answers and (not self.answers or self.answers[-1]):
            self.answers.append([])
            self.said = {}
        self.answers[-1][:] = [answers[step] for step in sorted(answers)]
        script = self.scripts[min(len(self.answers), len(self.scripts)) - 1]
        step = len(answers)
        if step >= len(script):
            return None
        if step not in self.said:
            tool, arguments = script[step]
            self.said[step] = tool, arguments() if callable(arguments) else arguments
        return f"call_{step}_x", *self.said[step]

    # Anthropic's Messages

    def messages(self, body: dict) -> bytes:
        answers = {}
        for message in body["messages"]:
            for part in message["content"] if isinstance(message["content"], list) else []:
                if part.get("type") == "tool_result":
                    number = re.match(r"call_(\d+)_", part["tool_use_id"])
                    failed = "ERROR: " if part.get("is_error") else ""
                    answers[int(number[1])] = failed + text_of(part.get("content"))
        main = body.get("tools") and PROMPT in json.dumps(body["messages"][0])
        call = self.next_call(answers) if main else None
        usage = {"input_tokens": 100, "output_tokens": 10}
        head = {"id": f"msg_{time.time_ns()}", "type": "message", "role": "assistant"}
        head |= {"model": body.get("model"), "content": [], "stop_reason": None, "usage": usage}
        if call:
            block = {"type": "tool_use", "id": call[0], "name": call[1], "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(call[2])}
        else:
            block, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": "Done."}
        if not body.get("stream"):
            text = [{"type": "text", "text": "Done."}]
            return json.dumps({**head, "content": text, "stop_reason": "end_turn"}).encode()
        stop = {"stop_reason": "tool_use" if call else "end_turn", "stop_sequence": None}
        return events(
            ("message_start", {"message": head}),
            ("content_block_start", {"index": 0, "content_block": block}),
            ("content_block_delta", {"index": 0, "delta": delta}),
            ("content_block_stop", {"index": 0}),
            ("message_delta", {"delta": stop, "usage": {"output_tokens": 10}}),
            ("message_stop", {}),
        )

    # OpenAI's Responses

    def responses(self, body: dict) -> bytes:
        answers = {}
        for item in body["input"]:
            if str(item.get("type")).endswith("_call_output"):
                number = re.match(r"call_(\d+)_", item["call_id"])
                answers[int(number[1])] = text_of(item.get("output"))
        call = self.next_call(answers) if PROMPT in json.dumps(body["input"]) else None
        if call and isinstance(call[2], str):  # a tool that takes free text
            item = {
                "type": "custom_tool_call",
                "call_id": call[0],
                "name": call[1],
                "input": call[2],
            }
        elif call:
            item = {"type": "function_call", "call_id": call[0], "name": call[1]}
            item["arguments"] = json.dumps(call[2])
        else:
            text = [{"type": "output_text", "text": "Done.", "annotations": []}]
            item = {"type": "message", "role": "assistant", "content": text}
        item |= {"id": f"item_{time.time_ns()}", "status": "completed"}
        usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
        usage |= {"input_tokens_details": {"cached_tokens": 0}}
        usage |= {"output_tokens_details": {"reasoning_tokens": 0}}
        response = {"id": f"resp_{time.time_ns()}", "object": "response", "output": [item]}
        return events(
            ("response.created", {"response": {**response, "output": []}}),
            ("response.output_item.added", {"output_index": 0, "item": item}),
            ("response.output_item.done", {"output_index": 0, "item": item}),
            ("response.completed", {"response": {**response, "usage": usage}}),
        )


def events(*named: tuple[str, dict]) -> bytes:
    """Server-sent events, each with its name as its type."""
    parts = [
        f"event: {name}\ndata: {json.dumps({'type': name, **data})}\n\n" for name, data in named
    ]
    return "".join(parts).encode()
