"""A small MCP server over stdio, for tests; run as a script."""

import os
import sys
import time

from mcp.server.mcpserver import Image, MCPServer
from pydantic import BaseModel

server = MCPServer("shelf")


class Book(BaseModel):
    title: str
    pages: int


@server.tool()
def add(a: int, b: int = 1) -> int:
    """Adds two numbers."""
    return a + b


@server.tool(structured_output=False)
def say(text: str) -> str:
    """Says it back."""
    return f"you said {text}"


@server.tool()
def book(title: str) -> Book:
    """A book by its title."""
    return Book(title=title, pages=len(title))


@server.tool(structured_output=False)
def picture() -> list:
    """A red square, with a word."""
    from io import BytesIO

    from PIL import Image as Pictures

    file = BytesIO()
    Pictures.new("RGB", (40, 30), "red").save(file, "PNG")
    return ["here", Image(data=file.getvalue(), format="png")]


@server.tool()
def fail() -> str:
    """Fails."""
    raise ValueError("the shelf is empty")


@server.tool()
def slow(seconds: float) -> str:
    """Takes its time."""
    time.sleep(seconds)
    return "awake"


@server.tool()
def die() -> str:
    """Ends the server."""
    print("the roof fell in", file=sys.stderr, flush=True)
    os._exit(3)


@server.tool()
def environment(name: str) -> str:
    """A variable."""
    return os.environ.get(name, "not set")


if __name__ == "__main__":
    server.run("stdio")
