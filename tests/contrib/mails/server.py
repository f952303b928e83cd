"""An SMTP server on loopback, which does to recipients what a test asks for."""

import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email import message_from_bytes, policy
from email.message import EmailMessage
from typing import Any


@dataclass
class Post:
    """What the server has got, and what it answers."""

    port: int = 0
    refused: dict[str, str] = field(default_factory=dict)
    """By recipient, the answer to RCPT."""
    answers: dict[str, str] = field(default_factory=dict)
    """By the first four letters of another command, or "." for the end of a text, the answer to it."""
    dying: set[str] = field(default_factory=set)
    """Recipients whose mails are taken, but not confirmed: the line is cut."""
    mails: list[tuple[str, EmailMessage]] = field(default_factory=list)

    @property
    def recipients(self) -> list[str]:
        return [recipient for recipient, _ in self.mails]


class _Talk(socketserver.StreamRequestHandler):
    server: Any
    timeout = 30

    def handle(self) -> None:
        post: Post = self.server.post
        recipients: list[str] = []
        self._say("220 here")
        for line in self.rfile:
            command = line.decode().strip()
            verb = command[:4].upper()
            if verb == "RCPT":
                recipient = command.partition("<")[2].rstrip(">")
                answer = post.refused.get(recipient, "250 yes")
                recipients += [recipient] if answer.startswith("2") else []
                self._say(answer)
            elif verb in post.answers:
                self._say(post.answers[verb])
            elif verb == "DATA":
                self._say("354 go on")
                text = b"".join(iter(self.rfile.readline, b".\r\n"))
                message: Any = message_from_bytes(text, policy=policy.default)
                if "." in post.answers:
                    self._say(post.answers["."])
                    continue
                post.mails += [(recipient, message) for recipient in recipients]
                if post.dying & set(recipients):
                    return
                self._say("250 taken")
            else:
                self._say("221 bye" if verb == "QUIT" else "250 yes")

    def _say(self, answer: str) -> None:
        self.wfile.write(f"{answer}\r\n".encode())


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True


@contextmanager
def running() -> Iterator[Post]:
    with _Server(("127.0.0.1", 0), _Talk) as server:
        post = Post(server.server_address[1])
        server.post = post  # type: ignore[attr-defined]
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield post
        finally:
            server.shutdown()
            thread.join()
