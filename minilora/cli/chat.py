"""The command chat: a conversation with a model in the terminal."""

import sys
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing
from typing import Any

import minilora as ml
from minilora.cli.options import (
    add_command,
    add_no_check_base,
    add_sampling,
    add_storage,
    add_template_kwargs,
    base_and_adapters,
    storage_options,
    template_check,
)
from minilora.common import nearest
from minilora.data.chat_template import as_trained
from minilora.data.prompt import encode_prompt

HELP = """\
/reset          begin a new conversation
/system TEXT    set the system message; /system none removes it
/adapter NAME   answer with this adapter; /adapter none answers with the base
/help           show this list
/quit           leave, as Ctrl-D does
//TEXT          send a message that begins with /
Ctrl-C stops an answer. The part that was printed stays in the conversation.
"""
COMMANDS = ("/reset", "/system", "/adapter", "/help", "/quit")
# Control characters act on a terminal, so their pictures are shown instead.
_PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
_PICTURES |= {0x7F: 0x2421} | {code: 0xFFFD for code in range(0x80, 0xA0)}


class Conversation:
    """A conversation with a model.

    Args:
        model: the model.
        tokenizer: its tokenizer, with a chat template.
        system: text of the system message, or None.
        options: options of ml.stream_generate.

    Attributes:
        messages: the messages of user and assistant so far.
    """

    def __init__(
        self, model: Any, tokenizer: Any, system: str | None = None, **options: Any
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.system = system
        self.options = options
        self.messages: list[dict[str, str]] = []

    def room(self, text: str) -> int:
        """Return the number of tokens that the context leaves for the answer to a message.

        Args:
            text: the user's message.

        Raises:
            ValueError: nothing is left, or the chat template refuses the messages.
        """
        kwargs = self.options.get("chat_template_kwargs")
        reader = as_trained(self.tokenizer, kwargs, self.model)
        size = len(encode_prompt(self._prompt(text), reader, place="the conversation"))
        context = self.model.config.max_position_embeddings
        if size >= context:
            raise ValueError(
                f"the conversation has {size} tokens with this message, and the model's context is "
                f"{context}: shorten the message, or begin a new conversation with /reset."
            )
        return context - size

    def answer(self, text: str) -> Generator[str, None, None]:
        """Generate the answer to a message, and keep both in the conversation.

        If the answer is stopped, the part so far is kept. A message without any answer is not kept.

        Args:
            text: the user's message.

        Returns:
            A generator of the pieces of the answer.

        Raises:
            ValueError: the context is full, or the chat template refuses the messages.
        """
        length = min(self.options["max_new_tokens"], self.room(text))
        options = self.options | {"max_new_tokens": length}
        pieces = ml.stream_generate(self.model, self.tokenizer, self._prompt(text), **options)
        return self._kept(text, pieces)

    def _kept(self, text: str, pieces: Generator[str, None, None]) -> Generator[str, None, None]:
        """Yield the pieces of an answer, and add it to the conversation at the end."""
        given = ""
        try:
            for piece in pieces:
                given += piece
                yield piece
        finally:
            pieces.close()
            if given:
                self.messages.append({"role": "user", "content": text})
                self.messages.append({"role": "assistant", "content": given})

    def _prompt(self, text: str) -> list[dict[str, str]]:
        """Return the system message, the conversation and a new message."""
        messages = [*self.messages, {"role": "user", "content": text}]
        if self.system is not None:
            messages.insert(0, {"role": "system", "content": self.system})
        return messages

    def run(self, command: str, value: str) -> str:
        """Run a command of the user.

        Args:
            command: the command, such as "/reset".
            value: the text after it.

        Returns:
            The lines to show.

        Raises:
            ValueError: the command or an adapter is unknown.
        """
        if command == "/help":
            return HELP
        if command == "/reset":
            self.messages.clear()
            return "a new conversation\n"
        if command == "/system":
            return self._change_system(value)
        if command == "/adapter":
            return self._change_adapter(value)
        near = ", ".join(nearest(command, COMMANDS))
        raise ValueError(
            f"unknown command {command}. Nearest: {near}. /help lists all; a message that begins "
            "with / is sent with //."
        )

    def _change_system(self, value: str) -> str:
        if value:
            self.system = None if value == "none" else value
        return f"system message: {self.system or 'none'}\n"

    def _change_adapter(self, value: str) -> str:
        names = ml.list_adapters(self.model)
        if value == "none":
            ml.set_adapter(self.model, [])
        elif value in names:
            ml.set_adapter(self.model, value)
        elif value:
            raise ValueError(f"unknown adapter {value!r}: expected one of {names}, or none.")
        else:
            return f"adapters: {', '.join(names) or 'none was loaded'}\n"
        return f"adapter: {value}\n"


def chat(model: str, adapter: Sequence[str] | None, system: str | None, **options: Any) -> None:
    """Talk with a model: answers are printed while they grow, and the history is kept.

    Args:
        model: Hub id, folder or .gguf file, or the folder of a run or an adapter.
        adapter: adapters as NAME=PATH or PATH; the first one is active.
        system: text of the system message, or None.
        options: quantize, dtype and check_base, and the options of ml.stream_generate.

    Raises:
        ValueError: the tokenizer has no chat template, or a number is out of range.
    """
    loading = {name: options.pop(name) for name in ("quantize", "dtype", "check_base")}
    sampling = {name: value for name, value in options.items() if name != "chat_template_kwargs"}
    ml.GenerationConfig(**sampling)  # checked before the model is loaded
    base, adapters = base_and_adapters(model, adapter or ())
    tokenizer = ml.load_tokenizer(base)
    template_check(base, "chat")(tokenizer)
    storage = storage_options(base, list(adapters.values()), loading["quantize"])
    loaded = ml.load_model(base, dtype=loading["dtype"], **storage)
    for name, folder in adapters.items():
        ml.load_adapter(loaded, folder, name, tokenizer=tokenizer, check_base=loading["check_base"])
    if adapters:
        ml.set_adapter(loaded, next(iter(adapters)))
    interactive = sys.stdin.isatty()
    if interactive:
        _enable_line_editing()
        print(f"{base}; adapters: {', '.join(adapters) or 'none'}. /help lists the commands.")
    prompt = "> " if interactive and sys.stdout.isatty() else ""
    conversation = Conversation(loaded, tokenizer, system, **options)
    talk(conversation, lambda: input(prompt), interactive)


def talk(conversation: Conversation, read: Callable[[], str], interactive: bool) -> None:
    """Read messages and commands and print the answers, until the input ends.

    Args:
        conversation: the conversation.
        read: a function that returns the next line, and raises EOFError at the end.
        interactive: True lets Ctrl-C stop an answer; False lets it end the program.
    """
    while True:
        try:
            line = read().strip()
        except EOFError:
            if interactive:
                print()  # the shell's prompt begins a new line
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\nCtrl-D or /quit leaves.")
            continue
        if line == "/quit":
            return
        try:
            _respond(conversation, line)
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("[stopped]")
        except ValueError as error:
            print(f"minilora: {error}", file=sys.stderr)


def _respond(conversation: Conversation, line: str) -> None:
    """Run a command, or print the answer to a message."""
    if line.startswith("/") and not line.startswith("//"):
        command, _, value = line.partition(" ")
        print(conversation.run(command, value.strip()), end="")
    elif line:
        with closing(conversation.answer(line.removeprefix("/"))) as pieces:
            print_pieces(pieces)


def print_pieces(pieces: Iterable[str]) -> None:
    """Print an answer while it grows, and end its line.

    On a terminal, control characters are shown as pictures, so that no answer can move the cursor.

    Args:
        pieces: the pieces of the answer.
    """
    on_terminal = sys.stdout.isatty()
    try:
        for piece in pieces:
            shown = piece.translate(_PICTURES) if on_terminal else piece
            print(shown, end="", flush=True)
    finally:
        print(flush=True)


def _enable_line_editing() -> None:
    """Give `input` a history and the arrow keys, where Python has the module (not on Windows)."""
    try:
        import readline  # noqa: F401  # `input` uses it once it is imported
    except ImportError:
        return


def add_commands(commands: Any) -> None:
    """Add the command of this file.

    Args:
        commands: the subparsers of the program.
    """
    parser = add_command(commands, chat, "model")
    parser.add_argument(
        "--adapter",
        action="append",
        metavar="NAME=PATH",
        help="an adapter (folder or Hub id) and its name for /adapter; PATH alone takes the name of "
        "the folder; may be repeated, and the first one is active",
    )
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    add_sampling(parser, max_new_tokens=512, temperature=0.7)
    add_template_kwargs(parser)
    add_no_check_base(parser)
    add_storage(parser)
