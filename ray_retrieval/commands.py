"""Commands of this program as text: what errors name as a mend, and what the command line says is next."""

import shlex


def command(*words: str) -> str:
    """A command of this program with its arguments, as a shell takes them."""
    return shlex.join(["ray-retrieval", *words])
