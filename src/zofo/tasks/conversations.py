"""Rows that are conversations: `messages`, or a prompt and a completion that are lists of them, as in trl."""

from typing import Any

from zofo.errors import ZofoError

_ROLES = ("system", "user", "assistant")

Turn = tuple[str, str]  # the role, and what it says


def turns_of(row: dict[str, Any], where: str, unknown: str = "") -> list[Turn] | None:
    """The turns of a row, the last two of the user and the assistant; None if it is no conversation.

    `unknown` stands for an answer that a row need not have; if it is empty, rows need one. Refuses a conversation that
    has no such end, or holds more than texts; `where` names the row.

    Examples:
        >>> asked, answered = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
        >>> turns_of({"prompt": [asked], "completion": [answered]}, "row 0")
        [('user', '2 + 2?'), ('assistant', '4')]
    """
    messages: Any = row.get("messages")
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, str):
        return None  # further columns are not read
    if isinstance(prompt, list):
        completion = completion or [{"role": "assistant", "content": unknown}] * bool(unknown)
        if not isinstance(completion, list) or len(completion) != 1:
            raise ZofoError(
                f"{where}: prompt is a list of messages, so completion must be a list with the one message that "
                "answers it"
            )
        messages = [*prompt, *completion]
    if messages is None:
        return None
    if not isinstance(messages, list):
        raise ZofoError(f"{where}: messages must be a list, but are {messages!r:.80}")
    turns = [_turn(message, where) for message in messages]
    if unknown and turns and turns[-1][0] == "user":
        turns.append(("assistant", unknown))
    if [role for role, _ in turns[-2:]] != ["user", "assistant"]:
        ends = " and ".join(role for role, _ in turns[-2:]) or "nothing"
        raise ZofoError(
            f"{where}: a conversation must end with a user turn and the assistant turn that answers it, but this ends "
            f"with {ends}: leave out what follows the last answer, or leave out the row"
        )
    return turns


def _turn(message: Any, where: str) -> Turn:
    said = {key: value for key, value in message.items() if value is not None} if isinstance(message, dict) else {}
    role, content = said.pop("role", None), said.pop("content", None)
    if role not in _ROLES or not isinstance(content, str) or said:
        raise ZofoError(
            f"{where}: a message must have a role ({', '.join(_ROLES)}) and a text as content, and nothing else, but "
            f"one is {message!r:.120}: images and calls of tools cannot be trained on"
        )
    return role, content
